"""Encodes pixels into latents and decodes them."""

import copy
import hashlib
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


def vae_dtype(device: torch.device) -> torch.dtype:
    """Dtype to run the VAE in: bfloat16 if the GPU supports it, else float32. In float16 SDXL's VAE overflows."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


# Peak bytes per pixel and per byte of the dtype: an image of 1024 × 1024 in bfloat16 takes 1.5 GiB to encode, 2.4 to decode.
ENCODING, DECODING = 768, 1220


def normalise(images: Tensor) -> Tensor:
    """Images [B, h, w, 3] uint8 -> pixels [B, 3, h, w] float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels [B, 3, H, W] in [-1, 1] -> posterior [B, 8, H/8, W/8] float32: mean and standard deviation of the latents."""
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def vae_signature(vae: AutoencoderKL) -> list[float]:
    """Eight numbers that identify a VAE in any dtype: the channel means of the posterior of a fixed test image.

    Computed in float32 by a copy, on the device of the VAE.
    """
    ramp = torch.linspace(-1, 1, 64, device=vae.device)
    pixels = torch.stack([ramp[:, None] * ramp, ramp[:, None].expand(64, 64), -ramp.expand(64, 64)])[None]
    return [round(value, 5) for value in encode_pixels(copy.deepcopy(vae).float(), pixels).mean(dim=(0, 2, 3)).tolist()]


def same_signature(stored: Sequence[float], computed: Sequence[float]) -> bool:
    """Whether two signatures are of the same weights, apart from the rounding of weights that were stored in half precision."""
    scale = max(map(abs, computed))
    return len(stored) == len(computed) and all(abs(a - b) < 0.02 * scale for a, b in zip(stored, computed, strict=True))


def hash_weights(*modules: nn.Module) -> str:
    """SHA-256 (hexadecimal) of the names and weights of `modules`, in the dtype that they have."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def latent_statistics(vae: AutoencoderKL, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of each channel of the latents, [1, C, 1, 1]: 0 and 1 unless the VAE has its own.

    Filled on the device: a copy from the host would be forbidden in a CUDA graph.
    """
    if not vae.config.latents_mean:
        return 0.0, 1.0
    rows = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.cat([torch.full((1, 1, 1, 1), x, device=device) for x in row], dim=1) for row in rows)
    return mean, std


def sample_latents(vae: AutoencoderKL, posterior: Tensor, noise: Tensor) -> Tensor:
    """posterior [B, 8, h, w], noise [B, 4, h, w] -> latents [B, 4, h, w] float32: (a posterior sample - mean) × scaling_factor
    / deviation, as in diffusers' StableDiffusionXLImg2ImgPipeline.
    """
    mean, std = posterior.float().chunk(2, dim=1)
    latents_mean, latents_std = latent_statistics(vae, posterior.device)
    return (mean + std * noise - latents_mean) * vae.config.scaling_factor / latents_std


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, tiled: bool = False) -> Tensor:
    """latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w] float32 in [-1, 1].

    `tiled`: decodes overlapping tiles of 512 pixels, which takes a quarter of the memory but changes the picture slightly.
    """
    mean, std = latent_statistics(vae, latents.device)
    vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = tiled, 64, 512
    pixels = vae.decode((latents.float() * std / vae.config.scaling_factor + mean).to(vae.dtype)).sample
    vae.use_tiling = False
    return pixels.float().clamp(-1, 1)
