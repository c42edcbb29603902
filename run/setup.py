"""SDXL as the training loop uses it: put on the device, and what of the data has to fit to it."""

import random
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from data import Batch, Workload, normalise
from dataset.captions import CaptionConfig
from dataset.sources import Source
from memory import note_if_out_of_memory, temporarily_on
from model.sdxl import Denoiser
from model.text import CachedText, TokenInputs
from model.vae import encode_pixels, same_signature, sample_latents, vae_dtype, vae_signature
from performance.memory_plan import Plan
from performance.quantise import PACKED_BASES, check_quantisable, quantise_base


def seed_of(*parts: int) -> int:
    """63 random bits that are a function of (seed, rank, step, …)."""
    return random.Random(str(parts)).getrandbits(63)


def check_together(source: Source, pipe: Any, name: str, captions: CaptionConfig, cached_text: bool) -> None:
    """Raises UserError if ready-made latents or text do not fit the model or the options for captions.

    `name`: --model. `cached_text`: the text is read from the shards.
    """
    if source.vae_signature and not same_signature(source.vae_signature, vae_signature(pipe.vae)):
        raise UserError(f"--data: these latents were made by another VAE than that of --model {name}")
    if cached_text and (captions.shuffle_tags or captions.caption_prefix or captions.max_tokens > 75):
        raise UserError(
            "--shuffle-tags, --caption-prefix and --max-tokens: this text was encoded already, by cache_latents.py --text"
        )


class TrainingModel:
    """Frozen U-Net, text encoders and VAE. What the shards hold ready-made is not computed, and its model stays on the host."""

    def __init__(
        self, pipe: Any, name: str, source: Source, captions: CaptionConfig, work: Workload, plan: Plan, device: torch.device
    ):
        """`pipe` as from read_sdxl, on the host; `name`: --model.

        The base is packed before it is moved, so that the device never holds all of it unpacked. Raises UserError if the text
        in the shards was made by other encoders.
        """
        self.pipe, self.vae, self.device, self.has_latents = pipe, pipe.vae, device, work.has_latents
        self.full_denoiser = Denoiser(pipe)  # with its text encoders: for pictures
        self.parameters = sum(p.numel() for p in self.full_denoiser.parameters())
        self.denoiser = Denoiser(pipe, with_text=False) if work.has_text else self.full_denoiser
        self.kept_on_host = [pipe.vae] if work.has_latents else []  # but for pictures
        self.text_inputs: TokenInputs | CachedText
        if work.has_text:
            encoders = [pipe.text_encoder, pipe.text_encoder_2]
            self.kept_on_host += encoders
            with temporarily_on(device, encoders):
                if not same_signature(source.text_signature, self.full_denoiser.text_signature()):
                    raise UserError(f"--data: its text was encoded by other encoders than those of --model {name}")
                self.text_inputs = CachedText(self.full_denoiser.empty_text())
        else:
            self.text_inputs = TokenInputs(self.full_denoiser.tokenizers, captions.max_tokens)
        if plan.base in PACKED_BASES:
            check_quantisable(plan.base, device)
            quantise_base(self.denoiser, plan.base, device)
        self.denoiser.to(device)
        pipe.vae.to("cpu" if work.has_latents else device, vae_dtype(device)).use_slicing = not plan.whole_vae

    def latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        """[B, 4, h/8, w/8] of the batch's bucket."""
        h, w = (batch.size[0] // self.pipe.vae_scale_factor).tolist()
        return len(batch.images), self.pipe.unet.config.in_channels, h, w

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Pixels [B, h, w, 3] uint8, or ready-made posteriors [B, 8, h/8, w/8] -> latents [B, 4, h/8, w/8] float32.

        `noise` [B, 4, h/8, w/8] draws them from their posterior.
        """
        with note_if_out_of_memory("encoding images"):
            posterior = images if self.has_latents else encode_pixels(self.vae, normalise(images))
            return sample_latents(self.vae, posterior, noise)
