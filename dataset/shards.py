"""Tar shards in WebDataset's layout: what lies where in one, their index, and writing them so that it can be interrupted.

Neighbours of one key are a sample, key.jpg, key.txt, key.json; key.safetensors, latents made ready, stands for an image.
`index.jsonl` beside the shards has a line for each: with it none has to be opened to know what there is.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath

import webdataset as wds

from common.errors import UserError
from dataset.images import IMAGE_SUFFIXES, MOST_BYTES, Size, open_image, upright_size
from dataset.latents import LATENTS, signature_of, size_of_latents

INDEX = "index.jsonl"
HEAD = 2**16  # bytes in which the size of an image stands, unless other things come first
MOST_TEXT = 2**20  # bytes of a caption's file: what is longer is none


@dataclass
class Shard:
    """What one look at a shard tells: a line of the index."""

    name: str
    bytes: int  # of the tar file
    samples: list[tuple] = field(default_factory=list)
    """(key, where its image or latents begin, their bytes, where its caption begins, its bytes, upright height, width); 0 × 0
    pixels: an image that cannot be read."""
    uncaptioned: list[str] = field(default_factory=list)  # keys
    cut: bool = False  # the file ends before its end: these are the samples before
    latents: bool = False  # instead of images
    mirrored: bool = False  # latents, all of them also of the mirrored image
    masked: bool = False  # latents, all of them with a loss mask
    vae: list[float] = field(default_factory=list)  # that made the latents: its `sdxl.vae_probe`
    text: list[float] = field(default_factory=list)  # encoders whose hidden states are with them: their `text_probe`
    sha256: str = ""  # from here on what only who wrote it knows: of the tar file
    hashes: list[str] = field(default_factory=list)  # of each sample: SHA-256 of the image, or of what its latents depend on
    made_of: str = ""  # SHA-256 of what went into it
    refused: list[str] = field(default_factory=list)  # what could not go into it, with the reason
    dhashes: list[str] = field(default_factory=list)  # of each sample: `images.dhash`, if who wrote it took it


# Looking into one.


def members_of(path: Path) -> tuple[list[tuple[str, str, int, int]], bool]:
    """((key, extension, where the data begins, its size) of a tar's files, by their headers; whether it is cut short).

    Raises UserError if it is no tar file, or holds links, devices, a name twice or names that lead out of it.
    """
    files, length, member, end = [], path.stat().st_size, None, 0
    try:
        with tarfile.open(path, "r:", errors="backslashreplace") as tar:  # names that can be printed
            for member in tar:
                name, plain = PurePosixPath(member.name), member.isdir() or (member.isfile() and not member.issparse())
                if not plain or name.is_absolute() or ".." in name.parts:
                    raise UserError(f"--data: {path} holds {member.name!r}, which is no plain file or leads out of it")
                if member.size < 0:
                    raise UserError(f"--data: {path} holds {member.name!r} of a size below zero")
                end = member.offset_data + (member.size + 511) // 512 * 512
                if member.offset_data + member.size > length:
                    break
                key, extension = wds.tariterators.base_plus_ext(member.name)
                if member.isfile() and key is not None:
                    files.append((key, extension.lower(), member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError) as error:
        if member is None:
            raise UserError(f"--data: {path} is no tar file: {error}") from None
    if len({(key, extension) for key, extension, *_ in files}) < len(files):
        raise UserError(f"--data: {path} holds two files of the same name")
    with path.open("rb") as file:
        file.seek(min(end, length))
        rest = file.read(HEAD)
    return files, len(rest) < 512 or any(rest)  # at least the first block of the end-of-archive mark, and nothing behind it


def survey(path: Path) -> Shard:
    """Reads headers only, of the tar's members and of the images. Raises UserError as `members_of`."""
    members, cut = members_of(path)
    shard, kinds, also, vaes, encoders = Shard(path.name, path.stat().st_size, cut=cut), set(), [], set(), set()
    with path.open("rb") as file:

        def read(at: int, size: int) -> bytes:
            file.seek(at)
            return file.read(size)

        for key, group in groupby(members, key=itemgetter(0)):  # neighbours of one key are a sample
            parts = {extension: (at, size) for _, extension, at, size in group}
            kind = next((extension for extension in (*IMAGE_SUFFIXES, LATENTS) if extension in parts), None)
            if kind is None:  # of photo.2.jpg the key is photo: not used, but not lost in silence either
                shard.uncaptioned += [f"{key}.{e}" for e in parts if e.rpartition(".")[2] in IMAGE_SUFFIXES]
                continue
            texts = [(e, parts[e]) for e in ("txt", "json") if e in parts and parts[e][1] <= MOST_TEXT]
            text = next((place for e, place in texts if split_captions(read(*place), must_be_json=e == "json")), None)
            if text is None:
                shard.uncaptioned.append(key)
                continue
            at, size = parts[kind]
            size *= size <= MOST_BYTES  # else it is skipped
            head = read(at, min(size, HEAD))
            if kind == LATENTS:
                pixels, names = size_of_latents(head)
                also += [names] if names else []  # what cannot be read is skipped in training
                told = read(*dict(texts)["json"]) if "json" in dict(texts) else b""
                vaes.add(signature_of(told, "vae"))
                encoders.add(signature_of(told, "text"))
            else:
                pixels = size_of(head)
                pixels = size_of(read(at, size)) if pixels == (0, 0) and size > HEAD else pixels
            kinds.add(kind == LATENTS)
            shard.samples.append((key, at, size, *text, *pixels))
    if len(kinds) > 1:
        raise UserError(f"--data: {path} holds both images and latents: train on one kind")
    if max(len(vaes), len(encoders)) > 1:
        raise UserError(
            f"--data: the latents of {path} were made by several models: make them anew with scripts/cache_latents.py"
        )
    shard.latents, (shard.vae, shard.text) = kinds == {True}, (list(next(iter(probes), ())) for probes in (vaes, encoders))
    shard.mirrored, shard.masked = (bool(also) and all(name in names for names in also) for name in ("mirrored", "mask"))
    return shard


def split_captions(text: bytes, must_be_json: bool = False) -> list[str]:
    """The lines of a .txt file, or the list `captions` of a .json file: each is a caption of its image."""
    told = text.decode("utf-16" if text.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig", "replace").strip()
    if must_be_json or re.match(r'\{\s*["}]', told):  # "{red|blue} coat" is a caption
        try:
            told = json.loads(told)["captions"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
    lines = told.splitlines() if isinstance(told, str) else told if isinstance(told, list) else []
    lines = [line.encode("utf-8", "replace").decode().strip() for line in lines if isinstance(line, str)]  # "\ud800" is no text
    return [line for line in lines if line]


def size_of(encoded: bytes) -> Size:
    """Upright (height, width) by the first bytes of an image; (0, 0) if they are none."""
    try:
        return upright_size(open_image(encoded))
    except Exception:  # whatever a broken file makes Pillow raise
        return 0, 0


# Their index.


def to_line(shard: Shard) -> str:
    return json.dumps(asdict(shard), separators=(",", ":"))  # in ASCII: names of files need be no UTF-8


def read_lines(text: bytes, where: str) -> dict[str, Shard]:
    """The lines of an index -> {name: shard}. Raises UserError, naming `where`, if they are none of ours."""
    shards, known = {}, {f.name for f in fields(Shard)}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            told = json.loads(line)
            shard = Shard(**{name: value for name, value in told.items() if name in known})
            shard.samples = [(str(key), *map(int, numbers)) for key, *numbers in shard.samples]
            shard.uncaptioned, shard.latents = list(map(str, shard.uncaptioned)), bool(shard.latents)
            shard.vae, shard.text = ([float(value) for value in probe] for probe in (shard.vae, shard.text))
            for _, at, size, text_at, text_size, *pixels in shard.samples:
                beyond = max(at + size, text_at + text_size) > shard.bytes or size > MOST_BYTES or text_size > MOST_TEXT
                if beyond or min(at, size, text_at, text_size, *pixels) < 0 or max(pixels) >= 2**31 or len(pixels) != 2:
                    raise ValueError(f"{shard.name!r} with impossible numbers")
            if PurePosixPath(shard.name).name != shard.name:
                raise ValueError(f"{shard.name!r} leads out of the folder")
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{where} line {number} is no line of an index ({error}): make it anew") from None
        shards[shard.name] = shard
    return shards


def read_index(folder: Path) -> dict[str, Shard]:
    """{name: shard} by the folder's index; empty without one."""
    path = folder / INDEX
    return read_lines(path.read_bytes(), str(path)) if path.is_file() else {}


# Writing them. Until all are there each has a line of its own beside it, name.tar.json: what is interrupted goes on from there.


def sidecar(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def unfinished(folder: Path) -> list[Path]:
    """What tells that the writing of shards was interrupted."""
    return sorted(folder.glob("*.tar.json"))


def already_there(folder: Path) -> dict[str, Shard]:
    """{name: shard} of those that were written whole, by the index and by an interrupted run."""
    lines = b"".join(path.read_bytes() + b"\n" for path in unfinished(folder))
    known = read_index(folder) | read_lines(lines, str(folder))
    size = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
    return {name: shard for name, shard in known.items() if shard.bytes == size.get(name, 0)}


def write_shard(
    folder: Path,
    name: str,
    samples: Iterable[tuple[str, dict, str]],
    refused: Sequence[str] = (),
    made_of: str = "",
    dhashes: Sequence[str] = (),
) -> Shard:
    """Samples (key, {extension: content}, hash) -> folder/name, written aside and renamed when it is whole; no file for none.

    `refused` and `dhashes` are looked at when all samples have been taken.
    """
    path, hashes = folder / name, []
    part = path.with_name(f".{name}.part")
    with part.open("wb") as stream, wds.TarWriter(stream, mtime=0, user="", group="") as tar:
        for key, sample, digest in samples:
            tar.write({"__key__": key, **sample})
            hashes.append(digest)
    shard = Shard(name, 0)
    if hashes:
        shard = replace(survey(part), name=name)
        with part.open("rb") as file:
            shard.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    shard.hashes, shard.refused, shard.made_of, shard.dhashes = hashes, list(refused), made_of, list(dhashes)
    aside = path.with_name(f".{name}.json.part")
    aside.write_text(to_line(shard))
    path.unlink(missing_ok=True)  # the old one must not pass for what the sidecar tells
    aside.rename(sidecar(folder, name))  # before the shard: one without it may be somebody else's
    if hashes:
        part.rename(path)
    else:
        part.unlink()
    return shard


def write_shards(folder: Path, name: str, samples: Iterable[dict], per_shard: int) -> int:
    """Samples {extension: content} -> folder/name-000000.tar, … and their index. Returns the number of shards."""
    remaining = iter(samples)
    shards: list[Shard] = []
    while chunk := list(islice(remaining, per_shard)):
        first = len(shards) * per_shard
        keyed = ((f"{first + i:07d}", sample, "") for i, sample in enumerate(chunk))
        shards.append(write_shard(folder, f"{name}-{len(shards):06d}.tar", keyed))
    finish(folder, shards, ())
    return len(shards)


def finish(folder: Path, shards: list[Shard], replaced: Iterable[str]) -> None:
    """Makes these the index, and removes those that they replace: from here on the folder can be read.

    Shards of other names that the index knows stay in it.
    """
    new, replaced = {shard.name: shard for shard in shards}, set(replaced)
    others = {name: shard for name, shard in read_index(folder).items() if name not in replaced | new.keys()}
    lines = [to_line(shard) for _, shard in sorted((others | new).items())]
    for name in replaced - {shard.name for shard in shards if shard.samples}:
        (folder / name).unlink(missing_ok=True)  # while the index knows it: later nobody would know whose it is
    aside = folder / f".{INDEX}.part"
    aside.write_text("\n".join(lines) + "\n")
    aside.rename(folder / INDEX)
    for path in unfinished(folder):
        path.unlink()
