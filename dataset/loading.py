"""Reads a data set by worker processes that leave signals to the loop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

from torch.utils.data import DataLoader, Dataset

from common.signals import SIGNALS, blocked_signals
from common.system import CAN_FORK


def read_by_workers(dataset: Dataset, workers: int, pin_memory: bool = False, prefetch: int = 2, **options) -> Iterator:
    """The items of a DataLoader that makes no batches. The workers start at once, not with the first item. Without workers, or
    where processes cannot be forked, whoever takes an item reads it.

    `pin_memory` is for the workers' items: without workers, the thread that asks for one would do it on the wrong device.
    """
    if workers and CAN_FORK:
        options |= {"num_workers": workers, "worker_init_fn": leave_signals_to_the_loop}
        options |= {"pin_memory": pin_memory, "prefetch_factor": prefetch}
    loader = DataLoader(dataset, batch_size=None, **options)
    with blocked_signals():
        return iter(loader)


def leave_signals_to_the_loop(worker: int) -> None:
    """Runs in a worker, which starts with all signals blocked. Signals reach every process of the terminal, or of the job: the
    loop decides when to end. Only a SIGTERM from the loop's own process ends a worker.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=wait_for_the_end, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    sys.excepthook = hide_lost_connection


def wait_for_the_end() -> None:
    """Ends the worker on a SIGTERM from its parent."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def hide_lost_connection(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook of a worker: is silent if the loop has ended or was killed. multiprocessing's threads find out, as they
    hand tensors over.
    """
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)
