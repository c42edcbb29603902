"""The gradient of one optimiser step, tried again in smaller pieces where memory runs out."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from common.errors import warn
from data import Batch
from lora import Adapter
from memory import describe_out_of_memory
from model.diffusion import Diffusion
from performance.cuda_graph import GraphedStep
from run.setup import TrainingModel


class Step(Protocol):
    """train_lora.TrainStep, as this package uses it."""

    model: TrainingModel
    adapter: Adapter
    diffusion: Diffusion
    graphed: GraphedStep  # of `backward`

    def gradient(self, batches: list[Batch], step: int, piece: int) -> Tensor: ...

    def inputs(self, batch: Batch, step: int, index: int) -> Any: ...

    def backward(self, x: Any) -> Tensor: ...


def rows_of(inputs: Any, rows: slice) -> Any:
    """Some of the samples of a step's inputs, a (nested, named) tuple of tensors [B, …] and None."""
    return tree_map_only(Tensor, lambda tensor: tensor[rows], inputs)


class Accumulation:
    """The gradient of all batches of one optimiser step, from at most `piece` images at once.

    Where an attempt finds no memory, its part of the gradient is zeroed, the memory of the graphs is given up, and the step is
    made again from its batches in pieces half as large, from then on: twice in a run. After that it has `failed`, and there is
    no gradient. Each rank does so by itself: the others wait for it, and compute the same as without it.
    """

    def __init__(self, step: Step, piece: int, advice: str):
        """`advice`: what the user can do where memory runs out."""
        self.step, self.piece, self.advice = step, piece, advice
        self.attempts = 3  # left
        step.adapter.on_freeze.append(step.graphed.release)

    @property
    def failed(self) -> bool:
        return self.attempts == 0

    def __call__(self, batches: list[Batch], number: int) -> Tensor | None:
        """The mean loss of step `number`, counted from 0, [] on the device; None if there is no memory, or no batch."""
        while batches and not self.failed:
            try:
                return self.step.gradient(batches, number, self.piece)
            except torch.OutOfMemoryError as error:
                message = f"{describe_out_of_memory(error)}; {self.advice}"
            self.give_way(message)  # out of the except block, which would keep what the attempt has allocated
        return None

    def give_way(self, message: str) -> None:
        self.step.adapter.zero_gradients()
        self.step.graphed.release()
        self.attempts, self.piece = self.attempts - 1, math.ceil(self.piece / 2)
        outcome = "tried twice in halves: the run ends" if self.failed else f"from here on in pieces of {self.piece}"
        warn(f"{message}; {outcome}")
