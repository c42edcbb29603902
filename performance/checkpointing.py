"""Blocks that compute their activations again, or are compiled."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174).
BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}


def block_names(model: nn.Module) -> list[str]:
    """Paths of the transformer and residual blocks of `model`: what can be recomputed, and compiled, one by one."""
    return [name for name, module in model.named_modules() if type(module).__name__ in BLOCKS]


def checkpoint_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """These blocks keep their input only and run again in the backward pass.

    They draw no random numbers, so the state of the generators need not be kept.
    """
    for name in names:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """torch.compile of each block by itself: blocks of one kind and shape share the compiled code."""
    torch._dynamo.config.recompile_limit = 64  # one entry for each kind and shape of block
    for name in names:
        block = model.get_submodule(name)
        block.forward = torch.compile(block.forward, dynamic=False)
