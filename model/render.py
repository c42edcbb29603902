"""Renders prompts with the pipeline."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.files import ROOT
from common.progress import tqdm
from common.seeds import seed_generator
from common.text import read_text

DEMO_PROMPTS = ROOT / "assets/demo/prompts.txt"
OTHER_SYNTAX = (
    re.compile(  # of kohya's lines, of A1111's prompts and what it writes below a picture, of ComfyUI and of wildcards
        r"(?<!\S)--[A-Za-z][\w-]*|<(?:lora|lyco|hypernet):[^>]*>|[(\[][^()\[\]]*(?::\s*-?\d*\.\d+|[^\d\s]\s*:\s*-?\d+)\s*[)\]]"
        r"|^Negative prompt:|^Steps: \d+,|(?<!\S)embedding:\S+|(?<!\S)__\w+__|\{[^{}]*\|[^{}]*\}"
    )
)
PROMPT_FILES = (".txt", ".toml", ".json", ".jsonl", ".csv", ".yaml", ".yml")  # the first is read
NARUTO_PROMPTS = ["Naruto Uzumaki eating ramen", "Bill Gates in Naruto style", "A boy with blue eyes in Naruto style"]


def read_prompts(prompts: tuple[str, ...], model: str) -> list[str]:
    """The value of --prompts as a list of texts: the lines of the file, if it is one file name, but for those that begin with
    #; the texts, if it is texts; if it is empty, the default prompts for `model`.

    Raises UserError if the file is missing, empty or no text, or for what other programs read otherwise, such as --n.
    """
    if len(prompts) == 1 and prompts[0].endswith(PROMPT_FILES[1:]):
        raise UserError(f"--prompts {prompts[0]}: only text is read, with a prompt on each line: write a .txt")
    if len(prompts) == 1 and os.path.isfile(prompts[0]):  # Path.is_file() would raise for a long prompt
        try:
            lines = [line.strip() for line in read_text(Path(prompts[0]).read_bytes()).splitlines()]
        except (ValueError, OSError) as error:
            raise UserError(f"--prompts {prompts[0]} is {error}") from None
        numbered = {f"{prompts[0]} line {n}": line for n, line in enumerate(lines, 1) if line and not line.startswith("#")}
        if not numbered:
            raise UserError(f"--prompts {prompts[0]} is empty")
        return words_only(numbered)
    if len(prompts) == 1 and (prompts[0].endswith(PROMPT_FILES) or os.path.isdir(prompts[0])):
        raise UserError(f"--prompts {prompts[0]}: no such file")
    if prompts:
        return words_only({f"text {n}": prompt for n, prompt in enumerate(prompts, 1)})
    return DEMO_PROMPTS.read_text().splitlines() if model == "demo" else NARUTO_PROMPTS


def words_only(prompts: dict[str, str]) -> list[str]:
    """{where it is: prompt} -> the prompts. Raises UserError for one in the syntax of another program, such as --w 512."""
    for where, prompt in prompts.items():
        if found := OTHER_SYNTAX.search(prompt):
            raise UserError(f"--prompts {where}: options such as {found[0]} are not read, but would be drawn: remove them")
    return list(prompts.values())


def render(
    pipe, describe: Callable[[str, str | None], dict], decode: Callable[[Tensor], Tensor], prompts: list[str], *,
    seed: int, steps: int, guidance: float, size: int, negative: str | None = None, label: str = "",
) -> list[Image.Image]:  # fmt: skip
    """Renders one picture of `size` × `size` pixels for each prompt. Picture i starts from noise drawn on the CPU with the
    seed `seed` + i, so it depends neither on the other prompts nor on the device.

    `describe`: (prompt, negative prompt) -> arguments of the pipeline. `decode`: latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w]
    in [-1, 1]. `label`: title of the progress bar; without it there is none. Raises UserError if a picture is not finite.
    """
    images, pipe.scheduler = [], from_last_timestep(pipe.scheduler)
    for i, prompt in enumerate(tqdm(prompts, desc=label, unit="img", leave=False, disable=not label)):
        generator = seed_generator(torch.Generator("cpu"), seed + i)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
        latents = pipe(**describe(prompt, negative), generator=generator, output_type="latent", **options).images
        pixels = decode(latents)[0]
        if not (latents.isfinite().all() and pixels.isfinite().all()):  # cast to 8 bits it would be black
            raise UserError(f"picture {i + 1}, {prompt[:40]!r}, has values that are not finite: try --precision bf16 or fp32")
        images.append(to_image(pixels))
    return images


def from_last_timestep(scheduler: Any) -> Any:
    """The scheduler; if ᾱ of its last timestep is 0, so that sampling has to begin at pure noise, with "trailing" timesteps
    (Lin et al. 2023, arXiv:2305.08891). "leading", SDXL's own, never visits the last one.
    """
    if scheduler.alphas_cumprod[-1] > 1e-6 or scheduler.config.get("timestep_spacing") == "trailing":
        return scheduler
    return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] as an image of 8 bits per channel."""
    return Image.fromarray(pixels.permute(1, 2, 0).add(1).mul(127.5).round().byte().cpu().numpy())
