"""The kernels of performance.kernels against float64 PyTorch: in Triton's interpreter on the CPU, compiled on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from performance import fused

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}
DTYPES = list(EPS)


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    """Triton reads TRITON_INTERPRET where a kernel is defined: for its own functions in conftest.py, for ours here."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fused, "INTERPRETED", not CUDA)
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from performance import kernels

    assert type(kernels.gate_forward).__name__ == ("JITFunction" if CUDA else "InterpretedFunction")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(result: torch.Tensor, exact: torch.Tensor, units: float = 4) -> None:
    """Equal to float64 arithmetic on the same inputs, up to some units in the last place of the largest values near by."""
    error = (result.double() - exact).abs()
    allowed = units * EPS[result.dtype] * (exact.abs() + exact.abs().mean())
    assert torch.isfinite(result).all()
    assert (error <= allowed).all(), f"{(error / allowed).max().item():.2f} times the allowed error"


def gradients(outputs, inputs, grads):
    return torch.autograd.grad(outputs, inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 10), (2, 5, 2562), (1, 1, 2)])
def test_gate(shape, dtype):
    hg = (3 * random(*shape, dtype=dtype)).requires_grad_()
    grad = random(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
    out = fused.Gate.apply(hg)
    exact_hg = hg.detach().double().requires_grad_()
    h, g = exact_hg.chunk(2, -1)
    exact = h * F.gelu(g)
    close(out, exact)
    close(*gradients(out, hg, grad), *gradients(exact, exact_hg, grad.double()))


def layer_norm_case(rows: int, width: int, dtype: torch.dtype, mean: float):
    norm = nn.LayerNorm(width, eps=1e-5).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(random(width, dtype=dtype, seed=3))
    norm.bias.copy_(random(width, dtype=dtype, seed=4))
    x = (random(rows, width, dtype=dtype) + mean).requires_grad_()
    grad_x, grad_y = random(rows, width, dtype=dtype, seed=1), random(rows, width, dtype=dtype, seed=2)
    residual, y = fused.layer_normed(x, norm)
    exact_x = x.detach().double().requires_grad_()
    exact = F.layer_norm(exact_x, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert torch.equal(residual, x)
    close(y, exact, 16 if mean else 4)
    (exact_grad,) = gradients((exact_x * 1, exact), exact_x, (grad_x.double(), grad_y.double()))
    close(*gradients((residual, y), x, (grad_x, grad_y)), exact_grad, 16 if mean else 4)
    result, again = fused.layer_norm_backward(grad_y, grad_x, x.detach(), norm, with_y=True)
    assert torch.equal(again, y)
    close(result, exact_grad, 16 if mean else 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 640), (3, 1280), (2, 37)])
def test_layer_norm(rows, width, dtype):
    layer_norm_case(rows, width, dtype, mean=0)


def group_norm_case(shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool, mean: float = 0.0) -> None:
    norm = nn.GroupNorm(groups, shape[1], eps=1e-5).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(random(shape[1], dtype=dtype, seed=3))
    norm.bias.copy_(random(shape[1], dtype=dtype, seed=4))
    x = (random(*shape, dtype=dtype) + mean).requires_grad_()
    grad_x, grad_y = random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=2)
    residual, y = fused.group_normed(x, norm, silu)
    exact_x = x.detach().double().requires_grad_()
    exact = F.group_norm(exact_x, groups, norm.weight.double(), norm.bias.double(), norm.eps)
    exact = F.silu(exact) if silu else exact
    assert torch.equal(residual, x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    units = 4 + 4 * abs(mean)
    close(y, exact, units)
    (exact_grad,) = gradients((exact_x * 1, exact), exact_x, (grad_x.double(), grad_y.double()))
    close(*gradients((residual, y), x, (grad_x, grad_y)), exact_grad, units)
    without_residual = gradients(fused.group_normed(x, norm, silu)[1], x, grad_y)
    close(*without_residual, exact_grad - grad_x.double(), units)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((2, 64, 9, 5), 32), ((1, 20, 17, 11), 2), ((2, 48, 1, 1), 3)])
def test_group_norm(shape, groups, dtype, silu):
    group_norm_case(shape, groups, dtype, silu)


def test_a_large_mean_costs_no_precision():
    group_norm_case((1, 8, 40, 40), 2, torch.float32, True, mean=300.0)
    layer_norm_case(4, 64, torch.float32, mean=300.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_group_norm_of_any_size(batch, groups, width, h, w, silu):
    if width * h * w >= 16:  # of two values the gradient is 0: what is left is rounding
        group_norm_case((batch, groups * width, h, w), groups, torch.float32, silu, mean=1.0)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 300), st.integers(1, 40), st.integers(1, 100), st.sampled_from(DTYPES), st.booleans()
)
def test_gradients_of_factors(bands, rows, rank, width, dtype, transposed):
    left, right = random(bands, rows, rank, dtype=dtype), random(rows, bands, width, dtype=dtype, seed=1).transpose(0, 1)
    result = random(bands, *((width, rank) if transposed else (rank, width)), dtype=torch.float32, seed=2)
    view = result.transpose(1, 2) if transposed else result
    exact = view.double() + 0.5 * left.double().transpose(1, 2) @ right.double()
    fused.add_product(view, left, right, 0.5)
    torch.testing.assert_close(view.double(), exact, rtol=1e-5, atol=2e-5 * rows**0.5)


def sdxl_cases():
    """Shapes of SDXL's group norms at 1024 × 1024 (channels, side)."""
    return [(320, 128), (640, 128), (960, 128), (320, 64), (640, 64), (960, 64), (1280, 64), (1920, 64), (640, 32), (1280, 32),
            (1920, 32), (2560, 32)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_shape_of_sdxl(dtype):
    for channels, side in sdxl_cases():
        group_norm_case((3, channels, side, side), 32, dtype, silu=True)
    group_norm_case((1, 128, 1024, 1024), 32, dtype, silu=True)  # of the VAE
    for rows, width in ((3 * 4096, 640), (3 * 1024, 1280), (231, 768)):
        layer_norm_case(rows, width, dtype, mean=0)
        hg = random(rows, 8 * width, dtype=dtype)
        h, g = hg.double().chunk(2, -1)
        close(fused.Gate.apply(hg), h * F.gelu(g))
