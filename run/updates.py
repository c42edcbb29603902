"""What may be done to an update beside AdamW: learning rates of parts of an adapter, and a limit of the norm of every ΔW. Both
work on the device, on the whole buffer at once, and have no state.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora import Adapter, padded_size
from options.training import LoRAConfig, first_match
from performance.adamw8bit import STATE_BLOCK


def by_block(adapter: Adapter, values: list[tuple[float, float]], dtype: torch.dtype) -> Tensor:
    """(value for A, value for B) of every layer -> that of each STATE_BLOCK of `adapter.flat`, none of which holds two of them,
    [blocks, 1].
    """
    factors = [factor for A, B, _ in adapter.deltas.values() for factor in (A, B)]
    counts = torch.tensor([padded_size(factor.numel()) // STATE_BLOCK for factor in factors])
    flat = torch.tensor([value for pair in values for value in pair], dtype=dtype)
    return flat.repeat_interleave(counts)[:, None].to(adapter.flat.device)


class PartRates:
    """Learning rates of single layers (--lr-pattern), and of every B (--lora-plus), as multiples of those of their group.

    AdamW's change is proportional to its learning rate, weight decay included: inside this context every weight is changed by
    the rate of its group, and at its end it is moved along the same line by its own. So the order of the buffer, the states and
    the weights with a multiple of 1 are bit for bit those of a run without. Costs a copy of the weights meanwhile.
    """

    def __init__(self, adapter: Adapter, config: LoRAConfig):
        rates = [first_match("--lr-pattern", config.lr_pattern, name, 1.0) for name in adapter.deltas]
        self.blocks = adapter.flat.view(-1, STATE_BLOCK)
        self.multiples = by_block(adapter, [(rate, rate * (config.lora_plus or 1.0)) for rate in rates], torch.float32)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = self.blocks.clone()
        yield
        torch.lerp(before, self.blocks, self.multiples, out=self.blocks)
