"""Progress bars."""

from typing import Any

import tqdm as library


class tqdm(library.tqdm):
    """tqdm's bar, silent where stderr is no terminal: a log would get every state of it."""

    def __init__(self, *args: Any, disable: bool = False, **options: Any):
        super().__init__(*args, disable=disable or None, **options)  # None: tqdm looks at the stream
