"""Plans how a training step fits into the memory of a GPU, before any weight is on it.

`dry_run` runs the denoiser once on the meta device, where tensors have shapes but no bytes, and records what every block
would keep for the backward pass. `make_plan` saves memory in this order until the step fits: it checkpoints blocks, no more
than needed and those first whose recomputation costs the least time per byte saved; it stores the base in fewer bits; it cuts
the batch into pieces, which costs the most: at 6 GiB int8 in three pieces is half as fast as NF4 in one.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from common.errors import UserError

GiB = 2**30

# Rates of an H100 in half precision. Only their ratio matters: it decides which blocks are cheap to recompute.
FLOPS_PER_SECOND = 4e14
BYTES_PER_SECOND = 1.5e12
SECONDS_PER_OPERATION = 2.5e-6  # that a kernel takes at least: what small layers such as those of the text encoders cost

# Constants that cannot be derived from shapes, calibrated on one H100 against what the allocator reserved for SDXL (fp16,
# batch 3, 1024 × 1024): nothing checkpointed 19.18 GiB, 63 of 271 parts 14.83; NF4 with 113 of 131 whole blocks 4.93.
GRADIENTS = 0.8  # gradients and workspaces while a checkpointed block runs backward, as a multiple of what the block keeps
SAFETY_MARGIN = int(0.3 * GiB)  # workspaces of cuBLAS and cuDNN, prediction, loss, fragmentation
# Bytes for each CUDA graph after the first (one graph per bucket and caption length). The graphs share one pool for
# activations, so another costs only its kernel launches: measured 0.05 GiB outside of the allocator and 0.01 GiB in the pool.
ANOTHER_SHAPE = GiB // 16

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention


def stand_in_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention for the dry run: q [B, S, H, D], k and v [B, T, H, D] -> [B, S, H, D], all on the meta device.

    Calls PyTorch's fused CUDA kernel, which also works on meta tensors (output shape, derivative, FLOP count), because
    scaled_dot_product_attention would not choose it for them. It keeps q, k, v, its output and a float32 [B, H, S] for the
    backward pass, as xFormers does, and no S × T matrix.
    """
    return flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


@dataclass(frozen=True)
class BlockCosts:
    """What the forward pass of one block costs."""

    kept: int  # bytes saved for backward inside the block, except those that stay even if it is checkpointed
    constant: int  # further bytes that do not grow with the batch: LoRA weights cast to the dtype of the activations
    input: int  # bytes kept instead if the block is checkpointed
    flops: int
    written: int  # bytes that its operations return: a measure of the time spent outside of matrix products
    again: tuple[int, int, int] | None = (
        None  # FLOPs, bytes written, operations until it saves its last tensor: a recomputation
    )

    @property
    def worth(self) -> float:
        """Seconds of recomputation saved per byte of memory, if the block is not checkpointed."""
        flops, written, operations = self.again or (self.flops, self.written, 0)
        seconds = flops / FLOPS_PER_SECOND + written / BYTES_PER_SECOND + operations * SECONDS_PER_OPERATION
        return seconds / max(1, self.kept + self.constant - self.input)


@dataclass(frozen=True)
class Costs:
    """What the forward pass of a denoiser on `batch` images costs."""

    batch: int
    blocks: dict[str, BlockCosts]  # {module path: costs} of the blocks that can be checkpointed
    outside: BlockCosts  # everything else, and tensors that several blocks read (context, embedded timestep)
    attention: Counter  # {(shape of q, shape of k): calls}, each [B, S, H, D]

    def held(self, checkpointed: Collection[str], micro: int) -> int:
        """Bytes kept between the forward and the backward pass of `micro` images, if these blocks are checkpointed."""
        kept = [self.outside, *(block for name, block in self.blocks.items() if name not in checkpointed)]
        growing = sum(block.kept for block in kept) + sum(self.blocks[name].input for name in checkpointed)
        return sum(block.constant for block in kept) + math.ceil(growing * micro / self.batch)

    def peak(self, checkpointed: Collection[str], micro: int) -> int:
        """Most bytes that a training step of `micro` images takes at any moment, weights and SAFETY_MARGIN not included.

        Without checkpointing the peak is at the end of the forward pass: the backward pass frees more than its gradients take.
        With it, the peak is in the backward pass of the largest checkpointed block, whose activations were just recomputed.
        """
        recomputed = max((self.blocks[name].kept for name in checkpointed), default=0)
        return self.held(checkpointed, micro) + math.ceil((1 + GRADIENTS) * recomputed * micro / self.batch)


# The dry run.


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Ledger(TorchDispatchMode):
    """Records every operation, and every tensor that autograd saves, under the block that is running (None: outside of all).

    A storage is identified by the address of its C++ object. The ledger keeps every storage alive, so that no address is
    reused; on the meta device that costs nothing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.block: str | None = None
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.weights = {self.storage(t) for t in (*model.parameters(), *model.buffers())}
        # Storages computed from weights alone, whose size does not depend on the batch. In h = x @ A.to(x.dtype).T autograd
        # saves x and the cast of A: x counts as `kept`, which grows with the batch, the cast as `constant`.
        self.casts: set[int] = set()
        self.inputs: dict[int, set] = defaultdict(set)  # {storage: blocks that it is passed to}
        self.savers: dict[int, set] = defaultdict(set)  # {storage: blocks that save it}
        self.flops: Counter[str | None] = Counter()
        self.written: Counter[str | None] = Counter()
        self.operations: Counter[str | None] = Counter()
        self.until_saved: dict[str | None, tuple[int, int, int]] = {}  # {block: the three when it saved its last tensor}
        self.attention: Counter[tuple] = Counter()

    def storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return storage._cdata

    def enter(self, block: str, inputs: Any) -> None:
        self.block = block
        for tensor in tensors(inputs):
            self.inputs[self.storage(tensor)].add(block)

    def leave(self) -> None:
        self.block = None

    def save(self, tensor: Tensor) -> Tensor:
        """Called for each tensor that autograd saves, even if it is freed before the backward pass because no loss depends on
        it: in SDXL the last layer of text encoder 1, 6 MB at batch 3.
        """
        self.savers[self.storage(tensor)].add(self.block)
        self.until_saved[self.block] = self.flops[self.block], self.written[self.block], self.operations[self.block]
        return tensor

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation.is_view:
            return result
        if operation.overloadpacket in flop_registry:
            self.flops[self.block] += flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result)
        if operation.overloadpacket is flash_attention:
            self.attention[tuple(tuple(t.transpose(1, 2).shape) for t in args[:2])] += 1
        self.operations[self.block] += 1
        self.written[self.block] += sum(t.nbytes for t in tensors(result))
        read = {self.storage(t) for t in tensors((args, kwargs))}
        if read and read - self.weights <= self.casts:  # it reads nothing but weights and casts of weights
            self.casts |= {self.storage(t) for t in tensors(result)} - self.weights
        return result

    def costs(self, batch: int, block_names: list[str]) -> Costs:
        """Sums per block. A storage that several blocks save or read, or a block and the code around it, counts once, as
        outside.
        """
        with_backward = set().union(*self.savers.values())  # a block that saves nothing keeps no input when checkpointed either
        kept: Counter[str | None] = Counter()
        constant: Counter[str | None] = Counter()
        inputs: Counter[str | None] = Counter()
        for storage in (self.savers.keys() | self.inputs.keys()) - self.weights:
            size, savers, readers = self.storages[storage].nbytes(), self.savers[storage], self.inputs[storage] & with_backward
            owner, *others = savers | readers or {None}
            if storage in self.casts:
                constant.update(dict.fromkeys(savers, size))
            elif others:
                kept[None] += size
            else:
                kept[owner] += size * len(savers)
                inputs[owner] += size * len(readers)

        def block(name: str | None) -> BlockCosts:
            return BlockCosts(
                kept[name], constant[name], inputs[name], self.flops[name], self.written[name], self.until_saved.get(name)
            )

        return Costs(batch, {name: block(name) for name in block_names}, block(None), self.attention)


def dry_run(denoiser: nn.Module, block_names: list[str], text: tuple[Tensor, ...], latent_side: int | tuple[int, int]) -> Costs:
    """Costs of one forward pass of `denoiser` (model.sdxl.Denoiser), whose weights are on the meta device.

    Call it when the adapters are added, no block is checkpointed yet and the attention of the U-Net is `stand_in_kernel`.
    `block_names`: paths of the modules that can be checkpointed, none inside another. `text`: the denoiser's text inputs for a
    batch, on the meta device too. `latent_side`: pixels / 8 of square images, or (h, w).
    """
    batch = len(text[0])
    h, w = (latent_side, latent_side) if isinstance(latent_side, int) else latent_side
    ledger = Ledger(denoiser)
    with torch.device("meta"), ExitStack() as stack:
        latents, timesteps, ids = torch.empty(batch, 4, h, w), torch.empty(batch, dtype=torch.int64), torch.empty(batch, 6)
        for name in block_names:
            block = denoiser.get_submodule(name)
            enter = lambda _, args, kwargs, name=name: ledger.enter(name, (args, kwargs))  # noqa: E731
            stack.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(block.register_forward_hook(lambda *_: ledger.leave()))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(ledger.save, lambda tensor: tensor))
        stack.enter_context(ledger)
        denoiser(latents, timesteps, text, ids)
    return ledger.costs(batch, block_names)


# The plan.


@dataclass(frozen=True)
class Plan:
    checkpointed: tuple[str, ...]  # module paths
    blocks: int  # how many could be checkpointed
    base: str  # precision that the frozen weights are stored in
    batch: int
    micro: int  # images that run through the model at once: a divisor of the batch
    weights: int  # bytes taken all the time: the base as stored, LoRA and its optimiser
    whole_vae: bool  # the VAE encodes the whole batch at once, not image by image
    predicted: int  # peak of the memory that the allocator reserves, bytes
    budget: int  # bytes
    attention: Counter = field(default_factory=Counter)  # {(shape of q, shape of k): calls} of `micro` images

    @property
    def measures(self) -> str:
        pieces = "one piece" if self.micro == self.batch else f"{self.batch // self.micro} pieces"
        vae = "" if self.whole_vae else ", VAE one image at a time"
        return f"{len(self.checkpointed)} of {self.blocks} parts checkpointed, {self.base} base, batch in {pieces}{vae}"

    @property
    def oom_advice(self) -> str:
        """For the message if memory runs out in spite of the plan: its prediction, and the options that would save memory, in
        the order of `plans`.
        """
        options = [
            *(["--checkpointing all"] if len(self.checkpointed) < self.blocks else []),
            *(["half of --bs and twice --grad-accum"] if self.micro > 1 else []),
            *(["--base-precision nf4"] if self.base != "nf4" else []),
            "a smaller --resolution",
        ]
        prediction = f"the plan predicted a peak of {self.predicted / GiB:.1f} of {self.budget / GiB:.1f} GiB"
        return f"{prediction}; what helps: less as --vram-gb, which plans for it, or {', '.join(options)}"

    def __str__(self) -> str:
        return f"{self.budget / GiB:.1f} GiB for tensors: {self.measures}; predicted peak {self.predicted / GiB:.1f} GiB"


def plans(costs: Costs, fixed: dict[str, int], batch: int, budget: int, checkpointing: str, vae_image: int) -> Iterator[Plan]:
    """Yields every plan in order of preference, whether it fits or not. The arguments are those of `make_plan`."""
    order = tuple(sorted(costs.blocks, key=lambda name: costs.blocks[name].worth))
    counts = {"auto": range(len(order) + 1), "all": [len(order)], "none": [0]}[checkpointing]
    for micro in (n for n in range(batch, 0, -1) if batch % n == 0):
        for base, weights in fixed.items():
            for count in counts:
                training = costs.peak(order[:count], micro)
                for whole_vae in (True, False):
                    peak = weights + SAFETY_MARGIN + max(training, vae_image * (batch if whole_vae else 1))
                    yield Plan(order[:count], len(order), base, batch, micro, weights, whole_vae, peak, budget)


def make_plan(
    costs: Costs, fixed: dict[str, int], batch: int, budget: int, *,
    checkpointing: Literal["auto", "all", "none"] = "auto", vae_image: int = 0,
) -> Plan:  # fmt: skip
    """The first plan whose predicted peak is at most `budget` bytes.

    `fixed`: {precision of the base: bytes of all weights, of LoRA's gradients and of the optimiser's states}, in the order
    to try. `vae_image`: bytes that the VAE needs to encode one image, 0 if the latents are ready.

    Raises UserError, which names options that save memory, if no plan fits.
    """
    rejected = []
    for plan in plans(costs, fixed, batch, budget, checkpointing, vae_image):
        if plan.predicted <= budget:
            return plan
        rejected.append(plan)
    smallest = min(rejected, key=lambda plan: plan.predicted)
    options = [] if "nf4" in fixed else ["--base-precision nf4"]
    room = budget - min(fixed.values()) - SAFETY_MARGIN  # what the weights leave for activations
    if room > 0:
        options += ["a smaller --resolution"]
    if room > vae_image:  # the VAE fits, so it is the training step that is too large
        options += ["--checkpointing auto"] if checkpointing == "none" else []
        trains_text = any(block.kept for name, block in costs.blocks.items() if name.startswith("text"))
        options += ["--no-train-text-encoder"] if trains_text else []
    raise UserError(
        f"--vram-gb, or what is free, leaves {budget / GiB:.1f} GiB for tensors: the smallest plan ({smallest.measures}) needs "
        f"{math.ceil(10 * smallest.predicted / GiB) / 10} GiB; what helps: {', '.join([*options, 'a larger GPU'])}"
    )
