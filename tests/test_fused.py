"""The kernels of performance.kernels against float64 PyTorch: in Triton's interpreter on the CPU, compiled on a GPU."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora import shake
from torch import Tensor, nn

from lora import add_lora
from options.training import LoRAConfig
from performance import fused
from performance.attention import sdpa
from performance.layers import use_fast_layers
from performance.linear_group import LinearGroup

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The largest relative error of rounding to nearest; the interpreter truncates to bfloat16, and has no products of it.
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8 if CUDA else 2**-7, torch.float32: 2**-24}
DTYPES = list(UNIT)


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    """Triton reads TRITON_INTERPRET where a kernel is defined: for its own functions in conftest.py, for ours here."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fused, "INTERPRETED", not CUDA)
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from performance import kernels

    assert type(kernels.gate_forward).__name__ == ("JITFunction" if CUDA else "InterpretedFunction")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(results: list[Tensor], function: Callable, x: Tensor, grads: list[Tensor], mean: float = 0.0) -> None:
    """Compares [outputs, gradient of x] with those of `function` (x -> outputs) in float64.

    Allowed: one rounding to the dtype; twice the error that PyTorch makes in float32 (the gradients of small groups are ill
    conditioned); and 8 units of float32, which are as much larger as the values of x, of deviation 1, are far from 0.
    """

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        y = x.detach().to(dtype).requires_grad_()
        outputs = function(y)
        return [*outputs, *torch.autograd.grad(outputs, y, [grad.to(dtype) for grad in grads])]

    for result, exact, single in zip(results, by_torch(torch.float64), by_torch(torch.float32), strict=True):
        units = 8 * UNIT[torch.float32] * (1 + abs(mean)) * exact.abs().max()
        smallest = torch.finfo(result.dtype).smallest_normal * UNIT[result.dtype]
        allowed = UNIT[result.dtype] * exact.abs() + 2 * (single - exact).abs().max() + units + smallest
        error = (result.double() - exact).abs()
        assert torch.isfinite(result).all()
        assert (error <= allowed).all(), f"{(error / allowed).max().item():.2f} times the allowed error"


def gate_case(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With and without what the backward pass makes again."""
    hg, grad = 3 * random(*shape, dtype=dtype), random(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
    out, (gradient, again) = fused.gate(hg), fused.gate_gradient(grad, hg, with_out=True)
    assert torch.equal(again, out)
    assert torch.equal(fused.gate_gradient(grad, hg, with_out=False)[0], gradient)
    close([out, gradient], lambda hg: (hg.chunk(2, -1)[0] * F.gelu(hg.chunk(2, -1)[1]),), hg, [grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 10), (1, 2, 2562), (1, 1, 2)])
def test_gate(shape, dtype):
    gate_case(shape, dtype)


def of_random_weights(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    norm.to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(random(*norm.weight.shape, dtype=dtype, seed=3))
    norm.bias.copy_(random(*norm.bias.shape, dtype=dtype, seed=4))
    return norm


def layer_norm_case(rows: int, width: int, dtype: torch.dtype, mean: float = 0.0) -> None:
    norm = of_random_weights(nn.LayerNorm(width, eps=1e-5), dtype)
    x = (random(rows, width, dtype=dtype) + mean).requires_grad_()
    grads = [random(rows, width, dtype=dtype, seed=seed) for seed in (1, 2)]

    def by_torch(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), F.layer_norm(x, (width,), norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    y = fused.layer_norm(x.detach(), norm)
    gradient, again = fused.layer_norm_gradient(grads[1], grads[0], x.detach(), norm, with_y=True)
    assert torch.equal(again, y)
    assert torch.equal(fused.layer_norm_gradient(grads[1], grads[0], x.detach(), norm, with_y=False)[0], gradient)
    close([x.detach(), y, gradient], by_torch, x, grads, mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 640), (3, 1280), (2, 37)])
def test_layer_norm(rows, width, dtype):
    layer_norm_case(rows, width, dtype)


def group_norm_case(shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool, mean: float = 0.0) -> None:
    """With and without a residual connection."""
    norm = of_random_weights(nn.GroupNorm(groups, shape[1], eps=1e-5), dtype)
    x = (random(*shape, dtype=dtype) + mean).requires_grad_()
    grads = [random(*shape, dtype=dtype, seed=seed) for seed in (1, 2)]

    def by_torch(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.group_norm(x, groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return x.clone(), F.silu(y) if silu else y

    outputs = fused.group_normed(x, norm, silu)
    assert torch.equal(outputs[0], x)
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    alone = torch.autograd.grad(outputs[1], x, grads[1], retain_graph=True)
    close([outputs[1], *alone], lambda x: by_torch(x)[1:], x, grads[1:], mean)
    close([*outputs, *torch.autograd.grad(outputs, x, grads)], by_torch, x, grads, mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "silu"), [((2, 6, 9, 15), 2, True), ((1, 70, 5, 7), 2, False), ((1, 48, 1, 1), 3, True)]
)
def test_group_norm(shape, groups, dtype, silu):
    """With pixels of more than one chunk, channels of more than one block, and a single pixel."""
    group_norm_case(shape, groups, dtype, silu)


@pytest.mark.parametrize("mean", [30.0, 300.0])
def test_a_large_mean_costs_no_precision(mean):
    """A variance from the sum of squares would be wrong by mean² units; the rounding of x costs mean units anyway."""
    group_norm_case((1, 4, 15, 15), 2, torch.float32, True, mean)
    layer_norm_case(4, 64, torch.float32, mean)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 15), st.integers(1, 15), st.booleans())
def test_group_norm_of_any_size(batch, groups, width, h, w, silu):
    if width * h * w > 2:  # of two values the gradient is 0: what is left is rounding
        group_norm_case((batch, groups * width, h, w), groups, torch.float32, silu, mean=1.0)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 200),
    st.integers(1, 20),
    st.integers(1, 70),
    st.sampled_from([dtype for dtype in DTYPES if CUDA or dtype != torch.bfloat16]),
    st.booleans(),
)
def test_gradients_of_factors(bands, rows, rank, width, dtype, transposed):
    """Allowed: what summing in any order may lose."""
    left, right = random(bands, rows, rank, dtype=dtype), random(rows, bands, width, dtype=dtype, seed=1).transpose(0, 1)
    result = random(bands, *((width, rank) if transposed else (rank, width)), dtype=torch.float32, seed=2)
    view = result.transpose(1, 2) if transposed else result
    terms, sizes = (f(left).double().transpose(1, 2) @ f(right).double() for f in (torch.clone, torch.abs))
    exact, allowed = view.double() + 0.5 * terms, (rows + 3) * UNIT[torch.float32] * (view.double().abs() + 0.5 * sizes)
    fused.add_product(view, left, right, 0.5)
    assert ((view.double() - exact).abs() <= allowed).all()


def test_a_u_net_of_these_kernels_computes_the_same(monkeypatch):
    """Output and gradients of the factors in float32, against the plain operations in float64."""
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions would round to 10 bits
    sizes = {"block_out_channels": (8, 16), "attention_head_dim": 2, "cross_attention_dim": 8, "norm_num_groups": 2}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(layers_per_block=1, use_linear_projection=True, **kinds, **sizes)
    sample, context = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 8)
    results = []
    for dtype, kernels in ((torch.float32, True), (torch.float64, False)):
        monkeypatch.setattr(fused, "HAS_TRITON", kernels)
        model = copy.deepcopy(unet).to(DEVICE, dtype)
        adapter = add_lora(model, LoRAConfig(rank=2, targets="attentions"), dtype=dtype)
        shake(adapter)
        use_fast_layers(model, sdpa, LinearGroup)
        out = model(sample.to(DEVICE, dtype), torch.tensor(500, device=DEVICE), context.to(DEVICE, dtype)).sample
        out.square().sum().backward()
        results.append([out.detach(), *(grad for module in adapter.modules.values() for grad in module.grads)])
    for single, exact in zip(*results, strict=True):
        assert 0 < (single - exact).norm() < 1e-4 * exact.norm()


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
        layer_norm_case(rows, width, dtype)
        gate_case((rows, 8 * width), dtype)
