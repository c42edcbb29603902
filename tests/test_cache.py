"""scripts/cache_latents.py: what it keeps, what it makes anew, how it continues."""

import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE_HOST, Forked, fork_torchrun, photograph, run_main, until
from safetensors.torch import load_file, save_file
from test_train import last

from common.errors import UserError
from data import assign_buckets, decode
from dataset.latents import unpack_latents, unpack_text
from dataset.shards import INDEX, already_there, read_index
from dataset.sources import open_mixture, open_source
from model.load import load_sdxl
from model.sdxl import Denoiser
from model.text import tokenize
from model.vae import encode_pixels, normalise
from options.training import CaptionFilesConfig, DataConfig


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cached_latents_are_what_the_vae_gives_for_the_same_images(script, tiny_model, shards, tmp_path):
    options = ["--model", tiny_model, "--per-shard", 4, "--device", "cpu", "--bucket-step", 16, "--flip"]
    out, _ = script("scripts/cache_latents.py", shards, *options, "--out", tmp_path)
    assert re.search(r"^7 images at 64 px: [2-5] of 5 buckets, ", out)
    assert f"7 images in 2 shards in {tmp_path}/: 7 encoded, 0 from before" in out
    pipe = load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))
    images, latents = open_source(str(shards)), open_source(str(tmp_path))
    assert (images.samples, latents.samples, latents.has_latents, latents.has_mirrored) == (7, 7, True, True)
    sizes, bucket = assign_buckets(images, DataConfig(bucket_step=16), 64)
    for n in range(7):
        wanted, ready = images.read_sample(n), latents.read_sample(n)
        assert ready.captions == wanted.captions
        for flip in (False, True):
            image, cached = decode(wanted, sizes[bucket[n]], flip), unpack_latents(ready.image, flip)
            ours = encode_pixels(pipe.vae, normalise(torch.tensor(image.values)[None]))[0]
            torch.testing.assert_close(torch.from_numpy(cached.values).float(), ours, atol=1e-3, rtol=1e-3)
            assert (cached.original, cached.crop) == (image.original, image.crop)
    _, err = script("scripts/cache_latents.py", tmp_path, "--model", tiny_model, "--out", tmp_path / "b", status=2)
    assert err == f"cache_latents.py: {tmp_path} holds latents already\n"


def test_cached_masks_are_those_of_the_images(script, tiny_model, cutouts, tmp_path):
    options = ["--model", tiny_model, "--device", "cpu", "--bucket-step", 16, "--flip"]
    script("scripts/cache_latents.py", cutouts, *options, "--masked-loss", "--out", tmp_path / "latents")
    images, latents = open_source(str(cutouts)), open_source(str(tmp_path / "latents"))
    sizes, bucket = assign_buckets(images, DataConfig(bucket_step=16), 64)
    pipe = load_sdxl(str(tiny_model), torch.float32, torch.device("cpu"))
    for n in range(4):
        for flip in (False, True):
            image = decode(images.read_sample(n), sizes[bucket[n]], flip, masked=True)
            cached = unpack_latents(latents.read_sample(n).image, flip, masked=True)
            assert np.array_equal(cached.mask, image.mask)
            ours = encode_pixels(pipe.vae, normalise(torch.tensor(image.values)[None]))[0]
            torch.testing.assert_close(torch.from_numpy(cached.values).float(), ours, atol=1e-3, rtol=1e-3)


def test_after_a_change_only_what_changed_is_made_anew(script, tiny_model, photos, tmp_path):
    images = shutil.copytree(photos, tmp_path / "images")
    options = ["--model", tiny_model, "--per-shard", 3, "--device", "cpu", "--bucket-step", 16, "--workers", 0]

    def cache(out: str = "latents", *more) -> str:
        return script("scripts/cache_latents.py", images, "--out", tmp_path / out, *options, *more)[0].splitlines()[-1]

    assert cache().endswith("7 encoded, 0 from before")
    first = contents(tmp_path / "latents")
    assert cache().endswith("0 encoded, 7 from before")
    assert contents(tmp_path / "latents") == first
    shutil.copy(images / "photo6.jpg", images / "another.jpg")  # the first by name: every sample moves on by one
    (images / "another.txt").write_text("another picture")
    (images / "photo3.txt").write_text("another caption")
    shutil.copy(images / "photo5.jpg", images / "photo4.jpg")
    (images / "photo2.jpg").write_bytes(b"broken")
    out, _ = script("scripts/cache_latents.py", images, "--out", tmp_path / "latents", *options)
    # photo4 is photo5 now and another is photo6: of these, nothing has to be encoded
    assert "7 images in 3 shards" in out
    assert "0 encoded, 7 from before" in out
    assert "refused" in out
    assert "photo2.jpg (no image of a known kind)" in out
    assert cache("fresh").startswith("  refused")
    assert contents(tmp_path / "latents") == contents(tmp_path / "fresh")
    source = open_source(str(tmp_path / "latents"))
    assert [source.read_sample(n).captions for n in (0, 3)] == [["another picture"], ["another caption"]]
    assert cache("latents", "--flip").startswith("  refused")
    out, _ = script("scripts/cache_latents.py", images, "--out", tmp_path / "fresh", *options, "--no-buckets")
    assert int(re.search(r"(\d) encoded", out)[1]) >= 4  # those whose bucket was not the square


@pytest.mark.parametrize(("seed", "fatal"), enumerate((0, 4, 7, 10)))
def test_after_any_change_the_cache_is_that_of_a_first_run(script, tiny_model, photos, tmp_path, monkeypatch, seed, fatal):
    """Stopped in between at some step, too. What was encoded before is not encoded again."""
    rng, images = random.Random(seed), shutil.copytree(photos, tmp_path / "images")
    options = [images, "--model", tiny_model, "--per-shard", 3, "--device", "cpu", "--no-buckets", "--workers", 0]

    def pixels() -> set[bytes]:
        return {path.read_bytes() for path in images.glob("*.jpg")}

    script("scripts/cache_latents.py", *options, "--out", tmp_path / "latents")
    before = pixels()
    added, edited, renamed, removed, replaced = rng.sample(range(7), 5)
    photograph(seed, 90, 90).save(images / f"photo{added}-more.jpg")
    (images / f"photo{added}-more.txt").write_text("one more")
    (images / f"photo{edited}.txt").write_text("another caption")
    for kind in ("jpg", "txt"):
        (images / f"photo{renamed}.{kind}").rename(images / f"{seed % 2}.{kind}")
        (images / f"photo{removed}.{kind}").unlink()
    photograph(9 + seed, 90, 90).save(images / f"photo{replaced}.jpg")
    with monkeypatch.context() as dying:
        steps = iter(range(fatal))
        for change in ("rename", "unlink", "touch"):
            dying.setattr(Path, change, until(steps, getattr(Path, change)))
        assert run_main("scripts/cache_latents.py", *options, "--out", tmp_path / "latents") == 130
    done = {h for shard in already_there(tmp_path / "latents").values() for h in shard.hashes}
    out, _ = script("scripts/cache_latents.py", *options, "--out", tmp_path / "latents")
    encoded = int(re.search(r"(\d) encoded", out)[1])
    assert encoded == sum(h not in done for shard in read_index(tmp_path / "latents").values() for h in shard.hashes)
    assert encoded == len(pixels() - before) == 2 or fatal
    script("scripts/cache_latents.py", *options, "--out", tmp_path / "fresh")
    assert contents(tmp_path / "latents") == contents(tmp_path / "fresh")


def test_a_folder_holds_the_latents_of_one_source(script, tiny_model, photos, cutouts, tmp_path):
    out = tmp_path / "latents"
    options = ["--model", tiny_model, "--device", "cpu", "--workers", 0, "--out", out]
    script("scripts/cache_latents.py", photos, *options)
    first = contents(out)
    for name in ("latents", "other"):
        _, err = script("scripts/cache_latents.py", cutouts, *options, "--name", name, status=2)
        assert err == f"cache_latents.py: {out} holds shards of {photos}: --replace puts those of {cutouts} in their place\n"
    _, err = script("scripts/cache_latents.py", out, *options, "--replace", status=2)
    assert "holds latents already" in err
    shards = tmp_path / "shards"
    script("scripts/make_shards.py", photos, "--out", shards)
    _, err = script("scripts/cache_latents.py", shards, *options[:-1], shards, "--replace", status=2)
    assert err == f"cache_latents.py: --out {shards} must be another folder than that of the data\n"
    assert contents(out) == first
    script("scripts/cache_latents.py", photos, *options, "--name", "other")  # the same source: its files are renamed
    assert [path.name[:12] for path in out.glob("*.tar")] == ["other-000000"]
    script("scripts/cache_latents.py", cutouts, *options, "--replace")
    assert open_source(str(out)).samples == 4


def test_shards_and_latents_have_the_captions_and_repeats_of_the_folder(script, tiny_model, photos, tmp_path):
    folder = tmp_path / "pictures"
    for name in ("3_nrt house", "2_other"):
        shutil.copytree(photos, folder / name)
    for name in ("photo1", "photo2"):
        (folder / f"3_nrt house/{name}.txt").unlink()
        (folder / f"2_other/{name}.txt").rename(folder / f"2_other/{name}.cap")
    shutil.copy(photos / "photo4.jpg", folder / "old_town 12.jpg")
    shutil.copy(photos / "photo5.jpg", folder / "17.jpg")
    (folder / "2_other/photo6.jpg").write_bytes(b"no picture")
    flags = ["--caption", "nrt style", "--caption-from-name"]
    wanted = open_mixture((str(folder),), captions=CaptionFilesConfig("nrt style", True))
    model = ["--model", tiny_model, "--device", "cpu", "--workers", 0]
    script("scripts/make_shards.py", folder, "--out", tmp_path / "shards", "--per-shard", 4, *flags)
    script("scripts/make_shards.py", tmp_path / "shards", "--out", tmp_path / "again")
    script("scripts/cache_latents.py", folder, "--out", tmp_path / "latents", *model, *flags)
    script("scripts/cache_latents.py", tmp_path / "again", "--out", tmp_path / "of-shards", *model)
    good = [n for n in range(wanted.samples) if "2_other/photo6" not in wanted.names[n]]
    assert {wanted.read_sample(n).captions[0] for n in good} >= {"nrt house", "other", "old town", "nrt style"}
    for name in ("shards", "again", "latents", "of-shards"):
        found = open_mixture((str(tmp_path / name),))
        assert [found.read_sample(n).captions for n in range(found.samples)] == [wanted.read_sample(n).captions for n in good]
        assert found.repeats.tolist() == [wanted.repeats[n] for n in good]
    (folder / "2_other").rename(folder / "5_other")  # of which the latents have nothing but the repeats
    out, _ = script("scripts/cache_latents.py", folder, "--out", tmp_path / "latents", *model, *flags)
    assert "0 encoded" in out
    assert open_source(str(tmp_path / "latents")).repeats.max() == 5


def test_killed_in_between_it_continues_with_the_same_result(script, tiny_model, photos, tmp_path):
    options = [photos, "--model", tiny_model, "--per-shard", 1, "--device", "cpu", "--bucket-step", 16, "--workers", 0]
    script("scripts/cache_latents.py", *options, "--out", tmp_path / "whole")
    wanted, folder = contents(tmp_path / "whole"), tmp_path / "latents"
    process = Forked("scripts/cache_latents.py", *options, "--out", folder, output=tmp_path / "output")
    while len(list(folder.glob("*.tar"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    if not (folder / INDEX).exists():
        with pytest.raises(UserError, match="interrupted: the same command goes on with it"):
            open_source(str(folder))
    out, _ = script("scripts/cache_latents.py", *options, "--out", folder)
    assert int(re.search(r"(\d) from before", out)[1]) >= 3
    assert contents(folder) == wanted


@pytest.mark.parametrize("processes", [2, 8])  # for four shards
def test_several_ranks_share_the_work(script, tiny_model, shards, tmp_path, processes):
    options = [shards, "--model", tiny_model, "--per-shard", 2, "--device", "cpu", "--bucket-step", 16, "--workers", 0]
    script("scripts/cache_latents.py", *options, "--out", tmp_path / "one")
    host = ["--nproc-per-node", processes, *ONE_HOST[2:]]
    process = fork_torchrun("scripts/cache_latents.py", [*options, "--out", tmp_path / "two"], host, tmp_path / "output")
    process.join(120)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, output
    assert output.count("7 images in 4 shards") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# Text.


@pytest.fixture(scope="module")
def tagged(photos, tmp_path_factory):
    """The photos with captions of tags."""
    images = shutil.copytree(photos, tmp_path_factory.mktemp("tagged") / "images")
    for i, path in enumerate(sorted(images.glob("*.txt"))):
        path.write_text(f"picture, number {i}, a, b, c\n")
    return images


def test_hidden_states_are_those_of_the_encoders(script, tiny_model, tagged, tmp_path):
    options = ["--model", tiny_model, "--device", "cpu", "--bucket-step", 16, "--workers", 0, "--text", 3]
    options += ["--shuffle-tags", "--keep-tags", 1, "--trigger", "naruto "]
    script("scripts/cache_latents.py", tagged, *options, "--out", tmp_path)
    source = open_source(str(tmp_path))
    denoiser = Denoiser(load_sdxl(str(tiny_model), torch.float32, torch.device("cpu")))
    seen = set()
    for n in range(source.samples):
        raw = source.read_sample(n)
        seen |= set(raw.captions)
        wanted = denoiser.encode_text(tokenize(denoiser.tokenizers, raw.captions))
        for kept, states in zip(unpack_text(raw.image), wanted, strict=True):
            torch.testing.assert_close(kept.float(), states, atol=2e-3, rtol=1e-3)
    assert all(caption.startswith("naruto picture, ") for caption in seen)
    assert len(seen) > 14  # of 7 images
    out, _ = script("scripts/cache_latents.py", tagged, *options, "--out", tmp_path)
    assert "0 encoded, 7 from before" in out
    (index,) = read_index(tmp_path).values()
    assert index.text_signature == pytest.approx(denoiser.text_signature(), abs=1e-4)


@pytest.mark.parametrize(
    ("captions", "text", "kept"), [("abcde", 4, "abcde"), ("abc", 4, "abc"), ("aab", 1, "aab"), ("a", 3, "a")]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_caption_keeps_its_share_of_the_variants(script, tiny_model, photos, tmp_path, captions, text, kept, shuffle):
    shutil.copy(photos / "photo0.jpg", tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("\n".join(f"{c}, {c}, {c}" for c in captions))
    options = ["--model", tiny_model, "--device", "cpu", "--workers", 0, "--text", text, *["--shuffle-tags"] * shuffle]
    script("scripts/cache_latents.py", tmp_path, *options, "--out", tmp_path / "latents")
    raw = open_source(str(tmp_path / "latents")).read_sample(0)
    assert [caption[0] for caption in raw.captions] == list(kept)
    assert len(unpack_text(raw.image)[0]) == len(kept)


def test_training_on_cached_text_equals_training_on_the_captions(train, script, tiny_model, tagged, tmp_path):
    options = ["--model", tiny_model, "--device", "cpu", "--bucket-step", 16, "--workers", 0]
    script("scripts/cache_latents.py", tagged, *options, "--out", tmp_path / "latents", "--text", 1)
    training = ["--data", tmp_path / "latents", "--bucket-step", 16, "--steps", 6, "--lr", 1e-2, "--caption-dropout", 0.3]
    script("scripts/cache_latents.py", tagged, *options, "--out", tmp_path / "plain")
    frozen = [*training, "--no-train-text-encoder"]
    out, _ = train(*frozen, "--log-dir", tmp_path / "ready")
    live = ["--data", tmp_path / "plain", *frozen[2:]]
    out_live, _ = train(*live, "--out", tmp_path / "b", "--log-dir", tmp_path / "live")
    for scalar in ("loss", "grad_norm"):
        assert last(tmp_path / "ready", scalar) == pytest.approx(last(tmp_path / "live", scalar), rel=2e-3)
    parameters = re.compile(r"U-Net and text encoders ([\d,]+) parameters")
    assert parameters.search(out)[1] == parameters.search(out_live)[1]
    _, err = train(*frozen, "--shuffle-tags", "--out", tmp_path / "c", status=2)
    assert "this text was encoded already, by cache_latents.py --text" in err
    train(*training, "--shuffle-tags", "--out", tmp_path / "d", "--log-dir", tmp_path / "trained")  # then it is not used
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "text_encoder_2/model.safetensors")
    save_file({name: w * 1.3 for name, w in weights.items()}, other / "text_encoder_2/model.safetensors", {"format": "pt"})
    _, err = train(*frozen, "--model", other, "--out", tmp_path / "e", status=2)
    assert err.endswith(f"--data: its text was encoded by other encoders than those of --model {other}\n")


def test_mistakes(script, tmp_path):
    for options, message in (
        (["--text", -1], "--text must be at least 0, not -1"),
        (["--per-shard", 0], "--per-shard must be at least 1, not 0"),
        (["--shuffle-tags"], "--shuffle-tags and --trigger do nothing here without --text: training applies them"),
        (["--text", 1, "--keep-tags", 1], "--keep-tags does nothing without --shuffle-tags"),
    ):
        _, err = script("scripts/cache_latents.py", "photos", "--out", tmp_path / "x", *options, status=2)
        assert err == f"cache_latents.py: {message}\n"
    assert not (tmp_path / "x").exists()
