"""The index of a folder of shards as training needs it: in columns, which the processes of a host share if it is large."""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.progress import tqdm
from dataset.columns import PLACE, WORTH, Columns, join_keys, shared_columns
from dataset.shards import INDEX, Shard, lines_of, read_lines, to_line
from dataset.workers import Tick, cores, in_parallel

GROUP = 2**22  # bytes of an index, about, that one process reads at a time; fewer are not worth more processes


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
        return Index(to_columns(b"", ""))
    with path.open("rb") as file:
        if (size := path.stat().st_size) < WORTH:
            return Index(to_columns(file.read(), str(path)))
        digest = hashlib.file_digest(file, "sha256").hexdigest()

        def make(tick: Tick) -> Columns:
            return to_columns(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path), tick)

        return Index(shared_columns(os.path.realpath(folder), digest, make, -(-size // GROUP)))


def index_from(text: bytes, url: str) -> Index:
    """The index that was loaded from a server. Raises UserError as `lines_of`."""
    make = partial(to_columns, text, url)
    digest = hashlib.sha256(text).hexdigest()
    return Index(make() if len(text) < WORTH else shared_columns(url, digest, make, -(-len(text) // GROUP)))


def index_of(shard: Shard) -> Index:
    """The index of a shard that is in none."""
    return Index(to_columns(to_line(shard).encode(), shard.name))


# The lines of an index -> columns.


class Surveyed(NamedTuple):
    """A line of an index, without what training does not need."""

    name: str
    text: bytes  # of the line, without what belongs to single samples
    identity: bytes  # of `identity_of`
    repeats: np.ndarray  # [N] int16
    keys: bytes
    ends: np.ndarray  # as in Columns, but within `keys`
    places: np.ndarray


def to_columns(text: bytes | mmap.mmap, where: str, tick: Tick = lambda: None) -> Columns:
    """The lines of an index -> columns in memory. Several processes read more than GROUP of them, with a `tick` for each GROUP.
    Raises UserError as `lines_of`.
    """
    ends = [text.find(b"\n", at) + 1 or len(text) for at in range(GROUP, len(text), GROUP)] + [len(text)]
    jobs = list(pairwise([0, *ends]))

    def survey(job: tuple[int, int], _: Tick) -> list[Surveyed]:
        begin, end = job
        try:
            found = [of_line(*line) for line in lines_of(BytesIO(text[begin:end]), where)]
        except UserError:
            check_lines(text[:end], where)
            raise
        tick()
        return found

    groups = in_parallel(survey, jobs, min(cores(), 8), tqdm(disable=True)) if len(jobs) > 1 else [survey(jobs[0], tick)]
    found = sorted((line for group in groups for line in group), key=lambda line: line.name)
    if any(before.name == line.name for before, line in pairwise(found)):
        check_lines(text[:], where)
    begin, fingerprint = 0, hashlib.sha256()
    for number, line in enumerate(found):
        line.places["file"] = number
        line.ends[:] += begin
        begin += len(line.keys)
        fingerprint.update(line.identity)
    repeats = np.concatenate([np.empty(0, np.int16), *(line.repeats for line in found)])
    return Columns(
        places=np.concatenate([np.empty(0, PLACE), *(line.places for line in found)]),
        repeats=repeats if (repeats != 1).any() else repeats[:0],
        ends=np.concatenate([np.empty(0, np.int64), *(line.ends for line in found)]),
        keys=np.frombuffer(b"".join(line.keys for line in found), np.uint8),
        starts=np.cumsum([0, *(len(line.ends) for line in found)]),
        lines=np.frombuffer(b"\n".join(line.text for line in found), np.uint8),
        fingerprint=fingerprint.hexdigest(),
        index=hashlib.sha256(text).hexdigest(),
    )


def of_line(shard: Shard, keys: list[str], numbers: np.ndarray) -> Surveyed:
    bare = to_line(replace(shard, repeats=[], hashes=[], dhashes=[], refused=[])).encode()
    places = np.zeros(len(keys), PLACE)
    for name, values in zip(("at", "size", "text_at", "text_size", "height", "width"), numbers, strict=True):
        places[name] = values
    repeats = np.array(shard.repeats or [1] * len(keys), np.int16)
    return Surveyed(shard.name, bare, identity_of(keys, numbers[1], numbers[3]), repeats, *join_keys(keys), places)


def check_lines(text: bytes, where: str) -> None:
    """Reads lines once more, from the first on, for the number of the line in the error that is in them."""
    for _ in lines_of(BytesIO(text), where):
        pass


def identity_of(keys: list[str], sizes: np.ndarray, text_sizes: np.ndarray) -> bytes:
    """What the fingerprint of a data set says of a shard with these samples: JSON, [["key", size, size of the caption], …]."""
    if not keys:
        return b""
    text = "".join(keys)
    if not (text.isascii() and text.isprintable()) or '"' in text or "\\" in text:
        keys = [json.dumps(key)[1:-1] for key in keys]
    values: list = [None] * (3 * len(keys))
    values[::3], values[1::3], values[2::3] = keys, sizes.tolist(), text_sizes.tolist()
    entries = '["%s", %s, %s], ' * len(keys) % tuple(values)  # in a third of the time that json.dumps takes
    return f"[{entries[:-2]}]".encode()


def fingerprint_of(shards: Iterable[tuple[Columns, int]]) -> str:
    """SHA-256 of the names and sizes of the samples of these shards, each (columns, its number in them)."""
    digest = hashlib.sha256()
    for columns, rows in ((columns, columns.rows(number)) for columns, number in shards):
        places = columns.places[rows.start : rows.stop]
        digest.update(identity_of(columns.names(rows), places["size"], places["text_size"]))
    return digest.hexdigest()
