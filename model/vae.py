"""Pixels -> latents and back."""

import copy
import hashlib
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


def vae_dtype(device: torch.device) -> torch.dtype:
    """The VAE is not safe in float16: bfloat16 where the GPU computes in it, else float32."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


# Bytes that the VAE takes for each pixel and byte of its dtype: 1.5 and 2.4 GiB at 1024 × 1024 in bfloat16.
ENCODING, DECODING = 768, 1220


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels [B, 3, H, W] in [-1, 1] -> posterior [B, 8, H/8, W/8] float32: mean and deviation of the latents."""
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def vae_signature(vae: AutoencoderKL) -> list[float]:
    """Eight numbers that tell one VAE from another, whatever their dtype: mean latents and deviations of a fixed picture.

    Computed in float32 by a copy, where the VAE lies.
    """
    ramp = torch.linspace(-1, 1, 64, device=vae.device)
    pixels = torch.stack([ramp[:, None] * ramp, ramp[:, None].expand(64, 64), -ramp.expand(64, 64)])[None]
    return [round(value, 5) for value in encode_pixels(copy.deepcopy(vae).float(), pixels).mean(dim=(0, 2, 3)).tolist()]


def same_signature(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two probes are of the same weights, but for what a half-precision file of them has lost."""
    scale = max(map(abs, other))
    return len(one) == len(other) and all(abs(a - b) < 0.02 * scale for a, b in zip(one, other, strict=True))


def hash_weights(*modules: nn.Module) -> str:
    """SHA-256 of weights, as they are stored."""
    whole = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            whole.update(name.encode())
            whole.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return whole.hexdigest()


def sample_latents(vae: AutoencoderKL, posterior: Tensor, noise: Tensor) -> Tensor:
    """posterior [B, 8, h, w], noise [B, 4, h, w] -> latents [B, 4, h, w] float32: a sample × scaling_factor."""
    mean, deviation = posterior.float().chunk(2, dim=1)
    return (mean + deviation * noise) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, tiled: bool = False) -> Tensor:
    """latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w] float32 in [-1, 1].

    `tiled`: in overlapping tiles of 512 pixels, for a quarter of the memory; not quite the same picture.
    """
    vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = tiled, 64, 512
    pixels = vae.decode((latents.float() / vae.config.scaling_factor).to(vae.dtype)).sample
    vae.use_tiling = False
    return pixels.float().clamp(-1, 1)
