"""The index of a folder of shards as training needs it: in columns, which the processes of a host share if it is large."""

import gc
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.columns import PLACE, WORTH, Columns, join_keys, shared_columns
from dataset.shards import INDEX, Shard, lines_of, read_lines, to_line


class Index:
    """The shards of an index without their samples, which are in columns."""

    def __init__(self, columns: Columns):
        self.columns = columns
        shards = read_lines(columns.lines.tobytes(), "the columns")  # without their samples
        self.names = list(shards)
        self.shards = {name: (number, shard) for number, (name, shard) in enumerate(shards.items())}


def index_in(folder: Path) -> Index:
    """The index of a folder; empty without one. Raises UserError as `lines_of`."""
    path = folder / INDEX
    if not path.is_file():
        return Index(to_columns([], ""))
    with path.open("rb") as file:
        if path.stat().st_size < WORTH:
            return Index(to_columns(file, str(path)))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return Index(shared_columns(os.path.realpath(folder), digest, lambda: to_columns(file, str(path))))


def index_from(text: bytes, url: str) -> Index:
    """The index that was loaded from a server. Raises UserError as `lines_of`."""
    make = partial(to_columns, BytesIO(text), url)
    return Index(make() if len(text) < WORTH else shared_columns(url, hashlib.sha256(text).hexdigest(), make))


def index_of(shard: Shard) -> Index:
    """The index of a shard that is in none."""
    return Index(to_columns([to_line(shard).encode()], shard.name))


# The lines of an index -> columns.


class Surveyed(NamedTuple):
    """A line of an index, without what training does not need."""

    name: str
    text: bytes  # of the line, without what belongs to single samples
    identity: bytes  # of `identity_of`
    repeats: list[int]
    keys: bytes
    ends: np.ndarray  # as in Columns, but within `keys`
    places: np.ndarray


def to_columns(text: Iterable[bytes], where: str) -> Columns:
    """The lines of an index -> columns in memory. Raises UserError as `lines_of`."""
    digest = hashlib.sha256()
    with without_collector():
        found = [of_line(*line) for line in lines_of(hashed(text, digest), where)]
    found.sort(key=lambda line: line.name)
    for number, line in enumerate(found):
        line.places["file"] = number
    begins = accumulate((len(line.keys) for line in found), initial=0)
    ends = [line.ends + begin for line, begin in zip(found, begins, strict=False)]
    repeats = np.array([times for line in found for times in line.repeats or [1] * len(line.ends)], np.int16)
    return Columns(
        places=np.concatenate([np.empty(0, PLACE), *(line.places for line in found)]),
        repeats=repeats if (repeats != 1).any() else repeats[:0],
        ends=np.concatenate([np.empty(0, np.int64), *ends]),
        keys=np.frombuffer(b"".join(line.keys for line in found), np.uint8),
        starts=np.cumsum([0, *(len(line.ends) for line in found)]),
        lines=np.frombuffer(b"\n".join(line.text for line in found), np.uint8),
        fingerprint=hashlib.sha256(b"".join(line.identity for line in found)).hexdigest(),
        index=digest.hexdigest(),
    )


def of_line(shard: Shard, keys: list[str], numbers: np.ndarray) -> Surveyed:
    bare = to_line(replace(shard, repeats=[], hashes=[], dhashes=[], refused=[])).encode()
    places = np.zeros(len(keys), PLACE)
    for name, values in zip(("at", "size", "text_at", "text_size", "height", "width"), numbers, strict=True):
        places[name] = values
    return Surveyed(shard.name, bare, identity_of(keys, numbers[1], numbers[3]), shard.repeats, *join_keys(keys), places)


def hashed(lines: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    """The lines; `digest` is then that of all of them."""
    for line in lines:
        digest.update(line)
        yield line


@contextmanager
def without_collector() -> Iterator[None]:
    """Python looks for circles of objects the more often, the more lists there are: a third of the time for an index."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def identity_of(keys: list[str], sizes: np.ndarray, text_sizes: np.ndarray) -> bytes:
    """What the fingerprint of a data set says of a shard with these samples."""
    return json.dumps(list(zip(keys, sizes.tolist(), text_sizes.tolist(), strict=True))).encode() if keys else b""


def fingerprint_of(shards: Iterable[tuple[Columns, int]]) -> str:
    """SHA-256 of the names and sizes of the samples of these shards, each (columns, its number in them)."""
    digest = hashlib.sha256()
    for columns, rows in ((columns, columns.rows(number)) for columns, number in shards):
        places = columns.places[rows.start : rows.stop]
        digest.update(identity_of(columns.names(rows), places["size"], places["text_size"]))
    return digest.hexdigest()
