"""LoRA without PEFT: low-rank layers added to a model, and their merging into plain weights (Hu et al. 2021,
arXiv:2106.09685).

    W' = W + (α / r) · B · A          A [r, in] "down", B [out, r] "up", both float32

Outside of a model an adapter is a `Deltas`: {module path: (A, B, α)}. performance/linear_group.py computes and differentiates
the linear layers.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.seeds import seed_generator
from lora_files.deltas import Changes, Deltas, add_deltas, check_fit
from lora_files.kinds import Delta, Difference
from options.training import LoRAConfig
from performance.adamw8bit import STATE_BLOCK, spread
from performance.linear_group import LinearGroup


class RankDropout:
    """Which ranks take part in this forward and backward pass, in each image (--rank-dropout), as kohya's rank_dropout. Those
    that do are scaled up, so that the expected ΔW is the same.

    What autograd and a CUDA graph see is one input of the step, [B, Σ r] of all layers: a function of its seed.
    """

    def __init__(self, share: float, ranks: int):
        """`share`: of ranks that are left out, < 1; `ranks`: of all layers together."""
        self.share, self.ranks = share, ranks
        self.factors: Tensor | None = None  # while it holds: 0, or 1 / (1 - share)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """[batch, ranks]; None, without a random number, where nothing is left out."""
        if not self.share:
            return None
        kept = torch.rand(batch, self.ranks, generator=generator, device=generator.device) >= self.share
        return kept / (1 - self.share)

    @contextmanager
    def __call__(self, factors: Tensor | None) -> Iterator[None]:
        """Forward and backward pass inside, as checkpointed parts are computed again in the latter."""
        before, self.factors = self.factors, factors
        try:
            yield
        finally:
            self.factors = before

    def of(self, places: list[slice], down: Tensor) -> Tensor:
        """x·Aᵀ, or its gradient, [B·tokens, Σ r] or [B, Σ r, h, w] of the layers at `places` -> without the ranks left out."""
        if self.factors is None:
            return down
        factors = torch.cat([self.factors[:, place] for place in places], dim=1).to(down.dtype)
        if down.ndim == 4:
            return down * factors[:, :, None, None]
        return (down.unflatten(0, (len(factors), -1)) * factors[:, None]).flatten(0, 1)


class LowRank:
    """What LoRALinear and LoRAConv2d share: weight and bias of the base layer beside A and B. The class of the layer is another
    parent.

    B starts at zero, so at first the output is that of the base, bit for bit.
    """

    def share(self, base: Any, rank: int, alpha: float, generator: torch.Generator) -> None:
        """A is [rank, in·kh·kw], B [out, rank]; kh·kw is 1 in a linear layer."""
        nn.Module.__init__(self)  # type: ignore[arg-type]  # not its class's, which would allocate and fill a second weight
        for name in type(base).__constants__:  # numbers of features or channels, kernel, stride, padding
            setattr(self, name, getattr(base, name))
        self.weight, self.bias = base.weight, base.bias
        self.alpha, self.scale = alpha, alpha / rank
        convolution = isinstance(base, nn.Conv2d)
        inputs, outputs = (base.weight[0].numel(), len(base.weight)) if convolution else (base.in_features, base.out_features)
        bound = inputs**-0.5  # kaiming_uniform_(a=√5), as in the paper's code
        A = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=base.weight.device))
        for p in (self.lora_A, self.lora_B):
            p.grad = torch.zeros_like(p)
        self.grads: Any = (self.lora_A.grad, self.lora_B.grad)  # float32: the backward pass adds to them
        self.dropout, self.place = RankDropout(0, 0), slice(0, rank)  # and where its ranks are among those of all layers
        self.magnitude: Tensor | None = None  # with DoRA

    def trained(self) -> Iterator[Tensor]:
        """A, B, and with DoRA the magnitude."""
        yield self.lora_A
        yield self.lora_B
        if self.magnitude is not None:
            yield self.magnitude


class LoRALinear(LowRank, nn.Linear):
    """A linear layer with a low-rank branch: y = x·Wᵀ + b + (α/r)·(x·Aᵀ)·Bᵀ.

    With DoRA (Liu et al. 2024, arXiv:2402.09353) every row of V = W + (α/r)·B·A gets a length of its own, `magnitude`, which is
    trained, and at first that of W: y = (magnitude/‖V‖)·(x·Vᵀ) + b. As in the paper ‖V‖ is taken for constant in the gradient.

    A base with a packed weight (QuantisedLinear) has a method `dense()` that unpacks it.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator, dora: bool = False):
        self.share(base, rank, alpha, generator)
        self.unpack = getattr(base, "dense", None)
        if dora:
            self.magnitude = self.lengths()
            self.grads = (*self.grads, torch.zeros_like(self.magnitude))
        self.alone = LinearGroup([self])

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """‖V‖ of every row, [out] float32."""
        W = self.dense()
        V = torch.addmm(W, self.lora_B.to(W), self.lora_A.to(W), alpha=self.scale)
        return torch.linalg.vector_norm(V, dim=1, dtype=torch.float32)

    def scale_change(self, strength: float) -> None:
        """With DoRA: makes the layer that of W + strength·ΔW."""
        magnitude = cast(Tensor, self.magnitude)
        gain = magnitude / self.lengths()
        of_W = 1 - strength + strength * gain  # W + strength·ΔW = of_W·W + strength·gain·(V - W)
        self.lora_B.data *= (strength * gain / of_W)[:, None]
        magnitude.copy_(of_W * self.lengths())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.alone(x)[0]

    def dense(self) -> Tensor:
        """The base weight [out, in], unpacked."""
        return self.unpack() if self.unpack else self.weight


class LoRAConv2d(LowRank, nn.Conv2d):
    """A convolution with a low-rank branch: A is a convolution with the kernel of the base and r outputs, B is 1 × 1 after it
    (LoCon: Yeh et al. 2024, arXiv:2309.14859), as other programs train and read it.
    """

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, generator: torch.Generator):
        self.share(base, rank, alpha, generator)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """nn.Conv2d's, and that of layers which add another bias. x [B, in, h, w] -> [B, out, h', w']."""
        return ConvolutionBranch.apply(self, super()._conv_forward(x, weight, bias), x, self.lora_A)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Views of A as [r, in, kh, kw], and of B as [out, r, 1, 1]."""
        return self.lora_A.view(-1, *self.weight.shape[1:]), self.lora_B[:, :, None, None]


class ConvolutionBranch(torch.autograd.Function):
    """y + (α/r)·B·(A ∗ x). As in `Products`, the gradients of A and B are added to `grads`, in float32."""

    @staticmethod
    def forward(ctx, layer: LoRAConv2d, y: Tensor, x: Tensor, edge: Tensor) -> Tensor:
        """`y` is overwritten. `edge` makes autograd differentiate where x needs no gradient."""
        A, B = layer.kernels()
        down = F.conv2d(x, A, None, layer.stride, layer.padding)
        down = layer.dropout.of([layer.place], down)
        ctx.layer = layer
        ctx.save_for_backward(x, down)
        ctx.mark_dirty(y)
        return y.add_(F.conv2d(down, B), alpha=layer.scale)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        layer, (x, down), none = ctx.layer, ctx.saved_tensors, (False, (0, 0), 1)
        A, B = layer.kernels()
        of_down = (grad_y * layer.scale, down, B, None, (1, 1), (0, 0), (1, 1), *none)
        grad_down, grad_B, _ = torch.ops.aten.convolution_backward(*of_down, (True, True, False))
        grad_down = layer.dropout.of([layer.place], grad_down)
        of_x = (grad_down, x, A, None, layer.stride, layer.padding, (1, 1), *none)
        grad_x, grad_A, _ = torch.ops.aten.convolution_backward(*of_x, (ctx.needs_input_grad[2], True, False))
        for total, grad in zip(layer.grads, (grad_A, grad_B), strict=True):
            total += grad.reshape(total.shape)
        return None, grad_y, grad_x, None


LowRankLayer = LoRALinear | LoRAConv2d


def padded_size(count: int) -> int:
    """The next multiple of STATE_BLOCK."""
    return count + -count % STATE_BLOCK


class Adapter:
    """All layers of a model with LoRA: their weights in one flat float32 buffer `flat`, the gradients in another, `grad`.

    Zeroing, averaging over ranks, clipping and stepping are then one call each instead of two per layer. `groups` splits
    `flat` into one parameter per learning rate: "unet", and "text_encoder" for both encoders. A group without layers is absent.
    Each A and B begins at a multiple of STATE_BLOCK, so that no block of 8-bit states is shared: its scale follows its largest
    value, and A's would be lost beside B's. The padding between them is 0, and is in no LoRA file.

    The layers compute with `low`, a copy of `flat` in the dtype of the base: one cast of the whole buffer replaces four per
    layer and step (float32 masters beside half-precision weights: Micikevicius et al. 2017, arXiv:1710.03740). The backward
    pass adds to `grad` in float32, whatever that dtype. After one that was broken off it holds a part.

    Do not move the model to another device or dtype afterwards: its parameters would no longer be views of these buffers.
    """

    def __init__(
        self, modules: dict[str, LowRankLayer], dtype: torch.dtype, device: torch.device | None = None, rank_dropout: float = 0
    ):
        """`dtype`: of the base; `device`: that the base is, or will be, on."""
        self.modules = modules
        self.dropout = RankDropout(rank_dropout, sum(len(m.lora_A) for m in modules.values()))
        text = {name: m for name, m in modules.items() if name.startswith("text_encoder")}
        unet = {name: m for name, m in modules.items() if name not in text}
        ordered = unet | text
        trained = [(name, m, part) for name, m in ordered.items() for part in m.trained()]
        factors = [part.detach().flatten() for *_, part in trained]
        factors = [factor.to(device or factors[0].device) for factor in factors]  # layers of a packed base are there already
        sizes = [padded_size(len(f)) for f in factors]
        self.flat = torch.cat([F.pad(f, (0, size - len(f))) for f, size in zip(factors, sizes, strict=True)])
        filled = torch.cat([torch.arange(size) < len(f) for f, size in zip(factors, sizes, strict=True)])
        self.padding = (~filled).nonzero().flatten().to(self.flat.device)  # indices in `flat`
        self.grad = torch.zeros_like(self.flat)
        self.low = self.flat.to(dtype, copy=True)
        self.masters: dict[str, list[Tensor]] = {name: [] for name in ordered}  # A, B, and with DoRA the magnitude, in `flat`
        grads: dict[str, list[Tensor]] = {name: [] for name in ordered}  # of the same, in `grad`
        offset = 0
        for (name, m, part), size in zip(trained, sizes, strict=True):
            section, offset = slice(offset, offset + part.numel()), offset + size
            own, grad = self.flat[section].view(part.shape), self.grad[section].view(part.shape)
            self.masters[name].append(own)
            grads[name].append(grad)
            if part is m.magnitude:
                m.magnitude = own.clone()
            else:
                part.data, part.grad = self.low[section].view(part.shape), grad if dtype == torch.float32 else None
        self.deltas: Deltas = {}  # {module path: (A, B, α)}: float32 views of the live weights, a convolution's in its shape
        rank = 0
        for name, m in ordered.items():
            A, B, *_ = self.masters[name]
            kernel = m.weight.shape[2:]
            self.deltas[name] = (A.unflatten(1, (-1, *kernel)), B[:, :, None, None], m.alpha) if kernel else (A, B, m.alpha)
            m.grads, m.dropout, m.place = tuple(grads[name]), self.dropout, slice(rank, rank := rank + len(A))
        self.magnitudes = {name: own[2] for name, own in self.masters.items() if len(own) > 2}
        self.decomposed = [cast(LoRALinear, self.modules[name]) for name in self.magnitudes]  # those with DoRA
        unet_size = sum(size for (name, *_), size in zip(trained, sizes, strict=True) if name in unet)
        self.on_freeze: list[Callable[[], None]] = []
        self.in_use: Callable[[], dict[str, Tensor | None]] = lambda: {"": None}  # see run/optimiser.py
        self.groups: dict[str, nn.Parameter] = {}
        for name, section in (("unet", slice(0, unet_size)), ("text_encoder", slice(unet_size, None))):
            if self.flat[section].numel():
                self.groups[name] = nn.Parameter(self.flat[section])
                self.groups[name].grad = self.grad[section]

    def parameters(self, of_matrices: bool) -> dict[str, list[nn.Parameter]]:
        """{group: what an optimiser is to train}, views of the buffers: the whole group, or every A and B, and with DoRA the
        magnitudes, by itself.
        """
        views = [(name, p.data, p.grad) for name, p in self.groups.items()]
        if of_matrices:
            views = [
                ("text_encoder" if name.startswith("text_encoder") else "unet", master, grad)
                for name, own in self.masters.items() for master, grad in zip(own, self.modules[name].grads, strict=True)
            ]  # fmt: skip
        found: dict[str, list[nn.Parameter]] = {name: [] for name in self.groups}
        for name, values, grad in views:
            found[name].append(nn.Parameter(values))
            found[name][-1].grad = grad
        return found

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

    def spoil_unless_finite(self, loss: Tensor) -> None:
        """Makes the gradient NaN if `loss` (0-dim, on the device) is not finite, without making the host wait.

        0 × a finite number adds exactly 0; 0 × infinity and 0 × NaN are NaN. One element suffices: after averaging it is NaN
        on every rank, and so is the norm over all elements, so that every rank skips the optimiser step.
        """
        self.grad[0] += 0 * loss

    def clip(self, largest: float) -> Tensor:
        """Scales `grad` down to an L2 norm of at most `largest`, unless that is 0. Returns each group's norm before:
        [groups], on the device.
        """
        norms = torch.stack([p.grad.norm() for p in self.groups.values() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(self.groups.values(), largest or math.inf, norms.norm())
        return norms

    def freeze(self, names: Collection[str]) -> None:
        """Trains the layers below these names, as "text_encoder_2", no further: autograd passes them by. `on_freeze` is called,
        as a CUDA graph does not know of it.
        """
        for name, m in self.modules.items():
            if name.partition(".")[0] in names:
                m.requires_grad_(False)
        for call in self.on_freeze:
            call()

    def checksum(self) -> int:
        """Sum of all weights' bits, read as int32: it differs if a single weight does. The host waits for the device."""
        return int(self.flat.view(torch.int32).sum(dtype=torch.int64))

    def zero_gradients(self) -> None:
        """Also of what a backward pass that was broken off has left."""
        self.grad.zero_()

    def update_layers(self) -> None:
        """After `flat` has changed: copies it into the layers' weights `low`, and zeroes `grad`.

        Zeroes the padding, too: bitsandbytes on the CPU stores a state of 0 as 2e-5 of its block's largest, which moves it.
        """
        self.flat.index_fill_(0, self.padding, 0)
        self.low.copy_(self.flat)
        for m, magnitude in zip(self.decomposed, self.magnitudes.values(), strict=True):
            cast(Tensor, m.magnitude).copy_(magnitude)
        self.grad.zero_()

    def keep_lengths(self) -> None:
        """With DoRA: makes every layer that of W + (α/r)·B·A, as without it."""
        for m, magnitude in zip(self.decomposed, self.magnitudes.values(), strict=True):
            magnitude.copy_(m.lengths())
        self.update_layers()

    @contextmanager
    def holding(self, weights: Tensor | None) -> Iterator[None]:
        """Inside this context the LoRA has other weights, of the shape of `flat`. None: its own. Between steps only."""
        if weights is None:
            yield
            return
        before = self.flat.clone()
        self.flat.copy_(weights)
        self.update_layers()
        try:
            yield
        finally:
            self.flat.copy_(before)
            self.update_layers()

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Inside this context the model computes with W + strength·ΔW; with a strength of 0 as without LoRA.

        B is scaled in place, so that a CUDA graph recorded at one strength computes with another.
        """
        before = self.low.clone()
        lengths = [cast(Tensor, m.magnitude).clone() for m in self.decomposed]
        if not self.decomposed:  # DoRA is on all layers or on none
            torch._foreach_mul_([m.lora_B.data for m in self.modules.values()], strength)
        for m in self.decomposed:
            m.scale_change(strength)
        try:
            yield
        finally:
            self.low.copy_(before)
            for m, length in zip(self.decomposed, lengths, strict=True):
                cast(Tensor, m.magnitude).copy_(length)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """{module path: layer} of every linear layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


CONVOLUTIONS = r"^unet\..*\.(conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv)$"  # those of other programs


def chosen(name: str, convolution: bool, config: LoRAConfig) -> bool:
    """Whether `config` selects this layer, which is linear or a convolution."""
    if convolution:
        return config.conv_rank is not None and bool(re.search(CONVOLUTIONS, name))
    return bool(re.search(config.pattern, name)) and (config.train_text_encoder or not name.startswith("text_encoder"))


def add_lora(
    model: nn.Module, config: LoRAConfig, unused: Iterable[str] = (), seed: int = 0, dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Adapter:  # fmt: skip
    """Freezes `model` and replaces each layer that `config` selects with one with LoRA, whose A and B are in `dtype`, on
    `device`; None: on that of the layer.

    Layers under the path prefixes `unused` are left out: nothing reads their output, so an adapter there would never get a
    gradient. A is drawn on the CPU from `seed`, so that all ranks and devices start with the same weights.

    Raises UserError if --targets matches no linear layer.
    """
    model.requires_grad_(False)
    generator = seed_generator(torch.Generator(), seed)
    linears = linear_layers(model)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    modules: dict[str, LowRankLayer] = {}
    for name, layer in (linears | convolutions).items():
        convolution = name in convolutions
        if not chosen(name, convolution, config) or name.startswith(tuple(unused)):
            continue
        parent, _, child = name.rpartition(".")
        rank = config.rank_of(name, convolution)
        kind = cast(Any, LoRAConv2d if convolution else partial(LoRALinear, dora=config.dora))
        modules[name] = kind(layer, rank, config.stored_alpha(rank, convolution), generator)
        setattr(model.get_submodule(parent), child, modules[name])
    if modules.keys() <= convolutions.keys():
        raise UserError(f"--targets {config.targets!r} matches none of {len(linears)} linear layers, e.g. {list(linears)[:3]}")
    check_patterns("--rank-pattern", config.rank_pattern, modules)
    check_patterns("--lr-pattern", config.lr_pattern, modules)
    return Adapter(modules, dtype, device, config.rank_dropout)


def check_patterns(flag: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raises UserError for a pattern, REGEX=NUMBER, that finds none of the trained layers `names`."""
    for text in patterns:
        if not any(re.search(text.rpartition("=")[0], name) for name in names):
            raise UserError(f"{flag} {text!r} finds none of the trained layers, e.g. {next(iter(names))}")


def merge_lora(model: nn.Module, deltas: Changes, strength: float = 1.0) -> None:
    """`merge_loras` of a single one."""
    merge_loras(model, [(deltas, strength)])


@torch.no_grad()
def merge_loras(model: nn.Module, loras: list[tuple[Changes, float]]) -> None:
    """W += strength · ΔW of every (deltas, strength), in place: summed in float32, then cast once to the dtype of W.

    A convolution's W [out, in, kh, kw] is treated as [out, in·kh·kw]. Raises UserError, before any weight has changed, if
    the deltas do not fit the model; and if a sum is not finite.
    """
    weights: dict[str, Tensor] = {}
    changes: dict[str, list[tuple[Delta | Difference, float]]] = {}
    for deltas, strength in loras:
        for key, weight in check_fit(model, deltas).items():
            name = key.removesuffix(".weight")  # of a layer and of its parameter: one sum, as DoRA's ΔW is that of the base
            weights[name] = weight
            changes.setdefault(name, []).append((deltas[key], strength))
    for name, weight in weights.items():
        add_deltas(name, weight, changes[name])
