"""Warnings of failures that raise no error: training that goes on but learns nothing, or becomes many times slower."""

import math
from collections.abc import Callable
from functools import partial
from statistics import mean, median

from common.errors import warn

# Each check gets all readings of the run so far, the newest last, and returns what is wrong, or None.
# A reading is {name: number}: the scalars of the log, and checksum and recorded_again.
Readings = list[dict[str, float]]
SLOW, FULL = 5, 0.95  # times the median; share of the device's memory
FEW, MANY = 3, 10  # readings
NEAR_NOTHING = 0.02  # of the loss of a network that predicts nothing


def slow(readings: Readings) -> str | None:
    """Steps that take longer than before, if memory is the cause. Waiting for data is reported at the end of the run."""
    *before, now = readings
    usual = median(one["seconds_per_step"] for one in before) if len(before) >= FEW else math.inf
    if now["seconds_per_step"] <= SLOW * usual:
        return None
    message = f"a step takes {now['seconds_per_step']:.2g} s, not {usual:.2g} as before"
    if now["recorded_again"] > before[-1]["recorded_again"] > before[-2]["recorded_again"]:
        return f"{message}: its CUDA graphs are given up for memory and recorded again: less as --vram-gb, or --cuda-graph off"
    if now["memory_in_use"] > FULL:
        used = f"the device's memory is {now['memory_in_use']:.0%} full and may spill to the host"
        return f"{message}: {used}: less as --vram-gb, or close what else uses the device"
    return None


def no_learning_rate(readings: Readings) -> str | None:
    """A warm-up begins above zero, and no schedule comes to zero before the last step is made."""
    if any(value for name, value in readings[-1].items() if name.startswith("lr/")):
        return None
    return "every learning rate is 0, nothing is learnt: give --lr"


def no_change(readings: Readings) -> str | None:
    """The same bits after steps that were made: some were not skipped, at a learning rate."""
    *before, now = readings
    made = now["steps"] > now["overflows"] + now["not_finite"]
    if not before or not made or now["checksum"] != before[-1]["checksum"] or no_learning_rate(readings):
        return None
    return "the LoRA has not changed since the last reading: --lr is too small for float32, or the optimiser does not step"


def no_gradient(readings: Readings) -> str | None:
    """The largest norm of a group over the steps of a reading: one batch whose masks are all empty is no failure."""
    groups = {name.partition("/")[2]: value for name, value in readings[-1].items() if name.startswith("grad_norm/")}
    if not (without := [name for name, norm in groups.items() if norm == 0]):
        return None
    why = "--precision fp16 rounds its gradient to zero (try bf16), or the loss does not depend on it (masks, --targets)"
    return f"{' and '.join(without)}: trained, but without a gradient: {why}"


def flat_loss(nothing: float, readings: Readings) -> str | None:
    """`nothing`: the loss if the prediction is 0, which is 1 by default. For v it is about that, as SDXL's latents have a
    variance of about 1.
    """
    losses = [one["loss"] for one in readings[-MANY:]]
    if len(losses) < MANY or not abs(mean(losses) / nothing - 1) < NEAR_NOTHING:
        return None
    message = f"the loss stays at {mean(losses):.2f}, that of a network which predicts nothing"
    return f"{message}: is --model whole, and does it predict what its scheduler's prediction_type says?"


class Watchdog:
    """Checks the readings of a run, and warns once of each failure, in one line on stderr. Never ends the run.

    Ranks can differ in the speed of their device only: for all else the first rank warns.
    """

    def __init__(self, nothing: float, rank: int = 0):
        others = (no_learning_rate, no_change, no_gradient, partial(flat_loss, nothing)) if rank == 0 else ()
        self.readings: Readings = []
        self.checks: list[Callable[[Readings], str | None]] = [slow, *others]
        self.name = f"warning of rank {rank}" if rank else "warning"

    def see(self, reading: dict[str, float]) -> None:
        self.readings.append(reading)
        warnings = {check: check(self.readings) for check in self.checks}
        self.checks = [check for check in self.checks if not warnings[check]]
        for line in filter(None, warnings.values()):
            warn(f"{self.name}: {line}")
