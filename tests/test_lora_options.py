"""Options of LoRA, with PEFT as the oracle: the same A and B give the same outputs, gradients, steps and weights."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from test_lora import inputs, shake

from common.errors import UserError
from lora import Adapter, add_lora, merge_lora
from lora_files.deltas import layer_shapes
from lora_files.read import read_lora
from lora_files.write import serialise
from options.training import LoRAConfig
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
    return model


SCALES = {
    "rank stabilised": ({"rank_stabilised": True}, {"use_rslora": True}),
    "ranks by layer": ({"rank_pattern": ("attn2=6", r"to_[qk]$=2")}, {"rank_pattern": {r".*attn2.*": 6, r".*to_[qk]": 2}}),
    "both": (
        {"rank_pattern": ("text_encoder_2=1", ".=5"), "rank_stabilised": True},
        {"rank_pattern": {r"text_encoder_2\..*": 1, ".*": 5}, "use_rslora": True},
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_outputs_gradients_and_files_are_those_of_peft(denoiser, tmp_path, ours, theirs, layout):
    plain, base = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    adapter = add_lora(denoiser, LoRAConfig(rank=4, alpha=3, **ours), denoiser.unused)
    shake(adapter)
    peft = with_peft(plain, adapter, r=4, lora_alpha=3, **theirs)
    output, wanted = denoiser(**inputs()), peft(**inputs())
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=0)
    output.square().mean().backward()
    wanted.square().mean().backward()
    for name, module in adapter.modules.items():
        layer = peft.get_submodule(name)
        torch.testing.assert_close(module.lora_A.grad, layer.lora_A.default.weight.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(module.lora_B.grad, layer.lora_B.default.weight.grad, atol=1e-5, rtol=1e-3)

    file = tmp_path / "lora.safetensors"
    file.write_bytes(serialise(adapter.deltas, {}, layout, torch.float32))
    merge_lora(base, read_lora(file, layer_shapes(base)))
    for name in adapter.modules:
        layer = peft.get_submodule(name)
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(base.get_submodule(name).weight, merged, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_stabilised": True}, "--rank-stabilised needs --alpha"),
        ({"rank_pattern": ("attn2",)}, "--rank-pattern 'attn2' is not of the form REGEX=NUMBER"),
        ({"rank_pattern": ("(=4",)}, "--rank-pattern '(=4' is not of the form REGEX=NUMBER"),
        ({"rank_pattern": ("=4",)}, "--rank-pattern '=4': a regular expression stands before the ="),
        ({"rank_pattern": ("attn2=4", "attn1=0")}, "--rank-pattern 'attn1=0': a regular expression stands before the ="),
        ({"rank_pattern": ("attn2=4.5",)}, "--rank-pattern 'attn2=4.5': a rank is a whole number"),
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
