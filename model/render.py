"""Prompts -> pictures."""

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
    """Texts as they are; one name of a file: its lines; nothing: what the model is judged by.

    Raises UserError for a file that is empty or not there.
    """
    if len(prompts) == 1 and os.path.isfile(prompts[0]):  # Path.is_file() raises for a long text
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
    """One picture for each prompt, `size` pixels a side. Picture i starts from the noise of seed + i, drawn on the CPU: it
    depends neither on the other prompts nor on the device. `describe`: prompt, negative -> what the pipeline is told of them;
    `decode`: latents -> pixels in [-1, 1].
    """
    images = []
    for i, prompt in enumerate(tqdm(prompts, desc=label, unit="img", leave=False, disable=not label)):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
        latents = pipe(**describe(prompt, negative), generator=generator, output_type="latent", **options).images
        images.append(to_image(decode(latents)[0]))
    return images


def to_image(pixels: Tensor) -> Image.Image:
    """pixels [3, H, W] in [-1, 1] -> a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).add(1).mul(127.5).round().byte().cpu().numpy())
