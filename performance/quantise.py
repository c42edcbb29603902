"""A frozen base in 8 or 4 bits per weight: linear layers that store their weight packed and unpack it for each product.

    int8   W ≈ q · s         q int8, s = max|W| / 127 of each output row                 8.0 bits per weight
    nf4    W ≈ code[q] · s   q 4 bits, s = max|W| of 64 consecutive weights              4.25 bits per weight

nf4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes; int8 is plain PyTorch.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

PACKED_BASES = ("int8", "nf4")
NF4_BLOCK = 64
NOT_QUANTISED = r"time_emb|add_embedding"  # only 1 % of SDXL's weights, but 15 % of int8's error on the demo model


def pack_weight(weight: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """weight [out, in] in float16, bfloat16 or float32 -> (q, s).

    int8: [out, in] int8 and [out, 1] float32. nf4: [out·in/2, 1] uint8 and [out·in/64] float16. bitsandbytes' scales are
    float32: float16 halves their memory, and its rounding of 2⁻¹¹ is small beside nf4's own error of a tenth.
    """
    if base == "int8":
        weight = weight.float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / scale).round().to(torch.int8), scale  # a row of zeros divides 0 by 0: q is arbitrary, but s is 0
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax.half()


def packed_bytes(linear: nn.Linear, base: str) -> int:
    """Bytes that the weight of a layer will take when packed, without the bias, which is not packed."""
    weights = linear.in_features * linear.out_features
    if base == "int8":
        return weights + 4 * linear.out_features
    return math.ceil(weights / 2) + 2 * math.ceil(weights / NF4_BLOCK)


class Product(torch.autograd.Function):
    """x·Wᵀ + b. Unpacks W again in the backward pass; autograd would keep the unpacked W until then."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantisedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense(), None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is packed, on `device`. `dense()` unpacks it, in the dtype that it had."""

    scale: Tensor

    def __init__(self, linear: nn.Linear, base: str, device: torch.device):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate and initialise a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.base, self.dtype, self.bias = base, linear.weight.dtype, linear.bias
        packed, scale = pack_weight(linear.weight.detach().to(device), base)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale.view(torch.uint8))  # as bytes, because Module.to(dtype) casts floating point

    def dense(self) -> Tensor:
        """W [out, in], unpacked by one kernel (int8) or two (nf4) that do not wait for the host: a CUDA graph can hold them."""
        shape = (self.out_features, self.in_features)
        if self.base == "int8":
            dense = torch.empty(shape, dtype=self.dtype, device=self.weight.device)
            return torch.mul(self.weight, self.scale.view(torch.float32), out=dense)  # in float32, rounded once
        from bitsandbytes.functional import QuantState, dequantize_4bit

        absmax = self.scale.view(torch.float16).float()
        # As one row: bitsandbytes' CPU kernel unpacks wrongly if the length of a row is not a multiple of the block size.
        flat = QuantState(absmax, [shape[0] * shape[1]], blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype)
        return dequantize_4bit(self.weight, flat).view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return Product.apply(x, self)


def quantisable(model: nn.Module) -> dict[str, nn.Linear]:
    """{module path: layer} of what `quantise_base` packs: the plain linear layers, except NOT_QUANTISED."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not re.search(NOT_QUANTISED, n)}


def quantise_base(model: nn.Module, base: str, device: torch.device) -> None:
    """Replaces every `quantisable` layer of a model on the CPU by a QuantisedLinear, `base` "int8" or "nf4".

    One by one, so that `device` never holds more than one unpacked weight. Afterwards, move the rest with model.to(device).
    """
    names = list(quantisable(model))  # names only: a list of layers would keep every unpacked weight alive
    for name in names:
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, child, QuantisedLinear(getattr(parent, child), base, device))


def check_quantisable(base: str, device: torch.device) -> None:
    """Packs and unpacks a small layer on `device`, as a test. Raises UserError if that fails."""
    try:
        QuantisedLinear(nn.Linear(NF4_BLOCK, 2), base, device).dense().cpu()
    except (ImportError, OSError, AttributeError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"--base-precision {base} does not work on {device.type}: {reason} "
            f"(nf4 needs bitsandbytes built for it: run `python -m bitsandbytes` for details; int8 needs PyTorch only)"
        ) from None
