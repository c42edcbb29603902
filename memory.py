"""What trades memory against speed or precision, each behind its own flag: half precision, gradient checkpointing, 8-bit
Adam, the cap on the device's memory, and the plan by which a step fits under it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import system
from common.errors import UserError, warn
from data import Workload
from lora import add_lora
from model.load import Pipeline
from model.sdxl import Denoiser, blueprint, text_shapes
from model.text import most_chunks
from model.vae import ENCODING, vae_dtype
from options.training import MemoryConfig, TrainConfig
from performance.attention import KERNELS, Kernel, Shapes, choose_attention
from performance.checkpointing import block_names, checkpoint_blocks
from performance.layers import use_fast_layers
from performance.linear_group import LinearGroup
from performance.memory_plan import ANOTHER_SHAPE, Costs, GiB, Plan, dry_run, make_plan, stand_in_kernel
from performance.optimizers import bytes_per_trained, settings_of
from performance.quantise import PACKED_BASES, packed_bytes, quantisable

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# Devices.


def resolve_device(device: str) -> torch.device:
    """'auto' -> CUDA if there is one, else CPU; 'cuda' -> this process's own. Raises UserError if it is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and (reason := why_no_cuda()):
            warn(f"warning: the NVIDIA card of this machine is not used, but the CPU ({reason}); --device cpu means that")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]} (use --device cpu)") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return torch.device(device)


def why_no_cuda() -> str | None:
    """Why PyTorch cannot use the NVIDIA card, and what to do; None if there is none, or if CUDA_VISIBLE_DEVICES hides it."""
    card = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if not card or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA: install the one that pytorch.org shows for CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0].partition(". Please")[0]
        return f"{said}: update NVIDIA's driver, or install a PyTorch for an older CUDA from pytorch.org"
    return "PyTorch finds no card: see what nvidia-smi says"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """CPU -> device. Through pinned memory, because a copy from ordinary memory makes the host wait for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@contextmanager
def temporarily_on(device: torch.device, modules: list[nn.Module]) -> Iterator[None]:
    """Moves `modules` to `device`, and back to the CPU on exit."""
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
    """--vram-gb -> bytes that tensors may take. On CUDA the allocator refuses more from here on.

    None: all that is free now, and no cap; on the CPU all memory of the host, because what is free there varies with its file
    cache. At most what is free: a card that is sold as one of 16 GB has 15.6 GiB, and a desktop takes its part.
    """
    if device.type != "cuda":
        return int(vram_gb * GiB) if vram_gb else system.total_memory()
    free, total = torch.cuda.mem_get_info(device)  # the context is there by now
    left = free - CUDA_ITSELF // 2  # the other half is taken already
    if vram_gb is None:
        return left
    budget = max(0, min(left, int(vram_gb * GiB) - CUDA_ITSELF))
    torch.cuda.set_per_process_memory_fraction(budget / total, device)
    return budget


def peak_memory(device: torch.device) -> tuple[float, float]:
    """GiB (allocated, reserved by the allocator) at their highest so far; on the CPU both are the peak of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GiB, torch.cuda.max_memory_reserved(device) / GiB
    peak = system.peak_of_process() / GiB
    return peak, peak


def forget_peak_memory(device: torch.device) -> None:
    """Gives what the allocator keeps back to the device, and measures `peak_memory` from here on; not on the CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_in_use(device: torch.device) -> float:
    """Share of the device's memory that all its processes have taken; of the host, which swaps and never spills, 0."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


@contextmanager
def note_if_out_of_memory(activity: str) -> Iterator[None]:
    """If memory runs out inside, the error says during which activity; of nested ones the innermost comes first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(activity)
        raise


def describe_out_of_memory(error: torch.OutOfMemoryError) -> str:
    """One line: the activities in which it happened, and PyTorch's first sentences: how much was asked for, and of what."""
    reason = ". ".join(" ".join(str(error).split()).split(". ")[:2])
    return ", ".join(["out of memory", *getattr(error, "__notes__", [])]) + f" ({reason})"


# The plan.


def plan_memory(
    pipe: Pipeline, config: TrainConfig, workload: Workload, device: torch.device, budget: int,
) -> Plan:  # fmt: skip
    """How a step of `workload` fits into `budget` bytes, by a dry run on shapes without weights. `config` is resolved.

    Raises UserError, which says what would help, if it does not fit.
    """
    memory, dtype = config.memory, DTYPES[config.memory.precision]
    budget -= ANOTHER_SHAPE * (workload.shapes - 1)  # the first shape's graph is in what was calibrated
    denoiser = blueprint(pipe, with_text=not workload.has_text)
    vae = vae_dtype(device)
    unpacked = sum(p.nbytes for p in denoiser.parameters())
    unpacked += 0 if workload.has_latents else sum(p.numel() for p in pipe.vae.parameters()) * vae.itemsize
    linears = quantisable(denoiser).values()
    saved = {base: sum(m.weight.nbytes - packed_bytes(m, base) for m in linears) for base in PACKED_BASES}
    adapter = add_lora(denoiser, config.lora, denoiser.unused, dtype=dtype)
    copies = config.changes_steps + bool(config.optimiser.ema)
    each = bytes_per_trained(memory.optimizer, dtype, copies, settings_of(config.optimiser))
    trained = int(adapter.flat.numel() * each)
    speed_up(denoiser, stand_in_kernel, torch.device("meta"))
    text = text_shapes(denoiser, workload.batch, most_chunks(75 * workload.chunks))
    fixed = {base: unpacked - saved.get(base, 0) + trained for base in possible_bases(memory, device)}
    vae_image = 0 if workload.has_latents else ENCODING * workload.resolution**2 * vae.itemsize

    # Parts of blocks first: less is done twice. Whole blocks keep less, so they come where the batch or the base would suffer.
    found: list[tuple[Plan, Costs]] = []
    for whole in (True,) if memory.checkpointing == "all" else (False, True):
        costs = dry_run(denoiser, block_names(denoiser, whole), text, workload.resolution // pipe.vae_scale_factor)
        options: dict[str, Any] = {"checkpointing": memory.checkpointing, "vae_image": vae_image}
        try:
            found.append((make_plan(costs, fixed, workload.batch, budget, **options), costs))
        except UserError:
            if whole and not found:
                raise
        if found and (found[0][0].micro, found[0][0].base) == (workload.batch, next(iter(fixed))):
            break
    plan, costs = min(found, key=lambda pair: (-pair[0].micro, list(fixed).index(pair[0].base)))

    def of_piece(shape: torch.Size) -> torch.Size:
        return torch.Size((plan.micro, *shape[1:]))

    attention = {(of_piece(q), of_piece(k)): calls for (q, k), calls in costs.attention.items()}
    return replace(plan, attention=Shapes(attention))


def possible_bases(memory: MemoryConfig, device: torch.device) -> list[str]:
    """What --base-precision leaves to choose from, in the order of preference."""
    if memory.base_precision in PACKED_BASES:
        return [memory.base_precision]
    automatic = memory.base_precision == "auto" and device.type == "cuda"
    return [memory.precision, *PACKED_BASES] if automatic else [memory.precision]


def speed_up(model: nn.Module, kernel: Kernel, device: torch.device | None = None) -> None:
    """Fast layers in `model`, which has its adapters and is moved to `device` only now; None: it is there already. Images are
    in channels_last if that is CUDA.
    """
    device = device or next(model.parameters()).device
    use_fast_layers(model, kernel, partial(LinearGroup, device=device))
    if device.type == "cuda":
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub with a device
    else:
        model.to(device)


def apply_plan(denoiser: Denoiser, plan: Plan, memory: MemoryConfig, device: torch.device) -> str:
    """Moves the denoiser to `device`, with fast layers, some of them checkpointed. Returns the name of the attention kernel."""
    attention = choose_attention(memory.attention, plan.attention, device, DTYPES[memory.precision])
    speed_up(denoiser, KERNELS[attention], device)
    checkpoint_blocks(denoiser, plan.checkpointed)
    return attention
