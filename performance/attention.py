"""Attention on [B, S, H, D], without copying the heads, by the kernel that is fastest on this device."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError
from common.files import sha256_of, user_cache, write_atomically

logging.getLogger("xformers").setLevel(logging.ERROR)  # at import it warns if CUDA is missing; `kernel_problem` reports that

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, H, D], k and v [B, T, H, D] -> [B, S, H, D]
Shapes = Counter[tuple[torch.Size, torch.Size]]  # {(shape of q, shape of k): number of attention layers of a model}


# All kernels are exact, and none stores an S × T matrix, except on the CPU (Dao et al. 2022, arXiv:2205.14135).


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, by the kernel that PyTorch chooses."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def sdpa_by(*order: SDPBackend) -> Kernel:
    """scaled_dot_product_attention, by the first of these kernels that can."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(list(order), set_priority=len(order) > 1):
            return sdpa(q, k, v)

    return kernel


def drawing_kernel(device: torch.device) -> Kernel:
    """PyTorch's choice, but on Hopper and newer cuDNN's where it can. To time all kernels takes longer than a picture."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return sdpa
    by = SDPBackend
    return sdpa_by(by.CUDNN_ATTENTION, by.FLASH_ATTENTION, by.EFFICIENT_ATTENTION, by.MATH)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    return xformers.ops.memory_efficient_attention(q, k, v)


KERNELS: dict[str, Kernel] = {
    "cudnn": sdpa_by(SDPBackend.CUDNN_ATTENTION),
    "flash": sdpa_by(SDPBackend.FLASH_ATTENTION),
    "efficient": sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
    "xformers": xformers,
    "sdpa": sdpa,
}


def forward_backward(kernel: Kernel, tensors: list[Tensor]) -> list[Tensor]:
    """[q, k, v, gradient of the output] -> [output, gradients of q, k and v]."""
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    out = kernel(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def kernel_problem(name: str, q: torch.Size, k: torch.Size, device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs a kernel on these shapes, forward and backward, and compares it with float32 arithmetic.

    Returns None if it is usable, else the reason why not. Raises torch.OutOfMemoryError.
    """
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in (q, k, k, q)]
    try:
        results = forward_backward(KERNELS[name], tensors)
    except ImportError as error:  # the package is missing, or a library that it was linked against
        return f"it cannot be imported: {error}"
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        lines = str(error).splitlines()
        reasons = [line.strip() for line in lines[1:] if line.startswith("    ")]  # xFormers gives one for each operator
        return f"it does not run on {device.type} in {dtype}: {reasons[0] if reasons else lines[0]}"
    one_head = [t[:1, :, :1].float() for t in tensors]  # enough, as heads are independent; all would not fit a small card
    with sdpa_kernel(SDPBackend.MATH):
        exact = forward_backward(sdpa, one_head)
    errors = [((a[:1, :, :1] - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]
    if all(error < 0.02 for error in errors):
        return None
    return f"it is wrong on {device.type} in {dtype}: relative errors {', '.join(f'{error:.2g}' for error in errors)}"


def time_kernel(
    kernel: Kernel, q: torch.Size, k: torch.Size, device: torch.device, dtype: torch.dtype, backward: bool = True
) -> float:
    """Milliseconds of one forward pass, and one backward pass if `backward`, on CUDA: the best of five.

    Replays a CUDA graph, because for small shapes launching the kernels takes longer than running them.
    """
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in (q, k, k, q)]
    work = partial(forward_backward, kernel, tensors) if backward else partial(kernel, *tensors[:3])
    work()  # the first call of a library selects kernels, which cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize(device)
    return min(a.elapsed_time(b) for a, b in pairwise(events))


def choose_attention(attention: str, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel for --attention `attention`. "auto": the fastest for all of `shapes`, forward and backward.

    Raises UserError with the reason if a kernel is named that is not usable.
    """
    if attention == "auto" and device.type != "cuda":
        return "sdpa"
    if attention != "auto":
        reasons = [kernel_problem(attention, q, k, device, dtype) for q, k in shapes]
        if reason := next(filter(None, reasons), None):
            raise UserError(f"--attention {attention} is not usable: {reason} (use --attention sdpa)")
        return attention

    def usable(name: str) -> bool:
        return not any(kernel_problem(name, q, k, device, dtype) for q, k in shapes)

    # What was the fastest before on such a card, with these versions, is only tried again: seconds less at the start.
    versions = torch.__version__, torch.backends.cudnn.version(), find_spec("xformers") and version("xformers")
    measured = torch.cuda.get_device_name(device), *versions, dtype, sorted(shapes.items())
    remembered = user_cache("attention") / sha256_of(repr(measured).encode())
    with suppress(OSError, UnicodeError):
        name = remembered.read_text("utf-8")
        if name in KERNELS and usable(name):
            return name
    candidates = [name for name in KERNELS if name != "sdpa" and usable(name)]  # sdpa only chooses one of the others
    times = {
        name: sum(n * time_kernel(KERNELS[name], q, k, device, dtype) for (q, k), n in shapes.items()) for name in candidates
    }
    fastest = min(times, key=lambda name: times[name], default="sdpa")
    with suppress(OSError):
        write_atomically(remembered, fastest.encode())
    return fastest
