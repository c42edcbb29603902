"""The ways in which a run ends, each with its exit status and its reason."""

import os
import sys
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

import torch

from common.errors import LossyStream, one_line_errors, warn
from memory import describe_out_of_memory
from run.ranks import Ranks
from run.stop import Stopped

T = TypeVar("T")


class Ending(Enum):
    """(exit status as in sysexits.h, reason in the last line). A mistake in the command: 2 (common/errors.py)."""

    FINISHED = 0, ""
    FAILED = 1, ""  # a RunFailed gives the reason
    OUT_OF_MEMORY = 71, "memory ran out"
    DATA_LOST = 74, "the data cannot be read"
    NOT_SAVED = 74, "could not be saved"
    STOPPED = 75, "stopped by a signal"

    @property
    def status(self) -> int:
        return self.value[0]

    @property
    def reason(self) -> str:
        return self.value[1]

    @property
    def nothing_saved(self) -> str:
        """The last line of a run that made no step."""
        return f"{self.reason} before a step was made: nothing to save"


class RunFailed(Exception):
    """What training itself cannot mend. Its text is the whole message; nothing more is saved."""


def agree_on_ending(ranks: Ranks, *, finished: bool, out_of_memory: bool, data_lost: bool, not_saved: bool) -> Ending:
    """The ending of a run that trained, the same on every rank: the worst of what happened to one of them."""
    happened = {Ending.NOT_SAVED: not_saved, Ending.DATA_LOST: data_lost, Ending.OUT_OF_MEMORY: out_of_memory}
    for ending, here in happened.items():
        if ranks.any(here):
            return ending
    return Ending.FINISHED if finished else Ending.STOPPED


def run_script(name: str, main: Callable[[T], Ending], command: T) -> int:
    """Runs `main` with the options of the command, and returns the exit status. A full disk behind the output does no harm."""
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    with one_line_errors(name):
        try:
            ending = main(command)
        except Stopped:
            ending = Ending.STOPPED
            if os.environ.get("RANK", "0") == "0":
                print(ending.nothing_saved)
        except RunFailed as error:
            ending = Ending.FAILED
            warn(str(error))
        except torch.OutOfMemoryError as error:
            ending = Ending.OUT_OF_MEMORY
            planned = hasattr(error, "__notes__")  # which end in the advice of the plan
            advice = "" if planned else "; what helps: a smaller --vram-gb, --checkpointing all, --base-precision nf4"
            warn(f"{name}: {describe_out_of_memory(error)}{advice}")
    return ending.status
