"""The denoising loss on pictures that were kept out of training, and on as many that were not: the same noise every time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.seeds import seed_generator, seed_of
from data import Stream
from dataset.sources import Source
from model.diffusion import Diffusion, weights_of_mask
from model.load import Pipeline
from model.render import to_image
from model.sdxl import Denoiser, time_ids
from model.text import tokenize
from model.vae import decode_latents, encode_pixels, normalise, sample_latents
from options.training import DiffusionConfig

BANDS = 10  # of timesteps, in which losses are reported
GOLDEN = (math.sqrt(5) - 1) / 2
MOST_KEPT_OUT = 64
# What separates the random numbers of the split, of the choice of trained pictures and of the noise from those of training.
KEPT_OUT, TRAINED, NOISE = 18, 19, 20

Losses = list[list[float]]  # [images][timesteps]


def kept_out_of(source: Source, share: float, seed: int) -> list[int]:
    """Numbers of the samples of `source` to keep out of training: at least 2, at most 64, and never all of a data set of a
    mixture that can be read. A function of the seed.
    """
    count = min(MOST_KEPT_OUT, max(2, round(share * source.samples)))
    readable = np.flatnonzero(source.column("height"))
    order = np.random.default_rng([seed, KEPT_OUT]).permutation(readable)
    part = np.zeros(source.samples, int) if source.part is None else source.part
    left = np.bincount(part[readable])
    chosen: list[int] = []
    for n in order:
        if len(chosen) == count:
            break
        if left[part[n]] > 1:
            left[part[n]] -= 1
            chosen.append(int(n))
    return sorted(chosen)


def unweighted(pipe: Pipeline, device: torch.device) -> Diffusion:
    """The objective without the weights of training: every timestep counts alike, in every run."""
    return Diffusion(DiffusionConfig(), pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type, device)


def spread_timesteps(image: int, count: int) -> list[float]:
    """`count` timesteps of image number `image`, in 0 … 1 of the schedule: one in each of as many equal parts. With ten of them
    in the middle of each band; with fewer, at a place in its part that differs from image to image, so that together the images
    cover every band.
    """
    offset = 0.5 if count == BANDS else (0.5 + image * GOLDEN) % 1
    return [(j + offset) / count for j in range(count)]


@dataclass
class Probe:
    """An image at fixed timesteps. On the host."""

    name: str
    caption: str
    latents: Tensor  # [1, 4, h, w]
    text: tuple[Tensor, ...]  # (tokens [1, 2, 77·n],), or (context [1, 77·n, d1 + d2], pooled [1, d2])
    ids: Tensor  # [1, 6]
    weights: Tensor | None  # [1, 1, h, w] with --masked-loss
    timesteps: list[float]  # in 0 … 1 of the schedule
    seed: int  # of the noise


@torch.no_grad()
def make_probes(
    stream: Stream, numbers: Sequence[int], count: int, denoiser: Denoiser, vae: Any, device: torch.device, encode: bool
) -> list[Probe]:
    """A probe of each of these samples of `stream`, which has batches of 1, with `count` timesteps; without those that cannot
    be decoded. VAE and text encoders are on `device`. `encode`: captions are encoded here, because the denoiser that is
    measured has no text encoders.
    """
    probes = []
    for i, n in enumerate(numbers):
        batch = stream.batch([n], [n])
        if batch.skipped:
            continue
        seed = seed_of(i, NOISE)
        generator = seed_generator(torch.Generator(), seed)
        images = batch.images.to(device)
        posterior = images if stream.source.has_latents else encode_pixels(vae, normalise(images))
        noise = torch.randn(posterior[:, :4].shape, generator=generator).to(device)
        latents = sample_latents(vae, posterior, noise).cpu()
        weights = None if batch.mask is None else weights_of_mask(batch.mask)
        text = batch.text or (tokenize(denoiser.tokenizers, batch.captions, stream.captions.max_tokens),)
        if encode and not batch.text:
            text = tuple(part.cpu() for part in denoiser.encode_text(text[0].to(device)))
        ids = time_ids(batch.original_size, batch.crop, batch.size)
        probes.append(Probe(batch.names[0], batch.captions[0], latents, text, ids, weights, spread_timesteps(i, count), seed))
    return probes


@torch.no_grad()
def picture_of(stream: Stream, n: int, vae: Any, device: torch.device) -> tuple[str, str, Image.Image] | None:
    """(name, caption, picture) of sample `n` of a `quiet_stream`, as training sees it; None if it cannot be decoded. `vae`: on
    `device`, to decode latents, which become a picture of at most 512 pixels a side: enough to look at and to compare.
    """
    batch = stream.batch([n], [n])
    if batch.skipped:
        return None
    images = batch.images
    if stream.source.has_latents:
        posterior = images.to(device)
        latents = sample_latents(vae, posterior, torch.zeros_like(posterior[:, :4], dtype=torch.float32))
        while max(latents.shape[2:]) > 64:
            latents = F.avg_pool2d(latents, 2)
        return batch.names[0], batch.captions[0], to_image(decode_latents(vae, latents)[0])
    return batch.names[0], batch.captions[0], Image.fromarray(images[0].numpy())


def quiet_stream(source: Source, stream: Stream) -> Stream:
    """Single samples of `source` as training on `stream` gets them, but never mirrored, shuffled or without caption."""
    captions = replace(stream.captions, caption_dropout=0.0, shuffle_tags=False, keep_tags=0)
    config = replace(stream.config, bs=1, flip=False)
    has_text = stream.has_text and source.text_signature == stream.source.text_signature
    return Stream(source, config, captions, stream.resolution, stream.seed, has_text=has_text)


def text_of(probe: Probe, denoiser: Denoiser, device: torch.device) -> tuple[Tensor, ...]:
    """(context [1, 77·n, d1 + d2], pooled [1, d2]) of its caption, as `denoiser` encodes it now."""
    text = tuple(part.to(device) for part in probe.text)
    text = text if len(text) == 2 else denoiser.encode_text(*text)
    return tuple(part.to(denoiser.unet.dtype) for part in text)  # cached text is stored in float16


def losses_at(
    probe: Probe, part: slice, text: tuple[Tensor, ...], denoiser: Denoiser, diffusion: Diffusion, device: torch.device
) -> Tensor:
    """The loss of `denoiser`, as it is now, at this part of the probe's timesteps at once: [timesteps] float32 on `device`.
    `text`: from `text_of`.
    """
    generator = seed_generator(torch.Generator(), probe.seed)
    shape = (len(probe.timesteps), *probe.latents.shape[1:])
    noise = torch.randn(shape, generator=generator)[part].to(device)
    last = len(diffusion.alphas_cumprod)
    timesteps = torch.tensor([int(t * last) for t in probe.timesteps[part]]).to(device)
    rows = len(timesteps)
    latents, ids = probe.latents.to(device).expand(rows, -1, -1, -1), probe.ids.to(device).expand(rows, -1)
    repeated = tuple(states.expand(rows, *states.shape[1:]) for states in text)
    weights = None if probe.weights is None else probe.weights.to(device)
    prediction = denoiser(diffusion.add_noise(latents, noise, timesteps), timesteps, repeated, ids)
    return diffusion.loss(prediction, latents, noise, timesteps, weights)


@torch.no_grad()
def losses_of(probe: Probe, denoiser: Denoiser, diffusion: Diffusion, device: torch.device, most: int) -> list[float]:
    """The loss of `denoiser`, as it is now, at each timestep of the probe, from at most `most` of them at once."""
    text, losses = text_of(probe, denoiser, device), []
    for begin in range(0, len(probe.timesteps), most):
        losses += losses_at(probe, slice(begin, begin + most), text, denoiser, diffusion, device).tolist()
    return losses
