"""Signals that ask a run to save and end."""

import signal
from collections.abc import Callable
from enum import IntEnum
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from common.signals import SIGNALS

T = TypeVar("T")


class Stopped(BaseException):
    """Raised by a signal during set-up. Passes every `except Exception` on its way out of what was interrupted."""


class Upcoming(IntEnum):
    """What a rank can do next. The ranks do what the least of them can."""

    NO_STEP = 0  # no gradient: a signal came before the data, the data is lost, or memory ran out
    LAST_STEP = 1  # a signal came: this step is finished, then the run ends
    MORE_STEPS = 2

    @classmethod
    def of(cls, loss: object | None, stop: "StopRequest") -> "Upcoming":
        """`loss` of the step under way; None: there is no gradient."""
        return cls.NO_STEP if loss is None else cls.LAST_STEP if stop.requested else cls.MORE_STEPS


class StopRequest:
    """Ctrl-C, SIGTERM, SIGUSR1, or a terminal that is closed. During set-up a signal raises Stopped; after `end_setup` the loop
    finishes the step under way, and a `wait` for data ends at once. A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.requested, self.setting_up = False, True
        self.results: SimpleQueue = SimpleQueue()  # of the work that `wait` waits for; None: a signal came
        for number in SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.setting_up:
            self.setting_up = False
            raise Stopped
        self.results.put(None)  # a SimpleQueue may be written to in a signal handler

    def end_setup(self) -> None:
        self.setting_up = False

    def wait(self, work: Callable[..., T], *args: object) -> T | None:
        """Returns `work(*args)`, or None if a signal comes before it is done.

        `work` runs in a thread, which a signal leaves behind. An exception raised here by a signal handler would break off
        the loader's conversation with a worker in the middle, and the worker would print a traceback.
        """
        results = self.results = SimpleQueue()  # before `requested` is read: a signal after that puts None into this queue
        if self.requested:
            return None

        def run() -> None:
            try:
                results.put((work(*args), None))
            except BaseException as error:
                results.put((None, error))

        Thread(target=run, daemon=True).start()
        if (outcome := results.get()) is None:
            return None
        result, error = outcome
        if error is not None:
            raise error
        return result
