from collections import Counter
from itertools import islice

import numpy as np
import pytest

from dataset.buckets import Order, bucket_sizes, choose_bucket, enlarged, resized, share_cropped


def test_sizes_are_those_of_sdxl():
    sizes = bucket_sizes(1024, 64)
    assert {(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (640, 1536), (512, 2048), (896, 1152)} <= set(sizes)
    assert len(sizes) == 41
    assert all(h % 64 == w % 64 == 0 and 0.9 * 1024**2 <= h * w <= 1024**2 for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert bucket_sizes(64, 64) == [(64, 64)]
    assert (1000, 1000) in bucket_sizes(1000, 64)


@pytest.mark.parametrize("original", [(1024, 1024), (3000, 2000), (50, 777), (777, 50), (1, 1), (1365, 1000)])
def test_the_bucket_that_crops_least(original):
    sizes = bucket_sizes(1024, 64)
    chosen = sizes[choose_bucket(original, sizes)]
    assert share_cropped(original, chosen) == min(share_cropped(original, size) for size in sizes)
    covering = resized(original, chosen)
    assert min(c - s for c, s in zip(covering, chosen, strict=True)) == 0  # as small as it can be
    assert enlarged(original, chosen) == pytest.approx(max(c / o for c, o in zip(chosen, original, strict=True)))
    if original in sizes:
        assert (chosen, covering) == (original, original)


def draw(order: Order, count: int, start: int = 0) -> list[tuple[list[int], list[int]]]:
    return [(draws.tolist(), samples.tolist()) for draws, samples in islice(order.batches(start), count)]


@pytest.mark.parametrize("bs", [1, 3, 7])
def test_no_image_is_dropped_and_no_batch_is_mixed(bs):
    bucket = np.array([0] * 10 + [1] * 5 + [2])  # one image alone in its bucket
    batches = draw(Order(bucket, bs, 0), 20 * 16 // bs)
    assert all(len(samples) == bs and len({bucket[n] for n in samples}) == 1 for _, samples in batches)
    seen = Counter(n for _, samples in batches for n in samples)
    assert max(seen.values()) <= 21
    assert min(seen[n] for n in range(15)) >= 20 - bs
    assert seen[15] >= 20 // bs * bs - bs  # it waits until it fills a batch
    draws = [d for draws, _ in batches for d in draws]
    assert len(set(draws)) == len(draws)
    epochs = {d: n for draws, samples in batches for d, n in zip(draws, samples, strict=True)}
    for epoch in range(15):  # nothing comes twice in an epoch, and nothing but what waits is missing
        drawn = [epochs[d] for d in range(16 * epoch, 16 * epoch + 16) if d in epochs]
        assert len(set(drawn)) == len(drawn) >= 16 - 3 * (bs - 1)


def test_order_is_a_function_of_seed_and_number():
    bucket = np.random.default_rng(0).integers(0, 4, 50)
    whole = draw(Order(bucket, 3, 0), 60)
    assert draw(Order(bucket, 3, 0), 60) == whole
    assert draw(Order(bucket, 3, 1), 60) != whole
    for start in (1, 15, 17, 33, 59):
        assert draw(Order(bucket, 3, 0), 60 - start, start) == whole[start:]


def test_no_two_purposes_share_a_generator(monkeypatch):
    """NumPy takes [3, 1] for [3, 1, 0]: epoch 1 would draw as round 0 of part 1."""
    states, make = Counter(), np.random.default_rng

    def recorded(entropy: list[int]) -> np.random.Generator:
        states[tuple(np.random.SeedSequence(entropy).generate_state(4))] += 1
        return make(entropy)

    monkeypatch.setattr("numpy.random.default_rng", recorded)
    order = Order(np.zeros(12, int), 1, 3, np.repeat([0, 1, 2], 4), (0.25, 0.25, 0.5))
    drawn = [order.epoch(number) for number in range(6)]
    assert sum(states.values()) > 6 * 3
    rounds = {(part, r) for part, share in enumerate(order.shares) for r in range(int(6 * 12 * share / 4 + 0.99))}
    assert len(states) == 6 + len(rounds)
    assert all(len(epoch) == 12 for epoch in drawn)


def test_the_order_without_a_mixture_is_that_of_earlier_versions():
    assert Order(np.zeros(8, int), 1, 5).epoch(2).tolist() == np.random.default_rng([5, 2]).permutation(8).tolist()


def test_epochs_differ_and_are_even():
    samples = [n for _, (n,) in draw(Order(np.zeros(30, int), 1, 0), 3000)]
    epochs = [samples[i : i + 30] for i in range(0, 3000, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    firsts = Counter(epoch[0] for epoch in epochs)
    assert len(firsts) > 20
    assert max(firsts.values()) < 13
