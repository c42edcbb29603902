"""Encodes images once: shards of latents, which training reads instead of them and then needs no VAE.

    python scripts/cache.py shards/ --out latents/ --model sdxl
    torchrun train_lora.py --model sdxl --data latents/ --rank 8 --bs 3

Mean and deviation of every posterior are kept, in float16, so that each epoch draws its own sample of it; with them go the
captions, the original size and the crop. What cannot be decoded is named at the end.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import memory
from checkpoint import check_writable
from data import DataConfig, assign_buckets, decode, describe_buckets, normalise
from errors import UserError, one_line_errors
from sdxl import encode_pixels, load_sdxl, native_resolution, vae_probe
from shards import pack_latents, write_shards
from sources import Source, open_source


@dataclass(frozen=True)
class CacheConfig:
    data: Annotated[str, tyro.conf.Positional]
    """Images, as train_lora.py's --data."""
    out: Path
    """Folder for the shards."""
    name: str = "latents"
    """Shards are called name-000000.tar, name-000001.tar, …"""
    model: str = "demo"
    """Whose VAE; as train_lora.py's --model."""
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
    per_shard: int = 500
    """Samples in a shard."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be a plain file name")
        if self.per_shard < 1:
            raise UserError(f"--per-shard must be at least 1, not {self.per_shard}")


def encoded(source: Source, vae: nn.Module, buckets: list, flip: bool, masked: bool, refused: list[str]) -> Iterator[dict]:
    """Samples of the shards; what cannot be decoded goes to `refused`, with the reason. `buckets` [N]: size for each."""
    probe = vae_probe(vae)

    def encode(pixels: np.ndarray) -> torch.Tensor:
        return encode_pixels(vae, normalise(torch.tensor(pixels)[None].to(vae.device)))[0].cpu()

    for n, bucket in enumerate(tqdm(buckets, unit="img")):
        raw = source.raw(n)
        try:
            pictures = [decode(raw, bucket, mirror, masked) for mirror in ((False, True) if flip else (False,))]
        except Exception as error:  # whatever a broken file makes Pillow raise
            refused.append(f"{raw.name} ({error})")
            continue
        (posterior, crop, *mask), *mirrored = [(encode(pixels), crop, *mask) for pixels, _, crop, *mask in pictures]
        if not all(half.half().isfinite().all() for half in (posterior, *(half for half, *_ in mirrored))):
            refused.append(f"{raw.name} (its latents are not finite in float16)")
            continue
        packed = pack_latents(posterior, pictures[0][1], crop, *mirrored, mask=mask)
        yield {"safetensors": packed, "json": json.dumps({"captions": raw.captions, "vae": probe}, ensure_ascii=False)}


def main(config: CacheConfig) -> None:
    device = memory.resolve_device(config.device)
    source = open_source(config.data)
    if source.latents:
        raise UserError(f"{config.data} holds latents already")
    check_writable("--out", config.out)
    pipe = load_sdxl(config.model, torch.float32, torch.device("cpu"))
    vae = pipe.vae.to(device)  # in float32: it is done once
    resolution = config.resolution or native_resolution(pipe)
    how = DataConfig(resolution=resolution, buckets=config.buckets, bucket_step=config.bucket_step)
    sizes, bucket = assign_buckets(source, how, resolution)
    print(f"{source.samples} images at {resolution} px: {describe_buckets(source, sizes, bucket)}")

    refused: list[str] = []
    samples = encoded(source, vae, [sizes[b] for b in bucket], config.flip, config.masked_loss, refused)
    shards = write_shards(config.out, config.name, samples, config.per_shard)
    print(f"encoded {source.samples - len(refused)} images into {shards} shards in {config.out}/")
    for line in refused:
        print(f"  refused {line}")


if __name__ == "__main__":
    with one_line_errors("cache.py"):
        main(tyro.cli(CacheConfig))
