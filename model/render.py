"""Renders prompts with the pipeline."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.progress import tqdm
from common.seeds import seed_generator
from model.prompts import Prompt

SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 5.0  # of a prompt that does not say, where a LoRA is looked at


def render(
    pipe, describe: Callable[[str, str | None], dict], decode: Callable[[Tensor], Tensor], prompts: list[Prompt],
    label: str = "",
) -> list[Image.Image]:  # fmt: skip
    """Renders a picture of each prompt, which is `filled`. It starts from noise drawn on the CPU with the seed of the prompt,
    so it depends neither on the other prompts nor on the device. The strength is not read here.

    `describe`: (prompt, negative prompt) -> arguments of the pipeline. `decode`: latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w]
    in [-1, 1]. `label`: title of the progress bar; without it there is none. Raises UserError if a picture is not finite.
    """
    images, pipe.scheduler = [], from_last_timestep(pipe.scheduler)
    for i, prompt in enumerate(tqdm(prompts, desc=label, unit="img", leave=False, disable=not label)):
        generator = seed_generator(torch.Generator("cpu"), prompt.seed or 0)
        options = {"num_inference_steps": prompt.steps, "guidance_scale": prompt.guidance, "generator": generator}
        options |= {"height": prompt.height, "width": prompt.width, "output_type": "latent"}
        latents = pipe(**describe(prompt.text, prompt.negative), **options).images
        pixels = decode(latents)[0]
        if not (latents.isfinite().all() and pixels.isfinite().all()):  # cast to 8 bits it would be black
            what = f"picture {i + 1}, {prompt.text[:40]!r}"
            raise UserError(f"{what}, has values that are not finite: try --precision bf16 or fp32")
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
