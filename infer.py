"""Pictures of the base model and of the same model with a LoRA merged in: same prompts, same seeds, side by side.

python infer.py --compare                             the newest LoRA in checkpoints/: base | LoRA, in images/
python infer.py --prompts "a cat in Naruto style"     pictures with the LoRA only
python infer.py --lora naruto.safetensors --model sdxl --scale 0.4 0.7 1.0 --sampler dpm++ --steps 25     a column each
python infer.py --lora naruto.safetensors:0.8 --lora ink.safetensors:0.5 --lora-parts unet                several at once
python infer.py --save-merged merged/                 also writes W + ΔW as an ordinary diffusers folder
python infer.py --save-merged merged.safetensors      or as one checkpoint file, for other programs
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: Ctrl-C during an import would print its traceback

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image

from common.errors import UserError, one_line_errors
from common.files import check_writable
from common.options import MAX_SEED, check_options, option
from common.sheets import side_by_side, stack
from lora import merge_loras
from lora_files.deltas import Deltas, check_fit, parameter_shapes
from lora_files.merge import write_pipeline
from lora_files.read import newest_lora, read_lora, read_tensors, trained_on, with_strength
from memory import DTYPES, resolve_device, resolve_precision
from model.check import describe_model
from model.load import load_sdxl, native_resolution
from model.render import read_prompts, render
from model.sdxl import SAMPLERS, Denoiser
from model.vae import decode_latents

PARTS = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}


@dataclass(frozen=True)
class InferConfig:
    compare: bool = False
    """Render the base model too, as the column on the left."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file of any tool, or a folder of them: the newest in it; `:0.8` after it is its strength. May be repeated, to
    merge several. None given: checkpoints/."""
    lora_parts: str = "unet,te1,te2"
    """What of the LoRA is merged: U-Net, text encoders 1 and 2."""
    model: str | None = None
    """As in training. None: the model that the LoRA was trained on, from its header."""
    prompts: tuple[str, ...] = ()
    """Texts, or one file with a prompt on each line. None given: the evaluation prompts of the model."""
    negative: str | None = None
    """Negative prompt."""
    seed: int = option(0, at_least=0, at_most=MAX_SEED)
    """Picture i starts from the noise of seed + i."""
    steps: int = option(30, at_least=1)
    """Denoising steps."""
    guidance: float = option(5.0, at_least=0)
    """Classifier-free guidance scale; 1 is without."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of all LoRA together: W + scale·ΔW. Several: a column of pictures for each."""
    sampler: Literal["default", "ddim", "dpm++", "euler", "euler-a", "unipc"] = "default"
    """Sampler of diffusers. default: the model's own."""
    out: Path = Path("images")
    """Folder for 1.png, 2.png, … and compare.png."""
    save_merged: Path | None = None
    """Where to write the merged model: a diffusers folder, or x.safetensors, a checkpoint in one file; for one --scale only."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on CUDA, fp32 on CPU. The VAE is never fp16."""
    device: str = "auto"
    """'auto' (CUDA if there is one), 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        check_options(self)
        if not self.scale:
            raise UserError("--scale needs a number")
        if self.save_merged and len(self.scale) > 1:
            raise UserError("--save-merged writes one model: give one --scale")
        if wrong := set(self.lora_parts.split(",")) - PARTS.keys():
            raise UserError(f"--lora-parts {','.join(sorted(wrong))}: choose from {','.join(PARTS)}")


def read_loras(config: InferConfig, files: list[tuple[Path, float]], denoiser: Denoiser) -> list[tuple[Deltas, float]]:
    """(ΔW of the chosen parts, strength) of every LoRA. Raises UserError for a file that does not fit the model."""
    prefixes = tuple(PARTS[part] for part in config.lora_parts.split(","))
    loras = []
    for file, strength in files:
        deltas = read_lora(file, parameter_shapes(denoiser))
        chosen = {name: delta for name, delta in deltas.items() if name.startswith(prefixes)}
        print(f"LoRA {file}: {len(chosen)} of {len(deltas)} layers, strength {strength:g}")
        loras.append((chosen, strength))
    return loras


def main(config: InferConfig) -> None:
    # The LoRA, and the model it was trained on.
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    files = [(newest_lora(path), strength) for path, strength in map(with_strength, config.lora or ("checkpoints",))]
    model = config.model or trained_on(files[0][0])
    prompts = read_prompts(config.prompts, model)
    for file, _ in files:
        read_tensors(file)  # a file that is damaged shows before the model is loaded
    pipe = load_sdxl(model, DTYPES[precision], device)
    denoiser = Denoiser(pipe)
    loras = read_loras(config, files, denoiser)
    if config.save_merged:
        check_empty("--save-merged", config.save_merged)
    check_writable("--out", config.out)

    # How pictures are made: diffusers' pipeline and sampler.
    own_scheduler = pipe.scheduler
    if config.sampler != "default":
        pipe.scheduler = SAMPLERS[config.sampler].from_config(pipe.scheduler.config)
    draw = partial(
        render, pipe, denoiser.describe, partial(decode_latents, pipe.vae), prompts, seed=config.seed, steps=config.steps,
        guidance=config.guidance, size=native_resolution(pipe), negative=config.negative,
    )  # fmt: skip
    print(f"model {model}: predicts {describe_model(pipe)}")
    print(f"{device}, {precision}, {config.steps} steps of the {config.sampler} sampler")

    # Base, merge, LoRA. Merging costs nothing per step afterwards.
    pictures = {"base": timed("base", draw, len(prompts))} if config.compare else {}
    weights = check_fit(denoiser, {name: delta for deltas, _ in loras for name, delta in deltas.items()})
    base = {name: weight.cpu().clone() for name, weight in weights.items()} if len(config.scale) > 1 else {}
    for scale in config.scale:
        for name, weight in base.items():
            weights[name].copy_(weight)
        merge_loras(denoiser, [(deltas, scale * strength) for deltas, strength in loras])
        if config.save_merged:
            sources = [{"file": file.name, "strength": scale * strength} for file, strength in files]
            sampler, pipe.scheduler = pipe.scheduler, own_scheduler
            write_pipeline(pipe, config.save_merged, sources)
            pipe.scheduler = sampler
            print(f"merged model in {config.save_merged}")
        label = "LoRA" if len(config.scale) == 1 else f"LoRA × {scale:g}"
        pictures[label] = timed(label, draw, len(prompts))

    # Sheets.
    rows = [dict(zip(pictures, row, strict=True)) for row in zip(*pictures.values(), strict=True)]
    sheets = [side_by_side(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    images = sheets if len(pictures) > 1 else next(iter(pictures.values()))
    files_written = {f"{i}.png": image for i, image in enumerate(images, 1)}
    if len(pictures) > 1:
        files_written["compare.png"] = stack(sheets)
    move_older_pictures(config.out)
    for name, image in files_written.items():
        image.save(config.out / name)
    print(f"pictures in {config.out}/: {', '.join(files_written)}")


def move_older_pictures(folder: Path) -> None:
    """Moves the pictures of an earlier call into `older` in this folder, in the place of those of the same name there."""
    if older := [path for path in folder.glob("*.png") if path.stem.isdecimal() or path.stem == "compare"]:
        (folder / "older").mkdir(exist_ok=True)
        for path in older:
            path.replace(folder / "older" / path.name)
        print(f"older pictures are in {folder / 'older'}")


def check_empty(flag: str, path: Path) -> None:
    """Raises UserError if there is a file of that name, or a folder that is not empty, or if it cannot be written."""
    if path.exists() and (not path.is_dir() or any(path.iterdir()) or path.suffix == ".safetensors"):
        raise UserError(f"{flag} {path} is there already and not an empty folder")
    check_writable(flag, path.parent)


def timed(label: str, draw: Callable[..., list[Image.Image]], count: int) -> list[Image.Image]:
    """The pictures; prints the seconds that each took."""
    begin = time.perf_counter()
    images = draw(label=label)
    print(f"{label}: {(time.perf_counter() - begin) / count:.2f} s per image")
    return images


if __name__ == "__main__":
    with one_line_errors("infer.py"):
        main(tyro.cli(InferConfig, description=__doc__))
