"""One program under plain `python` and under `torchrun`: what torchrun did not set gets the value for one process."""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import warn

T = TypeVar("T")

APART = 60.0  # seconds that ranks may at least be apart at their start
ROLL_CALL = 2.0  # seconds in which the ranks of the other hosts notice that one is cut off


@dataclass
class Ranks:
    """Who this process is among how many. With one process every method is a no-op.

    If a rank dies, or does not come to where the others wait for it, they end with one line that names it.
    """

    rank: int
    world: int
    patience: float = 300.0  # seconds
    store: dist.Store | None = None
    host: dist.ProcessGroup | None = None  # gloo, for what lies in the host's memory
    met: int = 0  # how often this rank has come to where all meet

    @property
    def first(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around whatever all ranks do together. Ends the process with status 1 if one of them is missing."""
        assert self.store is not None  # as there are others
        self.met += 1
        try:
            self.store.set(f"met {self.rank}", str(self.met))
            yield
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            told = f"{self.missing()} does not answer, so rank {self.rank} ends too; the same command goes on: {why}"
            warn(told)
            time.sleep(self.first)  # it may keep the list that the others look at now
            os._exit(1)  # an orderly exit would wait for the device, and that for the missing rank

    def missing(self) -> str:
        """The ranks that have not come as far as this one; if all have, as when a host is cut off where all meet, those that
        do not notice it, too. Of those one may still be waiting for another that has died.
        """
        asked = ThreadPoolExecutor(1).submit(self.late)
        try:
            late = asked.result(2 * ROLL_CALL)  # over a cable that was cut the store itself would wait for minutes
        except (RuntimeError, TimeoutError):
            return "rank 0, or the host that keeps the list of ranks,"
        return f"rank {', '.join(late)} of {self.world}" if late else f"one of {self.world} ranks"

    def late(self) -> list[str]:
        assert self.store is not None
        self.store.set(f"noticed {self.rank}", "")
        known = {str(rank): f"met {rank}" for rank in range(self.world)}
        met = {rank: int(self.store.get(key)) if self.store.check([key]) else 0 for rank, key in known.items()}
        if late := [rank for rank, count in met.items() if count < self.met]:
            return late
        time.sleep(ROLL_CALL)
        return [rank for rank in known if not self.store.check([f"noticed {rank}"])]

    def average(self, tensor: Tensor) -> None:
        """tensor <- mean over all ranks, in place."""
        if self.world > 1:
            with self.together():
                dist.all_reduce(tensor, group=None if tensor.is_cuda else self.host)
            tensor /= self.world

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one. Between hosts only: the accelerator is not waited for.

        Before what ranks do on their accelerators: there a missing rank would stop the host, too, and longer.
        """
        return flag if self.world == 1 else -self.least(-int(flag)) > 0

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.world > 1:
            numbers = torch.tensor(number)
            with self.together():
                dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.host)
            return int(numbers)
        return number

    def from_first(self, value: T) -> T:
        """What rank 0 passed, on every rank: it alone reads the disk that it writes."""
        if self.world == 1:
            return value
        values = [value]
        with self.together():
            dist.broadcast_object_list(values, src=0, group=self.host)
        return values[0]

    def gather(self, value: object) -> list:
        """What every rank passed, on every rank."""
        everyone = [value] * self.world
        if self.world > 1:
            with self.together():
                dist.all_gather_object(everyone, value, group=self.host)
        return everyone

    def union(self, names: set[str]) -> set[str]:
        """The names of all ranks together."""
        return set().union(*self.gather(names))

    def first_difference(self, parts: Mapping[str, tuple[Tensor, ...]]) -> str | None:
        """The first part whose tensors are not the same on all ranks, bit for bit. Copies them to the host."""
        digest = lambda tensors: hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).digest()[:8]  # noqa: E731
        everyone = self.gather([digest(tensors) for tensors in parts.values()] if self.world > 1 else [])
        return next((name for name, *held in zip(parts, *everyone, strict=False) if len(set(held)) > 1), None)


def join_ranks(device: torch.device, patience: float = 300.0) -> Ranks:
    """Reads torchrun's variables and opens the groups if there are more: gloo for CPU tensors, nccl for CUDA's.

    A rank that does not come to where all meet is waited for `patience` seconds: by the host first, and then by the device.
    """
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), patience)
    if ranks.world > 1:
        ranks.store = enter(ranks.rank, ranks.world, max(patience, APART))
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=2 * patience)
        with ranks.together():
            dist.init_process_group(backend, timeout=timeout, world_size=ranks.world, rank=ranks.rank, store=ranks.store)
            ranks.host = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
    return ranks


def enter(rank: int, world: int, patience: float) -> dist.Store:
    """A part of the store for this attempt alone: after a restart torchrun's still holds the addresses of dead processes.

    Rank 0 opens an attempt under a new name and answers the others by name; what is left of an attempt before answers nobody.
    Ends the process with status 1 if one of them does not come.
    """
    name, until = uuid.uuid4().hex, time.monotonic() + patience
    awaited = "rank 0" if rank else "a rank"
    with suppress(dist.DistError):
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))[0]
        if rank == 0:
            store.set("attempt", name)
            for other in range(1, world):
                awaited = f"rank {other}"
                store.set(f"{name} {other} {store.get(f'{name} {other}').decode()}", "")
            return dist.PrefixStore(name, store)
        while time.monotonic() < until:
            attempt = store.get("attempt").decode()
            store.set(f"{attempt} {rank}", name)
            with suppress(dist.DistStoreError):
                store.wait([f"{attempt} {rank} {name}"], timedelta(seconds=1))
                return dist.PrefixStore(attempt, store)
    sys.exit(f"{awaited} of {world} did not come within {patience:g} seconds, so rank {rank} ends too")


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
