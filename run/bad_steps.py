"""Finds the samples that make a step bad: its loss is not finite, or its gradient overflows at every loss scale.

A bad step has changed nothing, because the optimiser skipped it.
"""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError, warn
from common.files import TolerantWriter, write_atomically
from data import Stream
from options.training import BadStepsConfig
from run.accumulation import Step, rows_of
from run.checkpoints import Run
from run.ending import RunFailed
from run.ranks import Ranks


class BadSteps:
    """Repeats bad steps sample by sample, and counts which samples spoil them."""

    def __init__(self, config: BadStepsConfig, grad_accum: int, run: Run, stream: Stream, train_step: Step, ranks: Ranks):
        self.config, self.grad_accum, self.run, self.stream = config, grad_accum, run, stream
        self.train_step, self.ranks = train_step, ranks

    def examine(self, bad: list[bool]) -> None:
        """`bad`: for each of the last steps, whether it was bad. Called by all ranks.

        Adds to `run.hits` and `run.bad_steps`, and writes what it finds to nonfinite-{step}/ in the folder of the log. Raises
        RunFailed if too many steps in a row were bad.
        """
        if not bad:
            return
        if any(bad):
            self.train_step.graphed.release()  # a step outside of the graphs needs their memory
        for number, was_bad in enumerate(bad, self.run.step - len(bad)):
            self.run.bad_steps = self.run.bad_steps + 1 if was_bad else 0
            if was_bad:
                self.report(number, self.repeat(number))
        if self.run.bad_steps >= self.config.max_bad_steps:
            raise RunFailed(
                f"stopped: {self.run.bad_steps} steps in a row had no finite loss, see {self.run.log_dir}/nonfinite-*"
            )

    def repeat(self, number: int) -> list[dict]:
        """Makes this rank's share of step `number`, counted from 0, once more, sample by sample. The gradient is zero after."""
        adapter, again, found = self.train_step.adapter, copy.copy(self.stream), []
        batches_since = (self.run.step - number) * self.grad_accum * self.ranks.world  # of all ranks, as `start` counts them
        again.start = self.run.samples // self.stream.config.bs - batches_since
        with suppress(torch.OutOfMemoryError, UserError):  # without memory, or data: what was found by then
            for index, batch in zip(range(self.grad_accum), again, strict=False):
                inputs = self.train_step.inputs(batch, number, index)
                for n, (name, caption) in enumerate(zip(batch.names, batch.captions, strict=True)):
                    sample = rows_of(inputs, slice(n, n + 1))
                    with largest_values(self.train_step.model.denoiser) as modules:
                        loss = self.train_step.backward(sample).item()
                    finite = math.isfinite(loss + adapter.grad.sum().item())
                    facts = {"sample": name, "caption": caption, "timestep": sample.timesteps.item(), "modules": modules}
                    found.append({"finite": finite, **facts})
                    adapter.zero_gradients()
        adapter.zero_gradients()
        return found

    def report(self, number: int, found: list[dict]) -> None:
        """Counts the samples that were not finite again, on any rank, and names them."""
        guilty = self.ranks.union({sample["sample"] for sample in found if not sample["finite"]})
        for name in guilty:
            self.run.hits[name] = self.run.hits.get(name, 0) + 1
        file = Path(self.run.log_dir) / f"nonfinite-{number + 1}" / f"rank{self.ranks.rank}.json"
        TolerantWriter()(str(file), partial(write_atomically, file, json.dumps(found, indent=1).encode()))
        if self.ranks.is_first:
            reason = f"by {', '.join(sorted(guilty))}" if guilty else "which could not be repeated"
            warn(f"step {number + 1} had no finite loss or gradient and was skipped, {reason}: see {file.parent}")


def not_finite(losses: list[float], norms: list[float], scale: float) -> list[bool]:
    """For each step whether it is bad. One with a finite loss and an overflow of the gradient is not, while the loss scale is
    above 1: a smaller scale mends that. At a scale of 1 or less the gradient counts, too.
    """
    return [not math.isfinite(loss + (norm if scale <= 1 else 0.0)) for loss, norm in zip(losses, norms, strict=True)]


@contextmanager
def largest_values(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """{path: [largest |activation|, largest |its gradient|]} of every module without children, as the model runs inside.

    NaN where there was one. The host reads every value, so this is for looking into a step, not for every step.
    """
    seen: dict[str, list[float]] = {}

    def note(name: str, which: int, tensor: Tensor) -> None:
        old, new = seen.setdefault(name, [0.0, 0.0]), tensor.detach().abs().max().item()
        if not new <= old[which] and old[which] == old[which]:  # a NaN takes the place of any number, and keeps it
            old[which] = new

    def hook(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            note(name, 0, output)
            if output.requires_grad:
                output.register_hook(partial(note, name, 1))

    leaves = ((name, module) for name, module in model.named_modules() if next(module.children(), None) is None)
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
