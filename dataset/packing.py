"""Packs captioned images into tar shards, by several processes. An interrupted run can be continued, with the same result.

The inputs are cut into runs of equal length. Each run is a job and makes one shard, or no file if none of its inputs is usable.
A job whose shard exists and was made of the same inputs is not done again.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import lock_folder, user_cache
from common.progress import tqdm
from dataset.captions import caption_lines
from dataset.images import dhash, open_image, to_rgb, upright
from dataset.rows import Inputs, ParquetRows
from dataset.shards import Shard, already_there, claim, finish, known_shards, split_captions, unfinished, write_shard
from dataset.workers import Tick, cores, in_parallel

VERSION = 1  # of the contents of a shard: with another number all shards are made anew
PER_SHARD = 500
NO_CAPTION = "(no caption)"
SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}  # these are stored as they are


# A row -> a sample.


def pack(name: str, encoded: bytes | str, captions: list[str]) -> tuple[dict, str, str]:
    """-> (a sample without its key, SHA-256 and `dhash` of its image). Raises ValueError, with the reason, if unusable."""
    if isinstance(encoded, str):
        raise ValueError(encoded)
    if not encoded:
        raise ValueError("cannot be read")
    text = "\n".join(" ".join(caption.split()) for caption in caption_lines(captions)).encode()
    if not split_captions(text):  # as the shard will be read
        raise ValueError(NO_CAPTION[1:-1])
    try:
        image = open_image(encoded)
        rgb = to_rgb(image)
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise ValueError(f"cannot be decoded: {error}") from None
    suffix = SUFFIX.get(image.format or "", "png" if image.has_transparency_data else "jpg")
    if image.format not in SUFFIX:
        buffer = io.BytesIO()
        if suffix == "png":  # keeps what --masked-loss needs
            upright(image).convert("RGBA").save(buffer, "PNG")
        else:
            rgb.save(buffer, "JPEG", quality=95, subsampling=0)
        encoded = buffer.getvalue()
        rgb = to_rgb(open_image(encoded))  # as --verify decodes it
    digest, difference_hash = hashlib.sha256(encoded).hexdigest(), dhash(rgb)
    metadata = {"width": rgb.width, "height": rgb.height, "source": name, "sha256": digest, "dhash": difference_hash}
    return {suffix: encoded, "txt": text, "json": json.dumps(metadata)}, digest, difference_hash


@dataclass(frozen=True)
class Job:
    name: str  # of the shard
    first: int  # number of the first input
    end: int  # number after the last one
    made_of: str  # SHA-256 of what identifies the inputs


def jobs_of(inputs: Inputs, name: str, per_shard: int) -> list[Job]:
    jobs: list[Job] = []
    for first in range(0, len(inputs), per_shard):
        end = min(first + per_shard, len(inputs))
        identity = json.dumps([VERSION, first, inputs.identity(first, end)])
        jobs.append(Job(f"{name}-{len(jobs):06d}.tar", first, end, hashlib.sha256(identity.encode()).hexdigest()))
    return jobs


def pack_job(inputs: Inputs, folder: Path, job: Job, tick: Tick) -> Shard:
    """Writes the shard of a job. Each usable row is a sample whose key is the number of the input."""
    refused, dhashes = [], []

    def samples() -> Iterator[tuple[str, dict, str]]:
        for number, row in enumerate(inputs.rows(job.first, job.end), job.first):
            try:
                sample, digest, difference_hash = pack(*row)
                dhashes.append(difference_hash)
                yield f"{number:07d}", sample, digest
            except ValueError as error:
                refused.append(f"{row[0]} ({error})")
            tick()

    repeats = {f"{number:07d}": times for number, times in enumerate(inputs.repeats(job.first, job.end), job.first)}
    return write_shard(folder, job.name, samples(), refused, job.made_of, dhashes, repeats)


def pack_all(
    inputs: Inputs, folder: Path, name: str, per_shard: int, workers: int, source: str, replace: bool = False, title: str = ""
) -> tuple[list[Shard], list[Shard]]:
    """Packs rows into folder/name-000000.tar, … and writes their index -> (all shards, those of them that were made now).

    Shards whose inputs have not changed are kept; those that are no longer needed are removed last. Raises UserError if the
    folder cannot be written, or as `claim`.
    """
    jobs = jobs_of(inputs, name, per_shard)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder("the folder", folder, wait=True):
            claim(folder, source, replace)
            existing = already_there(folder)
            todo = [job for job in jobs if job.name not in existing or existing[job.name].made_of != job.made_of]
            before = len(inputs) - sum(job.end - job.first for job in todo)
            if title and todo:
                print(title, flush=True)
            bar = tqdm(total=len(inputs), initial=before, unit="img", disable=not todo)
            made = in_parallel(lambda job, tick: pack_job(inputs, folder, job, tick), todo, workers, bar)
            existing |= {shard.name: shard for shard in made}
            shards = [existing[job.name] for job in jobs]
            if made or unfinished(folder) or known_shards(folder) - {job.name for job in jobs}:
                finish(folder, shards)
            return shards, made
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def pack_tables(tables: list[Path]) -> tuple[Path, list[str]]:
    """Parquet files -> (a folder of shards, refused inputs with the reason). Packed once, by one process of a host.

    The folder stays in $XDG_CACHE_HOME or ~/.cache. Training reads samples in random order, for which parquet is too slow.
    """
    inputs = ParquetRows(tables)
    identity = json.dumps([VERSION, [str(table.resolve()) for table in tables], inputs.identity(0, len(inputs))])
    cache = user_cache("parquet")
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:16]
    title = f"packing {tables[0]} into {folder}"
    shards, _ = pack_all(inputs, folder, "parquet", PER_SHARD, cores(), str(tables[0]), replace=True, title=title)
    return folder, [line for shard in shards for line in shard.refused]
