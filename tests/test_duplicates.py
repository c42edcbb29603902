import io

import numpy as np
import pytest
from conftest import photograph
from PIL import Image, ImageEnhance

from dataset.duplicates import LIMIT, equal_images, similar_images
from dataset.images import dhash, open_image, to_rgb
from dataset.sources import open_source


def saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


CHANGES = {
    "JPEG": lambda image: saved(image, "JPEG", 30),
    "WebP": lambda image: saved(image, "WEBP", 50),
    "half size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "another shape": lambda image: image.resize((image.width, image.height * 3 // 4), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """The 48 demo images, all in one style, and 50 smooth ones of many sizes."""
    demo = open_source("demo")
    images = [to_rgb(open_image(demo.read_sample(n).image)) for n in range(48)]
    return images + [photograph(i, 300 + i, 200 + 2 * i) for i in range(50)]


def numbers(hashes: list[str]) -> np.ndarray:
    return np.array([int(digits, 16) for digits in hashes], np.uint64)


@pytest.mark.parametrize("change", CHANGES)
def test_only_a_changed_copy_is_similar(pictures, change):
    hashes = [dhash(image) for image in pictures] + [dhash(CHANGES[change](image)) for image in pictures]
    assert similar_images(numbers(hashes)) == [[i, i + len(pictures)] for i in range(len(pictures))]


def test_groups_are_those_of_comparing_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for start in range(0, 240, 30):  # each of 30 differs in some bits from one of the 30 before
        flips = (rng.random((30, 64)) < 0.08) @ (np.uint64(1) << np.arange(64, dtype=np.uint64))
        hashes[start + 30 : start + 60] = hashes[start : start + 30] ^ flips
    for limit in (0, 3, LIMIT, 9):
        close = np.bitwise_count(hashes[:, None] ^ hashes) <= limit
        reach = np.linalg.matrix_power(close.astype(float), 10) > 0  # through up to ten others
        wanted = {tuple(np.flatnonzero(row).tolist()) for row in reach if row.sum() > 1}
        groups = similar_images(hashes, limit)
        assert {*map(tuple, groups)} == wanted
        assert limit < LIMIT or groups
        assert groups == sorted(groups)


def test_equal_images():
    assert equal_images("abcabda") == [[0, 3, 6], [1, 4]]
    assert equal_images([]) == similar_images(np.array([], np.uint64)) == []
