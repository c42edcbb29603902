"""Pictures of the base model and of the same model with a LoRA merged in: same prompts, same seeds, side by side.

python infer.py --compare                             the newest LoRA in checkpoints/: base | LoRA, in images/
python infer.py --prompts "a cat in Naruto style"     pictures with the LoRA only
python infer.py --lora naruto.safetensors --model sdxl --scale 0.8 --sampler dpm++ --steps 25
python infer.py --save-merged merged/                 also writes W + ΔW as an ordinary diffusers folder
"""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

import formats
import memory  # before sdxl: it readies xFormers, which diffusers imports
from checkpoint import check_writable
from errors import UserError, one_line_errors
from lora import check_fit, layer_shapes, merge_lora
from pictures import evaluation_prompts, render, side_by_side, stack
from sdxl import SAMPLERS, Denoiser, decode_latents, load_sdxl, native_resolution


@dataclass(frozen=True)
class InferConfig:
    compare: bool = False
    """Render the base model too and put it on the left."""
    lora: Path = Path("checkpoints")
    """A LoRA file, or a folder of them: the newest one in it."""
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
    scale: float = 1.0
    """Strength of the LoRA: W + scale·ΔW."""
    sampler: Literal["default", "ddim", "dpm++", "euler", "euler-a", "unipc"] = "default"
    """Sampler of diffusers. default: the model's own."""
    out: Path = Path("images")
    """Folder for 1.png, 2.png, … and compare.png."""
    save_merged: Path | None = None
    """Write the merged model there as a diffusers folder."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on CUDA, fp32 on CPU. The VAE is never fp16."""
    device: str = "auto"
    """'auto' (CUDA if there is one), 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, not {self.steps}")


def read_prompts(prompts: tuple[str, ...], model: str) -> list[str]:
    """Texts as they are; one name of a file: its lines; nothing: what the model is judged by."""
    if len(prompts) == 1 and os.path.isfile(prompts[0]):
        lines = [line.strip() for line in Path(prompts[0]).read_text(errors="replace").splitlines() if line.strip()]
        if not lines:
            raise UserError(f"--prompts {prompts[0]} is empty")
        return lines
    return list(prompts) or evaluation_prompts(model)


def main(config: InferConfig) -> None:
    # The LoRA, and the model it was trained on.
    device = memory.resolve_device(config.device)
    precision = memory.resolve_precision(config.precision, device)
    lora = formats.find(config.lora)
    model = config.model or formats.trained_on(lora)
    prompts = read_prompts(config.prompts, model)
    pipe = load_sdxl(model, memory.DTYPES[precision], device)
    denoiser = Denoiser(pipe)
    deltas = formats.read(lora, layer_shapes(denoiser))
    check_fit(denoiser, deltas)  # now, not after the base pictures
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
    how = {"seed": config.seed, "steps": config.steps, "guidance": config.guidance, "negative": config.negative}
    draw = partial(render, pipe, partial(decode_latents, pipe.vae), prompts, size=size, **how)
    print(f"model {model}, LoRA {lora}: {len(deltas)} layers, scale {config.scale:g}")
    print(f"{device}, {precision}, {config.steps} steps of the {config.sampler} sampler")

    # Base, merge, LoRA. Merging costs nothing per step afterwards.
    pictures = {}
    if config.compare:
        pictures["base"] = timed("base", draw, len(prompts))
    merge_lora(denoiser, deltas, config.scale)
    if config.save_merged:
        sampler, pipe.scheduler = pipe.scheduler, own_scheduler
        pipe.save_pretrained(config.save_merged)
        pipe.scheduler = sampler
        print(f"merged model in {config.save_merged}")
    pictures["LoRA"] = timed("LoRA", draw, len(prompts))

    # Sheets.
    rows = [dict(zip(pictures, row, strict=True)) for row in zip(*pictures.values(), strict=True)]
    sheets = [side_by_side(row, prompt) if config.compare else row["LoRA"] for row, prompt in zip(rows, prompts, strict=True)]
    files = {f"{i}.png": sheet for i, sheet in enumerate(sheets, 1)}
    if config.compare:
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
        main(tyro.cli(InferConfig))
