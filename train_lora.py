"""Trains a LoRA on SDXL's U-Net and both text encoders.

    python train_lora.py                                                 one process, the bundled model and data
    torchrun train_lora.py --rank 8 --bs 3                               the same under torchrun
    torchrun train_lora.py --model sdxl --data shards/ --rank 8 --bs 3   the recipe: real SDXL, one GPU
    torchrun --nproc-per-node 2 train_lora.py --model sdxl --data shards/
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500 train_lora.py …

Writes checkpoints/pytorch_lora_weights_{step}.safetensors and, for --resume, checkpoints/state/. `tensorboard --logdir runs`.
"""

import time

STARTED = time.perf_counter()  # before the imports: they are part of the wait for the first step

import json
import math
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import formats
import memory
import sdxl  # after memory, which readies xFormers: diffusers imports it
from budget import ANOTHER_SHAPE, Plan, dry_run, make_plan, stand_in_kernel
from captions import CaptionConfig
from checkpoint import STATE, check_writable, find_state, load_state, save_state, write_atomically
from data import Batch, DataConfig, Stream, describe_buckets, make_loader, normalise
from diffusion import Diffusion, DiffusionConfig, area_weights
from distributed import Ranks, join_ranks, leave_ranks
from errors import UserError, one_line_errors
from fast import KERNELS, Shapes, choose_attention, install
from graph import GraphedStep
from lora import Adapter, LoRAConfig, add_lora, layer_shapes
from memory import MemoryConfig
from pictures import Gallery, evaluation_prompts
from quantise import BASES as PACKED
from quantise import check_quantisable, packed_bytes, quantisable, quantise_base
from sdxl import Denoiser, decode_latents, encode_pixels, sample_latents, split_tokens, time_ids, tokenize
from sources import Source, open_mixture

LOG_EVERY = 10  # steps; the host waits for the device only then
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TrainConfig:
    lora: LoRAConfig = LoRAConfig()
    dataset: DataConfig = DataConfig()
    captions: CaptionConfig = CaptionConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    memory: MemoryConfig = MemoryConfig()
    model: str = "demo"
    """'demo' (bundled), 'sdxl' (from the hub), a hub id, a diffusers folder or a .safetensors SDXL checkpoint."""
    steps: int = 450
    """Optimiser steps."""
    grad_accum: int = 1
    """Batches per optimiser step and process."""
    lr: float | None = None
    """Learning rate. None: 1e-4; for the bundled model, which is 16 times narrower than SDXL, 2e-3."""
    text_encoder_lr: float | None = None
    """Learning rate of both text encoders. None: --lr."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, or falling to zero at the last step."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    save_every: int = 150
    """Steps between checkpoints; the last step is always saved."""
    format: Literal["kohya", "diffusers", "both"] = "kohya"
    """Layout of the LoRA files. kohya is read by diffusers, ComfyUI and A1111; diffusers' own by few others."""
    save_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Dtype of the weights in the files."""
    keep: int = 3
    """Newest checkpoints of this run to keep."""
    out: Path = Path("checkpoints")
    """Folder for LoRA files and the state of the run."""
    log_dir: Path = Path("runs")
    """Folder for TensorBoard logs."""
    resume: str = "auto"
    """'auto' (go on from --out if a state is there), 'none', or a state."""
    seed: int = 0
    """Everything random is a function of it and of the step."""
    device: str = "auto"
    """'auto' (CUDA if there is one), 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        for flag, least in (("steps", 1), ("grad_accum", 1), ("save_every", 1), ("keep", 1), ("warmup", 0)):
            if getattr(self, flag) < least:
                raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, not {getattr(self, flag)}")


def lr_factor(step: int, config: TrainConfig) -> float:
    """What the learning rates are multiplied by at `step`, counted from 0."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[config.lr_schedule]


def seed_of(*parts: int) -> int:
    """63 random bits that are a function of (seed, rank, step, …)."""
    return random.Random(str(parts)).getrandbits(63)


class StopRequest:
    """Ctrl-C or SIGTERM asks the loop to save and end after the step it is in."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number: int, frame: object) -> None:
        self.asked = True


class NoWriter:
    """Stands in for a SummaryWriter on every rank but the first."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


class Meter:
    """Mean loss, images per second and share of the time spent waiting for data since the last reading.

    Adding costs no synchronisation, reading costs one.
    """

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.shares: list[float] = []  # of every reading
        self.restart()

    def restart(self) -> None:
        self.loss.zero_()
        self.since, self.waited = time.perf_counter(), 0.0

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, and how long it took to come."""
        since = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - since
        return batch

    def add(self, loss: torch.Tensor) -> None:
        self.loss += loss.detach()

    def read(self, ranks: Ranks, steps: int, images_per_step: int) -> dict[str, float]:
        """Over the last `steps`: loss and images/s of all ranks, and what this one waited."""
        ranks.average(self.loss)
        loss, seconds = self.loss.item() / steps, time.perf_counter() - self.since
        self.shares.append(self.waited / seconds)
        told = {"loss": loss, "images_per_second": steps * images_per_step / seconds, "waiting_for_data": self.shares[-1]}
        self.restart()
        return told

    def advice(self) -> str | None:
        """What to do where data is the bottleneck. The first reading does not count: the workers had just been started."""
        share = sum(self.shares[1:]) / max(1, len(self.shares) - 1)
        if share > 0.05:
            return f"waiting for data took {share:.0%} of the time: more --workers, or latents made ready by scripts/cache.py"
        return None


def main(config: TrainConfig) -> None:
    # Processes, device, precision.
    device = memory.resolve_device(config.device)
    asked = config.memory.base_precision if config.memory.base_precision in memory.DTYPES else config.memory.precision
    precision = memory.resolve_precision(asked, device)
    dtype = memory.DTYPES[precision]
    ranks = join_ranks(device)

    # Data, looked at before the model is loaded: a mistake shows at once.
    source = open_mixture(config.dataset.data)
    if source.latents and config.dataset.flip and not source.mirrored:
        raise UserError("--flip: these latents are not there of the mirrored images: make them anew with cache.py --flip")
    if source.latents and config.dataset.masked_loss and not source.masked:
        raise UserError("--masked-loss: these latents were made without masks: make them anew with cache.py --masked-loss")

    # Model on the host, and what the device will have to hold.
    pipe = sdxl.read_sdxl(config.model, dtype)
    resolution = config.dataset.resolution or sdxl.native_resolution(pipe)
    if source.vae and not sdxl.is_of_vae(source.vae, pipe.vae):
        raise UserError(f"--data: these latents were made by another VAE than that of --model {config.model}")
    stream = Stream(source, config.dataset, config.captions, resolution, config.seed, ranks.rank, ranks.world)
    stream.spare(stream.bucket[0])  # at least one can be decoded
    budget = ranks.least(memory.limit_memory(config.memory.vram_gb, device))
    lengths = config.captions.max_tokens // 75
    budget -= ANOTHER_SHAPE * (len(set(stream.bucket)) * lengths - 1)
    plan, attention_shapes = plan_memory(config, pipe, resolution, source.latents, precision, device, budget)

    # Model on the device: the frozen base, with adapters on the layers that --targets names.
    denoiser = Denoiser(pipe)
    total = sum(p.numel() for p in denoiser.parameters())
    if plan.base in PACKED:
        check_quantisable(plan.base, device)
        quantise_base(denoiser, plan.base, device)
    denoiser.to(device)
    vae_home = torch.device("cpu") if source.latents else device  # not needed but for pictures
    pipe.vae.to(vae_home, sdxl.vae_dtype(device)).use_slicing = not plan.whole_vae
    adapter = add_lora(denoiser, config.lora, denoiser.unread, config.seed, dtype)
    attention = choose_attention(config.memory.attention, attention_shapes, device, dtype)
    install(pipe.unet, KERNELS[attention])
    if config.memory.compile:
        memory.compile_blocks(pipe.unet, memory.block_names(pipe.unet))
    memory.checkpoint_blocks(denoiser, plan.checkpointed)
    lr = (2e-3 if config.model == "demo" else 1e-4) if config.lr is None else config.lr
    config = replace(  # from here on with every "auto" and None resolved
        config,
        lr=lr,
        text_encoder_lr=lr if config.text_encoder_lr is None else config.text_encoder_lr,
        lora=replace(config.lora, alpha=config.lora.resolved_alpha),
        dataset=replace(config.dataset, resolution=resolution),
        memory=replace(config.memory, precision=precision, base_precision=plan.base, attention=attention),
    )

    # Objective and optimiser.
    diffusion = Diffusion(config.diffusion, pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type, device)
    rates = {"unet": config.lr, "text_encoder": config.text_encoder_lr}
    groups = [{"name": name, "params": [p]} for name, p in adapter.groups.items()]
    optimizer = memory.make_optimizer(config.memory.optimizer, groups)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator(device)

    # The step from a batch to its gradients, every kernel of it recorded once.
    encode = (lambda posterior: posterior) if source.latents else (lambda images: encode_pixels(pipe.vae, normalise(images)))
    micro_batches = config.dataset.bs // plan.micro * config.grad_accum

    def differentiate(images, spread, noise, timesteps, tokens, ids, *area) -> torch.Tensor:
        """Adds the gradients of one micro-batch to `adapter.grad`; returns its share of the loss."""
        latents = sample_latents(pipe.vae, encode(images), spread)
        denoise = partial(denoiser, tokens=tokens, time_ids=ids)
        loss = diffusion(denoise, latents, noise, timesteps, *area).mean() / micro_batches
        scaler.scale(loss).backward()
        adapter.gather()
        return loss.detach()

    step = GraphedStep(differentiate, [adapter.grad], config.memory.cuda_graph, device)

    # Where the run stands: at its beginning, or where a saved state left it.
    run = Run(log_dir=str(config.log_dir / time.strftime("%Y%m%d-%H%M%S")))
    state_file = find_state(config.resume, config.out) if ranks.first else None
    state = ranks.from_first(load_state(state_file) if state_file else None)
    if state:
        run = restore(state, config, adapter, optimizer, scaler)
        if run.step >= config.steps:
            if ranks.first:
                print(f"{state_file} is at step {run.step} already: raise --steps, or start anew with --resume none")
            leave_ranks()
            return
        if ranks.first and state_file.resolve() != (config.out / STATE).resolve():
            run.saved = ()  # another folder's files are not ours to remove
    start = run.step
    save = partial(save_checkpoint, config, source, adapter, layer_shapes(denoiser), optimizer, scaler)

    # What the run is about to do.
    images_per_step = config.dataset.bs * config.grad_accum * ranks.world
    writer = NoWriter()
    if ranks.first:
        check_writable("--out", config.out)
        check_writable("--log-dir", Path(run.log_dir).parent)
        writer = SummaryWriter(run.log_dir, purge_step=run.step + 1)
        writer.add_text("config", f"```json\n{json.dumps(flat_config(config), indent=2)}\n```", run.step)
        size = len(lora_file(config, source, adapter, config.steps, next(iter(FILES[config.format])))) / 1e6
        count, layers = adapter.flat.numel(), len(adapter.modules)
        share = 100 * count / total
        print(f"model      {config.model}: U-Net and text encoders {total:,} parameters, frozen; {resolution} px")
        print(f"LoRA       rank {config.lora.rank} on {layers} layers, {count:,} parameters trained: {share:.2f} %")
        print(f"data       {source.samples} images with a caption, {len(source.uncaptioned)} without")
        if source.cut:
            print(f"cut short  {', '.join(source.cut)}: the samples before the cut are used")
        print(f"buckets    {describe_buckets(source, stream.sizes, stream.bucket)}")
        print(f"batch      {config.dataset.bs} × {config.grad_accum} accumulated × {ranks.world} processes = {images_per_step}")
        launching = "every kernel launched" if step.eager else "CUDA graph"
        print(f"device     {device}, {precision}, {attention} attention, {launching}")
        print(f"memory     {plan}")
        print(f"optimiser  {config.memory.optimizer}, learning rate {rates['unet']:g}, text encoders {rates['text_encoder']:g}")
        print(f"file       {config.out}/pytorch_lora_weights_{config.steps}.safetensors, {size:.2f} MB", flush=True)

    # The loop. Randomness is a function of (seed, rank, step), the learning rate of the step.
    channels = pipe.unet.config.in_channels
    stream.start = run.samples // config.dataset.bs
    batches = make_loader(stream, pin_memory=device.type == "cuda")
    vae_bytes = sum(p.nbytes for p in pipe.vae.parameters()) + sdxl.DECODING * resolution**2 * pipe.vae.dtype.itemsize
    tight = plan.weights + vae_bytes > plan.budget
    decode = partial(decode_latents, pipe.vae, tiled=tight)
    gallery = Gallery(pipe, denoiser.describe, decode, adapter.disabled, evaluation_prompts(config.model), resolution)

    def draw() -> np.ndarray:
        """Base and LoRA side by side."""
        pipe.vae.to(device)
        with torch.compiler.set_stance("force_eager"):  # compiling for the shapes of pictures would take minutes
            sheet = gallery.draw(f"LoRA, step {run.step}")
        pipe.vae.to(vae_home)
        return sheet

    stop, meter, logged, skipped = StopRequest(), Meter(device), run.step, set(source.uncaptioned)
    cut, max_tokens = Counter(), config.captions.max_tokens
    progress = tqdm(total=config.steps, initial=run.step, unit="step", disable=not ranks.first)
    while run.step < config.steps and not ranks.any(stop.asked):
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]] * lr_factor(run.step, config)
        for micro in range(config.grad_accum):
            batch = meter.next(batches)
            skipped.update(batch.skipped)
            cut.update(len(rest) for _, rest in split_tokens(denoiser.tokenizers[0], batch.captions, max_tokens))
            generator.manual_seed(seed_of(config.seed, ranks.rank, run.step, micro))
            latents_shape = (config.dataset.bs, channels, *(batch.size[0] // pipe.vae_scale_factor).tolist())
            images = memory.send(batch.images, device)
            tokens = memory.send(tokenize(denoiser.tokenizers, batch.captions, max_tokens), device)
            ids = memory.send(time_ids(batch.original_size, batch.crop, batch.size), device)
            spread = torch.randn(latents_shape, generator=generator, device=device)
            noise, timesteps = diffusion.draw(latents_shape, generator)
            area = [memory.send(area_weights(mask), device) for mask in batch.mask]
            inputs = (images, spread, noise, timesteps, tokens, ids, *area)
            for part in zip(*(tensor.split(plan.micro) for tensor in inputs), strict=True):
                meter.add(step(*part))
        ranks.average(adapter.grad)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(adapter.groups.values(), MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        adapter.refresh()
        run.step, run.samples = run.step + 1, run.samples + images_per_step
        progress.update()

        if run.step == start + 2 and ranks.first:
            tqdm.write(measured(device))
        saving = run.step % config.save_every == 0 or run.step == config.steps
        if saving or run.step % LOG_EVERY == 0:
            scalars = meter.read(ranks, run.step - logged, images_per_step)
            logged = run.step
            shown = {"lr": f"{optimizer.param_groups[0]['lr']:.2e}", "img_s": f"{scalars['images_per_second']:.2f}"}
            progress.set_postfix(loss=f"{scalars['loss']:.4f}", **shown)
            scalars |= {"grad_norm": grad_norm.item(), "loss_scale": scaler.get_scale()}
            scalars |= {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
            scalars |= dict(zip(("peak_memory_GiB", "peak_reserved_GiB"), memory.peak_memory(device), strict=True))
            for name, value in scalars.items():
                writer.add_scalar(name, value, run.step)
        if saving and ranks.first:  # the weights first, then pictures
            _, error = save(run)
            writer.add_scalar("largest_error_of_the_file", error, run.step)
            writer.add_image("compare", step.beside(draw), run.step, dataformats="HWC")
            meter.restart()

    # The end, or Ctrl-C.
    progress.close()
    skipped = sorted(ranks.union(skipped))
    if ranks.first:
        if run.step == config.steps:
            print(f"wrote {config.out / run.saved[-1]}")
        elif run.step > start:
            print(f"wrote {save(run)[0]}: the same command goes on from there")
        else:
            print("stopped before the first step: nothing was written")
        writer.close()
        if advice := meter.advice():
            print(advice)
        if most := max(cut, default=0):
            share = f"{1 - cut[0] / cut.total():.1%} of the captions"
            print(f"{share} have more than --max-tokens {max_tokens} and were cut, by up to {most} tokens")
        if skipped:
            print(f"skipped {len(skipped)} images, broken or without a caption: {', '.join(skipped)}")
    leave_ranks()


# Memory.


def plan_memory(
    config: TrainConfig, pipe, resolution: int, latents: bool, precision: str, device: torch.device, budget: int
) -> tuple[Plan, Shapes]:
    """How a step fits into `budget` bytes, by a dry run on shapes without weights; and the shapes of its attention."""
    asked, dtype, vae = config.memory.base_precision, memory.DTYPES[precision], sdxl.vae_dtype(device)
    bases = [asked] if asked in PACKED else [precision, *PACKED] if asked == "auto" and device.type == "cuda" else [precision]
    shapes = sdxl.blueprint(pipe)
    linears = quantisable(shapes)
    unpacked = sum(p.nbytes for p in shapes.parameters())
    unpacked += 0 if latents else sum(p.numel() for p in pipe.vae.parameters()) * vae.itemsize
    saved = {base: sum(m.weight.nbytes - packed_bytes(m, base) for m in linears.values()) for base in PACKED}
    adapter = add_lora(shapes, config.lora, shapes.unread, dtype=dtype)
    trained = adapter.flat.numel() * memory.bytes_per_trained(config.memory.optimizer, dtype)
    install(shapes.unet, stand_in_kernel)
    size = (resolution // pipe.vae_scale_factor, shapes.empty.shape[2] * config.captions.max_tokens // 75)
    costs = dry_run(shapes, memory.block_names(shapes), config.dataset.bs, *size)
    fixed = {base: unpacked - saved.get(base, 0) + trained for base in bases}
    vae_image = 0 if latents else sdxl.ENCODING * resolution**2 * vae.itemsize
    how = {"checkpointing": config.memory.checkpointing, "vae_image": vae_image}
    plan = make_plan(costs, fixed, config.dataset.bs, budget, **how)
    return plan, Shapes({((plan.micro, *q[1:]), (plan.micro, *k[1:])): n for (q, k), n in costs.attention.items()})


def measured(device: torch.device) -> str:
    """What the plan has come to; waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peak, reserved = memory.peak_memory(device)
    seconds = time.perf_counter() - STARTED
    return f"memory     measured peak {peak:.1f} GiB, {reserved:.1f} reserved; two steps done {seconds:.0f} s after the start"


# Files: the LoRA, and the state that --resume goes on from.


@dataclass
class Run:
    """Where a run stands; stored with its state."""

    log_dir: str
    step: int = 0
    samples: int = 0  # of the data stream, over all ranks
    saved: tuple[str, ...] = ()  # LoRA files that this run has written and not yet removed


def flat_config(config: TrainConfig) -> dict:
    """Every flag with its value: {flag: value}."""
    flags = {}
    for name, value in asdict(config).items():
        flags |= value if isinstance(value, dict) else {name: str(value) if isinstance(value, Path) else value}
    return flags


FILES = {  # --format: {layout: what its file is called after the step}
    "kohya": {"kohya": ""},
    "diffusers": {"diffusers": ""},
    "both": {"kohya": "", "diffusers": "_diffusers"},
}


def lora_file(config: TrainConfig, source: Source, adapter: Adapter, step: int, layout: str) -> bytes:
    """The bytes of the LoRA file at `step`."""
    about = formats.describe(flat_config(config), source.samples, step) | {"sdxl_lora.dataset": source.fingerprint}
    return formats.serialise(adapter.deltas, about, layout, memory.DTYPES[config.save_dtype])


def save_checkpoint(
    config: TrainConfig, source: Source, adapter: Adapter, shapes: dict[str, torch.Size], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, run: Run,
) -> tuple[Path, float]:  # fmt: skip
    """Writes the LoRA files, checks them, and writes the state of the run; then removes what this run wrote beyond the
    --keep newest. Returns a file and the largest difference of its weights from the live ones.
    """
    names, errors, dtype = [], [], memory.DTYPES[config.save_dtype]
    how = {"shapes": shapes, "live": adapter.deltas, "dtype": dtype, "otherwise": "the last one was kept"}
    for layout, suffix in FILES[config.format].items():
        names.append(f"pytorch_lora_weights_{run.step}{suffix}.safetensors")
        check = lambda written: errors.append(formats.check_written(written, **how))  # noqa: E731
        write_atomically(config.out / names[-1], lora_file(config, source, adapter, run.step, layout), check)
    files = [*(name for name in run.saved if name not in names), *names]
    keep = config.keep * len(names)
    run.saved = tuple(files[-keep:])
    state = {"lora": adapter.flat, "layers": list(adapter.modules), "optimizer": optimizer.state_dict()}
    state |= {"scaler": scaler.state_dict(), "run": asdict(run), "config": flat_config(config)}
    save_state(config.out, state)
    for name in files[:-keep]:
        (config.out / name).unlink(missing_ok=True)
    return config.out / names[0], max(errors)


def restore(
    state: dict, config: TrainConfig, adapter: Adapter, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Run:
    """Puts a saved state back. Raises UserError if it is not ours, or of a run that this one cannot go on from."""
    if not {"lora", "layers", "optimizer", "scaler", "run", "config"} <= state.keys():
        raise UserError(f"--resume {config.resume}: this is no state of train_lora.py")
    was, now = state["config"], flat_config(config)
    fixed = ("model", "rank", "alpha", "targets", "train_text_encoder", "optimizer")
    differ = [f"--{flag.replace('_', '-')} {was[flag]}" for flag in fixed if was[flag] != now[flag]]
    if differ or state["layers"] != list(adapter.modules):
        raise UserError(f"the saved state was made with {', '.join(differ)}: use that, or --resume none, or another --out")
    adapter.flat.copy_(state["lora"])
    adapter.refresh()
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty if the run so far was not in fp16
        scaler.load_state_dict(state["scaler"])
    return Run(**state["run"])


if __name__ == "__main__":
    with one_line_errors("train_lora.py"):
        try:
            main(tyro.cli(TrainConfig, config=(tyro.conf.OmitArgPrefixes,)))
        except torch.OutOfMemoryError as error:
            told = str(error).split(". ")[0]
            raise UserError(f"{told}: give less as --vram-gb, or --checkpointing all, --base-precision nf4") from None
