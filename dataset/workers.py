"""Runs jobs in several forked processes."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from common.errors import UserError
from common.progress import tqdm
from common.signals import blocked_signals
from common.system import CAN_FORK, usable_cores

Tick = Callable[[], None]  # moves the progress bar by one image


PR_SET_PDEATHSIG = 1  # of linux/prctl.h
FORKED: tuple  # in a worker: (work, jobs, counter), inherited through the fork


def cores() -> int:
    """How many workers make sense here: 1, this process itself, where processes cannot be forked."""
    return usable_cores() if CAN_FORK else 1


def enter_worker(parent: int, *forked: object) -> None:
    """Prepares a worker process. It is killed when its parent, of process id `parent`, ends."""
    global FORKED
    FORKED = forked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an orphan would wait for work forever
    if os.getppid() != parent:
        os._exit(1)


def run_forked(number: int) -> Any:
    work, jobs, counter = FORKED

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    return work(jobs[number], tick)


def in_parallel(work: Callable[[Any, Tick], Any], jobs: Sequence, workers: int, bar: tqdm) -> list:
    """[work(job, tick) for job in jobs], by up to `workers` processes. As they are forked, only results need to be picklable.

    The first error ends all of them and is raised; UserError if one is killed. Where processes cannot be forked this one does
    the work.
    """
    if not CAN_FORK:
        with bar:
            return [work(job, bar.update) for job in jobs]
    context, before = multiprocessing.get_context("fork"), bar.n
    counter = context.Value("q", 0)
    executor = ProcessPoolExecutor(min(workers, len(jobs)) or 1, context, enter_worker, (os.getpid(), work, jobs, counter))
    with bar, executor:
        with blocked_signals():  # the first submit() forks all workers
            results = [executor.submit(run_forked, number) for number in range(len(jobs))]
            pending = set(results)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(before + counter.value - bar.n)
                for future in done:
                    future.result()
        except BaseException as error:  # also Ctrl-C: jobs in progress are killed
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, BrokenProcessPool):
                message = "a worker process was killed, perhaps for its memory: try fewer --workers, or free some"
                raise UserError(message) from None
            raise
    return [future.result() for future in results]
