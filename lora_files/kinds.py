"""ΔW of the adapters that are no plain A and B, computed where it is merged: LoHa, LoKr, and DoRA of any of them.

LyCORIS and PEFT give these tensors the same names and shapes. The formulas are those of Hyeon-Woo et al. 2022, Yeh et al. 2024
and Liu et al. 2024.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAGNITUDES = ("dora_scale", "lora_magnitude_vector", "magnitude")  # of LyCORIS and OneTrainer, PEFT, ai-toolkit


def with_core(core: Tensor, b: Tensor) -> Tensor:
    """Tucker's core [r, s, kh, kw], b [s, in] -> [r, in, kh, kw]. Unlike einsum it raises RuntimeError for a wrong s of 1."""
    return (core.movedim(1, -1) @ b).movedim(-1, 1)


class Factors(NamedTuple):
    """A matrix: `a` alone; a·b of a [out, r, …] and b [r, in, …]; or Tucker's product of a [r, out], a core [r, r, kh, kw] and
    b [r, in].
    """

    a: Tensor
    b: Tensor | None = None
    core: Tensor | None = None

    def product(self, like: Tensor) -> Tensor:
        """[out, in·…], in the dtype and on the device of `like`."""
        a = self.a.to(like).flatten(1)
        if self.b is None:
            return a
        b = self.b.to(like).flatten(1)
        return a @ b if self.core is None else a.T @ with_core(self.core.to(like), b).flatten(1)


@dataclass(frozen=True)
class Joined:
    """ΔW = α/r times a matrix that the `halves` make; here the only one of them, as in LoRA."""

    halves: tuple[Factors, ...]
    scale: float
    """α/r."""

    def join(self, *matrices: Tensor) -> Tensor:
        """ΔW without its scale."""
        return matrices[0]

    def of(self, weight: Tensor) -> Tensor:
        """ΔW at strength 1 of a weight [out, in, …], in its shape and dtype, on its device; its values count for DoRA only.

        Raises RuntimeError if the shapes do not fit; on the meta device too, where that costs nothing.
        """
        change = self.join(*(half.product(weight) for half in self.halves)) * self.scale
        return change.view(len(weight), *change.shape[1:]).reshape(weight.shape)  # as many rows, not only as many numbers


class LoHa(Joined):
    """The elementwise product of two matrices."""

    def join(self, *matrices: Tensor) -> Tensor:
        return matrices[0] * matrices[1].view_as(matrices[0])  # a wrong size of 1 would be repeated


class LoKr(Joined):
    """The Kronecker product of two matrices, the second of which may have a convolution's kernel."""

    def join(self, *matrices: Tensor) -> Tensor:
        return torch.kron(*matrices)


@dataclass(frozen=True)
class DoRA:
    """W + D with each of its rows, or columns, brought to a length of its own: ΔW = m · (W + D) / |W + D| - W.

    The length is that of W + D, as PEFT and LyCORIS train it; ComfyUI divides rows by that of W.
    """

    direction: Joined
    """D."""
    magnitude: Tensor
    """m, one for each row or column, of any shape."""
    axis: int
    """Of the weight, along which m changes: 0, the outputs, or 1, the inputs."""

    def of(self, weight: Tensor) -> Tensor:
        """As `Joined.of`."""
        turned = weight + self.direction.of(weight)
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        lengths = torch.linalg.vector_norm(turned, dim=others, keepdim=True)
        lengths = lengths + torch.finfo(torch.float32).eps  # a row of zeros stays one, as in LyCORIS
        return turned * (self.magnitude.to(weight).view(lengths.shape) / lengths) - weight


Delta = tuple[Tensor, Tensor, float]
"""(A [r, in, …], B [out, r, …], α) of a plain LoRA."""
Difference = Joined | DoRA
Alpha = Callable[[int | None], float]
"""The rank -> α; None, for a module that does not show its rank -> α/r."""


def fits_weight(delta: Difference, shape: torch.Size) -> bool:
    """Whether ΔW can be computed for a weight of `shape`."""
    try:
        return delta.of(torch.empty(shape, device="meta")).shape == shape
    except RuntimeError:
        return False


def factors_of(parts: dict[str, Tensor], name: str, core: str = "") -> Factors:
    """A matrix, taken out of `parts`. Raises KeyError with the name of a part that is not there."""
    if name in parts:
        return Factors(parts.pop(name))
    return Factors(parts.pop(f"{name}_a"), parts.pop(f"{name}_b"), parts.pop(core, None))


def delta_of(parts: dict[str, Tensor], alpha: Alpha, shape: torch.Size) -> Delta | Difference:
    """What the tensors {part: tensor} of a module with a weight of `shape` are. A convolution that has Tucker's core,
    `lora_mid`, gets a plain A with the whole kernel.

    Raises KeyError with the name of a part that is not there, ValueError with those that do not belong to the others, and
    RuntimeError if the core does not fit.
    """
    rest = dict(parts)
    kind: type[Joined] = Joined
    halves: tuple[Factors, ...]
    if any(part.startswith("hada_") for part in rest):
        kind, halves = LoHa, (factors_of(rest, "hada_w1", "hada_t1"), factors_of(rest, "hada_w2", "hada_t2"))
    elif any(part.startswith("lokr_") for part in rest):
        kind, halves = LoKr, (factors_of(rest, "lokr_w1"), factors_of(rest, "lokr_w2", "lokr_t2"))
    else:
        A, B, core = rest.pop("down"), rest.pop("up"), rest.pop("lora_mid", None)
        if core is not None:
            A = with_core(core.float(), A.flatten(1).float())
        halves = (Factors(B, A),)
    magnitudes = {part: rest.pop(part) for part in MAGNITUDES if part in rest}
    if rest or len(magnitudes) > 1:
        raise ValueError(f"have parts that do not belong together: {', '.join(sorted(rest or magnitudes))}")
    if kind is Joined and not magnitudes:
        return A, B, alpha(len(A))
    rank = next((len(half.b) for half in halves if half.b is not None), None)
    direction = kind(halves, alpha(rank) / (rank or 1))
    if not magnitudes:
        return direction
    ((name, magnitude),) = magnitudes.items()
    return DoRA(direction, magnitude, int(name == "dora_scale" and magnitude.shape[:1] != shape[:1]))
