"""The gradient of one optimiser step from all of its batches, and what is done where it finds no memory."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from common.errors import warn


@contextmanager
def note_if_out_of_memory(what: str) -> Iterator[None]:
    """If memory runs out inside, the error says what was being done: the innermost first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(what)
        raise


def describe_out_of_memory(error: torch.OutOfMemoryError) -> str:
    """One line: PyTorch's first sentences, how much was asked for and of what, and what was being done."""
    told = ". ".join(" ".join(str(error).split()).split(". ")[:2])
    return ", ".join(["out of memory", *getattr(error, "__notes__", [])]) + f" ({told})"


class Accumulation:
    """The gradient of all batches of one optimiser step, in pieces of at most `micro` samples.

    `step` must weigh a piece by its samples. Where it finds no memory, `undo` takes back what the attempt has added and gives
    up what memory can be spared, and the step is made again from its batches in pieces half as large, from then on: twice in
    a run. After that it has `failed`, and there is no gradient. Each rank does so by itself: the others wait, and nothing
    differs for them.
    """

    def __init__(
        self, step: Callable[..., Tensor], prepare: Callable[..., tuple[Tensor, ...]], undo: Callable[[], None], micro: int,
        advice: str,
    ):  # fmt: skip
        self.step, self.prepare, self.undo, self.micro, self.advice = step, prepare, undo, micro, advice
        self.halvings = 2

    @property
    def failed(self) -> bool:
        return self.halvings < 0

    def __call__(self, batches: list, number: int) -> Tensor | None:
        """The loss of the step after `number` others, on the device; None if it could not be made."""
        while True:
            try:
                return self.attempt(batches, number)
            except torch.OutOfMemoryError as error:
                told = f"{describe_out_of_memory(error)}; {self.advice}"
            self.undo()  # out of the except block, which would keep what the attempt has allocated
            self.halvings, self.micro = self.halvings - 1, math.ceil(self.micro / 2)
            then = "tried twice in halves: the run ends" if self.failed else f"from here on in pieces of {self.micro}"
            warn(f"{told}; {then}")
            if self.failed:
                return None

    def attempt(self, batches: list, number: int) -> Tensor:
        loss: Any = 0.0
        for micro, batch in enumerate(batches):
            h, w = batch.size[0].tolist()
            with note_if_out_of_memory(f"in step {number + 1}, {self.micro} images of {h} × {w} at once"):
                inputs = self.prepare(batch, number, micro)
                for part in zip(*(tensor.split(self.micro) for tensor in inputs), strict=True):
                    loss = loss + self.step(*part)
        return loss
