"""Pictures of the base model and of the same model with a LoRA merged in: same prompts, same seeds, side by side.

python infer.py --compare                             the newest LoRA in checkpoints/: base | LoRA, in images/
python infer.py --prompts "a cat in Naruto style"     pictures with the LoRA only
python infer.py --lora naruto.safetensors --model sdxl --scale 0.4 0.7 1.0 --sampler dpm++ --steps 25     a column each
python infer.py --lora naruto.safetensors:0.8 --lora ink.safetensors:0.5 --lora-parts unet                several at once
python infer.py --save-merged merged/                 also writes W + ΔW as an ordinary diffusers folder
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from common.errors import UserError, check_seed, one_line_errors
from common.files import check_writable
from common.sheets import side_by_side, stack
from lora import merge_lora
from lora_files.deltas import check_fit, layer_shapes
from lora_files.read import newest_lora, read_lora, trained_on, with_strength
from memory import (
    DTYPES,
    resolve_device,
    resolve_precision,  # before sdxl: it readies xFormers, which diffusers imports
)
from model.load import load_sdxl, native_resolution
from model.render import read_prompts, render
from model.sdxl import SAMPLERS, Denoiser
from model.vae import decode_latents

PARTS = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}


@dataclass(frozen=True)
class InferConfig:
    compare: bool = False
    """Render the base model too and put it on the left."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file of any tool, or a folder of them: the newest in it; with :0.8 after it its strength. Again for another
    to be merged too. None given: checkpoints/."""
    lora_parts: str = "unet,te1,te2"
    """What of the LoRA is merged: U-Net, text encoders 1 and 2."""
    model: str | None = None
    """As in training. None: the model that the LoRA was trained on, from its header."""
    prompts: tuple[str, ...] = ()
    """Texts, or one file with a prompt on each line. None given: the evaluation prompts of the model."""
    negative: str | None = None
    """Negative prompt."""
    seed: int = 0
    """Picture i starts from the noise of seed + i."""
    steps: int = 30
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 is without."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of all LoRA together: W + scale·ΔW. Several: a column of pictures for each."""
    sampler: Literal["default", "ddim", "dpm++", "euler", "euler-a", "unipc"] = "default"
    """Sampler of diffusers. default: the model's own."""
    out: Path = Path("images")
    """Folder for 1.png, 2.png, … and compare.png."""
    save_merged: Path | None = None
    """Write the merged model there as a diffusers folder; for one --scale only."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on CUDA, fp32 on CPU. The VAE is never fp16."""
    device: str = "auto"
    """'auto' (CUDA if there is one), 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, not {self.steps}")
        if not self.scale:
            raise UserError("--scale needs a number")
        check_seed(self.seed)
        if self.save_merged and len(self.scale) > 1:
            raise UserError("--save-merged writes one model: give one --scale")
        if wrong := set(self.lora_parts.split(",")) - PARTS.keys():
            raise UserError(f"--lora-parts {','.join(sorted(wrong))}: choose from {','.join(PARTS)}")


def main(config: InferConfig) -> None:
    # The LoRA, and the model it was trained on.
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    loras = [(newest_lora(path), strength) for path, strength in map(with_strength, config.lora or ("checkpoints",))]
    model = config.model or trained_on(loras[0][0])
    prompts = read_prompts(config.prompts, model)
    pipe = load_sdxl(model, DTYPES[precision], device)
    denoiser = Denoiser(pipe)
    parts = tuple(PARTS[part] for part in config.lora_parts.split(","))
    chosen = []  # (ΔW, strength) of every LoRA
    for lora, strength in loras:
        deltas = read_lora(lora, layer_shapes(denoiser))
        chosen.append(({name: delta for name, delta in deltas.items() if name.startswith(parts)}, strength))
        print(f"LoRA {lora}: {len(chosen[-1][0])} of {len(deltas)} layers, strength {strength:g}")
    if config.save_merged:
        if config.save_merged.exists() and (not config.save_merged.is_dir() or any(config.save_merged.iterdir())):
            raise UserError(f"--save-merged {config.save_merged} is there already and not an empty folder")
        check_writable("--save-merged", config.save_merged)
    check_writable("--out", config.out)

    # How pictures are made: diffusers' pipeline and sampler.
    own_scheduler = pipe.scheduler
    if config.sampler != "default":
        pipe.scheduler = SAMPLERS[config.sampler].from_config(pipe.scheduler.config)
    size = native_resolution(pipe)
    draw = partial(
        render, pipe, denoiser.describe, partial(decode_latents, pipe.vae), prompts,
        seed=config.seed, steps=config.steps, guidance=config.guidance, size=size, negative=config.negative,
    )  # fmt: skip
    print(f"model {model}, {device}, {precision}, {config.steps} steps of the {config.sampler} sampler")

    # Base, merge, LoRA. Merging costs nothing per step afterwards.
    pictures = {}
    if config.compare:
        pictures["base"] = timed("base", draw, len(prompts))
    layers = check_fit(denoiser, {name: delta for deltas, _ in chosen for name, delta in deltas.items()})
    base = {name: layer.weight.cpu().clone() for name, layer in layers.items()} if len(config.scale) > 1 else {}
    for scale in config.scale:
        for name, weight in base.items():
            layers[name].weight.copy_(weight)
        for deltas, strength in chosen:
            merge_lora(denoiser, deltas, scale * strength)
        if config.save_merged:
            sampler, pipe.scheduler = pipe.scheduler, own_scheduler
            pipe.save_pretrained(config.save_merged)
            pipe.scheduler = sampler
            print(f"merged model in {config.save_merged}")
        label = "LoRA" if len(config.scale) == 1 else f"LoRA × {scale:g}"
        pictures[label] = timed(label, draw, len(prompts))

    # Sheets.
    rows = [dict(zip(pictures, row, strict=True)) for row in zip(*pictures.values(), strict=True)]
    several = len(pictures) > 1
    sheets = [side_by_side(r, prompt) if several else next(iter(r.values())) for r, prompt in zip(rows, prompts, strict=True)]
    files = {f"{i}.png": sheet for i, sheet in enumerate(sheets, 1)}
    if several:
        files["compare.png"] = stack(sheets)
    for name, sheet in files.items():
        sheet.save(config.out / name)
    print(f"pictures in {config.out}/: {', '.join(files)}")


def timed(label: str, draw, count: int) -> list:
    """The pictures, with the seconds that each took printed."""
    since = time.perf_counter()
    images = draw(label=label)
    print(f"{label}: {(time.perf_counter() - since) / count:.2f} s per image")
    return images


if __name__ == "__main__":
    with one_line_errors("infer.py"):
        main(tyro.cli(InferConfig, description=__doc__))
