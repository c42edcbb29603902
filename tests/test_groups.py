"""Products of layers that read the same input, against their formula and autograd; and adapters scaled for a while."""

from contextlib import suppress
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora import inputs, shake
from torch import Tensor, nn

from lora import Adapter, LoRALinear, add_lora, merge_lora
from options.training import LoRAConfig
from performance.linear_group import LinearGroup, dense_weight, stacked, sum_of
from performance.quantise import QuantisedLinear

CPU = torch.device("cpu")
SCALE = 3.0  # α / r


def make_layers(
    sizes: list[tuple[int, int]], inner: int, base: str, bias: bool, one_buffer: bool, dtype: torch.dtype
) -> list[nn.Linear]:
    """Layers of (outputs, rank), rank 0 without LoRA, of random weights and gradients. Their factors are in the buffers of an
    adapter, whose gradients are float32, or each is by itself.
    """
    layers: list[nn.Linear] = []
    for out, rank in sizes:
        layer = nn.Linear(inner, out, bias=bias).to(dtype).requires_grad_(False)
        layer = layer if base == "plain" else QuantisedLinear(layer, base, CPU)
        layers.append(LoRALinear(layer, rank, SCALE * rank, torch.Generator()) if rank else layer)
    adapted = {str(i): layer for i, layer in enumerate(layers) if isinstance(layer, LoRALinear)}
    if one_buffer and adapted:
        Adapter(adapted, dtype)
    for layer in adapted.values():
        for p in (layer.lora_A, layer.lora_B):
            p.data = torch.nn.init.normal_(p.data if one_buffer else p.data.to(dtype))
        layer.grads = tuple(torch.nn.init.normal_(grad if one_buffer else grad.to(dtype)) for grad in layer.grads)
    return layers


def check_group(
    layers: list[nn.Linear], dtype: torch.dtype, needs_x: bool, used: list[bool], rtol: float, around: str = "nothing",
) -> None:  # fmt: skip
    """Outputs, and gradients of x, of `onto`, and of A and B, where only the outputs that are `used` get a gradient. `around`
    the products: a norm before them, a gate before them and a residual connection, that alone, or nothing.
    """
    inner, adapted = layers[0].in_features, [layer for layer in layers if isinstance(layer, LoRALinear)]
    x = torch.randn(2, 3, inner * (2 if around == "gate" else 1), dtype=dtype, requires_grad=needs_x)
    norm = nn.LayerNorm(inner).to(dtype).requires_grad_(False)
    onto = torch.randn(2, 3, layers[0].out_features, dtype=dtype, requires_grad=True)
    exact_x, exact_onto = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, onto))
    factors = {layer: [p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B)] for layer in adapted}
    before = {layer: [grad.to(torch.float64, copy=True) for grad in layer.grads] for layer in adapted}

    read = exact_x
    if around == "norm":
        read = F.layer_norm(exact_x, (inner,), norm.weight.double(), norm.bias.double(), norm.eps)
    elif around == "gate":
        read = exact_x[..., :inner] * F.gelu(exact_x[..., inner:])
    expected = [exact_onto if around in ("gate", "onto") else 0.0] * len(layers)
    for i, layer in enumerate(layers):
        expected[i] = expected[i] + F.linear(
            read, dense_weight(layer).double(), None if layer.bias is None else layer.bias.double()
        )
        if layer in factors:
            A, B = factors[layer]
            expected[i] = expected[i] + SCALE * (read @ A.T) @ B.T
    group = LinearGroup(layers)
    if around == "gate":
        outputs = group.gated(x, onto)
    else:
        outputs = group.normed(x, norm) if around == "norm" else group(x, onto if around == "onto" else None)
    if around == "norm":
        assert torch.equal(outputs[0], x)
        expected, used = [exact_x, *expected], [True, *used]

    def same(result: Tensor | None, wanted: Tensor) -> None:
        result = torch.zeros_like(wanted) if result is None else result.double()
        torch.testing.assert_close(result, wanted.detach(), rtol=rtol, atol=10 * rtol)

    for result, wanted in zip(outputs, expected, strict=True):
        same(result, wanted)
    grads = [torch.randn_like(y) for y in outputs]
    for results in (outputs, expected):
        total = sum((y * grad.to(y.dtype)).sum() for y, grad, use in zip(results, grads, used, strict=True) if use)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    for result, wanted in ((x, exact_x), (onto, exact_onto)):
        same(result.grad, torch.zeros_like(wanted) if wanted.grad is None else wanted.grad)
    for layer in adapted:
        for result, exact, earlier in zip(layer.grads, factors[layer], before[layer], strict=True):
            same(result, earlier if exact.grad is None else earlier + exact.grad)


@st.composite
def cases(draw):
    """Layers of equal and of other sizes, so that bands differ."""
    sizes = draw(st.lists(st.tuples(st.sampled_from([3, 5]), st.sampled_from([0, 2, 4])), min_size=1, max_size=4))
    used = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    return sizes, used, draw(st.sampled_from(["nothing", "norm", *(["onto", "gate"] if len(sizes) == 1 else [])]))


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 9), st.sampled_from(["plain", "int8"]), st.booleans(), st.booleans(), st.booleans())
def test_a_group_is_the_formula(case, inner, base, bias, one_buffer, needs_x):
    sizes, used, around = case
    torch.manual_seed(0)
    layers = make_layers(sizes, inner, base, bias, one_buffer, torch.float64)
    rtol = 1e-5 if one_buffer else 1e-12  # an adapter's gradients are float32
    check_group(layers, torch.float64, needs_x, used, rtol, around)


def test_a_group_of_4_bits_is_the_formula():
    torch.manual_seed(0)
    layers = make_layers([(3, 2), (3, 2), (5, 0), (3, 4)], 64, "nf4", True, True, torch.float32)  # bitsandbytes has no float64
    check_group(layers, torch.float32, True, [True, True, False, True], 1e-5)


def test_stacked_weights_stay_the_weights_of_the_layers():
    """What is merged into a layer changes the product of its group, and the other way round nothing is copied."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, out) for out in (4, 5, 4))).requires_grad_(False)
    group, x = LinearGroup(list(model)), torch.randn(3, 6)
    before = group(x)
    deltas = {str(i): (torch.randn(2, 6), torch.randn(model[i].out_features, 2), 2.0) for i in (0, 2)}
    merge_lora(model, deltas)
    assert all(layer.weight.untyped_storage()._cdata == group.stack.untyped_storage()._cdata for layer in model)
    for i, (y, earlier) in enumerate(zip(group(x), before, strict=True)):
        torch.testing.assert_close(y, model[i](x))
        assert torch.equal(y, earlier) == (str(i) not in deltas)


@st.composite
def buffers(draw):
    """(tensors of one shape in one buffer or in several, whether a view of them is possible)."""
    count, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    starts = draw(st.permutations(range(0, 10 * count, 5)).map(lambda places: places[:count]))
    buffer = torch.arange(10.0 * count)
    tensors = [buffer[start : start + size] for start in starts]
    steps = {b - a for a, b in pairwise(starts)}
    if draw(st.booleans()) or count == 1:
        return tensors, len(steps) == 0 or (len(steps) == 1 and steps.pop() > 0)
    return [*tensors[:-1], tensors[-1].clone()], False


@given(buffers())
def test_stacked_is_a_view_where_that_is_possible(case):
    tensors, possible = case
    result = stacked(tensors)
    assert torch.equal(result, torch.stack(tensors))
    assert (result.data_ptr() == tensors[0].data_ptr()) == possible


@given(buffers())
def test_what_is_added_to_the_sum_is_added_to_every_tensor(case):
    tensors, _ = case
    added = torch.randn(len(tensors), len(tensors[0]))
    expected = torch.stack(tensors) + added
    with sum_of(tensors) as total:
        total += added
    assert torch.equal(torch.stack(tensors), expected)


# Adapters at another strength.


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def adapted(request, pipe):
    """(denoiser, adapter) of which every ΔW differs from zero."""
    from model.sdxl import Denoiser

    denoiser = Denoiser(pipe.to(request.param))
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused, dtype=request.param)
    shake(adapter)
    return denoiser, adapter


def test_a_strength_of_0_is_the_base_and_of_1_the_lora(adapted):
    denoiser, adapter = adapted
    with torch.no_grad():
        trained = denoiser(**inputs())
        with adapter.scaled(1):
            assert torch.equal(denoiser(**inputs()), trained)
        with adapter.scaled(0):
            none = denoiser(**inputs())
        for module in adapter.modules.values():
            module.lora_A.data.zero_()
        assert torch.equal(none, denoiser(**inputs()))
        assert not torch.equal(none, trained)


def test_scaling_is_undone_bit_for_bit_whatever_happens_inside(adapted):
    """Nested strengths multiply; what is saved to files never changes."""
    _, adapter = adapted
    low, flat = adapter.low.clone(), adapter.flat.clone()
    layer = next(iter(adapter.modules.values()))
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    with adapter.scaled(1 / 3):
        outer = adapter.low.clone()
        assert torch.equal(layer.lora_A, A)
        torch.testing.assert_close(layer.lora_B.detach(), B / 3)
        with suppress(ZeroDivisionError), adapter.scaled(-7.1):
            torch.testing.assert_close(layer.lora_B.detach(), B * (-7.1 / 3))
            assert torch.equal(adapter.flat, flat)
            assert all(a.data_ptr() != layer.lora_A.data_ptr() for a, _, _ in adapter.deltas.values())
            raise ZeroDivisionError
        assert torch.equal(adapter.low, outer)
    assert torch.equal(adapter.low, low)
    assert torch.equal(adapter.flat, flat)
