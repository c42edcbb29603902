"""Encodes images once: shards of latents, which training reads instead of them and then needs no VAE.

    python scripts/cache_latents.py shards/ --out latents/ --model sdxl
    torchrun train_lora.py --model sdxl --data latents/ --rank 8 --bs 3
    torchrun --nproc-per-node 2 scripts/cache_latents.py shards/ --out latents/ --model sdxl    a part for each GPU
    python scripts/cache_latents.py shards/ --out latents/ --model sdxl --text 4 --shuffle-tags  for --no-train-text-encoder

Mean and deviation of every posterior are kept, in float16, so that each epoch draws its own sample of it; with them go the
captions, the original size and the crop. What was interrupted goes on with the same command. Run again after a change, it
encodes anew what has changed and takes the rest from what is there: an entry is known by the SHA-256 of its image, bucket
and weights.
"""

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch.utils.data import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.files import check_writable
from data import DataConfig, assign_buckets, decode, describe_buckets, normalise, read_by_workers
from dataset.captions import CaptionConfig, choose_caption
from dataset.latents import LATENTS, pack_latents, unpack_text, with_text
from dataset.shards import Shard, already_there, finish, write_shard
from dataset.sources import File, Source, open_source
from memory import resolve_device
from model.load import native_resolution, read_sdxl
from model.sdxl import Denoiser
from model.text import tokenize
from model.vae import encode_pixels, hash_weights, vae_signature
from run.ranks import Ranks, join_ranks, leave_ranks

FORMAT = "1"  # of an entry: another number makes all of them anew


@dataclass(frozen=True)
class CacheConfig:
    data: Annotated[str, tyro.conf.Positional]
    """Images, as train_lora.py's --data."""
    out: Path
    """Folder for the shards."""
    name: str = "latents"
    """Shards are called name-000000-….tar, name-000001-….tar, …"""
    model: str = "demo"
    """Whose VAE and text encoders; as train_lora.py's --model."""
    resolution: int | None = None
    """Side in pixels of the square whose area the images get. None: the model's own."""
    buckets: bool = True
    """As train_lora.py's --buckets."""
    bucket_step: int = 64
    """As train_lora.py's --bucket-step."""
    flip: bool = False
    """Encode every image mirrored too, so that training may use --flip: twice the work and the size."""
    masked_loss: bool = False
    """As train_lora.py's --masked-loss, which needs it here too: the masks are kept beside the latents."""
    text: int = 0
    """Keep also what the text encoders make of so many variants of the captions: with --no-train-text-encoder training then
    needs neither encoder on the card. 0: none. A variant of SDXL takes 0.3 MB, latents of 1024 × 1024 0.25."""
    shuffle_tags: bool = False
    """As train_lora.py's, for each variant."""
    keep_tags: int = 0
    """As train_lora.py's, for each variant."""
    caption_prefix: str = ""
    """As train_lora.py's, for each variant."""
    per_shard: int = 500
    """Images in a shard."""
    workers: int = 2
    """Processes per rank that read and decode."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be a plain file name")
        for flag, least in (("per_shard", 1), ("workers", 0), ("text", 0)):
            if getattr(self, flag) < least:
                raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, not {getattr(self, flag)}")
        if not self.text and (self.shuffle_tags or self.caption_prefix):
            raise UserError("--shuffle-tags and --caption-prefix do nothing here without --text: training applies them")
        CaptionConfig(shuffle_tags=self.shuffle_tags, keep_tags=self.keep_tags)  # checks them


def sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Inputs, read and decoded by worker processes.


@dataclass
class Entries(Dataset):
    """What entry n of the cache is made of."""

    source: Source
    buckets: list[tuple[int, int]]  # [N] size for each
    config: CacheConfig
    weights: tuple[str, str]  # digests of the VAE and of the text encoders

    def captions(self, image: str, given: list[str]) -> list[str]:
        """What is told of it: those given, or their variants; a function of the image's SHA-256 and of these."""
        asked = self.config
        how = CaptionConfig(shuffle_tags=asked.shuffle_tags, keep_tags=asked.keep_tags, caption_prefix=asked.caption_prefix)
        turns = [(given[k % len(given)], random.Random(f"{image} variant {k}")) for k in range(asked.text)]
        return list(dict.fromkeys(filter(None, (choose_caption([one], how, rng) for one, rng in turns)))) or given

    def __getitem__(self, n: int) -> tuple[str, str]:
        """(SHA-256 of all that its latents depend on, SHA-256 of all that its text does)."""
        raw, asked = self.source.raw(n), self.config
        image = hashlib.sha256(raw.image).hexdigest()
        latents = sha256(FORMAT, image, self.buckets[n], asked.flip, asked.masked_loss, self.weights[0])
        return latents, sha256(FORMAT, self.captions(image, raw.captions), self.weights[1] if asked.text else "")


@dataclass
class Pictures(Dataset):
    """Sample n: (name, captions, its pictures as `data.decode` gives them, as it is and mirrored; or why there are none)."""

    entries: Entries
    skip: set[int]  # whose pictures are not needed

    def __getitem__(self, n: int) -> tuple[str, list[str], list[tuple] | str]:
        entries, raw = self.entries, self.entries.source.raw(n)
        captions = entries.captions(hashlib.sha256(raw.image).hexdigest(), raw.captions)
        if n in self.skip:
            return raw.name, captions, []
        try:
            flips = (False, True) if entries.config.flip else (False,)
            return raw.name, captions, [decode(raw, entries.buckets[n], flip, entries.config.masked_loss) for flip in flips]
        except Exception as error:  # whatever a broken file makes Pillow raise
            return raw.name, captions, str(error)


def ahead(dataset: Dataset, numbers: list[int], workers: int) -> Iterator:
    """These items, in this order."""
    return read_by_workers(dataset, workers, sampler=numbers, collate_fn=lambda item: item)


# Entries of the cache.


class Encoder:
    """The model's half: pictures -> latents, captions -> hidden states, both in float32 as it is done once."""

    def __init__(self, pipe, text: bool, device: torch.device):
        self.vae, self.text, self.device = pipe.vae.to(device), None, device
        self.probes = {"vae": vae_signature(self.vae)}
        if text:
            pipe.text_encoder.to(device), pipe.text_encoder_2.to(device)
            self.text = Denoiser(pipe)
            self.probes["text"] = self.text.text_signature()

    def latents(self, pictures: list[tuple]) -> bytes:
        """Raises ValueError if they are not finite in float16."""
        encoded = [(self.posterior(pixels), crop, *mask) for pixels, _, crop, *mask in pictures]
        if not all(posterior.half().isfinite().all() for posterior, *_ in encoded):
            raise ValueError("its latents are not finite in float16")
        (posterior, crop, *mask), *mirrored = encoded
        return pack_latents(posterior, pictures[0][1], crop, mirrored[0] if mirrored else (), tuple(mask))

    def posterior(self, pixels: np.ndarray) -> torch.Tensor:
        return encode_pixels(self.vae, normalise(torch.tensor(pixels)[None].to(self.device)))[0].cpu()

    @torch.no_grad()
    def states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Context [K, 77, d1 + d2] and pooled [K, d2]; None where text is not asked for."""
        if self.text is None:
            return None
        tokens = tokenize(self.text.tokenizers, captions).to(self.device)
        context, pooled = (torch.cat(states).cpu() for states in zip(*map(self.text.encode_text, tokens.split(8)), strict=True))
        return context, pooled


class Old:
    """Entries that are there from before, by the SHA-256 of what their latents depend on."""

    def __init__(self, folder: Path, there: dict[str, Shard]):
        shards = there.values()
        self.place = {h: (folder / s.name, sample) for s in shards for h, sample in zip(s.hashes, s.samples, strict=True)}

    def read(self, latents_of: str) -> tuple[bytes, dict]:
        """The packed latents and what the .json tells."""
        path, (_, at, size, text_at, text_size, *_) = self.place[latents_of]
        packed, told = File(path).read((at, size), (text_at, text_size))
        return packed, json.loads(told)


def entry(sample: tuple, keys: tuple[str, str], old: Old, encoder: Encoder) -> dict:
    """One sample of a shard, from what is there and what has to be encoded. Raises ValueError if it cannot be used."""
    (_, captions, pictures), (latents_of, text_of) = sample, keys
    told: dict = {}
    if isinstance(pictures, str):
        raise ValueError(pictures)
    if latents_of in old.place:
        packed, told = old.read(latents_of)
    else:
        packed = encoder.latents(pictures)
    kept = encoder.text and told.get("text_of") == text_of
    packed = with_text(packed, unpack_text(packed) if kept else encoder.states(captions))
    about = {"captions": captions, "text_of": text_of, **encoder.probes}
    return {LATENTS: packed, "json": json.dumps(about, ensure_ascii=False)}


def usable(pictures: Iterator, numbers: range, keys: dict, old: Old, encoder: Encoder, refused: list[str]) -> Iterator[tuple]:
    """Samples for `write_shard`; what cannot be used goes to `refused`, with the reason."""
    for n, sample in zip(numbers, islice(pictures, len(numbers)), strict=True):
        try:
            yield f"{n:08d}", entry(sample, keys[n], old, encoder), keys[n][0]
        except ValueError as error:
            refused.append(f"{sample[0]} ({error})")


def main(config: CacheConfig) -> None:
    # Data and model.
    device = resolve_device(config.device)
    ranks = join_ranks(device, timeout=7 * 86400)  # one may be done long before another
    source = open_source(config.data)
    if source.latents:
        raise UserError(f"{config.data} holds latents already")
    if ranks.is_first:
        check_writable("--out", config.out)
    ranks.broadcast(None)  # the others wait for the folder
    pipe = read_sdxl(config.model, torch.float32, unet=False)
    weights = hash_weights(pipe.vae), hash_weights(pipe.text_encoder, pipe.text_encoder_2) if config.text else ""
    encoder = Encoder(pipe, bool(config.text), device)
    resolution = config.resolution or native_resolution(pipe)
    how = DataConfig(resolution=resolution, buckets=config.buckets, bucket_step=config.bucket_step)
    sizes, bucket = assign_buckets(source, how, resolution)
    if ranks.is_first:
        print(f"{source.samples} images at {resolution} px: {describe_buckets(source, sizes, bucket)}", flush=True)

    # What is to be done: this rank's shards, but for those that are there.
    there = already_there(config.out)
    old, entries = Old(config.out, there), Entries(source, [sizes[b] for b in bucket], config, weights)
    runs = [range(n, min(n + config.per_shard, source.samples)) for n in range(0, source.samples, config.per_shard)]
    mine = {number: runs[number] for number in range(ranks.rank, len(runs), ranks.world)}
    numbers = [n for run in mine.values() for n in run]
    looked_at = tqdm(ahead(entries, numbers, config.workers), "looking at the images", len(numbers), disable=not ranks.is_first)
    keys = dict(zip(numbers, looked_at, strict=True))
    made_of = {number: sha256([keys[n] for n in run], config.text) for number, run in mine.items()}
    names = {number: f"{config.name}-{number:06d}-{made_of[number][:8]}.tar" for number in mine}
    todo = [number for number in mine if names[number] not in there]

    # Encoding.
    numbers = [n for number in todo for n in mine[number]]
    pictures = Pictures(entries, {n for n in numbers if keys[n][0] in old.place})
    bar = tqdm(ahead(pictures, numbers, config.workers), "encoding", len(numbers), unit="img", disable=not ranks.is_first)
    pictures = iter(bar)
    for number in todo:
        refused: list[str] = []
        samples = usable(pictures, mine[number], keys, old, encoder, refused)
        write_shard(config.out, names[number], samples, refused, made_of[number])
    next(pictures, None)  # there is none: the bar ends its line
    finish_all(config, ranks.union(set(names.values())), set(old.place), ranks)
    leave_ranks()


def finish_all(config: CacheConfig, names: set[str], old: set[str], ranks: Ranks) -> None:
    """When every rank is done, the first makes the index and tells what was done."""
    if not ranks.is_first:
        return
    there = already_there(config.out)
    shards = [there[name] for name in sorted(names)]
    ours = re.compile(re.escape(config.name) + r"-\d{6}-[0-9a-f]{8}\.tar")
    finish(config.out, shards, {name for name in there if ours.fullmatch(name)})
    hashes = [h for shard in shards for h in shard.hashes]
    kept, written = sum(h in old for h in hashes), sum(bool(shard.samples) for shard in shards)
    print(f"{len(hashes)} images in {written} shards in {config.out}/: {len(hashes) - kept} encoded, {kept} from before")
    for line in (line for shard in shards for line in shard.refused):
        print(f"  refused {line}")


if __name__ == "__main__":
    with one_line_errors("cache_latents.py"):
        main(tyro.cli(CacheConfig, description=__doc__))
