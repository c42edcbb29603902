"""A thousand pictures of sixty sizes, one in twenty broken: each good one is seen once per epoch, each broken one is named."""

from collections import Counter

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import encoded
from PIL import Image, ImageDraw

from data import Stream, make_loader
from dataset.sources import Source, open_source
from options.training import CaptionConfig, DataConfig

COUNT = 1000
SIZES = [tuple(size) for size in np.random.default_rng(0).integers(40, 161, (60, 2)).tolist()]  # width, height
KINDS = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")]
BOMB = encoded(Image.new("1", (20_000, 20_000)))
WAYS = [  # (image, text) of a good sample -> those of a broken one
    lambda image, text: (b"", text),
    lambda image, text: (image[:30], text),
    lambda image, text: (image[: len(image) // 2], text),
    lambda image, text: (b"<!DOCTYPE html><title>404 Not Found</title>", text),
    lambda image, text: (bytes(len(image)), text),
    lambda image, text: (BOMB, text),
    lambda image, text: (text, image),
    lambda image, text: (image, b""),
    lambda image, text: (image, b" \n"),
    lambda image, text: (image, text * 200_000),
]


def colour(n: int) -> tuple[int, int, int]:
    """The colour of picture n, which no other picture has."""
    return 25 * (n % 10), 25 * (n // 10 % 10), 25 * (n // 100)


def picture(n: int) -> Image.Image:
    image = Image.new("RGB", SIZES[n % 60], colour(n))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, image.width - 1, image.height - 1), outline="white")
    draw.text((image.width / 2, image.height / 2), str(n), fill="white", anchor="mm")
    return image


def broken(n: int) -> bool:
    return n % 20 == 7


@pytest.fixture(scope="module")
def samples() -> list[tuple[str, str, bytes, bytes]]:
    """(key, extension, image, text); every way of being broken five times."""
    made = []
    for n in range(COUNT):
        kind, extension = KINDS[n % 3]
        image, text = encoded(picture(n), kind, quality=90), f"number {n}".encode()
        made.append((f"{n:04}", extension, *(WAYS[n // 20 % 10](image, text) if broken(n) else (image, text))))
    return made


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory) -> tuple[Source, set[str]]:
    """(the pictures in a folder, the names of the broken ones)."""
    path, names = tmp_path_factory.mktemp("folder"), set()
    for n, (key, extension, image, text) in enumerate(samples):
        (path / f"{key}.{extension}").write_bytes(image)
        (path / f"{key}.txt").write_bytes(text)
        names |= {str(path / f"{key}.{extension}")} if broken(n) else set()
    return open_source(str(path)), names


@pytest.fixture(scope="module")
def shards(samples, tmp_path_factory) -> tuple[Source, set[str]]:
    """(the pictures in shards, the names of the broken ones)."""
    path, names = tmp_path_factory.mktemp("shards"), set()
    for first in range(0, COUNT, 250):
        with wds.TarWriter(str(path / f"{first}.tar")) as tar:
            for n, (key, extension, image, text) in enumerate(samples[first : first + 250], first):
                tar.write({"__key__": key, extension: image, "txt": text})
                names |= {f"{first}.tar:{key}"} if broken(n) else set()
    return open_source(str(path)), names


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_every_good_image_once_per_epoch_and_every_broken_one_named(kind, world, request):
    source, names = request.getfixturevalue(kind)
    streams = [Stream(source, DataConfig(bs=4, bucket_step=16), CaptionConfig(), 64, 0, rank, world) for rank in range(world)]
    images = np.bincount(streams[0].bucket)
    filled = [sum(epochs * images // 4) for epochs in (1, 2)]  # batches of the first epoch, of the first two
    loaders = [make_loader(stream, pin_memory=False) for stream in streams]
    drawn, skipped = Counter(), set()
    for number in range(filled[1]):
        batch = next(loaders[number % world])
        assert batch.images.shape == (4, *batch.size[0], 3)
        numbers = [int(caption.removeprefix("number ")) for caption in batch.captions]
        for n, image, size in zip(numbers, batch.images, batch.original_size.tolist(), strict=True):
            assert tuple(size) == SIZES[n % 60][::-1]
            assert (image.flatten(0, 1).median(dim=0).values - torch.tensor(colour(n))).abs().max() < 12
        own = 4 - len(batch.skipped)  # the last ones replace the broken images
        assert set(numbers[own:]) <= set(numbers[:own]) or not own
        drawn.update(numbers[:own] + batch.skipped)
        skipped.update(batch.skipped)
        if number + 1 in filled:
            epochs = filled.index(number + 1) + 1
            waiting = sum(epochs * images % 4)  # until their bucket fills a batch
            times = Counter(drawn.values()) + Counter({0: source.samples - len(drawn)})
            assert times == Counter({epochs: source.samples - waiting, epochs - 1: waiting})
    assert {n for n in drawn if isinstance(n, int)} == {n for n in range(COUNT) if not broken(n)}
    refused = {line.partition(" (its caption")[0] for line in source.refused}
    assert skipped | set(source.uncaptioned) | refused == names
