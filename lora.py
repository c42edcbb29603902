"""LoRA without PEFT: low-rank layers added to a model, and their merging into plain weights (Hu et al. 2021,
arXiv:2106.09685).

    W' = W + (α / r) · B · A          A [r, in] "down", B [out, r] "up", both float32

Outside of a model an adapter is a `Deltas`: {module path: (A, B, α)}.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.seeds import seed_generator
from lora_files.deltas import Deltas, add_deltas, check_fit
from options.training import LoRAConfig
from performance.adamw8bit import STATE_BLOCK, spread


class LowRank(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with a frozen W; forward and backward are written out.

    The low-rank products are limited by memory bandwidth. `addmm_` adds them to the product with W in place, which saves
    reading and writing all of y (or the gradient of x) once more. Autograd keeps only x, x·Aᵀ [N, r], A and B. It does not
    keep W, which is frozen; a packed W is unpacked again for the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, layer: "LoRALinear", part: slice) -> Tensor:
        """x [..., in], A [r, in], B [n, r] -> [..., n]: the n outputs of the layer that `part` selects (rows of W)."""
        ctx.layer, ctx.part, ctx.shape = layer, part, x.shape
        flat_x = x.reshape(-1, x.shape[-1])
        down = flat_x @ A.T
        ctx.save_for_backward(flat_x, down, A, B)
        bias = None if layer.bias is None else layer.bias[part]
        y = F.linear(flat_x, layer.dense()[part], bias)
        return y.addmm_(down, B.T, alpha=layer.scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat_x, down, A, B = ctx.saved_tensors
        scale, unused = ctx.layer.scale, grad.new_empty(())  # with beta=0 addmm ignores it: alpha · product in one kernel
        grad = grad.reshape(-1, grad.shape[-1])
        grad_down = torch.addmm(unused, grad, B, beta=0, alpha=scale)
        grad_B = torch.addmm(unused, grad.T, down, beta=0, alpha=scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.layer.dense()[ctx.part]).addmm_(grad_down, A).view(ctx.shape)
        return grad_x, grad_down.T @ flat_x, grad_B, None, None


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank branch. It shares weight and bias with its base layer.

    y = x·Wᵀ + b + (α/r)·(x·Aᵀ)·Bᵀ. B starts at zero, so at first the output is that of the base, bit for bit. A base with a
    packed weight (QuantisedLinear) has a method `dense()` that unpacks it.
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
        """Only the outputs that `part` selects (rows of the weight): x [..., in] -> [..., selected outputs]."""
        return LowRank.apply(x, self.lora_A.to(x.dtype), self.lora_B[part].to(x.dtype), self, part)

    def dense(self) -> Tensor:
        """The base weight [out, in], unpacked."""
        return self.unpack() if self.unpack else self.weight


def padded_size(count: int) -> int:
    """The next multiple of STATE_BLOCK."""
    return count + -count % STATE_BLOCK


class Adapter:
    """All LoRALinear layers of a model: their weights in one flat float32 buffer `flat`, the gradients in another, `grad`.

    Zeroing, averaging over ranks, clipping and stepping are then one call each instead of two per layer. `groups` splits
    `flat` into one parameter per learning rate: "unet", and "text_encoder" for both encoders. A group without layers is absent.
    Each A and B begins at a multiple of STATE_BLOCK, so that no block of 8-bit states is shared: its scale follows its largest
    value, and A's would be lost beside B's. The padding between them is 0, and is in no LoRA file.

    The layers compute with `low`, a copy of `flat` in the dtype of the base: one cast of the whole buffer replaces four per
    layer and step (float32 masters beside half-precision weights: Micikevicius et al. 2017, arXiv:1710.03740). Autograd
    gives a gradient the dtype of its parameter, so there are two gradient buffers: the backward pass adds to `low_grad` in
    half precision, and `collect_gradients` moves that into `grad`, which sums several passes in float32. After
    `collect_gradients`, `low_grad` is zero and `grad` is the whole gradient: a step that ends with it changes only `grad`.
    After a backward pass that was broken off, both hold a part. In float32 `low` is `flat`, and `low_grad` is `grad`.

    Do not move the model to another device or dtype afterwards: its parameters would no longer be views of these buffers.
    """

    def __init__(self, modules: dict[str, LoRALinear], dtype: torch.dtype):
        self.modules = modules
        text = {name: m for name, m in modules.items() if name.startswith("text_encoder")}
        unet = {name: m for name, m in modules.items() if name not in text}
        ordered = unet | text
        factors = [p.detach().flatten() for m in ordered.values() for p in (m.lora_A, m.lora_B)]
        sizes = [padded_size(len(f)) for f in factors]
        self.flat = torch.cat([F.pad(f, (0, size - len(f))) for f, size in zip(factors, sizes, strict=True)])
        filled = torch.cat([torch.arange(size) < len(f) for f, size in zip(factors, sizes, strict=True)])
        self.padding = (~filled).nonzero().flatten().to(self.flat.device)  # indices in `flat`
        self.grad = torch.zeros_like(self.flat)
        self.low = self.flat.to(dtype)
        self.low_grad = self.grad.to(dtype)
        self.deltas: Deltas = {}  # {module path: (A, B, α)}: float32 views of the live weights
        offset = 0
        for name, m in ordered.items():
            masters = []
            for p in (m.lora_A, m.lora_B):
                section, shape = slice(offset, offset + p.numel()), p.shape
                offset += padded_size(p.numel())
                masters.append(self.flat[section].view(shape))
                p.data = self.low[section].view(shape)
                p.grad = self.low_grad[section].view(shape)
            self.deltas[name] = (masters[0], masters[1], m.alpha)
        unet_size = sum(sizes[: 2 * len(unet)])
        self.groups: dict[str, nn.Parameter] = {}
        for name, section in (("unet", slice(0, unet_size)), ("text_encoder", slice(unet_size, None))):
            if self.flat[section].numel():
                self.groups[name] = nn.Parameter(self.flat[section])
                self.groups[name].grad = self.grad[section]

    def load(self, flat: Tensor) -> None:
        """Takes `flat` from a saved state, on the CPU. One of an older commit has no padding."""
        self.flat.copy_(flat if len(flat) == len(self.flat) else spread(flat, self.filled()))
        self.update_layers()

    @property
    def parameter_count(self) -> int:
        """Without the padding."""
        return len(self.flat) - len(self.padding)

    def filled(self) -> Tensor:
        """bool, of the shape of `flat`, on the CPU: False where it is padding."""
        return torch.ones(len(self.flat), dtype=torch.bool).index_fill_(0, self.padding.cpu(), False)

    def collect_gradients(self) -> None:
        """After a backward pass: adds `low_grad` to `grad`, in float32, and zeroes it."""
        if self.low_grad is not self.grad:
            self.grad += self.low_grad
            self.low_grad.zero_()

    def spoil_unless_finite(self, loss: Tensor) -> None:
        """Makes the gradient NaN if `loss` (0-dim, on the device) is not finite, without making the host wait.

        0 × a finite number adds exactly 0; 0 × infinity and 0 × NaN are NaN. One element suffices: after averaging it is NaN
        on every rank, and so is the norm over all elements, so that every rank skips the optimiser step.
        """
        self.grad[0] += 0 * loss

    def clip(self, largest: float) -> Tensor:
        """Scales `grad` down to an L2 norm of at most `largest`. Returns each group's norm before: [groups], on the device."""
        norms = torch.stack([p.grad.norm() for p in self.groups.values() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.groups.values(), largest, norms.norm())
        return norms

    def checksum(self) -> int:
        """Sum of all weights' bits, read as int32: it differs if a single weight does. The host waits for the device."""
        return int(self.flat.view(torch.int32).sum(dtype=torch.int64))

    def zero_gradients(self) -> None:
        """Zeroes both gradient buffers, also what a backward pass that was broken off has left in `low_grad`."""
        self.low_grad.zero_()
        self.grad.zero_()

    def update_layers(self) -> None:
        """After `flat` has changed: copies it into the layers' weights `low`, and zeroes `grad`.

        Zeroes the padding, too: bitsandbytes on the CPU stores a state of 0 as 2e-5 of its block's largest, which moves it.
        """
        self.flat.index_fill_(0, self.padding, 0)
        if self.low is not self.flat:
            self.low.copy_(self.flat)
        self.grad.zero_()

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Inside this context the model computes with W + strength·ΔW; with a strength of 0 as without LoRA."""
        scales = {m: m.scale for m in self.modules.values()}
        for m in scales:
            m.scale *= strength
        try:
            yield
        finally:
            for m, scale in scales.items():
                m.scale = scale


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """{module path: layer} of every linear layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def add_lora(
    model: nn.Module, config: LoRAConfig, unused: Iterable[str] = (), seed: int = 0, dtype: torch.dtype = torch.float32
) -> Adapter:
    """Freezes `model` and replaces each linear layer that `config` selects with a LoRALinear, whose A and B are in `dtype`.

    Layers under the path prefixes `unused` are left out: nothing reads their output, so an adapter there would never get a
    gradient. A is drawn on the CPU from `seed`, so that all ranks and devices start with the same weights.

    Raises UserError if --targets matches no linear layer.
    """
    model.requires_grad_(False)
    generator = seed_generator(torch.Generator(), seed)
    linears = linear_layers(model)
    modules = {}
    for name, linear in linears.items():
        text = name.startswith("text_encoder")
        if not re.search(config.pattern, name) or name.startswith(tuple(unused)) or (text and not config.train_text_encoder):
            continue
        parent, _, child = name.rpartition(".")
        modules[name] = LoRALinear(linear, config.rank, config.resolved_alpha, generator)
        setattr(model.get_submodule(parent), child, modules[name])
    if not modules:
        raise UserError(f"--targets {config.targets!r} matches none of {len(linears)} linear layers, e.g. {list(linears)[:3]}")
    return Adapter(modules, dtype)


def merge_lora(model: nn.Module, deltas: Deltas, strength: float = 1.0) -> None:
    """`merge_loras` of a single one."""
    merge_loras(model, [(deltas, strength)])


@torch.no_grad()
def merge_loras(model: nn.Module, loras: list[tuple[Deltas, float]]) -> None:
    """W += strength · (α/r) · B · A of every (deltas, strength), in place: summed in float32, then cast once to the dtype of W.

    A convolution's W [out, in, kh, kw] is treated as [out, in·kh·kw]. Raises UserError, before any weight has changed, if
    the deltas do not fit the model; and if a sum is not finite.
    """
    weights = {name: weight for deltas, _ in loras for name, weight in check_fit(model, deltas).items()}
    for name, weight in weights.items():
        add_deltas(name, weight, [(deltas[name], strength) for deltas, strength in loras if name in deltas])
