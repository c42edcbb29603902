"""SDXL as one module: both text encoders, U-Net, micro-conditioning (Podell et al. 2023, arXiv:2307.01952)."""

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from model.text import tokenize

SAMPLERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}


def blueprint(pipe: StableDiffusionXLPipeline, with_text: bool = True) -> "Denoiser":
    """A Denoiser of the same architecture and dtypes on the meta device: shapes without weights."""
    with torch.device("meta"):
        unet = type(pipe.unet).from_config(pipe.unet.config)
        text_encoder, text_encoder_2 = (type(m)(m.config) for m in (pipe.text_encoder, pipe.text_encoder_2))
    parts = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    parts = {name: part.to(pipe.dtype).eval() for name, part in parts.items()}
    return Denoiser(StableDiffusionXLPipeline(**{**pipe.components, **parts}), with_text)


def time_ids(original_size: Tensor, crop: Tensor, size: Tensor) -> Tensor:
    """SDXL's micro-conditioning: original (h, w), crop (top, left), size (h, w), each [B, 2] in pixels -> [B, 6] float32.

    They stay float32 until after their sinusoid: in bfloat16 1365 would become 1368.
    """
    return torch.cat([original_size, crop, size], dim=1).float()


def text_shapes(denoiser: "Denoiser", batch: int, chunks: int) -> tuple[Tensor, ...]:
    """The `text` of `Denoiser.forward` for a batch whose captions take `chunks` of 77 tokens, on the meta device."""
    room = denoiser.empty.shape[2] * chunks
    if denoiser.text_encoder is not None:
        return (torch.empty(batch, 2, room, dtype=torch.int64, device="meta"),)
    config, dtype = denoiser.unet.config, denoiser.unet.dtype
    context = torch.empty(batch, room, config.cross_attention_dim, dtype=dtype, device="meta")
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return context, torch.empty(batch, pooled, dtype=dtype, device="meta")


class Denoiser(nn.Module):
    """U-Net and both text encoders as one module: everything that can be trained, from tokens to prediction.

    "Train the text encoders?" is then only a question of which parameters require a gradient. `with_text=False`: the U-Net
    alone, for context and pooled that were computed before.
    """

    text_encoder: Any  # None without text
    text_encoder_2: Any
    empty: Tensor

    def __init__(self, pipe: StableDiffusionXLPipeline, with_text: bool = True):
        super().__init__()
        self.unet = pipe.unet
        self.text_encoder, self.text_encoder_2 = (pipe.text_encoder, pipe.text_encoder_2) if with_text else (None, None)
        self.tokenizers = [pipe.tokenizer, pipe.tokenizer_2]
        empty = tokenize(self.tokenizers, [""])
        self.register_buffer("empty", empty.to(pipe.text_encoder.device), persistent=False)
        self.zero_empty = pipe.config.force_zeros_for_empty_prompt

    @property
    def unused(self) -> list[str]:
        """Path prefixes of layers that do not reach the prediction: text encoder 1 is read at its penultimate layer."""
        if self.text_encoder is None:
            return []
        last = self.text_encoder.config.num_hidden_layers - 1
        return [f"text_encoder.{text_model}encoder.layers.{last}." for text_model in ("", "text_model.")]

    def encode_text(self, tokens: Tensor, *, zero_empty: bool = True) -> tuple[Tensor, Tensor]:
        """tokens [B, 2, 77·n] -> context [B, 77·n, d1 + d2], pooled [B, d2].

        Every chunk of 77 goes through the encoders by itself; pooled is that of the first, as A1111, ComfyUI and kohya have it.
        An empty caption gives zeros if the model was trained so (`force_zeros_for_empty_prompt`), as in diffusers' guidance;
        with `zero_empty=False` what the encoders make of it.
        """
        trained = any(p.requires_grad for m in (self.text_encoder, self.text_encoder_2) for p in m.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            chunks = tokens.unflatten(2, (-1, self.text_encoder.config.max_position_embeddings))  # [B, 2, n, 77]
            first = self.text_encoder(chunks[:, 0].flatten(0, 1), output_hidden_states=True)
            second = self.text_encoder_2(chunks[:, 1].flatten(0, 1), output_hidden_states=True)
            context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            context = context.view(len(tokens), tokens.shape[2], -1)
            pooled = second.text_embeds[:: chunks.shape[2]]
            if self.zero_empty and zero_empty:
                captioned = (chunks != self.empty.to(chunks.device)[:, :, None]).any(dim=(1, 2, 3)).to(pooled.dtype)
                context, pooled = context * captioned[:, None, None], pooled * captioned[:, None]
        return context, pooled

    @torch.no_grad()
    def text_signature(self) -> list[float]:
        """Some 32 numbers that differ between two pairs of text encoders: a part of what they make of a fixed caption."""
        tokens = tokenize(self.tokenizers, ["a picture of a cat"]).to(self.text_encoder.device)
        context, pooled = (states.float() for states in self.encode_text(tokens))
        parts = [part[:: len(part) // 16] for part in (context[0, -1], pooled[0])]
        return [round(value, 5) for part in parts for value in (part / part.abs().max()).tolist()]

    @torch.no_grad()
    def empty_text(self) -> tuple[Tensor, Tensor]:
        """Context [1, 77, d1 + d2] and pooled [1, d2] of the empty caption, on the host."""
        context, pooled = self.encode_text(self.empty.to(self.text_encoder.device))
        return context.cpu(), pooled.cpu()

    @torch.no_grad()
    def describe(self, prompt: str, negative: str | None) -> dict[str, Tensor]:
        """Arguments of diffusers' pipeline for a prompt and its negative: context and pooled, in as many chunks as the longer
        one needs. As in diffusers an empty text is encoded; None gives zeros if the model was trained so.
        """
        texts = tokenize(self.tokenizers, [prompt, negative or ""], None).to(self.text_encoder.device).split(1)
        context, pooled = self.encode_text(texts[0], zero_empty=False)
        negative_context, negative_pooled = self.encode_text(texts[1], zero_empty=negative is None)
        return {
            "prompt_embeds": context, "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative_context, "negative_pooled_prompt_embeds": negative_pooled,
        }  # fmt: skip

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: tuple[Tensor, ...], time_ids: Tensor) -> Tensor:
        """[B, 4, h, w], [B], (tokens [B, 2, 77·n],) or (context, pooled) as from `encode_text`, [B, 6] -> prediction
        [B, 4, h, w] in the dtype of the U-Net.
        """
        context, pooled = text if len(text) == 2 else self.encode_text(*text)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        noisy_latents = noisy_latents.to(self.unet.dtype)
        return self.unet(noisy_latents, timesteps, context, added_cond_kwargs=conditions, return_dict=False)[0]
