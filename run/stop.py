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

    NO_STEP = 0  # no data, or no memory
    LAST_STEP = 1  # a signal came: this step is finished, then the run ends
    MORE_STEPS = 2

    @classmethod
    def of(cls, loss: object | None, stop: "StopRequest") -> "Upcoming":
        """`loss` of the step under way; None: there is no gradient."""
        return cls.NO_STEP if loss is None else cls.LAST_STEP if stop.asked else cls.MORE_STEPS


class StopRequest:
    """Ctrl-C, SIGTERM, SIGUSR1, or a terminal that is closed. The loop finishes the step under way; set-up, and a wait for
    data, end at once. A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.asked, self.setting_up = False, True
        self.answers: SimpleQueue = SimpleQueue()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.ask)

    def ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.setting_up:
            self.setting_up = False
            raise Stopped
        self.answers.put(None)  # may be called from a signal handler, which no other queue promises

    def wait(self, work: Callable[..., T], *args: object) -> T | None:
        """Ends the set-up. Returns what `work` returns, or None if a signal comes before that.

        `work` runs in a thread, which a signal leaves behind. An exception raised here by a signal handler would break off
        the loader's conversation with a worker in the middle, and the worker would print a traceback.
        """
        answers = self.answers = SimpleQueue()  # before `asked` is read: a signal after that answers in this queue
        self.setting_up = False
        if self.asked:
            return None

        def answer() -> None:
            try:
                answers.put((work(*args), None))
            except BaseException as error:
                answers.put((None, error))

        Thread(target=answer, daemon=True).start()
        if (answered := answers.get()) is None:
            return None
        result, error = answered
        if error is not None:
            raise error
        return result
