"""Finds images that are equal, by their SHA-256, or nearly equal, by `images.dhash`."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from itertools import pairwise

import numpy as np

BITS = 64
# An image and its copy of half the size, at JPEG quality 30 or 20 % brighter differ in up to this many bits; different images
# in 8 or more.
LIMIT = 6


def equal_images(hashes: Iterable[Hashable]) -> list[list[int]]:
    """Groups of two or more indices with the same hash. Each group is sorted, and the groups are by their first index."""
    found = defaultdict(list)
    for n, digest in enumerate(hashes):
        found[digest].append(n)
    return [group for group in found.values() if len(group) > 1]


def similar_images(hashes: np.ndarray, limit: int = LIMIT) -> list[list[int]]:
    """[N] uint64 -> groups as of `equal_images`, of hashes that differ in at most `limit` bits, directly or through others."""
    values, number = np.unique(hashes, return_inverse=True)
    parent = np.arange(len(values))  # union-find

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = n = parent[parent[n]]
        return n

    for first, second in close_pairs(values, limit):
        parent[root(second)] = root(first)
    return equal_images(root(n) for n in number)


def close_pairs(values: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Indices of every two values that differ in at most `limit` bits; a pair may come several times.

    The bits are cut into limit + 1 bands. Two such values agree in at least one band, so only values that share a band are
    compared.
    """
    edges = np.linspace(0, BITS, limit + 2).astype(int).tolist()
    for low, high in pairwise(edges):
        band = values >> np.uint64(low) & np.uint64((1 << high - low) - 1)
        order = np.argsort(band, kind="stable")
        band, ordered = band[order], values[order]
        at = np.arange(len(values))  # positions whose band equals that of the value `step` places on
        for step in range(1, len(values)):
            at = at[at + step < len(values)]
            at = at[band[at + step] == band[at]]  # bands are sorted: one that differs at this distance differs at larger ones
            if not len(at):
                break
            close = at[np.bitwise_count(ordered[at] ^ ordered[at + step]) <= limit]
            yield from zip(order[close].tolist(), order[close + step].tolist(), strict=True)
