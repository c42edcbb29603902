"""Reads the command line of a script."""

import signal
from typing import TypeVar

import tyro

from common.errors import one_line_errors

T = TypeVar("T")


def parse_command(program: str, config: type[T], description: str | None) -> T:
    """The options that the command line gives. --help ends the program, and so does a mistake, with status 2.

    A script calls this before it imports PyTorch, which takes seconds: Ctrl-C during that would print a traceback, so until
    `one_line_errors` around `main` it just ends the script.
    """
    with one_line_errors(program):
        options = tyro.cli(config, description=description, config=(tyro.conf.OmitArgPrefixes,))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return options
