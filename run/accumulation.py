"""The gradient of one optimiser step from all of its batches, also where it finds no memory at first."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from common.errors import warn
from data import Batch
from lora import Adapter
from memory import describe_out_of_memory, note_if_out_of_memory
from run.setup import TrainingModel


class Step(Protocol):
    """From a batch to the gradient (train_lora.TrainStep)."""

    model: TrainingModel
    adapter: Adapter

    def inputs(self, batch: Batch, step: int, micro: int) -> Any:
        """Named tuple of tensors [B, …] on the device, for batch `micro` of the step after `step` others."""

    def backward(self, inputs: Any) -> Tensor:
        """Adds the gradient of these samples to `adapter.grad`. Returns their share of the loss, [] on the device."""


class GraphedBackward(Protocol):
    """A step's `backward` as a graph (performance.cuda_graph.GraphedStep)."""

    def __call__(self, inputs: Any) -> Tensor: ...

    def release(self) -> None: ...


def rows_of(inputs: Any, rows: slice) -> Any:
    """Some of the samples of a step's inputs."""
    return tree_map_only(Tensor, lambda tensor: tensor[rows], inputs)


class Accumulation:
    """The gradient of all batches of one optimiser step, in pieces of at most `micro` samples.

    Where an attempt finds no memory, what it has added to the gradient is taken back, the memory of the graphs is given up, and
    the step is made again from its batches in pieces half as large, from then on: twice in a run. After that it has `failed`,
    and there is no gradient. Each rank does so by itself: the others wait for it, and compute the same as without it.
    """

    def __init__(self, step: Step, backward: GraphedBackward, micro: int, advice: str):
        """`advice`: what the user can do where memory runs out."""
        self.step, self.backward, self.micro, self.advice = step, backward, micro, advice
        self.halvings = 2

    @property
    def failed(self) -> bool:
        return self.halvings < 0

    def __call__(self, batches: list[Batch], number: int) -> Tensor | None:
        """The loss of the step after `number` others, [] on the device; None if there is no memory, or no batch."""
        while batches and not self.failed:
            try:
                return self.attempt(batches, number)
            except torch.OutOfMemoryError as error:
                message = f"{describe_out_of_memory(error)}; {self.advice}"
            self.give_way(message)  # out of the except block, which would keep what the attempt has allocated
        return None

    def give_way(self, message: str) -> None:
        self.step.adapter.undo()
        self.backward.release()
        self.halvings, self.micro = self.halvings - 1, math.ceil(self.micro / 2)
        outcome = "tried twice in halves: the run ends" if self.failed else f"from here on in pieces of {self.micro}"
        warn(f"{message}; {outcome}")

    def attempt(self, batches: list[Batch], number: int) -> Tensor:
        loss: Any = 0.0
        for micro, batch in enumerate(batches):
            h, w = batch.size[0].tolist()
            with note_if_out_of_memory(f"in step {number + 1}, {self.micro} images of {h} × {w} at once"):
                inputs = self.step.inputs(batch, number, micro)
                for begin in range(0, len(batch.images), self.micro):
                    loss = loss + self.backward(rows_of(inputs, slice(begin, begin + self.micro)))
        return loss
