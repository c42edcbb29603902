"""Tar shards in WebDataset's layout: where each sample is in one, their index, and writing that can be interrupted.

Files with the same key are a sample: key.jpg, key.txt, key.json; or key.safetensors, cached latents, in place of an image.
`index.jsonl` next to the shards has a line for each of them, so that no shard has to be opened to list its samples.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from os.path import splitext
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from unicodedata import normalize

import numpy as np
import webdataset as wds

from common.errors import UserError
from common.files import write_atomically
from common.text import read_text
from dataset.captions import CAPTION_KEYS, TEXT_SUFFIXES, caption_lines
from dataset.folder import is_hidden, suffix_of
from dataset.images import HEAD, IMAGE_SUFFIXES, MOST_BYTES, UNREAD, kind_of, survey_size
from dataset.latents import LATENTS, signature_of, size_of_latents

INDEX = "index.jsonl"
RECORD = ".source"  # in a folder of shards: what they are made of
MOST_TEXT = 2**20  # bytes of a caption's file


@dataclass
class Shard:
    """What is known of a shard: a line of the index."""

    name: str
    bytes: int  # of the tar file
    samples: list[tuple] = field(default_factory=list)
    """(key, offset of the image or latents, their bytes, offset of the caption, its bytes, upright height, width). Offsets are
    in bytes; a height and width of 0: the image cannot be read."""
    uncaptioned: list[str] = field(default_factory=list)  # keys
    unusable: list[str] = field(default_factory=list)  # names of members with the reason
    others: dict[str, int] = field(default_factory=dict)  # {extension or kind: number} of all members that are no image
    truncated: bool = False  # the file ends too early: `samples` are those before the end
    has_latents: bool = False  # instead of images
    has_mirrored: bool = False  # every sample also has latents of the mirrored image
    has_masks: bool = False  # every sample of latents has a loss mask
    vae_signature: list[float] = field(default_factory=list)  # `model.vae.vae_signature` of the VAE that made the latents
    text_signature: list[float] = field(default_factory=list)  # signature of the text encoders, if their hidden states are here
    # The rest is known only if `write_shard` made the shard.
    repeats: list[int] = field(default_factory=list)  # how often an epoch draws each sample; empty: once
    sha256: str = ""  # of the tar file
    hashes: list[str] = field(default_factory=list)  # of each sample: SHA-256 of the image, or of what made its latents
    made_of: str = ""  # SHA-256 of what identifies its inputs
    refused: list[str] = field(default_factory=list)  # inputs that are not in it, with the reason
    dhashes: list[str] = field(default_factory=list)  # `images.dhash` of each sample, of images only


# Keys in the index that are not the names of the attributes.
INDEX_KEYS = {
    "truncated": "cut", "has_latents": "latents", "has_mirrored": "mirrored", "has_masks": "masked", "vae_signature": "vae",
    "text_signature": "text",
}  # fmt: skip


# Reading a shard.


Members = dict[str, dict[str, tuple[int, int]]]  # {key: {extension: (offset of the data, its bytes)}}


def members_of(path: Path) -> tuple[Members, bool]:
    """Reads the headers of a tar -> (its files, whether it is truncated). Those of a key need not be neighbours.

    Raises UserError if it is no tar file, or holds links, devices, a name twice or names that lead out of the folder.
    """
    samples: Members = {}
    spelling: dict[str, str] = {}  # {key in Unicode's composed form: key as it is first found}
    length, member, end = path.stat().st_size, None, 0
    try:
        with tarfile.open(path, "r:", errors="backslashreplace") as tar:  # so that names can be printed
            for member in tar:
                name, plain = PurePosixPath(member.name), member.isdir() or (member.isfile() and not member.issparse())
                if not plain or name.is_absolute() or ".." in name.parts:
                    advice = "pack the files themselves, as tar --dereference --hard-dereference does"
                    raise UserError(f"{path} holds {member.name!r}, which is no plain file or leads out of it: {advice}")
                if member.size < 0:
                    raise UserError(f"{path} holds {member.name!r} of a size below zero")
                end = member.offset_data + (member.size + 511) // 512 * 512
                if member.offset_data + member.size > length:
                    break
                if not member.isfile():
                    continue
                key, extension = (member.name, "") if is_hidden(name) else splitext(member.name)
                parts = samples.setdefault(spelling.setdefault(normalize("NFC", key), key), {})
                if (extension := extension.lower().removeprefix(".")) in parts:
                    raise UserError(f"{path} holds two files of the same name, {member.name!r}: rename or remove one")
                parts[extension] = member.offset_data, member.size
    except (tarfile.TarError, OSError, ValueError) as error:
        if member is None:
            with path.open("rb") as file:
                reason = kind_of(file.read(HEAD)) or error
            if (suffix := suffix_of(path.name)) != "tar":
                reason = UNREAD.get(suffix, "give the folder that it is in, or .tar or .parquet files")
            raise UserError(f"{path} is no tar file: {reason}") from None
    with path.open("rb") as file:
        file.seek(min(end, length))
        rest = file.read(HEAD)
    # Complete if the end-of-archive mark follows, at least its first block of 512 zeros, and nothing but zeros after it.
    return samples, len(rest) < 512 or any(rest)


def read_from(file: BinaryIO, begin: int, at: int, size: int) -> bytes:
    file.seek(begin + at)
    return file.read(size)


def survey(path: Path) -> Shard:
    """Reads only the headers of the tar file and of the images, and the captions. Raises UserError as `members_of`."""
    samples, truncated = members_of(path)
    shard = Shard(path.name, path.stat().st_size, truncated=truncated)
    kinds: set[bool] = set()  # whether samples are latents
    tensor_names: list[set[str]] = []  # of each sample of latents
    signatures = set()  # of the models that made the latents
    with path.open("rb") as file:
        read = partial(read_from, file, 0)
        for key, parts in samples.items():
            kind = next((extension for extension in (*IMAGE_SUFFIXES, LATENTS) if extension in parts), None)
            account(shard, key, parts, kind)
            if kind is None:
                continue
            try:
                text = caption_among(parts, read)
            except ValueError as error:
                shard.unusable.append(f"{key} ({error})")
                continue
            if text is None:
                shard.uncaptioned.append(key)
                continue
            at, size = parts[kind]
            if size > MOST_BYTES:
                size = 0  # training skips it, as an image that cannot be read
            if kind == LATENTS:
                pixels, names = size_of_latents(read(at, min(size, HEAD)))
                tensor_names += [names] if names else []  # without any they cannot be read, and training skips them
                metadata = read(*parts.get("json", (0, 0)))
                signatures.add((signature_of(metadata, "vae"), signature_of(metadata, "text")))
            else:
                pixels = survey_size(partial(read_from, file, at), size)
            kinds.add(kind == LATENTS)
            shard.samples.append((key, at, size, *text, *pixels))
    if len(kinds) > 1:
        raise UserError(f"{path} holds both images and latents: train on one kind")
    if len(signatures) > 1:
        raise UserError(f"the latents of {path} were made by several models: make them anew with scripts/cache_latents.py")
    shard.has_latents = kinds == {True}
    shard.vae_signature, shard.text_signature = map(list, next(iter(signatures), ((), ())))
    shard.has_mirrored = bool(tensor_names) and all("mirrored" in names for names in tensor_names)
    shard.has_masks = bool(tensor_names) and all("mask" in names for names in tensor_names)
    return shard


def account(shard: Shard, key: str, extensions: Iterable[str], kind: str | None) -> None:
    """Reports the files of a sample but the one of `kind`, its image: as unusable with the reason, or by their number."""
    for extension in (e for e in extensions if e != kind):
        if reason := "one image of each name is read" if extension in IMAGE_SUFFIXES else UNREAD.get(extension):
            shard.unusable.append(f"{key}.{extension} ({reason})")
        else:
            other = f".{extension}" if extension else "hidden" if is_hidden(PurePosixPath(key)) else "without an extension"
            shard.others[other] = shard.others.get(other, 0) + 1


def caption_among(parts: dict[str, tuple[int, int]], read: Callable[[int, int], bytes]) -> tuple[int, int] | None:
    """(offset, bytes) of the first file of a sample that holds captions. Raises ValueError if one before it cannot be read."""
    for extension in (e for e in TEXT_SUFFIXES if e in parts):
        at, size = parts[extension]
        if split_captions(read(at, min(size, MOST_TEXT + 1)), must_be_json=extension == "json"):
            return at, size
    return None


def split_captions(encoded: bytes, must_be_json: bool = False) -> list[str]:
    """The captions of an image: the lines of its .txt file, or what its .json file has as one of CAPTION_KEYS.

    Raises ValueError with the reason if they cannot be read.
    """
    if len(encoded) > MOST_TEXT:
        raise ValueError("its caption is larger than 1 MiB")
    try:
        text = read_text(encoded).strip()
    except ValueError as error:
        raise ValueError(f"its caption is {error}") from None
    if not text or not (must_be_json or re.match(r'\{\s*["}]', text)):  # "{red|blue} coat" is a caption
        return caption_lines(text)
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise ValueError(f"its caption is no JSON object with {' or '.join(CAPTION_KEYS)}")
    return caption_lines(next((entry[key] for key in CAPTION_KEYS if entry.get(key)), None))


# The index of a folder of shards.


def to_line(shard: Shard) -> str:
    entry = {INDEX_KEYS.get(name, name): value for name, value in asdict(shard).items()}
    return json.dumps(entry, separators=(",", ":"))  # in ASCII, as names of files need not be UTF-8


def lines_of(text: Iterable[bytes], where: str) -> Iterator[tuple[Shard, list[str], np.ndarray]]:
    """The lines of an index -> (shard without `samples`, their keys, their numbers [6, N] int64). Raises UserError, naming the
    file `where`, if a line is not valid.
    """
    names, attributes = set(), {INDEX_KEYS.get(f.name, f.name): f.name for f in fields(Shard)}
    for number, line in enumerate(text, 1):
        try:
            rest, samples = split_line(line)
            entry = json.loads(rest)
            shard = Shard(**{attributes[key]: value for key, value in entry.items() if key in attributes})
            keys, numbers = samples or columns_of_line(shard)
            check_numbers(shard, numbers)
            shard.samples = []
            shard.uncaptioned, shard.unusable = list(map(str, shard.uncaptioned)), list(map(str, shard.unusable))
            shard.has_latents = bool(shard.has_latents)
            shard.others = {str(kind): int(number) for kind, number in shard.others.items()}
            shard.vae_signature = [float(value) for value in shard.vae_signature]
            shard.text_signature = [float(value) for value in shard.text_signature]
            shard.repeats = [int(times) for times in shard.repeats]
            if len(shard.repeats) not in (0, len(keys)) or not all(0 < times < 1000 for times in shard.repeats):
                raise ValueError(f"{shard.name!r} with impossible repeats")
            if shard.name in names:
                raise ValueError(f"{shard.name!r} is in two lines")
            if PurePosixPath(shard.name).name != shard.name:
                raise ValueError(f"{shard.name!r} leads out of the folder")
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = f"is no line of an index ({error}): delete the index or write it anew"
            raise UserError(f"{where} line {number} {reason}") from None
        names.add(shard.name)
        yield shard, keys, numbers


BEFORE_SAMPLES = re.compile(rb'{"name":"[^"\\]*","bytes":[0-9]+,"samples":')
DIGITS = b"0123456789"
NO_DIGITS = bytes(c if c in DIGITS else ord(" ") for c in range(256))


def split_line(line: bytes) -> tuple[bytes, tuple[list[str], np.ndarray] | None]:
    """A line as `to_line` writes it -> (the line without samples, (their keys, their numbers [6, N] int64)), in half the time
    that JSON takes. (line, None) if it is written in any other way, has no samples, or a key with `"` or `]]`.
    """
    begin = head.end() if (head := BEFORE_SAMPLES.match(line)) else len(line)
    end = line.find(b"]]", begin) + 2
    parts = line[begin:end].split(b'"')
    keys, rest = b'["' + b'","'.join(parts[1::2]) + b'"]', b'"'.join(parts[::2])  # [[",1,2,3,4,5,6],[",1,2,3,4,5,6]]
    plain = rest.translate(None, DIGITS) == b"[" + (b'[",,,,,,],' * (len(parts) // 2))[:-1] + b"]"
    if not plain or b",," in rest or b",]" in rest or re.search(rb",0\d", rest):
        return line, None
    numbers = np.fromstring(rest.translate(NO_DIGITS), np.int64, sep=" ")
    if len(numbers) != 6 * (len(parts) // 2):  # digits elsewhere: all six places of each sample have some
        return line, None
    return line[:begin] + b"[]" + line[end:], (json.loads(keys), numbers.reshape(-1, 6).T)


def columns_of_line(shard: Shard) -> tuple[list[str], np.ndarray]:
    """(keys, numbers [6, N] int64) of its samples. Raises ValueError, TypeError or OverflowError."""
    if not list(shard.samples):
        return [], np.empty((6, 0), np.int64)
    try:
        keys, *columns = zip(*shard.samples, strict=True)
        numbers = np.array(columns)
        if numbers.dtype != np.int64:  # texts, floats or booleans in JSON
            numbers = np.array([list(map(int, column)) for column in columns], np.int64)
        return list(map(str, keys)), numbers
    except (ValueError, OverflowError):
        raise ValueError(f"{shard.name!r} with impossible numbers") from None


def check_numbers(shard: Shard, numbers: np.ndarray) -> None:
    """Raises ValueError or TypeError if samples cannot have these, of which there should be six for each."""
    most = [2**62, MOST_BYTES, 2**62, MOST_TEXT, 2**31 - 1, 2**31 - 1]
    if len(numbers) != 6 or numbers.min(initial=0) < 0 or (numbers.max(axis=1, initial=0) > most).any():
        raise ValueError(f"{shard.name!r} with impossible numbers")
    at, size, text_at, text_size, *_ = numbers
    if len(at) and int(np.maximum(at + size, text_at + text_size).max()) > shard.bytes:
        raise ValueError(f"{shard.name!r} with impossible numbers")


def read_lines(text: bytes, where: str) -> dict[str, Shard]:
    """The lines of an index -> {name: shard}. Raises UserError as `lines_of`."""
    found = {}
    for shard, keys, numbers in lines_of(text.splitlines(), where):
        shard.samples = list(zip(keys, *numbers.tolist(), strict=True))
        found[shard.name] = shard
    return found


def read_index(folder: Path) -> dict[str, Shard]:
    """{name: shard} by the folder's index; empty without one."""
    path = folder / INDEX
    return read_lines(path.read_bytes(), str(path)) if path.is_file() else {}


# Writing shards. Until all are written, the index line of each is in a file of its own, name.tar.json: an interrupted run finds
# there which shards are done. It is empty while its shard is replaced or removed.


def sidecar(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def unfinished(folder: Path) -> list[Path]:
    """The name.tar.json of shards whose writing was interrupted, or is going on; none once the index is written."""
    return sorted(folder.glob("*.tar.json"))


def already_there(folder: Path) -> dict[str, Shard]:
    """{name: shard} of those that are complete, by the index and by the name.tar.json of an interrupted run."""
    lines = b"".join(line + b"\n" for path in unfinished(folder) if (line := path.read_bytes()))
    known = read_index(folder) | read_lines(lines, str(folder))
    size = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
    return {name: shard for name, shard in known.items() if shard.bytes == size.get(name, 0)}


def known_shards(folder: Path) -> set[str]:
    """Names of the shards in the folder's index, and of those whose writing was interrupted."""
    return {*read_index(folder), *(path.stem for path in unfinished(folder))}


def claim(folder: Path, source: str, replace: bool) -> None:
    """Records in a folder of shards that they are made of `source`, before any of them changes: a folder holds one set.

    Raises UserError if there are shards of another source, unless `replace`, tar files that no index lists, or the data.
    """
    if os.path.realpath(folder) == os.path.realpath(os.path.dirname(source) if source.endswith(".tar") else source):
        raise UserError(f"--out {folder} must be another folder than that of the data")
    known, record = known_shards(folder), folder / RECORD
    if unknown := {path.name for path in folder.glob("*.tar")} - known:
        raise UserError(f"{folder} holds {min(unknown)}, which is not in its index: move it to another folder")
    before = os.fsdecode(record.read_bytes()) if record.is_file() else ""
    source = os.path.realpath(source) if os.path.exists(source) else source
    if known and before != source and not replace:
        theirs = before or "an unknown source"
        raise UserError(f"{folder} holds shards of {theirs}: --replace puts those of {source} in their place")
    if before != source:
        write_atomically(record, os.fsencode(source))


def write_shard(
    folder: Path, name: str, samples: Iterable[tuple[str, dict, str]],
    refused: Sequence[str] = (), made_of: str = "", dhashes: Sequence[str] = (), repeats: Mapping[str, int] | None = None,
) -> Shard:  # fmt: skip
    """Samples (key, {extension: content}, hash) -> folder/name, written under a temporary name and renamed when it is complete.
    Without samples no tar file is written.

    `refused` and `dhashes` may be filled while the samples are read: they are used after the last one. `repeats`: of every key;
    None: once.
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
    shard.repeats = [repeats[key] for key, *_ in shard.samples] if repeats else []
    aside = path.with_name(f".{name}.json.part")
    aside.write_text(to_line(shard), "utf-8", newline="\n")
    sidecar(folder, name).touch()  # the folder is unfinished from here on
    path.unlink(missing_ok=True)  # an older shard must not be taken for the one that the sidecar describes
    aside.replace(sidecar(folder, name))  # before the shard: without it the shard would look like one of unknown origin
    if hashes:
        part.replace(path)
    else:
        part.unlink()
    return shard


def finish(folder: Path, shards: list[Shard]) -> None:
    """Writes the index of `shards` and removes all others: the folder is then complete."""
    for name in known_shards(folder) - {shard.name for shard in shards if shard.samples}:
        sidecar(folder, name).touch()  # what is being removed is neither taken for missing nor for unknown
        (folder / name).unlink(missing_ok=True)
    aside = folder / f".{INDEX}.part"
    lines = [to_line(shard) + "\n" for shard in sorted(shards, key=lambda shard: shard.name)]
    aside.write_text("".join(lines), "utf-8", newline="\n")
    aside.replace(folder / INDEX)
    for path in [*folder.glob(".*.part"), *unfinished(folder)]:  # the former of an interrupted run
        path.unlink()
