"""A cache on a local disk for what is loaded from a server, shared by the processes of a host."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.system import lock_file
from dataset.shards import Shard, read_lines, to_line


@dataclass(frozen=True)
class Cache:
    """Files in `folder` named by their keys, together at most `limit` bytes, whichever processes of the host write them.

    The file .bytes holds the total. Under a lock on it, a file is added to the total before it is written: only a process that
    is killed in between leaves up to one partial file more on the disk.
    """

    folder: Path
    limit: int

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.locked(".bytes"):
                pass
        except OSError as error:
            raise UserError(f"--data-cache {self.folder} cannot be written: {error.strerror}") from None

    @contextmanager
    def locked(self, name: str) -> Iterator:
        with (self.folder / name).open("a+b") as file:
            lock_file(file, wait=True, inherited=True)
            yield file

    def part(self, key: str, size: int, load: Callable[[], bytes]) -> bytes:
        """The `size` bytes of `key`: from the cache if it has them all, otherwise from `load`, which are then added to it."""
        path = self.folder / key
        with suppress(OSError):
            data = path.read_bytes()
            if len(data) == size:
                os.utime(path)  # make_room removes the least recently used files first
                return data
        data = load()
        self.keep(path, data)
        return data

    def survey(self, key: str, scan: Callable[[], Shard]) -> Shard:
        """As `part`, for the index line of a shard. It is never removed to make room, as `scan` loads the whole shard."""
        path = self.folder / f"{key}.json"
        with self.locked(".surveys"):  # the other ranks wait for the first, and then find its result
            with suppress(OSError, UserError, ValueError):
                (shard,) = read_lines(path.read_bytes(), str(path)).values()
                return shard
            shard = scan()
            self.keep(path, to_line(shard).encode())
            return shard

    def keep(self, path: Path, data: bytes) -> None:
        """Writes the file, unless it is larger than the whole cache or the disk refuses it."""
        with suppress(OSError), self.locked(".bytes") as counter:  # without the cache the run is slower, but goes on
            counter.seek(0)
            text = counter.read()
            total = (int(text) if text.isdigit() else self.limit) + len(data)  # no total: make_room counts anew
            if total > self.limit:
                total = self.make_room(len(data)) + len(data)
            if total > self.limit:
                return
            counter.truncate(0)
            counter.write(b"%d" % total)
            counter.flush()
            part = self.folder / ".part"  # one name for all processes: only the holder of the lock writes it
            part.write_bytes(data)
            part.replace(path)

    def make_room(self, size: int) -> int:
        """Removes the least recently used files until a tenth of `limit` is free: listing the folder is slow, so do it rarely.

        Returns the bytes that are left.
        """
        cached = [entry for entry in os.scandir(self.folder) if re.fullmatch(r"[0-9a-f]{64}(\.json)?", entry.name)]
        oldest = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in cached)
        total = sum(bytes for _, bytes, _ in oldest)
        for _, bytes, path in oldest:
            if total + size > 0.9 * self.limit and not path.endswith(".json"):
                os.unlink(path)
                total -= bytes
        return total
