"""Pictures that people look at: rendered with diffusers' pipeline, base and LoRA side by side with the prompt above."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
from PIL import Image
from torch import Tensor

from common.sheets import side_by_side, stack
from model.render import render


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
