"""Stub: the main session's takes its place."""

from dataclasses import dataclass

from evaluation.intervals import Interval


@dataclass(frozen=True)
class Tell:
    kind: str
    sentence: str


@dataclass(frozen=True)
class StepFigures:
    step: int
    improvement: Interval | None = None
    bands: tuple[Interval | None, ...] = ()
    trained: Interval | None = None
    gap: Interval | None = None
    prompts: Interval | None = None
    tells: tuple[Tell, ...] = ()


@dataclass(frozen=True)
class Verdict:
    steps: tuple[StepFigures, ...]
    recommended: int | None
    sentences: tuple[str, ...]


def verdict_of(record: dict) -> Verdict:
    steps = sorted({int(step) for part in ("files", "pictures", "losses") for step in record.get(part, {}) if step != "base"})
    return Verdict(tuple(StepFigures(step) for step in steps), None, ())
