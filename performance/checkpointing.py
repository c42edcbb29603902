"""Gradient checkpointing and torch.compile, block by block."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174).
BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}


def block_names(model: nn.Module) -> list[str]:
    """Paths of the transformer and residual blocks of `model`: the units of checkpointing and compiling."""
    return [name for name, module in model.named_modules() if type(module).__name__ in BLOCKS]


def checkpoint_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Makes these blocks keep only their input, and recompute their activations in the backward pass.

    The blocks draw no random numbers, so the state of the generators is not saved.
    """
    for name in names:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Compiles each block on its own: blocks of the same class and shapes share the compiled code."""
    torch._dynamo.config.recompile_limit = 64  # one entry for each class and shape of block; the default of 8 is too few
    for name in names:
        block = model.get_submodule(name)
        block.forward = torch.compile(block.forward, dynamic=False)
