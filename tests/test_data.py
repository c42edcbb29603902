import json
import re
import shutil
import signal
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import encoded, photograph
from PIL import Image

from common.errors import UserError
from common.signals import SIGNALS, blocked_signals
from data import Stream, decode, describe_buckets, make_loader
from dataset.buckets import bucket_sizes
from dataset.images import Decoded
from dataset.latents import pack_latents
from dataset.loading import hide_lost_connection
from dataset.shards import split_captions
from dataset.sources import EncodedSample, open_mixture, open_source
from model.vae import normalise
from options.training import CaptionConfig, DataConfig


def stream(data, bs: int = 2, resolution: int = 64, seed: int = 0, **options) -> Stream:
    """`options` are those of CaptionConfig, DataConfig and Stream."""
    for_captions = {k: options.pop(k) for k in ("caption_dropout", "shuffle_tags", "caption_prefix") if k in options}
    for_data = {k: options.pop(k) for k in ("flip", "workers", "bucket_step", "buckets") if k in options}
    config = DataConfig(bs=bs, **for_data)
    return Stream(open_source(str(data)), config, CaptionConfig(**for_captions), resolution, seed, **options)


def captions(stream: Stream, batches: int) -> list[str]:
    return [caption for batch in islice(stream, batches) for caption in batch.captions]


@pytest.mark.parametrize("kind", ["photos", "shards"])
def test_every_image_once_per_epoch_in_a_new_order(kind, request):
    source = request.getfixturevalue(kind)
    seen = captions(stream(source, bs=1), 21)
    epochs = [seen[:7], seen[7:14], seen[14:]]
    assert [Counter(epoch) for epoch in epochs] == [Counter({f"picture number {i}": 1 for i in range(7)})] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert captions(stream(source, bs=1), 21) == seen
    assert captions(stream(source, bs=1, seed=1), 21) != seen


@pytest.mark.parametrize("kind", ["photos", "shards"])
def test_order_depends_neither_on_ranks_nor_on_workers(kind, request):
    source = request.getfixturevalue(kind)
    alone = captions(stream(source), 12)
    ranks = [list(islice(stream(source, rank=r, world=3), 4)) for r in range(3)]
    together = [caption for batches in zip(*ranks, strict=True) for batch in batches for caption in batch.captions]
    assert together == alone
    workers = [c for batch in islice(make_loader(stream(source, workers=2), pin_memory=False), 12) for c in batch.captions]
    assert workers == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_continues_from_any_batch(shards, workers):
    whole = list(islice(stream(shards, flip=True, caption_dropout=0.3, rank=1, world=2), 9))
    rest = stream(shards, flip=True, caption_dropout=0.3, workers=workers, rank=1, world=2, start=3 * 2)
    for ours, wanted in zip(islice(make_loader(rest, pin_memory=False), 6), whole[3:], strict=True):
        assert ours.captions == wanted.captions
        assert torch.equal(ours.images, wanted.images)


def test_pixels_sizes_and_crop():
    image = photograph(0, 300, 200)
    pixels, original, crop, mask = decode(EncodedSample("x", encoded(image), []), (64, 64), flip=False)
    assert mask is None
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    assert (original, crop) == ((200, 300), (0, 16))
    wanted = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS).crop((16, 0, 80, 64)))
    assert np.array_equal(pixels, wanted)
    assert decode(EncodedSample("x", encoded(image), []), (48, 80), flip=False).crop == (2, 0)  # of 53 x 80
    values = normalise(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8))
    torch.testing.assert_close(values, torch.tensor([-1.0, 1, -0.6]).view(1, 3, 1, 1))


def test_flip_mirrors_pixels_and_crop():
    raw = EncodedSample("x", encoded(photograph(1, 201, 100)), [])
    plain, mirrored = (decode(raw, (50, 50), flip) for flip in (False, True))
    assert plain.crop[1] + mirrored.crop[1] + 50 in (100, 101)  # of a resized width of 100
    assert np.abs(plain.values[:, ::-1].astype(int) - mirrored.values).mean() < 2


def test_flip_and_dropout_rates(shards):
    plain = list(islice(stream(shards, bs=10), 60))
    changed = list(islice(stream(shards, bs=10, flip=True, caption_dropout=0.25), 60))
    dropped = sum(not caption for batch in changed for caption in batch.captions) / 600
    assert 0.18 < dropped < 0.32
    pairs = [pair for a, b in zip(plain, changed, strict=True) for pair in zip(a.images, b.images, strict=True)]
    kept = sum(torch.equal(a, b) for a, b in pairs) / 600
    assert 0.42 < kept < 0.58
    assert all(torch.equal(a, b) or (a.flip(1).int() - b).abs().float().mean() < 6 for a, b in pairs)


def test_imagefolder_with_metadata(tmp_path):
    (tmp_path / "train").mkdir()
    rows = []
    for i in range(3):
        photograph(i, 70, 70).save(tmp_path / f"train/{i}.png")
        rows.append(json.dumps({"file_name": f"train/{i}.png", "text": f"row {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert sorted(captions(stream(tmp_path, bs=3), 1)) == ["row 0", "row 1", "row 2"]
    (tmp_path / "metadata.jsonl").write_text(rows[0] + "\n\n" + json.dumps({"file_name": "train/1.png", "text": None}))
    source = open_source(str(tmp_path))
    assert (source.samples, len(source.uncaptioned)) == (1, 2)
    (tmp_path / "metadata.jsonl").rename(tmp_path / "train/metadata.jsonl")
    (tmp_path / "train/metadata.jsonl").write_text(json.dumps({"file_name": "2.png", "text": "beside it"}))
    assert captions(stream(tmp_path, bs=1), 1) == ["beside it"]
    (tmp_path / "train/metadata.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"metadata\.jsonl line 1"):
        open_source(str(tmp_path))


def test_brace_pattern(shards):
    first_two = open_source(f"{shards}/photos-{{000000..000001}}.tar")
    assert (first_two.samples, open_source(str(shards)).samples) == (6, 7)


def test_the_fingerprint_depends_on_names_sizes_and_captions(photos, shards, tmp_path):
    here, moved = photos, shutil.copytree(photos, tmp_path / "elsewhere")
    assert open_source(str(here)).fingerprint == open_source(str(moved)).fingerprint
    (moved / "photo3.txt").write_text("another caption")
    assert open_source(str(here)).fingerprint != open_source(str(moved)).fingerprint
    assert open_source(str(shards)).fingerprint == open_source(str(shutil.copytree(shards, tmp_path / "s"))).fingerprint
    assert open_source(str(shards)).fingerprint != open_source(f"{shards}/photos-{{000000..000001}}.tar").fingerprint


def test_broken_and_uncaptioned_images_are_skipped_and_named(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo3.txt").unlink()
    broken = folder / "photo5.jpg"
    broken.write_bytes(broken.read_bytes()[:600])
    source = open_source(str(folder))
    assert (source.samples, source.uncaptioned) == (6, [str(folder / "photo3.jpg")])
    batches = list(islice(stream(folder, bs=3), 4))
    assert all(len(batch.captions) == 3 for batch in batches)
    assert {name for batch in batches for name in batch.skipped} == {str(broken)}
    assert set(captions(stream(folder, bs=3), 4)) == {f"picture number {i}" for i in (0, 1, 2, 4, 6)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_broken_images_changes_no_order(photos, tmp_path, workers):
    """With --bs 1 a broken image is a whole batch: another replaces it, and all others keep their places, also on resume."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    whole = captions(stream(folder, bs=1), 21)
    (folder / "photo2.jpg").write_bytes(b"no picture")
    broken = list(islice(make_loader(stream(folder, bs=1, workers=workers), pin_memory=False), 21))
    pairs = list(zip(whole, (batch.captions[0] for batch in broken), strict=True))
    assert {a for a, b in pairs if a != b} == {"picture number 2"}
    assert sum(bool(batch.skipped) for batch in broken) == 3
    rest = captions(stream(folder, bs=1, start=9), 12)
    assert rest == [batch.captions[0] for batch in broken[9:]]


def test_a_file_name_never_becomes_a_command(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(shards / "photos-000000.tar", tmp_path / "pipe:touch attacked; cat x.tar")
    assert len(captions(stream("."), 3)) == 6
    assert not (tmp_path / "attacked").exists()


def test_unusable_data(photos, shards, tmp_path):
    def refused(data, match):
        with pytest.raises(UserError, match=match):
            open_source(str(data))

    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path / "{000..002}.tar", "000.tar does not exist")
    refused(tmp_path / "{000..002.tar", "a brace is not closed")
    refused(tmp_path, "no image with a caption")
    photograph(0, 64, 64).save(tmp_path / "alone.jpg")
    refused(tmp_path, "1 have none: put name.txt beside")
    (tmp_path / "alone.txt").write_text("a caption")
    (tmp_path / "alone.jpg").write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^--data: none of the 1 images can be decoded$"):
            next(make_loader(stream(tmp_path, workers=workers), pin_memory=False))


@pytest.mark.parametrize("end", [100, 700, 1024, 3000, -1, -512, -1024, -5000])
def test_a_truncated_tar_gives_every_complete_sample(shards, tmp_path, end):
    with tarfile.open(shards / "photos-000000.tar") as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    whole = (shards / "photos-000000.tar").read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)  # up to the last member's last block, without the end-of-archive mark
    left = whole[:end]
    (tmp_path / "photos-000000.tar").write_bytes(left)
    samples = [key for key in ("0000000", "0000001", "0000002") if max(ends[f"{key}.{e}"] for e in ("jpg", "txt")) <= len(left)]
    if not samples:
        with pytest.raises(UserError, match=r"no image with a caption there|no tar file"):
            open_source(str(tmp_path))
        return
    source = open_source(str(tmp_path))
    assert source.truncated == ("photos-000000.tar",)
    assert source.names == [f"photos-000000.tar:{key}" for key in samples]
    assert not open_source(str(shards)).truncated


def test_the_scan_counts_what_the_stream_yields(shards, tmp_path):
    """Also in a tar that holds samples without a caption, other files, and captions apart from their images."""
    with tarfile.open(shards / "photos-000000.tar") as old, tarfile.open(tmp_path / "x.tar", "w") as new:
        members = {member.name: member for member in old}
        order = ["0000000.jpg", "0000000.txt", "0000001.jpg", "0000001.json", "0000002.jpg", "0000001.txt"]
        for name in order:
            new.addfile(members[name], old.extractfile(name))
    source = open_source(str(tmp_path))
    assert [source.read_sample(n).name for n in range(2)] == source.names == ["x.tar:0000000", "x.tar:0000001"]
    assert source.read_sample(1).captions == ["picture number 1"]
    assert (source.uncaptioned, source.others) == (["x.tar:0000002"], {".txt": 2, ".json": 1})


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"bs": 0}, "--bs"),
        ({"resolution": 100}, "--resolution"),
        ({"bucket_step": 20}, "--bucket-step"),
        ({"workers": -1}, "--w"),
    ],
)
def test_bad_options_name_their_flag(options, flag):
    with pytest.raises(UserError, match=flag):
        DataConfig(**options)


# Buckets.


def test_every_image_goes_to_the_bucket_of_its_shape(photos):
    """photo i has 80 + 30 i by 200 - 20 i pixels."""
    seen = stream(photos, bs=2, bucket_step=16)
    assert seen.sizes == bucket_sizes(64, 16)
    drawn = Counter()
    for batch in islice(seen, 70):
        (size,) = {tuple(size) for size in batch.size.tolist()}
        assert batch.images.shape == (2, *size, 3)
        assert size in bucket_sizes(64, 16)
        for original, crop in zip(batch.original_size.tolist(), batch.crop.tolist(), strict=True):
            covering = max(size[0] / original[0], size[1] / original[1])
            for side, offset, full in zip(size, crop, original, strict=True):
                assert abs(2 * offset + side - covering * full) <= 2  # the crop is in the middle
        drawn.update(batch.captions)
    assert set(drawn) == {f"picture number {i}" for i in range(7)}
    assert max(drawn.values()) - min(drawn.values()) <= 3  # of 20 epochs: at most a batch of each waits
    wide = next(batch for batch in seen if "picture number 6" in batch.captions)
    assert wide.size[0].tolist() == [32, 128]
    summary = describe_buckets(seen.source, seen.sizes, seen.bucket)
    assert re.fullmatch(r"[2-5] of 5 buckets, 1?\d\.\d% of the images cropped away, none enlarged", summary)
    square = stream(photos, buckets=False, resolution=96)
    assert next(iter(square)).images.shape == (2, 96, 96, 3)
    summary = describe_buckets(square.source, square.sizes, square.bucket)
    assert summary.startswith("1 of 1 buckets")
    assert summary.endswith("enlarged, by up to 1.20")


def test_several_captions_of_an_image(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo0.txt").write_text("first\n\n second \n")
    seen = set(captions(stream(folder, bs=1), 100))
    assert {"first", "second"} < seen
    assert len(seen) == 8
    rows = [json.dumps({"file_name": f"photo{i}.jpg", "text": ["x", "y"]}) for i in range(7)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert set(captions(stream(folder, bs=1), 30)) == {"x", "y"}
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        metadata = json.dumps({"captions": ["é", "z"], "width": 3})
        tar.write({"__key__": "0", "jpg": (photos / "photo0.jpg").read_bytes(), "json": metadata})
    assert set(captions(stream(tmp_path / "a.tar", bs=1), 30)) == {"é", "z"}


@pytest.mark.parametrize("text", ['{"captions": [1, null, " "]}', '{"captions": null, "width": 3}', "{}", "[" * 10**5, ""])
def test_json_without_captions_gives_none(text):
    assert split_captions(text.encode()) == ([text] if text.startswith("[") else [])
    assert split_captions(b"{red|blue} coat") == ["{red|blue} coat"]  # no JSON: a caption that begins so


def test_a_mixture_by_weight(photos, shards, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for i in range(2):
        shutil.copy(photos / f"photo{i}.jpg", folder)
        (folder / f"photo{i}.txt").write_text(f"other {i}")
    even = open_mixture((str(shards), str(folder)))
    assert (even.samples, even.shares) == (9, ())
    seen = captions(Stream(even, DataConfig(bs=1), CaptionConfig(), 64, 0), 90)
    assert set(Counter(seen).values()) == {10}
    mixed = open_mixture((f"{shards}:1", f"{folder}:3"))
    drawn = Counter(captions(Stream(mixed, DataConfig(bs=2), CaptionConfig(), 64, 0), 360))
    assert abs(drawn["other 0"] + drawn["other 1"] - 540) < 9  # of 720, whatever the sizes
    assert max(drawn.values()) - drawn["other 0"] < 3
    assert all(abs(drawn[f"picture number {i}"] - 180 / 7) < 3 for i in range(7))
    assert open_mixture((str(shards),)).fingerprint == open_source(str(shards)).fingerprint
    latent_shard(tmp_path / "latents.tar")
    for data, match in (
        ((f"{shards}:1", str(folder)), "give all of them a weight"),
        ((f"{shards}:0", f"{folder}:1"), "a weight must be above 0"),
        ((str(shards), str(tmp_path / "latents.tar")), "both images and latents"),
    ):
        with pytest.raises(UserError, match=match):
            open_mixture(data)


# The loss mask.


def masked_photo(seed: int, width: int, height: int) -> Image.Image:
    """Its alpha equals its red channel, so that every step must treat both alike."""
    image = photograph(seed, width, height)
    image.putalpha(image.getchannel("R"))
    return image


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "bucket"), [((201, 100), (48, 64)), ((64, 64), (64, 64)), ((90, 301), (128, 32))])
def test_the_mask_follows_the_image(size, bucket, flip):
    raw = EncodedSample("x", encoded(masked_photo(1, *size)), [])
    pixels, original, crop, mask = decode(raw, bucket, flip, masked=True)
    assert (mask.shape, mask.dtype) == ((bucket[0] // 8, bucket[1] // 8), np.uint8)
    red = pixels[..., 0].reshape(bucket[0] // 8, 8, bucket[1] // 8, 8).mean(axis=(1, 3))
    assert mask.max() - mask.min() > 50
    assert np.abs(mask - red).max() <= 0.5
    opaque = EncodedSample("x", encoded(photograph(1, *size)), [])
    same = decode(opaque, bucket, flip, masked=True)
    assert np.array_equal(same.values, pixels)  # its own colours, not those on white
    assert (same.mask == 255).all()
    assert (original, crop, None) == decode(raw, bucket, flip)[1:]


def test_a_batch_has_a_mask_only_if_asked(photos, tmp_path):
    masked_photo(0, 70, 70).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    shutil.copy(photos / "photo1.jpg", tmp_path)
    shutil.copy(photos / "photo1.txt", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("broken")
    assert next(iter(stream(tmp_path, buckets=False))).mask is None
    config = DataConfig(bs=3, buckets=False, masked_loss=True)
    (batch,) = islice(Stream(open_source(str(tmp_path)), config, CaptionConfig(), 64, 0), 1)
    masks = batch.mask
    assert (masks.shape, masks.dtype) == ((3, 1, 8, 8), torch.float32)
    for caption, image, mask in zip(batch.captions, batch.images, masks, strict=True):
        red = image[..., 0].float().unflatten(0, (8, 8)).unflatten(2, (8, 8)).mean(dim=(1, 3)) / 255
        torch.testing.assert_close(mask[0], red if caption == "a" else torch.ones(8, 8), atol=0.003, rtol=0)


# Cached latents.


def latent_shard(path, count: int = 3, side: int = 8, **also) -> None:
    with wds.TarWriter(str(path)) as tar:
        for i in range(count):
            posterior = torch.full((8, side, side), float(i))
            files = {"safetensors": pack_latents(Decoded(posterior.numpy(), (100 + i, 200), (i, 5))), "txt": f"number {i}"}
            tar.write({"__key__": f"{i:03}", **files, **also})


def test_latents_come_as_they_are_with_their_sizes(tmp_path):
    latent_shard(tmp_path / "a.tar")
    seen = stream(tmp_path, bs=3)
    assert seen.source.has_latents
    batch = next(iter(make_loader(seen, pin_memory=False)))
    assert (batch.images.shape, batch.images.dtype) == ((3, 8, 8, 8), torch.float16)
    for caption, posterior, original, crop in zip(
        batch.captions, batch.images, batch.original_size.tolist(), batch.crop.tolist(), strict=True
    ):
        i = int(caption.split()[1])
        assert torch.equal(posterior, torch.full((8, 8, 8), float(i)).half())
        assert (original, crop) == ([100 + i, 200], [i, 5])


def test_latents_of_several_buckets_and_mirrored_ones(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i, (height, width) in enumerate([(4, 16), (8, 8), (8, 8), (16, 4)]):
            values = np.full((8, height, width), float(i))
            packed = pack_latents(Decoded(values, (10, 10), (0, 1)), Decoded(-values, (10, 10), (0, 2)))
            tar.write({"__key__": f"{i}", "safetensors": packed, "txt": f"number {i}"})
    seen = stream(tmp_path, bs=1, bucket_step=16, flip=True)
    assert seen.source.has_mirrored
    for batch in islice(seen, 24):
        i, side = int(batch.captions[0].split()[1]), batch.size[0] // 8
        assert batch.images.shape == (1, 8, *side)
        assert batch.images.abs().eq(i).all()
        if i:
            assert batch.crop.tolist() == ([[0, 2]] if batch.images.flatten()[0] < 0 else [[0, 1]])
    signs = [batch.images.flatten()[0].sign().item() for batch in islice(seen, 24)]
    assert {-1.0, 1.0} <= set(signs)


def test_latents_with_masks(tmp_path):
    (plain, other), values = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8), np.zeros((8, 8, 8))
    (tmp_path / "a").mkdir()
    with wds.TarWriter(str(tmp_path / "a/a.tar")) as tar:
        packed = pack_latents(Decoded(values, (10, 10), (0, 1), plain), Decoded(values + 1, (10, 10), (0, 2), other))
        tar.write({"__key__": "0", "safetensors": packed, "txt": "a"})
    source = open_source(str(tmp_path / "a"))
    assert (source.has_masks, source.has_mirrored) == (True, True)
    seen = set()
    for batch in islice(Stream(source, DataConfig(bs=1, flip=True, masked_loss=True), CaptionConfig(), 64, 0), 20):
        flipped = bool(batch.images.any())
        assert torch.equal(batch.mask[0, 0], torch.from_numpy(other if flipped else plain) / 255)
        seen.add(flipped)
    assert seen == {False, True}
    assert next(iter(stream(tmp_path / "a", bs=1))).mask is None
    latent_shard(tmp_path / "b.tar")
    assert not open_source(str(tmp_path / "b.tar")).has_masks
    assert not open_mixture((str(tmp_path / "a"), str(tmp_path / "b.tar"))).has_masks


def test_latents_that_do_not_fit_are_refused(tmp_path, shards):
    latent_shard(tmp_path / "a.tar")
    assert not open_source(str(tmp_path)).has_mirrored
    with pytest.raises(UserError, match=r"a\.tar:000 holds latents of 64 × 64 pixels, which is no bucket of --resolution 128"):
        stream(tmp_path, resolution=128)
    latent_shard(tmp_path / "b.tar", side=16)
    with pytest.raises(UserError, match=r"b\.tar:000 holds latents of 128 × 128 pixels"):
        stream(tmp_path)
    for shard in shards.glob("*.tar"):
        shutil.copy(shard, tmp_path)
    with pytest.raises(UserError, match=r"^photos-000002\.tar and b\.tar hold both images and latents"):
        open_source(str(tmp_path))


def test_damaged_latents_are_skipped_like_a_damaged_image(tmp_path):
    latent_shard(tmp_path / "a.tar", count=2)
    with wds.TarWriter(str(tmp_path / "b.tar")) as tar:
        tar.write({"__key__": "x", "safetensors": b"no latents", "txt": "broken"})
    batch = next(iter(stream(tmp_path, bs=3)))
    assert batch.skipped == ["b.tar:x"]
    assert batch.images.shape == (3, 8, 8, 8)


def test_a_worker_prints_no_error_of_a_lost_connection_but_all_others(capfd):
    for error in (EOFError(), ConnectionResetError(), BrokenPipeError(), ConnectionRefusedError()):
        hide_lost_connection(type(error), error, None)
    assert capfd.readouterr().err == ""
    hide_lost_connection(ValueError, ValueError("news"), None)
    assert "ValueError: news" in capfd.readouterr().err


def test_signals_are_blocked_only_while_workers_are_forked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with blocked_signals():
        assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
