"""Atomic writes: a file is written under a temporary name, checked and renamed, so it is complete or absent."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar

from common.errors import UserError, warn
from common.system import lock_file

ROOT = Path(__file__).parents[1]  # root folder of the suite, which holds its bundled files


def suite_sources() -> list[Path]:
    """Paths of all modules at the root of the suite and in its packages, sorted. Scripts and tests are not among them."""
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    return sorted(path for folder in [ROOT, *packages] for path in folder.glob("*.py"))


def user_cache(name: str) -> Path:
    """The folder in which the suite keeps, for later runs of this user, what can be made again. It may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl_lora" / name


T = TypeVar("T")


def write_atomically(
    path: Path, data: bytes | Sequence[bytes | memoryview], check: Callable[[Path], None] = lambda written: None
) -> None:
    """Temporary file, fsync, rename, fsync of the folder: a crash leaves the old file or the new one, never half of one.
    `data`: all of it, or pieces of bytes.

    `check` reads the temporary file; if it raises, the old file stays in place. The OSError of a full disk says how much is
    needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = [data] if isinstance(data, bytes) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        try:
            check(temporary)
        except Exception:
            temporary.stat()  # if the file is gone, with its folder or disk: raises OSError instead of the reader's error
            raise
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            temporary.unlink(missing_ok=True)  # so that what is free is counted without it
            needed, free = sum(map(len, pieces)) / 1e6, shutil.disk_usage(path.parent).free / 1e6
            error.strerror = f"{error.strerror}: {needed:,.1f} MB are needed, {free:,.1f} MB are free"
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until files created, renamed or removed in the folder are so on the disk too. Windows cannot wait for that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_writable(flag: str, folder: Path) -> None:
    """Creates the folder. Raises UserError naming `flag` if a file cannot be written there."""
    try:
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from None


def lock_folder(name: str, folder: Path, wait: bool = False) -> IO:
    """Locks a folder until the file that this returns is closed, or the process ends in whatever way.

    A lock on the file `.lock` in it, which no forked worker inherits and which also holds between hosts on NFS. Where
    the file system has no locks it warns. If another process has the lock it waits, or raises UserError naming the flag `name`.
    """
    lock = (folder / ".lock").open("ab")
    try:
        lock_file(lock, wait=False, inherited=False)
    except (BlockingIOError, PermissionError):  # both occur
        if not wait:
            raise UserError(f"{name} {folder}: another run is writing there: wait for its end, or use another {name}") from None
        print(f"waiting for another process that writes to {folder}", flush=True)
        lock_file(lock, wait=True, inherited=False)
    except OSError as error:
        warn(f"{name} {folder} cannot be locked ({error.strerror}): let no other run write there")
    return lock


class TolerantWriter:
    """Calls functions that write files. If the disk fails (full, read-only, gone) it warns once, and the run goes on."""

    failed = False  # whether the last attempt failed

    def __call__(self, what: str, write: Callable[[], T]) -> T | None:
        """Returns what `write` returns, or None if it raised OSError; the warning then names `what`."""
        try:
            result = write()
        except OSError as error:
            if not self.failed:
                warn(f"{what} could not be written ({error}): training goes on and tries again the next time")
            self.failed = True
            return None
        self.failed = False
        return result


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
