"""One program under plain `python` and under `torchrun`: what torchrun did not set gets the value for one process."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many. With one process every method is a no-op."""

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> None:
        """tensor <- mean over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one. Between hosts only: the accelerator is not waited for."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        return bool(votes)

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.world > 1:
            numbers = torch.tensor(number)
            dist.all_reduce(numbers, dist.ReduceOp.MIN)
            return int(numbers)
        return number

    def from_first(self, value: object) -> object:
        """What rank 0 passed, on every rank: it alone reads the disk that it writes."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def union(self, names: set[str]) -> set[str]:
        """The names of all ranks together."""
        if self.world == 1:
            return names
        everyone: list[set[str]] = [set()] * self.world
        dist.all_gather_object(everyone, names)
        return set().union(*everyone)


def join_ranks(device: torch.device) -> Ranks:
    """Reads torchrun's variables and opens the group if there are more: gloo for CPU tensors, nccl for CUDA's."""
    ranks = Ranks(rank=int(os.environ.get("RANK", 0)), world=int(os.environ.get("WORLD_SIZE", 1)))
    if ranks.world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return ranks


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
