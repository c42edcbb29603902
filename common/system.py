"""What the operating systems do differently. The suite is run on Linux; on macOS and Windows each of these has its stand-in."""

import os
import signal
import sys
import time
from io import TextIOWrapper
from typing import IO

import psutil

CAN_FORK = sys.platform == "linux"  # macOS' own libraries do not survive a fork, Windows has none


def signals(*names: str) -> tuple[signal.Signals, ...]:
    """Those of the signals that there are here."""
    return tuple(signal.Signals[name] for name in names if hasattr(signal, name))


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of memory that the host has."""
    return psutil.virtual_memory().total


def peak_of_process() -> int:
    """Bytes of memory that this process has had at most."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def lock_file(file: IO, wait: bool, inherited: bool) -> None:
    """Locks an open file until it is closed, or the process ends in whatever way. If another process has the lock it waits, or
    raises BlockingIOError or PermissionError. Raises another OSError if the file system has no locks.

    `inherited`: by forked processes, and exclusive between two openings in one process (flock). Otherwise a POSIX record lock,
    which also holds between hosts on NFS. Windows has one kind, which is not inherited.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except PermissionError:
                if not wait:
                    raise
                time.sleep(0.1)  # LK_LOCK would give up after ten seconds
    import fcntl

    (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def print_what_can_be_printed() -> None:
    """From here on "?" is printed for a character that standard output cannot write, such as the ε of a Windows console."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
