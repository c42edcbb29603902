"""Progress bars."""

import os
from typing import Any

import tqdm as library

SHOW_PROGRESS = "SDXL_LORA_SHOW_PROGRESS"


class tqdm(library.tqdm):
    """tqdm's bar, silent where stderr is no terminal: a log would get every state of it. A program that reads the bar, such as
    bench.py, sets the environment variable SHOW_PROGRESS.
    """

    def __init__(self, *args: Any, disable: bool = False, **options: Any):
        where_no_terminal = None if SHOW_PROGRESS not in os.environ else False  # None: tqdm looks at the stream
        super().__init__(*args, disable=disable or where_no_terminal, **options)
