"""How a script reports a user's mistake: one line on stderr that names the flag or file and what to do, exit status 2.

A bug keeps its traceback. How a training run ends otherwise is in run/ending.py.
"""

import os
import select
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can correct. Its text is the whole message."""


def printable(text: str) -> str:
    """`text` with its unprintable characters escaped: one from a file of unknown origin could control the terminal.

    The escape character becomes the four characters \\x1b; a byte of a file name that is not UTF-8 is written likewise.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace(r"\udc", r"\x")


def first_names(names: list[str]) -> str:
    """'a, b, c', of more than ten the first ten with '…'."""
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


class LossyStream:
    """Wraps standard output or error: text that cannot be written, to a full disk for example, is dropped without an error."""

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


warnings: deque[str] = deque(maxlen=50)  # the last ones of this process


def warn(text: str) -> None:
    """Prints a line on stderr, above the progress bar if there is one, and remembers it."""
    warnings.append(text)
    tqdm.write(text, file=sys.stderr)


def warn_of(program: str, error: UserError) -> None:
    """Prints the error in one line, even if it quotes line breaks or control characters from a file."""
    warn(f"{program}: {printable(' '.join(str(error).split()))}")


def reader_is_gone() -> bool:
    """Whether the reader of our output has closed it, as `| head` does. What is left of it is then dropped."""
    if not hasattr(select, "poll"):  # Windows: there it is the usual reason
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # 0: only errors, among them that nobody can read
    closed = [number for number, _ in poll.poll(0)]
    for number in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(closed)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Wraps the body of a script: a UserError ends it with one line and status 2, Ctrl-C with status 130, and a reader of its
    output who is gone with status 141, without a line. Under torchrun the first process alone says that it was interrupted.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # during the imports Ctrl-C just ended the script
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where it may still fail
    except BrokenPipeError:
        if not reader_is_gone():  # another pipe: a bug
            raise
        sys.exit(128 + 13)  # as a program that SIGPIPE has ended
    except UserError as error:
        with suppress(OSError):  # no disk behind stderr: the status still says it
            warn_of(program, error)
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            warn(f"{program}: interrupted")
        sys.exit(130)
