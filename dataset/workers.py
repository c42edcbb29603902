"""Work done by several forked processes."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import Any

from tqdm import tqdm

from common.signals import blocked_signals

Tick = Callable[[], None]  # moves the progress bar by one image


# Several processes.
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
FORKED: tuple  # of a worker: what it was forked with


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def enter_worker(parent: int, *forked: object) -> None:
    global FORKED
    FORKED = forked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an orphan would wait for work for ever
    if os.getppid() != parent:
        os._exit(1)


def run_forked(number: int) -> Any:
    work, jobs, count = FORKED

    def tick() -> None:
        with count.get_lock():
            count.value += 1

    return work(jobs[number], tick)


def in_parallel(work: Callable[[Any, Tick], Any], jobs: Sequence, workers: int, bar: tqdm) -> list:
    """[work(job, tick) for job in jobs] by forked processes, so that only results are pickled. The first error ends it."""
    context, before = multiprocessing.get_context("fork"), bar.n
    count = context.Value("q", 0)
    executor = ProcessPoolExecutor(min(workers, len(jobs)) or 1, context, enter_worker, (os.getpid(), work, jobs, count))
    with bar, executor:
        with blocked_signals():  # the first call forks all workers
            results = [executor.submit(run_forked, number) for number in range(len(jobs))]
            pending = set(results)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(before + count.value - bar.n)
                for one in done:
                    one.result()
        except BaseException:  # Ctrl-C too: what is being written is not waited for
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return [one.result() for one in results]
