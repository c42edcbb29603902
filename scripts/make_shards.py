"""Packs captioned images into tar shards (WebDataset): key.jpg, key.txt, key.json.

    python scripts/make_shards.py photos/ --out shards/                                       name.jpg + name.txt
    python scripts/make_shards.py imagefolder/ --out shards/                                  metadata.jsonl
    python scripts/make_shards.py train.parquet --out shards/                                 image {bytes, path}, text
    python scripts/make_shards.py lambdalabs/naruto-blip-captions --out shards/ --name naruto from the hub
    python scripts/make_shards.py theirs/ --out shards/                                       tar shards, packed again
    python scripts/make_shards.py shards/ --verify                                            checks every byte of them

JPEG, PNG, WebP and AVIF go in byte for byte; other formats are stored as JPEG or, if transparent, as PNG. What cannot be
decoded or has no caption is refused and listed at the end. Duplicates are kept, and listed too. After an interruption the same
command continues; after a change of the pictures or captions it packs again the shards in which something changed.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors, printable
from common.options import check_options, option
from dataset.workers import Tick, cores, in_parallel
from options.command import parse_command
from options.training import CaptionFilesConfig


@dataclass(frozen=True)
class ShardConfig:
    data: Annotated[str, tyro.conf.Positional]
    """A folder of captioned images, a parquet file or a folder of them, the hub id of such a data set, or tar shards: a folder
    or a brace pattern."""
    out: Path | None = None
    """Folder for the shards, which are the only ones in it."""
    replace: bool = False
    """Replace the shards of another source in --out."""
    caption_files: CaptionFilesConfig = CaptionFilesConfig()
    name: str = "shard"
    """Shards are called name-000000.tar, name-000001.tar, …"""
    per_shard: int = option(500, at_least=1)
    """Inputs per shard; those that are refused are not in it."""
    workers: int = option(cores(), at_least=1)
    """Processes. Their number does not change the shards."""
    verify: bool = False
    """Write nothing: read every byte of the shards in the folder and compare with their index."""

    def __post_init__(self) -> None:
        check_options(self)
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be a plain file name")
        if self.verify == (self.out is not None):
            raise UserError("--verify writes nothing: leave out --out" if self.verify else "--out is missing: where shards go")


if __name__ == "__main__":
    COMMAND = parse_command("make_shards.py", ShardConfig, __doc__)

import numpy as np
from safetensors.torch import load

from common.files import check_writable
from common.progress import tqdm
from dataset.captions import BESIDE
from dataset.duplicates import LIMIT, equal_images, similar_images
from dataset.folder import Folder
from dataset.images import dhash, open_image, to_rgb
from dataset.packing import NO_CAPTION, pack_all
from dataset.rows import Inputs, ParquetRows, Row
from dataset.shards import Shard, read_index, survey, unfinished
from dataset.sources import HUB_ID, File, Source, describe_others, open_folder

MOST_GROUPS, MOST_NAMES = 20, 10  # that are printed: groups of duplicates, names in a group


# Where the images come from.


class SourceRows:
    """The images of a folder, or of shards, as `rows.Inputs`."""

    def __init__(self, source: Source, folder: Path):
        self.source = source
        self.names = [name.removeprefix(printable(f"{folder}/")) for name in source.names]

    def __len__(self) -> int:
        return self.source.samples

    def identity(self, first: int, last: int) -> list:
        modified = lru_cache(lambda path: path.stat().st_mtime_ns)  # captions in a shard change with its time
        entries = []
        for n in range(first, last):
            part, row = self.source.find(n)
            place = part.columns.places[row]
            file = part.files[int(place["file"])]
            assert isinstance(file, File)
            captions = part.captions[row] if part.captions else []
            entries.append((self.names[n], int(place["size"]), modified(file.path), captions))
        return entries

    def name(self, n: int) -> str:
        return self.names[n]

    def repeats(self, first: int, last: int) -> list[int]:
        return self.source.repeats_of(first, last)

    def rows(self, first: int, last: int) -> Iterator[Row]:
        for n in range(first, last):
            raw = self.source.read_sample(n)
            yield self.names[n], raw.image, raw.captions


def open_inputs(source: str, captions: CaptionFilesConfig = BESIDE) -> tuple[Inputs, list[str], str]:
    """(the images with a caption, the names of all others with the reason why they cannot be used, what else is there)."""
    path = Path(source)
    if not path.exists() and path.suffix != ".tar" and "{" not in source:
        if not re.fullmatch(HUB_ID, source):
            raise UserError(f"{source} does not exist here, and is no id of the hub, such as name/of")
        path = fetch(source)
    folder = Folder(path, captions)
    if folder.tables:
        return ParquetRows(folder.tables), folder.refused, describe_others(folder.others)
    found = open_folder(folder)
    if found.has_latents:
        raise UserError(f"{source} holds latents, not images")
    refused = [f"{name} {NO_CAPTION}" for name in found.uncaptioned] + found.refused
    refused += [f"{name} (the file is truncated: the images before its end are used)" for name in found.truncated]
    return SourceRows(found, path), refused, "; ".join(filter(None, (describe_others(found.others), found.note)))


def fetch(repository: str) -> Path:
    """Downloads the parquet files of a data set on the hub and returns their folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # whatever is wrong with the network or the name, the advice is the same
        raise UserError(
            f"{repository} is neither a folder or file here nor could it be fetched from the hub ({type(error).__name__}); "
            f"where there is network: hf download {repository} --repo-type dataset --local-dir FOLDER"
        ) from None


# Duplicates.


def report_duplicates(inputs: Inputs, shards: list[Shard]) -> None:
    """Prints the groups of equal and of nearly equal images. All of them are kept."""
    samples = [(shard.name, key) for shard in shards for key, *_ in shard.samples]  # the key is the number of the input
    equal = equal_images(digest for shard in shards for digest in shard.hashes)
    repeated = {n for group in equal for n in group[1:]}
    distinct = [n for n in range(len(samples)) if n not in repeated]
    dhashes = [int(h, 16) for shard in shards for h in shard.dhashes]
    similar = similar_images(np.array([dhashes[n] for n in distinct], np.uint64))
    nearly_equal = [[distinct[i] for i in group] for group in similar]
    for title, groups in (("equal", equal), (f"nearly equal (at most {LIMIT} of 64 bits differ)", nearly_equal)):
        if groups:
            print(f"{title}: {sum(map(len, groups))} images in {len(groups)} groups, all kept")
        for group in groups[:MOST_GROUPS]:
            more = f" and {len(group) - MOST_NAMES} more" if len(group) > MOST_NAMES else ""
            names = [f"{inputs.name(int(key))} ({shard}:{key})" for shard, key in (samples[n] for n in group[:MOST_NAMES])]
            print(f"  {', '.join(names)}{more}")
        if len(groups) > MOST_GROUPS:
            print(f"  and {len(groups) - MOST_GROUPS} more groups")


# --verify.


def verify(folder: Path, workers: int) -> None:
    """Prints how many samples agree with the index. Raises UserError after printing all that differ, if any do."""
    index = read_index(folder)
    if not index:
        raise UserError(f"{folder} has no index.jsonl to compare with: only shards that this script made have one")
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
    print(f"{bar.total} samples in {len(shards)} shards in {folder}/ agree with the index and can be decoded")


def faults_of(folder: Path, shard: Shard, tick: Tick) -> list[str]:
    """In words, everything in which a shard differs from its line of the index."""
    path, faults = folder / shard.name, []
    if not shard.bytes and not path.exists():  # none of its inputs was usable, so there is no file
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
                if shard.has_latents:
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
        return verify(Path(config.data), config.workers)
    inputs, refused, others = open_inputs(config.data, config.caption_files)
    check_writable("--out", config.out)
    c = config  # without any picture what is there stays: their disk may be missing
    shards, made = pack_all(inputs, config.out, c.name, c.per_shard, c.workers, c.data, c.replace) if len(inputs) else ([], [])

    refused += [line for shard in shards for line in shard.refused]
    full = [shard for shard in shards if shard.samples]
    kept, packed = (sum(len(shard.samples) for shard in some) for some in (shards, made))
    counts = f"{packed} packed, {kept - packed} from before, refused {len(refused)}"
    print(f"{kept} images in {len(full)} shards in {config.out}/: {counts}" if shards else f"{config.out}/ is left as it is")
    for line in refused:
        print(f"  refused {line}")
    if others:
        print(f"beside them {others}")
    if not full:
        raise UserError(f"{config.data}: no usable image with a caption")
    report_duplicates(inputs, full)


if __name__ == "__main__":
    with one_line_errors("make_shards.py"):
        main(COMMAND)
