"""SDXL on the training device, and checks that cached data was made by it."""

import torch
from torch import Tensor

from common.errors import UserError
from data import Batch, Workload
from dataset.sources import Source
from memory import note_if_out_of_memory, speed_up, temporarily_on
from model.check import describe_model
from model.load import Pipeline
from model.sdxl import Denoiser
from model.text import CachedText, TokenInputs
from model.vae import encode_pixels, normalise, same_signature, sample_latents, vae_dtype, vae_signature
from options.training import CaptionConfig
from performance.attention import KERNELS
from performance.memory_plan import Plan
from performance.quantise import PACKED_BASES, check_quantisable, quantise_base


def check_together(source: Source, pipe: Pipeline, name: str, captions: CaptionConfig, has_text: bool) -> None:
    """Raises UserError if cached latents were made by another VAE than that of `name` (--model), or if an option for captions
    comes too late for cached text, which is in use if `has_text`. TrainingModel checks who made that text.
    """
    if source.vae_signature and not same_signature(source.vae_signature, vae_signature(pipe.vae)):
        raise UserError(f"--data: these latents were made by another VAE than that of --model {name}")
    if has_text and (captions.shuffle_tags or captions.trigger or captions.max_tokens > 75):
        raise UserError("--shuffle-tags, --trigger and --max-tokens: this text was encoded already, by cache_latents.py --text")


class TrainingModel:
    """Frozen U-Net, text encoders and VAE. What the shards hold cached is not computed, and its model stays on the host.

    `memory.apply_plan` moves the denoiser to the device, when the adapters are added.
    """

    def __init__(
        self,
        pipe: Pipeline,
        name: str,
        source: Source,
        captions: CaptionConfig,
        work: Workload,
        plan: Plan,
        device: torch.device,
    ):
        """`pipe` as from read_sdxl, on the host; `name`: --model.

        The base is packed onto the device one by one, so that the device never holds all of it unpacked. Raises UserError
        if the text in the shards was made by other encoders.
        """
        self.pipe, self.name, self.vae = pipe, name, pipe.vae
        self.predicts = describe_model(pipe)
        self.device, self.has_latents = device, work.has_latents
        self.full_denoiser = Denoiser(pipe)  # with its text encoders: for pictures
        self.parameter_count = sum(p.numel() for p in self.full_denoiser.parameters())
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
        pipe.vae.to("cpu" if work.has_latents else device, vae_dtype(device))
        speed_up(pipe.vae, KERNELS["sdpa"])
        pipe.vae.use_slicing = not plan.whole_vae  # encodes image by image

    def latent_shape(self, batch: Batch) -> tuple[int, int, int, int]:
        """(B, 4, h, w) of the batch's bucket."""
        h, w = (batch.size[0] // self.pipe.vae_scale_factor).tolist()
        return len(batch.images), self.pipe.unet.config.in_channels, h, w

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images [B, 8h, 8w, 3] uint8, or cached posteriors [B, 8, h, w] -> latents [B, 4, h, w] float32.

        `noise` [B, 4, h, w] draws them from their posterior.
        """
        with note_if_out_of_memory("encoding images"):
            posterior = images if self.has_latents else encode_pixels(self.vae, normalise(images))
            return sample_latents(self.vae, posterior, noise)
