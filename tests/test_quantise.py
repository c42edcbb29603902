import copy
import sys
import weakref

import pytest
import torch
from test_lora import inputs
from torch import nn

from common.errors import UserError
from memory import GiB
from performance import quantise
from performance.checkpointing import block_names, checkpoint_blocks
from performance.quantise import PACKED_BASES, QuantisedLinear, packed_bytes, quantise_base

CPU = torch.device("cpu")
EVERY_BASE = pytest.mark.parametrize("base", PACKED_BASES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPES = [(64, 128), (48, 80), (32, 100), (1, 64)]  # out, in; with and without rows of whole blocks, and a partial last block


def plain(out: int, inner: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    """A linear layer with normally distributed weights, similar to those of a trained one."""
    torch.manual_seed(0)
    layer = nn.Linear(inner, out, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.to(dtype)


def held_bytes(layer: nn.Module) -> int:
    """Bytes of all tensors of a module: parameters, buffers and plain attributes."""
    state = vars(layer)
    tensors = [*layer.parameters(), *layer.buffers(), *(v for v in state.values() if isinstance(v, torch.Tensor))]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_of_every_row(shape, dtype):
    layer = plain(*shape, dtype)
    layer.weight.data[0] *= 50  # rows of different scale
    W = layer.weight.detach().double()
    dense = QuantisedLinear(layer, "int8", CPU).dense()
    assert dense.dtype == dtype
    step = W.abs().amax(dim=1, keepdim=True) / 127
    rounding = W.abs().amax(dim=1, keepdim=True) * torch.finfo(dtype).eps / 2  # of the result, in its own dtype
    error = (dense.double() - W).abs()
    assert (error <= (step / 2 + rounding) * 1.001).all()
    assert error.max() > 0.4 * step.min()  # and it is quantised


@EVERY_DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_within_half_a_gap_of_every_block(shape, dtype):
    """The codes are between -1 and 1, and their widest gap is 0.304."""
    layer = plain(*shape, dtype)
    W = layer.weight.detach().double().flatten()
    dense = QuantisedLinear(layer, "nf4", CPU).dense()
    assert dense.dtype == dtype
    assert dense.shape == shape
    error = (dense.double().flatten() - W).abs()
    for block in range(0, len(W), 64):
        assert error[block : block + 64].max() <= 0.156 * W[block : block + 64].abs().max()
    assert 0.07 < error.norm() / W.norm() < 0.11


@EVERY_BASE
def test_relative_error_of_normal_weights(base):
    layer = plain(640, 640).requires_grad_(False)
    relative = (QuantisedLinear(layer, base, CPU).dense() - layer.weight).norm() / layer.weight.norm()
    assert relative.item() == pytest.approx({"int8": 0.0075, "nf4": 0.0920}[base], rel=0.03)


@EVERY_BASE
def test_zeros_stay_zeros(base):
    layer = plain(8, 64)
    nn.init.zeros_(layer.weight)
    assert not QuantisedLinear(layer, base, CPU).dense().any()


@EVERY_BASE
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_those_of_the_dense_weight(base, bias):
    layer = plain(48, 80, bias=bias)
    quantised = QuantisedLinear(layer, base, CPU)
    reference = copy.deepcopy(layer)
    reference.weight.data = quantised.dense()
    x = torch.randn(2, 5, 80, requires_grad=True)
    y = torch.randn(2, 5, 48)
    (wanted,) = torch.autograd.grad(reference(x), x, y)
    (got,) = torch.autograd.grad(quantised(x), x, y)
    assert torch.equal(quantised(x), reference(x))
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(quantised(x), layer(x), atol=1e-5)


@EVERY_BASE
def test_nothing_is_kept_for_the_backward_pass(base):
    kept = []
    x = torch.randn(3, 80, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        QuantisedLinear(plain(48, 80), base, CPU)(x)
        assert kept == []
        plain(48, 80)(x)
        assert kept != []


@EVERY_BASE
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [*SHAPES, (1280, 1280)])
def test_bytes_are_as_predicted(base, dtype, shape):
    layer = plain(*shape, dtype)
    quantised = QuantisedLinear(layer, base, CPU)
    assert held_bytes(quantised) == packed_bytes(layer, base) + layer.bias.nbytes
    if shape == (1280, 1280):
        assert packed_bytes(layer, base) < {"int8": 8.03, "nf4": 4.26}[base] / 8 * layer.weight.numel()


@EVERY_BASE
def test_it_is_a_linear_layer_with_a_packed_weight(base):
    layer = plain(48, 80)
    quantised = QuantisedLinear(layer, base, CPU)
    assert isinstance(quantised, nn.Linear)
    assert (quantised.in_features, quantised.out_features) == (80, 48)
    assert quantised.bias is layer.bias
    assert quantised.weight.dtype in (torch.int8, torch.uint8)
    assert not quantised.weight.requires_grad
    assert "in_features=80, out_features=48, bias=True" in repr(quantised)


@EVERY_BASE
def test_casting_and_moving_leave_the_packed_weight_intact(base):
    quantised = QuantisedLinear(plain(48, 80, torch.float16), base, CPU)
    before = quantised.dense()
    for moved in (copy.deepcopy(quantised).to(torch.bfloat16), copy.deepcopy(quantised).half().double(), quantised.to(CPU)):
        assert torch.equal(moved.dense(), before)
    meta = copy.deepcopy(quantised).to("meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers(), meta.dense())} == {"meta"}
    other = QuantisedLinear(nn.Linear(80, 48).half(), base, CPU)
    other.load_state_dict(quantised.state_dict())
    assert torch.equal(other.dense(), before)


@EVERY_BASE
@pytest.mark.gpu
def test_a_cuda_graph_holds_it(base):
    layer = plain(640, 640, torch.float16)
    quantised = QuantisedLinear(layer, base, torch.device("cuda")).to("cuda")
    x = torch.randn(64, 640, device="cuda", dtype=torch.float16, requires_grad=True)

    def step():
        return torch.autograd.grad(quantised(x).square().sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first launch of a kernel cannot be recorded
        wanted = step().clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    got.zero_()
    graph.replay()
    torch.testing.assert_close(got, wanted)
    difference = (quantised.dense().cpu() - QuantisedLinear(layer.cpu(), base, CPU).dense()).abs()
    assert difference.max() < 2e-3  # one step of int8: the devices may round a value half-way between two steps differently
    assert (difference > 1e-5).float().mean() < 1e-4


@EVERY_BASE
def test_the_denoiser_stays_close(denoiser, base):
    """Measured on this model: 0.003 in int8 and 0.06 in nf4."""
    with torch.no_grad():
        before = denoiser(**inputs())
        names = list(quantise.quantisable(denoiser))
        quantise_base(denoiser, base, CPU)
        after = denoiser(**inputs())
    low, high = {"int8": (5e-4, 0.01), "nf4": (0.01, 0.12)}[base]
    assert low < (after - before).norm() / before.norm() < high
    assert {n for n, m in denoiser.named_modules() if isinstance(m, QuantisedLinear)} == set(names)
    unpacked = [n for n, m in denoiser.named_modules() if type(m) is nn.Linear]
    assert unpacked
    assert all("time_emb" in n or "add_embedding" in n for n in unpacked)


@EVERY_BASE
def test_the_model_keeps_its_dtype(denoiser, base):
    """diffusers and transformers read it from the first floating parameter."""
    denoiser.to(torch.bfloat16)
    quantise_base(denoiser, base, CPU)
    parts = (denoiser.unet, denoiser.text_encoder, denoiser.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert denoiser(**inputs()).dtype == torch.bfloat16


def test_checkpointing_gives_equal_gradients(denoiser):
    quantise_base(denoiser.requires_grad_(False), "nf4", CPU)
    batch = inputs()
    batch["noisy_latents"].requires_grad_(True)

    def gradient():
        return torch.autograd.grad(denoiser(**batch).square().sum(), batch["noisy_latents"])[0]

    stored = gradient()
    checkpoint_blocks(denoiser, block_names(denoiser))
    assert stored.any()
    assert torch.equal(gradient(), stored)


def test_packing_frees_each_weight_before_the_next(denoiser, monkeypatch):
    weights = [weakref.ref(m.weight) for m in quantise.quantisable(denoiser).values()]
    alive, pack = [], quantise.pack_weight

    def counting(weight, base):
        alive.append(sum(ref() is not None for ref in weights))
        return pack(weight, base)

    monkeypatch.setattr(quantise, "pack_weight", counting)
    quantise_base(denoiser, "int8", CPU)
    assert alive == list(range(len(weights), 0, -1))
    assert not any(ref() is not None for ref in weights)


def test_packed_layers_are_not_packed_again(denoiser):
    layers = quantise.quantisable(denoiser)
    quantise_base(denoiser, "int8", CPU)
    packed = {name: m for name, m in denoiser.named_modules() if isinstance(m, QuantisedLinear)}
    assert packed.keys() == layers.keys()
    quantise_base(denoiser, "int8", CPU)
    assert all(denoiser.get_submodule(name) is m for name, m in packed.items())


def test_bytes_of_the_real_architecture(sdxl_meta):
    layers = quantise.quantisable(sdxl_meta)
    sizes = {base: sum(packed_bytes(layer, base) for layer in layers.values()) / GiB for base in PACKED_BASES}
    assert len(layers) == 743 - 21 + 265
    assert sizes == pytest.approx({"int8": 2.730, "nf4": 1.446}, abs=0.001)


def test_bad_input_says_what_to_do(monkeypatch):
    for base in PACKED_BASES:
        quantise.check_quantisable(base, CPU)

    def without_library(*_, **__):
        raise RuntimeError("\n🚨 CUDA SETUP ERROR: Missing dependency: libcudart.so.13 🚨\n\nmore\n")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", without_library)
    with pytest.raises(UserError, match=r"--base-precision nf4 .*libcudart.so.13.*int8") as caught:
        quantise.check_quantisable("nf4", CPU)
    assert "\n" not in str(caught.value)
    quantise.check_quantisable("int8", CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # not installed
    with pytest.raises(UserError, match=r"--base-precision nf4 .*bitsandbytes"):
        quantise.check_quantisable("nf4", CPU)
