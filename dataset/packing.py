"""Captioned images -> tar shards, by several processes; what is interrupted goes on, and the result is the same.

The inputs are cut into runs of equal length. Each run is a job and makes a shard of its own, or no file if nothing in it is
usable. A job whose shard is there, made of the same inputs, is not done again.
"""

import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from dataset.images import dhash, open_image, to_rgb
from dataset.rows import Inputs, ParquetRows
from dataset.shards import Shard, already_there, finish, read_index, unfinished, write_shard
from dataset.workers import Tick, cores, in_parallel

VERSION = 1  # of what a shard holds for given inputs: another number, and all are made anew
PER_SHARD = 500
SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}  # go in byte for byte


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
