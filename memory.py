"""What trades memory against speed or precision, each behind its own flag: gradient checkpointing, the attention kernel,
8-bit Adam, half precision. Import this file before diffusers, which imports xFormers: see `load_cuda12_runtime`.
"""

import ctypes
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import UserError

GiB = 2**30


def load_cuda12_runtime() -> None:
    """xFormers' wheel is linked against CUDA 12; beside a CUDA-13 PyTorch its library must be in the process beforehand."""
    package = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
    for folder in package.submodule_search_locations if package and torch.cuda.is_available() else ():
        for library in Path(folder).glob("lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_cuda12_runtime()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # at import it warns of parts that SDXL does not use
for library in ("xformers", "bitsandbytes"):  # at import they warn that there is no CUDA; --attention says why if asked
    logging.getLogger(library).setLevel(logging.ERROR)


@dataclass(frozen=True)
class MemoryConfig:
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Dtype of the frozen base and of the activations; LoRA weights stay float32. auto: fp16 on CUDA, fp32 on CPU."""
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    """AdamW with 8-bit states (bitsandbytes), or torch's fused one with 32-bit states."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """Attention kernel of the U-Net. auto: xFormers where it runs forward and backward, else PyTorch's SDPA."""
    checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""


# Precision.


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


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
    return torch.device(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """CPU -> device. Through pinned memory, because a copy from ordinary memory makes the host wait for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def peak_memory(device: torch.device) -> float:
    """Peak of the memory allocated so far, GiB: of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GiB
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB


# Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174).

CHECKPOINTED = {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}


def checkpoint_blocks(model: nn.Module) -> int:
    """Every transformer and residual block keeps its input only and runs again in the backward pass. Returns their number.

    The blocks draw no random numbers, so the state of the generators need not be kept.
    """
    blocks = [m for m in model.modules() if type(m).__name__ in CHECKPOINTED]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return len(blocks)


# Attention.


def why_not_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if xFormers' attention runs forward and backward here; else the reason, in one line."""
    try:
        import xformers.ops
    except Exception as error:  # a missing package, or a library it was linked against
        return f"it cannot be imported: {error}"
    q = torch.zeros(1, 16, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        xformers.ops.memory_efficient_attention(q, q, q).sum().backward()
    except (NotImplementedError, RuntimeError) as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:] if line.startswith("    ")]
        return f"no operator of it runs on {device.type} in {dtype}: {reasons[0] if reasons else error}"
    return None


def choose_attention(unet: nn.Module, attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """Sets the kernel of every attention layer of the U-Net (diffusers) and returns its name.

    Raises UserError with the reason if xFormers is asked for and not usable.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    heads = next(m for m in unet.modules() if type(m).__name__ == "Attention")
    reason = why_not_xformers(device, dtype, heads.inner_dim // heads.heads) if attention != "sdpa" else "not asked for"
    if reason and attention == "xformers":
        raise UserError(f"--attention xformers is not usable: {reason} (use --attention sdpa)")
    unet.set_attn_processor(AttnProcessor2_0() if reason else XFormersAttnProcessor())
    return "sdpa" if reason else "xformers"


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
                    kept = [t.clone() for t in live] if found_inf is not None else []
                    self.update_step(group, p, i, j)
                    for now, before in zip(live, kept, strict=False):
                        now.copy_(torch.where(found_inf > 0, before, now))

    return AdamW8bit(groups, weight_decay=0.01, min_8bit_size=0)
