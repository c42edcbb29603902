"""What trades memory against speed or precision, each behind its own flag: half precision, gradient checkpointing, 8-bit
Adam, the cap on the device's memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.options import check_options, option
from performance.memory_plan import GiB

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class MemoryConfig:
    vram_gb: float | None = option(None, above=0, at_most=10_000, resume="free")
    """GiB of the GPU that this process may take, CUDA's own included: planned for and enforced. None, or more than is free:
    what is free."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = option("auto")
    """Dtype of the activations; LoRA weights stay float32. auto: fp16 on CUDA, fp32 on CPU."""
    base_precision: Literal["auto", "fp16", "bf16", "fp32", "int8", "nf4"] = option("auto")
    """What the frozen linear layers are stored in. auto: --precision, or fewer bits if the budget asks for it."""
    checkpointing: Literal["auto", "all", "none"] = option("auto", resume="free")
    """Blocks that recompute their activations in the backward pass instead of keeping them. auto: as few as fit."""
    optimizer: Literal["adamw8bit", "adamw"] = option("adamw8bit", resume="fixed")
    """AdamW with 8-bit states (bitsandbytes), or torch's fused one with 32-bit states."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "xformers", "sdpa"] = option("auto", resume="free")
    """Attention kernel of the U-Net. auto: the fastest here. sdpa: PyTorch's choice."""
    cuda_graph: Literal["auto", "on", "off"] = option("auto", resume="free")
    """Replay the step as one CUDA graph. auto: on CUDA, where it can be captured."""
    compile: bool = option(False, resume="free")
    """torch.compile every block of the U-Net: minutes at the start for a few percent, so for long runs only."""

    def __post_init__(self) -> None:
        check_options(self)
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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """CPU -> device. Through pinned memory, because a copy from ordinary memory makes the host wait for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@contextmanager
def temporarily_on(device: torch.device, modules: list[nn.Module]) -> Iterator[None]:
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
