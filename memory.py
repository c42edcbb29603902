"""What trades memory against speed or precision, each behind its own flag: half precision, gradient checkpointing, 8-bit
Adam, the cap on the device's memory. Import this file before diffusers, which imports xFormers: see `load_cuda12_runtime`.
"""

import ctypes
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import UserError

GiB = 2**30
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_cuda12_runtime() -> None:
    """xFormers' wheel is linked against CUDA 12; beside a CUDA-13 PyTorch its library must be in the process beforehand."""
    package = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
    folders = package.submodule_search_locations if package and torch.cuda.is_available() else None
    for folder in folders or ():
        for library in Path(folder).glob("lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_cuda12_runtime()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # at import it warns of parts that SDXL does not use
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation; hardly any gaps
for library in ("xformers", "bitsandbytes"):  # at import they warn that there is no CUDA
    logging.getLogger(library).setLevel(logging.ERROR)


@dataclass(frozen=True)
class MemoryConfig:
    vram_gb: float | None = None
    """GiB of the GPU that this process may take, CUDA's own included: planned for and enforced. None, or more than is free:
    what is free."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Dtype of the activations; LoRA weights stay float32. auto: fp16 on CUDA, fp32 on CPU."""
    base_precision: Literal["auto", "fp16", "bf16", "fp32", "int8", "nf4"] = "auto"
    """What the frozen linear layers are stored in. auto: --precision, or fewer bits if the budget asks for it."""
    checkpointing: Literal["auto", "all", "none"] = "auto"
    """Blocks that recompute their activations in the backward pass instead of keeping them. auto: as few as fit."""
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    """AdamW with 8-bit states (bitsandbytes), or torch's fused one with 32-bit states."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "xformers", "sdpa"] = "auto"
    """Attention kernel of the U-Net. auto: the fastest here. sdpa: PyTorch's choice."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph. auto: on CUDA, where it can be captured."""
    compile: bool = False
    """torch.compile every block of the U-Net: minutes at the start for a few percent, so for long runs only."""

    def __post_init__(self) -> None:
        if self.vram_gb is not None and not 0 < self.vram_gb < 1e4:
            raise UserError(f"--vram-gb must lie between 0 and 10000, not {self.vram_gb}")
        if self.base_precision in DTYPES and self.precision not in ("auto", self.base_precision):
            raise UserError(f"--base-precision {self.base_precision} contradicts --precision {self.precision}: leave one away")


# Precision.


def resolve_precision(precision: str, device: torch.device) -> str:
    """'auto' -> 'fp16' on CUDA, as in the recipe, 'fp32' elsewhere."""
    return precision if precision != "auto" else "fp16" if device.type == "cuda" else "fp32"


def resolve_device(device: str) -> torch.device:
    """'auto' -> CUDA if there is one, else CPU; 'cuda' -> this process's own. Raises UserError if it is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]} (use --device cpu)") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return torch.device(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """CPU -> device. Through pinned memory, because a copy from ordinary memory makes the host wait for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@contextmanager
def visiting(device: torch.device, modules: list[nn.Module]) -> Iterator[None]:
    """These are on the device meanwhile, and on the host afterwards."""
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")


# The cap.

CUDA_ITSELF = GiB  # context, loaded kernels and recorded graph, outside of PyTorch's allocator: 0.9 measured on an H100


def limit_memory(vram_gb: float | None, device: torch.device) -> int:
    """--vram-gb -> bytes that tensors may take, enforced from here on by PyTorch's allocator; on the CPU only planned with.

    None: what is free now; of the host, all it has: a plan must not depend on what its cache of files holds just then. More
    than is free is that: a card that is sold as one of 16 GB has 15.6 GiB, and a desktop takes its part.
    """
    if device.type != "cuda":
        return int(vram_gb * GiB) if vram_gb else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, total = torch.cuda.mem_get_info(device)  # the context is there by now
    left = free - CUDA_ITSELF // 2
    if vram_gb is None:
        return left
    budget = max(0, min(left, int(vram_gb * GiB) - CUDA_ITSELF))
    torch.cuda.set_per_process_memory_fraction(budget / total, device)
    return budget


def peak_memory(device: torch.device) -> tuple[float, float]:
    """GiB (allocated, reserved by the allocator) at their highest so far; on the CPU twice the peak of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GiB, torch.cuda.max_memory_reserved(device) / GiB
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB
    return peak, peak


def memory_in_use(device: torch.device) -> float:
    """Share of the device's memory that all its processes have taken; of the host, which swaps and never spills, 0."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


# Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174).

BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}


def block_names(model: nn.Module) -> list[str]:
    """Paths of the transformer and residual blocks of `model`: what can be recomputed, and compiled, one by one."""
    return [name for name, module in model.named_modules() if type(module).__name__ in BLOCKS]


def checkpoint_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """These blocks keep their input only and run again in the backward pass.

    They draw no random numbers, so the state of the generators need not be kept.
    """
    for name in names:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """torch.compile of each block by itself: blocks of one kind and shape share the compiled code."""
    torch._dynamo.config.recompile_limit = 64  # one entry for each kind and shape of block
    for name in names:
        block = model.get_submodule(name)
        block.forward = torch.compile(block.forward, dynamic=False)


# Optimiser.


def make_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with weight decay 0.01 over flat parameters.

    Both kinds take part in GradScaler's protocol for fused optimisers: the skipped step of an overflow is decided on the
    device, so that no step waits for the host.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """8-bit states, quantised in blocks (Dettmers et al. 2021, arXiv:2110.02861).

        Unlike its parent it waits for the device nowhere. A step that overflowed is taken back on the device; the bias
        correction, a number of the host, counts it all the same.
        """

        _step_supports_amp_scaling = True  # GradScaler then sets self.found_inf instead of reading it on the host

        @torch.no_grad()
        def step(self) -> None:
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            for i, group in enumerate(self.param_groups):
                for j, p in enumerate(group["params"]):
                    if not self.state[p]:
                        self.init_state(group, p, i, j)
                    live = [p, *(self.state[p][name] for name in ("state1", "state2", "absmax1", "absmax2"))]
                    kept = [t.clone() for t in live]
                    self.update_step(group, p, i, j)
                    if found_inf is not None:
                        for now, before in zip(live, kept, strict=True):
                            now.copy_(torch.where(found_inf > 0, before, now))

    return AdamW8bit(groups, weight_decay=0.01, min_8bit_size=0)


def update_scale(scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """scaler.update(), but a loss that is not finite leaves the scale as it is: no smaller one would mend that.

    `loss`: [], of the step, the same on all ranks. Does not wait for the device.
    """
    one = torch.ones_like(loss)
    kept = scaler.scale(one)
    scaler.update()
    scaler.update(torch.where(loss.isfinite(), scaler.scale(one), kept))


def bytes_per_trained(optimizer: str, dtype: torch.dtype) -> int:
    """What a trained parameter takes besides the activations: itself, gradient, states, copies in `dtype` and of a step."""
    copies = 0 if dtype == torch.float32 else 2 * dtype.itemsize
    return 4 + 4 + copies + (2 + 10 if optimizer == "adamw8bit" else 8)
