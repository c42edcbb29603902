"""Files that are whole or not there: written aside, read back, renamed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.errors import UserError, warn

ROOT = Path(__file__).parents[1]  # of the suite: what it brings along is found from here


def suite_sources() -> list[Path]:
    """The modules of the suite, by path: those at its root and those of its packages, but neither scripts nor tests."""
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    return sorted(path for folder in [ROOT, *packages] for path in folder.glob("*.py"))


T = TypeVar("T")


def write_atomically(path: Path, data: bytes, check: Callable[[Path], None] = lambda written: None) -> None:
    """Temporary file, fsync, rename, fsync of the folder: a crash leaves the old file or the new one, never half of one.

    `check` looks at the temporary file; what it raises leaves the old file in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            check(temporary)
        except Exception:  # whatever a reader makes of a file that is gone, with its folder or its disk
            temporary.stat()
            raise
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was created, renamed or removed in it is on the disk."""
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


class TolerantWriter:
    """Writes that may fail: what the disk refuses (full, read-only, gone) is told once, and the run goes on."""

    failed = False  # the last attempt

    def __call__(self, what: str, write: Callable[[], T]) -> T | None:
        """What `write` returns, or None if it raised OSError."""
        try:
            result = write()
        except OSError as refused:
            if not self.failed:
                warn(f"{what} could not be written ({refused}): training goes on, and it is tried again the next time")
            self.failed = True
            return None
        self.failed = False
        return result


# States.


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
