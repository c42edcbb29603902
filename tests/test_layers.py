"""Fast layers against the forward of diffusers and transformers, and the choice of an attention kernel."""

import pytest
import torch
from test_lora import inputs, shake
from torch import Tensor, nn

from common.errors import UserError
from lora import Adapter, add_lora
from memory import speed_up
from model.sdxl import Denoiser
from options.training import LoRAConfig
from performance import attention
from performance.attention import Shapes, sdpa
from performance.layers import use_fast_layers
from performance.linear_group import LinearGroup
from performance.quantise import quantise_base

CPU = torch.device("cpu")
SHAPES = Shapes({(torch.Size((2, 32, 2, 16)), torch.Size((2, 32, 2, 16))): 3,
                 (torch.Size((2, 32, 2, 16)), torch.Size((2, 7, 2, 16))): 3})  # fmt: skip


def kinds_of_inputs() -> dict[str, dict]:
    """Arguments of the tiny Denoiser: as usual; one picture that is no square, in channels_last; captions of 3 chunks.

    The end of text is the last token: else the pooled one would be the first, which reads no other: q and k had no gradient.
    """
    one, long = inputs(batch=1, seed=1), inputs(seed=2)
    one["noisy_latents"] = torch.randn(1, 4, 8, 12).to(memory_format=torch.channels_last)
    long["text"] = (torch.randint(1, 180, (2, 2, 3 * 77), generator=torch.Generator().manual_seed(2)),)
    kinds = {"usual": inputs(), "one": one, "long": long}
    for arguments in kinds.values():
        arguments["text"][0][..., 76::77] = 189
    return kinds


def output_and_gradients(denoiser: nn.Module, adapter: Adapter, arguments: dict) -> list[Tensor]:
    """[prediction, gradient of every A and B]."""
    adapter.grad.zero_()
    out = denoiser(**arguments)
    out.square().sum().backward()
    return [out.detach(), *(grad.clone() for module in adapter.modules.values() for grad in module.grads)]


def same(results: list[Tensor], expected: list[Tensor]) -> None:
    """Each tensor for itself: gradients of some layers are a million times smaller than those of others."""
    for result, reference in zip(results, expected, strict=True):
        assert reference.norm() > 0
        assert (result - reference).norm() <= 1e-6 * reference.norm()


@pytest.fixture
def exact_pipe(pipe):
    """The tiny model in float64: what is left of a difference is that an adapter's gradients are float32."""
    return pipe.to(torch.float64)


@pytest.mark.parametrize("targets", ["attention", "all", r"(to_k|to_out\.0|q_proj|k_proj|ff\.net\.2)$"])
@pytest.mark.parametrize("base", ["plain", "int8"])
def test_same_function_as_diffusers(exact_pipe, targets, base):
    """Values and gradients of U-Net and text encoders, of plain and packed layers, with LoRA on all of a group or on some."""
    denoiser = Denoiser(exact_pipe)
    if base == "int8":
        quantise_base(denoiser, base, CPU)
    adapter = add_lora(denoiser, LoRAConfig(rank=2, targets=targets), denoiser.unused, dtype=torch.float64)
    shake(adapter)
    kinds = kinds_of_inputs()
    expected = {kind: output_and_gradients(denoiser, adapter, arguments) for kind, arguments in kinds.items()}
    speed_up(denoiser, sdpa)
    for kind, arguments in kinds.items():
        same(output_and_gradients(denoiser, adapter, arguments), expected[kind])


def test_without_lora_it_is_the_base(exact_pipe):
    denoiser = Denoiser(exact_pipe).requires_grad_(False)
    kinds = kinds_of_inputs()
    expected = {kind: denoiser(**arguments) for kind, arguments in kinds.items()}
    weights = {name: p.clone() for name, p in denoiser.named_parameters()}
    speed_up(denoiser, sdpa)
    for kind, arguments in kinds.items():
        same([denoiser(**arguments)], [expected[kind]])
    assert all(torch.equal(p, weights[name]) for name, p in denoiser.named_parameters())


def test_the_attention_of_the_u_net_is_by_the_kernel_that_is_named(denoiser):
    """Twice in each transformer block: of the tokens, and with the context."""
    shapes = []
    speed_up(denoiser, lambda q, k, v: shapes.append((q.shape, k.shape)) or sdpa(q, k, v))
    denoiser(**inputs())
    blocks = sum(type(m).__name__ == "BasicTransformerBlock" for m in denoiser.modules())
    assert sum(q == k for q, k in shapes) == sum(k[1] == 77 for _, k in shapes) == blocks > 3


@pytest.mark.parametrize("batch", [1, 2])
def test_the_vae_is_that_of_diffusers(exact_pipe, batch):
    vae, generator = exact_pipe.vae, torch.Generator().manual_seed(0)
    pixels, latents = (torch.randn(batch, *shape, generator=generator).double() for shape in ((3, 48, 64), (4, 6, 8)))
    with torch.no_grad():
        expected = [vae.encode(pixels).latent_dist.parameters, vae.decode(latents).sample]
        use_fast_layers(vae, sdpa, LinearGroup)
        for layout in (torch.contiguous_format, torch.channels_last):
            encoded = vae.encode(pixels.to(memory_format=layout)).latent_dist.parameters
            same([encoded, vae.decode(latents.to(memory_format=layout)).sample], expected)


def test_on_the_cpu_attention_is_sdpa():
    assert attention.choose_attention("auto", SHAPES, CPU, torch.float32) == "sdpa"
    assert attention.choose_attention("sdpa", SHAPES, CPU, torch.float32) == "sdpa"


def test_a_kernel_that_cannot_run_says_why():
    if torch.cuda.is_available():
        pytest.skip("xFormers runs on this machine")
    with pytest.raises(UserError, match=r"--attention xformers is not usable: .*cpu.*--attention sdpa"):
        attention.choose_attention("xformers", SHAPES, CPU, torch.float32)


@pytest.mark.parametrize("spoilt", [None, b"", b"nonsense", b"\xff"])
def test_the_fastest_kernel_is_measured_once(monkeypatch, tmp_path, spoilt):
    """Then it is remembered for such a card, and only tried again; if it no longer works, or the file is spoilt, all are."""
    milliseconds, broken, timed = {"cudnn": 3.0, "flash": 2.0, "efficient": 4.0, "xformers": 1.0}, {"xformers"}, []
    names = {kernel: name for name, kernel in attention.KERNELS.items()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(attention, "kernel_problem", lambda name, *_: "broken" if name in broken else None)
    monkeypatch.setattr(attention, "time_kernel", lambda kernel, *_: timed.append(kernel) or milliseconds[names[kernel]])

    def choose(dtype: torch.dtype = torch.float16) -> tuple[str, bool]:
        timed.clear()
        return attention.choose_attention("auto", SHAPES, torch.device("cuda"), dtype), bool(timed)

    assert choose() == ("flash", True)
    if spoilt is None:
        assert choose() == ("flash", False)
        assert choose(torch.bfloat16) == ("flash", True)
        broken.add("flash")
    else:
        for file in (tmp_path / "sdxl_lora/attention").iterdir():
            file.write_bytes(spoilt)
        milliseconds["cudnn"] = 1.0
    assert choose() == ("cudnn", True)
    assert choose() == ("cudnn", False)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: sdpa(q, k, 1.05 * v),
        lambda q, k, v: sdpa(q, k.detach(), v) + 0 * k.sum(),
        lambda q, k, v: sdpa(q, k, v) + (0 * v.mean()).sqrt(),  # its derivative is NaN
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, wrong):
    """A wrong output; only a wrong gradient; only a NaN gradient."""
    monkeypatch.setitem(attention.KERNELS, "flash", wrong)
    with pytest.raises(UserError, match="--attention flash is not usable: it is wrong on cpu"):
        attention.choose_attention("flash", SHAPES, CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_of_the_gpu_are_usable_and_the_fastest_is_chosen(monkeypatch, dtype):
    device = torch.device("cuda")
    big = Shapes({(torch.Size((1, 1024, 4, 64)), torch.Size((1, 1024, 4, 64))): 2,
                          (torch.Size((1, 1024, 4, 64)), torch.Size((1, 77, 4, 64))): 2})  # fmt: skip
    usable = [n for n in attention.KERNELS if not any(attention.kernel_problem(n, q, k, device, dtype) for q, k in big)]
    assert {"flash", "efficient", "sdpa"} <= set(usable)
    times = {name: 1.0 + (name != "efficient") for name in attention.KERNELS}
    named = {kernel: name for name, kernel in attention.KERNELS.items()}
    monkeypatch.setattr(attention, "time_kernel", lambda kernel, *_: times[named[kernel]])
    assert attention.choose_attention("auto", big, device, dtype) == "efficient"
