"""The samples of a data set in columns: arrays that all processes of a host map from one file, instead of objects of each.

The file is derived from an index and stays in a cache of the user's: the folder of the data is only read. It is used if it was
made of an index with the same SHA-256, and is complete.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import sha256_of, user_cache, write_atomically
from common.progress import tqdm
from common.system import lock_file
from dataset.workers import Tick, in_parallel

PLACE = np.dtype(
    [("file", "i4"), ("at", "i8"), ("size", "i4"), ("text_at", "i8"), ("text_size", "i4"), ("height", "i4"), ("width", "i4")]
)
WORTH = 2**20  # bytes of an index, of about 7,000 samples; one with fewer is read anew each time, in less than 50 ms
COLUMNS_VERSION = 1  # of the file
COLUMN_TYPES = {"places": PLACE, "repeats": np.dtype("i2"), "ends": np.dtype("i8"), "keys": np.dtype("u1"),
         "starts": np.dtype("i8"), "lines": np.dtype("u1")}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Columns:
    """N samples of F shards, in the order of the names of the shards, or of a folder of images, without shards."""

    places: np.ndarray  # [N] PLACE; "file" is the number of the shard, or of the image's file
    repeats: np.ndarray  # [N] how often an epoch draws each; [0]: once
    ends: np.ndarray  # [N] where the key of each ends in `keys`
    keys: np.ndarray  # bytes, in UTF-8
    starts: np.ndarray  # [F + 1] row of the first sample of each shard, and N; [0] for images
    lines: np.ndarray  # bytes: the index without what belongs to single samples
    fingerprint: str = ""  # of all samples
    index: str = ""  # SHA-256 of the index
    path: Path | None = None  # the file that the arrays are mapped from

    def names(self, rows: range) -> list[str]:
        """The keys of consecutive samples."""
        first = int(self.ends[rows.start - 1]) if rows.start else 0
        ends = self.ends[rows.start : rows.stop].tolist()
        text = self.keys[first : ends[-1] if ends else first].tobytes()
        begins = [first, *ends[:-1]]
        return [text[a - first : b - first].decode("utf-8", "surrogatepass") for a, b in zip(begins, ends, strict=False)]

    def rows(self, shard: int) -> range:
        """Of the samples of a shard."""
        return range(*map(int, self.starts[shard : shard + 2]))

    def __reduce__(self) -> tuple:  # pickled, for a spawned worker: the file is mapped again, its arrays are not copied
        return (map_columns, (self.path, self.index)) if self.path else (Columns, tuple(vars(self).values()))


def columns_of(keys: Sequence[str], places: np.ndarray) -> Columns:
    """Columns in memory, without shards. `places`: [N] PLACE."""
    text, ends = join_keys(keys)
    repeats, starts, lines = (np.empty(0, COLUMN_TYPES[name]) for name in ("repeats", "starts", "lines"))
    return Columns(places, repeats, ends, np.frombuffer(text, np.uint8), starts, lines)


def join_keys(keys: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """(the keys in UTF-8, one after the other; where each ends). In an index half of a surrogate pair may stand alone."""
    if (text := "".join(keys)).isascii():
        return text.encode(), np.cumsum(np.fromiter(map(len, keys), np.int64))
    encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
    return b"".join(encoded), np.cumsum([len(key) for key in encoded], dtype=np.int64)


# The file: the SHA-256 of all that follows, a line of JSON, the arrays.


def save_columns(path: Path, columns: Columns) -> None:
    """Raises OSError."""
    arrays = {name: np.ascontiguousarray(getattr(columns, name), dtype) for name, dtype in COLUMN_TYPES.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    head = json.dumps([COLUMNS_VERSION, columns.index, columns.fingerprint, lengths]).encode() + b"\n"
    pieces: list[bytes | memoryview] = [head, *(array.data.cast("B") for array in arrays.values() if array.size)]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    write_atomically(path, [digest.hexdigest().encode(), *pieces])


def map_columns(path: Path, index: str) -> Columns:
    """The columns of an index with this SHA-256. Raises OSError, or UserError if the file is damaged or of another index."""
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b"")
    if hashlib.sha256(data[64:]).hexdigest().encode() != bytes(data[:64]):
        raise UserError(f"{path} is damaged: start again")
    at = 64 + bytes(data[64 : 64 + 2**12]).index(b"\n") + 1
    head = json.loads(bytes(data[64:at]))
    if head[:2] != [COLUMNS_VERSION, index]:
        raise UserError(f"{path} is of another index: the data has changed, start again")
    fingerprint, lengths = head[2:]
    arrays = {}
    for name, dtype in COLUMN_TYPES.items():
        arrays[name] = np.frombuffer(data, dtype, lengths[name], at)
        at += arrays[name].nbytes
    return Columns(**arrays, fingerprint=fingerprint, index=index, path=path)


def shared_columns(of: str, index: str, make: Callable[[Tick], Columns], ticks: int) -> Columns:
    """The columns of the index of SHA-256 `index` in the folder or at the URL `of`. The first process of a host makes them,
    while the others wait for it: `make`, which ticks `ticks` times. In memory if the cache cannot be written.
    """
    path = user_cache("columns") / sha256_of(os.fsencode(of))[:16]
    with suppress(OSError, UserError):
        return map_columns(path, index)
    with ExitStack() as stack:
        with suppress(OSError):  # without a lock several may make them
            path.parent.mkdir(parents=True, exist_ok=True)
            lock_file(stack.enter_context(path.with_suffix(".lock").open("ab")), wait=True, inherited=True)
        with suppress(OSError, UserError):
            return map_columns(path, index)
        # By a process of its own: what the objects of the lines leave behind in memory ends with it.
        bar = tqdm(desc="reading the index once", total=ticks, unit="part", delay=2, leave=False)
        (columns,) = in_parallel(lambda make, tick: saved(path, of, index, make(tick)), [make], 1, bar)
        return columns


def saved(path: Path, of: str, index: str, columns: Columns) -> Columns:
    """The same columns, mapped from the file if it can be written. Raises UserError if they are of another index."""
    if columns.index != index:
        raise UserError(f"the index of {of} was changed while it was read: start again")
    with suppress(OSError, UserError):
        save_columns(path, columns)
        return map_columns(path, columns.index)
    return columns
