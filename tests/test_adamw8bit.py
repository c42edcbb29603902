"""8-bit Adam on the flat buffer of an adapter, compared with bitsandbytes on one plain parameter for each A and B."""

import copy

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora
from lora import Adapter, add_lora
from options.optimiser import OptimiserConfig
from options.training import LoRAConfig, MemoryConfig, TrainConfig
from run.optimiser import Optimiser

STEPS, LR = 6, 1e-2
WIDTHS = st.tuples(st.integers(1, 700), st.integers(1, 700))


def make_adapter(widths: list[tuple[int, int]], rank: int) -> Adapter:
    parts = nn.ModuleList([nn.Linear(*pair) for pair in widths])
    model = nn.ModuleDict({"unet": parts, "text_encoder": nn.Linear(20, 30)})
    return add_lora(model, LoRAConfig(rank=rank, targets="."))


def make_optimiser(adapter: Adapter, kind: str = "adamw8bit") -> Optimiser:
    rates = OptimiserConfig(lr=LR, text_encoder_lr=(LR,))
    return Optimiser(TrainConfig(optimiser=rates, memory=MemoryConfig(optimizer=kind), steps=STEPS), adapter, 1, torch.float32)


def factors(adapter: Adapter) -> list[torch.Tensor]:
    return [factor for A, B, _ in adapter.deltas.values() for factor in (A, B)]


def fill_gradients(adapter: Adapter, step: int) -> None:
    """Each tensor's gradient has another size: B's is a thousand times A's. The norm is below 1, so that none is clipped."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(p for m in adapter.modules.values() for p in (m.lora_A, m.lora_B)):
        p.grad.copy_(torch.randn(p.shape, generator=generator) * (1e-3 if i % 2 else 1e-6))


def train(adapter: Adapter, optimiser: Optimiser, steps, spoilt=(), fill=fill_gradients) -> None:
    for step in steps:
        optimiser.set_learning_rates(step)
        fill(adapter, step)
        if step in spoilt:
            adapter.grad[0] = torch.nan
        optimiser.step(torch.zeros(()))


@settings(max_examples=25, deadline=None)
@given(st.lists(WIDTHS, min_size=1, max_size=4), st.integers(1, 9), st.sets(st.integers(0, STEPS - 1)))
def test_it_equals_the_library_on_plain_parameters(widths, rank, spoilt):
    """Bit for bit, whatever the sizes; and a step that is skipped is, for the library, one that never was."""
    adapter = make_adapter(widths, rank)
    plain = [nn.Parameter(factor.clone()) for factor in factors(adapter)]
    library = bitsandbytes.optim.AdamW8bit(plain, lr=LR, weight_decay=0.01, min_8bit_size=0)
    train(adapter, make_optimiser(adapter), range(STEPS), spoilt)
    grads = make_adapter(widths, rank)
    for step in sorted(set(range(STEPS)) - spoilt):
        fill_gradients(grads, step)
        for p, q in zip(plain, (q for m in grads.modules.values() for q in (m.lora_A, m.lora_B)), strict=True):
            p.grad = q.grad.clone()
        library.step()
    assert all(torch.equal(p, factor) for p, factor in zip(plain, factors(adapter), strict=True))
    assert not adapter.flat[~adapter.filled()].any()
    assert adapter.parameter_count == sum(p.numel() for p in plain) == adapter.filled().sum()


def test_the_count_of_a_saved_state_is_that_of_steps_made():
    adapter = make_adapter([(40, 50)], 3)
    optimiser = make_optimiser(adapter)
    train(adapter, optimiser, range(4), spoilt={1, 3})
    assert [state["step"] for state in optimiser.state_dict()["optimizer"]["state"].values()] == [2, 2]
    assert [state["step"] for state in optimiser.state_dict()["optimizer"]["state"].values()] == [2, 2]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("widths", [[(33, 70), (300, 9)], [(256, 512), (512, 256)]], ids=["odd", "multiples of 256"])
def test_a_state_of_a_commit_without_padding_goes_on(monkeypatch, kind, widths):
    with monkeypatch.context() as before:
        before.setattr(lora, "padded_size", lambda count: count)
        old = make_adapter(widths, 3)
        train(old, optimiser := make_optimiser(old, kind), range(3))
        state = copy.deepcopy(optimiser.state_dict())
    adapter = make_adapter(widths, 3)
    adapter.flat.fill_(9)
    adapter.load(old.flat)
    resumed = make_optimiser(adapter, kind)
    resumed.load_state_dict(copy.deepcopy(state))
    assert all(torch.equal(a, b) for a, b in zip(factors(adapter), factors(old), strict=True))
    assert not adapter.flat[~adapter.filled()].any()
    start = old.flat.clone()
    train(old, optimiser, range(3, STEPS))
    train(adapter, resumed, range(3, STEPS))
    moved, apart = (old.flat - start).norm(), (adapter.flat[adapter.filled()] - old.flat).norm()
    assert moved > 0.1
    # AdamW rounds the last values of a buffer otherwise; 8-bit states are quantised again, in smaller blocks
    assert apart <= (1e-6 if kind == "adamw" else 0.3) * moved
