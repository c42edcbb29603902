"""LoRA files that a run builds on: --base-lora and --init-lora."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from test_train import last
from torch import nn

from lora import LoRAConfig, add_lora
from lora_files.write import serialise
from run.lineage import begin_from


def product(delta):
    A, B, alpha = delta
    return alpha / len(A) * B.flatten(1).double() @ A.flatten(1).double()


def model_of(rank: int, alpha: float):
    model = nn.ModuleDict({"unet": nn.Linear(12, 10), "other": nn.Linear(12, 10)})
    return add_lora(model, LoRAConfig(rank=rank, alpha=alpha, targets="."))


@settings(max_examples=40, deadline=None)
@given(
    own=st.integers(1, 8), theirs=st.integers(1, 8), own_alpha=st.sampled_from([0.5, 4, 8]),
    alpha=st.sampled_from([0.25, 1, 16, -2]), shape=st.sampled_from([(), (1, 1)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_an_adapter_begins_with_the_files_delta(own, theirs, own_alpha, alpha, shape, dtype):
    adapter = model_of(own, own_alpha)
    generator = torch.Generator().manual_seed(own * 8 + theirs)
    A = torch.randn(theirs, 12, *shape, generator=generator).to(dtype)
    B = torch.randn(10, theirs, *shape, generator=generator).to(dtype)
    before = adapter.deltas["other"][0].clone()
    lost = begin_from(adapter, {"unet": (A, B, alpha)})
    wanted = product((A, B, alpha))
    singular = torch.linalg.svdvals(wanted)
    difference = (product(adapter.deltas["unet"]) - wanted).norm() / wanted.norm()
    optimum = (singular[own:].norm() / singular.norm()).item()  # Eckart and Young
    assert lost == pytest.approx(optimum, abs=1e-6)
    assert difference.item() == pytest.approx(optimum, abs=2e-6)
    assert torch.equal(adapter.low, adapter.flat)  # the layers compute with it
    assert torch.equal(adapter.deltas["other"][0], before)
    assert not adapter.deltas["other"][1].any()
    if theirs < own:  # what is new may learn: its A is not 0
        assert adapter.deltas["unet"][0][theirs:].any(dim=1).all()


@pytest.fixture
def lora(train, tmp_path):
    """A LoRA file of two steps at a high rate."""
    train("--steps", 2, "--lr", 0.05, "--save-dtype", "fp32", "--out", tmp_path / "first")
    return tmp_path / "first/pytorch_lora_weights_2.safetensors"


def test_the_first_loss_is_that_of_the_merged_model(train, script, tiny_model, lora, tmp_path):
    def first_loss(name: str, *options) -> float:
        train("--steps", 1, "--out", tmp_path / name, "--log-dir", tmp_path / f"{name}-log", "--targets", "all", *options)
        return last(tmp_path / f"{name}-log", "loss")

    script("scripts/merge_lora.py", tiny_model, tmp_path / "merged", "--lora", lora)
    merged = first_loss("of-merged", "--model", tmp_path / "merged")
    base = first_loss("of-base")
    assert abs(merged - base) > 1e-4  # the file changes something
    assert first_loss("going-on", "--init-lora", lora) == pytest.approx(merged, rel=1e-5)
    assert first_loss("higher-rank", "--init-lora", lora, "--rank", 5) == pytest.approx(merged, rel=1e-5)
    assert first_loss("with-lengths", "--init-lora", lora, "--dora") == pytest.approx(merged, rel=1e-5)
    assert first_loss("on-base", "--base-lora", lora) == pytest.approx(merged, rel=1e-5)
    halves = first_loss("both", "--base-lora", f"{lora}:0.5", "--base-lora", f"{lora}:0.25", "--init-lora", lora)
    assert abs(halves - merged) > 1e-5

    # The header tells both, without folders; what was trained on a merged base does not contain it.
    with safe_open(tmp_path / "both/pytorch_lora_weights_1.safetensors", "pt") as file:
        config = json.loads(file.metadata()["sdxl_lora.config"])
    assert [line.split()[0] for line in config["base_lora"]] == [lora.name] * 2
    assert [line.rpartition(":")[2] for line in config["base_lora"]] == ["0.5", "0.25"]
    assert config["init_lora"].startswith(f"{lora.name} ")
    assert str(tmp_path) not in str(config)
    trained = load_file(tmp_path / "on-base/pytorch_lora_weights_1.safetensors")
    assert max(t.abs().max() for key, t in trained.items() if "lora_up" in key) < 0.01


def test_what_has_no_place_is_named(train, lora, tmp_path):
    out, _ = train("--steps", 1, "--no-train-text-encoder", "--init-lora", lora, "--out", tmp_path / "unet")
    (line,) = [line for line in out.splitlines() if line.startswith("goes on")]
    assert "no place for" in line
    assert "text_encoder" in line
    _, err = train("--steps", 1, "--targets", r"proj_in$", "--init-lora", lora, "--out", tmp_path / "none", status=2)
    assert "--init-lora" in err
    assert "is trained here" in err


def test_another_file_of_the_same_name_is_another_run(train, lora, tmp_path):
    options = ("--init-lora", lora, "--base-lora", lora, "--out", tmp_path / "o")
    train("--steps", 1, *options)
    train("--steps", 2, *options)
    moved = lora.rename(tmp_path / lora.name)  # the same file elsewhere is no change
    options = ("--init-lora", moved, "--base-lora", moved, "--out", tmp_path / "o")
    train("--steps", 3, *options)
    adapter = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(1, 64), torch.ones(64, 1), 1.0)}
    moved.write_bytes(serialise(adapter, {}))
    _, err = train("--steps", 4, *options, status=2)
    assert "base-lora" in err
    assert "change it back" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init-lora", "missing"), "--init-lora missing: no such file or folder"),
        (("--base-lora", "missing:0.5"), "--base-lora missing: no such file or folder"),
        (("--base-lora", "missing:nan"), "--base-lora missing:nan: the strength nan is not a finite number"),
        (("--resume", "x.safetensors"), "--init-lora x.safetensors goes on from it"),
    ],
)
def test_mistakes(train, options, message):
    _, err = train(*options, status=2)
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_text_that_other_encoders_made_is_refused(train, script, photos, tiny_model, pipe, tmp_path):
    """Also if the LoRA changes them less than their signature shows."""
    latents, lora = tmp_path / "latents", tmp_path / "text.safetensors"
    script("scripts/cache_latents.py", photos, "--out", latents, "--model", tiny_model, "--text", 1, "--workers", 0)
    delta = torch.ones(1, 32) * 1e-3, torch.ones(32, 1) * 1e-3, 1.0
    for layer, status in (("text_encoder.encoder.layers.0.self_attn.q_proj", 2), ("unet.mid_block.attentions.0.proj_in", 0)):
        A, B, alpha = delta if status else (torch.ones(1, 64), torch.ones(64, 1), 1.0)
        lora.write_bytes(serialise({layer: (A, B, alpha)}, {}))
        _, err = train("--data", latents, "--no-train-text-encoder", "--base-lora", lora, "--steps", 1, status=status)
        assert ("--base-lora changes the text encoders" in err) == bool(status)
