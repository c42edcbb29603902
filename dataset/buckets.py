"""Aspect-ratio buckets: their sizes, the one that an image goes to, and the endless order of batches, each of one bucket."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from dataset.images import Size


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """Sizes in multiples of `step` of 0.9 to 1 times the area of the square, sides from half to twice its own; and the square.

    For 1024 and 64 these are the sizes that SDXL was trained on (Podell et al. 2023, arXiv:2307.01952, appendix I).
    """
    sides = range(max(step, resolution // 2 // step * step), 2 * resolution + 1, step)
    area = resolution**2
    pairs = {(h, w) for h in sides for w in sides if 0.9 * area <= h * w <= area}
    return sorted(pairs | {(resolution, resolution)})


def resized(original: Size, bucket: Size) -> Size:
    """The smallest size with the aspect ratio of the image that covers the bucket."""
    scale = max(bucket[0] / original[0], bucket[1] / original[1])
    return max(bucket[0], round(original[0] * scale)), max(bucket[1], round(original[1] * scale))


def share_cropped(original: Size, bucket: Size) -> float:
    """Of the image, once it has been made to cover the bucket: 0 … 1."""
    height, width = resized(original, bucket)
    return 1 - bucket[0] * bucket[1] / (height * width)


def enlarged(original: Size, bucket: Size) -> float:
    """By how much a side of the image grows to cover the bucket: above 1 it has fewer pixels than the bucket."""
    return max(bucket[0] / original[0], bucket[1] / original[1])


def choose_bucket(original: Size, sizes: list[Size]) -> int:
    """The number of the size that crops least; of equals the largest."""
    return min(range(len(sizes)), key=lambda i: (round(share_cropped(original, sizes[i]), 6), -sizes[i][0] * sizes[i][1]))


class Order:
    """Endless batches of sample numbers, a function of (seed, number of the batch).

    Every epoch draws every sample once, in a new order; a batch is ready as soon as its bucket has `bs` samples of those
    drawn so far. What is left in a bucket at the end of an epoch waits for the next: no image is dropped, no batch is short.
    `bucket` [N] is the number of each sample's bucket, `part` [N] that of the data set it comes from. With `shares`, which add
    up to 1, an epoch still has N draws, but a part gets its share of them and is seen more or less often than once.
    """

    def __init__(self, bucket: np.ndarray, bs: int, seed: int, part: np.ndarray | None = None, shares: Sequence[float] = ()):
        self.bucket, self.bs, self.seed, self.part, self.shares = bucket, bs, seed, part, shares

    def epoch(self, number: int) -> np.ndarray:
        """Sample numbers [N] in the order in which the epoch draws them."""
        size, rng = len(self.bucket), np.random.default_rng([self.seed, number])
        if not self.shares:
            return rng.permutation(size)
        marks = np.array([*np.cumsum([0, *self.shares])[:-1], 1])
        ends = [np.floor(marks * size * n).astype(int) for n in (number, number + 1)]
        drawn = []
        for part, (begin, end) in enumerate(zip(*(np.diff(e) for e in ends), strict=True)):
            mine = np.flatnonzero(self.part == part)
            rounds = range(begin // len(mine), (end - 1) // len(mine) + 1)  # the part goes through its own samples in turn
            order = [mine[np.random.default_rng([self.seed, part, r]).permutation(len(mine))] for r in rounds]
            skipped = rounds.start * len(mine)
            drawn += [np.concatenate(order)[begin - skipped : end - skipped]] if order else []
        return rng.permutation(np.concatenate(drawn))

    def batches(self, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batch `start` and all that follow: (numbers of the draws [bs], numbers of the samples [bs]).

        The draws are counted from the beginning of training on: what is random about one is a function of its number.
        Batches before `start` are counted, not read: an epoch of a million samples takes a tenth of a second.
        """
        passed, size = 0, len(self.bucket)
        draws, samples = np.empty(0, np.int64), np.empty(0, np.int64)  # left over
        for epoch in count():
            draws = np.concatenate([draws, np.arange(epoch * size, (epoch + 1) * size)])
            samples = np.concatenate([samples, self.epoch(epoch)])
            of = self.bucket[samples]
            groups = [np.flatnonzero(of == b) for b in np.unique(of)]
            rows = np.concatenate([group[: len(group) // self.bs * self.bs].reshape(-1, self.bs) for group in groups])
            rows = rows[np.argsort(rows[:, -1])]  # ready when the last one is drawn
            for row in rows[max(0, start - passed) :]:
                yield draws[row], samples[row]
            passed += len(rows)
            left = np.ones(len(draws), bool)
            left[rows] = False
            draws, samples = draws[left], samples[left]
