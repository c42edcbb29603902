import pytest
import torch
from test_lora import inputs, shake

from common.errors import UserError
from lora import add_lora
from options.training import LoRAConfig
from performance import kernels as fast
from performance.quantise import quantise_base

CPU = torch.device("cpu")
SHAPES = fast.Shapes({(torch.Size((2, 32, 2, 16)), torch.Size((2, 32, 2, 16))): 3,
                         (torch.Size((2, 32, 2, 16)), torch.Size((2, 7, 2, 16))): 3})  # fmt: skip


def output_and_gradient(denoiser, adapter) -> tuple[torch.Tensor, torch.Tensor]:
    adapter.grad.zero_()
    out = denoiser(**inputs())
    out.square().mean().backward()
    return out.detach(), adapter.grad.clone()


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("base", ["fp32", "int8"])
def test_same_function_as_diffusers(denoiser, targets, base):
    """Compares our attention and GEGLU with diffusers' own code, for plain, LoRA and packed projections."""
    if base != "fp32":
        quantise_base(denoiser, base, CPU)
    adapter = add_lora(denoiser, LoRAConfig(rank=2, targets=targets), denoiser.unused)
    shake(adapter)
    expected = output_and_gradient(denoiser, adapter)
    fast.use_fast_kernels(denoiser.unet, fast.KERNELS["sdpa"])
    results = output_and_gradient(denoiser, adapter)
    assert any(type(m).__name__ == "GEGLU" and m.forward.__func__ is fast.geglu for m in denoiser.modules())
    for result, reference in zip(results, expected, strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(result, reference, atol=1e-5, rtol=1e-4)


def test_gate_by_hand_equals_autograd():
    h, g = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fast.Gate.apply, (h, g))


def test_on_the_cpu_attention_is_sdpa():
    assert fast.choose_attention("auto", SHAPES, CPU, torch.float32) == "sdpa"
    assert fast.choose_attention("sdpa", SHAPES, CPU, torch.float32) == "sdpa"


def test_a_kernel_that_cannot_run_says_why():
    if torch.cuda.is_available():
        pytest.skip("xFormers runs on this machine")
    with pytest.raises(UserError, match=r"--attention xformers is not usable: .*cpu.*--attention sdpa"):
        fast.choose_attention("xformers", SHAPES, CPU, torch.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: fast.sdpa(q, k, 1.05 * v),
        lambda q, k, v: fast.sdpa(q, k.detach(), v) + 0 * k.sum(),
        lambda q, k, v: fast.sdpa(q, k, v) + (0 * v.mean()).sqrt(),  # its derivative is NaN
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, wrong):
    """A wrong output; only a wrong gradient; only a NaN gradient."""
    monkeypatch.setitem(fast.KERNELS, "flash", wrong)
    with pytest.raises(UserError, match="--attention flash is not usable: it is wrong on cpu"):
        fast.choose_attention("flash", SHAPES, CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_of_the_gpu_are_usable_and_the_fastest_is_chosen(monkeypatch, dtype):
    device = torch.device("cuda")
    big = fast.Shapes({(torch.Size((1, 1024, 4, 64)), torch.Size((1, 1024, 4, 64))): 2,
                          (torch.Size((1, 1024, 4, 64)), torch.Size((1, 77, 4, 64))): 2})  # fmt: skip
    usable = [n for n in fast.KERNELS if not any(fast.kernel_problem(n, q, k, device, dtype) for q, k in big)]
    assert {"flash", "efficient", "sdpa"} <= set(usable)
    times = {name: 1.0 + (name != "efficient") for name in fast.KERNELS}
    named = {kernel: name for name, kernel in fast.KERNELS.items()}
    monkeypatch.setattr(fast, "time_kernel", lambda kernel, *_: times[named[kernel]])
    assert fast.choose_attention("auto", big, device, dtype) == "efficient"
