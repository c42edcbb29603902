"""Run by torchrun in test_ranks.py. Each rank takes its share of a batch; rank 0 saves the results."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_lora import inputs, shake

from lora import add_lora
from model.load import load_sdxl
from model.sdxl import Denoiser
from options.training import LoRAConfig
from performance.optimizers import make_optimizer
from run.ranks import join_ranks, leave_ranks


def gradient_and_step(model: str, rank: int, world: int, average) -> dict[str, torch.Tensor]:
    """The gradient for this rank's rows of a batch of four, averaged over ranks, and the weights after an optimiser step."""
    denoiser = Denoiser(load_sdxl(model, torch.float32, torch.device("cpu")))
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused)
    shake(adapter)
    share = tree_map(lambda rows: rows[rank::world], inputs(4))
    denoiser(**share).square().mean().backward()
    average(adapter.grad)
    optimizer = make_optimizer("adamw8bit", [{"params": [p], "lr": 1e-3} for p in adapter.groups.values()])
    optimizer.step()
    return {"grad": adapter.grad, "flat": adapter.flat}


if __name__ == "__main__":
    model, out = sys.argv[1:]
    ranks = join_ranks(torch.device("cpu"))
    result = gradient_and_step(model, ranks.rank, ranks.world, ranks.average)
    gathered = [torch.empty_like(result["flat"]) for _ in range(ranks.world)]
    dist.all_gather(gathered, result["flat"])
    result["ranks differ"] = torch.tensor([not torch.equal(flat, gathered[0]) for flat in gathered])
    result["union"] = torch.tensor(sorted(int(name) for name in ranks.union({str(ranks.rank), "7"})))
    result["any"] = torch.tensor([ranks.any(ranks.rank == 1), ranks.any(False)])
    parts = {
        "same": (torch.ones(3),),
        "other": (torch.ones(3), torch.tensor([0.0, -0.0])[ranks.rank]),
    }  # 0.0 and -0.0: equal, but not bit for bit
    result["first difference"] = [ranks.first_difference(parts), ranks.first_difference({"same": parts["same"]})]
    if ranks.is_first:
        torch.save(result, out)
    leave_ranks()
