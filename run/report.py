"""What a run tells of itself: readings of the loop, and TensorBoard, to which they go."""

import math
import threading
import time
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch.utils.tensorboard import SummaryWriter

AGAIN = 60  # seconds until a log that could not be written is tried again


class Meter:
    """Loss and gradient norms of each step, images per second and share of the time spent waiting for data since the last
    reading, which comes after `most` steps at the latest. Adding costs no synchronisation, reading costs one.
    """

    def __init__(self, device: torch.device, groups: Collection[str], most: int):
        self.groups = groups
        self.losses, self.norms = torch.zeros(most, device=device), torch.zeros(most, len(groups), device=device)
        self.shares: list[float] = []  # of every reading
        self.restart()

    def restart(self) -> None:
        self.steps = 0
        self.losses.zero_()
        self.since, self.waited = time.perf_counter(), 0.0

    def end_step(self, loss: torch.Tensor, norms: torch.Tensor, waited: float) -> None:
        """`loss`: mean over all ranks; `norms` [groups]: of the gradient of each; `waited`: seconds, for data."""
        self.losses[self.steps], self.norms[self.steps] = loss, norms
        self.steps, self.waited = self.steps + 1, self.waited + waited

    def read(self, images_per_step: int, scale: float) -> tuple[dict[str, float], list[bool]]:
        """Mean loss over the finite ones and images/s of all ranks, what this one waited; and which steps were spoilt."""
        losses, norms = self.losses[: self.steps].tolist(), self.norms[: self.steps].norm(dim=1).tolist()
        largest = self.norms[: self.steps].amax(dim=0).tolist()
        finite, seconds = list(filter(math.isfinite, losses)), time.perf_counter() - self.since
        self.shares.append(self.waited / seconds)
        spoilt = not_finite(losses, norms, scale)
        told = {
            "loss": sum(finite) / len(finite) if finite else math.nan,
            "grad_norm": norms[-1],
            **dict(zip((f"grad_norm/{name}" for name in self.groups), largest, strict=True)),
            "images_per_second": self.steps * images_per_step / seconds,
            "seconds_per_step": seconds / self.steps,
            "steps": self.steps,
            "waiting_for_data": self.shares[-1],
            "loss_scale": scale,
            "overflows": sum(not math.isfinite(norm) for norm in norms) - sum(spoilt),
            "not_finite": sum(spoilt),
        }
        self.restart()
        return told, spoilt

    def advice(self) -> str | None:
        """What to do where data is the bottleneck. The first reading does not count: the workers had just been started."""
        share = sum(self.shares[1:]) / max(1, len(self.shares) - 1)
        if share > 0.05:
            helps = "more --workers, or latents made ready by scripts/cache_latents.py"
            return f"waiting for data took {share:.0%} of the time: {helps}"
        return None


def not_finite(losses: list[float], norms: list[float], scale: float) -> list[bool]:
    """For each step whether it is spoilt. An overflow of the gradient alone is not, while a smaller loss scale can mend it."""
    return [not math.isfinite(loss + (norm if scale <= 1 else 0.0)) for loss, norm in zip(losses, norms, strict=True)]


class Log:
    """TensorBoard's writer. `attempt` (a Persistence) makes each call, so that what the disk refuses is told once and does not
    end the run; a new file is begun a minute later.
    """

    def __init__(self, folder: str, purge_step: int, attempt: Callable):
        self.folder, self.attempt, self.tried = folder, attempt, -math.inf
        self.writer: SummaryWriter | None = SummaryWriter(folder, purge_step=purge_step)
        threading.excepthook = not_of_the_disk

    def call(self, name: str, *args, **kwargs) -> None:
        self.tried = time.monotonic()
        writer, self.writer = self.writer or SummaryWriter(self.folder), None
        getattr(writer, name)(*args, **kwargs)
        self.writer = writer  # not one that has failed: it would go on failing

    def __getattr__(self, name: str):
        if not self.writer and time.monotonic() < self.tried + AGAIN:
            return lambda *args, **kwargs: None
        return lambda *args, **kwargs: self.attempt(f"TensorBoard's {self.folder}", partial(self.call, name, *args, **kwargs))


def not_of_the_disk(told: threading.ExceptHookArgs) -> None:
    """Of a thread that ends: the writer's does so with what the disk refuses, which the log's next call tells."""
    if not isinstance(told.exc_value, OSError):
        threading.__excepthook__(told)


class NoLog:
    """Stands in for it on every rank but the first."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None
