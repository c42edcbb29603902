"""A user's mistake: one line on stderr that names the flag or file and what to do, exit status 2, no traceback.

The ground floor: every other file may import this one. Anything that is not a UserError is a bug and keeps its traceback.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. Its text is the whole message."""


def printable(text: str) -> str:
    """Text of a foreign file, which may hold anything, in one line that leaves the terminal as it is.

    An escape becomes the four characters \\x1b, and so does a byte of a file's name that is no UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace(r"\udc", r"\x")


class LossyStream:
    """Standard output or error: what a full disk behind it refuses is lost, and the program goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def warn(text: str) -> None:
    """A line on stderr, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def warn_of(program: str, error: UserError) -> None:
    """A user's mistake in one line, whatever of a foreign file stands in it."""
    warn(f"{program}: {printable(' '.join(str(error).split()))}")


def check_seed(seed: int) -> None:
    """Raises UserError for a number that NumPy or PyTorch would not be seeded with."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be a number of 63 bits from 0 up, not {seed}")


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Wraps the body of a script: a UserError ends it with one line and status 2."""
    try:
        yield
    except UserError as error:
        warn_of(program, error)
        sys.exit(2)
    except KeyboardInterrupt:
        warn(f"{program}: interrupted")
        sys.exit(130)
