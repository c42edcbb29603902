"""The mean of several LoRA files, and the weights of a run's files that make a power-function average of it."""

from itertools import pairwise

import numpy as np
from torch import nn

from common.errors import UserError
from common.progress import tqdm
from lora_files.decompose import as_delta, is_product, parts_by_layer, sum_svd
from lora_files.deltas import Changes, Deltas, mergeable_layers


def power_exponent(sigma: float) -> float:
    """γ ≥ 0 of the profile p(t) ∝ t^γ whose standard deviation is `sigma` (0.001…0.288) times the length of the run.

    σ = (γ+1)^½ · (γ+2)^-1 · (γ+3)^-½ (Karras et al. 2024, arXiv:2312.02696, section 3.1), a cubic equation in γ.
    """
    return float(np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2]).real.max())


def power_weights(steps: list[int], gamma: float) -> list[float]:
    """The weights, ≥ 0 and of sum 1, with which files of these ascending steps approximate ∫ p(t)·θ(t) dt of the run up to the
    last of them, T > 0. p(t) ∝ t^γ.

    θ is taken as linear between two files and as constant before the first, and that is integrated exactly. So a straight run
    costs nothing, for which cells around the files would already be wrong. Another costs at most h²/8 · max|θ″| with gaps of h,
    and the part before the first file its share of p times how far θ is from that file.

    With P, the integral of p, and by parts: a file's weight is the mean of P in the gap after it less that in the gap before.
    """
    ends, power = [step / steps[-1] for step in steps], gamma + 2
    means = [(b**power - a**power) / power / (b - a) for a, b in pairwise(ends)]
    return [max(0.0, after - before) for before, after in pairwise([0.0, *means, 1.0])]


def average_changes(
    files: list[tuple[Changes, float]], model: nn.Module, rank: int | None
) -> tuple[Deltas, dict[str, tuple[float, float]]]:
    """Σ weight · ΔW of every layer of `model` as A and B of `rank`; None: the largest that the layer has in a file.

    Also {layer: (what that rank lost of |ΔW|², |ΔW|²)}. Where a file lacks the layer its ΔW is 0. Raises UserError as
    `parts_by_layer` and `sum_svd`, and if there is no rank.
    """
    layers, deltas, losses = mergeable_layers(model), Deltas(), {}
    for layer, parts in tqdm(parts_by_layer(files, model).items(), unit="layer", leave=False):
        weight = layers[layer].weight
        if rank is None and not all(is_product(change, weight) for change, _ in parts):
            raise UserError(f"{layer} is not plain A and B in every file, so it has no rank: add --rank")
        wanted = rank or max(len(change[0]) for change, _ in parts if isinstance(change, tuple))
        U, S, Vh = sum_svd(layer, parts, weight, wanted)
        deltas[layer] = as_delta((U, S, Vh), weight.shape)
        losses[layer] = S[len(Vh) :].square().sum().item(), S.square().sum().item()
    return deltas, losses
