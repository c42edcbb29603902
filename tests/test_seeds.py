import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.options import MAX_SEED
from common.seeds import seed_generator, seed_of

SEEDS = st.one_of(st.integers(0, MAX_SEED), st.integers(0, 2**33))


def draw(seed: int) -> torch.Tensor:
    return torch.randn(3, generator=seed_generator(torch.Generator(), seed))


@given(SEEDS, st.integers(0, 62))
def test_every_bit_of_a_seed_counts(seed, bit):
    assert torch.equal(draw(seed), draw(seed))
    assert not torch.equal(draw(seed), draw(seed ^ 2**bit))


@given(st.integers(0, 2**32 - 1))
def test_a_seed_of_32_bits_gives_the_numbers_of_pytorch(seed):
    assert torch.equal(draw(seed), torch.randn(3, generator=torch.Generator().manual_seed(seed)))


def test_a_large_seed_gives_normal_numbers_and_fills_the_state_as_numpy_does():
    generator = seed_generator(torch.Generator(), 2**40)
    numpys = np.random.MT19937(np.random.SeedSequence(2**40))
    words = np.random.SeedSequence(2**40).generate_state(624)
    numpys.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    ours = torch.empty(8, dtype=torch.int64).random_(0, 2**31, generator=generator)
    assert ours.tolist() == (numpys.random_raw(16)[1::2] % 2**31).tolist()  # PyTorch takes two words for an int64
    values = torch.randn(100_000, generator=seed_generator(torch.Generator(), seed_of(1, 2, 3)))
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
