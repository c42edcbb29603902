import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from layouts import make_header
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora import shake

from common.sheets import grid, side_by_side
from lora import add_lora, merge_lora
from lora_files.deltas import layer_shapes
from lora_files.merge import write_pipeline
from lora_files.read import read_lora, read_metadata
from lora_files.write import serialise
from memory import speed_up
from model.checkpoint import checkpoint_of
from model.load import load_sdxl
from model.prompts import Prompt, to_header
from model.render import Renderer
from model.sdxl import Denoiser
from model.vae import decode_latents
from options.training import LoRAConfig
from performance.attention import KERNELS

PROMPTS = ["a cat", "two dogs"]
OPTIONS = ["--steps", 2, "--device", "cpu", "--prompts", *PROMPTS]


@pytest.fixture
def lora(tiny_model, denoiser, tmp_path, monkeypatch):
    """A LoRA file that changes the tiny model visibly. Its header has the base name of the model, which is in this folder."""
    monkeypatch.chdir(tiny_model.parent)
    adapter = add_lora(denoiser, LoRAConfig(rank=4), denoiser.unused)
    shake(adapter)
    config = {"model": str(tiny_model), "rank": 4, "alpha": 4.0, "targets": "attention", "resolution": 64}
    file = tmp_path / "checkpoints/x.safetensors"
    file.parent.mkdir()
    file.write_bytes(serialise(adapter.deltas, make_header(config, images=1, step=1)))
    return file


def pictures(model, prompts=PROMPTS, prepare=lambda denoiser: None) -> list[np.ndarray]:
    pipe = load_sdxl(str(model), torch.float32, torch.device("cpu"))
    denoiser = Denoiser(pipe)
    prepare(denoiser)
    settings = Prompt("", seed=0, steps=2, guidance=5.0, width=64, height=64)
    filled = [Prompt(prompt).filled(i, settings) for i, prompt in enumerate(prompts)]
    speed_up(denoiser, KERNELS["sdpa"])
    images = Renderer(pipe, denoiser, partial(decode_latents, pipe.vae)).draw(filled)
    return [np.asarray(image, int) for image in images]


def test_compare_shows_base_and_merged(script, lora, tiny_model, tmp_path):
    out, _ = script("infer.py", "--compare", "--lora", lora.parent, "--out", tmp_path / "images", *OPTIONS)
    clean = [f"{i}-{name}.png" for i in (1, 2) for name in ("base", "lora")]
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == sorted(["1.png", "2.png", *clean, "compare.png"])
    assert len(re.findall(r"(base|LoRA): [\d.]+ s per image", out)) == 2
    script("infer.py", "--lora", lora, "--out", tmp_path / "merged", *OPTIONS)
    for i, (base, prompt) in enumerate(zip(pictures(tiny_model), PROMPTS, strict=True), 1):
        columns = {"base": Image.fromarray(base.astype(np.uint8)), "LoRA": Image.open(tmp_path / f"merged/{i}.png")}
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"images/{i}.png")), np.asarray(side_by_side(columns, prompt)))
        for name, image in columns.items():
            assert np.array_equal(np.asarray(Image.open(tmp_path / f"images/{i}-{name.lower()}.png")), np.asarray(image))


def test_pictures_of_an_older_call_are_moved(script, lora, tmp_path):
    out, options = tmp_path / "images", ["--lora", lora, "--steps", 1, "--out", tmp_path / "images"]
    out.mkdir()
    (out / "cat.png").touch()  # not by this script
    script("infer.py", *options, "--compare", "--prompts", "a", "b", "c")
    third = (out / "3.png").read_bytes()
    printed, _ = script("infer.py", *options, "--prompts", "a")
    assert f"older pictures are in {out}/older" in printed
    assert sorted(path.name for path in out.iterdir()) == ["1.png", "cat.png", "older"]
    assert sorted(path.name for path in (out / "older").iterdir()) == sorted(
        [f"{i}{name}.png" for i in (1, 2, 3) for name in ("", "-base", "-lora")] + ["compare.png"]
    )
    assert (out / "older/3.png").read_bytes() == third


def test_merged_pictures_equal_patched_pictures(script, lora, tiny_model, tmp_path):
    script("infer.py", "--lora", lora, "--out", tmp_path / "images", *OPTIONS)
    denoiser = Denoiser(load_sdxl(str(tiny_model), torch.float32, torch.device("cpu")))
    weights = read_lora(lora, layer_shapes(denoiser))

    def patch(denoiser):
        adapter = add_lora(denoiser, LoRAConfig(rank=4), denoiser.unused)
        with torch.no_grad():
            for name, module in adapter.modules.items():
                module.lora_A.copy_(weights[name][0])
                module.lora_B.copy_(weights[name][1])

    for i, (patched, base) in enumerate(zip(pictures(tiny_model, prepare=patch), pictures(tiny_model), strict=True), 1):
        merged = np.asarray(Image.open(tmp_path / f"images/{i}.png"), int)
        assert np.abs(merged - patched).max() <= 1
        assert np.abs(merged - base).mean() > 1


def test_scale_zero_is_the_base_and_seeds_are_per_picture(script, lora, tiny_model, tmp_path):
    script("infer.py", "--lora", lora, "--scale", 0, "--out", tmp_path / "zero", *OPTIONS)
    for i, base in enumerate(pictures(tiny_model), 1):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"zero/{i}.png"), int), base)
    script("infer.py", "--lora", lora, "--out", tmp_path / "all", *OPTIONS)
    script("infer.py", "--lora", lora, "--seed", 1, "--out", tmp_path / "one", *OPTIONS[:-3], "--prompts", "two dogs")
    assert (tmp_path / "one/1.png").read_bytes() == (tmp_path / "all/2.png").read_bytes()


def test_save_merged_is_an_ordinary_folder(script, lora, tmp_path):
    merged = tmp_path / "merged"
    script("infer.py", "--lora", lora, "--save-merged", merged, "--out", tmp_path / "images", *OPTIONS)
    _, err = script("infer.py", "--lora", lora, "--save-merged", merged, "--out", tmp_path / "images", *OPTIONS, status=2)
    assert "is there already and not an empty folder" in err
    for i, picture in enumerate(pictures(merged), 1):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"images/{i}.png"), int), picture)


def test_a_merged_folder_has_the_names_of_the_hub_and_one_file_for_each_part(script, lora, tiny_model, tmp_path):
    """Also of a base whose text encoder 1 has the names that transformers 5 gives it when it comes from one file."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    text = base / "text_encoder/model.safetensors"
    save_file({name.removeprefix("text_model."): t for name, t in load_file(text).items()}, text, {"format": "pt"})
    merged = tmp_path / "merged"
    script("infer.py", "--lora", lora, "--model", base, "--save-merged", merged, "--out", tmp_path / "images", *OPTIONS)
    for part, prefix in (("text_encoder", "text_model."), ("text_encoder_2", "text_"), ("unet", "")):
        (file,) = (merged / part).glob("*.safetensors")
        assert all(name.startswith(prefix) for name in load_file(file))
        source = json.loads(read_metadata(file).get("sdxl_lora.merged", "[]"))
        assert part != "text_encoder" or source == [{"file": lora.name, "strength": 1.0}]
    assert not [file for file in merged.rglob("*.json") if str(tmp_path) in file.read_text()]
    demo = load_file(ROOT / "assets/demo/model/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in demo)


def test_a_merged_checkpoint_is_read_by_diffusers_whole(script, lora, tiny_model, tmp_path):
    """The same tensors as those of the merged folder, under Stability's names; it names what it predicts."""
    folder, file = tmp_path / "merged", tmp_path / "merged.safetensors"
    script("infer.py", "--lora", lora, "--save-merged", folder, "--out", tmp_path / "images", *OPTIONS)
    script("infer.py", "--lora", lora, "--save-merged", file, "--out", tmp_path / "images", *OPTIONS)
    pipe = load_sdxl(str(folder), torch.float32, torch.device("cpu"))
    wanted, found = checkpoint_of(pipe), load_file(file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    _, err = script("infer.py", "--lora", lora, "--save-merged", file, "--out", tmp_path / "images", *OPTIONS, status=2)
    assert "is there already" in err
    assert {path.name for path in tmp_path.iterdir()} >= {"merged", "merged.safetensors"}
    assert not list(tmp_path.glob(".merged*"))
    v = shutil.copytree(tiny_model, tmp_path / "v")
    scheduler = v / "scheduler/scheduler_config.json"
    fields = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | fields))
    options = ["--model", v, "--save-merged", tmp_path / "v.safetensors", "--sampler", "euler", *OPTIONS]
    script("infer.py", "--lora", lora, "--out", tmp_path / "images", *options)
    assert load_file(tmp_path / "v.safetensors").keys() - wanted.keys() == {"v_pred", "ztsnr"}
    assert read_metadata(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"


def test_a_model_with_fast_layers_is_written_like_any_other(pipe, tmp_path):
    """Its weights may be views of one stack, and on CUDA those of convolutions are in channels_last."""
    for folder in ("plain", "fast"):
        for name in ("model.safetensors", "model"):
            if folder == "fast":
                pipe.unet.to(memory_format=torch.channels_last)
            write_pipeline(pipe, tmp_path / folder / name, [])
        speed_up(Denoiser(pipe), KERNELS["sdpa"])
    files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert len(files) == 5
    for file in files:
        plain, fast = (load_file(tmp_path / folder / file) for folder in ("plain", "fast"))
        assert plain.keys() == fast.keys()
        assert all(torch.equal(plain[name], fast[name]) for name in plain)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler", "euler-a", "unipc"])
def test_samplers(script, lora, tmp_path, sampler):
    script(
        "infer.py",
        "--lora",
        lora,
        "--sampler",
        sampler,
        "--out",
        tmp_path / "i",
        "--steps",
        3,
        "--prompts",
        "a",
        "--guidance",
        1,
    )
    assert np.asarray(Image.open(tmp_path / "i/1.png")).std() > 1


def test_guidance_rescale_and_prediction_type_change_the_picture(script, lora, tmp_path):
    """A picture says its rescale; what a line says comes before the flag."""
    options = ["--lora", lora, "--steps", 2, "--prompts"]
    script("infer.py", *options, "a", "a --rescale 0", "--guidance-rescale", 0.7, "--out", tmp_path / "rescaled")
    script("infer.py", *options, "a", "--out", tmp_path / "plain")
    out, _ = script("infer.py", *options, "a", "--prediction-type", "v_prediction", "--out", tmp_path / "v")
    assert "predicts v, " in out
    files = ("plain/1.png", "rescaled/1.png", "v/1.png")
    assert len({(tmp_path / name).read_bytes() for name in files}) == 3
    texts = [Image.open(tmp_path / f"rescaled/{n}.png").info["parameters"] for n in (1, 2)]
    assert [("CFG Rescale: 0.7" in text) for text in texts] == [True, False]


def test_prompts_from_a_file_and_negative_prompt(script, lora, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\ntwo dogs\n")
    options = ["--lora", lora, "--steps", 2, "--prompts", tmp_path / "prompts.txt"]
    script("infer.py", *options, "--out", tmp_path / "plain")
    script("infer.py", *options, "--out", tmp_path / "negative", "--negative", "blurry")
    assert len(list((tmp_path / "plain").iterdir())) == 2
    assert (tmp_path / "plain/1.png").read_bytes() != (tmp_path / "negative/1.png").read_bytes()


def test_a_prompt_of_any_length_is_used_in_full(script, lora, tiny_model, tmp_path):
    """The oracle: two chunks encoded one by one, for the negative prompt an empty second one, in diffusers' own pipeline."""
    halves = "a " * 75, "b " * 20
    options = ["--lora", lora, "--scale", 0, "--steps", 2, "--device", "cpu", "--prompts", "".join(halves), "--negative", "c"]
    script("infer.py", *options, "--out", tmp_path / "images")
    ours = np.asarray(Image.open(tmp_path / "images/1.png"), int)
    pipe = load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))
    encode = partial(pipe.encode_prompt, device="cpu", do_classifier_free_guidance=False)
    (one, _, pooled, _), (two, *_), (against, _, pooled_against, _), (nothing, *_) = map(encode, (*halves, "c", ""))
    embeds = {"prompt_embeds": torch.cat([one, two], dim=1), "pooled_prompt_embeds": pooled}
    embeds |= {"negative_prompt_embeds": torch.cat([against, nothing], dim=1), "negative_pooled_prompt_embeds": pooled_against}
    settings = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(0)}
    assert np.abs(ours - np.asarray(pipe(**embeds, **settings).images[0], int)).max() <= 1
    assert np.abs(ours - pictures(tiny_model, [halves[0]])[0]).max() > 1


def merged(tiny_model, *parts) -> list[np.ndarray]:
    """Pictures of the model with each (file, strength, components) merged."""

    def prepare(denoiser):
        for file, strength, components in parts:
            deltas = read_lora(file, layer_shapes(denoiser))
            merge_lora(denoiser, {n: d for n, d in deltas.items() if n.split(".")[0] in components}, strength)

    return pictures(tiny_model, prepare=prepare)


ALL = ("unet", "text_encoder", "text_encoder_2")


def test_several_with_strengths_and_parts(script, lora, tiny_model, tmp_path):
    other = lora.with_name("other.safetensors")
    halved = {key: t / 2 if key.endswith("lora_down.weight") else -t for key, t in load_file(lora).items()}
    save_file({key: t if t.ndim else -t for key, t in halved.items()}, other, read_metadata(lora))
    options = ["--out", tmp_path / "images", "--model", tiny_model, *OPTIONS]
    out, _ = script("infer.py", "--lora", f"{lora}:0.8", "--lora", f"{other}:-0.3", *options)
    assert f"LoRA {lora}: " in out
    assert "strength 0.8" in out
    for i, wanted in enumerate(merged(tiny_model, (lora, 0.8, ALL), (other, -0.3, ALL)), 1):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"images/{i}.png"), int), wanted)
    script("infer.py", "--lora", lora, "--lora-parts", "te2,unet", *options)
    for i, wanted in enumerate(merged(tiny_model, (lora, 1.0, ("unet", "text_encoder_2"))), 1):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"images/{i}.png"), int), wanted)
    assert not np.array_equal(wanted, merged(tiny_model, (lora, 1.0, ALL))[1])


def test_a_sweep_has_a_column_for_every_scale(script, lora, tiny_model, tmp_path):
    script("infer.py", "--compare", "--lora", lora, "--out", tmp_path / "images", *OPTIONS, "--scale", 1, 0.25)
    columns = {"base": pictures(tiny_model)}
    columns |= {f"LoRA × {scale:g}": merged(tiny_model, (lora, scale, ALL)) for scale in (1, 0.25)}
    for i, prompt in enumerate(PROMPTS):
        row = {name: Image.fromarray(column[i].astype(np.uint8)) for name, column in columns.items()}
        sheet = np.asarray(Image.open(tmp_path / f"images/{i + 1}.png"))
        assert np.array_equal(sheet, np.asarray(side_by_side(row, prompt)))
    assert (tmp_path / "images/compare.png").exists()


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path), int)


def test_a_grid_has_a_picture_for_every_two_values(script, lora, tmp_path):
    """Each equals the picture that the same values give by themselves; the base, in the first row, is drawn once a seed."""
    options = ["--lora", lora, "--device", "cpu", "--guidance", 2, "--prompts"]
    line, values = "a cat --s 2 --d {} --am {} --h 96", ["--seed", 3, 4, "--scale", 0.5, 1, "--steps", 9]
    command = ["infer.py", *options, line.format(8, 3), *values, "--compare", "--grid", "seed", "scale"]
    out, _ = script(*command, "--out", tmp_path / "grid")
    assert len(re.findall("s per image", out)) == 3
    names = [f"grid-{row}-{column}.png" for row in (1, 2, 3) for column in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == sorted([*names, "grid.png"])
    lines = [line.format(seed, scale) for scale in (0, 0.5, 1) for seed in (3, 4)]
    script("infer.py", *options, *lines, "--out", tmp_path / "alone")
    for i, (name, tag) in enumerate(zip(names, ("", "", *[" <lora:x:0.5>"] * 2, *[" <lora:x:1>"] * 2), strict=True), 1):
        found = Image.open(tmp_path / "grid" / name)
        assert found.size == (64, 96)
        assert np.array_equal(np.asarray(found, int), pixels_of(tmp_path / f"alone/{i}.png"))
        text = f"a cat{tag}\nSteps: 2, Sampler: Euler, CFG scale: 2, Seed: {4 - i % 2}, Size: 64x96, Model: "
        assert found.info["parameters"].startswith(text)
    digest = read_metadata(lora)["sshs_model_hash"][:12]
    assert found.info["parameters"].endswith(f', Lora hashes: "x: {digest}"')


def test_a_grid_of_files_and_prompts(script, lora, tiny_model, tmp_path):
    other = tmp_path / "other/x.safetensors"
    other.parent.mkdir()
    save_file({key: -t if key.endswith("up.weight") else t for key, t in load_file(lora).items()}, other, read_metadata(lora))
    options = ["--lora", f"{lora}:0.8", "--lora", other, "--grid", "lora", "prompt", "--compare", *OPTIONS]
    script("infer.py", *options, "--out", tmp_path / "grid")
    wanted = [pictures(tiny_model), merged(tiny_model, (lora, 0.8, ALL)), merged(tiny_model, (other, 1, ALL))]
    for column, of_file in enumerate(wanted, 1):
        for row, image in enumerate(of_file, 1):
            assert np.array_equal(pixels_of(tmp_path / f"grid/grid-{row}-{column}.png"), image)
    columns = ["base", "checkpoints/x × 0.8", "other/x"]
    shown = [[Image.fromarray(of_file[row].astype(np.uint8)) for of_file in wanted] for row in (0, 1)]
    assert np.array_equal(pixels_of(tmp_path / "grid/grid.png"), np.asarray(grid(shown, columns, PROMPTS, "")))


def test_without_prompts_it_draws_those_of_the_header(script, lora, tiny_model, tmp_path):
    header = read_metadata(lora) | to_header([Prompt("a cat"), Prompt("two dogs", seed=5, height=96, strength=0.5)])
    save_file(load_file(lora), lora, header)
    options = ["--lora", lora, "--steps", 2, "--device", "cpu"]
    script("infer.py", *options, "--out", tmp_path / "header")
    script("infer.py", *options, "--out", tmp_path / "lines", "--prompts", "a cat", "two dogs --d 5 --h 96 --am 0.5")
    for name in ("1.png", "2.png"):
        assert (tmp_path / "header" / name).read_bytes() == (tmp_path / "lines" / name).read_bytes()
    script("infer.py", *options, "--size", "96x64", "--out", tmp_path / "wide", "--compare", "--save-merged", tmp_path / "m")
    assert [Image.open(tmp_path / f"wide/{i}-lora.png").size for i in (1, 2)] == [(96, 64), (96, 96)]
    assert "<lora:x:0.5>" in Image.open(tmp_path / "wide/2.png").info["parameters"]
    assert np.array_equal(pictures(tmp_path / "m")[0], merged(tiny_model, (lora, 1, ALL))[0])  # not at the strength of a prompt


@pytest.mark.parametrize("broken", ["latents", "pixels"])
def test_a_picture_that_is_not_finite_is_no_black_one(script, lora, tmp_path, monkeypatch, broken):
    embeds = {f"{name}prompt_embeds": torch.full((1, 77, 80), torch.nan) for name in ("", "negative_")}
    embeds |= {f"{name}pooled_prompt_embeds": torch.zeros(1, 48) for name in ("", "negative_")}
    if broken == "pixels":
        monkeypatch.setattr("model.vae.decode_latents", lambda vae, latents: torch.full((1, 3, 64, 64), torch.nan))
    else:
        monkeypatch.setattr("model.sdxl.Denoiser.describe", lambda *_: embeds)
    _, err = script("infer.py", "--lora", lora, "--out", tmp_path / "images", *OPTIONS, status=2)
    assert "infer.py: picture 1, 'a cat', has values that are not finite" in err
    assert not list((tmp_path / "images").iterdir())


def test_mistakes(script, lora, tmp_path):
    def refused(message: str, *options):
        out = tmp_path / "images"
        _, err = script("infer.py", "--out", out, *options, status=2)
        assert err.startswith("infer.py: ")
        assert err.count("\n") == 1
        assert message in err
        assert not out.exists() or not any(out.iterdir())

    refused("no .safetensors file there", "--lora", tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    refused("not a readable .safetensors file", "--lora", tmp_path / "bad.safetensors")
    tensors = load_file(lora)
    save_file(tensors, tmp_path / "anonymous.safetensors")
    refused("add --model", "--lora", tmp_path / "anonymous.safetensors")
    metadata = read_metadata(lora)
    other = {key.replace("lora_unet_", "lora_unet_other_"): tensor for key, tensor in tensors.items()}
    save_file(other, tmp_path / "other.safetensors", metadata)
    refused("first lora_unet_other_", "--lora", tmp_path / "other.safetensors")
    wide = {key: torch.ones(4, 999) if key.endswith("lora_down.weight") else tensor for key, tensor in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors", metadata)
    refused("does not fit the model", "--lora", tmp_path / "wide.safetensors")
    tall = {key: torch.ones(len(t), 8) if key.endswith("lora_up.weight") else t for key, t in tensors.items()}
    save_file(tall, tmp_path / "tall.safetensors", metadata)
    refused("does not fit the model", "--lora", tmp_path / "tall.safetensors")
    refused("README.md is there already", "--lora", lora, "--save-merged", ROOT / "README.md")
    (tmp_path / "empty.txt").touch()
    refused("empty.txt is empty", "--lora", lora, "--prompts", tmp_path / "empty.txt")
    refused("--model /nowhere", "--lora", lora, "--model", "/nowhere")
    nan = load_file(lora)
    nan[next(iter(nan))].view(-1)[-1] = float("nan")
    save_file(nan, tmp_path / "nan.safetensors", metadata)
    refused("is not finite (1 of ", "--lora", tmp_path / "nan.safetensors", "--model", "/nowhere")  # before the model is loaded
    for number in ("nan", "inf", "1e999"):
        refused(f"--lora {lora}:{number}: the strength {number} is not a finite number", "--lora", f"{lora}:{number}")
        refused("--scale must be a finite number", "--lora", lora, "--scale", 1, number)
        refused("--guidance must be at least 0", "--lora", lora, "--guidance", number)
    refused("with the LoRA merged is not finite in float32", "--lora", lora, "--scale", 1e300)
    refused("--steps", "--lora", lora, "--steps", 0)
    refused("--steps must lie in 1…1000, not 0", "--lora", lora, "--steps", 4, 0, "--grid", "steps", "scale")
    refused("--steps must lie in 1…1000, not 1001", "--lora", lora, "--steps", 1001)
    refused("--scale has a value twice", "--lora", lora, "--scale", 1, 0.5, 1)
    refused(r"--negative \xff: holds a control character, or is no UTF-8", "--lora", lora, "--negative", "\udcff")
    refused("--seed has several values: give one, or name seed in --grid", "--lora", lora, "--seed", 1, 2)
    refused("--grid scale scale: name two different ones", "--lora", lora, "--grid", "scale", "scale")
    refused("--compare needs lora or scale in --grid", "--lora", lora, "--grid", "seed", "prompt", "--compare")
    refused("--prompts has 2 texts: give one", "--lora", lora, "--grid", "seed", "scale", "--prompts", "a", "b")
    refused("--size 65x64: width must be a multiple of 8", "--lora", lora, "--size", "65x64")
    refused("--prompts text 2: --ar is no option", "--lora", lora, "--prompts", "a", "b --ar 2")
    refused("--lora-parts te3: choose from unet,te1,te2", "--lora", lora, "--lora-parts", "unet,te3")
    refused("give one --scale", "--lora", lora, "--scale", 1, 2, "--save-merged", tmp_path / "m")
    refused("--device cuda:77", "--lora", lora, "--device", "cuda:77")
    refused("README.md/x cannot be written", "--lora", lora, "--out", ROOT / "README.md/x")
    refused("README.md cannot be written", "--lora", lora, "--save-merged", ROOT / "README.md/x")
