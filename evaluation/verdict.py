"""What the measurements of a run say: figures for every step, signs that it went too far, and the step to take.

A step is recommended that is not significantly worse on kept-out pictures than the best, and shows none of the tells: the
loss alone crowns steps whose own pictures have fallen apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evaluation.intervals import Interval, difference, mean_of, share_of
from evaluation.validation import BANDS

# Where a tell goes off. Measured on the bundled model (docs/evaluation.md has the figures): z relative to the base stayed above
# 0.8 in a good run, and fell to 0.66 and 0.37 in one that collapsed.
PROMPTS_LOST = 0.7  # clearness z, relative to the base's; or if half of what was recognised no longer is
CLEAR = 1.0  # z of the base's own pictures: below, it does not know what is asked, and is no judge
BY_HEART = 0.15  # of the base's loss: by which pictures that were trained on do better than those that were not
COPIES = 0.5  # of the usual distance between a picture that was kept out and the trained one that is most like it
SPOILT = 0.3  # share of pixels that are clipped, or flat, beyond that of base and data
MONOTONY = 0.5  # diversity, relative to the base's
SLIGHT = 0.1  # improvement
RISING = 0.1  # of the improvement, since the measurement before
STRANGE = 0.5  # gain of a trained picture, relative to that of new ones, below which it may not belong to the style
NEARLY = 0.05  # of the best gain: who has lost no more is as good
LEAK = 0.5  # effect without the trigger, relative to that with it

REGIONS = ("fine detail", "lines and texture", "shapes and colours", "composition")  # from little noise to much


@dataclass(frozen=True)
class Tell:
    """A sign that a LoRA learned too much, or badly."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class StepFigures:
    """What is known of the LoRA of one step. Losses are relative to the base's: 0.4 is 40 % less."""

    step: int
    improvement: Interval | None = None  # on pictures that were kept out
    bands: tuple[Interval | None, ...] = ()  # the same in each of ten bands of timesteps, from little noise to much
    trained: Interval | None = None  # on as many pictures that were trained on
    gap: Interval | None = None  # trained - kept out
    prompts: Interval | None = None  # how clearly pictures show what was asked (z), relative to the base's: 1 is as clearly
    diversity: Interval | None = None  # over seeds, relative to the base's
    leak: float | None = None  # effect without the trigger, relative to that with it
    tells: tuple[Tell, ...] = ()


@dataclass(frozen=True)
class Verdict:
    steps: tuple[StepFigures, ...]
    recommended: int | None
    sentences: tuple[str, ...]


def verdict_of(record: dict[str, Any]) -> Verdict:
    """`record`: as in evaluation/record.py; any part of it may be missing."""
    names = {step for part in ("losses", "pictures", "extras") for step in record.get(part, {})}
    measured = {int(name) for name in names if name != "base"} - {0}
    steps = tuple(figures(record, step) for step in sorted(measured))
    recommended = recommend(record, steps)
    return Verdict(steps, recommended, tuple(sentences(record, steps, recommended)))


# Figures of one step.


def figures(record: dict[str, Any], step: int) -> StepFigures:
    base, own = (record.get("losses", {}).get(key, {}) for key in ("base", str(step)))
    kept_out, trained = paired(base, own, "kept_out"), paired(base, own, "trained")
    extras = record.get("extras", {}).get(str(step), {})
    found = StepFigures(
        step,
        improvement=share_of(*kept_out) if kept_out else None,
        bands=in_bands(record, base["kept_out"], own["kept_out"]) if kept_out and record.get("probes") else (),
        trained=share_of(*trained) if trained else None,
        gap=difference(trained, kept_out) if trained and kept_out else None,
        prompts=obedience(record, step),
        diversity=Interval(*extras["diversity"]) if "diversity" in extras else None,
        leak=extras.get("leak"),
    )
    return replace(found, tells=tuple(find_tells(record, found)))


def paired(base: dict, own: dict, of: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(what was gained over the base, the base's loss), a mean over timesteps for each image; None if it was not measured, or
    is no number.
    """
    if not base.get(of) or not own.get(of):
        return None
    before, after = (np.array([np.mean(losses) for losses in of_model[of]]) for of_model in (base, own))
    return (before - after, before) if np.isfinite([before, after]).all() and before.any() else None


def in_bands(record: dict[str, Any], base: list, own: list) -> tuple[Interval | None, ...]:
    gained: list[list[tuple[float, float]]] = [[] for _ in range(BANDS)]
    for probe, before, after in zip(record["probes"]["kept_out"], base, own, strict=True):
        for t, x, y in zip(probe["timesteps"], before, after, strict=True):
            gained[int(t * BANDS)].append((x - y, x))
    return tuple(share_of(*np.array(pairs).T) if any(x for _, x in pairs) else None for pairs in gained)


def pairs_drawn(record: dict[str, Any], step: int) -> list[tuple[dict, dict]]:
    """(picture of the step, the base's picture of the same prompt and seed) of those that both have."""
    own, base = (record.get("pictures", {}).get(key, []) for key in (str(step), "base"))
    return [(p, b) for p, b in zip(own, base, strict=False) if p and b]


def obedience(record: dict[str, Any], step: int) -> Interval | None:
    """How clearly the pictures show what was asked, relative to the base's; None if that cannot be told."""
    pairs = [(p["z"], b["z"]) for p, b in pairs_drawn(record, step) if "z" in p and "z" in b]
    own, base = np.array(pairs).reshape(-1, 2).T
    return share_of(own, base) if len(base) and base.mean() > CLEAR else None


def find_tells(record: dict[str, Any], found: StepFigures) -> Iterator[Tell]:
    pictures = pairs_drawn(record, found.step)
    of = f"of {len(pictures)} pictures"
    seen, usually = (sum(bool(pair[n].get("recognised")) for pair in pictures) for n in (0, 1))
    if found.prompts and (found.prompts.mean < PROMPTS_LOST or seen < usually / 2):
        clearly = f"{max(0, found.prompts.mean):.0%} as clearly as in the base's"
        yield Tell("prompts", f"what was asked is seen in {seen} {of}, {clearly}")
    if found.gap and found.gap.mean > BY_HEART and found.gap.low > 0:
        yield Tell("by heart", f"it does {found.gap.mean:.0%} better on pictures that it was trained on than on others")
    usual = record.get("usual_distance") or 0.0
    nearest = [near for own, _ in pictures if (near := (own.get("nearest") or {}).get("trained"))]
    if copies := [name for name, distance in nearest if distance < COPIES * usual]:
        yield Tell("copies", f"{len(copies)} {of} nearly repeat a training picture, such as {copies[0]}")
    for kind, words in (("flat", "nearly empty"), ("clipped", "burnt out or black")):
        usual = max([record.get("data_shares", {}).get(kind, 0.0), *(base.get(kind, 0.0) for _, base in pictures)])
        if spoilt := sum(own.get(kind, 0.0) > usual + SPOILT for own, _ in pictures):
            yield Tell(kind, f"{spoilt} {of} are {words}")
    if found.diversity and found.diversity.mean < MONOTONY and not found.diversity.high > 1:
        yield Tell("sameness", f"its pictures of one prompt differ only {found.diversity.mean:.0%} as much as the base's")
    if found.leak is not None and found.leak > LEAK:
        yield Tell("leak", f"without the trigger it has {found.leak:.0%} of its effect")


# The recommendation.


def is_sound(found: StepFigures) -> bool:
    """Whether no tell has gone off; a leak is no fault of the pictures."""
    return all(tell.kind == "leak" for tell in found.tells)


def recommend(record: dict[str, Any], steps: Sequence[StepFigures]) -> int | None:
    """The smallest saved step that is not significantly worse than the best of those without tells; None if there is none, or
    if nothing was kept out.
    """
    saved = record.get("files", {})
    sound = [one.step for one in steps if one.improvement and is_sound(one) and str(one.step) in saved]
    if not sound:
        return None
    losses = {step: loss_of_images(record, step) for step in sound}
    best, base = min(losses.values(), key=np.mean), loss_of_images(record, "base")
    return min(step for step, loss in losses.items() if not_worse(loss, best, base))


def best_cell(
    records: Mapping[float, dict[str, Any]], found: Mapping[tuple[int, float], StepFigures]
) -> tuple[int, float] | None:
    """(step, strength) to take, of those in `found`: the smallest step that at its best strength is as good as the best of all,
    without those that show tells; None if all do. `records`: {strength: the losses of every step at it}.
    """
    sound = [cell for cell, figures in found.items() if figures.improvement and is_sound(figures)]
    losses = {(step, strength): loss_of_images(records[strength], step) for step, strength in sound}
    if not losses:
        return None
    base = loss_of_images(next(iter(records.values())), "base")
    best = min(losses.values(), key=np.mean)
    step = min(step for (step, _), loss in losses.items() if not_worse(loss, best, base))
    return min((cell for cell in losses if cell[0] == step), key=lambda cell: losses[cell].mean())


def loss_of_images(record: dict[str, Any], step: int | str) -> np.ndarray:
    """Of each image that was kept out, [N]."""
    return np.array([np.mean(losses) for losses in record["losses"][str(step)]["kept_out"]])


def not_worse(loss: np.ndarray, best: np.ndarray, base: np.ndarray) -> bool:
    """Whether a loss [images] is not significantly above the best, and has nearly all of its gain over the base: for a few
    images alone, hardly anything is significant.
    """
    worse = mean_of(loss - best)
    return not worse.low > 0 and worse.mean <= max(0.0, NEARLY * (base - best).mean())


def measurements_since_best(record: dict[str, Any]) -> int:
    """How many measurements in a row are not better than the best before them; one that is no number is not."""
    steps = sorted(int(key) for key in record.get("losses", {}) if key != "base")
    losses = [loss_of_images(record, step).mean() for step in steps]
    return len(losses) - 1 - int(np.argmin(np.nan_to_num(losses, nan=np.inf))) if losses else 0


# In words, for somebody who draws.


def percent(interval: Interval) -> str:
    """'42 % (38 to 46)'."""
    mean = f"{100 * interval.mean:.0f} %"
    return f"{mean} ({100 * interval.low:.0f} to {100 * interval.high:.0f})" if interval.known else f"{mean} (of one picture)"


def sentences(record: dict[str, Any], steps: Sequence[StepFigures], recommended: int | None) -> Iterator[str]:
    """What the figures say, and what to do."""
    if not steps:
        return
    chosen = next((one for one in steps if one.step == recommended), steps[-1])
    spoilt = [one for one in steps if not is_sound(one)]
    if recommended is not None:
        yield f"Take step {recommended}: of those that show what was asked, none does clearly better on new pictures."
    elif len(spoilt) == len(steps):
        yield "Every file went too far. Train again with a smaller --lr, and save more often."
    elif any(one.improvement for one in steps):
        yield "No saved file can be recommended."
    if chosen.improvement:
        yield describe_improvement(chosen)
    if advice := too_little(steps, chosen):
        yield advice
    if chosen.gap and chosen.trained and chosen.improvement and chosen.improvement.mean >= SLIGHT:
        yield describe_gap(chosen.trained, chosen.gap)
        yield from describe_strangers(record, chosen)
    if chosen.prompts and is_sound(chosen):
        clearly = f"{chosen.prompts.mean:.0%} as clearly as" if chosen.prompts.mean < 0.95 else "as clearly as"
        yield f"Its pictures show what was asked, {clearly} the base's."
    yield from (f"Step {chosen.step}: {tell.sentence}." for tell in chosen.tells)
    if later := [one for one in spoilt if one.step > chosen.step]:
        yield f"Later files went too far. Step {later[0].step}: {later[0].tells[0].sentence}."


def too_little(steps: Sequence[StepFigures], chosen: StepFigures) -> str:
    """What to do if more could have been learned; "" if not."""
    gains = [one.improvement.mean for one in steps if one.improvement]
    if not chosen.improvement or chosen.step != steps[-1].step or not is_sound(chosen):
        return ""
    if chosen.improvement.mean < SLIGHT:
        return "That is little: train for more steps, or with a larger --lr."
    if len(gains) > 1 and gains[-1] - gains[-2] > RISING * gains[-1]:
        return "It was still getting better when it ended: more steps may help."
    return ""


def describe_improvement(chosen: StepFigures) -> str:
    gain = chosen.improvement
    assert gain
    if gain.known and gain.high < 0:
        return f"Step {chosen.step} is worse than the base on pictures that it never saw."
    if gain.known and gain.low <= 0:
        return f"Step {chosen.step} is not surely better than the base on pictures that it never saw: {percent(gain)} less."
    means = {n: band.mean for n, band in enumerate(chosen.bands) if band}
    place = REGIONS[max(means, key=lambda n: means[n]) * len(REGIONS) // BANDS] if means else ""
    return f"On pictures of the style that it never saw it has {percent(gain)} less error than the base, most in {place}."


def describe_strangers(record: dict[str, Any], chosen: StepFigures) -> Iterator[str]:
    """Trained pictures that gain much less than new ones of the style."""
    pairs = paired(record["losses"]["base"], record["losses"][str(chosen.step)], "trained")
    assert pairs
    assert chosen.improvement
    gains = pairs[0] / pairs[1]
    names = [probe["name"] for probe in record["probes"]["trained"]]
    strange = [name for name, gain in zip(names, gains, strict=True) if gain < STRANGE * chosen.improvement.mean]
    if len(strange) > 1 or len(names) < 2 * len(strange):
        more = f"{len(strange)} of {len(names)} trained pictures gain less than half as much as new ones, such as {strange[0]}"
        yield f"{more}: do they belong to the style? scripts/attribute.py ranks them all."


def describe_gap(trained: Interval, gap: Interval) -> str:
    start = f"On those that it was trained on it has {percent(trained)} less"
    if gap.known and gap.low > 0:
        return f"{start}: it knows them better, by {percent(gap)}."
    return f"{start}: it learned the style and not the pictures."
