import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from test_lora import shake
from torch import nn

import formats
from errors import UserError
from lora import LoRAConfig, add_lora, linear_layers, merge_lora

CONFIG = {"model": "demo", "rank": 4, "alpha": 2.0, "targets": "all", "resolution": 64}


@pytest.fixture
def adapter(denoiser):
    adapter = add_lora(denoiser, LoRAConfig(rank=4, alpha=2, targets="all"), denoiser.unread)
    shake(adapter)
    return adapter


@pytest.fixture
def file(adapter, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(formats.serialise(adapter.deltas, formats.describe(CONFIG, images=7, step=5)))
    return path


def test_names_of_the_real_architecture():
    names = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks_8_1_transformer_blocks_9_ff_net_2",
        "unet.mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "unet.up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v": "output_blocks_2_1_transformer_blocks_9_attn2_to_v",
        "unet.up_blocks.1.attentions.0.proj_out": "output_blocks_3_1_proj_out",
        "unet.down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
        "unet.mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "unet.up_blocks.2.resnets.2.time_emb_proj": "output_blocks_8_0_emb_layers_1",
        "unet.time_embedding.linear_2": "time_embed_2",
        "unet.add_embedding.linear_1": "label_emb_0_0",
    }
    assert {path: formats.kohya_name(path) for path in names} == {p: f"lora_unet_{n}" for p, n in names.items()}
    for spelling in ("text_encoder.encoder", "text_encoder.text_model.encoder"):  # transformers 5 and 4
        assert formats.kohya_name(f"{spelling}.layers.0.mlp.fc1") == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    te2 = "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj"
    assert formats.kohya_name(te2) == "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"
    assert formats.kohya_name("text_encoder_2.text_projection") == "lora_te2_text_projection"


def test_names_are_one_to_one(denoiser):
    paths = list(linear_layers(denoiser))
    assert len({formats.kohya_name(path) for path in paths}) == len(paths)
    assert not any(re.search(r"down_blocks|up_blocks|mid_block|\.", formats.kohya_name(path)) for path in paths)


def test_round_trip(adapter, denoiser, file):
    back = formats.read(file, list(linear_layers(denoiser)))
    assert len(back) > 100
    assert back.keys() == adapter.deltas.keys()
    for path, (A, B, alpha) in adapter.deltas.items():
        assert torch.equal(back[path][0], A.half())
        assert torch.equal(back[path][1], B.half())
        assert back[path][2] == alpha == 2


def test_layout(file):
    tensors = load_file(file)
    assert {key.rsplit(".", 2)[-2] for key in tensors if key.endswith("weight")} == {"lora_down", "lora_up"}
    modules = {key.split(".")[0] for key in tensors}
    assert len(tensors) == 3 * len(modules)
    assert all(tensors[f"{m}.alpha"].shape == () and tensors[f"{m}.alpha"] == 2 for m in modules)
    assert all(t.dtype == torch.float16 for key, t in tensors.items() if key.endswith("weight"))
    assert {m.split("_")[1] for m in modules} == {"unet", "te1", "te2"}


def test_metadata(file):
    metadata = formats.read_metadata(file)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert json.loads(metadata["sdxl_lora.config"])["rank"] == 4
    data = file.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert formats.trained_on(file) == "demo"


def test_it_loads_in_diffusers_with_the_same_weights(denoiser, pipe, file, tiny_model):
    """The oracle: diffusers with PEFT reads the file, fuses it, and has our merged weights."""
    from diffusers import StableDiffusionXLPipeline

    oracle = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    oracle.load_lora_weights(str(file.parent), weight_name=file.name)
    oracle.fuse_lora(["unet", "text_encoder", "text_encoder_2"])
    oracle.unload_lora_weights()
    ours = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    holder = nn.ModuleDict({name: getattr(ours, name) for name in ("unet", "text_encoder", "text_encoder_2")})
    base = {name: p.detach().clone() for name, p in holder.named_parameters()}
    merge_lora(holder, formats.read(file, list(linear_layers(holder))))
    changed = 0
    for component in holder:
        theirs = dict(getattr(oracle, component).named_parameters())
        for name, p in holder[component].named_parameters():
            torch.testing.assert_close(p, theirs[name], atol=1e-6, rtol=0)
            changed += not torch.equal(p, base[f"{component}.{name}"])
    assert changed == len(denoiser_modules(file))


def denoiser_modules(file) -> set[str]:
    return {key.split(".")[0] for key in load_file(file)}


def test_a_missing_alpha_means_rank(denoiser, file, tmp_path):
    tensors = {key: t for key, t in load_file(file).items() if not key.endswith("alpha")}
    save_file(tensors, tmp_path / "no_alpha.safetensors")
    assert {alpha for *_, alpha in formats.read(tmp_path / "no_alpha.safetensors", list(linear_layers(denoiser))).values()} == {
        4.0
    }


def test_what_does_not_fit_is_refused_by_name(denoiser, file, tmp_path):
    paths, tensors = list(linear_layers(denoiser)), load_file(file)

    def refused(changed: dict, match: str):
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=match):
            formats.read(tmp_path / "bad.safetensors", paths)

    refused({**tensors, "lora_unet_nowhere.alpha": torch.tensor(1.0)}, "1 of .* keys match no layer, first lora_unet_nowhere")
    name = next(iter(tensors)).split(".")[0]
    refused({**tensors, f"{name}.dora_scale": torch.ones(1)}, f"first {name}.dora_scale")
    refused({k: t for k, t in tensors.items() if k != f"{name}.lora_up.weight"}, f"{name} lacks")
    refused({}, "match no layer")
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="not a readable"):
        formats.read(tmp_path / "bad.safetensors", paths)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])  # 1e6 is infinite in float16
def test_nothing_that_is_not_finite_is_written(adapter, value):
    name, module = next(iter(adapter.modules.items()))
    with torch.no_grad():
        module.lora_B[0, 0] = value
    with pytest.raises(UserError, match=formats.kohya_name(name)):
        formats.serialise(adapter.deltas, {})


def test_the_bytes_are_a_function_of_the_weights(adapter):
    assert formats.serialise(adapter.deltas, {}) == formats.serialise(adapter.deltas, {})
    assert load(formats.serialise(adapter.deltas, {})).keys()


def test_find_takes_the_newest(tmp_path):
    import os

    with pytest.raises(UserError, match=r"no \.safetensors"):
        formats.find(tmp_path)
    for age, name in ((30, "b"), (10, "a"), (20, "c")):
        (tmp_path / f"{name}.safetensors").touch()
        os.utime(tmp_path / f"{name}.safetensors", (0, 1000 - age))
    assert formats.find(tmp_path).name == "a.safetensors"
    assert formats.find(tmp_path / "c.safetensors").name == "c.safetensors"
