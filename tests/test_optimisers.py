"""Optimisers by name, rates, schedules, averages of the weights, and the noise of the gradient."""

import math
import re
from contextlib import suppress
from functools import partial

import pytest
import test_adamw8bit
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evaluation.record import read_record
from lora import Adapter, add_lora
from lora_files.deltas import layer_shapes
from lora_files.read import newest_lora, read_lora
from model.load import read_sdxl
from model.sdxl import Denoiser
from options.optimiser import OptimiserConfig
from options.training import LoRAConfig, MemoryConfig, TrainConfig
from performance.optimizers import bytes_per_trained, found_class, state_bytes
from run.noise_scale import NoiseScale
from run.optimiser import Optimiser, text_encoders_rest
from run.schedule import draw_schedule, lr_factor
from run.state import find_state
from scripts.choose import by_step

STEPS = 6
KINDS = ("adamw", "adafactor", "prodigy", "schedulefree", "torch.optim.Muon", "came_pytorch.CAME", "lion_pytorch.Lion")
OURS = {  # what make_optimizer sets where the library has another default
    "adamw": {"weight_decay": 0.01, "fused": True}, "adafactor": {"eps": (None, 1.0)},
    "prodigy": {"use_bias_correction": True, "safeguard_warmup": True},
}  # fmt: skip


def make_adapter(rank: int = 2) -> Adapter:
    torch.manual_seed(1)
    parts = nn.ModuleList([nn.Linear(12, 20), nn.Linear(7, 5)])
    encoders = {"text_encoder": nn.Sequential(nn.Linear(9, 8)), "text_encoder_2": nn.Sequential(nn.Linear(9, 8))}
    return add_lora(nn.ModuleDict({"unet": parts, **encoders}), LoRAConfig(rank=rank, targets="."))


def make_optimiser(adapter: Adapter, kind: str, steps: int = STEPS, **options) -> Optimiser:
    config = OptimiserConfig(**({"lr": 1e-2, "text_encoder_lr": (1e-2,)} | options))
    run = TrainConfig(optimiser=config, memory=MemoryConfig(optimizer=kind), steps=steps)
    return Optimiser(run, adapter, 1, torch.float32)


def fill_gradients(adapter: Adapter, step: int) -> list[torch.Tensor]:
    """Also returned. Their norm is below 1, so that none is clipped."""
    generator = torch.Generator().manual_seed(step)
    grads = [grad for m in adapter.modules.values() for grad in m.grads]
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, generator=generator) * 1e-2)
    return [grad.clone() for grad in grads]


train_steps = partial(test_adamw8bit.train, fill=fill_gradients)


def masters(adapter: Adapter) -> list[torch.Tensor]:
    return [part for own in adapter.masters.values() for part in own]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoilt", [set(), {0, 3}])
def test_it_equals_the_library_on_plain_parameters(kind, spoilt):
    """Bit for bit for those that get every matrix by itself. Vector units round the last values of a flat buffer otherwise, and
    Prodigy adds up its norms in another order. A step that is skipped is, for the library, one that never was.
    """
    adapter = make_adapter()
    plain = [nn.Parameter(part.clone()) for part in masters(adapter)]
    library = found_class(kind)(plain, lr=1e-2, **OURS.get(kind, {}))
    if kind == "schedulefree":
        library.train()
    train_steps(adapter, make_optimiser(adapter, kind), range(STEPS), spoilt)
    other = make_adapter()
    for step in sorted(set(range(STEPS)) - spoilt):
        for p, grad in zip(plain, fill_gradients(other, step), strict=True):
            p.grad = grad
        library.step()
    rtol = {"prodigy": 1e-4, "adamw": 1e-6, "schedulefree": 1e-6}.get(kind, 0)
    for p, part in zip(plain, masters(adapter), strict=True):
        torch.testing.assert_close(part, p.data, rtol=rtol, atol=rtol / 100)
    assert not any(torch.equal(p, q) for p, q in zip(masters(adapter), masters(other), strict=True))  # all of them were trained


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "torch.optim.Muon", "came_pytorch.CAME", "lion_pytorch.Lion"])
def test_every_part_at_its_own_rate_equals_the_library_with_as_many_groups(kind):
    """--lora-plus, --lr-pattern and two --text-encoder-lr, with weight decay, a schedule and gradients that are clipped."""
    lora, rates = (
        LoRAConfig(lora_plus=4, lr_pattern=("unet.1=0.5",)),
        {"unet": 1e-2, "text_encoder": 1e-3, "text_encoder_2": 4e-3},
    )
    config = OptimiserConfig(
        lr=1e-2, text_encoder_lr=(1e-3, 4e-3), weight_decay=0.1, warmup=2, lr_schedule="cosine", clip=0.02
    )  # fmt: skip
    adapter, other = make_adapter(), make_adapter()
    run = TrainConfig(optimiser=config, lora=lora, memory=MemoryConfig(optimizer=kind), steps=STEPS)
    train_steps(adapter, Optimiser(run, adapter, 1, torch.float32), range(STEPS))
    groups = [
        {"params": [nn.Parameter(part.clone())], "rate": rates[name.partition(".")[0]] * 4**n / (1 + (name == "unet.1"))}
        for name, own in other.masters.items() for n, part in enumerate(own)
    ]  # fmt: skip
    library = found_class(kind)(groups, lr=1e-2, **{**OURS.get(kind, {}), "weight_decay": 0.1})
    plain = [group["params"][0] for group in groups]
    for step in range(STEPS):
        for p, grad in zip(plain, fill_gradients(other, step), strict=True):
            p.grad = grad
        for group in library.param_groups:
            group["lr"] = group["rate"] * lr_factor(step, STEPS, config)
        nn.utils.clip_grad_norm_(plain, 0.02)
        library.step()
    for p, part in zip(plain, masters(adapter), strict=True):
        torch.testing.assert_close(part, p.data, rtol=1e-5, atol=1e-6)


def test_lion_of_bitsandbytes_equals_the_library_on_the_flat_parameters():
    adapter = make_adapter()
    plain = [nn.Parameter(p.detach().clone()) for p in adapter.groups.values()]
    library = found_class("lion8bit")(plain, lr=1e-2, min_8bit_size=0)
    train_steps(adapter, make_optimiser(adapter, "lion8bit"), range(STEPS), {1})
    for step in sorted(set(range(STEPS)) - {1}):
        other = make_adapter()
        fill_gradients(other, step)
        for p, group in zip(plain, other.groups.values(), strict=True):
            p.grad = group.grad.clone()
        library.step()
    filled = adapter.filled()
    assert torch.equal(torch.cat([p.data for p in plain])[filled], adapter.flat[filled])


@pytest.mark.parametrize("kind", [*KINDS, "adamw8bit", "lion8bit"])
def test_a_saved_state_goes_on_bit_for_bit(kind):
    options = {"ema": 0.9} if kind != "schedulefree" else {}
    whole, parts = make_adapter(), make_adapter()
    train_steps(whole, make_optimiser(whole, kind, **options), range(STEPS))
    first = make_optimiser(parts, kind, **options)
    train_steps(parts, first, range(3))
    state, flat = first.state_dict(), parts.flat.clone()
    resumed = make_adapter()
    second = make_optimiser(resumed, kind, **options)
    resumed.load(flat)
    second.load_state_dict(state)
    train_steps(resumed, second, range(3, STEPS))
    assert torch.equal(resumed.flat, whole.flat)
    for name, weights in second.in_use().items():
        assert (weights is None) == (name == "" and kind != "schedulefree")


@pytest.mark.parametrize(("kind", "usual"), [("adamw", 0.01), ("adamw8bit", 0.01), ("prodigy", 0), ("schedulefree", 0)])
def test_the_settings_of_this_command_hold_after_a_state_was_loaded(kind, usual):
    """Also those that it leaves to the optimiser; the learning rate is the last one until the next step."""
    adapter = make_adapter()
    before, now, unset = (make_optimiser(adapter, kind, weight_decay=decay) for decay in (0.25, 0.5, None))
    train_steps(adapter, before, range(2))
    before.optimizer.param_groups[0]["lr"] = 0.125
    for optimiser, decay in ((now, 0.5), (unset, usual)):
        optimiser.load_state_dict(before.state_dict())
        assert {group["weight_decay"] for group in optimiser.optimizer.param_groups} == {decay}
        assert dict(optimiser.learning_rates()) == dict(before.learning_rates())


def test_adamw_of_another_kernel_skips_an_overflow_too():
    """Only the fused one looks at the flag by itself."""
    adapter = make_adapter()
    before = adapter.flat.clone()
    train_steps(adapter, make_optimiser(adapter, "adamw", optimizer_args=("fused=False",)), range(1), {0})
    assert torch.equal(adapter.flat, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--optimizer", "adamm"],
            "--optimizer adamm: choose from adamw8bit, adamw, lion8bit, adafactor, prodigy,",
        ),
        (["--optimizer", "nowhere.Adam"], "--optimizer nowhere.Adam needs a package that is not here: install the package of"),
        (["--optimizer", "torch.nn.Linear"], "--optimizer torch.nn.Linear is no optimiser of PyTorch's kind"),
        (["--optimizer", "torch.optim.Nothing"], "--optimizer torch.optim.Nothing is no optimiser of PyTorch's kind"),
        (["--optimizer", "adafactor", "--betas", 0.9, 0.99], "--optimizer adafactor: .*betas.*; its settings are lr"),
        (["--optimizer", "adamw", "--optimizer-args", "d=1"], "--optimizer adamw: .*'d'; its settings are lr"),
        (["--optimizer-args", "weight_decay=1"], "--optimizer-args 'weight_decay=1': that is --weight-decay"),
        (["--optimizer-args", "d_coef"], "--optimizer-args 'd_coef': settings are name=value"),
        (["--optimizer", "prodigy", "--text-encoder-lr", 0.5], "--optimizer prodigy has one learning rate for all"),
        (["--optimizer", "schedulefree", "--lora-plus", 4], "--optimizer schedulefree averages by itself: without --ema"),
        (["--optimizer", "schedulefree.AdamWScheduleFree", "--ema", 0.9], "AdamWScheduleFree averages by itself: without"),
        (["--optimizer", "schedulefree", "--text-encoder-lr", 1e-3, 2e-3], "--optimizer schedulefree averages by itself"),
        (["--optimizer", "schedulefree", "--betas", 0, 0.9], "schedulefree cannot make a step: ZeroDivisionError"),
        (["--optimizer", "torch.optim.LBFGS", "--no-train-text-encoder"], "LBFGS cannot make a step: TypeError.*'closure'"),
        (["--optimizer", "torch.optim.SparseAdam"], "SparseAdam cannot make a step: .* does not support dense gradients"),
        (["--optimizer", "prodigyopt.Prodigy"], "prodigyopt.Prodigy cannot make a step: .*[Dd]ifferent lr values"),
        (["--optimizer", "adamw", "--optimizer-args", "foreach=True"], "--optimizer adamw: `fused` and `foreach` cannot"),
        (["--betas", 0.9], r"--optimizer adamw8bit: its betas are 2 values, as \(0.9, 0.999\), not \(0.9,\)"),
        (["--optimizer", "adamw", "--betas", 0.9, 0.9, 0.9], "--optimizer adamw: its betas are 2 values"),
        (["--optimizer", "came_pytorch.CAME", "--eps", 1e-8], "CAME: its eps are 2 values"),
        (["--optimizer", "adamw", "--eps", 0], "--optimizer adamw: with these settings its first step makes weights that are"),
        (
            ["--optimizer", "adamw", "--optimizer-args", "amsgrad=false"],
            "--optimizer adamw: amsgrad is True or False, not false",
        ),
        (["--optimizer", "prodigy", "--optimizer-args", "d_coef=big"], "--optimizer prodigy: d_coef is a number, not big"),
        (["--optimizer", "prodigy", "--optimizer-args", "d_coef={[]:1}"], "--optimizer prodigy: d_coef is a number, not {"),
        (["--optimizer-args", "d=1", "d=2"], "--optimizer-args gives d twice: remove one"),
        (["--optimizer", "schedulefree", "--ema", 0.9], "--optimizer schedulefree averages by itself"),
        (["--text-encoder-lr", 1, 2, 3], "--text-encoder-lr takes one rate, or one for each of two text encoders"),
        (
            ["--lr-schedule", "wsd"],
            "--lr-schedule wsd: choose from constant, linear, cosine, cosine-restarts:N,",
        ),
        (["--lr-schedule", "wsd:1.5"], "--lr-schedule wsd:1.5: it is wsd:SHARE, with SHARE between 0 and 1"),
        (["--warmup", 1.5], "--warmup 1.5: a whole number of steps, or a share of them below 1"),
        (["--ema", 1], "--ema must be above 0 and at most 0.999999, not 1.0"),
    ],
)
def test_what_makes_no_sense_ends_in_one_line(train, options, message):
    _, err = train(*options, status=2)
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_memory_for_an_optimiser_that_nobody_knows_is_counted():
    assert state_bytes("schedulefree") == 8  # z, exp_avg_sq
    assert state_bytes("prodigy") == 16  # exp_avg, exp_avg_sq, s, p0
    assert 1 <= state_bytes("lion8bit") < 1.1
    assert state_bytes("torch.optim.SGD") == 0
    assert bytes_per_trained("prodigy", torch.float16) == 4 + 4 + 2 + 16 + 8


# Schedules.


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["constant", "linear", "cosine", "cosine-restarts:3", "rex", "wsd:0.25"]),
    st.integers(1, 500),
    st.one_of(st.floats(0, 0.99), st.integers(0, 500)),
    st.floats(0, 1),
)
def test_a_schedule_stays_between_its_end_and_1(kind, steps, warmup, min_lr):
    config = OptimiserConfig(lr_schedule=kind, warmup=warmup if warmup < 1 else min(warmup, steps), min_lr=min_lr)
    factors = [lr_factor(step, steps, config) for step in range(steps)]
    rising = int(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    assert all(0 < f <= 1 + 1e-12 for f in factors) or min_lr == 0
    assert all(min_lr - 1e-12 <= f <= 1 + 1e-12 for f in factors[rising:])
    assert factors[:rising] == sorted(factors[:rising])
    if rising < steps:
        assert factors[rising] == pytest.approx(1) or kind == "wsd:0.25"
    if "restarts" not in kind:
        assert all(a >= b - 1e-12 for a, b in zip(factors[rising:], factors[rising + 1 :], strict=False))
    if kind != "constant" and rising < steps:
        assert lr_factor(steps, steps, config) == pytest.approx(min_lr, abs=1e-9) or "restarts" in kind


def test_schedules_at_points_that_can_be_told_by_hand():
    def at(step, kind, **options):
        return lr_factor(step, 100, OptimiserConfig(lr_schedule=kind, **options))

    assert at(50, "linear") == at(50, "cosine") == 0.5
    assert at(50, "rex") == pytest.approx(2 / 3)
    assert (at(49, "cosine-restarts:2"), at(50, "cosine-restarts:2")) == (pytest.approx(0, abs=1e-2), 1)
    assert at(79, "wsd:0.2") == pytest.approx(at(80, "wsd:0.2")) == 1
    assert at(85, "wsd:0.2") == pytest.approx(0.5)
    assert at(50, "linear", min_lr=0.2) == pytest.approx(0.6)
    assert at(0, "constant", warmup=0.1) == pytest.approx(1 / 11) == at(0, "constant", warmup=10)


def test_the_picture_of_a_schedule_shows_where_it_falls():
    picture = draw_schedule(100, OptimiserConfig(lr_schedule="wsd:0.2"), "title")
    red = (picture[:, :, 0] > 120) & (picture[:, :, 1] < 100)
    height = [red[:, x].nonzero()[0].mean() for x in range(40, 600)]
    assert max(height[:400]) == min(height[:400]) < height[-10] < picture.shape[0]


@given(st.integers(1, 10**6), st.integers(1, 999), st.integers(1, 5))
def test_a_share_is_that_of_exact_fractions(steps, thousandths, cycles):
    """Steps of the warm-up, the step from which the text encoders rest, and that of a restart."""
    config = OptimiserConfig(warmup=thousandths / 1000, text_encoder_until=thousandths / 1000)
    warmup, end = thousandths * steps // 1000, -(-thousandths * steps // 1000)
    assert (lr_factor(warmup, steps, config), lr_factor(0, steps, config)) == (1, pytest.approx(1 / (warmup + 1)))
    assert warmup == 0 or lr_factor(warmup - 1, steps, config) < 1
    assert text_encoders_rest(end, steps, config)
    assert not text_encoders_rest(end - 1, steps, config)
    restarts = OptimiserConfig(lr_schedule=f"cosine-restarts:{steps}")
    assert lr_factor(cycles % steps, steps, restarts) == 1


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine-restarts:3", "rex", "wsd:0.25"])
def test_a_run_that_was_longer_is_at_the_end_of_a_shorter_schedule(kind):
    config = OptimiserConfig(lr_schedule=kind, min_lr=0.1)
    assert {lr_factor(step, 10, config) for step in range(10, 30)} == {lr_factor(10, 10, config)}


# Rates of the text encoders.


def test_each_text_encoder_has_its_rate():
    """AdamW's first step is the learning rate, whatever the gradient."""
    adapter = make_adapter()
    before = {name: own[1].clone() for name, own in adapter.masters.items()}
    train_steps(adapter, make_optimiser(adapter, "adamw", text_encoder_lr=(1e-3, 4e-3), weight_decay=0.0, eps=1e-12), range(1))
    moved = {name: (own[1] - before[name]).abs().max().item() for name, own in adapter.masters.items()}
    assert moved["unet.0"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["text_encoder.0"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["text_encoder_2.0"] == pytest.approx(4e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["adamw8bit", "adafactor", "prodigy", "schedulefree", "torch.optim.Muon"])
def test_text_encoders_rest_from_a_share_of_the_run_on(kind):
    adapter = make_adapter()
    optimiser = make_optimiser(adapter, kind, text_encoder_until=0.5)
    called = []
    adapter.on_freeze.append(lambda: called.append(True))
    train_steps(adapter, optimiser, range(3))
    half = {name: [part.clone() for part in own] for name, own in adapter.masters.items()}
    assert not called
    assert all(m.lora_A.requires_grad for m in adapter.modules.values())
    train_steps(adapter, optimiser, range(3, STEPS))
    assert len(called) == 1
    for name, own in adapter.masters.items():
        assert adapter.modules[name].lora_A.requires_grad == name.startswith("unet")
        same = [torch.equal(a, b) for a, b in zip(own, half[name], strict=True)]
        assert same == [name.startswith("text_encoder")] * 2


def test_the_default_of_the_text_encoders_is_a_fifth():
    assert OptimiserConfig(lr=1e-3).resolved("sdxl", "adamw8bit").text_encoder_lr == (pytest.approx(2e-4),)
    assert OptimiserConfig(text_encoder_lr=(1e-5, 1e-5)).resolved("sdxl", "adamw").text_encoder_lr == (1e-5,)
    assert OptimiserConfig().resolved("demo", "prodigy") == OptimiserConfig(lr=1.0, text_encoder_lr=(1.0,))


# Averages.


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_is_the_recurrence_in_float64(decay):
    adapter = make_adapter()
    optimiser = make_optimiser(adapter, "adamw", steps=30, ema=decay)
    expected = adapter.flat.double()
    for step in range(30):
        train_steps(adapter, optimiser, [step])
        own = min(decay, (1 + step) / (10 + step))
        expected = own * expected + (1 - own) * adapter.flat.double()
    found = optimiser.in_use()["_ema"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found, adapter.flat)


def test_other_weights_are_held_for_a_while_and_leave_no_trace():
    adapter = make_adapter()
    train_steps(adapter, make_optimiser(adapter, "adamw"), range(2))
    flat, low = adapter.flat.clone(), adapter.low.clone()
    with suppress(ZeroDivisionError), adapter.holding(torch.zeros_like(flat)):
        assert not adapter.low.any()
        assert not any(B.any() for _, B, _ in adapter.deltas.values())
        raise ZeroDivisionError
    assert torch.equal(adapter.flat, flat)
    assert torch.equal(adapter.low, low)


def test_schedule_free_weights_to_use_are_the_library_s_and_asking_for_them_changes_nothing():
    asked, silent = make_adapter(), make_adapter()
    first, second = make_optimiser(asked, "schedulefree"), make_optimiser(silent, "schedulefree")
    for step in range(STEPS):
        train_steps(asked, first, [step])
        train_steps(silent, second, [step])
        first.in_use()
    assert torch.equal(asked.flat, silent.flat)
    second.optimizer.eval()
    assert torch.equal(first.in_use()[""], silent.flat)
    assert not torch.equal(asked.flat, silent.flat)


def test_a_run_saves_measures_and_resumes_its_averages(train, tiny_model, tmp_path):
    options = ["--ema", 0.9, "--save-every", 2, "--lr", 1e-2, "--save-dtype", "fp32", "--validate", 0.3, "--workers", 0]
    train("--steps", 4, *options)
    train("--steps", 2, *options, "--out", tmp_path / "parts")
    train("--steps", 4, *options, "--out", tmp_path / "parts")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"pytorch_lora_weights_{step}{ema}.safetensors" for step in (2, 4) for ema in ("", "_ema")]
    shapes = layer_shapes(Denoiser(read_sdxl(str(tiny_model), torch.float32)))
    state = find_state("auto", tmp_path / "out")[1]
    files = {ema: read_lora(tmp_path / "out" / f"pytorch_lora_weights_4{ema}.safetensors", shapes) for ema in ("", "_ema")}
    for ema, flat in (("", state["lora"]), ("_ema", state["ema"])):
        norm = math.sqrt(sum(part.square().sum().item() for A, B, _ in files[ema].values() for part in (A, B)))
        assert norm == pytest.approx(flat.norm().item(), rel=1e-4)
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes()[-1000:] == (tmp_path / "out" / name).read_bytes()[-1000:]
    record = read_record(tmp_path / "out")
    assert record["losses_ema"].keys() == {"2", "4"}
    assert record["losses_ema"]["4"] != record["losses"]["4"]


# Noise of the gradient.


def test_the_noise_scale_of_a_known_distribution():
    """|G|² = 1 and tr Σ = 300 for a single image: 300 images."""
    torch.manual_seed(0)
    size, images = 8 * 256 * 40, 3
    G = torch.randn(size)
    grad = torch.zeros(size)
    scale = NoiseScale(grad, images)
    G /= G.view(-1, 256)[::8].norm()
    for _ in range(60):
        for _step in range(10):
            grad.copy_(G + torch.randn(size) * math.sqrt(300 / images / (size / 8)))
            scale.see()
        found = scale.read()
    assert found == pytest.approx(300, rel=0.25)
    assert "300 images" in replace_number(scale.advice() or "", 300)
    grad.fill_(torch.nan)
    scale.see()
    scale.see()
    assert scale.read() == found  # an overflow does not count
    quiet = NoiseScale(grad.copy_(G), images)
    for _ in range(10):
        quiet.see()
    assert quiet.read() is None or quiet.read() < 1
    assert quiet.advice() is None


def replace_number(text: str, about: int) -> str:
    """`text` with its first number as `about`, if it is within a quarter of it."""
    first = next(word for word in text.split() if word.isdigit())
    return text.replace(first, str(about), 1) if abs(int(first) / about - 1) < 0.25 else text


def test_choosing_among_steps_passes_over_averages(train, tmp_path):
    train("--steps", 2, "--save-every", 1, "--ema", 0.9, "--format", "both")
    files = by_step(tmp_path / "out")
    assert {step: path.name for step, path in files.items()} == {n: f"pytorch_lora_weights_{n}.safetensors" for n in (1, 2)}
    assert newest_lora(tmp_path / "out") == files[2]
