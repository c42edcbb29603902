"""Packs captioned images into tar shards (WebDataset): key.jpg, key.txt, key.json.

    python scripts/make_shards.py photos/ --out shards/                                       name.jpg + name.txt
    python scripts/make_shards.py imagefolder/ --out shards/                                  metadata.jsonl
    python scripts/make_shards.py train.parquet --out shards/                                 image {bytes, path}, text
    python scripts/make_shards.py lambdalabs/naruto-blip-captions --out shards/ --name naruto from the hub
    python scripts/make_shards.py theirs/ --out shards/                                       tar shards, packed anew
    python scripts/make_shards.py shards/ --verify                                            reads all of them again

JPEG, PNG, WebP and AVIF go in byte for byte; other formats, from parquet, are stored as JPEG. What cannot be decoded or has no
caption is refused and named at the end, and so are images that are there twice. Interrupted, the same command goes on.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from safetensors.torch import load
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors, printable
from common.files import check_writable
from dataset.duplicates import LIMIT, equal_images, similar_images
from dataset.images import dhash, open_image, to_rgb
from dataset.packing import PER_SHARD, pack_all
from dataset.rows import Inputs, ParquetRows, Row, parquet_tables
from dataset.shards import Shard, read_index, survey, unfinished
from dataset.sources import File, Source, local_shards, of_shards, scan_folder
from dataset.workers import Tick, cores, in_parallel

MOST_GROUPS, MOST_NAMES = 20, 10  # that are printed: of duplicates, in a group


@dataclass(frozen=True)
class ShardConfig:
    source: Annotated[str, tyro.conf.Positional]
    """A folder of captioned images, a parquet file or a folder of them, the hub id of such a data set, or tar shards: a folder
    or a brace pattern."""
    out: Path | None = None
    """Folder for the shards."""
    name: str = "shard"
    """Shards are called name-000000.tar, name-000001.tar, …"""
    per_shard: int = PER_SHARD
    """Images in a shard, less those that are refused."""
    workers: int = cores()
    """Processes. The shards do not depend on it."""
    verify: bool = False
    """Make nothing: read the shards in the folder again, every byte, and compare with what their index tells."""

    def __post_init__(self) -> None:
        for flag in ("per_shard", "workers"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(self, flag)}")
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be a plain file name")
        if self.verify == (self.out is not None):
            raise UserError("--verify makes nothing: leave --out away" if self.verify else "--out is missing: where shards go")
        if self.out and self.out.resolve() == Path(self.source).resolve():
            raise UserError(f"--out {self.out} must be another folder than the images'")


# Where the images come from.


class SourceRows:
    """The images of a folder, or of shards, one after the other."""

    def __init__(self, source: Source, folder: Path):
        self.source = source
        self.names = [name.removeprefix(printable(f"{folder}/")) for name in source.names]

    def __len__(self) -> int:
        return self.source.samples

    def told(self, first: int, last: int) -> list:
        places = self.source.where[first:last]
        changed = {file: self.source.files[file].path.stat().st_mtime_ns for file in np.unique(places["file"])}
        captions = self.source.captions[first:last] or [[]] * len(places)  # none: in the shard, whose time tells
        times = [changed[file] for file in places["file"]]
        return list(zip(self.names[first:last], places["size"].tolist(), times, captions, strict=True))

    def name(self, n: int) -> str:
        return self.names[n]

    def rows(self, first: int, last: int) -> Iterator[Row]:
        for n in range(first, last):
            raw = self.source.raw(n)
            yield self.names[n], raw.image, raw.captions


def open_inputs(source: str) -> tuple[Inputs, list[str]]:
    """(the images with a caption, what else is there that cannot be used, with the reason)."""
    path = Path(source)
    if not path.exists() and path.suffix != ".tar" and "{" not in source:
        path = fetch(source)
    if tables := parquet_tables(path):
        return ParquetRows(tables), []
    shards = local_shards(path)
    found = of_shards([(File(tar), shard) for tar, shard in shards]) if shards else scan_folder(path)
    if found.latents:
        raise UserError(f"{source} holds latents, not images")
    cut = [f"{name} (cut short: the images before the cut are used)" for name in found.cut]
    return SourceRows(found, path), [f"{name} (no caption)" for name in found.uncaptioned] + cut


def fetch(repository: str) -> Path:
    """The parquet files of a data set on the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # every kind of network and name trouble ends in the same advice
        raise UserError(
            f"{repository} is neither a folder or file here nor could it be fetched from the hub ({type(error).__name__}); "
            f"where there is network: hf download {repository} --repo-type dataset --local-dir FOLDER"
        ) from None


# What is there twice.


def report_duplicates(inputs: Inputs, shards: list[Shard]) -> None:
    """Prints the groups of equal and of nearly equal images, which all stay."""
    where = [(shard.name, key) for shard in shards for key, *_ in shard.samples]  # the key is the number of the input
    exact = equal_images(digest for shard in shards for digest in shard.hashes)
    again = {n for group in exact for n in group[1:]}
    once = [n for n in range(len(where)) if n not in again]
    looks = [int(look, 16) for shard in shards for look in shard.dhashes]
    alike = [[once[i] for i in group] for group in similar_images(np.array([looks[n] for n in once], np.uint64))]
    for what, groups in (("equal", exact), (f"nearly equal (at most {LIMIT} of 64 bits differ)", alike)):
        if groups:
            print(f"{what}: {sum(map(len, groups))} images in {len(groups)} groups, all kept")
        for group in groups[:MOST_GROUPS]:
            more = f" and {len(group) - MOST_NAMES} more" if len(group) > MOST_NAMES else ""
            names = [f"{inputs.name(int(key))} ({shard}:{key})" for shard, key in (where[n] for n in group[:MOST_NAMES])]
            print(f"  {', '.join(names)}{more}")
        if len(groups) > MOST_GROUPS:
            print(f"  and {len(groups) - MOST_GROUPS} more groups")


# Reading them again.


def verify(folder: Path, workers: int) -> None:
    """Prints what was compared. Raises UserError if anything is not as the index tells, after printing each."""
    index = read_index(folder)
    if not index:
        raise UserError(f"{folder} has no index.jsonl to compare with: only shards that were made here have one")
    if begun := unfinished(folder):
        raise UserError(f"{folder}: the writing of {begun[0].stem} was interrupted: the same command goes on with it")
    shards = list(index.values())
    bar = tqdm(total=sum(len(shard.samples) for shard in shards), unit="img")
    found = in_parallel(lambda shard, tick: faults_of(folder, shard, tick), shards, workers, bar)
    faults = [fault for some in found for fault in some]
    faults += [f"{path.name} is not in the index" for path in sorted(folder.glob("*.tar")) if path.name not in index]
    for fault in faults:
        print(f"  {fault}")
    if faults:
        raise UserError(
            f"{folder}: {len(faults)} faults: remove these shards; the command that made them then makes them again"
        )
    print(f"{bar.total} samples in {len(shards)} shards in {folder}/ are what the index tells, and can be decoded")


def faults_of(folder: Path, shard: Shard, tick: Tick) -> list[str]:
    """What is not as its line of the index tells, in words."""
    path, faults = folder / shard.name, []
    if not shard.bytes and not path.exists():  # nothing was usable
        return []
    try:
        found = survey(path)
    except (UserError, OSError) as error:
        return [f"{shard.name}: {error}"]
    if (found.samples, found.uncaptioned) != (shard.samples, shard.uncaptioned):
        faults.append(f"{shard.name}: its members are others, or in other places")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            faults.append(f"{shard.name}: its SHA-256 is another")
        for n, (key, at, size, *_) in enumerate(shard.samples):
            file.seek(at)
            encoded = file.read(size)
            try:
                if shard.latents:
                    load(encoded)
                elif [hashlib.sha256(encoded).hexdigest()] != shard.hashes[n : n + 1]:
                    faults.append(f"{shard.name}:{key}: its image is another")
                elif [dhash(to_rgb(open_image(encoded)))] != shard.dhashes[n : n + 1]:
                    faults.append(f"{shard.name}:{key}: its image is decoded to another")
            except Exception as error:  # whatever a broken file makes Pillow raise
                faults.append(f"{shard.name}:{key}: cannot be decoded: {error}")
            tick()
    return faults


def main(config: ShardConfig) -> None:
    if config.out is None:  # --verify
        return verify(Path(config.source), config.workers)
    inputs, refused = open_inputs(config.source)
    check_writable("--out", config.out)
    shards, made = pack_all(inputs, config.out, config.name, config.per_shard, config.workers)

    refused += [line for shard in shards for line in shard.refused]
    full = [shard for shard in shards if shard.samples]
    kept, where = sum(len(shard.samples) for shard in full), f"{len(full)} shards in {config.out}/"
    if made or not full:
        print(f"kept {kept} images in {where}, refused {len(refused)}")
    else:
        print(f"nothing to do: {kept} images were already in {where}; refused {len(refused)}")
    for line in refused:
        print(f"  refused {line}")
    if not full:
        raise UserError(f"{config.source}: no usable image with a caption")
    report_duplicates(inputs, full)


if __name__ == "__main__":
    with one_line_errors("make_shards.py"):
        main(tyro.cli(ShardConfig, description=__doc__))
