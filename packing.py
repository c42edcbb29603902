"""Captioned images -> tar shards, by several processes; what is interrupted goes on, and the result is the same.

The inputs are cut into runs of equal length. Each run is a job and makes a shard of its own, or no file if nothing in it is
usable. A job whose shard is there, made of the same inputs, is not done again.
"""

import ctypes
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from errors import UserError
from images import dhash, open_image, to_rgb
from shards import Shard, already_there, finish, read_index, unfinished, write_shard
from signals import blocked_signals

VERSION = 1  # of what a shard holds for given inputs: another number, and all are made anew
PER_SHARD = 500
SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}  # go in byte for byte

Row = tuple[str, bytes, list[str]]  # name, encoded image, captions; empty where they cannot be read
Tick = Callable[[], None]  # moves the progress bar by one image


class Inputs(Protocol):
    def __len__(self) -> int: ...

    def told(self, first: int, last: int) -> list:
        """What tells the inputs first…last-1 from any others, for json."""

    def name(self, n: int) -> str: ...

    def rows(self, first: int, last: int) -> Iterator[Row]: ...


# A row -> a sample.


def pack(name: str, encoded: bytes, captions: list[str]) -> tuple[dict, str, str]:
    """(a sample without its key, SHA-256 and `dhash` of its image). Raises ValueError, with the reason, if it is not usable."""
    if not encoded:
        raise ValueError("cannot be read")
    lines = [" ".join(caption.split()) for caption in captions if caption.strip()]
    if not lines:
        raise ValueError("no caption")
    try:
        image = open_image(encoded)
        rgb = to_rgb(image)
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise ValueError(f"cannot be decoded: {error}") from None
    if image.format not in SUFFIX:
        buffer = io.BytesIO()
        rgb.save(buffer, "JPEG", quality=95, subsampling=0)
        encoded = buffer.getvalue()
    digest, look = hashlib.sha256(encoded).hexdigest(), dhash(rgb)
    about = {"width": rgb.width, "height": rgb.height, "source": name, "sha256": digest, "dhash": look}
    told = "\n".join(lines).encode(errors="replace")  # json can hold half a character
    return {SUFFIX.get(image.format or "", "jpg"): encoded, "txt": told, "json": json.dumps(about)}, digest, look


@dataclass(frozen=True)
class Job:
    name: str  # of the shard
    first: int  # number of the first input
    last: int  # of the first that is another's
    made_of: str  # SHA-256


def jobs_of(inputs: Inputs, name: str, per_shard: int) -> list[Job]:
    jobs: list[Job] = []
    for first in range(0, len(inputs), per_shard):
        last = min(first + per_shard, len(inputs))
        told = json.dumps([VERSION, first, inputs.told(first, last)])
        jobs.append(Job(f"{name}-{len(jobs):06d}.tar", first, last, hashlib.sha256(told.encode()).hexdigest()))
    return jobs


def pack_job(inputs: Inputs, folder: Path, job: Job, tick: Tick) -> Shard:
    """Its shard: of each usable row a sample, whose key is the number of the input."""
    refused, dhashes = [], []

    def samples() -> Iterator[tuple[str, dict, str]]:
        for number, row in enumerate(inputs.rows(job.first, job.last), job.first):
            try:
                sample, digest, look = pack(*row)
                dhashes.append(look)
                yield f"{number:07d}", sample, digest
            except ValueError as error:
                refused.append(f"{row[0]} ({error})")
            tick()

    return write_shard(folder, job.name, samples(), refused, job.made_of, dhashes)


def pack_all(inputs: Inputs, folder: Path, name: str, per_shard: int, workers: int, title: str = "") -> tuple[list[Shard], int]:
    """Rows -> folder/name-000000.tar, … and their index: (all shards, how many of them were made now).

    Raises UserError if the folder cannot be written or holds shards of that name that were made of something else.
    """
    ours, jobs = re.compile(re.escape(name) + r"-\d{6,}\.tar"), jobs_of(inputs, name, per_shard)
    try:
        with alone_in(folder):
            begun, index, there = [path.stem for path in unfinished(folder)], read_index(folder), already_there(folder)
            if others := [tar for tar in begun if not ours.fullmatch(tar)]:
                raise UserError(f"{folder}: the writing of {others[0]} was interrupted: finish that first, or take another")
            done = {job for job in jobs if job.name in there and there[job.name].made_of == job.made_of}
            tars = {path.name for path in folder.glob("*.tar") if ours.fullmatch(path.name)}
            if tars - {*begun, *index} or (tars & there.keys() and not begun and not done):
                raise UserError(f"{folder} holds shards of something else ({min(tars)}): remove them or choose another --name")
            todo, replaced = [job for job in jobs if job not in done], {*begun, *filter(ours.fullmatch, index)}
            before = sum(job.last - job.first for job in done)
            bar = tqdm(total=len(inputs), initial=before, desc=title, unit="img", disable=not todo)
            made = in_parallel(lambda job, tick: pack_job(inputs, folder, job, tick), todo, workers, bar)
            there |= {shard.name: shard for shard in made}
            shards = [there[job.name] for job in jobs]
            if made or begun or replaced - {job.name for job in jobs}:
                finish(folder, shards, replaced)
            return shards, len(made)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    except BrokenProcessPool:
        raise UserError(f"a process that wrote to {folder} was killed, perhaps for its memory: try fewer --workers") from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Creates the folder, and waits until no other process is in here.

    Processes forked inside share the lock: it ends with the last of them, however the first did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes to {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Rows of parquet files.


def parquet_tables(path: Path) -> list[Path]:
    """A parquet file, or those in a folder without shards; none of another place."""
    if path.is_dir():
        return [] if any(path.glob("*.tar")) else sorted(path.rglob("*.parquet"))
    return [path] if path.suffix == ".parquet" and path.is_file() else []


class ParquetRows:
    """Rows of the layout of lambdalabs/naruto-blip-captions: image {bytes, path}, text. Raises UserError if it is another."""

    def __init__(self, tables: list[Path]):
        import pyarrow  # here, for it takes its time
        from pyarrow.parquet import read_metadata

        self.tables, self.begins = tables, [0]
        for table in tables:
            try:
                about = read_metadata(table)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{table} is no readable parquet file: {error}") from None
            columns = about.schema.to_arrow_schema().names
            if not {"image", "text"} <= set(columns):
                raise UserError(f"{table} has columns {columns}, not image and text")
            self.begins.append(self.begins[-1] + about.num_rows)

    def __len__(self) -> int:
        return self.begins[-1]

    def parts(self, first: int, last: int) -> Iterator[tuple[Path, int, int]]:
        """Which rows of which tables these inputs are."""
        for table, (begin, end) in zip(self.tables, pairwise(self.begins), strict=True):
            if first < end and begin < last:
                yield table, max(first, begin) - begin, min(last, end) - begin

    def told(self, first: int, last: int) -> list:
        parts = [(table.name, table.stat(), begin, end) for table, begin, end in self.parts(first, last)]
        return [(name, about.st_size, about.st_mtime_ns, begin, end) for name, about, begin, end in parts]

    def name(self, n: int) -> str:
        ((table, row, _),) = self.parts(n, n + 1)
        return f"{table.name}:{row}"

    def rows(self, first: int, last: int) -> Iterator[Row]:
        for part in self.parts(first, last):
            yield from read_rows(*part)


def read_rows(table: Path, first: int, last: int) -> Iterator[Row]:
    """One at a time. Memory holds a page, not the row group, which may be the whole file; pyarrow writes 1,024 rows a page."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with ParquetFile(table, pre_buffer=False, buffer_size=2**20) as file:
        end = 0
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            wanted = range(max(first, begin), min(last, end))
            if not wanted:
                continue
            batches = file.iter_batches(batch_size=1, row_groups=[group], columns=["image", "text"], use_threads=False)
            batches = islice(batches, wanted.start - begin, None)
            for n in wanted:
                row: dict[str, Any] = {"image": None, "text": None}
                with suppress(pyarrow.ArrowException, OSError, ValueError, StopIteration):  # the rest of a damaged group
                    row = next(batches).to_pylist()[0]
                image = row["image"] if isinstance(row["image"], dict) else {"bytes": row["image"]}
                texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
                captions = [text for text in texts if isinstance(text, str)]
                yield image.get("path") or f"{table.name}:{n}", image.get("bytes") or b"", captions


def packed(tables: list[Path]) -> tuple[Path, list[str]]:
    """Parquet files -> (a folder of shards, what was refused with the reason): made once, by one process of a host.

    It stays in $XDG_CACHE_HOME or ~/.cache. Training reads samples in any order, which parquet cannot give at this speed.
    """
    inputs = ParquetRows(tables)
    told = json.dumps([VERSION, [str(table.resolve()) for table in tables], inputs.told(0, len(inputs))])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl_lora/parquet"
    folder = cache / hashlib.sha256(told.encode()).hexdigest()[:16]
    shards, _ = pack_all(inputs, folder, "parquet", PER_SHARD, cores(), f"packing {tables[0]} into {folder}")
    return folder, [line for shard in shards for line in shard.refused]


# Several processes.

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
FORKED: tuple  # of a worker: what it was forked with


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def enter_worker(parent: int, *forked: object) -> None:
    global FORKED
    FORKED = forked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an orphan would wait for work for ever
    if os.getppid() != parent:
        os._exit(1)


def run_forked(number: int) -> Any:
    work, jobs, count = FORKED

    def tick() -> None:
        with count.get_lock():
            count.value += 1

    return work(jobs[number], tick)


def in_parallel(work: Callable[[Any, Tick], Any], jobs: Sequence, workers: int, bar: tqdm) -> list:
    """[work(job, tick) for job in jobs] by forked processes, so that only results are pickled. The first error ends it."""
    context, before = multiprocessing.get_context("fork"), bar.n
    count = context.Value("q", 0)
    executor = ProcessPoolExecutor(min(workers, len(jobs)) or 1, context, enter_worker, (os.getpid(), work, jobs, count))
    with bar, executor:
        with blocked_signals():  # the first call forks all workers
            results = [executor.submit(run_forked, number) for number in range(len(jobs))]
            pending = set(results)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(before + count.value - bar.n)
                for one in done:
                    one.result()
        except BaseException:  # Ctrl-C too: what is being written is not waited for
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return [one.result() for one in results]
