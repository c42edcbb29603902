"""tar shards (or a plain folder) -> batches, as an endless stream that is a function of (seed, position).

Every worker of every rank walks the same order and decodes only its own share, so the order depends neither on the number
of workers nor on that of ranks, each image is seen once per epoch, and a run resumes by skipping bytes, not pictures.
"""

import hashlib
import io
import json
import random
import signal
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from braceexpand import UnbalancedBracesError, braceexpand
from PIL import Image, ImageOps
from safetensors.torch import load, save
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from errors import UserError

DEMO = Path(__file__).parent / "assets/demo/train"
IMAGES = ("jpg", "jpeg", "png", "webp")
LATENTS = "safetensors"  # what a ready-made sample is called in a shard: see `pack_latents`
BUFFER = 500  # samples, still encoded, that a shuffle within shards looks ahead


@dataclass(frozen=True)
class DataConfig:
    data: str = "demo"
    """'demo', a folder of tar shards (of images or of latents), a brace pattern (shards/{000000..000012}.tar), or a folder
    of captioned images."""
    bs: int = 3
    """Images per step, process and accumulation."""
    resolution: int | None = None
    """Side of the square crop in pixels. None: the model's own (1024 for SDXL)."""
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one."""
    flip: bool = False
    """Mirror every second image at random."""
    workers: int = 2
    """Processes per rank that read and decode."""

    def __post_init__(self) -> None:
        if self.bs < 1:
            raise UserError(f"--bs must be at least 1, not {self.bs}")
        if self.resolution is not None and (self.resolution < 64 or self.resolution % 8):
            raise UserError(f"--resolution must be a multiple of 8 from 64 up, not {self.resolution}")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"--caption-dropout must lie in 0…1, not {self.caption_dropout}")
        if self.workers < 0:
            raise UserError(f"--workers must be at least 0, not {self.workers}")


@dataclass
class Batch:
    images: torch.Tensor  # pixels [B, 3, R, R] float32 in [-1, 1], or ready-made posteriors [B, 8, R/8, R/8] float16
    captions: list[str]
    original_size: torch.Tensor  # [B, 2] (h, w) of the source image
    crop: torch.Tensor  # [B, 2] (top, left) in the resized image
    skipped: list[str]  # images of this batch that could not be decoded

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        return self


# Where samples come from: each source knows its size and walks its raw, still encoded samples in the order of an epoch.


@dataclass
class Raw:
    name: str
    image: bytes
    caption: str


@dataclass
class Source:
    """A data set on disk: `samples` usable ones, and the names of those without a caption.

    `fingerprint` is a SHA-256 of the names and sizes of its files, which a LoRA file then tells; their bytes are not read.
    """

    samples: int
    uncaptioned: list[str] = field(default_factory=list)
    latents: bool = False  # ready-made, so that the VAE is not needed
    fingerprint: str = ""

    def walk(self, rng: random.Random) -> Iterator[Raw]:
        raise NotImplementedError


@dataclass
class Folder(Source):
    images: list[tuple[Path, str]] = field(default_factory=list)

    def walk(self, rng: random.Random) -> Iterator[Raw]:
        for path, caption in rng.sample(self.images, len(self.images)):
            try:
                yield Raw(str(path), path.read_bytes(), caption)
            except OSError:
                yield Raw(str(path), b"", caption)  # cannot be decoded: skipped and named like any broken image


@dataclass
class Shards(Source):
    shards: list[Path] = field(default_factory=list)

    def walk(self, rng: random.Random) -> Iterator[Raw]:
        files = wds.tariterators.tar_file_expander(open_files(rng.sample(self.shards, len(self.shards))))
        samples = wds.tariterators.group_by_keys(files)
        for sample in wds.filters.shuffle(BUFFER, initial=BUFFER, rng=rng)(samples):
            image = next((sample[extension] for extension in (*IMAGES, LATENTS) if extension in sample), None)
            if image is not None and sample.get("txt"):
                name = f"{Path(sample['__url__']).name}:{sample['__key__']}"
                yield Raw(name, image, sample["txt"].decode("utf-8", "replace").strip())


def open_files(paths: list[Path]) -> Iterator[dict]:
    """Opened here and not by WebDataset, which would take a file named `pipe:…` for a shell command."""
    for path in paths:
        with path.open("rb") as stream:
            yield {"url": str(path), "stream": stream}


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


def scan_shards(shards: list[Path]) -> Shards:
    """Reads the member headers, not the images: counts samples and finds a truncated file before training does."""
    samples, uncaptioned, kinds, digest = 0, [], set(), hashlib.sha256()
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                members = tar.getmembers()
                end = members[-1].offset_data + members[-1].size if members else 0
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"--data: {shard} is truncated or no tar file: {error}") from None
        if shard.stat().st_size < (end + 511) // 512 * 512 + 512:
            raise UserError(f"--data: {shard} is truncated: its end-of-archive mark is missing")
        files = [(*wds.tariterators.base_plus_ext(member.name), member.size) for member in members if member.isfile()]
        files = [(key, extension.lower(), size) for key, extension, size in files if key is not None]
        digest.update(json.dumps(files).encode())
        for key, group in groupby(files, key=itemgetter(0)):  # neighbours of one key are a sample, as WebDataset reads them
            sizes = [(extension, size) for _, extension, size in group]
            extensions = dict(sizes)
            if len(extensions) < len(sizes):
                raise UserError(f"--data: {shard} holds two files of the same name, with key {key}")
            if extensions.keys().isdisjoint((*IMAGES, LATENTS)):
                continue
            if extensions.get("txt"):
                samples += 1
                kinds.add(LATENTS in extensions)
            else:
                uncaptioned.append(f"{shard.name}:{key}")
    if len(kinds) > 1:
        raise UserError("--data: these shards hold both images and latents: train on one kind")
    return Shards(samples, uncaptioned, kinds == {True}, digest.hexdigest(), shards)


def scan_folder(folder: Path) -> Folder:
    """name.jpg with name.txt beside it, or a metadata.jsonl of {"file_name": …, "text": …} (Hugging Face imagefolder)."""
    captions = {}
    for metadata in folder.rglob("metadata.jsonl"):
        for number, line in enumerate(metadata.read_text(errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                captions[metadata.parent / row["file_name"]] = row["text"] or ""
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"--data: {metadata} line {number}: needs file_name and text ({error})") from None
    images, uncaptioned, digest = [], [], hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGES and p.is_file()):
        text = path.with_suffix(".txt")
        caption = captions.get(path) or (text.read_text(errors="replace") if text.is_file() else "")
        digest.update(json.dumps([str(path.relative_to(folder)), path.stat().st_size, caption]).encode())
        if caption.strip():
            images.append((path, caption.strip()))
        else:
            uncaptioned.append(str(path))
    return Folder(len(images), uncaptioned, fingerprint=digest.hexdigest(), images=images)


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
        with wds.TarWriter(str(path.with_suffix(".part")), mtime=0, user="", group="") as tar:
            for sample in chunk:
                tar.write({"__key__": f"{next(keys):07d}", **sample})
        path.with_suffix(".part").rename(path)


# Raw samples -> batches.


def pack_latents(posterior: torch.Tensor, original_size: tuple[int, int], crop: tuple[int, int]) -> bytes:
    """posterior [8, h, w], mean and deviation of the latents -> the bytes of key.safetensors in a shard, float16."""
    sizes = {"original_size": torch.tensor(original_size), "crop": torch.tensor(crop)}
    return save({"posterior": posterior.to(torch.float16).contiguous(), **sizes})


def unpack_latents(raw: Raw, resolution: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """-> posterior [8, R/8, R/8] float16, original (h, w), crop (top, left). Raises UserError if of another resolution."""
    tensors = load(raw.image)
    posterior = tensors["posterior"]
    if posterior.shape != (8, resolution // 8, resolution // 8):
        side = [8 * n for n in posterior.shape[1:]]
        raise UserError(f"--data: {raw.name} holds latents of {side} pixels, not of {resolution}: see --resolution")
    return posterior.numpy(), tuple(tensors["original_size"].tolist()), tuple(tensors["crop"].tolist())


def decode(raw: Raw, resolution: int, flip: bool) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """Encoded image -> pixels [3, R, R] float32 in [-1, 1], original (h, w), crop (top, left) of the resized image.

    The shorter side becomes R, the longer one is cropped about its centre. Raises OSError (or what Pillow raises) if broken.
    """
    image = to_rgb(Image.open(io.BytesIO(raw.image)))
    original = (image.height, image.width)
    scale = resolution / min(original)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    if flip:
        image = ImageOps.mirror(image)
    top, left = (image.height - resolution) // 2, (image.width - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    return np.ascontiguousarray(pixels), original, (top, left)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF tag, transparency on white, any mode to RGB."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class Stream(IterableDataset):
    """Endless batches for one rank, from global sample number `start` on.

    Sample n of the stream is a function of (seed, n): epoch n // N reshuffles shards and samples; consecutive batches of it
    go to the ranks in turn, and within a rank to the workers in turn. A sample that cannot be decoded is replaced by another
    of its batch or, if nothing in it can, by the first image of the data set that can.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        resolution: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ):
        self.source, self.config, self.resolution, self.seed = source, config, resolution, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        me, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine: list[tuple[int, Raw]] = []
        first = self.start // self.config.bs // self.world
        for n, raw in self.raw_from(self.start):
            number, rank = divmod(n // self.config.bs, self.world)
            if rank == self.rank and (number - first) % workers == me:
                mine.append((n, raw))
                if len(mine) == self.config.bs:
                    yield self.batch(mine)
                    mine = []

    def raw_from(self, start: int) -> Iterator[tuple[int, Raw]]:
        """(n, raw sample) for n = start, start + 1, …"""
        n = start - start % self.source.samples
        for epoch in count(start // self.source.samples):
            for raw in self.source.walk(random.Random(f"{self.seed} epoch {epoch}")):
                if n >= start:
                    yield n, raw
                n += 1

    @cached_property
    def spare(self) -> Raw:
        """Stands in for a batch of which nothing can be decoded."""
        return first_decodable(self.source, self.resolution)

    def decode(self, raw: Raw, flip: bool) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        return unpack_latents(raw, self.resolution) if self.source.latents else decode(raw, self.resolution, flip)

    def batch(self, samples: list[tuple[int, Raw]]) -> Batch:
        good, skipped = [], []
        for n, raw in samples:
            rng = random.Random(f"{self.seed} sample {n}")
            flip, dropped = rng.random() < 0.5 * self.config.flip, rng.random() < self.config.caption_dropout
            try:
                good.append((*self.decode(raw, flip), "" if dropped else raw.caption))
            except UserError:
                raise
            except Exception:  # whatever a broken file makes Pillow raise: it is named at the end of the run
                skipped.append(raw.name)
        if not good:
            good.append((*self.decode(self.spare, flip=False), self.spare.caption))
        good = [good[i % len(good)] for i in range(len(samples))]
        images, original, crop, captions = zip(*good, strict=True)
        return Batch(torch.from_numpy(np.stack(images)), list(captions), torch.tensor(original), torch.tensor(crop), skipped)


def first_decodable(source: Source, resolution: int) -> Raw:
    """The first image, in an order that never changes, that can be decoded. Raises UserError if there is none."""
    for raw in source.walk(random.Random(0)):
        try:
            unpack_latents(raw, resolution) if source.latents else decode(raw, resolution, flip=False)
            return raw
        except UserError:
            raise
        except Exception:
            continue
    raise UserError(f"--data: none of the {source.samples} images can be decoded")


def make_loader(stream: Stream, pin_memory: bool) -> Iterator[Batch]:
    """Batches decoded ahead of time by --workers processes."""
    options = {"prefetch_factor": 4, "worker_init_fn": ignore_interrupt} if stream.config.workers else {}
    return iter(DataLoader(stream, batch_size=None, num_workers=stream.config.workers, pin_memory=pin_memory, **options))


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the loop, not the workers, decides when to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
