"""What a LoRA learned, in figures: base against LoRA on held-out images of the style.

    python scripts/evaluate.py                                        the newest LoRA in checkpoints/, the demo's images
    python scripts/evaluate.py held-out/ --lora naruto.safetensors --pictures 0

1. The denoising loss on held-out images, with the same noise and timesteps for both.
2. The distance of pictures, drawn from the held-out captions, to the held-out images: half the L1 distance between their
   distributions of colours (4 x 4 x 4 bins of RGB) and of edge strengths (16 bins). 0 is equal, 1 disjoint.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import Options, option
from options.command import parse_command
from options.training import DiffusionConfig, resolve_precision

HELD_OUT = Path(__file__).parents[1] / "assets/demo/heldout"


@dataclass(frozen=True)
class EvaluateConfig(Options):
    data: Annotated[str | None, tyro.conf.Positional] = None
    """Images of the style that were kept out of training, with captions. None: the demo's, for a LoRA trained on the demo."""
    lora: Path = Path("checkpoints")
    """A LoRA file, or a folder of them: the newest one in it."""
    model: str | None = None
    """None: the model that the LoRA was trained on."""
    timesteps: int = option(10, at_least=1)
    """Number of timesteps, evenly spread over the schedule, at which the loss of every image is computed."""
    pictures: int = 8
    """Number of captions to render with base and LoRA; 0 skips the second measure."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu', 'mps'."""


if __name__ == "__main__":
    COMMAND = parse_command("evaluate.py", EvaluateConfig, __doc__)

import numpy as np
import torch
from PIL import Image

from common.progress import tqdm
from data import decode
from dataset.images import Decoded
from dataset.sources import open_source
from lora import merge_lora
from lora_files.deltas import parameter_shapes
from lora_files.read import newest_lora, read_lora, read_metadata, trained_on
from memory import DTYPES, resolve_device
from model.check import describe_model
from model.diffusion import Diffusion
from model.load import load_sdxl, native_resolution
from model.prompts import Prompt
from model.render import render
from model.sdxl import Denoiser, time_ids
from model.text import tokenize
from model.vae import decode_latents, encode_pixels, normalise, sample_latents


@torch.no_grad()
def denoising_loss(
    denoiser: Denoiser, diffusion: Diffusion, vae: Any, samples: list[tuple[Decoded, str]], timesteps: int
) -> float:
    """Mean over samples, (image, caption), and timesteps; image i at timestep k always gets the same noise."""
    device, losses = vae.device, []
    for i, (image, caption) in enumerate(tqdm(samples, desc="loss", unit="img", leave=False)):
        generator = torch.Generator(device).manual_seed(i)
        posterior = encode_pixels(vae, normalise(torch.tensor(image.values)[None].to(device)))
        posterior_noise = torch.randn(posterior[:, :4].shape, generator=generator, device=device)
        latents = sample_latents(vae, posterior, posterior_noise).expand(timesteps, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        t = ((torch.arange(timesteps, device=device) + 0.5) * len(diffusion.alphas_cumprod) / timesteps).long()
        tokens = tokenize(denoiser.tokenizers, [caption] * timesteps, None).to(device)
        sizes = (image.original, image.crop, image.values.shape[:2])
        ids = time_ids(*(torch.tensor([size] * timesteps) for size in sizes)).to(device)
        prediction = denoiser(diffusion.add_noise(latents, noise, t), t, (tokens,), ids)
        losses.append(diffusion.loss(prediction, latents, noise, t).mean().item())
    return sum(losses) / len(losses)


def statistics(images: list[Image.Image]) -> dict[str, np.ndarray]:
    """The distribution of colours [64] and of edge strengths [16] over all pixels of all images, each summing to 1."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])  # [N, H, W, 3] in 0…255
    bins = (pixels // 64).astype(int)
    colours = np.bincount((bins @ np.array([16, 4, 1])).ravel(), minlength=64)
    grey = pixels.mean(axis=3)
    edges = np.hypot(np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1])
    strengths, _ = np.histogram(np.log2(1 + edges), bins=16, range=(0, 8))
    return {"colours": colours / colours.sum(), "edges": strengths / strengths.sum()}


def main(config: EvaluateConfig) -> None:
    device = resolve_device(config.device)
    lora = newest_lora(config.lora)
    if config.data is None and read_metadata(lora).get("sdxl_lora.dataset") != open_source("demo").fingerprint:
        raise UserError(f"{lora} was not trained on the demo's images: name a folder of yours that training has not seen")
    model = config.model or trained_on(lora)
    source = open_source(config.data or str(HELD_OUT))
    if source.has_latents:
        raise UserError(f"{config.data} holds latents: the evaluation compares pictures, so it needs images")
    pipe = load_sdxl(model, DTYPES[resolve_precision("auto", device)], device)
    denoiser, size = Denoiser(pipe), native_resolution(pipe)
    deltas = read_lora(lora, parameter_shapes(denoiser))
    schedule = pipe.scheduler
    if source.fingerprint == read_metadata(lora).get("sdxl_lora.dataset"):
        print("these are the pictures that it was trained on: a good loss here may be learning by heart")
    print(f"{lora} on {source.samples} images of {config.data or 'the demo, kept out of training'}")
    print(f"model {model}: predicts {describe_model(pipe)}")
    diffusion = Diffusion(DiffusionConfig(), schedule.alphas_cumprod, schedule.config.prediction_type, device)

    samples = []
    for raw in map(source.read_sample, range(source.samples)):
        try:
            samples.append((decode(raw, (size, size), flip=False), raw.captions[0]))
        except Exception as error:  # whatever a broken file makes Pillow raise
            print(f"left out {raw.name}: {error}")
    if not samples:
        raise UserError(f"{config.data}: no image can be decoded")
    settings = Prompt("", seed=0, width=size, height=size, steps=20, guidance=5.0)
    prompts = [Prompt(caption).filled(i, settings) for i, (_, caption) in enumerate(samples[: config.pictures])]
    draw = partial(render, pipe, denoiser.describe, partial(decode_latents, pipe.vae), prompts)
    results = {}
    for name in ("base", "LoRA"):
        if name == "LoRA":
            merge_lora(denoiser, deltas)
        results[name] = denoising_loss(denoiser, diffusion, pipe.vae, samples, config.timesteps), draw(label=name)

    (base_loss, base_pictures), (lora_loss, lora_pictures) = results.values()
    print(f"held-out denoising loss ({len(samples)} images x {config.timesteps} timesteps, the same noise)")
    print(f"  base {base_loss:.4f}   LoRA {lora_loss:.4f}   {100 * (lora_loss / base_loss - 1):+.1f} %")
    if prompts:
        style_pictures = [Image.fromarray(image.values) for image, _ in samples]
        style, base, tuned = map(statistics, (style_pictures, base_pictures, lora_pictures))
        print(f"distance of {len(prompts)} pictures to the held-out style images (0 equal, 1 disjoint)")
        for name, reference in style.items():
            before, after = (np.abs(drawn[name] - reference).sum() / 2 for drawn in (base, tuned))
            print(f"  {name:8} base {before:.3f}   LoRA {after:.3f}   {100 * (after / before - 1):+.1f} %")


if __name__ == "__main__":
    with one_line_errors("evaluate.py"):
        main(COMMAND)
