"""Where captioned images lie, in tar shards (remote.py: elsewhere) or a plain folder: looked up once, then read one by one."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # not in its stub
from tqdm import tqdm

from common.errors import UserError, printable
from common.files import ROOT
from dataset.disk_cache import NO_CACHE, Cache, NoCache
from dataset.images import IMAGE_SUFFIXES, MOST_BYTES
from dataset.packing import packed
from dataset.remote import HTTP, RemoteFile, Span, remote_shards, scheme_of
from dataset.rows import parquet_tables
from dataset.shards import HEAD, MOST_TEXT, Shard, read_index, size_of, split_captions, survey, unfinished

DEMO = ROOT / "assets/demo/train"

NO_NAME = re.compile("[\x00-\x1f\ud800-\udc7f\udd00-\udfff]")  # control characters; halves that stand for no byte of a name

PLACE = np.dtype([(name, "i8") for name in ("file", "at", "size", "text_at", "text_size", "height", "width")])


@dataclass(frozen=True)
class File:
    """One on disk; remote.RemoteFile is its like for others."""

    path: Path

    def read(self, *spans: Span) -> list[bytes]:
        """These parts of it, short or empty where it ends before. Raises OSError."""
        parts = []
        with self.path.open("rb") as file:
            for at, size in spans:
                file.seek(at)
                parts.append(file.read(size))
        return parts


@dataclass
class EncodedSample:
    name: str
    image: bytes
    captions: list[str]


@dataclass
class Source:
    """A data set: for each usable sample the file that it lies in, where there, and its upright size in pixels (0: it cannot be
    read); and the names of those without a caption.

    `fingerprint` is a SHA-256 of the names and sizes of its files, which a LoRA file then tells; their bytes are not read.
    """

    files: list[File | RemoteFile]
    where: np.ndarray  # [N] PLACE
    names: list[str]
    captions: list[list[str]]  # [N] of a folder; empty for a shard's: they are read where they lie
    uncaptioned: list[str]
    fingerprint: str
    cut: tuple[str, ...] = ()  # shards that end before their end
    latents: bool = False  # ready-made, so that the VAE is not needed
    mirrored: bool = False  # latents, each with those of the mirrored image
    masked: bool = False  # latents, each with its loss mask
    vae: tuple[float, ...] = ()  # of latents, if they tell it: the `vae_probe` of what made them
    text: tuple[float, ...] = ()  # of latents with hidden states of the text encoders: the `text_probe` of these
    part: np.ndarray | None = None  # [N] number of the data set in a mixture
    shares: tuple[float, ...] = ()  # of each in the draws of an epoch, in all 1

    @property
    def samples(self) -> int:
        return len(self.where)

    def raw(self, n: int) -> EncodedSample:
        """Sample n, still encoded. What cannot be read is empty: it is then skipped and named like any broken image.
        Raises UserError if it is not here and its server fails for good.
        """
        place, captions = self.where[n], self.captions[n] if self.captions else []
        spans = [(place["at"], place["size"])] + ([] if captions else [(place["text_at"], place["text_size"])])
        try:
            image, *text = self.files[place["file"]].read(*((int(at), int(size)) for at, size in spans))
        except OSError:
            image, text = b"", []
        captions = captions or [line for told in text for line in split_captions(told)]
        return EncodedSample(self.names[n], image, captions or [""])


def open_mixture(data: tuple[str, ...], cache: Cache | NoCache = NO_CACHE) -> Source:
    """Every --data -> one source. 'a/:3' and 'b/:1' are drawn from three to one, whatever their sizes; without weights, each
    sample once per epoch. Raises UserError as `open_source`, and for mistaken weights or a mixture of images and latents.
    """
    pairs = [split_weight(one) for one in data or ("demo",)]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        raise UserError(f"--data {' '.join(data)}: give all of them a weight (:3 at the end), or none")
    sources = [open_source(one, cache) for one, _ in pairs]
    if len({source.latents for source in sources}) > 1:
        raise UserError(f"--data {' '.join(data)}: these hold both images and latents: train on one kind")
    if len({(source.vae, source.text) for source in sources}) > 1:
        raise UserError(f"--data {' '.join(data)}: these latents were made by several models")
    first, *others = sources
    if not others:
        return first
    captions = [lines for source in sources for lines in source.captions or [[]] * source.samples]  # none: in the shard
    where = [source.where.copy() for source in sources]
    for n, places in enumerate(where):
        places["file"] += sum(len(source.files) for source in sources[:n])
    return replace(
        first,
        files=[file for source in sources for file in source.files],
        where=np.concatenate(where),
        names=[name for source in sources for name in source.names],
        captions=captions,
        uncaptioned=[name for source in sources for name in source.uncaptioned],
        cut=tuple(name for source in sources for name in source.cut),
        fingerprint=hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest(),
        mirrored=all(source.mirrored for source in sources),
        masked=all(source.masked for source in sources),
        part=np.repeat(range(len(sources)), [source.samples for source in sources]),
        shares=tuple(weight / sum(weights) for weight in weights),
    )


def split_weight(data: str) -> tuple[str, float | None]:
    """'shards/:3' -> ('shards/', 3.0); None where there is none. Raises UserError if it is 0, or as `scheme_of`."""
    scheme = scheme_of(data)
    name, colon, weight = data.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return data, None
    port = scheme in HTTP and "/" not in name.partition("://")[2]
    if not colon or port or os.path.exists(data):
        return data, None
    if not 0 < value < float("inf"):
        raise UserError(f"--data {data}: a weight must be above 0")
    return name, value


def open_source(data: str, cache: Cache | NoCache = NO_CACHE) -> Source:
    """--data -> its source, after one look at every file's header. Parquet files are packed into shards first; `cache` is for
    what is loaded from elsewhere.

    Raises UserError if there is nothing there, a shard cannot be trusted or no image has a caption.
    """
    if not data:  # as an unset variable of a shell gives it; Path("") would be the working directory
        raise UserError("--data is empty")
    path = DEMO if data == "demo" else Path(data)
    refused: list[str] = []
    shards: Sequence[tuple[File | RemoteFile, Shard]]
    try:
        if re.fullmatch(r"[\w.-]+/[\w-]+", data) and not path.exists():
            raise UserError(f"--data {data} does not exist; a data set of the hub: scripts/make_shards.py {data} --out shards/")
        if scheme_of(data):
            shards = remote_shards(expand(data), cache)
        else:
            if tables := parquet_tables(path):
                path, refused = packed(tables)
            shards = [(File(tar), shard) for tar, shard in local_shards(path)]
        source = of_shards(shards) if shards else scan_folder(path)
    except OSError as error:
        raise UserError(f"--data {data}: {error}") from None
    source.uncaptioned.extend(refused)
    if not source.samples:
        lacking = len(source.uncaptioned)
        how = f"{lacking} have none: put name.txt beside name.jpg, or a metadata.jsonl with file_name and text"
        raise UserError(
            f"--data {data}: no image with a caption there ({how if lacking else 'no ' + ', '.join(IMAGE_SUFFIXES)})"
        )
    return source


def expand(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise UserError(f"--data {pattern}: a brace is not closed") from None


def local_shards(path: Path) -> list[tuple[Path, Shard]]:
    """The tar files of a folder or of a brace pattern and what is in them; none for a folder of images.

    What the index beside them tells is taken for it where the size of the file agrees.
    """
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [Path(name) for name in expand(str(path))]
    index = {folder: read_index(folder) for folder in {tar.parent for tar in tars}}
    if path.is_dir():
        tars = sorted({*tars, *(path / name for name, shard in index.get(path, {}).items() if shard.bytes)})
    for tar in tars:
        if not tar.is_file():
            raise UserError(f"--data {path}: {tar} does not exist")
    for folder in index:
        if unfinished(folder):
            raise UserError(f"--data {path}: the writing of these shards was interrupted: the same command goes on with it")
    shards = []
    for tar in tqdm(tars, desc="looking through the shards", unit="shard", delay=2, leave=False):
        known = index[tar.parent].get(tar.name)
        shards.append((tar, known if known and known.bytes == tar.stat().st_size else survey(tar)))
    return shards


def of_shards(shards: Sequence[tuple[File | RemoteFile, Shard]]) -> Source:
    """Raises UserError if some hold images and others latents, or latents of several VAEs."""
    shards = [(file, shard) for file, shard in shards if shard.samples or shard.uncaptioned or shard.cut]
    full = [shard for _, shard in shards if shard.samples]
    if len({shard.latents for shard in full}) > 1:
        raise UserError("--data: these shards hold both images and latents: train on one kind")
    if len({(tuple(shard.vae), tuple(shard.text)) for shard in full}) > 1:
        raise UserError("--data: these latents were made by several models: make them anew with scripts/cache_latents.py")
    digest = hashlib.sha256()
    for shard in full:
        digest.update(json.dumps([(key, size, text_size) for key, _, size, _, text_size, *_ in shard.samples]).encode())
    places = [(number, *sample[1:]) for number, (_, shard) in enumerate(shards) for sample in shard.samples]
    return Source(
        files=[file for file, _ in shards],
        where=np.array(places, PLACE),
        names=[printable(f"{shard.name}:{key}") for shard in full for key, *_ in shard.samples],
        captions=[],
        uncaptioned=[printable(f"{shard.name}:{key}") for _, shard in shards for key in shard.uncaptioned],
        fingerprint=digest.hexdigest(),
        cut=tuple(printable(shard.name) for _, shard in shards if shard.cut),
        latents=all(shard.latents for shard in full) and bool(full),
        mirrored=all(shard.mirrored for shard in full) and bool(full),
        masked=all(shard.masked for shard in full) and bool(full),
        vae=tuple(full[0].vae) if full else (),
        text=tuple(full[0].text) if full else (),
    )


def scan_folder(folder: Path) -> Source:
    """name.jpg with name.txt beside it, or a metadata.jsonl of {"file_name": …, "text": …} (Hugging Face imagefolder).

    Images that cannot be read are among them, without a size. Raises UserError for lines of metadata.jsonl that are none.
    """
    told = {}
    for metadata in filter(Path.is_file, folder.rglob("metadata.jsonl")):
        text = metadata.read_text("utf-8-sig", "replace")
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() would take characters of JSON for ends too
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = PurePosixPath(row["file_name"]), row["text"] or ""
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"--data: {metadata} line {number}: needs file_name and text ({error})") from None
            if name.is_absolute() or ".." in name.parts or NO_NAME.search(str(name)):
                raise UserError(f"--data: {metadata} line {number}: {str(name)!r} is no name in this folder")
            told[metadata.parent / name] = json.dumps({"captions": text}).encode()
    files: list[Path] = []
    places, captions, uncaptioned, digest = [], [], [], hashlib.sha256()
    named = {path for path in {*folder.rglob("*"), *told} if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES}
    there = sorted(path for path in named if path.is_file() or not path.exists())  # also links to nowhere; no folders, no pipes
    for path in tqdm(there, desc="looking through the folder", unit="img", delay=2, leave=False):
        lines = split_captions(told.get(path, b"")) or split_captions(text_beside(path))
        try:
            size = path.stat().st_size
            size *= size <= MOST_BYTES  # else it is skipped
            with path.open("rb") as file:
                pixels = size_of(file.read(min(size, HEAD)))
            pixels = size_of(path.read_bytes()) if pixels == (0, 0) and size > HEAD else pixels
        except OSError:  # a link to nowhere, or not ours to read: it is skipped and named
            size, pixels = 0, (0, 0)
        digest.update(json.dumps([str(path.relative_to(folder)), size, lines]).encode())
        if lines:
            places.append((len(files), 0, size, 0, 0, *pixels))
            files.append(path)
            captions.append(lines)
        else:
            uncaptioned.append(printable(str(path)))
    names = [printable(str(path)) for path in files]
    return Source(list(map(File, files)), np.array(places, PLACE), names, captions, uncaptioned, digest.hexdigest())


def text_beside(image: Path) -> bytes:
    """Of name.jpg that of name.txt; none if there is no such file of up to MOST_TEXT bytes."""
    path = image.with_suffix(".txt")
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= MOST_TEXT else b""
    except OSError:
        return b""
