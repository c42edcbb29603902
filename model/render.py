"""Renders prompts with the pipeline."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import ROOT

DEMO_PROMPTS = ROOT / "assets/demo/prompts.txt"
NARUTO_PROMPTS = ["Naruto Uzumaki eating ramen", "Bill Gates in Naruto style", "A boy with blue eyes in Naruto style"]


def read_prompts(prompts: tuple[str, ...], model: str) -> list[str]:
    """The value of --prompts as a list of texts: the lines of the file, if it is one file name; the texts, if it is texts; if
    it is empty, the default prompts for `model`.

    Raises UserError if the file is missing or empty.
    """
    if len(prompts) == 1 and os.path.isfile(prompts[0]):  # Path.is_file() would raise for a long prompt
        lines = [line.strip() for line in Path(prompts[0]).read_text(errors="replace").splitlines() if line.strip()]
        if not lines:
            raise UserError(f"--prompts {prompts[0]} is empty")
        return lines
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        raise UserError(f"--prompts {prompts[0]}: no such file")
    if prompts:
        return list(prompts)
    return DEMO_PROMPTS.read_text().splitlines() if model == "demo" else NARUTO_PROMPTS


def render(
    pipe, describe: Callable[[str, str | None], dict], decode: Callable[[Tensor], Tensor], prompts: list[str], *,
    seed: int, steps: int, guidance: float, size: int, negative: str | None = None, label: str = "",
) -> list[Image.Image]:  # fmt: skip
    """Renders one picture of `size` × `size` pixels for each prompt. Picture i starts from noise drawn on the CPU with the
    seed `seed` + i, so it depends neither on the other prompts nor on the device.

    `describe`: (prompt, negative prompt) -> arguments of the pipeline. `decode`: latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w]
    in [-1, 1]. `label`: title of the progress bar; without it there is none. Raises UserError if a picture is not finite.
    """
    images = []
    for i, prompt in enumerate(tqdm(prompts, desc=label, unit="img", leave=False, disable=not label)):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
        latents = pipe(**describe(prompt, negative), generator=generator, output_type="latent", **options).images
        pixels = decode(latents)[0]
        if not (latents.isfinite().all() and pixels.isfinite().all()):  # cast to 8 bits it would be black
            raise UserError(f"picture {i + 1}, {prompt[:40]!r}, has values that are not finite: try --precision bf16 or fp32")
        images.append(to_image(pixels))
    return images


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] as an image of 8 bits per channel."""
    return Image.fromarray(pixels.permute(1, 2, 0).add(1).mul(127.5).round().byte().cpu().numpy())
