"""ΔW as a sum of singular triplets: of a product of A and B, of a whole matrix, and of sums of both."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.progress import tqdm
from lora_files.deltas import Changes, Deltas, add_delta, check_finite, check_fit, mergeable_layers
from lora_files.kinds import Delta, Difference, DoRA

ChooseRank = Callable[[Tensor], int]  # all singular values [k], descending -> r, how many of them are kept
Triplets = tuple[Tensor, Tensor, Tensor]  # U [out, r], S [k] with all singular values, Vh [r, in]
Parts = list[tuple[Delta | Difference, float]]  # changes of one weight, each with its strength


def smallest_rank(S: Tensor, rank: int | None, error: float | None) -> int:
    """How many singular values S [k] are kept: `rank`, or the fewest for a relative error of at most `error`."""
    if error is None:
        assert rank is not None
        return min(rank, len(S))
    tails = S.square().flip(0).cumsum(0).flip(0)  # Σσ² without the first 0, 1, 2, …; small before large, for accuracy
    return int((tails > error**2 * tails[0]).sum())


def truncated_svd(W: Tensor, choose_rank: ChooseRank) -> Triplets:
    """The SVD of W [out, in], in float64 on its device, from the eigenvectors of the smaller Gram matrix W·Wᵀ or Wᵀ·W.

    It takes 0.55 s for 1280 × 1280, 1.2 s for 10240 × 1280 and 0.87 s for 1280 × 5120 on one core; torch.linalg.svd in
    float32 takes 0.61, 1.9 and 3.5 s. A Gram matrix loses half of the digits, of which float64 has twice as many as W.
    torch.svd_lowrank takes 0.01 to 0.15 s, but misses the optimum where singular values fall slowly, as between two models.
    """
    W = W.double()
    wide = W if len(W) <= W.shape[1] else W.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    S = squares.flip(0).clamp_min(0).sqrt()
    U = vectors.flip(1)[:, : choose_rank(S)]
    Vh = F.normalize(U.T @ wide, dim=1)
    return (U, S, Vh) if wide is W else (Vh.T, S, U.T)


def as_delta(triplets: Triplets, shape: torch.Size) -> tuple[Tensor, Tensor, float]:
    """-> (A [r, in, …], B [out, r, …], α = r) for a weight of `shape`, in float32 on the CPU. Both A and B get √σ."""
    U, S, Vh = triplets
    root = S[: len(Vh)].sqrt()
    A, B = (root[:, None] * Vh).float().cpu(), (U * root).float().cpu()
    return A.view(-1, *shape[1:]), B.view(*B.shape, *(1 for _ in shape[2:])), float(len(root))


@torch.no_grad()
def delta_svd(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """(A [r, in, …], B [out, r, …], α) -> the thin SVD of ΔW: U [out, k], S [k] descending and ≥ 0, Vh [k, in·…].

    float64 on the device of A; k = min(r, out, in·…). ΔW = U·diag(S)·Vh is never formed: with B = Q₁·R₁ and Aᵀ = Q₂·R₂ its
    singular values are those of the r × r core (α/r)·R₁·R₂ᵀ. A convolution's ΔW is treated as [out, in·kh·kw].
    """
    A, B, alpha = delta
    A, B = (factor.flatten(1).to(A.device, torch.float64) for factor in (A, B))
    Q1, R1 = torch.linalg.qr(B)
    Q2, R2 = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(alpha / len(A) * R1 @ R2.T, full_matrices=False)
    return Q1 @ U, S, Vh @ Q2.T


def is_product(change: Delta | Difference, weight: Tensor) -> bool:
    """Whether a change of this weight [out, in, …] is A and B of it, not a whole matrix."""
    return isinstance(change, tuple) and len(change[1]) == len(weight)


def parts_by_layer(files: list[tuple[Changes, float]], model: nn.Module) -> dict[str, Parts]:
    """{path of a layer: the changes of its weight in all files, each with the strength of its file}. What is added to norms and
    biases is left out. Raises UserError if a file does not fit the model.
    """
    known, layers = mergeable_layers(model), dict[str, Parts]()
    for changes, strength in files:
        check_fit(model, changes)
        for name, change in changes.items():
            if (layer := name.removesuffix(".weight")) in known:
                layers.setdefault(layer, []).append((change, strength))
    return layers


@torch.no_grad()
def sum_svd(layer: str, parts: Parts, weight: Tensor, rank: int) -> Triplets:
    """The first `rank` singular triplets of Σ strength · ΔW (Eckart and Young 1936), without those that are rounding.

    Products of A and B are one product of their stacked factors, in float64, and never a matrix [out, in]; anything else is
    summed as for merging, in float32. Raises UserError if `weight`, that of the layer, is on the meta device and a ΔW is
    DoRA's, or if the sum is not finite.
    """

    def kept(S: Tensor, rounding: float) -> int:
        return max(1, min(rank, int((S / S[0] > rounding).sum())))

    if all(is_product(change, weight) for change, _ in parts):
        products = [(cast(Delta, change), strength) for change, strength in parts]
        down = torch.cat([A.flatten(1).double() for (A, _, _), _ in products])
        scaled = [strength * alpha / len(A) * B.flatten(1).double() for (A, B, alpha), strength in products]
        U, S, Vh = delta_svd((down, torch.cat(scaled, 1), float(len(down))))
        r = kept(S, 1e-12)
        return U[:, :r], S, Vh[:r]
    if weight.is_meta and any(isinstance(change, DoRA) for change, _ in parts):
        raise UserError(f"{layer} is DoRA, whose change depends on the weights: name the model by --model")
    total = torch.zeros(weight.shape)
    base = total if weight.is_meta else weight.float()
    for change, strength in parts:
        total = add_delta(total, change, strength, base)
    check_finite(layer, total)
    return truncated_svd(total.flatten(1), partial(kept, rounding=1e-6))


def plain_deltas(changes: Changes, model: nn.Module, rank: int) -> tuple[Deltas, int, float]:
    """Every ΔW of a layer of `model` as A and B, of at most `rank` where it was something else; how many were, and the relative
    error of these together. Raises UserError as `parts_by_layer` and `sum_svd`.
    """
    layers, known = parts_by_layer([(changes, 1.0)], model), mergeable_layers(model)
    deltas, converted, lost, total = Deltas(), 0, 0.0, 0.0
    for layer, parts in tqdm(layers.items(), unit="layer", leave=False):
        only, weight = parts[0][0], known[layer].weight
        if len(parts) == 1 and is_product(only, weight):
            deltas[layer] = cast(Delta, only)
            continue
        U, S, Vh = sum_svd(layer, parts, weight, rank)
        deltas[layer] = as_delta((U, S, Vh), weight.shape)
        lost, total = lost + S[len(Vh) :].square().sum().item(), total + S.square().sum().item()
        converted += 1
    return deltas, converted, (lost / (total or 1)) ** 0.5
