"""The U-Net's attention and feed-forward computed faster than diffusers computes them: same weights, same function.

attention   straight on [B, S, H, D], without copies of the heads, by the kernel that is fastest here
GEGLU       its two halves as two products, so that every pass after them is over contiguous memory
"""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError

logging.getLogger("xformers").setLevel(logging.ERROR)  # at import it warns that there is no CUDA; --attention says why if asked

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, H, D], k and v [B, T, H, D] -> [B, S, H, D]
Shapes = Counter[tuple[torch.Size, torch.Size]]  # (q, k) of the attention layers of a model: how many


# Attention. Every kernel is exact, and none but the CPU's stores an S × T matrix (Dao et al. 2022, arXiv:2205.14135).


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, by the kernel that PyTorch chooses."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def sdpa_by(backend: SDPBackend) -> Kernel:
    """The same by one of its kernels."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return kernel


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


def why_not(name: str, q: torch.Size, k: torch.Size, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernel runs on these shapes forward and backward, and agrees with float32 arithmetic; else the reason."""
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in (q, k, k, q)]
    try:
        ours = forward_backward(KERNELS[name], tensors)
    except ImportError as error:  # a missing package, or a library it was linked against
        return f"it cannot be imported: {error}"
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        lines = str(error).splitlines()
        reasons = [line.strip() for line in lines[1:] if line.startswith("    ")]  # of xFormers, operator by operator
        return f"it does not run on {device.type} in {dtype}: {reasons[0] if reasons else lines[0]}"
    one_head = [t[:1, :, :1].float() for t in tensors]  # heads are independent: the whole would not fit into a small card
    with sdpa_kernel(SDPBackend.MATH):
        exact = forward_backward(sdpa, one_head)
    errors = [((a[:1, :, :1] - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]
    if all(error < 0.02 for error in errors):
        return None
    return f"it is wrong on {device.type} in {dtype}: relative errors {', '.join(f'{error:.2g}' for error in errors)}"


def time_kernel(
    kernel: Kernel, q: torch.Size, k: torch.Size, device: torch.device, dtype: torch.dtype, backward: bool = True
) -> float:
    """Forward, and backward, on CUDA, the best of five; as a graph, because launching takes longer than the small shapes."""
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in (q, k, k, q)]
    work = partial(forward_backward, kernel, tensors) if backward else partial(kernel, *tensors[:3])
    work()  # libraries choose on their first call
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
    """--attention -> the name of a kernel; auto: the one that does all of `shapes`, forward and backward, in the least time.

    Raises UserError with the reason if the kernel that was asked for is not usable.
    """
    if attention == "auto" and device.type != "cuda":
        return "sdpa"
    if attention != "auto":
        reasons = [why_not(attention, q, k, device, dtype) for q, k in shapes]
        if reason := next(filter(None, reasons), None):
            raise UserError(f"--attention {attention} is not usable: {reason} (use --attention sdpa)")
        return attention
    named = [name for name in KERNELS if name != "sdpa"]  # which is one of them
    right = [name for name in named if not any(why_not(name, q, k, device, dtype) for q, k in shapes)]
    times = {name: sum(n * time_kernel(KERNELS[name], *s, device, dtype) for s, n in shapes.items()) for name in right}
    return min(times, key=lambda name: times[name], default="sdpa")


class AttentionProcessor:
    """Computes diffusers' `Attention` modules; SDXL's have neither masks nor norms nor residuals of their own."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
    ) -> Tensor:
        """hidden_states [B, S, C], encoder_hidden_states [B, T, C'] or None (self-attention) -> [B, S, C]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
        return attn.to_out[0](self.kernel(q, k, v).flatten(2))


# The gated feed-forward (Shazeer 2020, arXiv:2002.05202).


class Gate(torch.autograd.Function):
    """h · gelu(g): keeps h and g, and computes gelu(g) again for the backward pass."""

    @staticmethod
    def forward(ctx, h: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(h, g)
        return F.gelu(g).mul_(h)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, g = ctx.saved_tensors
        return F.gelu(g).mul_(grad), torch.ops.aten.gelu_backward(grad * h, g)


def forward_rows(linear: Any, x: Tensor, part: slice) -> Tensor:
    """Some of the outputs of a linear layer, in memory of their own. A LoRA or a packed layer knows how itself."""
    if hasattr(linear, "forward_rows"):
        return linear.forward_rows(x, part)
    return F.linear(x, linear.weight[part], linear.bias[part])


def geglu(self: Any, x: Tensor) -> Tensor:
    """The forward of diffusers' GEGLU: x [..., in] -> [..., d]."""
    half = self.proj.out_features // 2
    return Gate.apply(forward_rows(self.proj, x, slice(half)), forward_rows(self.proj, x, slice(half, None)))


def use_fast_kernels(unet: Any, kernel: Kernel) -> None:
    """Every attention and every GEGLU layer of diffusers' U-Net is computed by this file from here on."""
    unet.set_attn_processor(AttentionProcessor(kernel))
    for module in unet.modules():
        if type(module).__name__ == "GEGLU":
            module.forward = MethodType(geglu, module)
