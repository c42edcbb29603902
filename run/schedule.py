"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from common.sheets import Lettering
from options.forms import read_form
from options.optimiser import OptimiserConfig

SCHEDULES: dict[str, Callable[..., float]] = {  # of the share of the run that is done, 0 ≤ p < 1, and the option's number
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: 0.5 + 0.5 * math.cos(math.pi * p),  # Loshchilov and Hutter 2017, arXiv:1608.03983, with its restarts
    "cosine-restarts": lambda p, cycles: 0.5 + 0.5 * math.cos(math.pi * (round(p * cycles, 9) % 1)),
    "rex": lambda p: (1 - p) / (1 - p / 2),  # Chen et al. 2021, arXiv:2107.04197
    "wsd": lambda p, share: 1 - math.sqrt(max(0, (p - 1 + share) / share)),  # Hägele et al. 2024, arXiv:2405.18392
}


def steps_of_share(share: float, steps: int) -> float:
    """Without the error of a decimal fraction: 0.29 of 100 steps is not 28.999999999999996."""
    return round(share * steps, 6)


def lr_factor(step: int, steps: int, config: OptimiserConfig) -> float:
    """What the learning rates are multiplied by at `step` of `steps`, counted from 0."""
    warmup = math.floor(steps_of_share(config.warmup, steps)) if config.warmup < 1 else config.warmup
    if step < warmup:
        return (step + 1) / (warmup + 1)
    kind, numbers = read_form("lr_schedule", config.lr_schedule)
    factor = SCHEDULES[kind](min(1, (step - warmup) / max(1, steps - warmup)), *numbers)  # 1: of a run that is done
    return config.min_lr + (1 - config.min_lr) * factor


def draw_schedule(steps: int, config: OptimiserConfig, title: str, width: int = 640, height: int = 200) -> np.ndarray:
    """The factor over the run, [height, width, 3] uint8."""
    image, margin = Image.new("RGB", (width, height), "white"), 28
    draw, text = ImageDraw.Draw(image), Lettering(12)
    right, bottom = width - margin, height - margin
    last = max(1, steps - 1)
    shown = [round(last * x / (right - margin)) for x in range(right - margin + 1)]
    line = [(margin + x, bottom - lr_factor(step, steps, config) * (bottom - margin)) for x, step in enumerate(shown)]
    draw.line([(margin, margin), (margin, bottom), (right, bottom)], fill="gray")
    draw.line(line, fill="firebrick", width=2)
    text.write(draw, (margin, 7), title, "black")
    for xy, label in (
        ((10, margin - 7), "1"),
        ((10, bottom - 7), "0"),
        ((right - 8 * len(str(steps)), bottom + 7), str(steps)),
    ):
        text.write(draw, xy, label, "gray")
    return np.asarray(image)
