"""Pictures that people look at: rendered with diffusers' pipeline, base and LoRA side by side with the prompt above."""

from functools import partial

import numpy as np
import torch
from PIL import Image

from common.errors import UserError, warn_of
from common.sheets import side_by_side, stack
from lora import Adapter
from memory import note_if_out_of_memory, temporarily_on
from model.render import read_prompts, render
from model.vae import DECODING, decode_latents
from options.training import GalleryConfig
from performance.memory_plan import Plan
from run.ranks import Ranks
from run.setup import TrainingModel
from run.stop import StopRequest


def prompts_to_draw(config: GalleryConfig, model: str) -> list[str]:
    """The prompts for --model. Raises UserError if their file cannot be read."""
    return read_prompts(config.prompts, model) if config.pictures else []


class Gallery:
    """The evaluation prompts during training, base beside LoRA, from the live modules: no second model in memory.

    With the adapter disabled the pipeline is the base; its pictures are rendered once. Each of the ranks draws its share.
    """

    def __init__(
        self, model: TrainingModel, adapter: Adapter, prompts: list[str], size: int, ranks: Ranks, stop: StopRequest, plan: Plan
    ):
        """`size`: pixels a side. Where the VAE has no room beside the weights it decodes in tiles."""
        self.model, self.adapter, self.prompts = model, adapter, prompts
        self.ranks, self.stop, self.advice = ranks, stop, plan.oom_advice
        vae_bytes = sum(p.nbytes for p in model.vae.parameters()) + DECODING * size**2 * model.vae.dtype.itemsize
        decode = partial(decode_latents, model.vae, tiled=plan.weights + vae_bytes > plan.budget)
        self.render = partial(render, model.pipe, model.full_denoiser.describe, decode, steps=20, guidance=5.0, size=size)
        self.base: dict[int, Image.Image] = {}

    def draw(self, step: int) -> np.ndarray | None:
        """One sheet after `step`, a row for each prompt: [H, W, 3] uint8; None without prompts, or if a signal came before.

        Called by all ranks.
        """
        if not self.prompts:
            return None
        with (
            note_if_out_of_memory(f"drawing pictures after step {step}; {self.advice}"),
            temporarily_on(self.model.device, self.model.kept_on_host),
            torch.compiler.set_stance("force_eager"),  # compiling for these shapes would take minutes
        ):
            rows = self.draw_rows(f"LoRA, step {step}")
        rows = {i: row for part in self.ranks.gather(rows) for i, row in part.items()}
        return np.asarray(stack([rows[i] for i in sorted(rows)])) if len(rows) == len(self.prompts) else None

    def draw_rows(self, name: str) -> dict[int, Image.Image]:
        """{number of the prompt: base and LoRA side by side} of this rank's prompts, until a signal comes."""
        rows = {}
        for i in range(self.ranks.rank, len(self.prompts), self.ranks.world):
            if self.stop.requested:
                break
            try:
                if i not in self.base:
                    with self.adapter.disabled():
                        self.base[i] = self.render(prompts=[self.prompts[i]], seed=i)[0]
                pictures = {"base": self.base[i], name: self.render(prompts=[self.prompts[i]], seed=i)[0]}
            except UserError as error:  # a picture that is not finite; the other ranks wait for this one
                warn_of(name, error)
                break
            rows[i] = side_by_side(pictures, self.prompts[i])
        return rows
