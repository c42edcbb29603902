"""Captioned images -> batches of one bucket each, as an endless stream that is a function of (seed, position).

Each batch is read by itself, wherever it is in the stream: the order depends neither on the number of workers nor on that
of ranks, and a run resumes without reading what was passed.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from common.errors import UserError
from common.options import check_options, option
from common.signals import blocked_signals
from dataset.buckets import Order, bucket_sizes, choose_bucket, enlarged, resized, share_cropped
from dataset.captions import CaptionConfig, choose_caption
from dataset.disk_cache import Cache
from dataset.images import Size, alpha_of, fit, open_image, to_rgb
from dataset.latents import unpack_latents, unpack_text
from dataset.sources import EncodedSample, Source, open_mixture


@dataclass(frozen=True)
class DataConfig:
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = option(())
    """'demo', a folder of tar shards (of images or of latents), a brace pattern (shards/{000000..000012}.tar), a folder of
    captioned images, or parquet files (columns image and text: packed into ~/.cache once); the shards also at http(s)://,
    s3://, gs:// or hf:// (a dataset's: hf://datasets/name/of/…). With :3 after it, its weight in a mixture. Again for another.
    None: demo."""
    data_cache: str | None = option(None, resume="free")
    """Folder on a disk nearby for what is loaded from elsewhere; every process of the host may use the same. None: each epoch
    loads everything again."""
    data_cache_gb: float = option(10.0, above=0, resume="free")
    """Gigabytes that it may take: what was not used for longest makes room."""
    bs: int = option(3, at_least=1)
    """Images per step, process and accumulation."""
    resolution: int | None = option(None, at_least=64, multiple_of=8)
    """Side in pixels of the square whose area the images get. None: the model's own (1024 for SDXL)."""
    buckets: bool = option(True)
    """Aspect-ratio buckets of that area: an image keeps its shape as far as one has it. Off: the square in its middle."""
    bucket_step: int = option(64, at_least=8, multiple_of=8)
    """Sides of the buckets are multiples of so many pixels."""
    flip: bool = option(False)
    """Mirror every second image at random."""
    masked_loss: bool = option(False)
    """Alpha is a loss mask: what is transparent keeps its own colours, instead of white, and is not learned."""
    workers: int = option(2, at_least=0, resume="free")
    """Processes per rank that read and decode."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def cache(self) -> Cache | None:
        return Cache(Path(self.data_cache), int(self.data_cache_gb * 1e9)) if self.data_cache else None


def open_data(config: DataConfig) -> Source:
    """The images of --data. Raises UserError if they cannot be read, or if ready-made latents lack what an option needs."""
    source = open_mixture(config.data, config.cache)
    if source.has_latents and config.flip and not source.has_mirrored:
        raise UserError("--flip: these latents were made without mirrored images: make them anew with cache_latents.py --flip")
    if source.has_latents and config.masked_loss and not source.has_masks:
        raise UserError(
            "--masked-loss: these latents were made without masks: make them anew with cache_latents.py --masked-loss"
        )
    return source


class Workload(NamedTuple):
    """What of the data decides how much memory a step takes."""

    batch: int  # images
    resolution: int  # pixels: side of the square whose area the images have
    chunks: int  # pieces of 75 tokens in the longest caption
    shapes: int  # of batches that differ in their bucket or in their number of chunks
    has_latents: bool  # the shards hold latents: the VAE does not run
    has_text: bool  # the shards hold encoded captions: the text encoders do not run


@dataclass
class Batch:
    images: torch.Tensor  # pixels [B, h, w, 3] uint8, or ready-made posteriors [B, 8, h/8, w/8] float16
    captions: list[str]
    original_size: torch.Tensor  # [B, 2] (h, w) of the source image
    crop: torch.Tensor  # [B, 2] (top, left) in the resized image
    size: torch.Tensor  # [B, 2] (h, w) of the bucket
    names: list[str]
    skipped: list[str]  # images of this batch that could not be decoded, or are left out
    mask: torch.Tensor | None = None  # [B, 1, h/8, w/8] in 0…1 with --masked-loss: the weight of each latent in the loss
    text: tuple[torch.Tensor, ...] = ()  # of encoded captions: context [B, 77, d1 + d2] and pooled [B, d2], float16

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        return self


# Samples -> batches.


def decode(
    raw: EncodedSample, bucket: Size, flip: bool, masked: bool = False
) -> tuple[np.ndarray, Size, Size, *tuple[np.ndarray, ...]]:
    """Encoded image -> pixels [h, w, 3] uint8 of the bucket, original (h, w), crop (top, left) of the resized image.

    `masked`: and its loss mask [h/8, w/8] uint8, the mean alpha of the 8 × 8 pixels of each latent; transparency is not put
    on white then. Raises ValueError, or what Pillow raises, if it is broken.
    """
    encoded = open_image(raw.image)
    image = to_rgb(encoded, on_white=not masked)
    original = (image.height, image.width)
    covering = resized(original, bucket)
    pixels, crop = fit(image, covering, bucket, flip)
    if not masked:
        return pixels, original, crop
    alpha, _ = fit(alpha_of(encoded), covering, bucket, flip)  # alone: as a fourth channel it would erase the colours under it
    mask = alpha.reshape(bucket[0] // 8, 8, bucket[1] // 8, 8).mean(axis=(1, 3))
    return pixels, original, crop, mask.round().astype(np.uint8)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Pixels [B, h, w, 3] uint8 -> [B, 3, h, w] float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def assign_buckets(source: Source, config: DataConfig, resolution: int) -> tuple[list[Size], np.ndarray]:
    """(sizes of the buckets, number of each sample's bucket [N]). Latents have their size already.

    Raises UserError if latents are of another resolution.
    """
    pixels = list(zip(source.places["height"].tolist(), source.places["width"].tolist(), strict=True))
    sizes = bucket_sizes(resolution, config.bucket_step) if config.buckets else [(resolution, resolution)]
    choose: Callable[[Size], int] = partial(choose_bucket, sizes=sizes)
    if source.has_latents:
        known = {(resolution, resolution), *bucket_sizes(resolution, config.bucket_step)}
        sizes = sorted(set(pixels) - {(0, 0)}) or [(resolution, resolution)]
        if foreign := set(sizes) - known:
            height, width = min(foreign)
            raise UserError(
                f"--data: {source.names[pixels.index((height, width))]} holds latents of {height} × {width} pixels, "
                f"which is no bucket of --resolution {resolution} and --bucket-step {config.bucket_step}"
            )
        choose = sizes.index
    chosen = {size: choose(size) if all(size) else 0 for size in set(pixels)}  # what cannot be read is skipped and named
    return sizes, np.array([chosen[size] for size in pixels])


def describe_buckets(source: Source, sizes: list[Size], bucket: np.ndarray) -> str:
    """One line: how many buckets are in use, the share of the images that is cropped away, and how many are enlarged."""
    used = f"{len(np.unique(bucket))} of {len(sizes)} buckets"
    if source.has_latents:
        return used
    pixels = zip(source.places["height"].tolist(), source.places["width"].tolist(), strict=True)
    pairs = [(size, sizes[b]) for size, b in zip(pixels, bucket, strict=True) if all(size)]
    cropped = np.mean([share_cropped(*pair) for pair in pairs]) if pairs else 0
    factors = [factor for pair in pairs if (factor := enlarged(*pair)) > 1]
    enlargement = f"{len(factors)} images enlarged, by up to {max(factors):.2f}" if factors else "none enlarged"
    return f"{used}, {cropped:.1%} of the images cropped away, {enlargement}"


class Stream(IterableDataset):
    """Endless batches for one rank, from global batch number `start` on. `text`: with the encoded captions of the shards.

    Batch k of the stream is a function of (seed, k); consecutive batches go to the ranks in turn, and within a rank to the
    workers in turn. A sample that cannot be decoded, or is left out, is replaced by another of its batch or, if nothing in it
    can, by the first of its bucket, or of the data set, that can: latents of another bucket then make it a batch of that one.
    """

    def __init__(
        self, source: Source, config: DataConfig, captions: CaptionConfig, resolution: int, seed: int,
        rank: int = 0, world: int = 1, start: int = 0, text: bool = False,
    ):  # fmt: skip
        self.source, self.config, self.captions, self.seed, self.text = source, config, captions, seed, text
        self.resolution = resolution
        self.sizes, self.bucket = assign_buckets(source, config, resolution)
        self.rank, self.world, self.start = rank, world, start
        self.left_out: set[str] = set()  # names of samples that spoil training

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        me, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        order = Order(self.bucket, self.config.bs, self.seed, self.source.part, self.source.shares)
        batches = order.batches(self.start)
        try:
            for draws, samples in islice(batches, self.rank + me * self.world, None, workers * self.world):
                yield self.batch(draws.tolist(), samples.tolist())
        except UserError as error:
            if not worker:
                raise
            yield error  # `make_loader` raises it: DataLoader would put this process's traceback into its text

    def decode(self, raw: EncodedSample, bucket: int, flip: bool) -> tuple[np.ndarray, Size, Size, *tuple[np.ndarray, ...]]:
        size, masked = self.sizes[bucket], self.config.masked_loss
        if not self.source.has_latents:
            return decode(raw, size, flip, masked)
        latents = unpack_latents(raw.image, flip, masked)
        if latents[0].shape[1:] != (size[0] // 8, size[1] // 8):
            raise ValueError("its latents are of another bucket")
        return latents

    def first_decodable(self, bucket: int) -> tuple[EncodedSample, int]:
        """A sample for a batch of which nothing can be decoded, and its bucket: the first of `bucket`, or of the data set.

        Raises UserError if there is none.
        """
        for n in [*np.flatnonzero(self.bucket == bucket), *range(self.source.samples)]:
            if self.source.names[n] in self.left_out:
                continue
            raw, fits = self.source.read_sample(n), self.bucket[n] if self.source.has_latents else bucket
            with suppress(Exception):
                self.decode(raw, fits, flip=False)
                return raw, fits
        raise UserError(f"--data: none of the {self.source.samples} images can be decoded")

    def encoded(self, raw: EncodedSample, caption: str) -> list[torch.Tensor]:
        """[context, pooled] of a sample's caption, or [] without `text`. Those of the empty caption are put in later."""
        return [states[raw.captions.index(caption) if caption else 0] for states in unpack_text(raw.image)] if self.text else []

    def batch(self, draws: list[int], samples: list[int]) -> Batch:
        """The batch of these samples; the numbers of the draws decide what is random about each."""
        rows: list[tuple] = []  # of what was decoded: original size, crop, caption, name, text, mask if there is one
        skipped, bucket = [], self.bucket[samples[0]]
        images: np.ndarray | None = None

        def add(raw: EncodedSample, flip: bool, caption: str) -> None:
            nonlocal images
            if raw.name in self.left_out:
                raise ValueError(raw.name)
            (pixels, original, crop, *mask), text = self.decode(raw, bucket, flip), self.encoded(raw, caption)
            if rows and [states.shape for states in text] != [states.shape for states in rows[0][4]]:
                raise ValueError("its text is of another shape")
            if images is None:
                images = np.empty((len(samples), *pixels.shape), pixels.dtype)
            images[len(rows)] = pixels  # at once: memory that is given back while it is warm makes the next image faster
            rows.append((original, crop, caption, raw.name, text, *mask))

        for draw, n in zip(draws, samples, strict=True):
            rng, raw = random.Random(f"{self.seed} draw {draw}"), self.source.read_sample(n)
            flip, caption = rng.random() < 0.5 * self.config.flip, choose_caption(raw.captions, self.captions, rng)
            try:
                add(raw, flip, caption)
            except Exception:  # whatever a broken file makes Pillow raise: it is named at the end of the run
                skipped.append(raw.name)
        if not rows:
            raw, bucket = self.first_decodable(bucket)
            add(raw, False, raw.captions[0])
        repeated = [i % len(rows) for i in range(len(samples))]  # a sample takes the place of one that was skipped
        assert images is not None  # made with the first
        pixels = torch.from_numpy(images if len(rows) == len(samples) else images[repeated])
        original, crop, captions, names, text, *masks = zip(*(rows[i] for i in repeated), strict=True)
        text = tuple(torch.stack(states) for states in zip(*text, strict=True))
        mask = torch.from_numpy(np.stack(masks[0]))[:, None] / 255 if masks else None
        size = torch.tensor([self.sizes[bucket]] * len(samples))
        return Batch(pixels, list(captions), torch.tensor(original), torch.tensor(crop), size, list(names), skipped, mask, text)

    @property
    def workload(self) -> Workload:
        chunks = self.captions.max_tokens // 75
        shapes = len(set(self.bucket)) * chunks
        return Workload(self.config.bs, self.resolution, chunks, shapes, self.source.has_latents, self.text)

    def describe(self) -> str:
        return describe_buckets(self.source, self.sizes, self.bucket)


class Loader:
    """Batches of one rank for the training loop, from `position` on, a number of samples over all ranks."""

    def __init__(self, stream: Stream, position: int, left_out: set[str], pin_memory: bool):
        self.stream, self.pin_memory = stream, pin_memory
        self.waited = 0.0  # seconds, of the last `take`
        self.error: UserError | None = None  # why the data can no longer be read
        self.skipped = set(stream.source.uncaptioned)  # names of images that training did not see
        self.restart(position, left_out)

    def restart(self, position: int, left_out: set[str]) -> None:
        """Goes on at `position` without the samples named in `left_out`. Batches that were read ahead are dropped."""
        self.stream.left_out, self.stream.start = left_out, position // self.stream.config.bs
        self.batches = make_loader(self.stream, self.pin_memory)

    def take(self, count: int, wait: Callable[..., list[Batch] | None]) -> list[Batch]:
        """The next `count` batches; [] if a signal ends `wait` (StopRequest.wait) before they come, or on an `error`."""
        begin, batches = time.perf_counter(), None
        try:
            batches = wait(list, islice(self.batches, count))
        except UserError as error:
            self.error = error
        self.waited = time.perf_counter() - begin
        self.skipped.update(*(batch.skipped for batch in batches or []))
        return batches or []


def make_loader(stream: Stream, pin_memory: bool) -> Iterator[Batch]:
    """Batches decoded ahead of time by --workers processes. Raises UserError, from the first on, if none can be decoded.

    `pin_memory` is for the workers' batches: without workers, the thread that asks for one would do it on the wrong device.
    """
    workers = stream.config.workers
    options = {"pin_memory": pin_memory, "prefetch_factor": 4} if workers else {}
    return map(batch_or_raise, read_by_workers(stream, workers, **options))  # not a generator: the workers start now


def read_by_workers(dataset: Dataset, workers: int, **options) -> Iterator:
    """The items of a DataLoader that makes no batches, read by processes that leave signals to this one."""
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, worker_init_fn=leave_signals_to_the_loop if workers else None, **options
    )
    with blocked_signals():
        return iter(loader)


def batch_or_raise(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def leave_signals_to_the_loop(worker: int) -> None:
    """Signals reach every process of the terminal, or of the job; the loop, not the workers, decides when to end.

    Only a SIGTERM from the loop's own process ends a worker. It starts with all signals blocked.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=wait_for_the_end, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    sys.excepthook = hide_lost_connection


def wait_for_the_end() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def hide_lost_connection(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """multiprocessing's threads, which hand tensors on, report here, also that the loop has ended or was killed."""
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)
