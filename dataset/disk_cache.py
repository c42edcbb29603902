"""A cache on a disk nearby for what is loaded from elsewhere, shared by the processes of a host."""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from dataset.shards import Shard, read_lines, to_line

# A cache on disk.


class NoCache:
    """Every epoch loads everything again."""

    def part(self, key: str, size: int, load: Callable[[], bytes]) -> bytes:
        return load()

    def survey(self, key: str, look: Callable[[], Shard]) -> Shard:
        return look()


NO_CACHE = NoCache()


@dataclass(frozen=True)
class Cache:
    """Files named by their keys, never more than `limit` bytes, for all processes of a host at once.

    What is written counts before it is there, under a lock: only a process that is killed then leaves a part of one more.
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
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def part(self, key: str, size: int, load: Callable[[], bytes]) -> bytes:
        """From the cache, if it is there whole; otherwise loaded, and kept."""
        path = self.folder / key
        with suppress(OSError):
            data = path.read_bytes()
            if len(data) == size:
                os.utime(path)  # what was not used for longest goes first
                return data
        data = load()
        self.keep(path, data)
        return data

    def survey(self, key: str, look: Callable[[], Shard]) -> Shard:
        """As `part`; kept as long as the cache, since it costs loading a whole shard."""
        path = self.folder / f"{key}.json"
        with self.locked(".surveys"):  # the other ranks wait for the first, and find it
            with suppress(OSError, UserError, ValueError):
                (shard,) = read_lines(path.read_bytes(), str(path)).values()
                return shard
            shard = look()
            self.keep(path, to_line(shard).encode())
            return shard

    def keep(self, path: Path, data: bytes) -> None:
        with suppress(OSError), self.locked(".bytes") as counter:  # a full disk costs time, but does not end the run
            counter.seek(0)
            told = counter.read()
            total = (int(told) if told.isdigit() else self.limit) + len(data)  # unknown: as if it were full
            if total > self.limit:
                total = self.make_room(len(data)) + len(data)
            if total > self.limit:
                return
            counter.truncate(0)
            counter.write(b"%d" % total)
            counter.flush()
            part = self.folder / ".part"  # of who holds the lock
            part.write_bytes(data)
            part.rename(path)

    def make_room(self, size: int) -> int:
        """Removes what was not used for longest, a tenth at a time: looking takes long. Returns the bytes that are left."""
        ours = [entry for entry in os.scandir(self.folder) if re.fullmatch(r"[0-9a-f]{64}(\.json)?", entry.name)]
        oldest = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in ours)
        total = sum(bytes for _, bytes, _ in oldest)
        for _, bytes, path in oldest:
            if total + size > 0.9 * self.limit and not path.endswith(".json"):
                os.unlink(path)
                total -= bytes
        return total
