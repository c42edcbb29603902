"""Rank, number of processes and collectives, under torchrun or plain `python` (one process)."""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import warn

T = TypeVar("T")

START_TIMEOUT = 60.0  # seconds: at their start ranks may always be this far apart
ROLL_CALL = 2.0  # seconds in which the ranks of the other hosts notice that one is cut off


@dataclass
class Ranks:
    """Which process this is, of how many, and their collectives; a single process communicates with nobody.

    If a rank dies, or does not arrive at a collective, the others exit with one line that names it.
    """

    rank: int
    world: int
    store: dist.Store | None = None
    host: dist.ProcessGroup | None = None  # gloo, for tensors and objects in the host's memory
    collectives: int = 0  # that this rank has arrived at
    averages: list[tuple[Any, Any]] = field(default_factory=list)  # since the last reading: begin and end of each

    @property
    def is_first(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0

    def place(self, index: int) -> int:
        """Where this rank's batch `index` of a step is among all batches of the step. A single process that accumulates them
        has the same ones in the same order.
        """
        return index * self.world + self.rank

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around whatever all ranks do together. Ends the process with status 1 if one of them is missing."""
        assert self.store is not None  # as there are others
        self.collectives += 1
        try:
            self.store.set(f"collectives of {self.rank}", str(self.collectives))
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warn(f"{self.missing()} does not answer, so rank {self.rank} ends too; the same command goes on: {reason}")
            time.sleep(1 if self.is_first else 0)  # rank 0 may hold the store that the others look into now
            os._exit(1)  # an orderly exit would wait for the device, and that for the missing rank

    def missing(self) -> str:
        """Names the ranks that do not answer, as far as the store knows."""
        looking = ThreadPoolExecutor(1).submit(self.late)
        try:
            late = looking.result(2 * ROLL_CALL)  # over a cable that was cut the store itself would wait for minutes
        except (RuntimeError, TimeoutError):
            return "rank 0, or the host that keeps the list of ranks,"
        return f"rank {', '.join(late)} of {self.world}" if late else f"one of {self.world} ranks"

    def late(self) -> list[str]:
        """The ranks that have arrived at fewer collectives than this one. If there are none, the network was cut during a
        collective: then the ranks that do not notice that it failed. Such a rank may also be waiting for one that has died.
        """
        assert self.store is not None
        self.store.set(f"noticed {self.rank}", "")
        keys = {str(rank): f"collectives of {rank}" for rank in range(self.world)}
        counts = {rank: int(self.store.get(key)) if self.store.check([key]) else 0 for rank, key in keys.items()}
        if late := [rank for rank, count in counts.items() if count < self.collectives]:
            return late
        time.sleep(ROLL_CALL)
        return [rank for rank in keys if not self.store.check([f"noticed {rank}"])]

    def average(self, tensor: Tensor) -> None:
        """tensor <- mean over all ranks, in place. Does not wait for the device."""
        if self.world > 1:
            begin = moment(tensor.device)
            with self.collective():
                dist.all_reduce(tensor, group=None if tensor.is_cuda else self.host)
            self.averages.append((begin, moment(tensor.device)))
            tensor /= self.world

    def waited(self) -> float:
        """Seconds for which the averages since the last call have stopped this rank: until the last rank had its tensor, and
        until the mean was here. Waits for the device.
        """
        averages, self.averages = self.averages, []
        return sum(end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000 for begin, end in averages)

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one. Does not wait for the device."""
        return self.min(-int(flag)) < 0

    def min(self, number: int) -> int:
        """The smallest of all ranks' numbers. Does not wait for the device: in a collective of the hosts a missing rank is
        noticed after `timeout`, in one of the devices after twice that.
        """
        if self.world > 1:
            numbers = torch.tensor(number)
            with self.collective():
                dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.host)
            return int(numbers)
        return number

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank: it alone reads the disk that it writes."""
        if self.world == 1:
            return value
        values = [value]
        with self.collective():
            dist.broadcast_object_list(values, src=0, group=self.host)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            with self.collective():
                dist.all_gather_object(values, value, group=self.host)
        return values

    def union(self, names: set[str]) -> set[str]:
        """The names of all ranks together."""
        return set().union(*self.gather(names))

    def first_difference(self, parts: Mapping[str, Sequence[Tensor]]) -> str | None:
        """The first part whose tensors are not the same on all ranks, bit for bit. Copies them to the host."""
        if self.world == 1:
            return None
        digests = self.gather([digest(tensors) for tensors in parts.values()])
        return next((name for name, *of_ranks in zip(parts, *digests, strict=True) if len(set(of_ranks)) > 1), None)


def moment(device: torch.device) -> Any:
    """Now, in seconds; on a GPU an event, since the host is ahead of it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def digest(tensors: Sequence[Tensor]) -> bytes:
    """Eight bytes that differ if one bit of the tensors does."""
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).digest()[:8]


def join_ranks(device: torch.device, timeout: float = 300.0) -> Ranks:
    """Reads torchrun's variables. With several processes opens the groups: gloo for CPU tensors, nccl for CUDA's.

    A collective waits `timeout` seconds for a rank; one of the devices twice that, so that the hosts notice first.
    """
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if ranks.world > 1:
        ranks.store = enter(ranks.rank, ranks.world, max(timeout, START_TIMEOUT))
        backend, longer = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=2 * timeout)
        with ranks.collective():
            dist.init_process_group(backend, timeout=longer, world_size=ranks.world, rank=ranks.rank, store=ranks.store)
            ranks.host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return ranks


def enter(rank: int, world: int, timeout: float) -> dist.Store:
    """A part of the store for this attempt alone: after a restart torchrun's still holds the addresses of dead processes.

    Rank 0 opens an attempt under a new name and answers each of the others by name; nobody answers for an earlier attempt.
    Ends the process with status 1 if one of the ranks does not come within `timeout` seconds.
    """
    name, until = uuid.uuid4().hex, time.monotonic() + timeout
    awaited = "rank 0" if rank else "a rank"
    with suppress(dist.DistError):
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
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
    sys.exit(f"{awaited} of {world} did not come within {timeout:g} seconds, so rank {rank} ends too")


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
