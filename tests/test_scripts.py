import hashlib
import io
import json
import random
import shutil
import tarfile

import pyarrow
import pytest
import torch
from conftest import photograph
from PIL import Image
from pyarrow import parquet
from test_lora import shake

import formats
from data import decode, open_source, unpack_latents
from lora import LoRAConfig, add_lora
from sdxl import encode_pixels, load_sdxl


def members(tar) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file}


def test_shards_hold_the_pictures_byte_for_byte(photos, shards):
    assert sorted(p.name for p in shards.iterdir()) == [f"photos-00000{i}.tar" for i in range(3)]
    first = members(shards / "photos-000000.tar")
    assert sorted(first) == sorted(f"000000{i}.{kind}" for i in range(3) for kind in ("jpg", "json", "txt"))
    assert first["0000002.jpg"] == (photos / "photo2.jpg").read_bytes()
    assert first["0000002.txt"] == b"picture number 2"
    about = json.loads(first["0000002.json"])
    wanted = {"width": 140, "height": 160, "source": "photo2.jpg", "sha256": hashlib.sha256(first["0000002.jpg"]).hexdigest()}
    assert about == wanted
    assert open_source(str(shards)).samples == 7


def test_unusable_pictures_are_refused_by_name(script, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo1.jpg").write_bytes((folder / "photo1.jpg").read_bytes()[:500])
    (folder / "photo2.txt").unlink()
    out, _ = script("scripts/make_shards.py", folder, "--out", tmp_path / "out")
    assert "kept 5 images in 1 shards" in out
    assert "refused 2" in out
    assert "photo1.jpg (cannot be decoded" in out
    assert "photo2.jpg (no caption)" in out
    assert not list((tmp_path / "out").glob("*.part"))
    _, err = script("scripts/make_shards.py", folder, "--out", tmp_path / "out", status=2)
    assert "already holds shard-000000.tar" in err


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
        ("/nowhere", "neither a folder or file here"),
        (tmp_path / "x.parquet", "no readable parquet file"),
        ("tests", "no usable image"),
    ):
        _, err = script("scripts/make_shards.py", source, "--out", tmp_path / "out", status=2)
        assert err.strip().splitlines()[-1].startswith("make_shards.py: ")
        assert message in err


def test_bench_needs_a_gpu(script):
    if torch.cuda.is_available():
        pytest.skip("there is one: bench.py would run for minutes")
    _, err = script("scripts/bench.py", status=2)
    assert err == "bench.py: nothing to measure here: a GPU with CUDA is needed\n"
    _, err = script("scripts/bench.py", "--rows", "recipe", "nonsense", status=2)
    assert err.startswith("bench.py: --rows nonsense: choose from recipe")


def test_cached_latents_are_what_the_vae_gives_for_the_same_images(script, tiny_model, shards, tmp_path):
    out, _ = script("scripts/cache.py", shards, "--model", tiny_model, "--out", tmp_path, "--per-shard", 4, "--device", "cpu")
    assert "encoded 7 images at 64 px into 2 shards" in out
    pipe = load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))
    images, latents = open_source(str(shards)), open_source(str(tmp_path))
    assert (images.samples, latents.samples, latents.latents) == (7, 7, True)
    wanted = {raw.caption: decode(raw, 64, flip=False) for raw in images.walk(random.Random(0))}
    for raw in latents.walk(random.Random(0)):
        posterior, original, crop = unpack_latents(raw, 64)
        pixels, *sizes = wanted.pop(raw.caption)
        ours = encode_pixels(pipe.vae, torch.from_numpy(pixels)[None])[0]
        torch.testing.assert_close(torch.from_numpy(posterior).float(), ours, atol=1e-3, rtol=1e-3)
        assert [original, crop] == sizes
    assert not wanted
    _, err = script("scripts/cache.py", shards, "--model", tiny_model, "--out", tmp_path, status=2)
    assert err == f"cache.py: --out {tmp_path} already holds latents-000000.tar: remove it or choose another --name\n"
    _, err = script("scripts/cache.py", tmp_path, "--model", tiny_model, "--out", tmp_path / "b", status=2)
    assert err == f"cache.py: {tmp_path} holds latents already\n"


def test_converting_keeps_the_weights(script, denoiser, tiny_model, tmp_path):
    adapter = add_lora(denoiser, LoRAConfig(rank=3, alpha=2, targets="all"), denoiser.unread)
    shake(adapter)
    ours, theirs, back = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "back"))
    config = {"model": "demo", "rank": 3, "alpha": 2.0, "targets": "all", "resolution": 64}
    ours.write_bytes(formats.serialise(adapter.deltas, formats.describe(config, images=7, step=5), dtype=torch.float32))
    how = ["--model", tiny_model, "--save-dtype", "fp32"]
    out, _ = script("scripts/convert.py", ours, theirs, "--format", "diffusers", *how)
    assert "in the diffusers layout, largest difference 0" in out
    script("scripts/convert.py", theirs, back, *how)
    start = [8 + int.from_bytes(file.read_bytes()[:8], "little") for file in (back, ours)]
    assert back.read_bytes()[start[0] :] == ours.read_bytes()[start[1] :]
    assert formats.read_metadata(back) == formats.read_metadata(ours)
    _, err = script("scripts/convert.py", ours, back, *how, status=2)
    assert err == f"convert.py: {back} is there already: remove it or choose another name\n"
    _, err = script("scripts/convert.py", ours, tmp_path / "x.safetensors", status=2)  # for the real SDXL
    assert "does not fit the model: it is for a model of 80 channels, {80} channels of text and not {2048}" in err
    assert not (tmp_path / "x.safetensors").exists()
