"""Measures how fast one core makes batches of images, compared with decoding alone, and of latents, and the memory for it;
how long large data sets take to open, and the memory for that.

    python scripts/dev/bench_data.py
    python scripts/dev/bench_data.py --rounds 0 --sizes 10000 100000 1000000 10000000 --against ../older

Writes about a hundred files to a temporary folder, and a small one for each 1,000 of --sizes. For comparison: on an H100,
training needs 5 to 18 images a second.
"""

import io
import json
import os
import resource
import subprocess
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
from common.files import ROOT
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
    """How often each case is measured, alternating with the others. Prints the median. 0: only --sizes are measured."""
    photos: int = 30
    """Number of JPEGs of each size."""
    latents: int = 2000
    """Number of samples with cached latents."""
    drawn: int = 100_000
    """How many samples the memory measurement draws from the latents, over many epochs."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Samples of the data sets that are opened."""
    against: Path | None = None
    """Root folder of another version of the suite, which opens them as well."""


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


def write_empty_shards(folder: Path, samples: int) -> None:
    """Shards of 1,000 samples with an index; the files have the right size, and nothing in them."""
    rng = np.random.default_rng(0)
    with (folder / "index.jsonl").open("w") as index:
        for first in range(0, samples, 1000):
            number = min(1000, samples - first)
            sizes, sides = rng.integers(50_000, 400_000, number), rng.integers(300, 700, (number, 2)) * 2
            at = 512 * np.arange(1, number + 1) + np.cumsum(sizes) - sizes
            end = int(at[-1] + sizes[-1]) + 512
            columns = zip(at.tolist(), sizes.tolist(), sides.tolist(), strict=True)
            entries = [[f"{first + n:08d}", a, size, a - 90, 80, *pixels] for n, (a, size, pixels) in enumerate(columns)]
            line: dict = {"name": f"shard-{first // 1000:06d}.tar", "bytes": end, "samples": entries, "sha256": "0" * 64}
            digits = rng.bytes(32 * number).hex()
            hashes = [digits[64 * n : 64 * n + 64] for n in range(number)]
            line |= {"hashes": hashes, "dhashes": [digest[:16] for digest in hashes]}
            index.write(json.dumps(line, separators=(",", ":")) + "\n")
            with (folder / line["name"]).open("wb") as tar:
                tar.truncate(end)


# Run by a process of its own, with the root folder of the suite and the data set. Pages of mapped files are not counted: they
# are the system's, and all processes of a host have the same.
OPEN = """
import json, re, sys, time
sys.path.insert(0, sys.argv[1])
from itertools import islice
from pathlib import Path
from data import Stream
from dataset.buckets import Order
from dataset.sources import open_source
from evaluation.validation import quiet_stream
from options.training import CaptionConfig, DataConfig

def measure(work):
    begin = time.perf_counter()
    result = work()
    memory = int(re.search(r"Private_Dirty: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) / 1024
    measured.extend([time.perf_counter() - begin, memory])
    return result

def draw():
    order = Order(stream.bucket, 4, 0, source.part, source.shares, source.epoch).batches()
    return order, list(islice(order, 100))

measured = []
measure(lambda: None)
source = measure(lambda: open_source(sys.argv[2]))
stream = measure(lambda: Stream(source, DataConfig(bs=4), CaptionConfig(), 1024, seed=0))
drawn = measure(draw)
kept = measure(lambda: source.without(range(0, 6400, 100)))
quiet = measure(lambda: quiet_stream(source, stream))
print(json.dumps(measured))
"""


def report_opening(config: BenchDataConfig) -> None:
    """Prints a table: seconds of each step, and MiB of the process's own after it, more than before opening."""
    columns = ("samples", "opened", "Stream", "100 batches", "without 64", "quiet stream")
    print("seconds, MiB " + "".join(f"{column:>16}" for column in columns))
    for samples in config.sizes:
        with tempfile.TemporaryDirectory() as name:
            write_empty_shards(Path(name), samples)
            versions = [("against", config.against)] * bool(config.against)
            for label, root in [*versions, ("first time", ROOT), ("again", ROOT)]:
                environment = os.environ | {"XDG_CACHE_HOME": str(Path(name) / f"cache-{label == 'against'}")}
                command = [sys.executable, "-c", OPEN, str(root), name]
                found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
                pairs = zip(found[2::2], found[3::2], strict=True)
                cells = "".join(f"{f'{seconds:.2f}, {memory - found[1]:.0f}':>16}" for seconds, memory in pairs)
                print(f"{label:12} {samples:16,}{cells}", flush=True)


def main(config: BenchDataConfig) -> None:
    torch.set_num_threads(1)
    if config.rounds:
        report_loading(config)
    report_opening(config)


def report_loading(config: BenchDataConfig) -> None:
    """Prints samples per second of each kind of data, and the memory after the first and after many."""
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
