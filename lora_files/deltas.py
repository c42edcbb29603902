"""`Deltas`, a LoRA as {module path: (A, B, α)}, and the layers of a model that it fits.

What ComfyUI's training node adds to a norm or a bias is an entry with the path of the parameter, which ends in .weight or
.bias: A is the addition as [1, numel], B = 1, α = 1.
"""

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


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """`layer_shapes`, and {parameter path: shape} of all parameters, to which a file may have additions."""
    return layer_shapes(model) | {name: parameter.shape for name, parameter in model.named_parameters()}


def is_addition(name: str) -> bool:
    """Whether a key of `Deltas` is the path of a parameter, not of a layer."""
    return name.endswith((".weight", ".bias"))


def check_fit(model: nn.Module, deltas: Deltas) -> dict[str, Tensor]:
    """{key: weight} of the weights that `deltas` change.

    Raises UserError, which names the first three, if modules have no layer of their shape.
    """
    weights = {name: layer.weight for name, layer in mergeable_layers(model).items()} | dict(model.named_parameters())
    wrong = []
    for name, (A, B, _) in deltas.items():
        ranks_match = min(A.ndim, B.ndim) > 1 and B[0].numel() == len(A)
        rows = 0 if name not in weights else 1 if is_addition(name) else len(weights[name])
        if not ranks_match or rows != len(B) or weights[name].numel() != len(B) * A[0].numel():
            wrong.append(name)
    if wrong:
        examples = "; ".join(f"{n} {list(deltas[n][1].shape)} x {list(deltas[n][0].shape)}" for n in wrong[:3])
        raise UserError(f"the LoRA does not fit the model: {len(wrong)} of {len(deltas)} modules differ, first {examples}")
    return {name: weights[name] for name in deltas}


def check_finite(name: str, weight: Tensor) -> None:
    """Raises UserError if a merged weight is not finite: of a wrong strength, or beyond its dtype."""
    if not weight.isfinite().all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{name} with the LoRA merged is not finite in {dtype}: a lower strength, or a wider dtype?")


def add_delta(weight: Tensor, delta: tuple[Tensor, Tensor, float], strength: float) -> Tensor:
    """weight [out, in, …] float32, or of any shape if B is that of an addition -> weight + strength · (α/r) · B · A, new."""
    A, B, alpha = delta
    A, B = (factor.flatten(1).to(weight.device, torch.float32) for factor in (A, B))
    scale = torch.tensor(strength * alpha / len(A), dtype=torch.float32).item()  # infinite beyond float32; addmm would raise
    return weight.reshape(len(B), -1).addmm(B, A, alpha=scale).view_as(weight)


def add_deltas(name: str, weight: Tensor, changes: list[tuple[tuple[Tensor, Tensor, float], float]]) -> None:
    """Adds every (delta, strength) to a weight in place: summed in float32, then cast once. Raises UserError if the sum is not
    finite. `name`: of the weight, for the error.
    """
    if changes:
        total = weight.float()
        for delta, strength in changes:
            total = add_delta(total, delta, strength)
        weight.copy_(total)
    check_finite(name, weight)


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
