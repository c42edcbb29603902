"""Normalisation and activations that keep little for the backward pass and pass over memory once, each way.

On CUDA the kernels of performance.kernels compute them. Elsewhere, and where Triton is missing, PyTorch's operations do: the
same function. Scale and offset of a norm are frozen: they get no gradient.
"""

import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton's kernels run on the CPU
TILE_ROWS, CHANNELS, GROUP_WIDTH = 32, 64, 128  # of a tile; most channels of a group
GATE_BLOCK = 1024
MOST_CHUNKS = 256  # of an image, each summed by a program of its own


def in_one_pass(x: Tensor) -> bool:
    """Whether a kernel of ours computes on tensors like x. On the meta device too: there a step on CUDA is planned."""
    return HAS_TRITON and (x.is_cuda or x.is_meta or INTERPRETED)


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel of performance.kernels on the device of its first argument; on the meta device nothing."""
    if arguments[0].is_meta:
        return
    from performance import kernels  # not at the top: Triton's import takes half a second, and may be missing

    getattr(kernels, name)[grid](*arguments, **constants)


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


# The gated feed-forward (Shazeer 2020, arXiv:2002.05202).


def gate(hg: Tensor) -> Tensor:
    """hg [..., 2·F] -> h · gelu(g) [..., F], with the exact gelu. Without gradient."""
    if not in_one_pass(hg):
        h, g = hg.chunk(2, dim=-1)
        return F.gelu(g).mul_(h)
    hg, width = hg.contiguous(), hg.shape[-1] // 2
    out = hg.new_empty(*hg.shape[:-1], width)
    launch("gate_forward", gate_grid(out), hg, out, width, BLOCK=GATE_BLOCK)
    return out


def gate_gradient(grad: Tensor, hg: Tensor, with_out: bool) -> tuple[Tensor, Tensor]:
    """(gradient of hg; the gate's output, made again if `with_out`)."""
    if not in_one_pass(hg):
        h, g = hg.chunk(2, dim=-1)
        activated = F.gelu(g)
        grad_hg = torch.cat([activated * grad, torch.ops.aten.gelu_backward(grad * h, g)], dim=-1)
        return grad_hg, activated.mul_(h)
    grad, hg = grad.contiguous(), hg.contiguous()
    grad_hg, out = torch.empty_like(hg), torch.empty_like(grad) if with_out else grad
    launch("gate_backward", gate_grid(grad), grad, hg, grad_hg, out, grad.shape[-1], WITH_OUT=with_out, BLOCK=GATE_BLOCK)
    return grad_hg, out


def gate_grid(out: Tensor) -> tuple[int, int]:
    return out.numel() // out.shape[-1], -(-out.shape[-1] // GATE_BLOCK)


# Layer norm (Ba et al. 2016, arXiv:1607.06450), where x is also read by the residual connection around it.


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """x [..., C] -> the same shape. Without gradient, of x where `in_one_pass`."""
    x, width = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    rows, block = (x.numel() // width,), power_of_two(width)
    launch("layer_norm_forward", rows, x, norm.weight, norm.bias, y, width, norm.eps, BLOCK=block)
    return y


def layer_norm_gradient(
    grad_y: Tensor, grad_x: Tensor, x: Tensor, norm: torch.nn.LayerNorm, with_y: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of x by the norm + `grad_x`, what it got elsewhere; y, made again if `with_y`). Of x where `in_one_pass`."""
    grad_y, grad_x, x, width = grad_y.contiguous(), grad_x.contiguous(), x.contiguous(), x.shape[-1]
    result = torch.empty_like(x)
    y = torch.empty_like(x) if with_y else result
    rows, block = (x.numel() // width,), power_of_two(width)
    tensors = (grad_y, grad_x, x, norm.weight, norm.bias, y, result)
    launch("layer_norm_backward", rows, *tensors, width, norm.eps, WITH_Y=with_y, BLOCK=block)
    return result, y


# Group norm (Wu and He 2018, arXiv:1803.08494), with SiLU after it, of channels_last.


class GroupNorm(torch.autograd.Function):
    """x [B, C, h, w] -> (x, its group norm, with SiLU if `silu`), in channels_last. Keeps x and two numbers for each group."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: torch.nn.GroupNorm, silu: bool) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.norm, ctx.silu = norm, silu
        ctx.set_materialize_grads(False)  # where there is no residual connection
        batch, channels, width, pixels, size, chunks, tiles, apply = grids(x, norm)
        means, squares = (x.new_empty(batch, chunks, channels, dtype=torch.float32) for _ in range(2))
        statistics, y = x.new_empty(batch, norm.num_groups, 2, dtype=torch.float32), torch.empty_like(x)
        sizes, tile, of_group = (
            (pixels, channels),
            {"ROWS": TILE_ROWS, "BLOCK": CHANNELS},
            {"ROWS": TILE_ROWS, "BLOCK": GROUP_WIDTH},
        )
        launch("channel_statistics", tiles, x, means, squares, *sizes, size, **tile)
        groups = (batch, norm.num_groups)
        launch("group_statistics", groups, means, squares, statistics, *sizes, chunks, width, norm.eps, size, **of_group)
        launch("group_norm_forward", apply, x, norm.weight, norm.bias, statistics, y, *sizes, width, SILU=silu, **tile)
        ctx.save_for_backward(x, statistics)
        return x, y

    @staticmethod
    def backward(ctx, grad_x: Tensor | None, grad_y: Tensor) -> tuple[Tensor, None, None]:
        x, statistics = ctx.saved_tensors
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        norm = ctx.norm
        batch, channels, width, pixels, size, chunks, tiles, apply = grids(x, norm)
        sums, alongs = (x.new_empty(batch, chunks, channels, dtype=torch.float32) for _ in range(2))
        means, result = torch.empty_like(statistics), torch.empty_like(x)
        inputs, tile = (grad_y, x, norm.weight, norm.bias, statistics), {"ROWS": TILE_ROWS, "BLOCK": CHANNELS}
        launch("channel_gradients", tiles, *inputs, sums, alongs, pixels, channels, width, size, SILU=ctx.silu, **tile)
        groups = (batch, norm.num_groups)
        launch(
            "group_gradients", groups, sums, alongs, means, pixels, channels, chunks, width, ROWS=TILE_ROWS, BLOCK=GROUP_WIDTH
        )
        added = result if grad_x is None else grad_x.contiguous(memory_format=torch.channels_last)
        tensors, options = (*inputs, means, added, result), {"SILU": ctx.silu, "ADD": grad_x is not None}
        launch("group_norm_backward", apply, *tensors, pixels, channels, width, **options, **tile)
        return result, None, None


def grids(x: Tensor, norm: torch.nn.GroupNorm) -> tuple[Any, ...]:
    """(batch, channels, channels of a group, pixels, pixels of a chunk, chunks, grid of the sums, grid of the rest)."""
    batch, channels, *sides = x.shape
    pixels, blocks = sides[0] * sides[1], -(-channels // CHANNELS)
    size = max(4, -(-pixels // (MOST_CHUNKS * TILE_ROWS))) * TILE_ROWS
    chunks, tiles = -(-pixels // size), -(-pixels // TILE_ROWS)
    return batch, channels, channels // norm.num_groups, pixels, size, chunks, (batch, chunks, blocks), (batch, tiles, blocks)


def group_normed(x: Tensor, norm: torch.nn.GroupNorm, silu: bool = False) -> tuple[Tensor, Tensor]:
    """x [B, C, h, w] -> (x for the residual connection, its group norm, with SiLU if `silu`)."""
    if in_one_pass(x) and x.shape[1] // norm.num_groups <= GROUP_WIDTH:
        return GroupNorm.apply(x, norm, silu)
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return x, F.silu(y) if silu else y


# Gradients of the low-rank factors.

PROGRAMS, MOST_SPLITS, MOST_RANK = 640, 64, 128  # about five for each multiprocessor of an H100; a sweep found no better tile


def add_product(result: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """result [bands, r, n] float32 += scale · leftᵀ·right of each band: left [bands, rows, r], right [bands, rows, n].

    `result` may have any strides; the last dimension of the others is contiguous. A `right` that is the same for all bands,
    expanded, is read once where the bands of `left` lie side by side in its rows and fit.
    """
    bands, rows, rank = left.shape
    if not in_one_pass(left) or rank > MOST_RANK:
        result += scale * (left.transpose(1, 2) @ right)
        return
    width, together = right.shape[2], (bands, rank)
    if right.stride(0) == 0 and left.stride(0) == rank and bands * rank <= MOST_RANK:
        together = (1, bands * rank)
    grid_width = -(-width // 64)
    splits = max(8, min(MOST_SPLITS, power_of_two(PROGRAMS // (grid_width * together[0]))))
    splits = min(splits, power_of_two(-(-rows // TILE_ROWS)))
    parts = left.new_empty(splits, bands, rank, width, dtype=torch.float32)
    strides = (left.stride(1), right.stride(1), left.stride(0), right.stride(0))
    tile = {"ROWS": TILE_ROWS, "RANK": max(16, power_of_two(together[1])), "BLOCK": 64, "num_warps": 2}
    launch("tall_product", (grid_width, splits, together[0]), left, right, parts, rows, together[1], width, *strides, **tile)
    blocks = (-(-rank * width // 256), bands)
    launch("add_parts", blocks, parts, result, splits, rank, width, scale, *result.stride(), SPLITS=splits, BLOCK=256)
