"""Encodes images once into shards of latents. Training reads these instead of the images and needs no VAE.

    python scripts/cache_latents.py shards/ --out latents/ --model sdxl
    torchrun train_lora.py --model sdxl --data latents/ --rank 8 --bs 3
    torchrun --nproc-per-node 2 scripts/cache_latents.py shards/ --out latents/ --model sdxl    shared by 2 GPUs
    python scripts/cache_latents.py shards/ --out latents/ --model sdxl --text 4 --shuffle-tags  for --no-train-text-encoder

Mean and standard deviation of every posterior are kept, in float16, so that each epoch can draw a new sample from it; and the
captions, the original size and the crop. Run the same command again after an interruption: it continues. After a change of the
images or options it encodes only what has changed: an entry is identified by the SHA-256 of its image, bucket and weights.
"""

import hashlib
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import check_options, option
from options.command import parse_command
from options.training import CaptionConfig, CaptionFilesConfig, DataOptions


@dataclass(frozen=True)
class CacheConfig:
    data: Annotated[str, tyro.conf.Positional]
    """The images: one value of train_lora.py's --data."""
    out: Path
    """Folder for the shards."""
    replace: bool = False
    """Replace the latents of another source in --out."""
    caption_files: CaptionFilesConfig = CaptionFilesConfig()
    name: str = "latents"
    """Shards are called name-000000-….tar, name-000001-….tar, …"""
    model: str = "demo"
    """The model whose VAE and text encoders are used, as train_lora.py's --model."""
    resolution: int | None = None
    """Side in pixels of the square whose area the images get. None: the model's own."""
    buckets: bool = True
    """As train_lora.py's --buckets."""
    bucket_step: int = 64
    """As train_lora.py's --bucket-step."""
    flip: bool = False
    """Encode every image mirrored too, so that training may use --flip: twice the work and the size."""
    masked_loss: bool = False
    """Also keep the loss masks, which train_lora.py's --masked-loss then needs."""
    text: int = option(0, at_least=0)
    """Also keep the hidden states of so many variants of the captions, more if it takes more until each caption has as many as
    any other: with --no-train-text-encoder training then needs neither text encoder on the GPU. 0: none. With SDXL a variant
    takes 0.3 MB, the latents of 1024 × 1024 pixels 0.25 MB."""
    shuffle_tags: bool = False
    """As train_lora.py's --shuffle-tags, for each variant."""
    keep_tags: int = 0
    """As train_lora.py's --keep-tags, for each variant."""
    trigger: str = ""
    """As train_lora.py's --trigger, for each variant."""
    per_shard: int = option(500, at_least=1)
    """Images in a shard."""
    workers: int = option(2, at_least=0)
    """Processes per rank that read and decode."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu', 'mps'."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be a plain file name")
        check_options(self)
        if not self.text and (self.shuffle_tags or self.trigger):
            raise UserError("--shuffle-tags and --trigger do nothing here without --text: training applies them")
        CaptionConfig(shuffle_tags=self.shuffle_tags, keep_tags=self.keep_tags)  # checks them


if __name__ == "__main__":
    COMMAND = parse_command("cache_latents.py", CacheConfig, __doc__)

import numpy as np
import torch
from torch.utils.data import Dataset

from common.files import check_writable
from common.progress import tqdm
from data import assign_buckets, decode, describe_buckets
from dataset.captions import choose_caption
from dataset.images import Decoded
from dataset.latents import LATENTS, pack_latents, unpack_text, with_text
from dataset.loading import read_by_workers
from dataset.shards import Shard, already_there, claim, finish, write_shard
from dataset.sources import File, Source, open_source
from memory import resolve_device
from model.check import describe_model
from model.load import native_resolution, read_sdxl
from model.sdxl import Denoiser
from model.text import tokenize
from model.vae import encode_pixels, hash_weights, normalise, vae_signature
from run.ranks import Ranks, join_ranks, leave_ranks

FORMAT = "1"  # of an entry: with another number all entries are made anew


def sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Inputs, read and decoded by worker processes.


@dataclass
class Keys(Dataset):
    """Item n: the keys of entry n of the cache, which change with everything that its latents or its text depend on."""

    source: Source
    buckets: list[tuple[int, int]]  # [N] size of each image's bucket
    config: CacheConfig
    weights: tuple[str, str]  # digests of the VAE and of the text encoders

    def captions(self, image: str, captions: list[str]) -> list[str]:
        """The captions that are kept: with --text, variants drawn by a generator that the image's SHA-256 `image` seeds, as
        many of each caption as of any other, so that each keeps its share of the draws.
        """
        c = self.config
        options = CaptionConfig(shuffle_tags=c.shuffle_tags, keep_tags=c.keep_tags, trigger=c.trigger)
        variants = -(-c.text // len(captions)) * len(captions)
        drawn = Counter(
            choose_caption([captions[k % len(captions)]], options, random.Random(f"{image} variant {k}"))
            for k in range(variants)
        )
        shared = math.gcd(*drawn.values())  # without needless repetitions
        return [caption for caption, number in drawn.items() for _ in range(number // shared) if caption] or captions

    def __getitem__(self, n: int) -> tuple[str, str]:
        """(SHA-256 of all that the latents depend on, SHA-256 of all that the text depends on)."""
        raw, config = self.source.read_sample(n), self.config
        image = hashlib.sha256(raw.image).hexdigest()
        latents = sha256(FORMAT, image, self.buckets[n], config.flip, config.masked_loss, self.weights[0])
        return latents, sha256(FORMAT, self.captions(image, raw.captions), self.weights[1] if config.text else "")


@dataclass
class Pictures(Dataset):
    """Item n: (name, captions, the decoded image and, with --flip, its mirror image; or why it cannot be decoded)."""

    keys: Keys
    skip: set[int]  # numbers of samples whose pictures are not needed

    def __getitem__(self, n: int) -> tuple[str, list[str], list[Decoded] | str]:
        keys, raw = self.keys, self.keys.source.read_sample(n)
        captions = keys.captions(hashlib.sha256(raw.image).hexdigest(), raw.captions)
        if n in self.skip:
            return raw.name, captions, []
        try:
            flips = (False, True) if keys.config.flip else (False,)
            return raw.name, captions, [decode(raw, keys.buckets[n], flip, keys.config.masked_loss) for flip in flips]
        except Exception as error:  # whatever a broken file makes Pillow raise
            return raw.name, captions, str(error)


def read_in_order(dataset: Dataset, numbers: list[int], workers: int) -> Iterator:
    """dataset[n] for n in `numbers`, by worker processes. As `collate_fn` does nothing, NumPy arrays do not become tensors."""
    return read_by_workers(dataset, workers, sampler=numbers, collate_fn=lambda item: item)


# Entries of the cache.


class Encoder:
    """Pictures -> latents, captions -> hidden states, by the model in float32: the time is spent only once."""

    def __init__(self, pipe, text: bool, device: torch.device):
        self.vae, self.text, self.device = pipe.vae.to(device), None, device
        self.signatures = {"vae": vae_signature(self.vae)}
        if text:
            pipe.text_encoder.to(device), pipe.text_encoder_2.to(device)
            self.text = Denoiser(pipe)
            self.signatures["text"] = self.text.text_signature()

    def latents(self, pictures: list[Decoded]) -> bytes:
        """An image, and its mirror image if any -> packed latents.

        Raises ValueError if they are not finite in float16.
        """
        latents = [picture._replace(values=self.posterior(picture.values)) for picture in pictures]
        if not all(torch.from_numpy(part.values).half().isfinite().all() for part in latents):
            raise ValueError("its latents are not finite in float16")
        return pack_latents(*latents)

    def posterior(self, image: np.ndarray) -> np.ndarray:
        """Image [h, w, 3] uint8 -> mean and standard deviation [8, h/8, w/8] float32."""
        return encode_pixels(self.vae, normalise(torch.tensor(image)[None].to(self.device)))[0].cpu().numpy()

    @torch.no_grad()
    def states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Context [K, 77, d1 + d2] and pooled [K, d2]; None without --text."""
        if self.text is None:
            return None
        tokens = tokenize(self.text.tokenizers, captions).to(self.device)
        context, pooled = (torch.cat(states).cpu() for states in zip(*map(self.text.encode_text, tokens.split(8)), strict=True))
        return context, pooled


class Cached:
    """Entries in existing shards, by the key of their latents."""

    def __init__(self, folder: Path, existing: dict[str, Shard]):
        shards = existing.values()
        self.places = {h: (folder / s.name, sample) for s in shards for h, sample in zip(s.hashes, s.samples, strict=True)}

    def read(self, latents_key: str) -> tuple[bytes, dict]:
        """The packed latents and the contents of the .json."""
        path, (_, at, size, text_at, text_size, *_) = self.places[latents_key]
        packed, metadata = File(path).read((at, size), (text_at, text_size))
        return packed, json.loads(metadata)


def make_entry(sample: tuple, keys: tuple[str, str], cached: Cached, encoder: Encoder) -> dict:
    """An item of `Pictures` -> {extension: content}. Encodes what is not cached. Raises ValueError if it cannot be used."""
    (_, captions, pictures), (latents_key, text_key) = sample, keys
    metadata: dict = {}
    if isinstance(pictures, str):
        raise ValueError(pictures)
    if latents_key in cached.places:
        packed, metadata = cached.read(latents_key)
    else:
        packed = encoder.latents(pictures)
    keep_text = encoder.text and metadata.get("text_of") == text_key
    packed = with_text(packed, unpack_text(packed) if keep_text else encoder.states(captions))
    metadata = {"captions": captions, "text_of": text_key, **encoder.signatures}
    return {LATENTS: packed, "json": json.dumps(metadata, ensure_ascii=False)}


def make_entries(
    pictures: Iterator, numbers: range, keys: dict, cached: Cached, encoder: Encoder, refused: list[str]
) -> Iterator[tuple]:
    """Samples for `write_shard`. Those that cannot be used are added to `refused`, with the reason."""
    for n, sample in zip(numbers, islice(pictures, len(numbers)), strict=True):
        try:
            yield f"{n:08d}", make_entry(sample, keys[n], cached, encoder), keys[n][0]
        except ValueError as error:
            refused.append(f"{sample[0]} ({error})")


def main(config: CacheConfig) -> None:
    # Data and model.
    device = resolve_device(config.device)
    ranks = join_ranks(device, timeout=7 * 86400)  # seconds: a rank that is done waits for the others
    source = open_source(config.data, captions=config.caption_files)
    if source.has_latents:
        raise UserError(f"{config.data} holds latents already")
    if ranks.is_first:
        check_writable("--out", config.out)
        claim(config.out, config.data, config.replace)
    ranks.broadcast(None)  # the others wait until the folder exists
    pipe = read_sdxl(config.model, torch.float32, unet=False)
    weights = hash_weights(pipe.vae), hash_weights(pipe.text_encoder, pipe.text_encoder_2) if config.text else ""
    encoder = Encoder(pipe, bool(config.text), device)
    resolution = config.resolution or native_resolution(pipe)
    options = DataOptions(resolution=resolution, buckets=config.buckets, bucket_step=config.bucket_step)
    sizes, bucket = assign_buckets(source, options, resolution)
    if ranks.is_first:
        print(f"{source.samples} images at {resolution} px: {describe_buckets(source, sizes, bucket)}", flush=True)
        print("\n".join(f"  {line}" for line in (source.account(), *source.left_out())), flush=True)
        print(f"model {config.model}: predicts {describe_model(pipe)}", flush=True)

    # This rank's shards, and which of them have to be written.
    existing = already_there(config.out)
    cached, entry_keys = Cached(config.out, existing), Keys(source, [sizes[b] for b in bucket], config, weights)
    runs = [range(n, min(n + config.per_shard, source.samples)) for n in range(0, source.samples, config.per_shard)]
    runs_of_rank = {number: runs[number] for number in range(ranks.rank, len(runs), ranks.world)}
    numbers = [n for run in runs_of_rank.values() for n in run]
    items = read_in_order(entry_keys, numbers, config.workers)
    bar = tqdm(items, "looking at the images", len(numbers), disable=not ranks.is_first)
    keys = dict(zip(numbers, bar, strict=True))
    repeats = {number: source.repeats_of(run.start, run.stop) for number, run in runs_of_rank.items()}
    made_of = {i: sha256([keys[n] for n in run], config.text, *repeats[i]) for i, run in runs_of_rank.items()}
    names = {number: f"{config.name}-{number:06d}-{made_of[number][:8]}.tar" for number in runs_of_rank}
    todo = [number for number in runs_of_rank if names[number] not in existing]

    # Encoding.
    numbers = [n for number in todo for n in runs_of_rank[number]]
    items = read_in_order(Pictures(entry_keys, {n for n in numbers if keys[n][0] in cached.places}), numbers, config.workers)
    pictures = iter(tqdm(items, "encoding", len(numbers), unit="img", disable=not ranks.is_first))
    for number in todo:
        refused: list[str] = []
        samples = make_entries(pictures, runs_of_rank[number], keys, cached, encoder, refused)
        times = {f"{n:08d}": times for n, times in zip(runs_of_rank[number], repeats[number], strict=False)}
        write_shard(config.out, names[number], samples, refused, made_of[number], repeats=times)
    next(pictures, None)  # reads past the last item, so that tqdm closes the bar
    finish_all(config, ranks.union(set(names.values())), set(cached.places), ranks)
    leave_ranks()


def finish_all(config: CacheConfig, names: set[str], cached: set[str], ranks: Ranks) -> None:
    """On the first rank: writes the index and prints a summary. `cached`: keys of the latents that existed before."""
    if not ranks.is_first:
        return
    existing = already_there(config.out)
    shards = [existing[name] for name in sorted(names)]
    finish(config.out, shards)
    hashes = [h for shard in shards for h in shard.hashes]
    kept, written = sum(h in cached for h in hashes), sum(bool(shard.samples) for shard in shards)
    print(f"{len(hashes)} images in {written} shards in {config.out}/: {len(hashes) - kept} encoded, {kept} from before")
    for line in (line for shard in shards for line in shard.refused):
        print(f"  refused {line}")


if __name__ == "__main__":
    with one_line_errors("cache_latents.py"):
        main(COMMAND)
