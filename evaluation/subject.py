"""SDXL with a LoRA merged in, or none, as the scripts measure it after a run: one model, LoRA after LoRA."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.errors import UserError
from common.progress import tqdm
from data import Stream
from dataset.sources import Source
from evaluation.validation import Losses, Probe, losses_of, make_probes, quiet_stream, unweighted
from lora import merge_loras
from lora_files.deltas import Changes, check_fit
from lora_files.read import read_metadata
from memory import DTYPES, resolve_device, speed_up
from model.load import load_sdxl, native_resolution
from model.prompts import Prompt
from model.render import SAMPLE_GUIDANCE, SAMPLE_STEPS, Renderer
from model.sdxl import Denoiser
from model.vae import decode_latents
from options.training import CaptionConfig, DataOptions, resolve_precision
from performance.attention import drawing_kernel

MOST_PREDICTIONS = 4  # at once


class Subject:
    """A model that is measured. `merge` decides which LoRA it holds; at first it is the base."""

    def __init__(self, model: str, device: str, fast: bool = True):
        """`fast`: with the fast layers, after which no LoRA layers can be added. Raises UserError if the model or the device is
        not there.
        """
        self.device = resolve_device(device)
        self.pipe = load_sdxl(model, DTYPES[resolve_precision("auto", self.device)], self.device)
        self.denoiser, self.side, self.name = Denoiser(self.pipe), native_resolution(self.pipe), model
        for part in (self.denoiser, self.pipe.vae) if fast else ():
            speed_up(part, drawing_kernel(self.device))
        self.renderer = Renderer(self.pipe, self.denoiser, partial(decode_latents, self.pipe.vae))
        self.diffusion = unweighted(self.pipe, self.device)
        self.weights: dict[str, torch.Tensor] = {}  # those that some LoRA has changed
        self.base: dict[str, torch.Tensor] = {}  # how they were, on the host

    def merge(self, deltas: Changes, strength: float = 1.0) -> None:
        """The base, with this LoRA alone. Raises UserError if it does not fit."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.base[name])
        weights = check_fit(self.denoiser, deltas)
        self.base |= {name: weight.cpu().clone() for name, weight in weights.items() if name not in self.base}
        self.weights |= weights
        merge_loras(self.denoiser, [(deltas, strength)])

    def stream(self, source: Source, options: dict[str, Any]) -> Stream:
        """Single samples of `source` as a run with these `options`, from the header of a LoRA, gets them."""
        known = {name: options[name] for name in ("buckets", "bucket_step", "masked_loss") if name in options}
        captions = CaptionConfig(trigger=str(options.get("trigger", "")), max_tokens=int(options.get("max_tokens", 75)))
        side = int(options.get("resolution") or self.side)
        return quiet_stream(source, Stream(source, DataOptions(bs=1, **known), captions, side, int(options.get("seed", 0))))

    def probes(self, stream: Stream, numbers: Sequence[int], timesteps: int) -> list[Probe]:
        """Raises UserError if none of these samples can be decoded."""
        probes = make_probes(stream, numbers, timesteps, self.denoiser, self.pipe.vae, self.device, encode=False)
        if not probes:
            raise UserError("none of the pictures can be decoded")
        return probes

    def losses(self, probes: list[Probe], label: str) -> Losses:
        """As the model is now; `label`: of the progress bar."""
        bar = tqdm(probes, desc=label, unit="img", leave=False)
        return [losses_of(probe, self.denoiser, self.diffusion, self.device, MOST_PREDICTIONS) for probe in bar]

    def draw(self, prompts: list[Prompt], label: str) -> list[Image.Image]:
        """As the model is now."""
        return self.renderer.draw(prompts, label)

    def filled(self, texts: Sequence[str], seeds: int = 1) -> list[Prompt]:
        """`seeds` prompts of each text, one after the other, of the model's own size."""
        defaults = Prompt("", seed=0, width=self.side, height=self.side, steps=SAMPLE_STEPS, guidance=SAMPLE_GUIDANCE)
        return [Prompt(text).filled(seeds * n + i, defaults) for n, text in enumerate(texts) for i in range(seeds)]


def options_of(lora: Path) -> dict[str, Any]:
    """The options of the run that a LoRA comes from; {} if its header does not say."""
    try:
        options = json.loads(read_metadata(lora).get("sdxl_lora.config", "{}"))
    except (ValueError, RecursionError):
        return {}
    return options if isinstance(options, dict) else {}
