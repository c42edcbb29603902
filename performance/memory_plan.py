"""What must be done so that a training step fits into a GPU, answered before a weight is on it.

`dry_run` runs the denoiser once on the meta device, where tensors have shapes but no bytes, and notes what every block would
keep for the backward pass. `make_plan` gives way in this order until the step fits: checkpoint blocks, no more than needed
and first those that cost the least time for their bytes; cut the batch into pieces; store the base in fewer bits.
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

# Rates of an H100 in half precision. Only their ratio matters: it decides which blocks are cheap to run again.
FLOPS_PER_SECOND = 4e14
BYTES_PER_SECOND = 1.5e12

# What shapes do not tell, calibrated on one H100 against what the allocator reserved for the real architecture (fp16, batch
# 3, 1024 × 1024): nothing checkpointed 21.15 GiB, 82 of 131 blocks 14.46, all of them 9.38 with `--targets all`.
GRADIENTS = 0.8  # gradients and workspaces while a checkpointed block runs backward, in units of what the block keeps
SAFETY_MARGIN = int(0.3 * GiB)  # workspaces of cuBLAS and cuDNN, prediction, loss, gaps
ANOTHER_SHAPE = GiB // 16  # for the graph of every further bucket: 0.05 GiB outside of the allocator, 0.01 in the pool of all

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention


def stand_in_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention for the dry run: q [B, S, H, D], k and v [B, T, H, D] -> [B, S, H, D], all on the meta device.

    PyTorch's fused CUDA kernel has shapes, a derivative and a count of operations there, though PyTorch itself never
    chooses it for meta tensors. It keeps q, k, v, its output and a float32 [B, H, S], as xFormers does: no S × T matrix.
    """
    return flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))[0].transpose(1, 2)


@dataclass(frozen=True)
class BlockCosts:
    """The forward pass of one block."""

    kept: int  # bytes that autograd keeps inside, save those that are kept whether the block is checkpointed or not
    constant: int  # further bytes that do not grow with the batch: LoRA weights in the dtype of the activations
    input: int  # bytes kept instead if the block is checkpointed
    flops: int
    written: int  # bytes that its operations return: a measure of the time that does not go into matrix products

    @property
    def worth(self) -> float:
        """Seconds saved for each byte that is kept because the block is not checkpointed."""
        seconds = self.flops / FLOPS_PER_SECOND + self.written / BYTES_PER_SECOND
        return seconds / max(1, self.kept + self.constant - self.input)


@dataclass(frozen=True)
class Costs:
    """The forward pass of a denoiser on `batch` images."""

    batch: int
    blocks: dict[str, BlockCosts]  # {module path: what can be checkpointed}
    outside: BlockCosts  # everything else, and what several blocks read (context, embedded timestep)
    attention: Counter  # {(shape of q, shape of k): calls}, each [B, S, H, D]

    def held(self, checkpointed: Collection[str], micro: int) -> int:
        """Bytes kept between the forward and the backward pass of `micro` images, if these blocks are checkpointed."""
        kept = [self.outside, *(block for name, block in self.blocks.items() if name not in checkpointed)]
        growing = sum(block.kept for block in kept) + sum(self.blocks[name].input for name in checkpointed)
        return sum(block.constant for block in kept) + math.ceil(growing * micro / self.batch)

    def peak(self, checkpointed: Collection[str], micro: int) -> int:
        """Bytes at the worst moment of a training step of `micro` images, weights and MARGIN apart.

        Without checkpointing this is the end of the forward pass: the gradients that follow take less than what they free.
        With it, the largest checkpointed block has run again and runs backward.
        """
        again = max((self.blocks[name].kept for name in checkpointed), default=0)
        return self.held(checkpointed, micro) + math.ceil((1 + GRADIENTS) * again * micro / self.batch)


# The dry run.


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Ledger(TorchDispatchMode):
    """Sees every operation, and every tensor that autograd saves, and books it on the block that runs (None: on none).

    A storage is known by the address of its C++ object. All are held on to, lest an address come back for another: on the
    meta device that costs nothing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.block: str | None = None
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.weights = {self.storage(t) for t in (*model.parameters(), *model.buffers())}
        self.casts: set[int] = set()  # storages computed from weights alone
        self.inputs: dict[int, set] = defaultdict(set)  # {storage: blocks that it is passed to}
        self.savers: dict[int, set] = defaultdict(set)  # {storage: blocks that save it}
        self.flops: Counter[str | None] = Counter()
        self.written: Counter[str | None] = Counter()
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
        """What autograd soon lets go of counts too: of SDXL the last layer of text encoder 1, 6 MB at batch 3."""
        self.savers[self.storage(tensor)].add(self.block)
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
        self.written[self.block] += sum(t.nbytes for t in tensors(result))
        read = {self.storage(t) for t in tensors((args, kwargs))}
        if read and read - self.weights <= self.casts:
            self.casts |= {self.storage(t) for t in tensors(result)} - self.weights
        return result

    def costs(self, batch: int, block_names: list[str]) -> Costs:
        """Adds up. What several blocks keep or read, or one block and its surroundings, counts once, as outside."""
        with_backward = set().union(*self.savers.values())  # checkpointing keeps the input of these only
        kept: Counter[str | None] = Counter()
        constant: Counter[str | None] = Counter()
        given: Counter[str | None] = Counter()
        for storage in (self.savers.keys() | self.inputs.keys()) - self.weights:
            size, savers, readers = self.storages[storage].nbytes(), self.savers[storage], self.inputs[storage] & with_backward
            owner, *others = savers | readers or {None}
            if storage in self.casts:
                constant.update(dict.fromkeys(savers, size))
            elif others:
                kept[None] += size
            else:
                kept[owner] += size * len(savers)
                given[owner] += size * len(readers)

        def block(name: str | None) -> BlockCosts:
            return BlockCosts(kept[name], constant[name], given[name], self.flops[name], self.written[name])

        return Costs(batch, {name: block(name) for name in block_names}, block(None), self.attention)


def dry_run(denoiser: nn.Module, block_names: list[str], text: tuple[Tensor, ...], latent_side: int | tuple[int, int]) -> Costs:
    """Costs of one forward pass of `denoiser` (sdxl.Denoiser), whose weights are on the meta device.

    To be called when the adapters are added, no block is checkpointed yet and the attention of the U-Net is
    `stand_in_kernel`. `block_names` are the paths of the modules that can be checkpointed, none inside another;
    `text` is what it is told, on the meta device too, of a batch; `latent_side` is pixels / 8, or (h, w).
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
    blocks: int  # of so many
    base: str  # precision that the frozen weights are stored in
    batch: int
    micro: int  # images that run through the model at once: a divisor of the batch
    weights: int  # bytes that stay: the base as stored, LoRA and its optimiser
    whole_vae: bool  # the VAE encodes the whole batch at once, not image by image
    predicted: int  # peak of the memory that the allocator reserves, bytes
    budget: int  # bytes
    attention: Counter = field(default_factory=Counter)  # {(shape of q, shape of k): calls} of `micro` images

    @property
    def measures(self) -> str:
        pieces = "one piece" if self.micro == self.batch else f"{self.batch // self.micro} pieces"
        vae = "" if self.whole_vae else ", VAE one image at a time"
        return f"{len(self.checkpointed)} of {self.blocks} blocks checkpointed, {self.base} base, batch in {pieces}{vae}"

    @property
    def oom_advice(self) -> str:
        """What to say where memory runs out all the same: the prediction, and what would need less, by the order of `plans`."""
        helps = [
            *(["--checkpointing all"] if len(self.checkpointed) < self.blocks else []),
            *(["half of --bs and twice --grad-accum"] if self.micro > 1 else []),
            *(["--base-precision nf4"] if self.base != "nf4" else []),
            "a smaller --resolution",
        ]
        told = f"the plan predicted a peak of {self.predicted / GiB:.1f} of {self.budget / GiB:.1f} GiB"
        return f"{told}; what helps: less as --vram-gb, which plans for it, or {', '.join(helps)}"

    def __str__(self) -> str:
        return f"{self.budget / GiB:.1f} GiB for tensors: {self.measures}; predicted peak {self.predicted / GiB:.1f} GiB"


def plans(costs: Costs, fixed: dict[str, int], batch: int, budget: int, checkpointing: str, vae_image: int) -> Iterator[Plan]:
    """Every plan in the order of preference, whether it fits or not. The arguments are those of `make_plan`."""
    order = tuple(sorted(costs.blocks, key=lambda name: costs.blocks[name].worth))
    numbers = {"auto": range(len(order) + 1), "all": [len(order)], "none": [0]}[checkpointing]
    for base, weights in fixed.items():
        for micro in (n for n in range(batch, 0, -1) if batch % n == 0):
            for number in numbers:
                training = costs.peak(order[:number], micro)
                for whole_vae in (True, False):
                    peak = weights + SAFETY_MARGIN + max(training, vae_image * (batch if whole_vae else 1))
                    yield Plan(order[:number], len(order), base, batch, micro, weights, whole_vae, peak, budget)


def make_plan(
    costs: Costs, fixed: dict[str, int], batch: int, budget: int, *,
    checkpointing: Literal["auto", "all", "none"] = "auto", vae_image: int = 0,
) -> Plan:  # fmt: skip
    """The first plan whose predicted peak is at most `budget` bytes.

    `fixed`: {precision of the base: bytes of all weights, of LoRA's gradients and of the optimiser's states}, in the order
    to try. `vae_image`: bytes that the VAE needs to encode one image, 0 if the latents are ready.

    Raises UserError, which says what would help, if no plan fits.
    """
    tried = []
    for plan in plans(costs, fixed, batch, budget, checkpointing, vae_image):
        if plan.predicted <= budget:
            return plan
        tried.append(plan)
    smallest = min(tried, key=lambda plan: plan.predicted)
    helps = [] if "nf4" in fixed else ["--base-precision nf4"]
    room = budget - min(fixed.values()) - SAFETY_MARGIN  # beside the weights
    if room > 0:
        helps += ["a smaller --resolution"]
    if room > vae_image:  # then it is the training step that is too large
        helps += ["--checkpointing auto"] if checkpointing == "none" else []
        helps += ["--no-train-text-encoder"] if any(costs.blocks[n].kept for n in costs.blocks if n.startswith("text")) else []
    raise UserError(
        f"--vram-gb, or what is free, leaves {budget / GiB:.1f} GiB for tensors: the smallest plan ({smallest.measures}) needs "
        f"{math.ceil(10 * smallest.predicted / GiB) / 10} GiB; what helps: {', '.join([*helps, 'a larger GPU'])}"
    )
