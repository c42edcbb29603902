import copy
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_lora import inputs, shake
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from lora import add_lora
from memory import CUDA_ITSELF, GiB, limit_memory, peak_memory, resolve_device, speed_up
from options.training import LoRAConfig, MemoryConfig, resolve_precision
from performance.attention import sdpa
from performance.checkpointing import block_names, checkpoint_blocks
from performance.memory_plan import tensors
from performance.optimizers import make_optimizer

CPU = torch.device("cpu")


def gradients(denoiser, adapter) -> torch.Tensor:
    adapter.grad.zero_()
    denoiser(**inputs()).square().mean().backward()
    return adapter.grad.clone()


@pytest.fixture
def fast(denoiser):
    """(denoiser, adapter): with LoRA on every layer and fast layers."""
    adapter = add_lora(denoiser, LoRAConfig(rank=2, targets="all"), denoiser.unused)
    shake(adapter)
    speed_up(denoiser, sdpa)
    return denoiser, adapter


def test_the_parts_to_checkpoint_are_those_of_blocks(fast):
    """Every LoRA layer of a block is in exactly one part, but for k and v of the context, which are computed outside of it."""
    denoiser, adapter = fast
    names = block_names(denoiser)
    kinds = Counter(type(m).__name__ for m in denoiser.modules())
    assert len(names) == 3 * kinds["BasicTransformerBlock"] + kinds["ResnetBlock2D"] + kinds["CLIPEncoderLayer"]
    assert not [(a, b) for a in names for b in names if a.startswith(f"{b}.")]
    outside = [layer for layer in adapter.modules if not layer.startswith(tuple(f"{name}." for name in names))]
    assert {layer.rpartition(".")[2] for layer in outside} == {"proj_in", "proj_out"}


def test_checkpointing_of_any_parts_gives_equal_bits(fast):
    denoiser, adapter = fast
    names = block_names(denoiser)
    forwards = {name: denoiser.get_submodule(name).forward for name in names}
    plain = gradients(denoiser, adapter)
    assert plain.abs().max() > 1e-3

    @settings(max_examples=12, deadline=None)
    @given(st.sets(st.sampled_from(names)))
    @example(set(names))
    def check(some):
        checkpoint_blocks(denoiser, some)
        recomputed = gradients(denoiser, adapter)
        for name, forward in forwards.items():
            denoiser.get_submodule(name).forward = forward
        assert torch.equal(plain, recomputed)

    check()


class Reads(TorchDispatchMode):
    """Counts the operations that read a tensor."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self.pointer, self.count = tensor.data_ptr(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view and any(t.data_ptr() == self.pointer for t in tensors((args, kwargs)))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", ["attn1.to_out.0", "attn2.to_out.0", "ff.net.2"])
def test_a_recomputation_ends_before_the_last_product(fast, layer):
    """It makes what the part keeps, and the outputs of its last product are not among that."""
    denoiser, _ = fast
    block = "unet.mid_block.attentions.0.transformer_blocks.0."

    def reads(weight: torch.Tensor) -> int:
        with Reads(weight) as counted:
            denoiser(**inputs()).sum().backward()
        return counted.count

    part = layer.partition(".")[0]
    last = denoiser.get_submodule(block + layer).weight
    first = denoiser.get_submodule(f"{block}norm{['attn1', 'attn2', 'ff'].index(part) + 1}").weight
    plain = reads(last), reads(first)
    checkpoint_blocks(denoiser, [block + part])
    assert (reads(last), reads(first)) == (plain[0], plain[1] + 1)


def test_a_checkpointed_step_keeps_less(fast):
    denoiser, _ = fast

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            denoiser(**inputs())
        return sum(sizes)

    plain = kept()
    checkpoint_blocks(denoiser, block_names(denoiser))
    assert kept() < 0.5 * plain


def test_checkpointed_blocks_still_run_without_gradients(fast):
    denoiser, _ = fast
    with torch.no_grad():
        before = denoiser(**inputs())
        checkpoint_blocks(denoiser, block_names(denoiser))
        assert torch.equal(denoiser(**inputs()), before)


def flat_parameter(n: int = 5000) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(0)))


def train(name: str, steps: int = 30) -> torch.Tensor:
    """Fits a parameter to a fixed target and returns it."""
    p, target = flat_parameter(), torch.randn(5000, generator=torch.Generator().manual_seed(1))
    optimizer = make_optimizer(name, [{"params": [p], "lr": 1e-2}])
    for _ in range(steps):
        p.grad = p.detach() - target
        optimizer.step()
    return p.detach()


def test_8bit_adam_follows_adam():
    start, exact, quantised = flat_parameter().detach(), train("adamw"), train("adamw8bit")
    moved = (exact - start).abs().mean()
    assert moved > 0.1
    assert (quantised - exact).abs().mean() < 0.05 * moved


def test_8bit_adam_has_8bit_states():
    p = flat_parameter()
    optimizer = make_optimizer("adamw8bit", [{"params": [p], "lr": 1e-2}])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == optimizer.state[p]["state2"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_an_overflow_changes_nothing_and_the_scaler_backs_off(name):
    p = flat_parameter()
    optimizer = make_optimizer(name, [{"params": [p], "lr": 1e-2}])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(value: float):
        scaler.scale((p * value).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def snapshot():
        states = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and k != "step"}
        return {"p": p.detach().clone(), **states}

    start = p.detach().clone()
    step(float("inf"))  # in the very first step, too
    assert torch.equal(p, start)
    step(1.0)
    before = snapshot()
    assert not torch.equal(before["p"], start)
    step(float("inf"))
    after = snapshot()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert scaler.get_scale() == 256.0


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimiser_state_returns_exactly(name):
    def steps(p, optimizer, seeds):
        for seed in seeds:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    p = flat_parameter()
    optimizer = make_optimizer(name, [{"params": [p], "lr": 1e-2}])
    steps(p, optimizer, range(3))
    q = torch.nn.Parameter(p.detach().clone())
    other = make_optimizer(name, [{"params": [q], "lr": 1e-2}])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(p, optimizer, range(3, 6))
    steps(q, other, range(3, 6))
    assert torch.equal(p, q)


def test_precision_and_device():
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"
    assert resolve_precision("bf16", CPU) == "bf16"
    assert resolve_device("cpu") == CPU
    for bad in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=f"--device {bad}"):
            resolve_device(bad)


def test_peak_memory_is_in_gib():
    allocated, reserved = peak_memory(CPU)
    assert 0.05 < allocated <= reserved < 50


def test_the_budget_is_the_free_memory_or_vram_gb():
    assert 0.1 * GiB < limit_memory(None, CPU) == limit_memory(None, CPU) < 1e4 * GiB
    assert limit_memory(2.5, CPU) == 2.5 * GiB


def test_vram_gb_above_the_free_memory_means_the_free_memory(monkeypatch):
    """A card sold as one of 16 GB has 15.6 GiB, of which 14.6 are free here."""
    fractions, free, total = [], 14.6 * GiB, 15.6 * GiB
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, total))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction))
    device = torch.device("cuda")
    assert limit_memory(None, device) == limit_memory(16, device) < free
    assert limit_memory(12, device) == 12 * GiB - CUDA_ITSELF
    assert fractions == [pytest.approx(14.1 / 15.6), pytest.approx(11 / 15.6)]


@pytest.mark.gpu
def test_the_cap_is_enforced():
    device = resolve_device("cuda")
    torch.cuda.empty_cache()
    budget = limit_memory(3, device)
    try:
        assert budget == 3 * GiB - CUDA_ITSELF
        left = budget - torch.cuda.memory_reserved(device)  # other tests of this process have reserved some
        torch.empty(left - 2**26, dtype=torch.uint8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(left + 2**26, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_contradicting_precisions_are_refused():
    with pytest.raises(UserError, match="--base-precision bf16 contradicts --precision fp16"):
        MemoryConfig(precision="fp16", base_precision="bf16")
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--vram-gb must be above 0 and at most 10000, not"):
            MemoryConfig(vram_gb=bad)
