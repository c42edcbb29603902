"""The signals that ask a program to end, and a context that holds them back while processes are forked."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from common.system import signals

SIGNALS = signals("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK")


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Blocks all signals; those that arrive are delivered after the body. A process forked in the body starts with all blocked.

    Otherwise a signal to the whole process group would also run the parent's handlers in the child, until it sets its own.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where nothing is forked
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
