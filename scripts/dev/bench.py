"""Measures speed and memory of the real SDXL architecture (with random weights: a step costs the same).

    python scripts/dev/bench.py                          every row of the table in docs/memory-and-speed.md, by train_lora.py
    python scripts/dev/bench.py --rows recipe images     some of them
    python scripts/dev/bench.py --rows recipe --vram-gb 12
    python scripts/dev/bench.py --rows recipe free --processes 1 2 4 8    on several GPUs
    python scripts/dev/bench.py --parts                  time of each part of a step
    python scripts/dev/bench.py --pictures               drawing, beside diffusers' pipeline; without CUDA with the demo's model
    python scripts/dev/bench.py --profile                a step without a cap by kinds of kernels, and the bytes that it moves
    python scripts/dev/bench.py --start                  where the time until the second step goes
    python scripts/dev/bench.py --compare-attention      every attention kernel on SDXL's shapes, forward and backward

Prints a table and writes it as JSON. The first call writes a model of 7 GB to --work. Nothing is downloaded.
"""

import copy
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import webdataset as wds

from common.errors import UserError, one_line_errors
from common.progress import SHOW_PROGRESS
from data import Stream
from dataset.buckets import bucket_sizes
from dataset.images import Decoded
from dataset.latents import pack_latents
from dataset.sources import open_source
from lora import add_lora, merge_lora
from memory import forget_peak_memory, peak_memory, resolve_device, speed_up
from model.diffusion import Diffusion
from model.load import BASE, base_architecture, load_sdxl, native_resolution
from model.prompts import Prompt
from model.render import Renderer, to_image
from model.sdxl import Denoiser, blueprint, time_ids
from model.text import tokenize
from model.vae import decode_latents, encode_pixels, normalise, sample_latents
from options.command import parse_command
from options.training import CaptionConfig, DataConfig, DiffusionConfig, LoRAConfig
from performance import fused
from performance.attention import KERNELS, Shapes, choose_attention, drawing_kernel, kernel_problem, time_kernel
from performance.cuda_graph import GraphedStep
from performance.memory_plan import tensors
from performance.optimizers import make_optimizer

SELF_ATTENTION = (torch.Size((3, 4096, 10, 64)),) * 2  # shapes of q and k where most time goes
FORWARD = 6.76e12  # FLOPs of the U-Net's forward pass for one image of 1024 x 1024, as counted by dry_run

LATENT_DATA = ("--data", "{work}/latents")
MIXED = ("--data", "{work}/mixed")
READY = ("--data", "{work}/ready", "--no-buckets", "--no-train-text-encoder")
IMAGES = ("--data", "{work}/photos")
RECIPE = ("--rank", "8", "--bs", "3", "--precision", "fp16", "--optimizer", "adamw8bit")
WITH_PRIOR = ("--prior-share", "0.25", "--trigger", "style")
KOHYA = (*RECIPE, "--targets", "all")
ROWS = {
    "recipe": ("the recipe, latents cached, cap 16 GiB", (*RECIPE, *LATENT_DATA, "--vram-gb", "16")),
    "images": ("images encoded in the loop, cap 16 GiB", (*RECIPE, *IMAGES, "--vram-gb", "16")),
    "mixed": ("latents of nine sizes, cap 16 GiB", (*RECIPE, *MIXED, "--vram-gb", "16")),
    "unet": ("U-Net alone, latents cached, cap 16 GiB", (*RECIPE, *LATENT_DATA, "--no-train-text-encoder", "--vram-gb", "16")),
    "unet-ready": ("U-Net alone, latents and text cached, cap 16 GiB", (*RECIPE, *READY, "--vram-gb", "16")),
    "kohya": ("kohya's targets, cap 16 GiB", (*KOHYA, *LATENT_DATA, "--vram-gb", "16")),
    "kohya-least": ("kohya's targets, least memory", (*KOHYA, *LATENT_DATA, "--checkpointing", "all")),
    "int8": ("cap 8 GiB, int8 base", (*RECIPE, *LATENT_DATA, "--vram-gb", "8", "--base-precision", "int8")),
    "nf4": ("cap 6 GiB, NF4 base", (*RECIPE, *LATENT_DATA, "--vram-gb", "6", "--base-precision", "nf4")),
    "free": ("no cap", (*RECIPE, *LATENT_DATA)),
    "free-8": ("no cap, batch 8", (*RECIPE, "--bs", "8", *LATENT_DATA)),
    "free-images": ("no cap, images encoded in the loop", (*RECIPE, *IMAGES)),
    "eager": ("no cap, no CUDA graph", (*RECIPE, *LATENT_DATA, "--cuda-graph", "off")),
    "dora": ("--dora, cap 16 GiB", (*RECIPE, *LATENT_DATA, "--vram-gb", "16", "--dora")),
    "conv": ("--conv-rank 8, cap 16 GiB", (*RECIPE, *LATENT_DATA, "--vram-gb", "16", "--conv-rank", "8")),
    "rank-dropout": ("--rank-dropout 0.1, cap 16 GiB", (*RECIPE, *LATENT_DATA, "--vram-gb", "16", "--rank-dropout", "0.1")),
    "max-norm": ("--max-norm 1, cap 16 GiB", (*RECIPE, *LATENT_DATA, "--vram-gb", "16", "--max-norm", "1")),
    "lora-plus": ("--lora-plus 16, cap 16 GiB", (*RECIPE, *LATENT_DATA, "--vram-gb", "16", "--lora-plus", "16")),
    "prior": ("--prior-share 0.25, cap 16 GiB", (*RECIPE, *LATENT_DATA, *WITH_PRIOR, "--vram-gb", "16")),
}  # fmt: skip

ROW_COLUMNS = (
    "row", "processes", "s/step", "img/s", "of the matmul rate", "allocated", "reserved", "on the card", "two steps after",
    "waiting for ranks",
)  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    rows: tuple[str, ...] = tuple(ROWS)
    """Which rows to measure."""
    processes: tuple[int, ...] = (1,)
    """By how many processes each row is run, one for each GPU."""
    vram_gb: float | None = None
    """Run these rows with this cap instead of their own."""
    steps: int = 30
    """Training steps of each row; the first ten are not timed. Of --pictures, denoising steps."""
    parts: bool = False
    """Instead of the rows, time each part of a step."""
    pictures: bool = False
    """Instead of the rows, time drawing, and compare the pictures with those of diffusers' pipeline."""
    profile: bool = False
    """Instead of the rows, sum the kernels of a step by their kind, and count the bytes that its operations read and write."""
    start: bool = False
    """Instead of the rows, run two steps of the recipe twice, and print where the time goes."""
    side: int | None = None
    """Pixels of --pictures. None: as the model was trained."""
    compare_attention: bool = False
    """Instead of the rows, time every attention kernel, forward and backward."""
    work: Path = Path("/tmp/sdxl-bench")
    """Folder for the model and the shards."""
    out: Path = Path("bench.json")
    """JSON file to write the results to."""

    def __post_init__(self) -> None:
        if unknown := set(self.rows) - ROWS.keys():
            raise UserError(f"--rows {' '.join(unknown)}: choose from {' '.join(ROWS)}")
        if self.steps < 20 and not self.pictures:
            raise UserError(f"--steps must be at least 20, not {self.steps}")


# The model and the shards to measure with.


def make_model(folder: Path, device: torch.device) -> None:
    """Writes SDXL base's architecture with random float16 weights as a diffusers folder."""
    from diffusers import StableDiffusionXLPipeline

    torch.set_default_dtype(torch.float16)
    with device:
        models = base_architecture()
    torch.set_default_dtype(torch.float32)
    StableDiffusionXLPipeline.from_pretrained(BASE, **models, add_watermarker=False).save_pretrained(folder)


def make_shards(folder: Path, count: int = 64) -> None:
    """Writes shards of `count` samples each: photos/, JPEGs of two sizes around 1024 × 1024; latents/, random posteriors of
    1024 × 1024; mixed/, random posteriors of nine sizes.
    """
    import io

    rng = np.random.default_rng(0)
    mixed = bucket_sizes(1024, 64)[::5]
    for name in ("photos", "latents", "mixed"):
        (folder / name).mkdir(parents=True)
        with wds.TarWriter(str(folder / name / "bench-000000.tar")) as tar:
            for i in range(count):
                sample: dict[str, str | bytes] = {"__key__": f"{i:06d}", "txt": f"a picture with the number {i}"}
                if name != "photos":
                    height, width = mixed[i % len(mixed)] if name == "mixed" else (1024, 1024)
                    mean = torch.randn(4, height // 8, width // 8)
                    posterior = torch.cat([mean, torch.full_like(mean, 0.05)])
                    sample["safetensors"] = pack_latents(Decoded(posterior.numpy(), (height, width), (0, 0)))
                else:
                    coarse = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
                    size = (1024, 1152) if i % 2 else (1216, 1024)
                    noise = rng.normal(0, 6, (size[1], size[0], 3))
                    photo = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + noise
                    buffer = io.BytesIO()
                    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
                    sample["jpg"] = buffer.getvalue()
                tar.write(sample)


def cache(work: Path) -> str:
    """Runs scripts/cache_latents.py to write ready/: latents and text of photos/. Returns a line with the time it took."""
    command = [sys.executable, "scripts/cache_latents.py", str(work / "photos"), "--out", str(work / "ready")]
    command += ["--model", str(work / "model"), "--text", "1", "--no-buckets", "--workers", "4"]
    begin = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return f"scripts/cache_latents.py: {time.perf_counter() - begin:.0f} s in float32, latents and one variant of the text"


# The rows: each runs train_lora.py and stops it after some steps.


@dataclass
class BenchRow:
    name: str
    what: str
    command: str
    processes: int = 1
    seconds_per_step: float | None = None
    images_per_second: float | None = None
    of_matmul_rate: float | None = None  # share of `matmul_rate`; counts forward pass and input gradients, no recomputation
    allocated_GiB: float | None = None
    reserved_GiB: float | None = None
    on_card_GiB: float | None = None  # everything that the process takes, CUDA's own memory included
    two_steps_s: float | None = None  # from the start of the program to the end of its second step
    waiting_for_ranks: float | None = None  # share of the time, of several processes
    failed: str | None = None  # the last line of the output, if the run failed
    told: list[str] = field(default_factory=list)  # the lines of its output about the plan; a key of bench.json


def used_on_card() -> float:
    """GiB of the GPU's memory that all processes take."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) / 1024


def measure_row(name: str, processes: int, config: BenchConfig, matmul: float) -> BenchRow:
    """Runs the row and reads the results from the output and the TensorBoard log of train_lora.py. `matmul`: FLOP/s.

    One process is stopped by a signal, so that its memory can be seen; torchrun would take that for a failure.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    what, template = ROWS[name]
    options = [option.format(work=config.work) for option in template]
    if config.vram_gb:
        options += ["--vram-gb", str(config.vram_gb)]
    run = config.work / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    last = config.steps if processes > 1 else 100_000
    options += ["--model", str(config.work / "model"), "--steps", str(last), "--save-every", str(last), "--workers", "4"]
    options += ["--no-pictures", "--validate", "none"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *torchrun, "train_lora.py", *options, "--out", str(run / "out"), "--log-dir", str(run / "log")]
    row, used_before = BenchRow(name, what, "train_lora.py " + " ".join(options), processes), used_on_card()
    env = os.environ | {SHOW_PROGRESS: "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    errors, step = "", 0
    assert process.stderr is not None
    while step < config.steps and (line := process.stderr.readline(400)):
        errors += line
        step = int((re.findall(rf"(\d+)/{last}", line) or [step])[-1])  # of the progress bar
    if processes == 1 and process.poll() is None:
        row.on_card_GiB = round(used_on_card() - used_before, 2)
        process.send_signal(signal.SIGINT)
    output, remaining_errors = process.communicate(timeout=120)
    errors += remaining_errors
    row.told = [line for line in (output + errors).replace("\r", "\n").splitlines() if re.match(r"memory|device|batch", line)]
    if process.returncode not in (os.EX_OK, os.EX_TEMPFAIL):  # finished, or stopped by the signal
        lines = [line for line in errors.splitlines() if f"/{last}" not in line]  # without the progress bar
        row.failed = (lines or ["no output"])[-1][-300:]
        return row
    (events,) = (run / "log").iterdir()
    log = EventAccumulator(str(events)).Reload()
    rates = [event.value for event in log.Scalars("speed/images_per_second") if event.step > 10]
    row.images_per_second = round(statistics.median(rates), 2)
    batch = int(re.findall(r"= (\d+)", next(line for line in row.told if line.startswith("batch")))[0])
    row.seconds_per_step = round(batch / row.images_per_second, 4)
    row.of_matmul_rate = round(2 * FORWARD * row.images_per_second / (matmul * processes), 3)
    row.allocated_GiB = round(log.Scalars("memory/peak_GiB")[-1].value, 2)
    row.reserved_GiB = round(log.Scalars("memory/reserved_GiB")[-1].value, 2)
    if processes > 1:
        shares = [event.value for event in log.Scalars("speed/waiting_for_ranks") if event.step > 10]
        row.waiting_for_ranks = round(statistics.median(shares), 4)
    row.two_steps_s = float(re.findall(r"two steps done ([\d.]+) s", " ".join(row.told))[0])
    return row


TIMED_START = """
import sys, time

def timed(owner, name):
    function = getattr(owner, name)
    def call(*arguments, **options):
        begin = time.perf_counter()
        result = function(*arguments, **options)
        print(f"part: {time.perf_counter() - begin:8.2f} s  {function.__qualname__}", flush=True)
        return result
    setattr(owner, name, call)

begin = time.perf_counter()
import train_lora
print(f"part: {time.perf_counter() - begin:8.2f} s  imports", flush=True)
import memory
names = set(train_lora.main.__code__.co_names) - {"Upcoming", "Ending"}
parts = [(train_lora, name) for name in names if callable(vars(train_lora).get(name))]
parts += [(memory, "choose_attention"), (memory, "speed_up"), (memory, "dry_run"), (train_lora.TrainStep, "gradient")]
parts += [(train_lora.Gallery, "begin"), (train_lora.Validation, "prepare"), (train_lora.Examiner, "prepare")]
for owner, name in parts:
    timed(owner, name)
command = train_lora.parse_command("train_lora.py", train_lora.TrainCommand, "").run
sys.exit(train_lora.run_script("train_lora.py", train_lora.main, command))
"""


def measure_start(work: Path) -> list[str]:
    """Lines of a table: where the time goes from the command to the end of the second step of the recipe."""
    lines, (_, template) = [], ROWS["recipe"]
    options = [option.format(work=work) for option in template]
    options += ["--model", str(work / "model"), "--steps", "2", "--no-pictures", "--validate", "none", "--workers", "4"]
    for what in ("the first time", "again"):
        shutil.rmtree(work / "runs/start", ignore_errors=True)
        out = ["--out", str(work / "runs/start/out"), "--log-dir", str(work / "runs/start/log")]
        command = [sys.executable, "-c", TIMED_START, *options, *out]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        after = re.findall(r"two steps done [0-9.]+ s", run.stdout + run.stderr) or run.stderr.splitlines()[-1:]
        parts = [line for line in run.stdout.splitlines() if line.startswith("part: ") and not re.match(r"part: +0\.0", line)]
        lines += [f"{what}: {after[0]}", *parts]
    return lines


# Drawing, and parts of a step.


def milliseconds(work, repeats: int = 3) -> float:
    """Median time of `work()` over `repeats` calls, measured by CUDA events, after one call that is not counted."""
    work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        work()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a matrix product of 8192 x 8192 x 8192 in float16: what this GPU reaches in practice."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.float16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b, 20) * 1e3


@dataclass
class DrawnBy:
    """What it costs a program to draw `count` prompts at once, once it has drawn them before."""

    program: str
    count: int
    seconds_per_picture: float = 0.0  # from text to 8 bits
    step_ms: float = 0.0  # of a denoising step of all prompts
    reserved_GiB: float = 0.0  # at its peak, what the programs before have left included
    first_s: tuple[float, ...] = ()  # of the calls before those that are timed; recording a graph is in one of them


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_diffusers(pipe, prompts: list[Prompt], output: str = "pil") -> list:
    """What diffusers' own pipeline makes of prompts that are alike. In half precision it decodes in float32."""
    generators = [torch.Generator().manual_seed(prompt.seed or 0) for prompt in prompts]
    first, own = prompts[0], pipe.vae.dtype
    options = {"width": first.width, "height": first.height, "guidance_scale": first.guidance, "output_type": output}
    pipe.vae.to(pipe.unet.dtype)
    images = pipe([prompt.text for prompt in prompts], num_inference_steps=first.steps, generator=generators, **options).images
    pipe.vae.to(own)
    return images


def measure_program(name: str, draw: Callable, denoise: Callable, prompts: list[Prompt], device: torch.device) -> DrawnBy:
    forget_peak_memory(device)
    first = tuple(round(seconds(partial(draw, prompts), device), 3) for _ in range(2))
    drawn = min(seconds(partial(draw, prompts), device) for _ in range(2)) / len(prompts)
    denoised = min(seconds(partial(denoise, prompts), device) for _ in range(2)) / (prompts[0].steps or 1)
    row = DrawnBy(name, len(prompts), round(drawn, 4), round(1e3 * denoised, 2), round(peak_memory(device)[1], 2), first)
    print(row, flush=True)
    return row


def grey_levels(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """How far pictures of 8 bits are apart: at most, at 99.9 % of the values, on average; and the share of equal values."""
    apart = np.concatenate([np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in pairs])
    return {
        "max": int(apart.max()), "99.9 %": float(np.quantile(apart, 0.999)), "mean": round(float(apart.mean()), 4),
        "equal": round(float((apart == 0).mean()), 4),
    }  # fmt: skip


def measure_pictures(pipe, device: torch.device, side: int, steps: int) -> dict[str, Any]:
    """diffusers' pipeline as it is, and ours, for one picture and for four at once: what they cost, and how far their pictures
    are apart. Then what merging a LoRA takes, and how exact the VAE is in bfloat16.
    """
    denoiser, settings = Denoiser(pipe), Prompt("", seed=0, width=side, height=side, steps=steps, guidance=5.0)
    prompts = [Prompt(f"a picture with the number {i}").filled(i, settings) for i in range(4)]
    programs, images = [], {}
    for count in (1, 4):
        draw, latents = partial(by_diffusers, pipe), partial(by_diffusers, pipe, output="latent")
        programs.append(measure_program("diffusers", draw, latents, prompts[:count], device))
        images["diffusers", count] = draw(prompts[:count])
    for part in (denoiser, pipe.vae):
        speed_up(part, drawing_kernel(device))
    for count in (1, 4):
        renderer = Renderer(pipe, denoiser, partial(decode_latents, pipe.vae))
        texts = [denoiser.describe(prompt.text, None) for prompt in prompts[:count]]
        denoise = partial(renderer.denoise, texts=texts)
        programs.append(measure_program("ours", renderer.draw, denoise, prompts[:count], device))
        images["ours", count] = renderer.draw(prompts[:count])
        renderer.release()
    of = {(row.program, row.count): row.seconds_per_picture for row in programs}
    modules = add_lora(blueprint(pipe), LoRAConfig(), denoiser.unused).modules
    factors = {name: [torch.randn(p.shape, device=device) * 1e-3 for p in (m.lora_A, m.lora_B)] for name, m in modules.items()}
    deltas = {name: (A, B, modules[name].alpha) for name, (A, B) in factors.items()}
    merge_lora(denoiser, deltas, strength=-1.0)
    return {
        "programs": [asdict(row) for row in programs],
        "times as fast as diffusers": {count: round(of["diffusers", count] / of["ours", count], 2) for count in (1, 4)},
        "grey levels from diffusers": {n: grey_levels(arrays(images["diffusers", n], images["ours", n])) for n in (1, 4)},
        "grey levels of the first of four from it alone": grey_levels(arrays(images["ours", 4][:1], images["ours", 1])),
        f"merging {len(deltas)} layers, s": round(seconds(partial(merge_lora, denoiser, deltas), device), 3),
        "grey levels of bfloat16 from float32, the demo's VAE": measure_decoding(device, min(side, 256)),
    }


def arrays(some: list, others: list) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    return ((np.asarray(a), np.asarray(b)) for a, b in zip(some, others, strict=True))


@torch.no_grad()
def measure_decoding(device: torch.device, side: int) -> dict[str, float]:
    """Grey levels between what the demo's VAE decodes in bfloat16 and in float32, from latents of the demo's pictures.

    It says nothing of SDXL's own VAE, whose weights are not here: what is decoded with random weights is no picture.
    """
    vae = load_sdxl("demo", torch.float32, device).vae.float()
    low, stream = copy.deepcopy(vae).bfloat16(), Stream(open_source("demo"), DataConfig(bs=1), CaptionConfig(), side, seed=0)
    decoded: list[list[Image.Image]] = [[], []]
    for n in range(min(16, stream.source.samples)):
        posterior = encode_pixels(vae, normalise(stream.batch([n], [n]).images.to(device)))
        latents = sample_latents(vae, posterior, torch.zeros_like(posterior[:, :4]))
        for images, model in zip(decoded, (low, vae), strict=True):
            images.append(to_image(decode_latents(model, latents)[0]))
    return grey_levels(arrays(*decoded))


def measure_optimiser(device: torch.device, count: int = 24_500_000) -> float:
    """Milliseconds of unscaling, clipping, 8-bit Adam, the scaler's update and zeroing, for a flat tensor of `count` values."""
    p = torch.nn.Parameter(torch.randn(count, device=device))
    p.grad = gradient = torch.zeros_like(p)
    optimizer = make_optimizer("adamw8bit", [{"params": [p], "lr": 1e-4}])
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.zeros((), device=device))  # allocates the scale

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        scaler.step(optimizer)
        scaler.update()
        gradient.zero_()

    return milliseconds(step, 20)


class BenchStep:
    """Forward and backward pass of a training step: rank 8, batch 3, nothing checkpointed, latents ready."""

    def __init__(self, pipe, device: torch.device, bs: int = 3):
        self.denoiser, self.device = Denoiser(pipe), device
        self.adapter = add_lora(self.denoiser, LoRAConfig(), self.denoiser.unused, dtype=torch.float16)
        attention = choose_attention("auto", Shapes({SELF_ATTENTION: 1}), device, torch.float16)
        speed_up(self.denoiser, KERNELS[attention], device)
        self.diffusion = Diffusion(DiffusionConfig(), pipe.scheduler.alphas_cumprod, "epsilon", device)
        self.latents = torch.randn(bs, 4, 128, 128, device=device)
        draws = self.diffusion.draw(self.latents.shape, torch.Generator(device).manual_seed(0))
        self.noise, _, self.timesteps = draws
        self.tokens = tokenize(self.denoiser.tokenizers, ["a picture"] * bs).to(device)
        self.ids = time_ids(torch.full((bs, 2), 1024), torch.zeros(bs, 2), torch.full((bs, 2), 1024)).to(device)

    def denoise(self) -> torch.Tensor:
        noisy = self.diffusion.add_noise(self.latents, self.noise, self.timesteps)
        return self.denoiser(noisy, self.timesteps, (self.tokens,), self.ids)

    def differentiate(self) -> torch.Tensor:
        loss = self.diffusion.loss(self.denoise(), self.latents, self.noise, self.timesteps).mean() * 1024
        loss.backward()
        return loss.detach()

    def graphed(self, work, grad: bool) -> Any:
        """`work` as a CUDA graph."""

        def step(_) -> torch.Tensor:
            with torch.set_grad_enabled(grad):
                return work()

        return partial(GraphedStep(step, [self.adapter.grad], "on", self.device), self.timesteps)


def measure_parts(pipe, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part of a training step, each as a CUDA graph."""
    step = BenchStep(pipe, device)
    pixels = torch.rand(3, 3, 1024, 1024, device=device) * 2 - 1

    def time_graph(work, grad: bool) -> float:
        graphed = step.graphed(work, grad)
        result = milliseconds(graphed)
        graphed.func.release()
        return result

    text = time_graph(lambda: step.denoiser.encode_text(step.tokens)[0], grad=False)
    forward = time_graph(step.denoise, grad=False)
    step_time = time_graph(step.differentiate, grad=True)
    times = {"text encoders, forward": text, "U-Net, forward": forward - text, "backward of all": step_time - forward}
    speed_up(pipe.vae, KERNELS["sdpa"], device)
    times["VAE encoding, image by image"] = time_graph(lambda: encode_pixels(pipe.vae, pixels), grad=False)
    pipe.vae.disable_slicing()
    times["VAE encoding, whole batch"] = time_graph(lambda: encode_pixels(pipe.vae, pixels), grad=False)
    times["optimiser, 24.5 M parameters"] = measure_optimiser(device)
    return times


# Kinds of kernels in a profile: the first pattern that a name matches.
KERNEL_KINDS = {
    "attention": r"fmha|flash|sdpa|attention",
    "change of layout": r"nchwToNhwc|nhwcToNchw|convertTensor",
    "convolution": r"conv|implicit|xmma_fprop|xmma_dgrad|cudnn",
    "our kernels": r"gate_|layer_norm_(for|back)ward|channel_|group_|tall_product|add_parts",
    "matrix product": r"gemm|gemv|cutlass|cublas|splitK|nvjet",
    "norm of PyTorch": r"[nN]orm|RowwiseMoments|ComputeFused",
    "copy and concatenation": r"copy|Memcpy|Memset|CatArray|direct_copy",
    "addition": r"AddOp|CUDAFunctor_add|add",
    "reduction": r"reduce",
    "elementwise": r"elementwise|Functor",
}


class BytesMoved(TorchDispatchMode):
    """Counts the bytes of the tensors that operations read and write, each once: what they need at least."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view and "empty" not in str(operation):
            self.bytes += sum(t.nbytes for t in tensors((args, kwargs, result)))
        return result


def profile(pipe, device: torch.device) -> list[str]:
    """Lines of a table: the kernels of a step by kind, with milliseconds and numbers; and the bytes that it moves."""
    step = BenchStep(pipe, device)
    graphed = step.graphed(step.differentiate, grad=True)
    time_of_step = milliseconds(graphed, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        graphed()
        torch.cuda.synchronize()
    launch, ours = fused.launch, list[Any]()

    def recorded(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        ours.extend(arguments)
        launch(name, grid, *arguments, **constants)

    with BytesMoved() as moved, unittest.mock.patch.object(fused, "launch", recorded):
        step.differentiate()
    moved.bytes += sum(t.nbytes for t in ours if isinstance(t, torch.Tensor))
    kinds: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_time_total and event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next((kind for kind, pattern in KERNEL_KINDS.items() if re.search(pattern, event.name)), "other")
            kinds.setdefault(kind, []).append(event.device_time_total / 1e3)
            names.setdefault(f"{kind}: {event.name[:150]}", []).append(event.device_time_total / 1e3)
    lines = [f"{sum(times):8.2f} ms {len(times):6}  {kind}" for kind, times in sorted(kinds.items(), key=lambda k: -sum(k[1]))]
    busiest = sorted(names.items(), key=lambda item: -sum(item[1]))[:60]
    total = sum(map(sum, kinds.values()))
    lines.append(f"{total:8.2f} ms {sum(map(len, kinds.values())):6}  all kernels; the graph takes {time_of_step:.2f} ms")
    lines.append(f"{moved.bytes / 1e9:8.1f} GB moved by a step, each tensor counted once for each operation")
    return [*lines, "the largest:", *(f"{sum(times):8.2f} ms {len(times):6}  {name}" for name, times in busiest)]


def measure_data(config: BenchConfig) -> dict[str, float]:
    """Milliseconds that one worker needs for a batch of 3."""
    times = {}
    for name in ("photos", "latents"):
        stream = iter(Stream(open_source(str(config.work / name)), DataConfig(bs=3), CaptionConfig(), 1024, seed=0))
        next(stream)
        start = time.perf_counter()
        for _ in range(10):
            next(stream)
        times[f"data, {name}, one worker"] = 100 * (time.perf_counter() - start)
    return times


def compare_attention(device: torch.device) -> list[str]:
    """Lines of a table: the time of every kernel on SDXL's shapes, batch 3, or why it is not usable."""
    lines = []
    for tokens, heads in ((4096, 10), (1024, 20)):
        for keys in (tokens, 77):
            q, k = torch.Size((3, tokens, heads, 64)), torch.Size((3, keys, heads, 64))
            for name, kernel in KERNELS.items():
                result = kernel_problem(name, q, k, device, torch.float16)
                if result is None:
                    forward, both = (time_kernel(kernel, q, k, device, torch.float16, backward) for backward in (False, True))
                    result = f"forward {forward:.3f} ms, backward {both - forward:.3f} ms"
                lines.append(f"{tokens:5} queries, {keys:5} keys, {heads} heads   {name:10} {result}")
    return lines


def main(config: BenchConfig) -> None:
    device = resolve_device("auto")
    if device.type != "cuda" and not config.pictures:
        raise UserError("nothing to measure here: a GPU with CUDA is needed")
    if device.type == "cuda" and not (config.work / "model").is_dir():
        print(f"writing the model and the shards to {config.work}", flush=True)
        make_model(config.work / "model", device)
        make_shards(config.work)
        torch.cuda.empty_cache()
    if config.pictures:
        model, dtype = ("demo", torch.float32) if device.type != "cuda" else (str(config.work / "model"), torch.float16)
        pipe = load_sdxl(model, dtype, device)
        measured = measure_pictures(pipe, device, config.side or native_resolution(pipe), config.steps)
        for name, value in measured.items():
            print(name, *(value if isinstance(value, list) else [value]), sep="\n    ")
        config.out.write_text(json.dumps(measured, indent=1))
        return
    in_rows = not (config.start or config.profile or config.parts or config.compare_attention)
    if in_rows and "unet-ready" in config.rows and not (config.work / "ready").is_dir():
        print(cache(config.work), flush=True)
    rate = matmul_rate(device)
    card = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(f"{card}; a matrix product of 8192³ in float16 runs at {rate / 1e12:.0f} TFLOP/s")
    result: dict = {"card": card, "matmul_TFLOPs": rate / 1e12}
    if config.compare_attention:
        result["attention"] = compare_attention(device)
        print("\n".join(result["attention"]))
    elif config.start:
        result["start"] = measure_start(config.work)
        print("\n".join(result["start"]))
    elif config.profile:
        result["profile"] = profile(load_sdxl(str(config.work / "model"), torch.float16, device), device)
        print("\n".join(result["profile"]))
    elif config.parts:
        pipe = load_sdxl(str(config.work / "model"), torch.float16, device)
        result["parts"] = measure_parts(pipe, device) | measure_data(config)
        print("\n".join(f"{value:10.2f}  {name}" for name, value in result["parts"].items()))
    else:
        torch.cuda.empty_cache()
        print(f"| {' | '.join(ROW_COLUMNS)} |\n{'|---' * len(ROW_COLUMNS)}|", flush=True)
        result["rows"] = []
        for name, processes in product(config.rows, config.processes):
            row = measure_row(name, processes, config, rate)
            result["rows"].append(asdict(row))
            speed = (row.seconds_per_step, row.images_per_second, row.of_matmul_rate)
            taken = (row.allocated_GiB, row.reserved_GiB, row.on_card_GiB)
            cells = ["" if value is None else str(value) for value in (*speed, *taken, row.two_steps_s, row.waiting_for_ranks)]
            print(f"| {row.what} | {processes} | {row.failed or ' | '.join(cells)} |", flush=True)
            for line in row.told:
                print(f"    {line}", flush=True)
            config.out.write_text(json.dumps(result, indent=1))  # after every row, as a later one may fail
    config.out.write_text(json.dumps(result, indent=1))
    print(f"the same as JSON: {config.out}")


if __name__ == "__main__":
    with one_line_errors("bench.py"):
        main(parse_command("bench.py", BenchConfig, __doc__))
