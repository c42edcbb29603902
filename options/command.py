"""Reads the command line of a script."""

from typing import TypeVar

import tyro

from common.errors import one_line_errors

T = TypeVar("T")


def parse_command(program: str, config: type[T], description: str | None) -> T:
    """The options that the command line gives. --help ends the program, and so does a mistake, with status 2.

    A script calls this before it imports PyTorch, which takes seconds.
    """
    with one_line_errors(program):
        options = tyro.cli(config, description=description, config=(tyro.conf.OmitArgPrefixes,))
    return options
