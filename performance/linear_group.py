"""Products of linear layers that read the same input, with and without LoRA; forward and backward pass are written out.

Layers with LoRA are those of lora.py; others have no `lora_A`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from performance.fused import add_product, gate, gate_gradient, in_one_pass, layer_norm, layer_norm_gradient


@dataclass
class Band:
    """Neighbouring layers with adapters of one size in a LinearGroup: their products with B are one batched product."""

    layers: list[Any]
    columns: slice  # of the outputs of the group
    rows: slice  # of the stacked A of the group

    def split(self, tensor: Tensor, part: slice) -> Tensor:
        """A view of these columns: [N, …] -> [layers, N, columns of a layer]."""
        return tensor[:, part].unflatten(1, (len(self.layers), -1)).transpose(0, 1)

    def B(self, dtype: torch.dtype) -> Tensor:
        """[layers, out, r]."""
        return stacked([layer.lora_B for layer in self.layers]).to(dtype)


class LinearGroup:
    """Linear layers that read the same input, such as q, k and v: their products as one where that is possible.

    The layers may be plain, packed or with LoRA. Plain weights are stacked: the `weight` of each becomes a view of the stack.
    Packed ones are not, because all of them would be unpacked at once. Do not move the layers afterwards.
    """

    def __init__(self, layers: list[Any], device: torch.device | None = None):
        """The stack is made on `device`, which the layers need not be on yet: moved first, they would leave gaps there."""
        self.layers, self.widths = layers, [layer.out_features for layer in layers]
        self.bands: list[Band] = []
        self.has_lengths = any(getattr(layer, "magnitude", None) is not None for layer in layers)  # DoRA
        column = row = 0
        for layer in layers:
            columns = slice(column, column := column + layer.out_features)
            if not has_lora(layer):
                continue
            rows = slice(row, row := row + len(layer.lora_A))
            last = self.bands[-1] if self.bands else None
            if last and last.columns.stop == columns.start and last.layers[0].lora_B.shape == layer.lora_B.shape:
                self.bands[-1] = Band([*last.layers, layer], slice(last.columns.start, column), slice(last.rows.start, row))
            else:
                self.bands.append(Band([layer], columns, rows))
        self.stack, self.bias = None, None
        if len(layers) > 1 and all(layer.weight.is_floating_point() for layer in layers):
            self.stack = torch.cat([layer.weight.detach() for layer in layers]).to(device)
            for layer, weight in zip(layers, self.stack.split(self.widths), strict=True):
                layer.weight.data = weight
            if layers[0].bias is not None:
                self.bias = torch.cat([layer.bias.detach() for layer in layers]).to(device)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> list[Tensor]:
        """x [..., in] -> the outputs [..., out] of every layer; of a single one, added to `onto`."""
        return self.outputs(x, onto=onto)

    def gated(self, hg: Tensor, onto: Tensor) -> list[Tensor]:
        """The outputs for h · gelu(g), where hg [..., 2·in] is h beside g; added to `onto`."""
        return self.outputs(hg, gated=True, onto=onto)

    def normed(self, x: Tensor, norm: nn.LayerNorm) -> list[Tensor]:
        """[x for the residual connection around the layers, the outputs for the normed x]."""
        if not in_one_pass(x):
            return [x, *self(norm(x))]
        return self.outputs(x, norm)

    def outputs(
        self, x: Tensor, norm: nn.LayerNorm | None = None, gated: bool = False, onto: Tensor | None = None
    ) -> list[Tensor]:
        """Tells autograd what it keeps before the products of W are computed: the recomputation of a checkpointed part ends
        where its last tensor is kept, so it does without them where they come last.
        """
        read = down = edge = None
        with torch.no_grad():
            if self.bands:
                read = read_by_products(x, norm, gated)
                down = self.dropped(read.flatten(0, -2) @ self.A(x.dtype).T)
                edge = self.bands[0].layers[0].lora_A
            lengths = self.lengths()
        *of_x, y = Products.apply(self, x, down, lengths, norm, gated, onto, edge)
        with torch.no_grad():
            read, rows = read_by_products(x, norm, gated) if read is None else read, y.detach().flatten(0, -2)
            self.multiply(rows, read.flatten(0, -2), down, with_bias=not self.has_lengths)
            self.bring_to_length(rows, lengths)
            if onto is not None:
                rows += onto.reshape(rows.shape)
        return [*of_x, *(y.split(self.widths, dim=-1) if len(self.widths) > 1 else [y])]  # split's gradient is a copy

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(columns, W, b) of every product."""
        if self.stack is not None:
            yield slice(None), self.stack, self.bias
            return
        end = 0
        for layer in self.layers:
            yield slice(end, end := end + layer.out_features), dense_weight(layer), layer.bias

    def multiply(self, y: Tensor, x: Tensor, down: Tensor | None, with_bias: bool) -> None:
        """x [N, in] -> y [N, Σ out], the outputs side by side. down = x·Aᵀ [N, Σ r] if there is LoRA."""
        for columns, weight, bias in self.parts():
            if bias is None or not with_bias:
                torch.mm(x, weight.T, out=y[:, columns])
            else:
                torch.addmm(bias, x, weight.T, out=y[:, columns])
        if down is not None:
            for band in self.bands:
                branch, B, scale = band.split(down, band.rows), band.B(x.dtype), band.layers[0].scale
                band.split(y, band.columns).baddbmm_(branch, B.transpose(1, 2), alpha=scale)

    def lengths(self) -> list[Tensor]:
        """‖V‖ of every layer with DoRA."""
        return [layer.lengths() for band in self.bands for layer in band.layers] if self.has_lengths else []

    def with_lengths(self, y: Tensor, lengths: list[Tensor]) -> Iterator[tuple[Any, Tensor, Any]]:
        """(layer, its columns of y [N, Σ out], its ‖V‖ or None) with DoRA."""
        found = iter(lengths)
        if self.has_lengths:
            for layer, columns in zip(self.layers, y.split(self.widths, dim=1), strict=True):
                yield layer, columns, next(found) if has_lora(layer) else None

    def bring_to_length(self, y: Tensor, lengths: list[Tensor]) -> None:
        """y [N, Σ out] without bias -> (magnitude/‖V‖)·y + b, in place; in float32, as y may be in half precision."""
        for layer, columns, length in self.with_lengths(y, lengths):
            if length is not None:
                torch.mul(columns, layer.magnitude / length, out=columns)
            if layer.bias is not None:
                columns += layer.bias

    def gradient_of_directions(self, grad_y: Tensor, x: Tensor, down: Tensor, lengths: list[Tensor]) -> Tensor:
        """grad_y [N, Σ out] -> the gradient of x·Vᵀ; adds those of the magnitudes. x·Vᵀ is computed again, not kept."""
        product, result = torch.empty_like(grad_y), grad_y.clone()
        self.multiply(product, x, down, with_bias=False)
        both = zip(self.with_lengths(product, lengths), result.split(self.widths, dim=1), strict=True)
        for (layer, columns, length), grad in both:
            if length is not None:
                layer.grads[2].add_((grad.float() * columns).sum(dim=0) / length)
                torch.mul(grad, layer.magnitude / length, out=grad)
        return result

    def dropped(self, down: Tensor) -> Tensor:
        """x·Aᵀ, or its gradient, [N, Σ r] -> without the ranks that are left out."""
        return self.bands[0].layers[0].dropout.of([layer.place for band in self.bands for layer in band.layers], down)

    def A(self, dtype: torch.dtype) -> Tensor:
        """[Σ r, in]."""
        return torch.cat([layer.lora_A for band in self.bands for layer in band.layers]).to(dtype)

    def gradients(self, grad_y: Tensor, down: Tensor | None, with_x: bool) -> tuple[Tensor | None, Tensor | None]:
        """grad_y [N, Σ out] -> gradients of x [N, in], if `with_x`, and of x·Aᵀ [N, Σ r]; adds that of B."""
        grad_down = None
        if down is not None:
            grad_down = torch.empty_like(down)
            for band in self.bands:
                grad, result, B = band.split(grad_y, band.columns), band.split(grad_down, band.rows), band.B(grad_y.dtype)
                scale = band.layers[0].scale
                torch.baddbmm(result, grad, B, beta=0, alpha=scale, out=result)
                with sum_of([layer.grads[1] for layer in band.layers]) as total:
                    add_product(total.transpose(1, 2), band.split(down, band.rows), grad, scale)
            grad_down = self.dropped(grad_down)
        grad_x = None
        for columns, weight, _ in self.parts() if with_x else ():
            grad = grad_y[:, columns]
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        if grad_x is not None and grad_down is not None:
            grad_x.addmm_(grad_down, self.A(grad_x.dtype))
        return grad_x, grad_down

    def add_gradient_of_A(self, grad_down: Tensor, x: Tensor) -> None:
        """grad_down [N, Σ r], x [N, in]."""
        for band in self.bands:
            with sum_of([layer.grads[0] for layer in band.layers]) as total:
                add_product(total, band.split(grad_down, band.rows), x.expand(len(band.layers), -1, -1), 1.0)


class Products(torch.autograd.Function):
    """The products of a LinearGroup; forward and backward are written out.

    Keeps x and, where there is LoRA, x·Aᵀ. It does not keep W, which is frozen, nor what can be made again: the normed or gated
    x that the layers read, and a packed W. The gradients of A and B do not pass through autograd: they are added to
    `LoRALinear.grads`.
    """

    @staticmethod
    def forward(
        ctx, group: LinearGroup, x: Tensor, down: Tensor | None, lengths: list[Tensor], norm: nn.LayerNorm | None, gated: bool,
        onto: Tensor | None, edge: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(x, if there is a norm; memory for the outputs side by side [..., Σ out]). `edge` makes autograd differentiate a
        product whose input needs no gradient.
        """
        ctx.group, ctx.norm, ctx.gated, ctx.lengths = group, norm, gated, lengths
        ctx.save_for_backward(x if norm is not None or gated or group.bands else None, down)
        y = x.new_empty(*x.shape[:-1], sum(group.widths))
        return (y,) if norm is None else (x, y)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, norm, (x, down), needs_x, needs_read = (
            ctx.group, ctx.norm, ctx.saved_tensors, ctx.needs_input_grad[1], bool(ctx.group.bands),
        )  # fmt: skip
        grad_y = grads[-1]
        of_products = grad_y.flatten(0, -2)
        if ctx.lengths:
            read = read_by_products(x, norm, ctx.gated).flatten(0, -2)
            of_products = group.gradient_of_directions(of_products, read, down, ctx.lengths)
        grad_x, grad_down = group.gradients(of_products, down, needs_x)
        if grad_x is not None:
            grad_x = grad_x.view(*grad_y.shape[:-1], -1)
        if grad_x is None or (norm is None and not ctx.gated):
            read = read_by_products(x, norm, ctx.gated) if needs_read else x
        elif norm is not None:
            grad_x, read = layer_norm_gradient(grad_x, grads[0], x, norm, needs_read)
        else:
            grad_x, read = gate_gradient(grad_x, x, needs_read)
        if needs_read:
            group.add_gradient_of_A(grad_down, read.reshape(-1, read.shape[-1]))
        return None, grad_x, None, None, None, None, (grad_y if ctx.needs_input_grad[6] else None), None


def read_by_products(x: Tensor, norm: nn.LayerNorm | None, gated: bool) -> Tensor:
    return layer_norm(x, norm) if norm is not None else gate(x) if gated else x


def has_lora(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A")


def dense_weight(layer: Any) -> Tensor:
    """W [out, in], unpacked if the layer stores it packed."""
    return layer.dense() if hasattr(layer, "dense") else layer.weight


def stacked(tensors: list[Tensor]) -> Tensor:
    """[n, …] of n contiguous tensors of one shape; a view where they lie in one buffer at equal distances."""
    first = tensors[0].detach()
    distances = {b.storage_offset() - a.storage_offset() for a, b in pairwise(tensors)}
    one_buffer = len({t.untyped_storage()._cdata for t in tensors}) == 1
    if len(distances) > 1 or min(distances, default=0) < 0 or not one_buffer:  # a view has no negative stride
        return torch.stack([t.detach() for t in tensors])
    return first.as_strided((len(tensors), *first.shape), (*(distances or {0}), *first.stride()))


@contextmanager
def sum_of(tensors: list[Tensor]) -> Iterator[Tensor]:
    """[n, …] float32: what is added to it inside this context is added to each of the n tensors."""
    total = stacked(tensors)
    is_view = total.untyped_storage()._cdata == tensors[0].untyped_storage()._cdata
    if not is_view:
        total.zero_()
    yield total
    if not is_view:
        torch._foreach_add_(tensors, list(total.unbind()))
