"""Captioned images -> batches of one bucket each, as an endless stream that is a function of (seed, position).

Each batch is read by itself, wherever it is in the stream: the order depends neither on the number of workers nor on that
of ranks, and a run resumes without reading what was passed.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from common.errors import UserError, printable
from dataset.buckets import Order, Sides, bucket_sizes, choose_buckets, enlarged, resized, share_cropped
from dataset.captions import choose_caption, example_caption, with_trigger
from dataset.disk_cache import Cache
from dataset.images import Decoded, Size, alpha_of, fit, open_image, to_rgb
from dataset.latents import unpack_latents, unpack_text
from dataset.loading import read_by_workers
from dataset.sources import EncodedSample, Source, open_mixture
from options.training import CaptionConfig, CaptionFilesConfig, DataConfig, DataOptions


def open_cache(config: DataOptions) -> Cache | None:
    """Creates --data-cache. Raises UserError if it cannot be written."""
    return Cache(Path(config.data_cache), int(config.data_cache_gb * 1e9)) if config.data_cache else None


def open_data(config: DataConfig, captions: CaptionFilesConfig) -> Source:
    """The images of --data. Raises UserError if they cannot be read, or if cached latents lack what an option needs."""
    source = open_mixture(config.data, open_cache(config), captions)
    if source.has_latents and config.flip and not source.has_mirrored:
        raise UserError("--flip: these latents were made without mirrored images: make them anew with cache_latents.py --flip")
    if source.has_latents and config.masked_loss and not source.has_masks:
        raise UserError(
            "--masked-loss: these latents were made without masks: make them anew with cache_latents.py --masked-loss"
        )
    return source


class Workload(NamedTuple):
    """The properties of the data that decide how much memory a step takes."""

    batch: int  # images
    resolution: int  # pixels: side of the square whose area the images have
    chunks: int  # of 75 tokens that --max-tokens asks for
    shapes: int  # of batches: one for each bucket in use
    has_latents: bool  # the shards hold latents: the VAE does not run
    has_text: bool  # the shards hold encoded captions: the text encoders do not run


@dataclass
class Batch:
    """Samples of one bucket, of h × w pixels, on the host."""

    images: torch.Tensor  # [B, h, w, 3] uint8, or cached VAE posteriors [B, 8, h/8, w/8] float16
    captions: list[str]
    original_size: torch.Tensor  # [B, 2] (h, w) of the source image
    crop: torch.Tensor  # [B, 2] (top, left) in the resized image
    size: torch.Tensor  # [B, 2] (h, w) of the bucket
    names: list[str]
    skipped: list[str]  # images of this batch that could not be decoded, or are left out
    mask: torch.Tensor | None = None  # [B, 1, h/8, w/8] in 0…1 with --masked-loss: the weight of each latent in the loss
    text: tuple[torch.Tensor, ...] = ()  # of encoded captions: context [B, 77, d1 + d2] and pooled [B, d2], float16
    of_prior: list[bool] = field(default_factory=list)  # whether an image is from --prior-data

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        return self


# Samples -> batches.


def decode(raw: EncodedSample, bucket: Size, flip: bool, masked: bool = False) -> Decoded:
    """Encoded image -> pixels of the bucket. Raises ValueError, or what Pillow raises, if it is broken.

    `masked`: with its loss mask, the mean alpha of the 8 × 8 pixels of each latent; transparent pixels then keep their colours
    instead of becoming white.
    """
    image = open_image(raw.image)
    rgb = to_rgb(image, on_white=not masked)
    original = (rgb.height, rgb.width)
    covering = resized(original, bucket)
    pixels, crop = fit(rgb, covering, bucket, flip)
    if not masked:
        return Decoded(pixels, original, crop)
    alpha, _ = fit(alpha_of(image), covering, bucket, flip)  # alone: as a fourth channel it would erase the colours under it
    mask = alpha.reshape(bucket[0] // 8, 8, bucket[1] // 8, 8).mean(axis=(1, 3))
    return Decoded(pixels, original, crop, mask.round().astype(np.uint8))


def assign_buckets(source: Source, config: DataOptions, resolution: int) -> tuple[list[Size], np.ndarray]:
    """(sizes of the buckets, number of each sample's bucket [N]). Latents have their size already.

    Raises UserError if latents are of another resolution.
    """
    packed = packed_sizes(source)
    different, of_sample = np.unique(packed, return_inverse=True)
    shapes = [(int(size) >> 32, int(size) & 0xFFFFFFFF) for size in different]
    sizes = bucket_sizes(resolution, config.bucket_step) if config.buckets else [(resolution, resolution)]
    chosen = np.zeros(len(shapes), int)  # what cannot be read is skipped and named
    if source.has_latents:
        known = {(resolution, resolution), *bucket_sizes(resolution, config.bucket_step)}
        sizes = [size for size in shapes if size != (0, 0)] or [(resolution, resolution)]
        if foreign := set(sizes) - known:
            height, width = min(foreign)
            name = source.name(int(np.argmax(packed == (height << 32 | width))))
            raise UserError(
                f"--data: {name} holds latents of {height} × {width} pixels, "
                f"which is no bucket of --resolution {resolution} and --bucket-step {config.bucket_step}"
            )
        chosen[different > 0] = np.arange(np.count_nonzero(different))
    else:
        readable = np.array([bool(height and width) for height, width in shapes], bool)
        chosen[readable] = choose_buckets((different[readable] >> 32, different[readable] & 0xFFFFFFFF), sizes)
    return sizes, chosen.astype(np.min_scalar_type(len(sizes)))[of_sample]


def packed_sizes(source: Source) -> np.ndarray:
    """[N] height · 2³² + width of each sample, int64: one number is quicker to compare than two."""
    return source.column("height").astype(np.int64) << 32 | source.column("width")


def bucketed(source: Source, sizes: list[Size], bucket: np.ndarray) -> tuple[Sides, Sides, np.ndarray]:
    """(the different sizes of images that can be read, those of their buckets, how many images each has); none of latents."""
    different, first, counts = np.unique(packed_sizes(source), return_index=True, return_counts=True)
    height, width = different >> 32, different & 0xFFFFFFFF
    used = (height > 0) & (width > 0) & (not source.has_latents)
    of_bucket = np.array(sizes)[bucket[first[used]]]
    return (height[used], width[used]), (of_bucket[:, 0], of_bucket[:, 1]), counts[used]


def describe_buckets(source: Source, sizes: list[Size], bucket: np.ndarray) -> str:
    """One line: how many buckets are in use, the share of the images that is cropped away, and how many are enlarged."""
    used = f"{len(np.unique(bucket))} of {len(sizes)} buckets"
    if source.has_latents:
        return used
    originals, buckets, counts = bucketed(source, sizes, bucket)
    cropped = np.average(share_cropped(originals, buckets), weights=counts) if len(counts) else 0
    factors = enlarged(originals, buckets)
    count = counts[factors > 1].sum()
    enlargement = f"{count} images enlarged, by up to {factors.max():.2f}" if count else "none enlarged"
    return f"{used}, {cropped:.1%} of the images cropped away, {enlargement}"


class Sample(NamedTuple):
    """One row of a batch; the values are in the batch already."""

    decoded: Decoded
    name: str
    caption: str
    text: list[torch.Tensor]  # [context [77, d1 + d2], pooled [d2]] of an encoded caption, or []
    of_prior: bool


class BatchBuilder:
    """Collects samples of one bucket. Each is copied into the batch at once: the memory of its pixels is used for the next."""

    def __init__(self, size: int):
        self.size = size
        self.values: np.ndarray | None = None  # [size, …], made with the first sample
        self.samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        """Raises ValueError if its text has another shape than that of the others."""
        values = sample.decoded.values
        if self.samples and [t.shape for t in sample.text] != [t.shape for t in self.samples[0].text]:
            raise ValueError("its text is of another shape")
        if self.values is None:
            self.values = np.empty((self.size, *values.shape), values.dtype)
        self.values[len(self.samples)] = values
        self.samples.append(sample._replace(decoded=sample.decoded._replace(values=np.empty(0))))

    def build(self, bucket: Size, skipped: list[str]) -> Batch:
        """If there are too few samples, they are repeated. There must be one."""
        rows = [i % len(self.samples) for i in range(self.size)]
        samples = [self.samples[i] for i in rows]
        assert self.values is not None
        values = self.values if len(self.samples) == self.size else self.values[rows]
        masks = [sample.decoded.mask for sample in samples if sample.decoded.mask is not None]
        return Batch(
            images=torch.from_numpy(values),
            captions=[sample.caption for sample in samples],
            original_size=torch.tensor([sample.decoded.original for sample in samples]),
            crop=torch.tensor([sample.decoded.crop for sample in samples]),
            size=torch.tensor([bucket] * self.size),
            names=[sample.name for sample in samples],
            skipped=skipped,
            mask=torch.from_numpy(np.stack(masks))[:, None] / 255 if masks else None,
            text=tuple(torch.stack(states) for states in zip(*(sample.text for sample in samples), strict=True)),
            of_prior=[sample.of_prior for sample in samples],
        )


class Stream(IterableDataset):
    """Endless batches for one rank, from global batch number `start` on.

    Batch k of the stream is a function of (seed, k); consecutive batches go to the ranks in turn, and within a rank to the
    workers in turn. A sample that is left out or cannot be decoded is replaced by another of its batch. If that is true of the
    whole batch, it is filled with the first sample of its bucket that can be decoded, or else of the data set; cached latents
    of another bucket then make it a batch of that bucket.
    """

    def __init__(
        self, source: Source, config: DataOptions, captions: CaptionConfig, resolution: int, seed: int,
        rank: int = 0, world: int = 1, has_text: bool = False, start: int = 0,
    ):  # fmt: skip
        """`has_text`: batches hold the encoded captions of the shards."""
        self.source, self.config, self.captions, self.resolution, self.seed = source, config, captions, resolution, seed
        self.rank, self.world, self.start, self.has_text = rank, world, start, has_text
        self.sizes, self.bucket = assign_buckets(source, config, resolution)
        self.left_out: set[str] = set()  # names of samples that spoil training

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        order = Order(self.bucket, self.config.bs, self.seed, self.source.part, self.source.shares, self.source.epoch)
        batches = order.batches(self.start)
        try:
            for draws, samples in islice(batches, self.rank + number * self.world, None, workers * self.world):
                yield self.batch(draws.tolist(), samples.tolist())
        except UserError as error:
            if not worker:
                raise
            yield error  # `batch_or_raise` raises it: DataLoader would put this process's traceback into its text

    def batch(self, draws: list[int], samples: list[int]) -> Batch:
        """The batch of these samples. What is random about one is a function of the number of its draw."""
        builder, bucket = BatchBuilder(len(samples)), self.bucket[samples[0]]
        skipped = []
        for draw, n in zip(draws, samples, strict=True):
            rng, raw = random.Random(f"{self.seed} draw {draw}"), self.source.read_sample(n)
            flip, caption = rng.random() < 0.5 * self.config.flip, choose_caption(raw.captions, self.options_of(raw), rng)
            try:
                builder.add(self.sample(raw, bucket, flip, caption))
            except Exception:  # whatever a broken file makes Pillow raise: it is named at the end of the run
                skipped.append(raw.name)
        if not builder.samples:
            raw, bucket = self.first_decodable(bucket)
            builder.add(self.sample(raw, bucket, False, with_trigger(raw.captions[0], self.options_of(raw))))
        return builder.build(self.sizes[bucket], skipped)

    def options_of(self, raw: EncodedSample) -> CaptionConfig:
        """For the caption of this sample: the prior is what has no trigger."""
        return replace(self.captions, trigger="") if raw.of_prior else self.captions

    def sample(self, raw: EncodedSample, bucket: int, flip: bool, caption: str) -> Sample:
        """Raises whatever a broken file makes Pillow raise, and ValueError if the sample is left out."""
        if raw.name in self.left_out:
            raise ValueError(raw.name)
        text = []
        if self.has_text:  # a dropped caption gets any, which CachedText then replaces
            caption_number = raw.captions.index(caption) if caption else 0
            text = [states[caption_number] for states in unpack_text(raw.image)]
        return Sample(self.decode_for(bucket, raw, flip), raw.name, caption, text, raw.of_prior)

    def decode_for(self, bucket: int, raw: EncodedSample, flip: bool) -> Decoded:
        """Pixels or cached latents, for the bucket of this number. Raises ValueError for latents of another one."""
        size, masked = self.sizes[bucket], self.config.masked_loss
        if not self.source.has_latents:
            return decode(raw, size, flip, masked)
        latents = unpack_latents(raw.image, flip, masked)
        if latents.values.shape[1:] != (size[0] // 8, size[1] // 8):
            raise ValueError("its latents are of another bucket")
        return latents

    def first_decodable(self, bucket: int) -> tuple[EncodedSample, int]:
        """(sample, number of its bucket): the first of this bucket that can be decoded, or else of the data set.

        Raises UserError if there is none.
        """
        for n in chain(map(int, np.flatnonzero(self.bucket == bucket)), range(self.source.samples)):
            if self.source.name(n) in self.left_out:
                continue
            raw, own_bucket = self.source.read_sample(n), self.bucket[n] if self.source.has_latents else bucket
            with suppress(Exception):
                self.decode_for(own_bucket, raw, flip=False)
                return raw, own_bucket
        raise UserError(f"--data: none of the {self.source.samples} images can be decoded")

    @property
    def workload(self) -> Workload:
        chunks, shapes = self.captions.max_tokens // 75, len(np.unique(self.bucket))
        return Workload(self.config.bs, self.resolution, chunks, shapes, self.source.has_latents, self.has_text)

    def example(self) -> str:
        """The first sample's caption as the model gets it, unless it is dropped; '' if it cannot be read."""
        with suppress(UserError):
            return printable(example_caption(self.source.read_sample(0).captions, self.captions, self.seed))
        return ""

    def describe(self) -> str:
        return describe_buckets(self.source, self.sizes, self.bucket)

    def enlargements(self) -> tuple[np.ndarray, np.ndarray]:
        """(factors by which images are scaled to cover their buckets, how many images each holds for); none for latents."""
        originals, buckets, counts = bucketed(self.source, self.sizes, self.bucket)
        return enlarged(originals, buckets), counts


class Loader:
    """Batches of one rank for the training loop, from `position` on, a number of samples over all ranks."""

    def __init__(self, stream: Stream, position: int, left_out: set[str], pin_memory: bool):
        self.stream, self.pin_memory = stream, pin_memory
        self.waited = 0.0  # seconds, of the last `take`
        self.error: UserError | None = None  # why the data can no longer be read
        self.skipped = {*stream.source.uncaptioned, *stream.source.refused}  # names of images that training did not see
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
    """Batches decoded ahead of time by --workers processes. Raises UserError, from the first on, if none can be decoded."""
    batches = read_by_workers(stream, stream.config.workers, pin_memory, prefetch=4)
    return map(batch_or_raise, batches)  # not a generator: the workers start now


def batch_or_raise(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch
