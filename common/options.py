"""An option is declared once: a dataclass field with its default, its bounds and what it means when a run resumes.

Its docstring is its help, and its flag follows from its name: `max_bad_steps` is --max-bad-steps.
"""

import math
from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError

Resume = Literal["fixed", "free", "ask"]


def option(
    default: Any, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None,
    multiple_of: int | None = None, resume: Resume = "ask",
) -> Any:  # fmt: skip
    """A field of a frozen dataclass whose `__post_init__` calls `check_options`. None, if it is the default, has no bounds.

    `resume`: may it change when a run goes on? 'fixed': no, the saved state would not fit. 'free': yes, as nothing that is
    learned depends on it, or only from then on. 'ask': with --resume-override.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "multiple_of": multiple_of}
    return field(default=default, metadata={"bounds": bounds, "resume": resume})


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_options(config: Any) -> None:
    """Raises UserError for the first value of a dataclass, the dataclasses in it apart, that is out of its bounds."""
    for one in fields(config):
        value = getattr(config, one.name)
        if value is None or "bounds" not in one.metadata:
            continue
        bounds = {name: bound for name, bound in one.metadata["bounds"].items() if bound is not None}
        if bounds and not within(value, **bounds):
            raise UserError(f"{flag_of(one.name)} must {describe_bounds(**bounds)}, not {value}")


def within(
    value: float,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    multiple_of: int | None = None,
) -> bool:
    """No bound holds for NaN or an infinite number."""
    inside = math.isfinite(value) and value >= at_least and value > above and value <= at_most
    return inside and (multiple_of is None or value % multiple_of == 0)


def describe_bounds(
    at_least: float | None = None, above: float | None = None, at_most: float | None = None, multiple_of: int | None = None
) -> str:
    """Goes after 'must'."""
    if multiple_of is not None:
        return f"be a multiple of {multiple_of}" + ("" if at_least is None else f" from {at_least} up")
    if at_most is not None:
        return f"lie in {at_least}…{at_most}" if above is None else f"be above {above} and at most {at_most}"
    return f"be above {above}" if above is not None else f"be at least {at_least}"


def leaves(config: Any) -> Iterator[tuple[Field, Any]]:
    """Every field of a dataclass and of the dataclasses in it, with its value."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from leaves(value)
        else:
            yield one, value


def flat_options(config: Any) -> dict[str, Any]:
    """{name: value} of every option; paths as text."""
    return {one.name: str(value) if isinstance(value, Path) else value for one, value in leaves(config)}


def resume_policies(config: Any) -> dict[str, Resume]:
    """{name: what it means on resume} of every option."""
    return {one.name: one.metadata["resume"] for one, _ in leaves(config)}
