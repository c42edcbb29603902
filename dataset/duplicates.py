"""Which images of many are the same, or nearly: by SHA-256, and by `images.dhash`."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from itertools import pairwise

import numpy as np

BITS = 64
LIMIT = 6  # of them: so many differ at most in copies of half the size, at JPEG quality 30, 20 % brighter; in others 8 or more


def equal_images(hashes: Iterable[Hashable]) -> list[list[int]]:
    """Numbers of those that share their hash, from two up, each group and the groups in the order of the first."""
    found = defaultdict(list)
    for n, digest in enumerate(hashes):
        found[digest].append(n)
    return [group for group in found.values() if len(group) > 1]


def similar_images(hashes: np.ndarray, limit: int = LIMIT) -> list[list[int]]:
    """[N] uint64 -> numbers of those that differ in at most `limit` bits, directly or over others, as `same`."""
    values, number = np.unique(hashes, return_inverse=True)
    leader = np.arange(len(values))

    def lead(n: int) -> int:
        while leader[n] != n:
            leader[n] = n = leader[leader[n]]
        return n

    for one, other in close_pairs(values, limit):
        leader[lead(other)] = lead(one)
    return equal_images(lead(n) for n in number)


def close_pairs(values: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Numbers of any two that differ in at most `limit` bits.

    Of limit + 1 bands of bits two such agree in at least one, so only those that agree in a band are compared.
    """
    edges = np.linspace(0, BITS, limit + 2).astype(int).tolist()
    for low, high in pairwise(edges):
        band = values >> np.uint64(low) & np.uint64((1 << high - low) - 1)
        order = np.argsort(band, kind="stable")
        band, told = band[order], values[order]
        at = np.arange(len(values))
        for step in range(1, len(values)):
            at = at[at + step < len(values)]
            at = at[band[at + step] == band[at]]  # what is no neighbour at this distance is none farther on
            if not len(at):
                break
            close = at[np.bitwise_count(told[at] ^ told[at + step]) <= limit]
            yield from zip(order[close].tolist(), order[close + step].tolist(), strict=True)
