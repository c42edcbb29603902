"""Gradient checkpointing, block by block (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

# Self-attention, cross-attention and feed-forward of a transformer block, each with its norm; residual blocks; layers of CLIP.
PARTS_OF_BLOCKS = {"Attention", "FeedForward", "ResnetBlock2D", "CLIPEncoderLayer"}
BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}


def block_names(model: nn.Module, whole: bool = False) -> list[str]:
    """Paths of the parts of blocks of `model` that can be checkpointed, none inside another; or of whole blocks, of which all
    together keep a third as many inputs. `use_fast_layers` has been there.
    """
    kinds = BLOCKS if whole else PARTS_OF_BLOCKS
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds]


def checkpoint_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Makes these blocks keep only their input, and recompute their activations in the backward pass.

    The blocks draw no random numbers, so the state of the generators is not saved.
    """
    for name in names:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
