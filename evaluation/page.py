"""OUT/report.html: what a run has learned and what to do with it, in one file that opens without a network, without scripts and
on a phone. Its words and its look are in page.html beside this.
"""

import base64
import io
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.files import write_atomically
from common.text import duration
from evaluation.intervals import Interval
from evaluation.record import PAGE_FILE
from evaluation.verdict import COPIES, StepFigures, Verdict, verdict_of

Scalars = list[tuple[int, float]]  # (step, value) of a tag

LONGER_SIDE, ALL_PIXELS = 512, 27 * 512**2  # of a picture at most; of all together, which holds the page at some 3 MB
DATA_LINES = ("data", "caption", "cut short", "buckets", "validation")  # of what a run prints at its start
MOST_POINTS = 300  # of a curve
WIDTH, HEIGHT, LEFT, RIGHT, ABOVE, BELOW = 360, 212, 44, 14, 12, 36  # of a chart and its margins
RATE, MEMORY = "Images per second", "Peak memory, GiB"
CURVES = {  # title: (pattern of its tags, in logs of any version, with the name of its line; whether it scatters)
    "Loss": (r"(?:train/)?loss()", True),
    "Norm of the gradient": (r"(?:train/)?grad_norm[/_]?(.*)", True),
    "Learning rate": (r"(?:train/)?lr[/_](.*)", False),
    RATE: (r"(?:speed/)?images_per_second()", True),
    MEMORY: (r"(?:memory/peak|peak_memory)_GiB()", False),
}


def read_scalars(log_dir: Path) -> dict[str, Scalars]:
    """{tag: readings} of a TensorBoard log, without what was made anew after a resume; {} if there is none."""
    if not any(log_dir.glob("events.out.tfevents.*")):
        return {}
    log = EventAccumulator(str(log_dir), size_guidance={"scalars": 0, "images": 1})  # 0: all
    log.Reload()
    return {tag: sorted((event.step, event.value) for event in log.Scalars(tag)) for tag in sorted(log.Tags()["scalars"])}


def write_page(out: Path, record: dict, scalars: dict[str, Scalars]) -> None:
    """Writes OUT/report.html. Raises OSError."""
    write_atomically(out / PAGE_FILE, page(record, verdict_of(record), scalars, out).encode())


def page(record: dict, verdict: Verdict, scalars: dict[str, Scalars], out: Path) -> str:
    """The page of a run as HTML; the same input gives the same bytes. What `record` lacks is not shown; its pictures are read
    from `out`, and those that are gone are left out. `scalars` as `read_scalars` gives them.
    """
    verdict = replace(verdict, steps=tuple(map(without_nan, verdict.steps)))
    run, files, curves = record.get("run", {}), record.get("files", {}), curves_of(scalars)
    measured = {figures.step: figures for figures in verdict.steps if figures.improvement}
    shown = measured.get(verdict.recommended or max(measured, default=0))
    take = verdict.recommended or max(map(int, files), default=None)
    columns, rows = table_of_pictures(record, verdict, out)
    own = list(record.get("thumbs", {}).get("trained", {}).values())
    rates, memory = ([value for _, value in curves.get(title, {}).get("", [])] for title in (RATE, MEMORY))
    html = TEMPLATE.render(
        record=record, run=run, verdict=verdict, shown=shown, columns=columns, rows=rows,
        name=run.get("name") or out.resolve().name, own=own[:: max(1, len(own) // 6)][:6],
        looks=run.get("step", 0) * run.get("images_per_step", 0) / (run.get("epoch") or math.inf),
        rate=median(rates) if rates else None, peak=run.get("peak_gib") or max(memory, default=None),
        take=take, file=files.get(str(take)), command=f"python scripts/choose.py {shlex.quote(str(out))} --take {take}",
        balance=chart_of_balance(verdict), learned=charts_of_learning(verdict, shown),
        curves=[chart_of_curves(title, named) for title, named in curves.items()],
    )  # fmt: skip
    return html.encode(errors="replace").decode()  # a file name that is no UTF-8 could not be written


def without_nan(figures: StepFigures) -> StepFigures:
    """What came out as no number, of a LoRA that is broken, counts as not measured."""

    def known(interval: Interval | None) -> Interval | None:
        return interval if interval and math.isfinite(interval.mean) else None

    found = [known(interval) for interval in (figures.improvement, figures.trained, figures.gap, figures.prompts)]
    bands = tuple(map(known, figures.bands))
    return replace(figures, improvement=found[0], bands=bands, trained=found[1], gap=found[2], prompts=found[3])


# Figures in words.


def in_percent(share: float) -> str:
    return f"{round(100 * share)}\N{NO-BREAK SPACE}%".replace("-", "−")


def between(interval: Interval) -> str:
    """'38 to 46 %'; '' if one image alone was measured."""
    return f"{in_percent(interval.low)[:-2]} to {in_percent(interval.high)}" if math.isfinite(interval.low) else ""


def share(interval: Interval | None) -> str:
    """'42 % (38 to 46 %)'; '' if nothing was measured."""
    return f"{in_percent(interval.mean)} ({between(interval)})".removesuffix(" ()") if interval else ""


def less_error(improvement: Interval) -> tuple[str, str]:
    """('42 % less error', '38 to 46 %'), and where it became worse ('12 % more error', '6 to 18 %')."""
    if improvement.mean < 0:
        worse = Interval(-improvement.mean, -improvement.high, -improvement.low)
        return f"{in_percent(worse.mean)} more error", between(worse)
    return f"{in_percent(improvement.mean)} less error", between(improvement)


# Pictures.


def table_of_pictures(record: dict, verdict: Verdict, out: Path) -> tuple[list[dict], list[dict]]:
    """(columns: base and every step that was drawn; rows: a prompt, and its cells in the columns' order)."""
    pictures, figures = record.get("pictures", {}), {str(f.step): f for f in verdict.steps}
    keys = sorted(pictures, key=lambda key: -1 if key == "base" else int(key))
    columns = [{"key": key, "figures": figures.get(key), "taken": key == str(verdict.recommended)} for key in keys]
    side = min(LONGER_SIDE, math.isqrt(ALL_PIXELS // max(1, sum(map(len, pictures.values())))))
    trained, too_near = record.get("thumbs", {}).get("trained", {}), COPIES * (record.get("usual_distance") or 0)
    rows = []
    for i, prompt in enumerate(record.get("prompts", []) if keys else []):
        drawn = [pictures[key][i] if i < len(pictures[key]) else None for key in keys]
        cells = [
            table_cell(picture, embedded(out / picture["file"], side), trained, too_near) if picture else {}
            for picture in drawn
        ]
        rows.append({"prompt": prompt, "options": prompt_options(prompt), "cells": cells})
    return columns, rows


def prompt_options(prompt: dict) -> str:
    """'seed 2 · 1024 × 1024 · 20 steps · guidance 5 · strength 0.8 · without: blurry', of that what is known."""
    words = {"seed": "seed {}", "width": "{} × " + str(prompt.get("height")), "steps": "{} steps", "guidance": "guidance {:g}"}
    words |= {"guidance_rescale": "rescaled {:g}", "strength": "strength {:g}", "negative": "without: {}"}
    return " · ".join(text.format(prompt[key]) for key, text in words.items() if prompt.get(key) is not None)


def table_cell(picture: dict, source: str | None, trained: dict, too_near: float) -> dict:
    """A picture of the table, and the trained one that it is nearest to; nearer than `too_near` it looks like a copy."""
    name, distance = (picture.get("nearest") or {}).get("trained") or (None, math.inf)
    near = {"near": trained.get(name), "copied": distance < too_near}
    return near | {"source": source, "lost": picture.get("recognised") is False}


def embedded(file: Path, side: int) -> str | None:
    """A picture as a data URI of at most `side` pixels; None if it is gone, or is none."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # Pillow raises each of them for some damage
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Charts: geometry alone, in the units of an SVG of WIDTH × HEIGHT.


class Point(NamedTuple):
    x: float
    y: float
    low: float = math.nan  # of the interval
    high: float = math.nan
    label: str = ""
    taken: bool = False  # the recommended step


class Line(NamedTuple):
    name: str
    points: Sequence[Point]  # with an interval each, or with a band between `low` and `high` if there are readings
    readings: Sequence[Point] | None = None  # which scatter around the line


def limits(values: Iterable[float]) -> tuple[float, float]:
    """Of an axis on which these values lie, with some room."""
    low, high = min(values := list(values)), max(values)
    room = 0.06 * (high - low) or abs(high) / 10 or 1
    return low - room, high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`."""
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (size * factor) <= most)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(
    title: str, note: str, x_name: str, lines: list[Line], y_ends: tuple[float, float],
    x_marks: dict[float, str] | None = None, percents: tuple[bool, bool] = (False, True),
) -> dict[str, Any]:  # fmt: skip
    """What page.html draws. `y_ends`: what lies beyond is drawn at the edge; `percents`: whether x and y are shares."""
    left, right = limits([*(point.x for line in lines for point in line.points), *(x_marks or ())])
    low, high = y_ends

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (min(max(y, low), high) - low) / (high - low)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BELOW - up * (HEIGHT - ABOVE - BELOW), 1)

    def path(places: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in places)

    drawn = []
    for name, points, readings in lines:
        ends = [(place(p.x, p.low), place(p.x, p.high)) for p in points if math.isfinite(p.low)]
        drawn.append({
            "name": name, "path": path(place(p.x, p.y) for p in points), "small": readings is not None,
            "dots": [{"at": place(p.x, p.y), "point": p} for p in (points if readings is None else readings)],
            "whiskers": ends if readings is None else [],
            "band": path([a for a, _ in ends] + [b for _, b in reversed(ends)]) if readings else "",
        })  # fmt: skip
    marks = x_marks or {x: in_percent(x) if percents[0] else f"{x:g}" for x in ticks(left, right, 6)}
    return {
        "title": title, "note": note, "x_name": x_name, "lines": drawn,
        "x_marks": [(place(x, 0)[0], text) for x, text in marks.items()],
        "y_marks": [(place(0, y)[1], in_percent(y) if percents[1] else f"{y:g}") for y in ticks(low, high, 5)],
    }  # fmt: skip


def share_limits(lines: list[Line], *also: float) -> tuple[float, float]:
    """Limits of y for shares. Intervals of few pictures may reach far beyond what can be seen on the same scale."""
    points = [point for line in lines for point in line.points]
    ends = [min(max(end, -0.5), 1.5) for p in points for end in (p.low, p.high) if math.isfinite(end)]
    return limits([*(p.y for p in points), *ends, *also])


def charts_of_learning(verdict: Verdict, shown: StepFigures | None) -> list[dict[str, Any]]:
    """Of `shown`, the step that is recommended or the last: where in the noise it learned; of all steps: what became of it."""

    def over_steps(name: str, field: str) -> list[Line]:
        found = [(f.step, value) for f in verdict.steps if (value := getattr(f, field))]
        points = [Point(step, value.mean, value.low, value.high, "", step == verdict.recommended) for step, value in found]
        return [Line(name, points)] if len(points) > 1 else []

    charts = []
    if shown and (bands := [Point(i, *band) for i, band in enumerate(shown.bands) if band]):
        note, last = "Little noise: lines and texture. Much noise: composition and large shapes.", len(shown.bands) - 1
        marks, lines = {0: "little noise", last / 2: "half", last: "much noise"}, [Line("", bands)]
        charts.append(chart(f"Where step {shown.step} learned", note, "", lines, share_limits(lines, 0), marks))
    if lines := over_steps("kept-out pictures", "improvement"):
        lines += over_steps("trained minus kept-out: learned by heart", "gap")
        charts.append(chart("Less error than the base", "", "step", lines, share_limits(lines, 0)))
    if lines := over_steps("", "prompts"):
        note = "100 %: the base sees the prompt in them as well as in its own pictures. Less: they come apart."
        charts.append(chart("What was asked is still in the pictures", note, "step", lines, share_limits(lines, 0, 1)))
    return charts


def chart_of_balance(verdict: Verdict) -> dict[str, Any] | None:
    """The style that each step has learned against whether its pictures still show what was asked."""
    both = [(f.improvement.mean, f.prompts.mean, f.step) for f in verdict.steps if f.improvement and f.prompts]
    if len(both) < 2:
        return None
    labelled: list[tuple[float, float, int]] = []  # those that would lie on another's label have none
    for x, y, step in sorted(both, key=lambda point: (point[2] != verdict.recommended, -point[2])):
        if all(abs(x - a) > 0.05 or abs(y - b) > 0.08 for a, b, _ in labelled):
            labelled.append((x, y, step))
    points = [
        Point(x, y, label=str(step) * ((x, y, step) in labelled), taken=step == verdict.recommended) for x, y, step in both
    ]
    lines = [Line("", [Point(0, 1), *points])]
    note = "From the base on, step by step. Right: more of the style. Up: what was asked. Good is far right and still high."
    ends = share_limits(lines, 0)
    return chart("Style against obedience", note, "less error on kept-out pictures", lines, ends, percents=(True, True))


def curves_of(scalars: dict[str, Scalars]) -> dict[str, dict[str, Scalars]]:
    """{title in CURVES: {name of a line, such as 'unet' or '': its finite readings}}, where there are two or more."""
    curves: dict[str, dict[str, Scalars]] = {}
    for title, (pattern, _) in CURVES.items():
        for tag, readings in scalars.items():
            finite = [(step, value) for step, value in readings if math.isfinite(value)]
            if (match := re.fullmatch(pattern, tag)) and len(finite) > 1:
                curves.setdefault(title, {})[match[1]] = finite
    return curves


def chart_of_curves(title: str, named: dict[str, Scalars]) -> dict[str, Any]:
    """The chart of one of `curves_of`. Lines with the same readings become one; the first alone shows how it scatters."""
    merged: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, readings in named.items():
        merged.setdefault(tuple(readings), []).append(name.replace("_", " ") or "all")
    lines: list[Line] = []
    ends = [0.0]
    for points, names in merged.items():
        shown = np.unique(np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).astype(int)).tolist()
        dots, smooth = [Point(*points[i]) for i in shown], CURVES[title][1]
        line = running_median(points, shown) if smooth else dots
        lines.append(Line(", ".join(names), line, dots if smooth and not lines else []))
        ends += np.quantile([value for _, value in points], (0.005, 0.995)).tolist()
    return chart(title, "", "step", lines, limits(ends), percents=(False, False))


def running_median(readings: Sequence[tuple[int, float]], places: Iterable[int]) -> list[Point]:
    """At these places in `readings`, with the quartiles, over a window of an eighth of them."""
    values, half = np.array([value for _, value in readings]), max(2, len(readings) // 16)
    windows = [(i, np.quantile(values[max(0, i - half) : i + half + 1], (0.5, 0.25, 0.75)).tolist()) for i in places]
    return [Point(readings[i][0], middle, low, high) for i, (middle, low, high) in windows]


ENVIRONMENT = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters |= {"share": share, "less_error": less_error, "duration": duration}
ENVIRONMENT.globals |= {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "data_lines": DATA_LINES}
TEMPLATE = ENVIRONMENT.get_template("page.html")  # read once: a page is not to change within a run
