"""Options of LoRA, with PEFT as the oracle: the same A and B give the same outputs, gradients, steps and weights."""

import copy
import re
from dataclasses import asdict

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from test_lora import inputs, shake
from torch import Tensor, nn

from common.errors import UserError
from data import Workload
from lora import Adapter, RankDropout, add_lora, merge_lora
from lora_files.deltas import layer_shapes
from lora_files.read import read_changes
from lora_files.write import serialise
from memory import plan_memory, speed_up
from model.sdxl import Denoiser
from options.optimiser import OptimiserConfig
from options.training import DiffusionConfig, LoRAConfig, MemoryConfig, TrainConfig
from performance.attention import sdpa
from performance.checkpointing import block_names, checkpoint_blocks
from run.checkpoints import changed, known_options
from run.optimiser import NormLimit, Optimiser
from run.state import load_state, save_state


def with_peft(denoiser, adapter: Adapter, **config):
    """The denoiser, not yet changed, with PEFT's layers in place of ours, and our A and B in them."""
    config = LoraConfig(target_modules=list(adapter.modules), **config)
    model = inject_adapter_in_model(config, denoiser).requires_grad_(False)
    for name, (A, B, _) in adapter.deltas.items():
        layer = model.get_submodule(name)
        for theirs, ours in ((layer.lora_A.default.weight, A), (layer.lora_B.default.weight, B)):
            assert theirs.shape == ours.shape, name
            theirs.data.copy_(ours)
            theirs.requires_grad_(True)
        if name in adapter.magnitudes:
            layer.lora_magnitude_vector.default.weight.data.copy_(adapter.magnitudes[name])
            layer.lora_magnitude_vector.default.weight.requires_grad_(True)
    return model


SCALES = {
    "rank stabilised": ({"rank_stabilised": True}, {"use_rslora": True}),
    "ranks by layer": ({"rank_pattern": ("attn2=6", r"to_[qk]$=2")}, {"rank_pattern": {r".*attn2.*": 6, r".*to_[qk]": 2}}),
    "both": (
        {"rank_pattern": ("text_encoder_2=1", ".=5"), "rank_stabilised": True},
        {"rank_pattern": {r"text_encoder_2\..*": 1, ".*": 5}, "use_rslora": True},
    ),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora, ranks by layer": (
        {"dora": True, "rank_pattern": ("attn2=6",)},
        {"use_dora": True, "rank_pattern": {".*attn2.*": 6}},
    ),
    "convolutions": (
        {"conv_rank": 2, "conv_alpha": 3, "rank_pattern": ("conv1=5",)},
        {
            "rank_pattern": {r".*\.conv1": 5, r".*(conv2|conv_shortcut|samplers\.0\.conv)": 2},
            "alpha_pattern": {r".*(conv1|conv2|conv_shortcut|samplers\.0\.conv)": 3},
        },
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), SCALES.values(), ids=SCALES)
@pytest.mark.parametrize(("layout", "fast"), [("kohya", False), ("diffusers", True)])
def test_outputs_gradients_and_files_are_those_of_peft(denoiser, tmp_path, ours, theirs, layout, fast):
    plain, base = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    adapter = add_lora(denoiser, LoRAConfig(rank=4, alpha=3, **ours), denoiser.unused)
    shake(adapter)
    if fast:
        speed_up(denoiser, sdpa)
    peft = with_peft(plain, adapter, r=4, lora_alpha=3, **theirs)
    output, wanted = denoiser(**inputs()), peft(**inputs())
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=0)
    output.square().mean().backward()
    wanted.square().mean().backward()
    for name, module in adapter.modules.items():
        layer = peft.get_submodule(name)
        torch.testing.assert_close(module.lora_A.grad, layer.lora_A.default.weight.grad.flatten(1), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(module.lora_B.grad, layer.lora_B.default.weight.grad.flatten(1), atol=1e-5, rtol=1e-3)
        if name in adapter.magnitudes:
            wanted_grad = layer.lora_magnitude_vector.default.weight.grad
            torch.testing.assert_close(module.grads[2], wanted_grad, atol=1e-5, rtol=1e-3)

    file = tmp_path / "lora.safetensors"
    file.write_bytes(serialise(adapter.deltas, {}, layout, torch.float32, adapter.magnitudes))
    merge_lora(base, read_changes(file, layer_shapes(base)))
    for name in adapter.modules:
        layer = peft.get_submodule(name)
        if name not in adapter.magnitudes:
            merged = layer.base_layer.weight + layer.get_delta_weight("default")
        else:
            layer.merge()
            merged = layer.base_layer.weight
        torch.testing.assert_close(base.get_submodule(name).weight, merged, atol=1e-6, rtol=1e-5)


# DoRA.


@pytest.mark.parametrize("fast", [False, True])
def test_dora_begins_as_the_base_and_scales_between_it_and_the_lora(denoiser, fast):
    base = copy.deepcopy(denoiser)
    adapter = add_lora(denoiser, LoRAConfig(rank=3, dora=True, targets="all"), denoiser.unused)
    if fast:
        speed_up(denoiser, sdpa)
        checkpoint_blocks(denoiser, block_names(denoiser))
    with torch.no_grad():
        torch.testing.assert_close(denoiser(**inputs()), base(**inputs()), atol=1e-5, rtol=0)
        at_first = {name: magnitude.clone() for name, magnitude in adapter.magnitudes.items()}
        shake(adapter)
        for name, magnitude in adapter.magnitudes.items():
            magnitude.uniform_(0.5, 1.5).mul_(at_first[name])
        adapter.update_layers()
        whole = denoiser(**inputs())
        for strength in (0.0, 0.3, 1.0, 1.7):
            changed = copy.deepcopy(base)
            for name, m in adapter.modules.items():
                W, V = m.weight, m.weight + m.scale * m.lora_B @ m.lora_A
                target = adapter.magnitudes[name][:, None] * V / V.norm(dim=1, keepdim=True)
                changed.get_submodule(name).weight.data = W + strength * (target - W)
            with adapter.scaled(strength):
                torch.testing.assert_close(denoiser(**inputs()), changed(**inputs()), atol=2e-5, rtol=1e-4)
        assert torch.equal(denoiser(**inputs()), whole)


def test_a_run_with_dora_resumes_bit_for_bit_and_its_file_is_read(train, script, tmp_path):
    options = ["--dora", "--precision", "fp16", "--base-precision", "int8", "--lora-plus", 4, "--lr", 1e-2, "--format", "both"]
    train("--steps", 3, *options)
    train("--steps", 1, *options, "--out", tmp_path / "parts")
    train("--steps", 3, *options, "--out", tmp_path / "parts")
    whole, parts = (load_state(next((tmp_path / name).glob("state-*")))["lora"] for name in ("out", "parts"))
    assert torch.equal(whole, parts)
    kohya, diffusers = (load_file(tmp_path / f"out/pytorch_lora_weights_3{end}.safetensors") for end in ("", "_diffusers"))
    scales = {key: t for key, t in kohya.items() if key.endswith(".dora_scale")}
    assert len(scales) == sum(key.endswith(".lora_magnitude_vector") for key in diffusers) == len(kohya) / 4
    assert all(t.shape[1:] == (1,) and t.dtype == torch.float32 for t in scales.values())


# Dropout.


@pytest.mark.parametrize("fast", [False, True])
def test_a_rank_that_is_left_out_is_as_if_its_B_were_0(denoiser, fast):
    adapter = add_lora(denoiser, LoRAConfig(rank=3, targets="all", conv_rank=2, rank_dropout=0.4), denoiser.unused)
    shake(adapter)
    if fast:
        speed_up(denoiser, sdpa)
        checkpoint_blocks(denoiser, block_names(denoiser))
    x = inputs(2)
    factors = adapter.dropout.draw(2, torch.Generator().manual_seed(0))
    flat, low = adapter.flat.clone(), {}
    with adapter.dropout(factors):
        output = denoiser(**x)
        output.square().sum().backward()
    together = {name: [g.clone() for g in m.grads] for name, m in adapter.modules.items()}
    for image, of_image in enumerate(factors):
        one = {
            name: (value[0][image : image + 1],) if name == "text" else value[image : image + 1] for name, value in x.items()
        }
        adapter.load(flat)
        for m in adapter.modules.values():
            m.lora_B.data *= of_image[m.place]
        alone = denoiser(**one)
        torch.testing.assert_close(output[image : image + 1], alone, atol=1e-5, rtol=1e-5)
        alone.square().sum().backward()
        for name, m in adapter.modules.items():
            A, B = low.setdefault(name, [torch.zeros_like(g) for g in m.grads])
            A += m.grads[0]
            B += m.grads[1] * of_image[m.place]
    for name, grads in together.items():
        for ours, wanted in zip(grads, low[name], strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.9), st.integers(0, 2**63 - 1))
def test_ranks_are_left_out_as_often_as_asked(share, seed):
    dropout = RankDropout(share, 20_000)
    factors = dropout.draw(2, torch.Generator().manual_seed(seed))
    assert torch.equal(factors, dropout.draw(2, torch.Generator().manual_seed(seed)))
    assert factors.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
    assert (factors == 0).float().mean().item() == pytest.approx(share, abs=0.02)
    assert not torch.equal(factors[0], factors[1])


def test_without_dropout_no_number_is_drawn(denoiser):
    generator = torch.Generator().manual_seed(0)
    assert RankDropout(0.0, 5).draw(2, generator) is None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_stabilised": True}, "--rank-stabilised needs --alpha"),
        ({"rank_pattern": ("attn2",)}, "--rank-pattern 'attn2' is not of the form REGEX=NUMBER"),
        ({"rank_pattern": ("(=4",)}, "--rank-pattern '(=4' is not of the form REGEX=NUMBER"),
        ({"rank_pattern": ("=4",)}, "--rank-pattern '=4': a regular expression stands before the ="),
        ({"rank_pattern": ("attn2=4", "attn1=0")}, "--rank-pattern 'attn1=0': a regular expression stands before the ="),
        ({"rank_pattern": ("attn2=4.5",)}, "--rank-pattern 'attn2=4.5': a rank is a whole number"),
        ({"lr_pattern": ("attn2=x",)}, "--lr-pattern 'attn2=x' is not of the form REGEX=NUMBER"),
        ({"lr_pattern": ("attn2=-1",)}, "--lr-pattern 'attn2=-1': a regular expression stands before the ="),
        ({"lora_plus": 0.0}, "--lora-plus must be above 0"),
        ({"max_norm": 0.0}, "--max-norm must be above 0"),
        ({"dora": True, "conv_rank": 2}, "--dora is for linear layers: without --conv-rank"),
        ({"dora": True, "max_norm": 1.0}, "--dora is for linear layers: without --max-norm"),
        ({"conv_alpha": 1.0}, "--conv-alpha does nothing without --conv-rank"),
        ({"rank_dropout": 1.0}, "--rank-dropout must lie in 0…0.9"),
    ],
)
def test_what_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        LoRAConfig(**options)


def test_a_state_that_does_not_know_an_option_is_not_taken_for_one_with_it(train, tmp_path):
    train("--steps", 1, "--alpha", 2)
    (folder,) = (tmp_path / "out").glob("state-*")
    state = load_state(folder)
    del state["made"]["flags"]["rank_stabilised"]
    save_state(tmp_path / "out", state, {})
    _, err = train("--steps", 2, "--alpha", 2, "--rank-stabilised", status=2)
    assert "does not fit: --rank-stabilised False -> True: change it back" in err
    train("--steps", 2, "--alpha", 2)


@pytest.mark.parametrize("name", [*asdict(LoRAConfig()), *asdict(DiffusionConfig())])
def test_any_option_of_lora_or_of_the_objective_that_a_state_does_not_know_had_its_default(name):
    default = (asdict(LoRAConfig()) | asdict(DiffusionConfig()))[name]
    assert changed(known_options({"steps": 3}), {"steps": 3, name: default}) == {}
    assert changed(known_options({"steps": 3}), {"steps": 3, name: "another"}).keys() == {name}


def test_a_state_with_the_old_name_of_min_snr_was_weighted():
    assert changed(known_options({"snr_gamma": 5.0}), {"weighting": "none"}) == {"weighting": "weighting min-snr:5 -> none"}
    assert changed(known_options({"snr_gamma": 5.0}), {"weighting": "min-snr:5"}) == {}
    assert changed(known_options({"snr_gamma": None}), {"weighting": "none"}) == {}


def test_ranks_by_layer_are_said_and_must_find_one(train, tmp_path):
    out, _ = train("--steps", 1, "--rank-pattern", "attn2=4", r"text_encoder_2.*k_proj=1")
    assert r"rank 2, attn2=4, text_encoder_2.*k_proj=1 on" in out
    shapes = {
        key: len(t) for key, t in load_file(tmp_path / "out/pytorch_lora_weights_1.safetensors").items() if "lora_down" in key
    }
    assert {rank for key, rank in shapes.items() if "attn2" in key} == {4}
    assert {rank for key, rank in shapes.items() if "lora_te2" in key and "k_proj" in key} == {1}
    assert set(shapes.values()) == {1, 2, 4}
    out, _ = train("--steps", 2, "--rank-pattern", "attn2=4", r"text_encoder_2.*k_proj=1")
    assert "resume     step 1 of" in out
    _, err = train("--steps", 3, status=2)
    assert "does not fit: --rank-pattern ('attn2=4', 'text_encoder_2.*k_proj=1') -> ()" in err
    _, err = train("--rank-pattern", "attn3=4", "--out", tmp_path / "b", status=2)
    assert "--rank-pattern 'attn3=4' finds none of the trained layers, e.g. unet.down_blocks" in err


# Updates.

RATES = {"lora_plus": 16.0, "lr_pattern": ("to_q=0.25", "attn2=3")}


def stepped(adapter: Adapter, config: LoRAConfig, kind: str, gradients: list[dict[str, list[Tensor]]], spoilt=()) -> Optimiser:
    """The adapter after a step for each gradient, {layer: (of A, of B)}, whose norms are below 1."""
    rates, memory = OptimiserConfig(lr=1e-3, text_encoder_lr=(2e-4,)), MemoryConfig(optimizer=kind)
    optimiser = Optimiser(TrainConfig(optimiser=rates, lora=config, memory=memory, steps=9), adapter, 1, torch.float32)
    for step, gradient in enumerate(gradients):
        optimiser.set_learning_rates(step)
        for name, module in adapter.modules.items():
            for own, g in zip(module.grads, gradient[name], strict=True):
                own.copy_(g)
        adapter.grad[0] += torch.nan if step in spoilt else 0
        optimiser.step(torch.zeros((), device=adapter.flat.device))
    return optimiser


def random_gradients(adapter: Adapter, steps: int) -> list[dict[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    layers = {name: (A.shape, B.shape) for name, (A, B, _) in adapter.deltas.items()}
    return [
        {name: [1e-4 * torch.randn(shape, generator=generator) for shape in shapes] for name, shapes in layers.items()}
        for _ in range(steps)
    ]


def small_adapter(widths: list[tuple[int, int]], rank: int, **config) -> Adapter:
    model = nn.ModuleDict({"unet": nn.ModuleList([nn.Linear(*pair) for pair in widths]), "text_encoder": nn.Linear(20, 30)})
    return add_lora(model, LoRAConfig(rank=rank, targets=".", **config))


def multiple(name: str, part: int) -> float:
    return (0.25 if "to_q" in name else 3 if "attn2" in name else 1) * (1, 16)[part]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_rates_of_parts_are_those_of_as_many_groups(denoiser, kind):
    """Of the library's own optimisers. Where the multiple is 1, bit for bit; and a step that is skipped changes nothing."""
    config = LoRAConfig(rank=3, **RATES)
    adapter = add_lora(denoiser, config, denoiser.unused)
    shake(adapter)
    gradients = random_gradients(adapter, 4)
    parts = {(name, i): nn.Parameter(part.clone()) for name, (*AB, _) in adapter.deltas.items() for i, part in enumerate(AB)}
    rates = {key: (2e-4 if key[0].startswith("text") else 1e-3) * multiple(*key) for key in parts}
    groups = [{"params": [p], "lr": rates[key]} for key, p in parts.items()]
    library = bitsandbytes.optim.AdamW8bit if kind == "adamw8bit" else torch.optim.AdamW
    plain = library(groups, weight_decay=0.01, **({"min_8bit_size": 0} if kind == "adamw8bit" else {"fused": True}))
    stepped(adapter, config, kind, gradients, spoilt={2})
    for gradient in (gradients[i] for i in (0, 1, 3)):
        for (name, i), p in parts.items():
            p.grad = gradient[name][i].clone()
        plain.step()
    for (name, i), p in parts.items():
        torch.testing.assert_close(adapter.deltas[name][i], p.detach(), atol=1e-3 * rates[name, i], rtol=0)  # of three steps
        assert multiple(name, i) != 1 or kind == "adamw" or torch.equal(adapter.deltas[name][i], p)
    assert any(multiple(*key) == 1 for key in parts)


def test_lora_plus_is_that_of_peft(denoiser):
    plain, config = copy.deepcopy(denoiser), LoRAConfig(rank=3, lora_plus=16, train_text_encoder=False)
    adapter = add_lora(denoiser, config, denoiser.unused)
    shake(adapter)
    peft = with_peft(plain, adapter, r=3, lora_alpha=3)
    theirs = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.01)
    gradients = random_gradients(adapter, 3)
    for gradient in gradients:
        for name in adapter.deltas:
            layer = peft.get_submodule(name)
            layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad = (g.clone() for g in gradient[name])
        theirs.step()
    stepped(adapter, config, "adamw", gradients)
    for name, (A, B, _) in adapter.deltas.items():
        layer = peft.get_submodule(name)
        torch.testing.assert_close(A, layer.lora_A.default.weight.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(B, layer.lora_B.default.weight.detach(), atol=1e-6, rtol=1e-6)


def kohyas_limit(A: Tensor, B: Tensor, alpha: float, largest: float) -> tuple[Tensor, Tensor]:
    """What its networks/lora.py does to one layer, in float64."""
    norm = (alpha / len(A) * B.double() @ A.double()).norm()
    root = (min(norm.item(), largest) / norm.item()) ** 0.5 if norm else 1.0
    return root * A, root * B


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(30, 700), st.integers(30, 700)), min_size=1, max_size=5), st.integers(1, 9),
    st.floats(-2, 2), st.booleans(),
)  # fmt: skip
def test_the_norm_of_every_layer_is_limited_as_by_kohya(widths, rank, exponent, same):
    adapter = small_adapter(widths * (1 + same), rank, alpha=2.5)
    generator = torch.Generator().manual_seed(1)
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=generator)).index_fill_(0, adapter.padding, 0)
    for index, (_, B, _) in enumerate(adapter.deltas.values()):
        B *= 0 if index == 1 else 1
    norms = sorted((alpha / len(A) * B @ A).norm().item() for A, B, alpha in adapter.deltas.values())
    largest = norms[len(norms) // 2] * 10**exponent + 1e-3
    before = {name: (A.clone(), B.clone()) for name, (A, B, _) in adapter.deltas.items()}
    wanted = {name: kohyas_limit(A, B, alpha, largest) for name, (A, B, alpha) in adapter.deltas.items()}
    NormLimit(adapter, largest)()
    for name, (A, B, alpha) in adapter.deltas.items():
        norm = (alpha / len(A) * B @ A).norm()
        assert norm <= largest * (1 + 1e-4)
        torch.testing.assert_close((A, B), tuple(p.float() for p in wanted[name]), rtol=1e-4, atol=1e-6)
        if norm < 0.999 * largest:
            assert torch.equal(A, before[name][0])
            assert torch.equal(B, before[name][1])
    assert not adapter.flat[~adapter.filled()].any()


def test_the_limit_holds_after_a_step(denoiser):
    config = LoRAConfig(rank=3, max_norm=0.2)
    adapter = add_lora(denoiser, config, denoiser.unused)
    shake(adapter)
    stepped(adapter, config, "adamw8bit", random_gradients(adapter, 2))
    norms = torch.stack([(alpha / len(A) * B @ A).norm() for A, B, alpha in adapter.deltas.values()])
    assert norms.max() <= 0.2 * (1 + 1e-5)
    assert (norms > 0.2 * (1 - 1e-5)).sum() > 5
    assert torch.equal(adapter.low, adapter.flat)


@pytest.mark.gpu
def test_a_step_with_them_does_not_wait_for_the_device():
    config = LoRAConfig(rank=3, targets=".", max_norm=0.1, lora_plus=4, lr_pattern=("unet=2",))
    adapter = add_lora(nn.ModuleDict({"unet": nn.Linear(300, 40)}).cuda(), config)
    optimiser = stepped(adapter, config, "adamw", random_gradients(adapter, 1))
    loss = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimiser.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


CONVOLUTION = "lora_unet_middle_block_0_in_layers_2.lora_down.weight"


def test_a_run_with_options_of_updates_resumes_bit_for_bit(train, tmp_path):
    options = ["--lora-plus", 8, "--lr-pattern", "attn2=0.5", "text_encoder=2", "--lr", 1e-2, "--precision", "fp16"]
    options += ["--max-norm", 0.05, "--conv-rank", 3, "--rank-dropout", 0.3]
    out, _ = train("--steps", 4, *options)
    assert "learning rate 0.01, text encoders 0.002, of B 8 times as much" in out
    train("--steps", 2, *options, "--out", tmp_path / "parts")
    train("--steps", 4, *options, "--out", tmp_path / "parts")
    whole, parts = (load_state(next((tmp_path / name).glob("state-*")))["lora"] for name in ("out", "parts"))
    assert torch.equal(whole, parts)
    assert load_file(tmp_path / "out/pytorch_lora_weights_4.safetensors")[CONVOLUTION].shape == (3, 64, 3, 3)
    begun = ["--init-lora", tmp_path / "out", "--conv-rank", 2, "--lr", 0, "--out", tmp_path / "begun"]
    out, _ = train("--steps", 1, "--rank", 2, *begun)
    assert "of higher rank" in out
    file = tmp_path / "begun/pytorch_lora_weights_1.safetensors"
    assert load_file(file)[CONVOLUTION].shape == (2, 64, 3, 3)
    _, err = train("--steps", 5, "--lr", 1e-2, "--precision", "fp16", "--conv-rank", 3, status=2)
    changes = "--lora-plus 8.0 -> None, --lr-pattern ('attn2=0.5', 'text_encoder=2') -> (), --max-norm 0.05 -> None"
    assert f"is of another run: {changes}, --rank-dropout 0.3 -> 0.0: change it back" in err
    _, err = train("--lr-pattern", "attn3=4", "--out", tmp_path / "b", status=2)
    assert "--lr-pattern 'attn3=4' finds none of the trained layers, e.g. unet.down_blocks" in err


def test_the_plan_has_room_for_copies_of_the_weights(pipe):
    """One that a step makes, where its result is changed, and one for the average."""
    memory, work = MemoryConfig().resolved(torch.device("cpu")), Workload(1, 64, 1, 1, has_latents=True, has_text=False)
    changed = [{"lora": LoRAConfig(**lora)} for lora in ({"lora_plus": 2}, {"lr_pattern": ("to_q=2",)}, {"max_norm": 1})]
    averaged = {"optimiser": OptimiserConfig(ema=0.9)}
    plain, *others, both = (
        plan_memory(pipe, TrainConfig(memory=memory, **config), work, torch.device("cpu"), 2**34).weights
        for config in (
            {}, *changed, {"optimiser": OptimiserConfig(text_encoder_lr=(1e-4, 2e-4))}, averaged, changed[0] | averaged,
        )
    )  # fmt: skip
    adapter = add_lora(Denoiser(pipe), LoRAConfig(), Denoiser(pipe).unused)
    assert others == [plain + adapter.flat.nbytes] * 5
    assert both == plain + 2 * adapter.flat.nbytes
