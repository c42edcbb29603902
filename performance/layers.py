"""Layers of diffusers and transformers, computed faster: same weights, same function.

norms        with the SiLU after them and the gradient of the residual connection around them: `performance.fused`
q, k, v      one product each for those that read the same; k and v of the context for all blocks of the U-Net at once
attention    directly on [B, S, H, D] of these products
residuals    added in place by the product before them
pixels       in channels_last from end to end, where tokens [B, h·w, C] are a view of them

Attention and feed-forward keep their modules, `attn1`, `attn2` and `ff` of a transformer block; each now computes
x + layer(norm(x)), so that each can be checkpointed by itself.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from performance.attention import Kernel
from performance.fused import group_normed
from performance.linear_group import LinearGroup

Group = Callable[[list[nn.Linear]], LinearGroup]  # makes one, on the right device


def use_fast_layers(model: nn.Module, kernel: Kernel, group: Group) -> None:
    """Replaces the forward of layers inside a U-Net, text encoders or a VAE, in place; attention of the U-Net uses `kernel`.

    Call it when the adapters are added, the base is packed and all is on its device: `group` stacks weights.
    """
    for module in list(model.modules()):
        if patch := PATCHES.get(type(module).__name__):
            patch(module, kernel, group)


def heads_of(tensors: list[Tensor], heads: int) -> list[Tensor]:
    """[B, S, H·D] each -> [B, S, H, D]."""
    return [t.unflatten(-1, (heads, -1)) for t in tensors]


# The U-Net's transformers.


def patch_unet(unet: Any, kernel: Kernel, group: Group) -> None:
    """The context is given to the blocks as a list of (k, v), one for each cross-attention."""
    layers = [m.attn2 for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    layers.sort(key=lambda attention: attention.to_k.out_features)  # neighbours of one size: LoRA's products are batched
    for number, attention in enumerate(layers):
        attention.number = number
    of_context = group([linear for attention in layers for linear in (attention.to_k, attention.to_v)]) if layers else None
    forward = unet.forward

    def of_keys_and_values(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        parts = of_context(encoder_hidden_states) if of_context else []
        return forward(sample, timestep, list(zip(parts[::2], parts[1::2], strict=True)), *args, **options)

    unet.forward = of_keys_and_values
    patch_last_norm(unet, kernel, group)


def patch_block(block: Any, kernel: Kernel, group: Group) -> None:
    own, cross, ff = block.attn1, block.attn2, block.ff
    q, qkv = group([cross.to_q]), group([own.to_q, own.to_k, own.to_v])
    gate, out = group([ff.net[0].proj]), group([ff.net[2]])
    own.forward = partial(self_attention, own.heads, block.norm1, qkv, kernel, group([own.to_out[0]]))
    cross.forward = partial(cross_attention, cross.heads, block.norm2, q, kernel, group([cross.to_out[0]]))
    ff.forward = partial(feed_forward, block.norm3, gate, out)
    block.forward = MethodType(block_forward, block)


def block_forward(self: Any, x: Tensor, encoder_hidden_states: list[tuple[Tensor, Tensor]], **_: Any) -> Tensor:
    x = self.attn1(x)
    x = self.attn2(x, *encoder_hidden_states[self.attn2.number])
    return self.ff(x)


def self_attention(heads: int, norm: nn.LayerNorm, qkv: Any, kernel: Kernel, out: Any, x: Tensor) -> Tensor:
    x, *parts = qkv.normed(x, norm)
    return out(kernel(*heads_of(parts, heads)).flatten(2), onto=x)[0]


def cross_attention(
    heads: int, norm: nn.LayerNorm, of_x: Any, kernel: Kernel, out: Any, x: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    x, q = of_x.normed(x, norm)
    return out(kernel(*heads_of([q, k, v], heads)).flatten(2), onto=x)[0]


def feed_forward(norm: nn.LayerNorm, gate: Any, out: Any, x: Tensor) -> Tensor:
    x, hg = gate.normed(x, norm)
    return out.gated(hg, onto=x)[0]


def patch_transformer(transformer: Any, kernel: Kernel, group: Group) -> None:
    into, out = group([transformer.proj_in]), group([transformer.proj_out])
    transformer.forward = partial(transformer_forward, transformer, into, out)


def transformer_forward(
    self: Any, into: Any, out: Any, x: Tensor, encoder_hidden_states: list[tuple[Tensor, Tensor]], **_: Any
) -> tuple[Tensor]:
    """x [B, C, h, w]."""
    x, y = (t.permute(0, 2, 3, 1) for t in group_normed(x, self.norm))
    (tokens,) = into(y.flatten(1, 2))
    for block in self.transformer_blocks:
        tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
    (tokens,) = out(tokens, onto=x.flatten(1, 2))
    return (tokens.view(x.shape).permute(0, 3, 1, 2),)


# Convolutions, of the U-Net and of the VAE.


def patch_resnet(resnet: Any, kernel: Kernel, group: Group) -> None:
    resnet.forward = MethodType(resnet_forward, resnet)


def resnet_forward(self: Any, x: Tensor, temb: Tensor | None = None) -> Tensor:
    """x [B, C, h, w], temb [B, T] or None."""
    x, y = group_normed(x, self.norm1, silu=True)
    if temb is None:
        y = self.conv1(y)
    else:  # its bias is added with the embedded timestep: one pass over the pixels less
        offset = self.time_emb_proj(F.silu(temb)) + self.conv1.bias
        y = self.conv1._conv_forward(y, self.conv1.weight, None) + offset[:, :, None, None]
    y = self.conv2(group_normed(y, self.norm2, silu=True)[1])
    return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def patch_last_norm(model: Any, kernel: Kernel, group: Group) -> None:
    """`conv_norm_out` and `conv_act` as one."""
    model.conv_norm_out.forward = partial(activated, model.conv_norm_out)
    model.conv_act = nn.Identity()


def activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_normed(x, norm, silu=True)[1]


# Text encoders.


def patch_clip_attention(attention: Any, kernel: Kernel, group: Group) -> None:
    qkv, out = group([attention.q_proj, attention.k_proj, attention.v_proj]), group([attention.out_proj])
    attention.forward = partial(causal_attention, attention.num_heads, qkv, out)


def causal_attention(
    heads: int, qkv: Any, out: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """hidden_states [B, T, C]. `attention_mask` is ignored: it is the causal one, as Denoiser gives tokens only."""
    q, k, v = (t.transpose(1, 2) for t in heads_of(qkv(hidden_states), heads))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return out(y.flatten(2))[0], None


PATCHES: dict[str, Callable[[Any, Kernel, Group], None]] = {
    "UNet2DConditionModel": patch_unet,
    "Transformer2DModel": patch_transformer,
    "BasicTransformerBlock": patch_block,
    "ResnetBlock2D": patch_resnet,
    "CLIPAttention": patch_clip_attention,
    "Encoder": patch_last_norm,
    "Decoder": patch_last_norm,
}
