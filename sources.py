"""Where captioned images lie, in tar shards or a plain folder: looked up once, then each is read by itself.

Shards are WebDataset's: neighbours of one key are a sample, key.jpg, key.txt, key.json.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import webdataset as wds
from braceexpand import UnbalancedBracesError, braceexpand
from safetensors.torch import load, save
from tqdm import tqdm

from errors import UserError
from images import FILES, Size, open_image, upright_size

DEMO = Path(__file__).parent / "assets/demo/train"
LATENTS = "safetensors"  # what a ready-made sample is called in a shard: see `pack_latents`

PLACE = np.dtype([(name, "i8") for name in ("file", "at", "size", "text_at", "text_size", "height", "width")])


@dataclass
class Raw:
    name: str
    image: bytes
    captions: list[str]


@dataclass
class Source:
    """A data set on disk: for each usable sample the file that it lies in, where there, and its upright size in pixels (0: it
    cannot be read); and the names of those without a caption.

    `fingerprint` is a SHA-256 of the names and sizes of its files, which a LoRA file then tells; their bytes are not read.
    """

    files: list[Path]
    where: np.ndarray  # [N] PLACE
    names: list[str]
    captions: list[list[str]]  # [N] of a folder; empty for a shard's: they are read where they lie
    uncaptioned: list[str]
    fingerprint: str
    latents: bool = False  # ready-made, so that the VAE is not needed
    mirrored: bool = False  # latents, each with those of the mirrored image
    vae: tuple[float, ...] = ()  # of latents, if they tell it: the `vae_probe` of what made them
    part: np.ndarray | None = None  # [N] number of the data set in a mixture
    shares: tuple[float, ...] = ()  # of each in the draws of an epoch, in all 1

    @property
    def samples(self) -> int:
        return len(self.where)

    def raw(self, n: int) -> Raw:
        """Sample n, still encoded. What cannot be read is empty: it is then skipped and named like any broken image."""
        place, captions = self.where[n], self.captions[n] if self.captions else []
        try:
            with self.files[place["file"]].open("rb") as file:
                file.seek(place["at"])
                image = file.read(place["size"])
                if not captions:
                    file.seek(place["text_at"])
                    captions = split_captions(file.read(place["text_size"]))
        except OSError:
            image = b""
        return Raw(self.names[n], image, captions or [""])


def split_captions(text: bytes) -> list[str]:
    """The lines of a .txt file, or the list `captions` of a .json file: each is a caption of its image."""
    told = text.decode("utf-8", "replace").strip()
    if told.startswith("{"):
        with suppress(ValueError, RecursionError):
            told = json.loads(told).get("captions")
    lines = told.splitlines() if isinstance(told, str) else told if isinstance(told, list) else []
    return [line.strip() for line in lines if isinstance(line, str) and line.strip()]


def probe_of(told: bytes) -> tuple[float, ...]:
    """The `vae` that cache.py writes into the .json of latents; () if there is none."""
    try:
        return tuple(float(value) for value in json.loads(told)["vae"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


def size_of(encoded: bytes) -> Size:
    """Upright (height, width) by the first bytes of an image; (0, 0) if they are none."""
    try:
        return upright_size(open_image(encoded))
    except Exception:  # whatever a broken file makes Pillow raise
        return 0, 0


def size_of_latents(encoded: bytes) -> tuple[int, int, bool]:
    """(height, width) in pixels, and whether those of the mirrored image are there, by the header of a safetensors file."""
    try:
        header = json.loads(encoded[8 : 8 + int.from_bytes(encoded[:8], "little")])
        _, height, width = header["posterior"]["shape"]
        return 8 * height, 8 * width, "mirrored" in header
    except (ValueError, KeyError, TypeError):
        return 0, 0, False


HEAD = 2**16  # bytes in which the size of an image stands, unless other things come first


def open_mixture(data: tuple[str, ...]) -> Source:
    """Every --data -> one source. 'a/:3' and 'b/:1' are drawn from three to one, whatever their sizes; without weights, each
    sample once per epoch. Raises UserError as `open_source`, and for mistaken weights or a mixture of images and latents.
    """
    pairs = [split_weight(one) for one in data or ("demo",)]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        raise UserError(f"--data {' '.join(data)}: give all of them a weight (:3 at the end), or none")
    sources = [open_source(one) for one, _ in pairs]
    if len({source.latents for source in sources}) > 1:
        raise UserError(f"--data {' '.join(data)}: these hold both images and latents: train on one kind")
    if len({source.vae for source in sources}) > 1:
        raise UserError(f"--data {' '.join(data)}: these latents were made by several VAEs")
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
        fingerprint=hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest(),
        mirrored=all(source.mirrored for source in sources),
        part=np.repeat(range(len(sources)), [source.samples for source in sources]),
        shares=tuple(weight / sum(weights) for weight in weights),
    )


def split_weight(data: str) -> tuple[str, float | None]:
    """'shards/:3' -> ('shards/', 3.0); None where there is none. Raises UserError if it is not above zero."""
    name, colon, weight = data.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return data, None
    if not colon or Path(data).exists():
        return data, None
    if not 0 < value < float("inf"):
        raise UserError(f"--data {data}: a weight must be above 0")
    return name, value


def open_source(data: str) -> Source:
    """--data -> its source, after one look at every file's header.

    Raises UserError if there is nothing there, a tar is damaged or truncated, or no image has a caption.
    """
    path = DEMO if data == "demo" else Path(data)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
    else:
        try:
            shards = [Path(name) for name in braceexpand(str(path))]
        except UnbalancedBracesError:
            raise UserError(f"--data {data}: a brace is not closed") from None
        missing = [str(shard) for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(f"--data {data}: {missing[0]} does not exist")
    source = scan_shards(shards) if shards else scan_folder(path)
    if not source.samples:
        raise UserError(f"--data {data}: no image with a caption there ({len(source.uncaptioned)} images without one)")
    return source


def members_of(shard: Path) -> list[tuple[str, str, int, int]]:
    """(key, extension, where the data begins, its size) of a tar's files, by their headers.

    Raises UserError if it is damaged or cut short, or holds links or names that lead out of it.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"--data: {shard} is truncated or no tar file: {error}") from None
    end = members[-1].offset_data + members[-1].size if members else 0
    if shard.stat().st_size < (end + 511) // 512 * 512 + 512:
        raise UserError(f"--data: {shard} is truncated: its end-of-archive mark is missing")
    files = []
    for member in members:
        name = PurePosixPath(member.name)
        if member.issym() or member.islnk() or name.is_absolute() or ".." in name.parts:
            raise UserError(f"--data: {shard} holds {member.name!r}, a link or a name that leads out of it")
        key, extension = wds.tariterators.base_plus_ext(member.name)
        if member.isfile() and key is not None:
            files.append((key, extension.lower(), member.offset_data, member.size))
    return files


def scan_shards(shards: list[Path]) -> Source:
    """Reads headers only, of the tar's members and of the images: counts samples and finds a damaged shard before training."""
    places, names, uncaptioned, digest = [], [], [], hashlib.sha256()
    kinds, mirrored, vaes = set(), set(), set()
    for number, shard in enumerate(tqdm(shards, desc="looking through the shards", unit="shard", delay=2, leave=False)):
        members = members_of(shard)
        if len({(key, extension) for key, extension, *_ in members}) < len(members):
            raise UserError(f"--data: {shard} holds two files of the same name")
        digest.update(json.dumps([(key, extension, size) for key, extension, _, size in members]).encode())
        with shard.open("rb") as file:

            def read(at: int, size: int, file=file) -> bytes:
                file.seek(at)
                return file.read(size)

            for key, group in groupby(members, key=itemgetter(0)):  # neighbours of one key are a sample
                parts = {extension: (at, size) for _, extension, at, size in group}
                kind = next((extension for extension in (*FILES, LATENTS) if extension in parts), None)
                if kind is None:
                    continue
                text = next((parts[e] for e in ("txt", "json") if e in parts and split_captions(read(*parts[e]))), None)
                if text is None:
                    uncaptioned.append(f"{shard.name}:{key}")
                    continue
                at, size = parts[kind]
                head = read(at, min(size, HEAD))
                if kind == LATENTS:
                    *pixels, twice = size_of_latents(head)
                    mirrored.add(twice)
                    vaes.add(probe_of(read(*parts["json"])) if "json" in parts else ())
                else:
                    pixels = size_of(head)
                    pixels = size_of(read(at, size)) if pixels == (0, 0) else pixels
                kinds.add(kind == LATENTS)
                places.append((number, at, size, *text, *pixels))
                names.append(f"{shard.name}:{key}")
    if len(kinds) > 1:
        raise UserError("--data: these shards hold both images and latents: train on one kind")
    if len(vaes) > 1:
        raise UserError("--data: these latents were made by several VAEs: make them anew with scripts/cache.py")
    how = {"latents": kinds == {True}, "mirrored": mirrored == {True}, "vae": next(iter(vaes), ())}
    return Source(list(shards), np.array(places, PLACE), names, [], uncaptioned, digest.hexdigest(), **how)


def scan_folder(folder: Path) -> Source:
    """name.jpg with name.txt beside it, or a metadata.jsonl of {"file_name": …, "text": …} (Hugging Face imagefolder)."""
    told = {}
    for metadata in folder.rglob("metadata.jsonl"):
        for number, line in enumerate(metadata.read_text(errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"] or ""
                told[metadata.parent / row["file_name"]] = json.dumps({"captions": text}).encode()
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"--data: {metadata} line {number}: needs file_name and text ({error})") from None
    files, places, captions, uncaptioned, digest = [], [], [], [], hashlib.sha256()
    there = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in FILES and p.is_file())
    for path in tqdm(there, desc="looking through the folder", unit="img", delay=2, leave=False):
        text = path.with_suffix(".txt")
        lines = split_captions(told.get(path, b"")) or split_captions(text.read_bytes() if text.is_file() else b"")
        size = path.stat().st_size
        digest.update(json.dumps([str(path.relative_to(folder)), size, lines]).encode())
        if lines:
            with path.open("rb") as file:
                pixels = size_of(file.read(HEAD))
            pixels = size_of(path.read_bytes()) if pixels == (0, 0) else pixels
            places.append((len(files), 0, size, 0, 0, *pixels))
            files.append(path)
            captions.append(lines)
        else:
            uncaptioned.append(str(path))
    return Source(files, np.array(places, PLACE), list(map(str, files)), captions, uncaptioned, digest.hexdigest())


def write_shards(folder: Path, name: str, samples: Iterable[dict], per_shard: int) -> int:
    """Samples {extension: content} -> folder/name-000000.tar, …, each written aside and renamed when it is whole.

    Returns their number. Raises UserError, before the first sample is taken, if there are such shards already.
    """
    if there := sorted(folder.glob(f"{name}-*.tar")):
        raise UserError(f"--out {folder} already holds {there[0].name}: remove it or choose another --name")
    remaining, keys = iter(samples), count()
    for shard in count():
        chunk = list(islice(remaining, per_shard))
        if not chunk:
            return shard
        path = folder / f"{name}-{shard:06d}.tar"
        with path.with_suffix(".part").open("wb") as stream, wds.TarWriter(stream, mtime=0, user="", group="") as tar:
            for sample in chunk:
                tar.write({"__key__": f"{next(keys):07d}", **sample})
        path.with_suffix(".part").rename(path)


# Ready-made latents.


def pack_latents(
    posterior: torch.Tensor, original_size: Size, crop: Size, mirrored: tuple[torch.Tensor, Size] | None = None
) -> bytes:
    """posterior [8, h, w], mean and deviation of the latents -> the bytes of key.safetensors in a shard, float16.

    `mirrored`: the posterior of the mirrored image, and its crop.
    """
    tensors = {"original_size": torch.tensor(original_size), "crop": torch.tensor(crop), "posterior": posterior}
    if mirrored:
        tensors |= {"mirrored": mirrored[0], "mirrored_crop": torch.tensor(mirrored[1])}
    return save({name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in tensors.items()})


def unpack_latents(raw: Raw, flip: bool) -> tuple[np.ndarray, Size, Size]:
    """-> posterior [8, h/8, w/8] float16, original (h, w), crop (top, left)."""
    tensors = load(raw.image)
    names = ("mirrored", "mirrored_crop") if flip else ("posterior", "crop")
    posterior, crop = (tensors[name] for name in names)
    return posterior.numpy(), tuple(tensors["original_size"].tolist()), tuple(crop.tolist())
