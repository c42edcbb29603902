import copy
import random
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_lora import inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from data import Workload
from lora import add_lora
from memory import plan_memory, speed_up
from options.training import LoRAConfig, MemoryConfig, TrainConfig
from performance import memory_plan as budget
from performance.checkpointing import block_names, checkpoint_blocks
from performance.memory_plan import BlockCosts, Costs, GiB, Plan, dry_run, make_plan
from performance.optimizers import bytes_per_trained


@pytest.fixture
def without_triton(monkeypatch):
    """A dry run plans for CUDA, where kernels of ours keep less than PyTorch's operations on the CPU."""
    monkeypatch.setattr("performance.fused.HAS_TRITON", False)


def fused_on_cpu(q, k, v):
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)[0].transpose(1, 2)


def meta_costs(model, batch: int, side=8, whole: bool = False, **lora) -> Costs:
    """Dry run of a copy of `model` on the meta device; `whole`: of whole blocks."""
    model = copy.deepcopy(model).to("meta")
    add_lora(model, LoRAConfig(**lora), model.unused)
    speed_up(model, budget.stand_in_kernel)
    tokens = torch.empty(batch, 2, 77, dtype=torch.int64, device="meta")
    return dry_run(model, block_names(model, whole), (tokens,), side)


@pytest.fixture(scope="module")
def half(sdxl_meta) -> torch.nn.Module:
    """SDXL base in half precision."""
    model = copy.deepcopy(sdxl_meta).half().eval()
    model.zero_empty = False
    return model


@pytest.fixture(scope="module")
def real(half) -> Costs:
    """Costs of SDXL with LoRA of rank 8, for three images of 1024 × 1024."""
    return meta_costs(half, 3, 128)


def synthetic(seed: int) -> Costs:
    """Random blocks of up to 1 GiB; some keep less than their input, some nothing."""
    rng = random.Random(seed)

    def block() -> BlockCosts:
        kept = rng.choice([0, rng.randrange(GiB), rng.randrange(GiB)])
        return BlockCosts(kept, rng.randrange(2**20), rng.randrange(GiB // 8), rng.randrange(2**40), rng.randrange(2**30))

    return Costs(rng.choice([1, 3, 6]), {f"unet.{i}": block() for i in range(rng.randrange(1, 20))}, block(), {})


# The dry run, against real tensors.


@pytest.mark.parametrize(("side", "lora"), [(8, {}), ((8, 16), {}), (8, {"conv_rank": 4}), (8, {"dora": True})])
def test_kept_is_what_autograd_saves_on_the_cpu(denoiser, side, lora, without_triton):
    costs = meta_costs(denoiser, 2, side, **lora)
    add_lora(denoiser, LoRAConfig(**lora), denoiser.unused)
    speed_up(denoiser, fused_on_cpu)
    weights = {t.untyped_storage().data_ptr() for t in (*denoiser.parameters(), *denoiser.buffers())}
    saved = []
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        denoiser(**inputs() | {"noisy_latents": torch.randn(2, 4, *((8, 8) if side == 8 else side))})
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    kept = sum(size for pointer, size in storages.items() if pointer not in weights)
    assert costs.held((), 2) == pytest.approx(kept, rel=5e-3)


class Live(TorchDispatchMode):
    """Counts the bytes of the live storages that were allocated inside, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            for tensor in budget.tensors(result):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.now += storage.nbytes()
                    self.alive[storage._cdata] = weakref.ref(storage, partial(self.freed, storage._cdata, storage.nbytes()))
            self.peak = max(self.peak, self.now)
        return result

    def freed(self, key, size, _):
        self.now -= size
        del self.alive[key]


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_real_step_holds_and_peaks_as_predicted(denoiser, share, without_triton):
    """Compares with the live tensors of a step on the CPU that checkpoints the first blocks in a plan's order."""
    costs = meta_costs(denoiser, 4, train_text_encoder=False)
    order = sorted(costs.blocks, key=lambda name: costs.blocks[name].worth)
    checkpointed = order[: round(share * len(order))]
    add_lora(denoiser, LoRAConfig(train_text_encoder=False), denoiser.unused)
    speed_up(denoiser, fused_on_cpu)
    checkpoint_blocks(denoiser, checkpointed)
    with Live() as live:
        prediction = denoiser(**inputs(4))
        assert costs.held(checkpointed, 4) == pytest.approx(live.now, rel=0.02)
        prediction.sum().backward()
    # In a model this small the working memory of single operations counts, which SAFETY_MARGIN covers in a real one.
    assert 0.7 * costs.peak(checkpointed, 4) < live.peak < 1.6 * costs.peak(checkpointed, 4)


def test_costs_grow_with_the_batch_except_cast_weights(denoiser):
    two, six = (meta_costs(denoiser.half(), batch, rank=64) for batch in (2, 6))
    for small, large in zip((*two.blocks.values(), two.outside), (*six.blocks.values(), six.outside), strict=True):
        assert large.kept == pytest.approx(3 * small.kept, rel=1e-2)
        assert large.input == pytest.approx(3 * small.input, rel=1e-2)
        assert large.flops == pytest.approx(3 * small.flops, rel=1e-2)
        assert large.constant == small.constant
    assert two.held((), 6) == pytest.approx(six.held((), 6), rel=1e-2)


def test_frozen_text_encoders_keep_nothing(denoiser):
    with_text, without = (meta_costs(denoiser, 2, train_text_encoder=train) for train in (True, False))
    text = [name for name in with_text.blocks if name.startswith("text_encoder")]
    assert len(text) == 6
    assert all(with_text.blocks[name].kept > with_text.blocks[name].input > 0 for name in text)
    assert all(without.blocks[name].kept == without.blocks[name].input == 0 < without.blocks[name].flops for name in text)


def test_the_real_architecture(real, half):
    """Compares with measurements on an H100: 6.76 TFLOP a sample in the U-Net, and the reserved memory of two runs."""
    assert real.attention == {
        ((3, 1024, 20, 64), (3, 1024, 20, 64)): 60,
        ((3, 1024, 20, 64), (3, 77, 20, 64)): 60,
        ((3, 4096, 10, 64), (3, 4096, 10, 64)): 10,
        ((3, 4096, 10, 64), (3, 77, 10, 64)): 10,
    }
    unet = sum(block.flops for name, block in real.blocks.items() if name.startswith("unet.")) + real.outside.flops
    assert unet == pytest.approx(3 * 6.76e12, rel=0.01)
    weights, per_parameter = 6.46 * GiB, bytes_per_trained("adamw8bit", torch.float16)
    plan = make_plan(real, {"fp16": int(weights + per_parameter * 14_774_272)}, 3, 80 * GiB)
    assert plan.predicted / GiB == pytest.approx(19.18, abs=0.3)
    fixed = {"fp16": int(weights + per_parameter * 14_774_272)}
    plan = make_plan(real, fixed, 3, 15 * GiB)
    assert plan.predicted / GiB == pytest.approx(14.83, abs=0.3)
    whole = make_plan(meta_costs(half, 3, 128, whole=True), fixed, 3, 80 * GiB, checkpointing="all")
    assert whole.predicted < make_plan(real, fixed, 3, 80 * GiB, checkpointing="all").predicted - GiB // 2


# The plan.


def effort(plan) -> tuple:
    """What a plan gives up, as a sort key: the costliest first."""
    return plan.batch // plan.micro, ["fp16", "int8", "nf4"].index(plan.base), len(plan.checkpointed)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_fits_and_gives_up_no_more_than_needed(seed):
    costs, rng = synthetic(seed), random.Random(seed)
    fixed, batch, vae_image = {"fp16": 6 * GiB, "int8": 4 * GiB, "nf4": 2 * GiB}, rng.choice([1, 4, 6]), rng.randrange(2 * GiB)
    before = None
    for size in sorted(rng.sample(range(2 * GiB, 40 * GiB), 25)):
        try:
            plan = make_plan(costs, fixed, batch, size, vae_image=vae_image)
        except UserError:
            assert before is None, "a smaller budget was enough"
            continue
        room = size - fixed[plan.base] - budget.SAFETY_MARGIN
        assert plan.predicted <= size == plan.budget
        assert plan.batch % plan.micro == 0
        assert costs.peak(plan.checkpointed, plan.micro) <= room
        assert plan.whole_vae == (batch * vae_image <= room)
        assert before is None or effort(plan) <= effort(before)
        if plan.checkpointed:
            assert costs.peak(plan.checkpointed[:-1], plan.micro) > room
        before = plan
    assert before is not None


def test_the_order_in_which_plans_save_memory(monkeypatch):
    """Four blocks that keep 2 GiB for two images, and need 2 GiB once more during recomputation; "a" is the fastest."""
    monkeypatch.setattr(budget, "GRADIENTS", 0)
    monkeypatch.setattr(budget, "SAFETY_MARGIN", 0)
    blocks = {name: BlockCosts(2 * GiB, 0, 0, flops, 0) for name, flops in {"d": 40, "b": 20, "a": 10, "c": 30}.items()}
    costs = Costs(2, blocks, BlockCosts(0, 0, 0, 0, 0), {})
    fixed = {"fp16": 10 * GiB, "nf4": 5 * GiB}
    for size, expected in {
        18.0: ("", 2, "fp16"),
        17.9: ("ab", 2, "fp16"),
        15.9: ("abc", 2, "fp16"),
        13.9: ("abcd", 2, "fp16"),
        11.9: ("ab", 2, "nf4"),
        10.9: ("abc", 2, "nf4"),
        7.9: ("abcd", 2, "nf4"),
        6.9: ("abcd", 1, "nf4"),
    }.items():
        plan = make_plan(costs, fixed, 2, int(size * GiB))
        assert ("".join(plan.checkpointed), plan.micro, plan.base) == expected


def test_a_block_is_worth_what_it_keeps_beyond_its_input():
    """Checkpointing the second saves 2 GiB for 30 units of work, the first only 1 GiB for 20."""
    blocks = {"wide input": BlockCosts(3 * GiB, 0, 2 * GiB, 20, 0), "narrow input": BlockCosts(2 * GiB, 0, 0, 30, 0)}
    assert blocks["wide input"].worth > blocks["narrow input"].worth
    assert replace(blocks["narrow input"], written=2**30).worth > blocks["wide input"].worth
    assert BlockCosts(0, 0, GiB, 1, 0).worth > 1e6 * blocks["wide input"].worth  # saves nothing: comes last


def test_checkpointing_is_obeyed(real):
    fixed = {"fp16": 7 * GiB}
    for size in (12, 15, 24, 80):
        every = make_plan(real, fixed, 3, size * GiB, checkpointing="all")
        assert set(every.checkpointed) == set(real.blocks)
        assert every.micro == 3
        none = make_plan(real, fixed, 3, max(size, 13) * GiB, checkpointing="none")
        assert none.checkpointed == ()
        assert none.micro == (3 if size >= 24 else 1)


def test_a_plan_in_one_line():
    plan = Plan(("a", "b"), 124, "fp16", 3, 3, 7 * GiB, False, int(14.2 * GiB), 15 * GiB)
    assert str(plan) == (
        "15.0 GiB for tensors: 2 of 124 parts checkpointed, fp16 base, batch in one piece, VAE one image at a time; "
        "predicted peak 14.2 GiB"
    )
    assert "nf4 base, batch in 3 pieces; predicted" in str(replace(plan, micro=1, base="nf4", whole_vae=True))


@pytest.mark.parametrize(
    ("fixed", "options", "advice"),
    [
        ({"fp16": 6 * GiB}, {}, "--base-precision nf4, a larger GPU"),
        ({"fp16": 6 * GiB, "nf4": 3 * GiB}, {}, "a smaller --resolution, --no-train-text-encoder, a larger GPU"),
        ({"nf4": 3 * GiB}, {"vae_image": 2 * GiB}, "a smaller --resolution, a larger GPU"),
        (
            {"nf4": 3 * GiB}, {"checkpointing": "none"},
            "a smaller --resolution, --checkpointing auto, --no-train-text-encoder, a larger GPU",
        ),
    ],
)  # fmt: skip
def test_the_error_of_too_small_a_budget_names_what_helps(real, fixed, options, advice):
    size = int(3.5 * GiB)
    with pytest.raises(UserError) as error:
        make_plan(real, fixed, 3, size, **options)
    text = str(error.value)
    assert text.startswith("--vram-gb, or what is free, leaves 3.5 GiB for tensors: the smallest plan (")
    assert text.endswith(f"; what helps: {advice}")
    assert "\n" not in text
    needed = float(text.split(" needs ")[1].split(" GiB")[0])
    assert make_plan(real, fixed, 3, int(needed * GiB), **options)


def test_whole_blocks_come_where_parts_would_cut_the_batch(pipe, monkeypatch):
    monkeypatch.setattr(budget, "SAFETY_MARGIN", 0)
    work = Workload(batch=4, resolution=64, chunks=1, shapes=1, has_latents=True, has_text=False)

    def plan(checkpointing: str, size: int) -> Plan:
        memory = MemoryConfig(precision="fp32", checkpointing=checkpointing)
        return plan_memory(pipe, TrainConfig(memory=memory), work, torch.device("cpu"), size)

    roomy, least = plan("auto", GiB), plan("all", GiB)
    assert least.blocks < roomy.blocks  # "all" are whole blocks, which keep the least
    assert (roomy.checkpointed, len(least.checkpointed)) == ((), least.blocks)
    tight = plan("auto", least.predicted)
    assert (tight.micro, tight.checkpointed) == (4, least.checkpointed)
    assert plan("auto", roomy.predicted - 1).blocks == roomy.blocks
    assert plan("auto", least.predicted - 1).micro < 4
