import base64
import hashlib
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pyarrow
import pytest
import torch
from conftest import ROOT, photograph
from layouts import make_header
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from test_lora import shake
from torch import nn

from common.options import flat_options
from data import Stream
from dataset.buckets import bucket_sizes
from dataset.images import dhash
from dataset.sources import open_source
from lora import add_lora, merge_lora
from lora_files.deltas import layer_shapes
from lora_files.read import read_lora, read_metadata
from lora_files.write import A1111_HEADER, serialise
from model.checkpoint import checkpoint_of
from model.load import load_sdxl
from options.training import CaptionConfig, DataConfig, LoRAConfig, TrainConfig


def members(tar) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file}


def test_shards_hold_the_pictures_byte_for_byte(photos, shards):
    assert sorted(p.name for p in shards.glob("[!.]*")) == ["index.jsonl", *(f"photos-00000{i}.tar" for i in range(3))]
    first = members(shards / "photos-000000.tar")
    assert sorted(first) == sorted(f"000000{i}.{kind}" for i in range(3) for kind in ("jpg", "json", "txt"))
    assert first["0000002.jpg"] == (photos / "photo2.jpg").read_bytes()
    assert first["0000002.txt"] == b"picture number 2"
    fields = json.loads(first["0000002.json"])
    digest, image_hash = hashlib.sha256(first["0000002.jpg"]).hexdigest(), dhash(Image.open(photos / "photo2.jpg"))
    assert fields == {"width": 140, "height": 160, "source": "photo2.jpg", "sha256": digest, "dhash": image_hash}
    assert open_source(str(shards)).samples == 7


def test_unusable_pictures_are_refused_by_name(script, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo1.jpg").write_bytes((folder / "photo1.jpg").read_bytes()[:500])
    (folder / "photo2.txt").unlink()
    out, _ = script("scripts/make_shards.py", folder, "--out", tmp_path / "out")
    assert "5 images in 1 shards" in out
    assert "refused 2" in out
    assert "photo1.jpg (cannot be decoded" in out
    assert "photo2.jpg (no caption)" in out
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["index.jsonl", "shard-000000.tar"]


def test_parquet_of_the_naruto_layout(script, tmp_path):
    rows, encoded = [], []
    for i, kind in enumerate(("PNG", "JPEG", "BMP")):
        buffer = io.BytesIO()
        photograph(i, 60, 50).save(buffer, kind)
        encoded.append(buffer.getvalue())
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "text": f"row {i}"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    script("scripts/make_shards.py", tmp_path / "train.parquet", "--out", tmp_path / "out", "--name", "naruto")
    packed = members(tmp_path / "out/naruto-000000.tar")
    assert packed["0000000.png"] == encoded[0]
    assert packed["0000001.jpg"] == encoded[1]
    assert Image.open(io.BytesIO(packed["0000002.jpg"])).format == "JPEG"
    assert json.loads(packed["0000000.json"])["source"] == "train.parquet:0"
    assert open_source(str(tmp_path / "out")).samples == 3


def test_make_shards_mistakes(script, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"rubbish")
    for source, message in (
        ("/nowhere", "does not exist here, and is no id of the hub"),
        (tmp_path / "x.parquet", "no readable parquet file"),
        ("tests", "no usable image"),
    ):
        _, err = script("scripts/make_shards.py", source, "--out", tmp_path / "out", status=2)
        assert err.strip().splitlines()[-1].startswith("make_shards.py: ")
        assert message in err


def test_bench_needs_a_gpu(script):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: bench.py would run for minutes")
    _, err = script("scripts/dev/bench.py", status=2)
    assert err == "bench.py: nothing to measure here: a GPU with CUDA is needed\n"
    _, err = script("scripts/dev/bench.py", "--rows", "recipe", "nonsense", status=2)
    assert err.startswith("bench.py: --rows nonsense: choose from recipe")


def test_bench_compares_pictures_with_those_of_diffusers(script, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: bench.py would write a model of 7 GB")
    script("scripts/dev/bench.py", "--pictures", "--steps", 1, "--side", 64, "--out", tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["program"], row["count"]) for row in result["programs"]] == [
        ("diffusers", 1), ("diffusers", 4), ("ours", 1), ("ours", 4)
    ]  # fmt: skip
    assert all(row["seconds_per_picture"] > 0 for row in result["programs"])
    assert all(levels["max"] <= 1 for levels in result["grey levels from diffusers"].values())
    decoding = result["grey levels of bfloat16 from float32, the demo's VAE"]
    assert 0 < decoding["mean"] < decoding["99.9 %"] <= decoding["max"] < 32


def test_bench_data_measures_every_job(script, monkeypatch):
    out, _ = script("scripts/dev/bench_data.py", "--rounds", 1, "--photos", 3, "--latents", 30, "--drawn", 400, "--sizes", 2000)
    rates = re.findall(r"^ +([\d.]+) a second   (.+)$", out, re.M)
    assert len(rates) == 5
    assert all(float(rate) > 0 for rate, _ in rates)
    assert re.search(r"peak memory, latents: \d+ MiB after 100, \d+ MiB after 200, \d+ MiB after 400$", out, re.M)
    assert re.findall(r"^(first time|again) +2,000(?: +[\d.]+, \d+){5}$", out, re.M) == ["first time", "again"]


def test_the_contact_sheet_shows_what_training_sees(script, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo0.txt").write_text("a, " * 60)
    (folder / "photo1.txt").unlink()
    options = [folder, "--resolution", 64, "--bucket-step", 16, "--bs", 2, "--trigger", "b, "]
    out, _ = script("scripts/show_data.py", *options, "--images", 8, "--out", tmp_path / "sheet.png")
    rows = re.findall(r"^ +(\d+) × (\d+) +(\d+) +[\d.]+ % +[\d.]+ % +0$", out, re.M)
    assert sum(int(images) for *_, images in rows) == 6
    assert {(int(h), int(w)) for w, h, _ in rows} <= set(bucket_sizes(64, 16))
    assert "6 captions of 6 images" in out
    assert "1 are cut after 75 tokens and lose 47 on average, 47 at most" in out  # 2 of the prefix and 120
    assert "1 images have no caption and are left out: " in out
    assert "\n  a .txt beside each, or --caption 'my style' for all of them, lets training use them\n" in out
    longer, _ = script("scripts/show_data.py", *options, "--max-tokens", 150, "--images", 8, "--out", tmp_path / "sheet.png")
    assert "6 captions of 6 images" in longer
    assert "cut after" not in longer
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    stream = Stream(open_source(str(folder)), DataConfig(bs=2, bucket_step=16), CaptionConfig(), 64, 0)
    first = next(iter(stream)).images[0].numpy()
    y, width = 6 + (256 - len(first)) // 2, first.shape[1]
    matches = [x for x in range(268 - width) if np.array_equal(sheet[y, x : x + width], first[0])]
    assert matches == [(268 - width) // 2]
    (folder / "photo2.jpg").write_bytes(b"no picture")
    out, _ = script("scripts/show_data.py", *options, "--images", 40, "--out", tmp_path / "sheet.png")
    assert re.search(r"^1 of these cannot be decoded: .*photo2\.jpg$", out, re.M)
    _, err = script("scripts/show_data.py", "--images", 0, status=2)
    assert err == "show_data.py: --images must be at least 1, not 0\n"


def test_the_contact_sheet_shows_each_picture_once(script, tmp_path):
    """A bucket of one picture fills its batches with repetitions."""
    for i, size in enumerate([(64, 64)] * 5 + [(96, 48), (48, 96)]):
        Image.new("RGB", size, (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    flags = ["--resolution", 64, "--caption", "a", "--bs", 3, "--out", tmp_path / "sheet.png"]
    script("scripts/show_data.py", tmp_path, *flags)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), int)
    colours, counts = np.unique(pixels[(pixels[..., 1] == 0) & (pixels[..., 2] == 0), 0], return_counts=True)
    found = {c: n for c, n in zip(colours.tolist(), counts.tolist(), strict=True) if n > 1000}
    assert set(found) >= {10 * i for i in range(1, 7)}
    assert all(n < 1.5 * 64 * 64 for c, n in found.items() if c)


@pytest.mark.parametrize(
    ("name", "arguments"), [("show_data", ["a"]), ("evaluate", []), ("make_shards", ["--out", "o"]), ("cache_latents", [])]
)
@pytest.mark.parametrize("flag", [["--data", "photos/"], ["--data=photos/"]])
def test_the_data_of_a_script_has_no_flag(script, name, arguments, flag):
    _, err = script(f"scripts/{name}.py", *arguments, *flag, status=2)
    assert err == f"{name}.py: --data: here the folder stands without a flag\n"


def test_several_folders_are_shown(script, photos, cutouts, tmp_path):
    flags = ["--resolution", 64, "--out", tmp_path / "x.png", "--caption", "nrt"]
    shutil.copy(photos / "photo1.jpg", tmp_path / "alone.jpg")
    out, _ = script("scripts/show_data.py", photos, f"{cutouts}:x2", tmp_path, *flags)
    assert "12 captions of 12 images" in out
    assert "1 pictures without a text get a caption, such as 'nrt'" in out


def test_the_contact_sheet_fades_what_a_mask_hides(script, cutouts, tmp_path):
    options = [cutouts, "--resolution", 128, "--no-buckets", "--bs", 1, "--images", 1]
    script("scripts/show_data.py", *options, "--out", tmp_path / "sheet.png", "--masked-loss")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), int)
    config = DataConfig(bs=1, buckets=False, masked_loss=True)
    batch = next(iter(Stream(open_source(str(cutouts)), config, CaptionConfig(), 128, 0)))
    shown = sheet[70 : 70 + 128, 70 : 70 + 128]
    pixels, visible = batch.images[0].numpy().astype(int), (batch.mask[0, 0] == 1).numpy().repeat(8, 0).repeat(8, 1)
    assert 0.2 < visible.mean() < 0.8
    assert np.array_equal(shown[visible], pixels[visible])
    hidden = (batch.mask[0, 0] == 0).numpy().repeat(8, 0).repeat(8, 1)
    assert np.abs(shown[hidden] - 160).mean() < 0.3 * np.abs(pixels[hidden] - 160).mean()


def test_converting_keeps_the_weights(script, denoiser, tiny_model, tmp_path):
    adapter = add_lora(denoiser, LoRAConfig(rank=3, alpha=2, targets="all"), denoiser.unused)
    shake(adapter)
    kohya, diffusers, back = (tmp_path / f"{name}.safetensors" for name in ("kohya", "diffusers", "back"))
    config = {"model": "demo", "rank": 3, "alpha": 2.0, "targets": "all", "resolution": 64}
    kohya.write_bytes(serialise(adapter.deltas, make_header(config, images=7, step=5), dtype=torch.float32))
    options = ["--model", tiny_model, "--save-dtype", "fp32"]
    out, _ = script("scripts/convert_lora.py", kohya, diffusers, "--format", "diffusers", *options)
    assert "in the diffusers layout, largest difference 0" in out
    script("scripts/convert_lora.py", diffusers, back, *options)
    data_start = [8 + int.from_bytes(file.read_bytes()[:8], "little") for file in (back, kohya)]
    assert back.read_bytes()[data_start[0] :] == kohya.read_bytes()[data_start[1] :]
    assert read_metadata(back) == read_metadata(kohya)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(diffusers), bare)  # as from a tool that adds no metadata
    script("scripts/convert_lora.py", bare, tmp_path / "listed.safetensors", *options)
    assert read_metadata(tmp_path / "listed.safetensors").items() >= A1111_HEADER.items()
    large = {name: (A * 1e6, B, alpha) for name, (A, B, alpha) in adapter.deltas.items()}
    bare.write_bytes(serialise(large, {}, dtype=torch.float32))
    _, err = script("scripts/convert_lora.py", bare, tmp_path / "x.safetensors", "--model", tiny_model, status=2)
    assert "is not finite in float16, so no file was written" in err
    _, err = script("scripts/convert_lora.py", kohya, back, *options, status=2)
    assert err == f"convert_lora.py: {back} is there already: remove it or choose another name\n"
    _, err = script("scripts/convert_lora.py", kohya, tmp_path / "x.safetensors", status=2)  # without --model: the real SDXL
    assert "does not fit the model: it is for another model, whose text has 80 channels, not 2048" in err
    assert not (tmp_path / "x.safetensors").exists()


# merge_lora.py.


@pytest.fixture
def two_loras(denoiser, tmp_path):
    """Two LoRA files for the tiny model, one with every kind of linear layer and a convolution, one with some of them."""
    adapter = add_lora(denoiser, LoRAConfig(rank=3, alpha=2, targets="all"), denoiser.unused)
    shake(adapter)
    deltas = {name: (A.clone(), B.clone(), alpha) for name, (A, B, alpha) in adapter.deltas.items()}
    conv = denoiser.unet.down_blocks[0].resnets[0].conv1.weight
    deltas["unet.down_blocks.0.resnets.0.conv1"] = (torch.randn(3, *conv.shape[1:]), torch.randn(len(conv), 3, 1, 1), 2.0)
    projection = denoiser.text_encoder_2.text_projection.weight
    deltas["text_encoder_2.text_projection"] = (torch.randn(3, projection.shape[1]), torch.randn(len(projection), 3), 2.0)
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    files[0].write_bytes(serialise(deltas, {}, "kohya", torch.float32))
    some = {name: delta for name, delta in deltas.items() if "to_q" in name or "fc1" in name}
    files[1].write_bytes(serialise(some, {}, "diffusers", torch.float32))
    return files


def parts_of(pipe) -> nn.ModuleDict:
    return nn.ModuleDict({name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")})


def merged_in_memory(model, files) -> nn.ModuleDict:
    holder = parts_of(load_sdxl(str(model), torch.float32, torch.device("cpu")))
    for file, strength in zip(files, (0.8, -0.5), strict=True):
        merge_lora(holder, read_lora(file, layer_shapes(holder)), strength)
    return holder


def test_merging_into_a_folder_is_merging_in_memory(script, two_loras, tiny_model, tmp_path):
    a, b = two_loras
    script("scripts/merge_lora.py", tiny_model, tmp_path / "merged", "--lora", f"{a}:0.8", "--lora", f"{b}:-0.5")
    expected = merged_in_memory(tiny_model, two_loras).state_dict()
    merged = parts_of(load_sdxl(str(tmp_path / "merged"), torch.float32, torch.device("cpu"))).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())
    for file in tiny_model.rglob("*"):
        if file.is_file() and not re.search(r"(unet|text_encoder\w*)/.*safetensors", str(file)):
            assert (tmp_path / "merged" / file.relative_to(tiny_model)).read_bytes() == file.read_bytes()
    sources = json.loads(read_metadata(next((tmp_path / "merged/unet").glob("*.safetensors")))["sdxl_lora.merged"])
    assert [(source["file"], source["strength"]) for source in sources] == [("a.safetensors", 0.8), ("b.safetensors", -0.5)]


def test_merging_into_one_checkpoint_file(script, two_loras, tiny_model, tmp_path):
    a, b = two_loras
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    rounded = load_sdxl(str(tiny_model), torch.float32, torch.device("cpu")).to(torch.float16).to(torch.float32)
    rounded.save_pretrained(tmp_path / "rounded")  # the weights that the float16 file below holds
    save_file({key: t.half() for key, t in checkpoint_of(rounded).items()}, base, {"by": "somebody"})
    script("scripts/merge_lora.py", base, merged, "--lora", f"{a}:0.8", "--lora", f"{b}:-0.5")
    tensors, before = load_file(merged), load_file(base)
    assert tensors.keys() == before.keys()
    assert all(tensors[key].dtype == torch.float16 for key in tensors)
    assert read_metadata(merged)["by"] == "somebody"
    in_memory = checkpoint_of(merged_in_memory(tmp_path / "rounded", two_loras))
    expected = {key: tensor.half() for key, tensor in in_memory.items()}
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())  # both LoRA in float32, rounded once
    touched = {key for key, tensor in expected.items() if not torch.equal(tensor, before[key])}
    assert {key for key in tensors if not torch.equal(tensors[key], before[key])} == touched
    for part in ("in_proj_weight", "model.text_projection", "input_blocks.1.0.in_layers.2.weight"):
        assert any(part in key for key in touched)


def test_merge_mistakes(script, two_loras, tiny_model, tmp_path):
    def check(message: str, *options):
        _, err = script("scripts/merge_lora.py", *options, status=2)
        assert err.count("\n") == 1
        assert message in err
        assert not list(tmp_path.glob("m*"))

    check("--lora is missing", tiny_model, tmp_path / "m")
    check("must be a folder as", tiny_model, tmp_path / "m.safetensors", "--lora", two_loras[0])
    check("must be a file, x.safetensors, as", two_loras[0], tmp_path / "m", "--lora", two_loras[0])
    check("holds no layer of SDXL", two_loras[0], tmp_path / "m.safetensors", "--lora", two_loras[0])
    check("is neither a file nor a diffusers folder", ROOT / "scripts", tmp_path / "m", "--lora", two_loras[0])
    check("is there already", tiny_model, two_loras[1], "--lora", two_loras[0])
    check("is inside of", tiny_model, tiny_model / "unet/merged", "--lora", two_loras[0])
    (tmp_path / "empty/unet").mkdir(parents=True)
    (tmp_path / "empty/model_index.json").touch()
    check("has no .safetensors file in text_encoder, text_encoder_2, unet", tmp_path / "empty", tmp_path / "m",
            "--lora", two_loras[0])  # fmt: skip
    fp8 = {key: t.to(torch.float8_e4m3fn) for key, t in load_file(next((tiny_model / "unet").glob("*.safetensors"))).items()}
    shutil.copytree(tiny_model, tmp_path / "fp8")
    save_file(fp8, next((tmp_path / "fp8/unet").glob("*.safetensors")))
    check("is F8_E4M3, which cannot be computed with", tmp_path / "fp8", tmp_path / "m", "--lora", two_loras[0])
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    check("bad.safetensors is not a readable", tmp_path / "bad.safetensors", tmp_path / "m.safetensors", "--lora", two_loras[0])
    check("bad.safetensors is not a readable", tiny_model, tmp_path / "m", "--lora", tmp_path / "bad.safetensors")
    check("does not fit the model", ROOT / "assets/demo/model", tmp_path / "m", "--lora", two_loras[0])


def test_a_lora_of_other_data_is_not_measured_on_the_demos(train, script, photos, tiny_model, tmp_path):
    train("--data", photos, "--steps", 1)
    _, err = script("scripts/evaluate.py", "--lora", tmp_path / "out", status=2)
    assert "was not trained on the demo's images: name a folder of yours that training has not seen" in err
    options = [photos, "--lora", tmp_path / "out", "--model", tiny_model, "--device", "cpu"]
    options += ["--timesteps", 1, "--pictures", 0]
    out, _ = script("scripts/evaluate.py", *options)
    assert f"pytorch_lora_weights_1.safetensors on 7 images of {photos}" in out


@pytest.mark.parametrize("title", ["../../evil", "/evil", "a/b", "a\\b", "", "..", "a\0b", "a\nb", "n" * 300])
def test_a_title_of_unknown_origin_names_no_file(script, tmp_path, title):
    header = make_header({**flat_options(TrainConfig()), "resolution": 64}, 1, 5) | {"modelspec.title": title}
    save_file({"x": torch.zeros(1)}, tmp_path / "in.safetensors", header)
    script("scripts/share.py", tmp_path / "in.safetensors", "--out", tmp_path / "gift")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == {
        "in.safetensors", "gift/in.safetensors", "gift/README.md"}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sdxl_lora.config", "{"), ("sdxl_lora.config", "[]"), ("sdxl_lora.config", "{}"), ("sdxl_lora.config", "[" * 100_000),
        ("sdxl_lora.step", "x"), ("sdxl_lora.prompts", "[1]"), ("sdxl_lora.prompts", "[" * 100_000),
    ],
)  # fmt: skip
def test_a_header_of_unknown_origin_is_not_given_away(script, tmp_path, key, value):
    header = make_header({**flat_options(TrainConfig()), "resolution": 64}, 1, 5) | {key: value}
    save_file({"x": torch.zeros(1)}, tmp_path / "in.safetensors", header)
    _, err = script("scripts/share.py", tmp_path / "in.safetensors", "--out", tmp_path / "gift", status=2)
    assert err.startswith(f"share.py: {tmp_path}/in.safetensors")
    assert not (tmp_path / "gift").exists()


@pytest.mark.parametrize("pictures", [True, False])
def test_a_folder_to_give_away(train, script, tmp_path, pictures):
    options = ["--steps", 1, "--name", "naruto", "--trigger", "nrt", "--license", "CC0", "--author", "Ann"]
    train(*options, "--prompts", "a cat --s 1", "a dog --s 1", *(["--pictures"] if pictures else []))
    out, _ = script("scripts/share.py", tmp_path / "out", "--out", tmp_path / "gift")
    assert f"naruto.safetensors of step 1, README.md and {2 * pictures} pictures" in out
    ours, theirs = tmp_path / "out/naruto-000001.safetensors", tmp_path / "gift/naruto.safetensors"
    assert load_file(ours).keys() == load_file(theirs).keys()
    assert all(torch.equal(tensor, load_file(theirs)[key]) for key, tensor in load_file(ours).items())
    page = (tmp_path / "gift/README.md").read_text()
    front = page.split("---")[1]
    assert 'license: "CC0"' in front
    assert 'instance_prompt: "nrt"' in front
    assert "| this file | step 1 |" in page
    assert "By Ann." in page
    assert str(tmp_path) not in page
    if pictures:
        kind, _, encoded = read_metadata(theirs)["modelspec.thumbnail"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(encoded))).size) <= 256
        samples = tmp_path / "out/samples"
        assert (tmp_path / "gift/images/2.png").read_bytes() == (samples / "step-000001-p2-lora.png").read_bytes()
        assert (tmp_path / "gift/naruto.preview.png").exists()
        assert "![nrt a dog](images/2.png)" in page
        (samples / "step-000001-p1-lora.png").unlink()  # as after a signal: the others keep their prompts
        script("scripts/share.py", tmp_path / "out", "--out", tmp_path / "second")
        page = (tmp_path / "second/README.md").read_text()
        assert "![nrt a dog](images/2.png)" in page
        assert "a cat" not in page
        (samples / "step-000001-p2-lora.png").write_bytes(b"no picture")
        _, err = script("scripts/share.py", tmp_path / "out", "--out", tmp_path / "third", status=2)
        assert "p2-lora.png cannot be read" in err
        assert not (tmp_path / "third").exists()
    _, err = script("scripts/share.py", tmp_path / "out", "--out", tmp_path / "gift", status=2)
    assert "is there already and not an empty folder" in err
    _, err = script("scripts/share.py", tmp_path / "nothing", "--out", tmp_path / "x", status=2)
    assert "nothing: no such file or folder" in err


def test_variants_are_compared_by_the_plain_error_of_the_held_out_pictures(script, tmp_path):
    """Drives the runs themselves; the demo is measured before and after, not by what a run minimised."""
    options = ("--variants", "huber", "--steps", 2, "--timesteps", 5, "--device", "cpu", "--out", tmp_path / "compare")
    out, _ = script("scripts/dev/compare_options.py", *options)
    rows = json.loads((tmp_path / "compare/table.json").read_text())["rows"]
    assert list(rows) == ["base", "default", "huber"]
    base, default = rows["base"]["losses"], rows["default"]["losses"]
    assert base[0] == pytest.approx(sum(base[1:]) / 5)
    assert default[0] < base[0]
    lowered = (base[0] - rows["huber"]["losses"][0]) / (base[0] - default[0]) - 1
    assert rows["huber"]["compared"][0][0] == pytest.approx(lowered, rel=1e-3)
    assert (tmp_path / "compare/table.md").read_text().strip() in out
    _, err = script("scripts/dev/compare_options.py", "--variants", "nonsense", status=2)
    assert err.startswith("compare_options.py: --variants nonsense: choose from default")
