"""Run by torchrun in test_ranks.py: each rank takes its share of one batch; rank 0 stores what all of them then hold."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_lora import inputs, shake

from lora import LoRAConfig, add_lora
from model.load import load_sdxl
from model.sdxl import Denoiser
from performance.adamw8bit import make_optimizer
from run.ranks import join_ranks, leave_ranks


def gradient_and_step(model: str, rank: int, world: int, average) -> dict[str, torch.Tensor]:
    """The mean gradient over this rank's rows of a batch of four, averaged over ranks, and the weights after a step."""
    denoiser = Denoiser(load_sdxl(model, torch.float32, torch.device("cpu")))
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused)
    shake(adapter)
    mine = tree_map(lambda rows: rows[rank::world], inputs(4))
    denoiser(**mine).square().mean().backward()
    average(adapter.grad)
    optimizer = make_optimizer("adamw8bit", [{"params": [p], "lr": 1e-3} for p in adapter.groups.values()])
    optimizer.step()
    return {"grad": adapter.grad, "flat": adapter.flat}


if __name__ == "__main__":
    model, out = sys.argv[1:]
    ranks = join_ranks(torch.device("cpu"))
    result = gradient_and_step(model, ranks.rank, ranks.world, ranks.average)
    held = [torch.empty_like(result["flat"]) for _ in range(ranks.world)]
    dist.all_gather(held, result["flat"])
    result["ranks differ"] = torch.tensor([not torch.equal(other, held[0]) for other in held])
    result["union"] = torch.tensor(sorted(int(name) for name in ranks.union({str(ranks.rank), "7"})))
    result["any"] = torch.tensor([ranks.any(ranks.rank == 1), ranks.any(False)])
    parts = {
        "same": (torch.ones(3),),
        "other": (torch.ones(3), torch.tensor([0.0, -0.0])[ranks.rank]),
    }  # equal, but not in bits
    result["first difference"] = [ranks.first_difference(parts), ranks.first_difference({"same": parts["same"]})]
    if ranks.is_first:
        torch.save(result, out)
    leave_ranks()
