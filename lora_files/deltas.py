"""`Deltas`, a LoRA as {module path: (A, B, α)}, `Changes`, an adapter of any kind, and the layers of a model that they fit.

What ComfyUI's training node adds to a norm or a bias is an entry with the path of the parameter, which ends in .weight or
.bias: A is the addition as [1, numel], B = 1, α = 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.errors import UserError
from lora_files.kinds import Delta, Difference, fits_weight

Deltas = dict[str, Delta]
Changes = Mapping[str, Delta | Difference]


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


def check_fit(model: nn.Module, deltas: Changes) -> dict[str, Tensor]:
    """{key: weight} of the weights that `deltas` change.

    Raises UserError, which names the first three, if modules have no layer of their shape.
    """
    weights = {name: layer.weight for name, layer in mergeable_layers(model).items()} | dict(model.named_parameters())
    wrong = []
    for name, delta in deltas.items():
        if not isinstance(delta, tuple):
            if name not in weights or not fits_weight(delta, weights[name].shape):
                wrong.append(f"{name} of {type(delta).__name__}")
            continue
        A, B, _ = delta
        ranks_match = min(A.ndim, B.ndim) > 1 and B[0].numel() == len(A)
        rows = 0 if name not in weights else 1 if is_addition(name) else len(weights[name])
        if not ranks_match or rows != len(B) or weights[name].numel() != len(B) * A[0].numel():
            wrong.append(f"{name} {list(B.shape)} x {list(A.shape)}")
    if wrong:
        examples = "; ".join(wrong[:3])
        raise UserError(f"the LoRA does not fit the model: {len(wrong)} of {len(deltas)} modules differ, first {examples}")
    return {name: weights[name] for name in deltas}


def check_finite(name: str, weight: Tensor) -> None:
    """Raises UserError if a merged weight is not finite: of a wrong strength, or beyond its dtype."""
    if not weight.isfinite().all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{name} with the LoRA merged is not finite in {dtype}: a lower strength, or a wider dtype?")


def add_delta(weight: Tensor, delta: Delta | Difference, strength: float, base: Tensor) -> Tensor:
    """weight [out, in, …] float32, or of any shape if B is that of an addition -> weight + strength · (α/r) · B · A, new.

    `base`: the weight before any change, from which DoRA's is computed, so that the order of several does not count.
    """
    if not isinstance(delta, tuple):
        return weight + strength * delta.of(base)
    A, B, alpha = delta
    A, B = (factor.flatten(1).to(weight.device, torch.float32) for factor in (A, B))
    scale = torch.tensor(strength * alpha / len(A), dtype=torch.float32).item()  # infinite beyond float32; addmm would raise
    return weight.reshape(len(B), -1).addmm(B, A, alpha=scale).view_as(weight)


def add_deltas(name: str, weight: Tensor, changes: list[tuple[Delta | Difference, float]]) -> None:
    """Adds every (delta, strength) to a weight in place: summed in float32, then cast once. Raises UserError if the sum is not
    finite. `name`: of the weight, for the error.
    """
    if changes:
        total = base = weight.float()
        for delta, strength in changes:
            total = add_delta(total, delta, strength, base)
        weight.copy_(total)
    check_finite(name, weight)
