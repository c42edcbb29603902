"""Encodes images once: shards of latents, which training reads instead of them and then needs no VAE.

    python scripts/cache.py shards/ --out latents/ --model sdxl
    torchrun train_lora.py --model sdxl --data latents/ --rank 8 --bs 3

Mean and deviation of every posterior are kept, in float16, so that each epoch draws its own sample of it; with them go the
caption, the original size and the crop. What cannot be decoded is named at the end. Images cannot be mirrored afterwards.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import memory
from checkpoint import check_writable
from data import Source, decode, open_source, pack_latents, write_shards
from errors import UserError, one_line_errors
from sdxl import encode_pixels, load_sdxl, native_resolution


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
    """Side of the square crop in pixels. None: the model's own."""
    per_shard: int = 500
    """Samples in a shard."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be a plain file name")
        if self.per_shard < 1:
            raise UserError(f"--per-shard must be at least 1, not {self.per_shard}")


def encoded(source: Source, vae: nn.Module, resolution: int, refused: list[str]) -> Iterator[dict]:
    """Samples of the shards; what cannot be decoded goes to `refused`, with the reason."""
    for raw in tqdm(source.walk(random.Random(0)), total=source.samples, unit="img"):
        try:
            pixels, original, crop = decode(raw, resolution, flip=False)
        except Exception as error:  # whatever a broken file makes Pillow raise
            refused.append(f"{raw.name} ({error})")
            continue
        posterior = encode_pixels(vae, torch.from_numpy(pixels)[None].to(vae.device))[0].cpu()
        yield {"safetensors": pack_latents(posterior, original, crop), "txt": raw.caption}


def main(config: CacheConfig) -> None:
    device = memory.resolve_device(config.device)
    source = open_source(config.data)
    if source.latents:
        raise UserError(f"{config.data} holds latents already")
    check_writable("--out", config.out)
    pipe = load_sdxl(config.model, torch.float32, torch.device("cpu"))
    vae = pipe.vae.to(device)  # in float32: it is done once
    resolution = config.resolution or native_resolution(pipe)

    refused: list[str] = []
    shards = write_shards(config.out, config.name, encoded(source, vae, resolution, refused), config.per_shard)
    print(f"encoded {source.samples - len(refused)} images at {resolution} px into {shards} shards in {config.out}/")
    for line in refused:
        print(f"  refused {line}")


if __name__ == "__main__":
    with one_line_errors("cache.py"):
        main(tyro.cli(CacheConfig))
