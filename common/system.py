"""What the operating systems do differently. The suite is run on Linux; on macOS and Windows each of these has its stand-in."""

import os
import signal
import sys

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
