"""`Deltas`, a LoRA as {module path: (A, B, α)}, and the layers of a model that it fits."""

import torch
from torch import Tensor, nn

from common.errors import UserError

Deltas = dict[str, tuple[Tensor, Tensor, float]]


def mergeable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """{module path: layer} of all linear and convolution layers; other tools train both."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def layer_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """{module path: shape of the weight} of the same layers; of a packed weight the unpacked shape."""
    layers = mergeable_layers(model).items()
    return {n: torch.Size((m.out_features, m.in_features)) if isinstance(m, nn.Linear) else m.weight.shape for n, m in layers}


def check_fit(model: nn.Module, deltas: Deltas) -> dict[str, nn.Linear | nn.Conv2d]:
    """{module path: layer} of the layers that `deltas` change.

    Raises UserError, which names the first three, if modules have no layer of their shape.
    """
    layers = mergeable_layers(model)
    wrong = []
    for name, (A, B, _) in deltas.items():
        ranks_match = min(A.ndim, B.ndim) > 1 and B[0].numel() == len(A)
        if not ranks_match or name not in layers or layers[name].weight.flatten(1).shape != (len(B), A[0].numel()):
            wrong.append(name)
    if wrong:
        examples = "; ".join(f"{n} {list(deltas[n][1].shape)} x {list(deltas[n][0].shape)}" for n in wrong[:3])
        raise UserError(f"the LoRA does not fit the model: {len(wrong)} of {len(deltas)} modules differ, first {examples}")
    return {name: layers[name] for name in deltas}


@torch.no_grad()
def delta_svd(delta: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor, Tensor]:
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
