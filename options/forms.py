"""Options that are a name, or a name with numbers: `min-snr:5`, `logit-normal:0,1`."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.options import flag_of
from common.text import read_text

FORMS = {
    "timesteps": ("uniform", "LOW-HIGH", "logit-normal:µ,σ", "weights:W,W,…", "a file of such weights"),
    "loss": ("mse", "l1", "huber:δ", "huber-snr:δ"),
    "weighting": ("none", "min-snr:γ", "soft-min-snr:γ", "debiased"),
    "noise": ("plain", "offset:x", "pyramid:LEVELS,DECAY"),
    "lr_schedule": ("constant", "linear", "cosine", "cosine-restarts:N", "rex", "wsd:SHARE"),
}
LIMITS = {  # between these, not at them; whether it is a whole number. float32 has room for the square of δ
    "δ": (1e-6, 1e6, False), "γ": (0, math.inf, False), "µ": (-math.inf, math.inf, False), "σ": (0, math.inf, False),
    "x": (0, 2, False), "LEVELS": (0, 13, True), "DECAY": (0, 1, False),
    "N": (0, math.inf, True), "SHARE": (0, 1, False),
}  # fmt: skip


class Form(NamedTuple):
    kind: str
    values: tuple[float, ...]


def read_form(option: str, text: str) -> Form:
    """One of FORMS[option] that is a name, with the numbers that it needs. Raises UserError for all else."""
    kind, colon, numbers = text.partition(":")
    for form in FORMS[option]:
        name, _, names = form.partition(":")
        if name == kind and bool(names) == bool(colon) and not names.startswith("W"):
            values = numbers_of(numbers)
            parts = names.split(",") if names else []
            if len(values) == len(parts) and all(
                within_limits(value, *LIMITS[part]) for value, part in zip(values, parts, strict=True)
            ):
                return Form(kind, values)
            limits = [f"{part} between {LIMITS[part][0]:g} and {LIMITS[part][1]:g}" for part in parts]
            raise UserError(f"{flag_of(option)} {text}: it is {form}, with {', '.join(limits)}")
    raise UserError(f"{flag_of(option)} {text}: choose from {', '.join(FORMS[option])}")


def within_limits(value: float, above: float, below: float, whole: bool) -> bool:
    return above < value < below and (not whole or value == int(value))


def read_timesteps(text: str) -> Form:
    """As `read_form`, or ("range", (LOW, HIGH)), or ("weights", one or more that are not negative)."""
    if match := re.fullmatch(r"(\d{1,9})-(\d{1,9})", text):
        low, high = map(int, match.groups())
        if low >= high:
            raise UserError(f"--timesteps {text}: it is LOW-HIGH, and HIGH, which is not drawn, must be the larger one")
        return Form("range", (low, high))
    if text.startswith("weights:"):
        weights = numbers_of(text.removeprefix("weights:"))
        if not weights or min(weights) < 0 or max(weights) == 0:
            raise UserError("--timesteps: weights are numbers of at least 0, separated by commas, and not all of them 0")
        return Form("weights", weights)
    return read_form("timesteps", text)


def weights_in(file: Path) -> str:
    """The weights in a text file, which may stand in lines, as `weights:…`. Raises UserError if it cannot be read."""
    weights = numbers_of(text_in("--timesteps", file))
    if not weights:
        raise UserError(f"--timesteps {file} does not hold numbers, and nothing else")
    return "weights:" + ",".join(f"{weight:.9g}" for weight in weights)


def lines_in(flag: str, file: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty. Raises UserError if there are none."""
    lines = tuple(line.strip() for line in text_in(flag, file).splitlines() if line.strip())
    if not lines:
        raise UserError(f"{flag} {file} holds no text")
    return lines


def text_in(flag: str, file: Path) -> str:
    """Raises UserError if the file cannot be read, or is no text."""
    try:
        return read_text(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file} cannot be read: {error}") from None


def numbers_of(text: str) -> tuple[float, ...]:
    """() if they are not finite numbers, separated by commas or spaces."""
    try:
        values = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        return ()
    return values if all(map(math.isfinite, values)) else ()
