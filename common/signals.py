"""Which signals ask a program to end, and how a process is forked while they may come."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Signals wait until the end of the body. A process forked inside begins with all of them blocked.

    Until it has set its own handlers it has those of its parent, and a signal to the whole group would run them in it, too.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
