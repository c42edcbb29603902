"""Aspect-ratio buckets: their sizes, which one an image is put into, and the endless order of batches, each of one bucket."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from dataset.images import Size

# What a generator is for, as the last of its four numbers. NumPy takes missing numbers for zeros: without these, [seed, 3] of
# epoch 3 would draw the same as [seed, 3, 0] of part 3.
MEMBERS, MIXTURE = 1, 2


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """All (height, width) in multiples of `step` with 0.9 to 1 times the area of the square of side `resolution` and with sides
    from half to twice `resolution`; and the square itself.

    For 1024 and 64 these are the sizes that SDXL was trained on (Podell et al. 2023, arXiv:2307.01952, appendix I).
    """
    sides = range(max(step, resolution // 2 // step * step), 2 * resolution + 1, step)
    area = resolution**2
    pairs = {(h, w) for h in sides for w in sides if 0.9 * area <= h * w <= area}
    return sorted(pairs | {(resolution, resolution)})


def resized(original: Size, bucket: Size) -> Size:
    """The smallest (height, width) that has the aspect ratio of the image and covers the bucket."""
    scale = max(bucket[0] / original[0], bucket[1] / original[1])
    return max(bucket[0], round(original[0] * scale)), max(bucket[1], round(original[1] * scale))


Sides = tuple[np.ndarray, np.ndarray]  # heights and widths in pixels, of as many images as there are


def share_cropped(original: Size | Sides, bucket: Size | Sides) -> np.ndarray:
    """Share of each image, 0 … 1, that is cropped away once it has been `resized` to cover the bucket."""
    scale = enlarged(original, bucket)
    height = np.maximum(bucket[0], np.rint(original[0] * scale))
    width = np.maximum(bucket[1], np.rint(original[1] * scale))
    return 1 - bucket[0] * bucket[1] / (height * width)


def enlarged(original: Size | Sides, bucket: Size | Sides) -> np.ndarray:
    """Factor by which each image is scaled to cover the bucket: above 1 it has fewer pixels than the bucket."""
    return np.maximum(bucket[0] / original[0], bucket[1] / original[1])


def choose_bucket(original: Size, sizes: list[Size]) -> int:
    """Index of the size that crops the image least; among equals, of the largest."""
    cropped = [round(float(share_cropped(original, size)), 6) for size in sizes]
    return min(range(len(sizes)), key=lambda i: (cropped[i], -sizes[i][0] * sizes[i][1]))


def choose_buckets(originals: Sides, sizes: list[Size]) -> np.ndarray:
    """`choose_bucket` of each image. Asked one by one only where two sizes crop about the same: 160,000 of them would take
    20 seconds.
    """
    chosen = np.zeros(len(originals[0]), np.int64)
    least, second = np.full((2, len(chosen)), np.inf)
    for i, size in enumerate(sizes):
        cropped = share_cropped(originals, size)
        better = cropped < least
        second = np.where(better, least, np.minimum(second, cropped))
        least, chosen = np.minimum(least, cropped), np.where(better, i, chosen)
    for n in np.flatnonzero(second - least < 2e-6):
        chosen[n] = choose_bucket((int(originals[0][n]), int(originals[1][n])), sizes)
    return chosen


class Order:
    """Endless batches of sample numbers. Batch k is a function of (seed, k).

    Every epoch draws every sample once, in a new order; a batch is ready as soon as `bs` samples of one bucket have been drawn.
    Samples left in a bucket at the end of an epoch wait for the next: no image is dropped, no batch is short.
    `bucket` [N] is the number of each sample's bucket, `part` [N] that of the data set it comes from. With `shares`, which add
    up to 1, an epoch has `size` draws, and each part gets its share of them: its samples are drawn more or less than once.
    """

    def __init__(
        self, bucket: np.ndarray, bs: int, seed: int, part: np.ndarray | None = None, shares: Sequence[float] = (),
        size: float | None = None,
    ):  # fmt: skip
        """`size`: draws of an epoch, rounded up; None: N."""
        self.bucket, self.bs, self.seed, self.part, self.shares = bucket, bs, seed, part, shares
        self.size = math.ceil(size or len(bucket))
        self.dtype = np.int32 if max(self.size, len(bucket)) < 2**30 else np.int64  # of the numbers of samples: half the memory

    def epoch(self, number: int) -> np.ndarray:
        """Sample numbers [size] in the order in which the epoch draws them."""
        size = self.size
        if not self.shares:
            return np.random.default_rng([self.seed, number]).permutation(np.arange(size, dtype=self.dtype))
        # How many draws each part has had before and after this epoch. Example: N = 10, shares (0.75, 0.25). boundaries · N · n
        # is rounded down to [0, 7, 10] after n = 1 epoch and to [0, 15, 20] after n = 2, so the parts have had 7 and 3 draws,
        # then 15 and 5: epoch 1 takes draws 7 … 14 of part 0 and draws 3 … 4 of part 1. As all is counted from the start of
        # training, rounding errors do not add up; as the last boundary is exactly 1, every epoch has N draws. Repeats give a
        # part a whole number of draws: the little that is added makes up for a product that is just below it.
        boundaries = np.array([*np.cumsum([0, *self.shares])[:-1], 1])
        before, after = (np.diff(np.floor(boundaries * size * n + 1e-6).astype(int)) for n in (number, number + 1))
        drawn = []
        for part, (begin, end) in enumerate(zip(before, after, strict=True)):
            members = np.flatnonzero(self.part == part).astype(self.dtype)
            rounds = range(begin // len(members), (end - 1) // len(members) + 1)  # in each, every member is drawn once
            order = [members[np.random.default_rng([self.seed, part, r, MEMBERS]).permutation(len(members))] for r in rounds]
            first = rounds.start * len(members)  # number of the part's draw with which `order` begins
            drawn += [np.concatenate(order)[begin - first : end - first]] if order else []
        return np.random.default_rng([self.seed, number, 0, MIXTURE]).permutation(np.concatenate(drawn))

    def batches(self, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batch `start` and all that follow: (numbers of the draws [bs], numbers of the samples [bs]).

        Draws are numbered from the beginning of training; the number of a draw seeds its random choices, such as flipping.
        Batches before `start` are only counted: an epoch of a million samples takes a tenth of a second.
        """
        counted, size = 0, self.size
        draws, samples = np.empty(0, np.int64), np.empty(0, self.dtype)  # those that are in no batch yet
        for epoch in count():
            draws = np.concatenate([draws, np.arange(epoch * size, (epoch + 1) * size)])
            samples = np.concatenate([samples, self.epoch(epoch)])
            buckets = self.bucket[samples]
            groups = [np.flatnonzero(buckets == b).astype(self.dtype) for b in np.unique(buckets)]
            rows = np.concatenate([group[: len(group) // self.bs * self.bs].reshape(-1, self.bs) for group in groups])
            del groups
            rows = rows[np.argsort(rows[:, -1])]  # [batches, bs] in order of the last draw, with which a batch is ready
            for row in rows[max(0, start - counted) :]:
                yield draws[row], samples[row]
            counted += len(rows)
            waiting = np.ones(len(draws), bool)
            waiting[rows] = False
            draws, samples = draws[waiting], samples[waiting]
