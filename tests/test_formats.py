import hashlib
import json
import os
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import SUFFIXES, make_header, named, with_text_model, write
from safetensors.torch import load, load_file, save_file
from test_interop import merged_like_diffusers
from test_lora import shake

from common.errors import UserError
from lora import add_lora, merge_lora
from lora_files.base_weights import places
from lora_files.deltas import layer_shapes, parameter_shapes
from lora_files.names import kohya_name
from lora_files.read import fits, newest_lora, read_lora, read_metadata, trained_on, training_steps
from lora_files.write import largest_difference, serialise
from model.checkpoint import checkpoint_of, sgm_path
from model.load import load_sdxl
from model.sdxl import Denoiser
from options.training import LoRAConfig

CONFIG = {"model": "demo", "rank": 4, "alpha": 2.0, "targets": "all", "resolution": 64}


@pytest.fixture
def adapter(denoiser):
    adapter = add_lora(denoiser, LoRAConfig(rank=4, alpha=2, targets="all"), denoiser.unused)
    shake(adapter)
    return adapter


@pytest.fixture
def file(adapter, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialise(adapter.deltas, make_header(CONFIG, images=7, step=5)))
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
    assert {path: kohya_name(path) for path in names} == {p: f"lora_unet_{n}" for p, n in names.items()}
    for spelling in ("text_encoder.encoder", "text_encoder.text_model.encoder"):  # transformers 5 and 4
        assert kohya_name(f"{spelling}.layers.0.mlp.fc1") == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    te2 = "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj"
    assert kohya_name(te2) == "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"
    assert kohya_name("text_encoder_2.text_projection") == "lora_te2_text_projection"


def test_names_of_stability_there_and_back(sdxl_meta):
    """Every linear and convolution layer of the real U-Net, and diffusers' own conversion of a checkpoint as the oracle."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    paths = [path.removeprefix("unet.") for path in layer_shapes(sdxl_meta) if path.startswith("unet.")]
    assert len(paths) == 794
    keys = [f"model.diffusion_model.{sgm_path(path)}.weight" for path in paths]
    assert [place.module for key in keys for place in places("", key, [1])] == [f"unet.{path}" for path in paths]
    checkpoint = {f"model.diffusion_model.{sgm_path(path)}.weight": torch.tensor(i) for i, path in enumerate(paths)}
    checkpoint |= {key.replace(".weight", ".bias"): torch.tensor(-1) for key in checkpoint}
    checkpoint |= {f"model.diffusion_model.out.0.{part}": torch.tensor(-1) for part in ("weight", "bias")}
    converted = convert_ldm_unet_checkpoint(checkpoint, sdxl_meta.unet.config)
    assert {k: int(v) for k, v in converted.items() if v >= 0} == {f"{path}.weight": i for i, path in enumerate(paths)}


def test_names_are_one_to_one(denoiser):
    paths = list(layer_shapes(denoiser))
    assert len({kohya_name(path) for path in paths}) == len(paths)
    assert not any(re.search(r"down_blocks|up_blocks|mid_block|\.", kohya_name(path)) for path in paths)


def test_round_trip(adapter, denoiser, file):
    back = read_lora(file, layer_shapes(denoiser))
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
    metadata = read_metadata(file)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert json.loads(metadata["sdxl_lora.config"])["rank"] == 4
    data = file.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert trained_on(file) == "demo"


def test_what_is_trained_loads_in_diffusers(file, tiny_model):
    assert merged_like_diffusers(tiny_model, file) == len({key.split(".")[0] for key in load_file(file)})


def test_a_missing_alpha_means_rank(denoiser, file, tmp_path):
    tensors = {key: t for key, t in load_file(file).items() if not key.endswith("alpha")}
    save_file(tensors, tmp_path / "no_alpha.safetensors")
    assert {alpha for *_, alpha in read_lora(tmp_path / "no_alpha.safetensors", layer_shapes(denoiser)).values()} == {4.0}


def test_what_does_not_fit_is_refused_by_name(denoiser, file, tmp_path):
    paths, tensors = layer_shapes(denoiser), load_file(file)

    def refused(changed: dict, match: str):
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=match):
            read_lora(tmp_path / "bad.safetensors", paths)

    refused({**tensors, "lora_unet_nowhere.alpha": torch.ones(1)}, "1 of .* modules match no layer, first lora_unet_nowhere")
    name = next(iter(tensors)).split(".")[0]
    refused({k: t for k, t in tensors.items() if k != f"{name}.lora_up.weight"}, f"1 of .* modules lack A or B, first {name}")
    again = {k.replace("input_blocks_4_1", "down_blocks_1_attentions_0"): t.clone() for k, t in tensors.items()}
    refused({**tensors, **again}, "twice, under two names")
    narrow = {k: t[:, :24].contiguous() if "attn2_to_k.lora_down" in k else t for k, t in tensors.items()}
    refused(narrow, "it is for another model, whose text has 24 channels, not 80")
    refused({}, "is no LoRA: it holds no tensor")
    refused({"conv_in.weight": torch.ones(4, 4, 3, 3)}, r"is no LoRA: conv_in\.weight is of a model")
    for shape in ((0, 64), (4,), ()):  # rank 0, no matrix, no dimension at all
        refused(
            {**tensors, f"{name}.lora_down.weight": torch.ones(shape)}, "1 of .* modules have other shapes than their layer"
        )
    refused({**tensors, f"{name}.alpha": torch.tensor(float("nan"))}, f"{name}.alpha is not finite")
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="not a readable"):
        read_lora(tmp_path / "bad.safetensors", paths)


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_that_are_no_numbers_are_refused_by_name(denoiser, file, data):
    """Any value of any tensor, in any dtype that has NaN or infinity."""
    tensors, bad = load_file(file), file.with_name("bad.safetensors")
    key = data.draw(st.sampled_from(sorted(tensors)))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]))
    value = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    tensors[key] = tensors[key].to(dtype)
    values = tensors[key].view(-1)
    values[data.draw(st.integers(0, len(values) - 1))] = value
    save_file(tensors, bad)
    message = re.escape(f"{bad}: {key} is not finite (1 of {len(tensors)} tensors)")
    with pytest.raises(UserError, match=f"^{message}$"):
        read_lora(bad, layer_shapes(denoiser))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e8m0fnu])
def test_a_dtype_that_holds_no_weights_is_refused_by_name(denoiser, file, tmp_path, dtype):
    tensors, name = load_file(file), next(iter(load_file(file))).split(".")[0]
    alphas = {key: t.to(torch.int64) for key, t in tensors.items() if key.endswith(".alpha")}  # as diffusers writes it
    save_file(tensors | alphas, tmp_path / "alphas.safetensors")
    check_equal(read_lora(tmp_path / "alphas.safetensors", layer_shapes(denoiser)), read_lora(file, layer_shapes(denoiser)))
    for key in (f"{name}.lora_down.weight", f"{name}.lora_up.weight"):
        save_file({**tensors, key: tensors[key].float().to(dtype)}, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=f"{key} is .*, which holds no weights"):
            read_lora(tmp_path / "bad.safetensors", layer_shapes(denoiser))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_every_dtype_of_weights_is_converted_and_merged(script, adapter, denoiser, tiny_model, tmp_path, dtype):
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    tensors = named(adapter.deltas, "kohya SGM", "kohya", alpha=True)
    save_file({key: t if t.ndim == 0 else t.to(dtype) for key, t in tensors.items()}, path)
    wanted = {name: (A.to(dtype).float(), B.to(dtype).float(), alpha) for name, (A, B, alpha) in adapter.deltas.items()}
    back = read_lora(path, layer_shapes(denoiser))
    assert largest_difference(back, wanted) == 0
    script("scripts/convert_lora.py", path, out, "--model", tiny_model, "--save-dtype", "fp32")
    assert largest_difference(read_lora(out, layer_shapes(denoiser)), wanted) == 0
    script("scripts/extract_lora.py", path, tmp_path / "small.safetensors", "--resize", "--rank", 1, "--model", tiny_model)
    script("scripts/inspect_lora.py", path, "--model", tiny_model, "--picture", tmp_path / "norms.png")
    script("scripts/merge_lora.py", tiny_model, tmp_path / "merged", "--lora", path)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("b2.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("set_weight", r"whole weights \(set_weight\)"),
        ("reshape_weight", "a LoRA for weights of another shape"),
        ("vera_lambda_b", "VeRA"),
        ("lora_E", "AdaLoRA"),
        ("lora_B.bias", "a LoRA with biases"),
        ("lora_A.default_0.weight", "a PEFT adapter with another name than default"),
        ("bundle_emb", "a LoRA with embeddings in it"),
    ],
)
def test_other_adapters_are_refused_by_their_name(denoiser, file, tmp_path, part, kind):
    tensors = load_file(file)
    save_file({**tensors, f"{next(iter(tensors)).split('.')[0]}.{part}": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=f"bad.safetensors is {kind}.*, which is not read"):
        read_lora(tmp_path / "bad.safetensors", layer_shapes(denoiser))


# What other tools write.


def check_equal(ours, wanted) -> None:
    assert ours.keys() == wanted.keys()
    for module, (A, B, alpha) in wanted.items():
        assert torch.equal(ours[module][0], A)
        assert torch.equal(ours[module][1], B)
        assert ours[module][2] == pytest.approx(alpha)


@pytest.mark.parametrize(
    "layout", ["kohya SGM", "kohya diffusers", "lycoris", "diffusers", "processors", "transformers 5", "comfy"]
)
def test_every_layout_is_read_alike(adapter, denoiser, tmp_path, layout):
    for suffix in SUFFIXES:
        file = tmp_path / f"{suffix}.safetensors"
        write(file, adapter.deltas, layout, suffix, alpha=True)
        check_equal(read_lora(file, layer_shapes(denoiser)), adapter.deltas)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_raw_peft_names_no_component(adapter, denoiser, tmp_path, component):
    """The shapes show the component; alpha and rsLoRA are in adapter_config.json."""
    mine = {m: d for m, d in adapter.deltas.items() if m.split(".")[0] == component}
    write(tmp_path / "adapter_model.safetensors", mine, "raw peft", "peft", alpha=False)
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = read_lora(tmp_path / "adapter_model.safetensors", layer_shapes(denoiser))
    check_equal(ours, {module: (A, B, 6 * 4**0.5) for module, (A, B, _) in mine.items()})


@pytest.mark.parametrize(
    "config", ["[1]", "null", "rubbish", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}']
)
def test_metadata_that_makes_no_sense_is_one_line(adapter, denoiser, tmp_path, config):
    write(tmp_path / "x.safetensors", adapter.deltas, "diffusers", "peft", False, {"lora_adapter_metadata": config})
    with pytest.raises(UserError, match=r"its PEFT configuration is not (readable|usable)"):
        read_lora(tmp_path / "x.safetensors", layer_shapes(denoiser))


def test_adapter_config_counts_only_for_a_file_with_pefts_own_name(adapter, denoiser, tmp_path):
    write(tmp_path / "x.safetensors", adapter.deltas, "diffusers", "peft", alpha=False)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 99}))
    assert {alpha for *_, alpha in read_lora(tmp_path / "x.safetensors", layer_shapes(denoiser)).values()} == {4.0}


def test_alpha_patterns_match_as_in_peft(adapter, denoiser, tmp_path):
    """The first pattern that matches the end of a path counts; alternatives (a|b) are one pattern; text_model is optional."""
    from peft.utils.other import get_pattern_key  # some versions of PEFT lack this name: then this test fails

    patterns = {"attn1.to_q": 3, "to_q": 5, "to_k|to_v": 6, "text_model.encoder.layers.0.self_attn.q_proj": 7}
    config = {f"{c}.{key}": value for c in ("unet", "text_encoder", "text_encoder_2") for key, value in
            (("lora_alpha", 2), ("alpha_pattern", patterns))}  # fmt: skip
    write(tmp_path / "x.safetensors", adapter.deltas, "diffusers", "peft", False, {"lora_adapter_metadata": json.dumps(config)})
    seen = set()
    for path, (*_, alpha) in read_lora(tmp_path / "x.safetensors", layer_shapes(denoiser)).items():
        component, _, rest = path.partition(".")
        name = rest if component == "unet" else with_text_model(rest)
        wanted = patterns.get(get_pattern_key(list(patterns), name), 2)
        assert alpha == wanted, path
        seen.add(wanted)
    assert seen == {2, 3, 5, 6, 7}


def test_alpha_in_the_metadata_of_diffusers(adapter, denoiser, tmp_path):
    special = next(m for m in adapter.deltas if m.startswith("unet.") and m.endswith("to_q"))
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"^" + special.removeprefix("unet."): 3}}
    config |= {"text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True}
    write(tmp_path / "x.safetensors", adapter.deltas, "diffusers", "peft", False, {"lora_adapter_metadata": json.dumps(config)})
    ours = read_lora(tmp_path / "x.safetensors", layer_shapes(denoiser))
    alphas = {"unet": 8.0, "text_encoder": 4.0, "text_encoder_2": 4.0}  # rsLoRA: 2 · √4; the rank
    check_equal(ours, {m: (A, B, 3.0 if m == special else alphas[m.split(".")[0]]) for m, (A, B, _) in adapter.deltas.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])  # 1e6 is infinite in float16
def test_nothing_that_is_not_finite_is_written(adapter, value):
    name, (_, B, _) = next(iter(adapter.deltas.items()))
    B[0, 0] = value
    with pytest.raises(UserError, match=kohya_name(name)):
        serialise(adapter.deltas, {})


def test_the_bytes_are_a_function_of_the_weights(adapter):
    assert serialise(adapter.deltas, {}) == serialise(adapter.deltas, {})
    assert load(serialise(adapter.deltas, {})).keys()


def test_newest_lora_of_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors"):
        newest_lora(tmp_path)
    for age, name in ((30, "b"), (10, "a"), (20, "c")):
        (tmp_path / f"{name}.safetensors").touch()
        os.utime(tmp_path / f"{name}.safetensors", (0, 1000 - age))
    assert newest_lora(tmp_path).name == "a.safetensors"
    assert newest_lora(tmp_path / "c.safetensors").name == "c.safetensors"


STEP_NAMES = ["pytorch_lora_weights_{}", "pytorch_lora_weights_{}_diffusers", "style-{:06}", "v2 style-step{:08}", "{}"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), key=st.sampled_from(["sdxl_lora.step", "ss_steps", None]), pattern=st.sampled_from(STEP_NAMES))
def test_the_newest_lora_is_that_of_the_highest_step(tmp_path_factory, data, key, pattern, capfd):
    """Whatever order the files were copied in, by the header or by the name; and a line says which was written later."""
    steps = data.draw(st.lists(st.integers(0, 99_999), min_size=2, max_size=5, unique=True))
    times = data.draw(st.lists(st.integers(1, 9), min_size=len(steps), max_size=len(steps)))
    folder = tmp_path_factory.mktemp("steps")
    named = [folder / f"{pattern.format(step)}.safetensors" for step in steps]
    if key:  # then names do not count
        named = [folder / f"{pattern.format(99_999 - step)}.safetensors" for step in steps]
    for file, step, time in zip(named, steps, times, strict=True):
        save_file({"x": torch.zeros(1)}, file, {key: str(step)} if key else {})
        os.utime(file, (0, time))
    assert newest_lora(folder) == named[steps.index(max(steps))]
    assert ("was written later" in capfd.readouterr().err) == (max(times) > times[steps.index(max(steps))])


def test_a_step_of_thousands_of_digits_is_none(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "style-7.safetensors", {"sdxl_lora.step": "9" * 5000})
    assert training_steps(tmp_path / "style-7.safetensors") == (7, 7)


def comfy_file(denoiser, adapter, path):
    """As ComfyUI's training node writes it: LoRA of weights, .diff of norms and .diff_b of biases, with SGM's names."""
    g, wanted = torch.Generator().manual_seed(0), {}
    tensors = named(adapter.deltas, "comfy", "kohya", alpha=True)
    tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("diffusion_model.")}
    for name, parameter in denoiser.named_parameters():
        if not name.startswith("unet.") or "lora_" in name:
            continue
        module, _, leaf = name.removeprefix("unet.").rpartition(".")
        if leaf == "bias" or parameter.ndim == 1:
            wanted[name] = torch.randn(parameter.shape, generator=g)
            tensors[f"diffusion_model.{sgm_path(module)}.{'diff_b' if leaf == 'bias' else 'diff'}"] = wanted[name].clone()
    save_file(tensors, path)
    return wanted


def test_what_comfyui_trains_is_merged_everywhere(script, adapter, denoiser, pipe, tiny_model, tmp_path):
    path = tmp_path / "comfy.safetensors"
    added = comfy_file(denoiser, adapter, path)
    assert {"unet.conv_norm_out.weight", "unet.down_blocks.0.resnets.0.norm2.bias", "unet.conv_in.bias"} <= added.keys()
    plain = Denoiser(load_sdxl(str(tiny_model), torch.float32, torch.device("cpu")))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    deltas = read_lora(path, parameter_shapes(plain))
    merge_lora(plain, deltas, 0.5)
    after = plain.state_dict()
    for name, addition in added.items():
        torch.testing.assert_close(after[name], before[name] + 0.5 * addition)
    assert {name for name in after if not torch.equal(after[name], before[name])} == added.keys() | {
        f"{name}.weight" for name in adapter.deltas if name.startswith("unet.")
    }
    for base in (tiny_model, tmp_path / "base.safetensors"):  # a folder, and a checkpoint
        if base != tiny_model:
            save_file(checkpoint_of(load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))), base)
        out = tmp_path / f"merged{base.suffix}"
        script("scripts/merge_lora.py", base, out, "--lora", f"{path}:0.5")
        if base == tiny_model:
            (file,) = (out / "unet").glob("*.safetensors")
            found = {f"unet.{key}": tensor for key, tensor in load_file(file).items()}
            assert all(torch.equal(found[name], after[name]) for name in found)
        else:
            wanted = checkpoint_of(plain)
            assert all(torch.equal(load_file(out)[key], tensor) for key, tensor in wanted.items())
    out, _ = script("scripts/convert_lora.py", path, tmp_path / "x.safetensors", "--model", tiny_model)
    assert f"left out: {len(added)} additions to norms or biases" in out
    out, _ = script("scripts/inspect_lora.py", path, "--model", tiny_model, "--picture", tmp_path / "norms.png")
    assert "an addition to norms, biases or whole weights" in out
    assert "ComfyUI    loads" in out
    wrong = load_file(path) | {"diffusion_model.out.0.diff": torch.ones(3)}
    save_file(wrong, path)
    with pytest.raises(UserError, match=r"1 of \d+ modules have other shapes than their layer, first diffusion_model.out.0"):
        read_lora(path, parameter_shapes(plain))


# What we write.


def test_a_header_names_no_folder_user_or_bucket(adapter, denoiser, tmp_path, script, tiny_model):
    secrets = ["/home/bob smith/x/my data/", "s3://bucket/prefix/shards", "C:\\Users\\bob\\runs"]
    config = CONFIG | {"data": secrets, "out": secrets[0], "log_dir": secrets[2], "model": secrets[1], "resume": secrets[0]}
    config |= {"targets": r"attn2\.to_k", "author": "Ann/Bob", "description": "a style"}
    old = tmp_path / "old.safetensors"
    metadata = make_header(config, images=7, step=5)
    save_file(named(adapter.deltas, "kohya SGM", "kohya", alpha=True), old, metadata)  # as an earlier version wrote it
    script("scripts/convert_lora.py", old, tmp_path / "new.safetensors", "--model", tiny_model, "--format", "diffusers")
    (tmp_path / "ours.safetensors").write_bytes(serialise(adapter.deltas, metadata))
    for name, implementation in (("new", "huggingface/diffusers"), ("ours", "Stability-AI/generative-models")):
        found = read_metadata(tmp_path / f"{name}.safetensors")
        text = json.dumps(found)
        assert not [word for word in ("home", "bob", "bucket", "prefix", "Users", "C:") if word in text]
        saved = json.loads(found["sdxl_lora.config"])
        assert saved["data"] == ["my data", "shards", "runs"]
        assert (saved["model"], saved["targets"]) == ("shards", r"attn2\.to_k")
        assert implementation in found["modelspec.implementation"]
        assert (found["modelspec.author"], found["modelspec.description"]) == ("Ann/Bob", "a style")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["modelspec.date"])
        assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]


def test_a_file_without_a_header_gets_title_and_resolution(adapter, tmp_path, script, tiny_model):
    save_file(named(adapter.deltas, "kohya SGM", "kohya", alpha=True), tmp_path / "old.safetensors")
    script("scripts/convert_lora.py", tmp_path / "old.safetensors", tmp_path / "ink.safetensors", "--model", tiny_model)
    options = ["--resize", "--rank", 1, "--model", tiny_model]
    script("scripts/extract_lora.py", tmp_path / "old.safetensors", tmp_path / "small.safetensors", *options)
    for name in ("ink", "small"):
        found = read_metadata(tmp_path / f"{name}.safetensors")
        assert (found["modelspec.title"], found["modelspec.resolution"]) == (name, "1024x1024")


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_adapter_returns_from_any_layout(adapter, denoiser, tmp_path, layout, dtype):
    """Random ranks and alphas in a random part of the modules: ΔW stays the same, to the rounding of the dtype."""
    shapes = layer_shapes(denoiser)
    rng, g = random.Random(f"{layout} {dtype}"), torch.Generator().manual_seed(0)
    for trial in range(3):
        deltas = {}
        for path in rng.sample(list(adapter.deltas), rng.randrange(1, len(adapter.deltas))):
            rank, (out, inner) = rng.randrange(1, 9), shapes[path]
            A, B = torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g)
            deltas[path] = (A, B, rng.choice([0.0, 0.5, 1.0, 3.0, 8.0]))
        (tmp_path / "x.safetensors").write_bytes(serialise(deltas, {}, layout, dtype))
        back = read_lora(tmp_path / "x.safetensors", shapes)
        assert back.keys() == deltas.keys()
        for path, (A, B, alpha) in deltas.items():
            a, b, other = (float(x) if isinstance(x, float) else x.float() for x in back[path])
            wanted, got = alpha / len(A) * B @ A, other / len(a) * b @ a
            assert (got - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm(), (trial, path)
        if layout == "kohya":
            alphas = {(path.split(".")[0], alpha) for path, (*_, alpha) in back.items()}
            assert len(alphas) == len({path.split(".")[0] for path in deltas})  # one alpha per component
        assert largest_difference(back, deltas) <= 16 * torch.finfo(dtype).eps * 6


def test_largest_difference_compares_a_b_alpha_and_modules(adapter):
    deltas = adapter.deltas
    assert largest_difference(deltas, deltas) == 0
    path = list(deltas)[-1]
    A, B, alpha = deltas[path]
    for changed in ((A + 0.25, B, alpha), (A, B - 0.25, alpha)):
        assert largest_difference({**deltas, path: changed}, deltas) == pytest.approx(0.25)
    assert largest_difference({**deltas, path: (A, B, 2 * alpha)}, deltas) == pytest.approx(B.abs().max().item())
    assert largest_difference({p: d for p, d in deltas.items() if p != path}, deltas) == float("inf")


# Damaged and hostile files.


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damages a file in one of many ways."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + body

    def flip(part: bytes) -> bytes:
        at = rng.randrange(len(part))
        return part[:at] + bytes([part[at] ^ 1 << rng.randrange(8)]) + part[at + 1 :]

    numbers = list(re.finditer(rb"\d+", header))
    number = rng.choice(numbers)
    other = str(rng.choice([0, 1, 2**31, 2**63, 10**30, -1, rng.randrange(10**6)])).encode()
    kinds = {
        "cut off": lambda: data[: rng.randrange(len(data))],
        "a bit of the header": lambda: with_header(flip(header)),
        "any bit": lambda: flip(data),
        "a wrong length": lambda: rng.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data)]).to_bytes(8, "little") + data[8:],
        "another number": lambda: with_header(header[: number.start()] + other + header[number.end() :]),
        "another dtype": lambda: with_header(header.replace(b"F16", rng.choice([b"F64", b"I64", b"F8_E4M3", b"U8", b"X1"]), 1)),
        "no text": lambda: with_header(header.replace(b"lora", b"\xff\xfe\x00", rng.randrange(1, 4))),
        "twice the same": lambda: with_header(header.replace(b"lora_up", b"lora_down")),
        "more behind": lambda: data + rng.randbytes(rng.randrange(1, 99)),
        "nesting": lambda: with_header(b"[" * 100_000),
        "no mapping": lambda: with_header(rng.choice([b"[]", b"null", b"{}", b'{"a": 1}', b'{"__metadata__": {"a": 1}}'])),
    }
    return rng.choice(list(kinds.values()))()


def test_two_thousand_damaged_files_give_one_line_or_fitting_shapes(adapter, denoiser, tmp_path):
    few = dict(list(adapter.deltas.items())[:4])
    shapes = {name: shape for name, shape in layer_shapes(denoiser).items() if name in few}
    data, path = serialise(few, {"a": "b"}), tmp_path / "x.safetensors"
    outcomes, lines = {"read": 0, "refused": 0}, []
    for seed in range(2000):
        path.write_bytes(mutate(data, random.Random(seed)))
        try:
            back = read_lora(path, shapes)
        except UserError as error:
            outcomes["refused"] += 1
            lines.append(str(error))
        else:
            assert all(fits(A, B, shapes[name]) for name, (A, B, _) in back.items()), seed
            outcomes["read"] += 1
    assert not [line for line in lines if "\n" in line or len(line) > 1000]
    assert min(outcomes.values()) > 50  # a flipped bit of a weight is still a weight


def test_a_million_keys_are_refused_at_once(denoiser, tmp_path):
    entries = (f'"k{i}":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}' for i in range(10**6))
    header = ("{" + ",".join(entries) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="is no LoRA: its header alone is above 16 MiB"):
        read_lora(tmp_path / "x.safetensors", layer_shapes(denoiser))
