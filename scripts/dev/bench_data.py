"""How fast one core makes batches: against bare decoding by Pillow, from ready-made latents, and with what memory.

    python scripts/dev/bench_data.py

Writes some hundred files to a temporary folder. Training takes 5 to 18 images a second on an H100.
"""

import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.errors import one_line_errors
from data import DataConfig, Stream
from dataset.captions import CaptionConfig
from dataset.latents import pack_latents
from dataset.shards import write_shards
from dataset.sources import open_source


@dataclass(frozen=True)
class BenchDataConfig:
    rounds: int = 15
    """Each is measured so often, in turn with the others; the median counts."""
    photos: int = 30
    """JPEGs of each size."""
    latents: int = 2000
    """Ready-made samples."""
    drawn: int = 100_000
    """Of them, again and again, while the memory is watched."""


def photo(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG with the detail of a photograph: (width, height) in pixels."""
    coarse = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise = rng.normal(0, 6, (size[1], size[0], 3))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + noise
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def bare(files: list[Path]) -> Callable[[], int]:
    """Pillow alone decodes them all."""

    def work() -> int:
        for file in files:
            Image.open(file).load()
        return len(files)

    return work


def through_the_stream(folder: Path, images: int) -> Callable[[], int]:
    """Batches of 3, made in this process."""
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
            write_shards(folder / what, "photos", ({"jpg": file, "txt": "a picture"} for file in files), 1000)
            loose = [folder / what / f"{i}.jpg" for i in range(config.photos)]
            for path, encoded in zip(loose, files, strict=True):
                path.write_bytes(encoded)
            jobs[f"{what} JPEG, Pillow alone"] = bare(loose)
            jobs[f"{what} JPEG, batches"] = through_the_stream(folder / what, config.photos)
        (folder / "latents").mkdir()
        posterior = torch.randn(8, 128, 128)
        samples = (
            {"safetensors": pack_latents(posterior, (1024, 1024), (0, 0)), "txt": "a picture"} for _ in range(config.latents)
        )
        write_shards(folder / "latents", "latents", samples, 1000)
        jobs["latents of 1024 × 1024, batches"] = through_the_stream(folder / "latents", config.latents)

        rates: dict[str, list[float]] = {what: [] for what in jobs}
        for _ in range(config.rounds):
            for what, work in jobs.items():
                since = time.perf_counter()
                rates[what].append(work() / (time.perf_counter() - since))
        for what, measured in rates.items():
            alone = rates.get(what.replace("batches", "Pillow alone"), measured)
            share = median(ours / theirs for ours, theirs in zip(measured, alone, strict=True))  # of the same moment
            told = f", {share:.2f} of Pillow alone" if alone is not measured else ""
            print(f"{median(measured):10.1f} a second   {what}{told}")

        stream = iter(Stream(open_source(str(folder / "latents")), DataConfig(bs=100), CaptionConfig(), 1024, seed=0))
        peaks = []
        for drawn in range(100, config.drawn + 1, 100):
            next(stream)
            if drawn in (100, config.drawn // 200 * 100, config.drawn):
                peaks.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB after {drawn:,}")
        print(f"peak memory, latents: {', '.join(peaks)}")


if __name__ == "__main__":
    with one_line_errors("bench_data.py"):
        main(tyro.cli(BenchDataConfig, description=__doc__))
