"""Measures how fast one core makes batches of images, compared with decoding alone, and of latents; and the memory for it.

    python scripts/dev/bench_data.py

Writes about a hundred files to a temporary folder. For comparison: on an H100, training needs 5 to 18 images a second.
"""

import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.errors import one_line_errors
from common.progress import tqdm
from data import Stream
from dataset.images import Decoded
from dataset.latents import pack_latents
from dataset.shards import finish, write_shard
from dataset.sources import open_source
from options.command import parse_command
from options.training import CaptionConfig, DataConfig


@dataclass(frozen=True)
class BenchDataConfig:
    rounds: int = 15
    """How often each case is measured, alternating with the others. Prints the median."""
    photos: int = 30
    """Number of JPEGs of each size."""
    latents: int = 2000
    """Number of samples with cached latents."""
    drawn: int = 100_000
    """How many samples the memory measurement draws from the latents, over many epochs."""


def photo(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG as large as a photograph's would be. `size`: (width, height) in pixels."""
    coarse = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise = rng.normal(0, 6, (size[1], size[0], 3))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + noise
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def pillow_alone(files: list[Path]) -> Callable[[], int]:
    """A function that decodes all `files` by Pillow and returns their number."""

    def work() -> int:
        for file in files:
            Image.open(file).load()
        return len(files)

    return work


def write_samples(folder: Path, samples: Iterable[dict]) -> None:
    """Samples {extension: content} -> a shard in the folder, with its index."""
    keyed = ((f"{n:07d}", sample, "") for n, sample in enumerate(samples))
    finish(folder, [write_shard(folder, "shard-000000.tar", keyed)])


def batches(folder: Path, images: int) -> Callable[[], int]:
    """A function that makes the next batches of 3 in this process, about `images` images, and returns their number."""
    config = DataConfig(bs=3, workers=0)
    stream = Stream(open_source(str(folder)), config, CaptionConfig(), 1024, seed=0)

    def work() -> int:
        return 3 * sum(1 for _ in islice(stream, images // 3))

    return work


def main(config: BenchDataConfig) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder, jobs = Path(name), {}
        for what, size in {"1024 × 1024": (1024, 1024), "1600 × 1067": (1600, 1067)}.items():
            (folder / what).mkdir()
            files = [photo(rng, size) for _ in tqdm(range(config.photos), desc=what, leave=False)]
            write_samples(folder / what, ({"jpg": file, "txt": "a picture"} for file in files))
            loose = [folder / what / f"{i}.jpg" for i in range(config.photos)]
            for path, encoded in zip(loose, files, strict=True):
                path.write_bytes(encoded)
            jobs[f"{what} JPEG, Pillow alone"] = pillow_alone(loose)
            jobs[f"{what} JPEG, batches"] = batches(folder / what, config.photos)
        (folder / "latents").mkdir()
        posterior = torch.randn(8, 128, 128)
        samples = (
            {"safetensors": pack_latents(Decoded(posterior.numpy(), (1024, 1024), (0, 0))), "txt": "a picture"}
            for _ in range(config.latents)
        )
        write_samples(folder / "latents", samples)
        jobs["latents of 1024 × 1024, batches"] = batches(folder / "latents", config.latents)

        rates: dict[str, list[float]] = {what: [] for what in jobs}
        for _ in range(config.rounds):
            for what, work in jobs.items():
                start = time.perf_counter()
                rates[what].append(work() / (time.perf_counter() - start))
        for what, measured in rates.items():
            pillow = rates.get(what.replace("batches", "Pillow alone"), measured)
            ratio = median(a / b for a, b in zip(measured, pillow, strict=True))  # within each round: the clock may drift
            comparison = f", {ratio:.2f} of Pillow alone" if pillow is not measured else ""
            print(f"{median(measured):10.1f} a second   {what}{comparison}")

        stream = iter(Stream(open_source(str(folder / "latents")), DataConfig(bs=100), CaptionConfig(), 1024, seed=0))
        peaks = []
        for drawn in range(100, config.drawn + 1, 100):
            next(stream)
            if drawn in (100, config.drawn // 200 * 100, config.drawn):
                peaks.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB after {drawn:,}")
        print(f"peak memory, latents: {', '.join(peaks)}")


if __name__ == "__main__":
    with one_line_errors("bench_data.py"):
        main(parse_command("bench_data.py", BenchDataConfig, __doc__))
