"""Seeds of PyTorch's generators."""

import random

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """63 random bits that are a function of (seed, step, place of the batch in it, …)."""
    return random.Random(str(parts)).getrandbits(63)


def seed_generator(generator: torch.Generator, seed: int) -> torch.Generator:
    """generator.manual_seed(seed), but all 63 bits of the seed count on the CPU, too.

    PyTorch's generator there, a Mersenne Twister, takes the lower 32 bits; a larger seed fills its 624 words directly, which
    in the bytes of its state begin at the 24th, each in 8 bytes. A seed below 2**32 gives PyTorch's own numbers.
    """
    generator.manual_seed(seed)
    if generator.device.type == "cpu" and seed >= 2**32:
        words = np.random.SeedSequence(seed).generate_state(624).astype(np.int64)
        state = generator.get_state()
        state[24 : 24 + words.nbytes].view(torch.int64).copy_(torch.from_numpy(words))
        generator.set_state(state)
    return generator
