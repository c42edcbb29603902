"""LoRA by hand: low-rank layers, added to a model, merged into plain weights (Hu et al. 2021, arXiv:2106.09685).

    W' = W + (α / r) · B · A          A [r, in] "down", B [out, r] "up", both float32

`Deltas` is the adapter outside of a model: {module path: (A, B, α)}.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.options import check_options, option
from lora_files.deltas import Deltas, check_fit

ATTENTION = r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$|\.self_attn\.(q|k|v|out)_proj$"
EVERYTHING = ATTENTION + r"|\.ff\.net\.(0\.proj|2)$|\.proj_(in|out)$|\.mlp\.fc[12]$"
TARGETS = {"attention": ATTENTION, "all": EVERYTHING}


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = option(8, at_least=1, resume="fixed")
    """Rank r of every ΔW."""
    alpha: float | None = option(None, above=0, resume="fixed")
    """Scale α: ΔW = (α/r)·B·A. None: equal to --rank."""
    targets: str = option("attention", resume="fixed")
    """Which linear layers: 'attention', 'all' (attention, feed-forward, projections) or a regular expression."""
    train_text_encoder: bool = option(True, resume="fixed")
    """LoRA on both text encoders too."""

    def __post_init__(self) -> None:
        check_options(self)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"--targets {self.targets!r} is neither a preset nor a regular expression: {error}") from None

    @property
    def resolved_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def pattern(self) -> str:
        return TARGETS.get(self.targets, self.targets)


class LowRank(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with a frozen W, and its gradients by hand.

    Written out because the small products are bound by memory traffic: here the branch is added inside of its product
    instead of in passes of its own, forward and backward, and x·Aᵀ [N, r] is all that is kept beyond x. W is not kept: it
    is frozen, and a packed one is unpacked again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, layer: "LoRALinear", part: slice) -> Tensor:
        """x [..., in], A [r, in], B [out, r]; `part` says which outputs of the layer these are -> [..., out]."""
        ctx.layer, ctx.part, ctx.shape = layer, part, x.shape
        rows = x.reshape(-1, x.shape[-1])
        down = rows @ A.T
        ctx.save_for_backward(rows, down, A, B)
        bias = None if layer.bias is None else layer.bias[part]
        y = F.linear(rows, layer.dense()[part], bias)
        return y.addmm_(down, B.T, alpha=layer.scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, A, B = ctx.saved_tensors
        scale, unread = ctx.layer.scale, grad.new_empty(())  # beta=0: addmm as a product with a factor
        grad = grad.reshape(-1, grad.shape[-1])
        grad_down = torch.addmm(unread, grad, B, beta=0, alpha=scale)
        grad_B = torch.addmm(unread, grad.T, down, beta=0, alpha=scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.layer.dense()[ctx.part]).addmm_(grad_down, A).view(ctx.shape)
        return grad_x, grad_down.T @ rows, grad_B, None, None


class LoRALinear(nn.Linear):
    """A linear layer that keeps its base weight where it is, with the low-rank branch beside it.

    y = x·Wᵀ + b + (α/r)·(x·Aᵀ)·Bᵀ. B starts at zero, so the layer starts as its base, bit for bit. A base that holds its
    weight packed has a `dense()` that unpacks it.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and fill a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.unpack = getattr(base, "dense", None)
        self.alpha, self.scale = alpha, alpha / rank
        bound = base.in_features**-0.5  # kaiming_uniform_(a=√5), as in the paper's code
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.forward_rows(x, slice(None))

    def forward_rows(self, x: Tensor, part: slice) -> Tensor:
        """Those outputs of the layer alone: x [..., in] -> [..., len(part)]."""
        return LowRank.apply(x, self.lora_A.to(x.dtype), self.lora_B[part].to(x.dtype), self, part)

    def dense(self) -> Tensor:
        """The base weight [out, in]."""
        return self.unpack() if self.unpack else self.weight


class Adapter:
    """Every LoRALinear of a model, their weights in one flat float32 buffer, their gradients in another.

    Zeroing, averaging over ranks, clipping and stepping are then one call each instead of two per layer. `groups` cuts
    `flat` into one parameter per learning rate: "unet" and "text_encoder" (both of them), each where it has layers.

    The layers compute with `low`, a copy of `flat` in the dtype of the base, and leave their gradients in `low_grad`
    (float32 masters beside half-precision weights: Micikevicius et al. 2017, arXiv:1710.03740): one cast of everything in
    place of four per layer and step. In float32 both are `flat` and `grad` themselves.
    Moving the model to another device or dtype afterwards would break the views.
    """

    def __init__(self, modules: dict[str, LoRALinear], dtype: torch.dtype):
        self.modules = modules
        text = {name: m for name, m in modules.items() if name.startswith("text_encoder")}
        unet = {name: m for name, m in modules.items() if name not in text}
        ordered = unet | text
        self.flat = torch.cat([p.detach().reshape(-1) for m in ordered.values() for p in (m.lora_A, m.lora_B)])
        self.grad = torch.zeros_like(self.flat)
        self.low = self.flat.to(dtype)
        self.low_grad = self.grad.to(dtype)
        self.deltas: Deltas = {}  # {module path: (A, B, α)}: float32 views of the live weights
        offset = 0
        for name, m in ordered.items():
            masters = []
            for p in (m.lora_A, m.lora_B):
                here, shape = slice(offset, offset := offset + p.numel()), p.shape
                masters.append(self.flat[here].view(shape))
                p.data, p.grad = self.low[here].view(shape), None
                p.grad = self.low_grad[here].view(shape)
            self.deltas[name] = (masters[0], masters[1], m.alpha)
        cut = sum(m.lora_A.numel() + m.lora_B.numel() for m in unet.values())
        self.groups: dict[str, nn.Parameter] = {}
        for name, part in (("unet", slice(0, cut)), ("text_encoder", slice(cut, None))):
            if self.flat[part].numel():
                self.groups[name] = nn.Parameter(self.flat[part])
                self.groups[name].grad = self.grad[part]

    def gather(self) -> None:
        """After a backward pass: the gradients of the layers are added to `grad`, in float32, and zeroed."""
        if self.low_grad is not self.grad:
            self.grad += self.low_grad
            self.low_grad.zero_()

    def clip(self, largest: float) -> Tensor:
        """Scales `grad` down to the L2 norm `largest`. Returns the norm that each group had: [groups], on the device."""
        norms = torch.stack([p.grad.norm() for p in self.groups.values() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.groups.values(), largest, norms.norm())
        return norms

    def checksum(self) -> int:
        """Of the bits of `flat`: another one if a single weight has changed. The host waits for the device."""
        return int(self.flat.view(torch.int32).sum(dtype=torch.int64))

    def undo(self) -> None:
        """After a backward pass that was broken off: the gradient is zero, also what of it was not yet gathered."""
        self.low_grad.zero_()
        self.grad.zero_()

    def refresh(self) -> None:
        """After `flat` has changed: the layers compute with it, and the gradient is zero."""
        if self.low is not self.flat:
            self.low.copy_(self.flat)
        self.grad.zero_()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is its base."""
        scales = {m: m.scale for m in self.modules.values()}
        for m in scales:
            m.scale = 0.0
        try:
            yield
        finally:
            for m, scale in scales.items():
                m.scale = scale


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """{module path: layer} of every linear layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def add_lora(
    model: nn.Module, config: LoRAConfig, unread: Iterable[str] = (), seed: int = 0, dtype: torch.dtype = torch.float32
) -> Adapter:
    """Freezes `model` and puts a LoRALinear in place of each linear layer that `config` names, computing in `dtype`.

    `unread` are path prefixes whose output nothing reads: an adapter there would never get a gradient. A is drawn on the
    CPU from `seed`, so that every rank and every device starts alike.

    Raises UserError if the target expression matches no linear layer.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    linears = linear_layers(model)
    modules = {}
    for name, linear in linears.items():
        text = name.startswith("text_encoder")
        if not re.search(config.pattern, name) or name.startswith(tuple(unread)) or (text and not config.train_text_encoder):
            continue
        parent, _, child = name.rpartition(".")
        modules[name] = LoRALinear(linear, config.rank, config.resolved_alpha, generator)
        setattr(model.get_submodule(parent), child, modules[name])
    if not modules:
        raise UserError(f"--targets {config.targets!r} matches none of {len(linears)} linear layers, e.g. {list(linears)[:3]}")
    return Adapter(modules, dtype)


@torch.no_grad()
def merge_lora(model: nn.Module, deltas: Deltas, strength: float = 1.0) -> None:
    """W += strength · (α/r) · B · A in place: the sum in float32, cast once to the dtype of W.

    A convolution's W [out, in, kh, kw] is taken as [out, in·kh·kw]. Raises UserError, before anything is changed, if the
    deltas do not fit the model.
    """
    for name, layer in check_fit(model, deltas).items():
        layer.weight.copy_(add_delta(layer.weight.float(), deltas[name], strength))


def add_delta(weight: Tensor, delta: tuple[Tensor, Tensor, float], strength: float) -> Tensor:
    """weight [out, in, …] float32 + strength · (α/r) · B · A."""
    A, B, alpha = delta
    A, B = (half.flatten(1).to(weight.device, torch.float32) for half in (A, B))
    return weight.flatten(1).addmm(B, A, alpha=strength * alpha / len(A)).view_as(weight)
