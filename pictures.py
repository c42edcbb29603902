"""Pictures that people look at: rendered with diffusers' pipeline, base and LoRA side by side with the prompt above."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from errors import UserError

MARGIN = 8
DEMO_PROMPTS = Path(__file__).parent / "assets/demo/prompts.txt"
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


class Gallery:
    """The evaluation prompts during training, base beside LoRA, from the live modules: no second model in memory.

    Inside `disabled()` the pipeline is the base; its pictures are rendered once. Each of the ranks draws its share.
    `stop.asked` is looked at before every prompt.
    """

    def __init__(
        self, pipe, describe: Callable[[str, str | None], dict], decode: Callable[[Tensor], Tensor],
        disabled: Callable[[], AbstractContextManager], prompts: list[str], size: int, ranks, stop,
    ):  # fmt: skip
        self.disabled, self.prompts, self.ranks, self.stop = disabled, prompts, ranks, stop
        self.base: dict[int, Image.Image] = {}
        self.render = partial(render, pipe, describe, decode, steps=20, guidance=5.0, size=size)

    def draw(self, name: str) -> np.ndarray | None:
        """One sheet, a row for each prompt: [H, W, 3] uint8; None if it was stopped."""
        mine = {}
        for i in range(self.ranks.rank, len(self.prompts), self.ranks.world):
            if self.stop.asked:
                break
            if i not in self.base:
                with self.disabled():
                    self.base[i] = self.render([self.prompts[i]], seed=i)[0]
            mine[i] = side_by_side({"base": self.base[i], name: self.render([self.prompts[i]], seed=i)[0]}, self.prompts[i])
        rows = {i: sheet for part in self.ranks.gather(mine) for i, sheet in part.items()}
        return np.asarray(stack([rows[i] for i in sorted(rows)])) if len(rows) == len(self.prompts) else None


def side_by_side(columns: dict[str, Image.Image], prompt: str) -> Image.Image:
    """The pictures of one prompt from left to right, each with its name above, and the prompt over all of them.

    Small pictures are enlarged to at least 384 pixels, so that the text can be read.
    """
    side = max(384, next(iter(columns.values())).width)
    font = ImageFont.load_default(size=side / 24)
    line = round(side / 24 * 1.6)
    sheet = Image.new("RGB", (len(columns) * (side + MARGIN) + MARGIN, side + 2 * line + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, line // 5), shorten(prompt, sheet.width - 2 * MARGIN, font), fill="black", font=font)
    for i, (name, image) in enumerate(columns.items()):
        x = MARGIN + i * (side + MARGIN)
        draw.text((x, line), name, fill="gray", font=font)
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, 2 * line))
    return sheet


def shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cuts `text` to `width` pixels, with an ellipsis where it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Sheets of equal width, one under the other."""
    whole = Image.new("RGB", (sheets[0].width, sum(s.height for s in sheets)), "white")
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole
