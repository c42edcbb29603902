"""Pictures that people look at: base and LoRA side by side with the prompt above."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError, warn_of
from common.files import TolerantWriter, write_atomically
from common.sheets import png_bytes, side_by_side, stack
from dataset.captions import with_trigger
from lora import Adapter
from memory import note_if_out_of_memory, temporarily_on
from model.prompts import Prompt, generation_parameters, read_prompts, times
from model.render import SAMPLE_GUIDANCE, SAMPLE_STEPS, Renderer, drawing_bytes
from model.vae import decode_latents
from options.training import CaptionConfig, CheckpointConfig, GalleryConfig
from performance.memory_plan import Plan
from run.examiner import Examiner
from run.header import file_stem
from run.log import sample_tag
from run.ranks import Ranks
from run.setup import TrainingModel
from run.stop import StopRequest

Drawn = tuple[Image.Image, dict[str, Any]]  # a picture, and the examiner's opinion of it


def prompts_to_draw(config: GalleryConfig, captions: CaptionConfig, model: str) -> list[Prompt]:
    """The prompts for --model, with the trigger in front of those that lack it. Raises UserError if their file cannot be
    read.
    """
    prompts = read_prompts(config.prompts, model, captions.trigger) if config.pictures else []
    trigger = re.compile(rf"(?<!\w){re.escape(captions.trigger.strip(' ,'))}(?!\w)", re.IGNORECASE)  # 'ink' is not in 'drink'
    return [p if trigger.search(p.text) else replace(p, text=with_trigger(p.text, captions)) for p in prompts]


class Gallery:
    """The evaluation prompts during training, base beside LoRA, from the live modules: no second model in memory.

    With the adapter disabled the pipeline is the base; its pictures are rendered once. Each of the ranks draws its share.
    """

    def __init__(
        self, config: GalleryConfig, model: TrainingModel, adapter: Adapter, prompts: list[Prompt], side: int,
        files: CheckpointConfig, ranks: Ranks, stop: StopRequest, plan: Plan, examiner: Examiner,
    ):  # fmt: skip
        """`side`: pixels, of a prompt that does not say; `files`: where pictures go. Where the VAE has no room beside the
        weights it decodes in tiles. `fits`: whether drawing has room beside a training step, which then keeps its graphs, as
        drawing does.
        """
        self.config, self.model, self.adapter = config, model, adapter
        self.name, self.folder = files.name, files.out / "samples"
        self.ranks, self.stop, self.advice, self.examiner = ranks, stop, plan.oom_advice, examiner
        defaults = Prompt("", seed=0, width=side, height=side, steps=SAMPLE_STEPS, guidance=SAMPLE_GUIDANCE, strength=1.0)
        self.prompts = [prompt.filled(i, defaults) for i, prompt in enumerate(prompts)]
        dtypes = model.full_denoiser.unet.dtype, model.vae.dtype
        needed = [drawing_bytes(prompt, *dtypes) for prompt in self.prompts] or [(0, 0)]
        denoising, decoding = map(max, zip(*needed, strict=True))
        vae_bytes = sum(p.nbytes for p in model.vae.parameters()) + decoding
        decode = partial(decode_latents, model.vae, tiled=plan.weights + vae_bytes > plan.budget)
        brought = sum(p.nbytes for module in model.kept_on_host for p in module.parameters())
        beside, alone = (plan.budget - brought - taken for taken in (plan.predicted, plan.weights))
        self.fits = denoising + decoding <= beside
        self.renderer = Renderer(model.pipe, model.full_denoiser, decode, beside if self.fits else alone)
        self.base: dict[int, Drawn] = {}
        self.disk = TolerantWriter()
        examiner.prepare()

    def is_due(self, step: int, last: int, saving: bool) -> bool:
        every = self.config.sample_every
        return step % every == 0 or step == last if every else saving

    def begin(self, step: int) -> dict[str, np.ndarray]:
        """`draw`, if this is the beginning of a run."""
        return {} if step else self.draw(step)

    def draw(self, step: int) -> dict[str, np.ndarray]:
        """Draws the prompts after `step`, with the base alone while the LoRA is nothing, and writes the files. Returns, for the
        log of rank 0, {tag: base and LoRA side by side, [H, W, 3] uint8}; what a signal came before, or is not finite, is left
        out.

        Called by all ranks.
        """
        if not self.prompts:
            return {}
        self.examiner.judge.forget()
        with (
            note_if_out_of_memory(f"drawing pictures after step {step}; {self.advice}"),
            temporarily_on(self.model.device, self.model.kept_on_host),
            self.adapter.holding(self.adapter.in_use()[""]),
        ):
            drawn = self.draw_own(step)
        if not self.fits:
            self.renderer.release()
        drawn = {i: pictures for part in self.ranks.gather(drawn) for i, pictures in part.items()}
        if not self.ranks.is_first:
            return {}
        files: dict[str, Image.Image] = {}
        sheets: dict[int, Image.Image] = {}
        for i, pictures in sorted(drawn.items()):
            for name, (image, opinion) in pictures.items():
                file = f"step-{step:06}-p{i + 1}-{name}.png"
                files[file] = image
                self.remember("base" if name == "base" else str(step), i, self.examiner.look(image, f"samples/{file}", opinion))
            names = {"base": "base", "lora": f"LoRA{times(self.prompts[i].strength)}, step {step}"}
            sheets[i] = side_by_side({names[n]: image for n, (image, _) in pictures.items()}, self.prompts[i].text)
        if len(sheets) == len(self.prompts):
            files[f"step-{step:06}.png"] = stack(list(sheets.values()))
        self.disk("the pictures", partial(self.write, files))
        return {sample_tag(i, len(self.prompts)): np.asarray(sheet) for i, sheet in sheets.items()}

    def remember(self, step: str, i: int, looked_at: dict[str, Any]) -> None:
        """What the record says of the picture of prompt `i`."""
        pictures = self.examiner.record.setdefault("pictures", {})
        pictures.setdefault(step, [None] * len(self.prompts))[i] = looked_at

    def write(self, files: dict[str, Image.Image]) -> None:
        for name, image in files.items():
            write_atomically(self.folder / name, png_bytes(image))

    def draw_own(self, step: int) -> dict[int, dict[str, Drawn]]:
        """{number of the prompt: {"base": …, "lora": …}} of this rank's prompts, until a signal comes: those that are whole."""
        own = range(self.ranks.rank, len(self.prompts), self.ranks.world)
        self.base |= self.pictures([i for i in own if i not in self.base], 0, step, {})
        drawn = {i: {"base": self.base[i]} for i in own if i in self.base}
        if not step and not any(bool(B.any()) for _, B, _ in self.adapter.deltas.values()):  # it is not from --init-lora
            return drawn
        by_strength = defaultdict(list)
        for i in drawn:
            by_strength[self.prompts[i].strength or 0].append(i)
        changed: dict[int, Drawn] = {}
        for strength, numbers in by_strength.items():
            changed |= self.pictures(numbers, strength, step, {file_stem(self.name, step): (strength, "")})
        return {i: drawn[i] | {"lora": changed[i]} for i in sorted(changed)}

    def pictures(
        self, numbers: Sequence[int], strength: float, step: int, loras: dict[str, tuple[float, str]]
    ) -> dict[int, Drawn]:
        """Prompts with the LoRA at a strength, and with what they are drawn from as their text; `loras`: the names for that.
        Those that a signal comes before are left out, and those that are not finite.
        """
        images: dict[int, Image.Image] = {}
        with self.adapter.scaled(strength):
            for n, image in () if self.stop.requested else self.renderer.each([self.prompts[i] for i in numbers]):
                if isinstance(image, UserError):
                    warn_of(f"step {step}", image)
                else:
                    images[numbers[n]] = image
                if self.stop.requested:
                    break
        drawn: dict[int, Drawn] = {}
        for i, image in images.items():
            if self.stop.requested:
                break
            image.info["parameters"] = generation_parameters(self.prompts[i], self.model.pipe.scheduler, self.model.name, loras)
            drawn[i] = image, self.examiner.opinion(image, self.prompts[i], strength)
        return drawn
