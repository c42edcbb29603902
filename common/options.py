"""An option is declared once: a dataclass field with its default, its bounds and whether it may change on resume.

Its docstring is its help, and its flag follows from its name: `max_bad_steps` is --max-bad-steps.
"""

import math
from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError, printable
from common.text import NO_TEXT

Resume = Literal["fixed", "free", "ask"]

MAX_SEED = 2**63 - 1  # NumPy and PyTorch take no larger one


def option(
    default: Any, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None,
    multiple_of: int | None = None, text: bool = False, resume: Resume = "ask",
) -> Any:  # fmt: skip
    """A field of a frozen dataclass that is one of `Options`, or calls `check_options`. The value None is not checked.

    `resume`: may the option change when a run is resumed? 'fixed': no, the saved state would not fit. 'free': yes, it affects
    the result not at all or only from then on. 'ask': only with --resume-override. `text`: is it for people, so no path, whose
    bytes may be anything?
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "multiple_of": multiple_of}
    return field(default=default, metadata={"bounds": bounds, "resume": resume, "text": text})


class Options:
    """A frozen dataclass of options: they are checked when one is made."""

    def __post_init__(self) -> None:
        check_options(self)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_options(config: Any) -> None:
    """Raises UserError for the first value that is out of its bounds, or no finite number. Nested dataclasses are skipped: they
    check themselves.
    """
    for spec in fields(config):
        value = getattr(config, spec.name)
        bounds = {name: bound for name, bound in spec.metadata.get("bounds", {}).items() if bound is not None}
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and bounds and not within(number, **bounds):
                raise UserError(f"{flag_of(spec.name)} must {describe_bounds(**bounds)}, not {number}")
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{flag_of(spec.name)} must be a finite number, not {number}")
            wrong = NO_TEXT.search(str(number))
            if wrong and (wrong[0] < " " or spec.metadata.get("text")):
                raise UserError(f"{flag_of(spec.name)} {printable(str(number))}: holds a control character, or is no UTF-8")


def within(
    value: float,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    multiple_of: int | None = None,
) -> bool:
    """Whether `value` keeps all the bounds. NaN and infinite values never do."""
    finite = -math.inf < value < math.inf  # math.isfinite raises for a whole number beyond floats
    inside = finite and value >= at_least and value > above and value <= at_most
    return inside and (multiple_of is None or value % multiple_of == 0)


def describe_bounds(
    at_least: float | None = None, above: float | None = None, at_most: float | None = None, multiple_of: int | None = None
) -> str:
    """The bounds in words that continue a sentence after 'must'."""
    if multiple_of is not None:
        upwards = "" if at_least is None else f" from {at_least} up"
        return f"be a multiple of {multiple_of}{upwards}" + ("" if at_most is None else f" to {at_most}")
    if at_most is not None:
        return f"lie in {at_least}…{at_most}" if above is None else f"be above {above} and at most {at_most}"
    return f"be above {above}" if above is not None else f"be at least {at_least}"


def leaves(config: Any) -> Iterator[tuple[Field, Any]]:
    """Every field of a dataclass and of the dataclasses in it, with its value."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        if is_dataclass(value):
            yield from leaves(value)
        else:
            yield spec, value


def flat_options(config: Any) -> dict[str, Any]:
    """{name: value} of every option; paths as text."""
    return {spec.name: str(value) if isinstance(value, Path) else value for spec, value in leaves(config)}


def resume_policies(config: Any) -> dict[str, Resume]:
    """{name: its `resume` policy} of every option."""
    return {spec.name: spec.metadata["resume"] for spec, _ in leaves(config)}
