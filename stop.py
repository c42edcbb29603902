"""Signals that ask a run to save and end."""

import signal
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """Passes every `except Exception` on its way out of what was interrupted."""


class StopRequest:
    """Ctrl-C, SIGTERM, SIGUSR1, or a terminal that is closed. A step is made to its end; what comes before the first one, and a
    wait for data, ends at once, by Stopped. A Ctrl-C after that ends the process at once.
    """

    def __init__(self):
        self.asked, self.waiting = False, True
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.ask)

    def ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.waiting:
            self.waiting = False
            raise Stopped

    def wait(self, work: Callable[..., T], *given: object) -> T | None:
        """What `work` returns, or None if a signal comes before that."""
        try:
            self.waiting = True
            result = None if self.asked else work(*given)
            self.waiting = False
            return result
        except Stopped:
            return None
        except BaseException:
            self.waiting = False
            raise
