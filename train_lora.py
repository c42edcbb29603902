"""Trains a LoRA on SDXL's U-Net and both text encoders.

    python train_lora.py                                                 one process, the bundled model and data
    torchrun train_lora.py --rank 8 --bs 3                               the same under torchrun
    torchrun train_lora.py --model sdxl --data shards/ --rank 8 --bs 3   the recipe: real SDXL, one GPU
    torchrun --nproc-per-node 2 train_lora.py --model sdxl --data shards/
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500 train_lora.py …

Writes checkpoints/pytorch_lora_weights_{step}.safetensors and, for --resume, checkpoints/state-{n}; TensorBoard logs in runs/.
Ends with status 0 when all steps are done and saved, 75 if a signal asked it to stop (saved: the same command goes on), 74 if
the last save failed or the data can no longer be read, 71 if memory ran out, 2 for a mistake in the command. Without data, or
without memory for a gradient, the last whole step is saved.
"""

import time

STARTED = time.perf_counter()  # before the imports: they are part of the wait for the first step

import copy
import json
import math
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common.errors import LossyStream, UserError, one_line_errors, warn, warn_of
from common.files import TolerantWriter, check_writable, write_atomically
from common.options import check_options, flat_options, option, resume_policies
from data import Batch, DataConfig, Stream, describe_buckets, make_loader, normalise
from dataset.captions import CaptionConfig
from dataset.sources import open_mixture
from lora import Adapter, LoRAConfig, add_lora
from lora_files.deltas import layer_shapes
from memory import (
    DTYPES,
    MemoryConfig,
    limit_memory,
    memory_in_use,
    peak_memory,
    resolve_device,
    resolve_precision,
    temporarily_on,
    to_device,
)
from model.diffusion import Diffusion, DiffusionConfig, area_weights
from model.load import native_resolution, read_sdxl
from model.render import read_prompts
from model.sdxl import Denoiser, blueprint, text_shapes, time_ids
from model.text import CachedText, TokenInputs
from model.vae import (
    DECODING,
    ENCODING,
    decode_latents,
    encode_pixels,
    same_signature,
    sample_latents,
    vae_dtype,
    vae_signature,  # after memory, which readies xFormers: diffusers imports it
)
from performance.adamw8bit import bytes_per_trained, make_optimizer, update_scale
from performance.checkpointing import block_names, checkpoint_blocks, compile_blocks
from performance.cuda_graph import GraphedStep
from performance.kernels import KERNELS, Shapes, choose_attention, use_fast_kernels
from performance.memory_plan import ANOTHER_SHAPE, Plan, dry_run, make_plan, stand_in_kernel
from performance.quantise import PACKED_BASES as PACKED
from performance.quantise import check_quantisable, packed_bytes, quantisable, quantise_base
from run.accumulation import Accumulation, describe_out_of_memory, note_if_out_of_memory
from run.bad_steps import largest_values
from run.checkpoints import CheckpointConfig, Checkpoints, Run
from run.gallery import Gallery
from run.ranks import Ranks, join_ranks, leave_ranks
from run.report import Log, Meter, NoLog
from run.stop import Stopped, StopRequest
from run.watchdog import Watchdog

LOG_EVERY = 10  # steps; the host waits for the device only then
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TrainConfig:
    lora: LoRAConfig = LoRAConfig()
    dataset: DataConfig = DataConfig()
    captions: CaptionConfig = CaptionConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    model: str = option("demo", resume="fixed")
    """'demo' (bundled), 'sdxl' (from the hub), a hub id, a diffusers folder or a .safetensors SDXL checkpoint."""
    steps: int = option(450, at_least=1, resume="free")
    """Optimiser steps."""
    grad_accum: int = option(1, at_least=1)
    """Batches per optimiser step and process."""
    lr: float | None = option(None, at_least=0)
    """Learning rate. None: 1e-4; for the bundled model, which is 16 times narrower than SDXL, 2e-3."""
    text_encoder_lr: float | None = option(None, at_least=0)
    """Learning rate of both text encoders. None: --lr."""
    lr_schedule: Literal["constant", "cosine", "linear"] = option("constant")
    """After the warm-up: constant, or falling to zero at the last step."""
    warmup: int = option(0, at_least=0)
    """Steps over which the learning rate rises from zero."""
    log_dir: Path = option(Path("runs"), resume="free")
    """Folder for TensorBoard logs."""
    max_bad_steps: int = option(20, at_least=1, resume="free")
    """Steps in a row whose loss is not a finite number; then the run ends."""
    rank_timeout: float = option(300, at_least=1, resume="free")
    """Seconds to wait for a process that does not come to where all meet, which is every step; then all end."""
    check_ranks_every: int = option(100, at_least=1, resume="free")
    """Steps after which the processes compare their LoRA weights, bit by bit; also before each save."""
    seed: int = option(0, at_least=0, at_most=2**63 - 1)
    """Everything random is a function of it and of the step."""
    device: str = option("auto", resume="free")
    """'auto' (CUDA if there is one), 'cuda', 'cpu'."""
    pictures: bool = option(True, resume="free")
    """Draw base and LoRA side by side at every save."""
    prompts: tuple[str, ...] = option((), resume="free")
    """Of these: texts, or one file with a prompt on each line. None given: the evaluation prompts of the model."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.warmup > self.steps:
            raise UserError(f"--warmup {self.warmup} is longer than --steps {self.steps}")


def lr_factor(step: int, config: TrainConfig) -> float:
    """What the learning rates are multiplied by at `step`, counted from 0."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[config.lr_schedule]


def seed_of(*parts: int) -> int:
    """63 random bits that are a function of (seed, rank, step, …)."""
    return random.Random(str(parts)).getrandbits(63)


def main(config: TrainConfig) -> int:
    """Trains, and returns the exit status."""
    # Signals, processes, device, precision.
    stop = StopRequest()
    if config.text_encoder_lr is not None and not config.lora.train_text_encoder:
        raise UserError("--text-encoder-lr does nothing with --no-train-text-encoder")
    prompts = read_prompts(config.prompts, config.model) if config.pictures else []
    device = resolve_device(config.device)
    asked = config.memory.base_precision if config.memory.base_precision in DTYPES else config.memory.precision
    precision = resolve_precision(asked, device)
    dtype = DTYPES[precision]
    ranks = join_ranks(device, config.rank_timeout)

    # Data, looked at before the model is loaded: a mistake shows at once.
    source = open_mixture(config.dataset.data, config.dataset.cache)
    if source.latents and config.dataset.flip and not source.mirrored:
        raise UserError(
            "--flip: these latents are not there of the mirrored images: make them anew with cache_latents.py --flip"
        )
    if source.latents and config.dataset.masked_loss and not source.masked:
        raise UserError(
            "--masked-loss: these latents were made without masks: make them anew with cache_latents.py --masked-loss"
        )

    # Model on the host, and what the device will have to hold.
    pipe = read_sdxl(config.model, dtype)
    resolution = config.dataset.resolution or native_resolution(pipe)
    if source.vae and not same_signature(source.vae, vae_signature(pipe.vae)):
        raise UserError(f"--data: these latents were made by another VAE than that of --model {config.model}")
    text_ready = bool(source.text) and not config.lora.train_text_encoder
    if text_ready and (config.captions.shuffle_tags or config.captions.caption_prefix or config.captions.max_tokens > 75):
        raise UserError(
            "--shuffle-tags, --caption-prefix and --max-tokens: this text was encoded already, by cache_latents.py --text"
        )
    stream = Stream(source, config.dataset, config.captions, resolution, config.seed, ranks.rank, ranks.world, text=text_ready)
    stream.spare(stream.bucket[0])  # at least one can be decoded
    budget = ranks.least(limit_memory(config.memory.vram_gb, device))
    lengths = config.captions.max_tokens // 75
    budget -= ANOTHER_SHAPE * (len(set(stream.bucket)) * lengths - 1)
    ready = {"latents": source.latents, "text": text_ready}
    plan, attention_shapes = plan_memory(config, pipe, resolution, ready, precision, device, budget)

    # Model on the device: the frozen base, with adapters on the layers that --targets names.
    whole = denoiser = Denoiser(pipe)
    total = sum(p.numel() for p in whole.parameters())
    tell: TokenInputs | CachedText = TokenInputs(whole.tokenizers, config.captions.max_tokens)
    resting = [pipe.vae] if source.latents else []  # on the host but for pictures
    if text_ready:
        denoiser, encoders = Denoiser(pipe, with_text=False), [pipe.text_encoder, pipe.text_encoder_2]
        with temporarily_on(device, encoders):
            if not same_signature(source.text, whole.text_probe()):
                raise UserError(f"--data: its text was encoded by other encoders than those of --model {config.model}")
            tell = CachedText(whole.empty_text())
        resting += encoders
    if plan.base in PACKED:
        check_quantisable(plan.base, device)
        quantise_base(denoiser, plan.base, device)
    denoiser.to(device)
    pipe.vae.to("cpu" if source.latents else device, vae_dtype(device)).use_slicing = not plan.whole_vae
    adapter = add_lora(denoiser, config.lora, denoiser.unread, config.seed, dtype)
    attention = choose_attention(config.memory.attention, attention_shapes, device, dtype)
    use_fast_kernels(pipe.unet, KERNELS[attention])
    if config.memory.compile:
        compile_blocks(pipe.unet, block_names(pipe.unet))
    checkpoint_blocks(denoiser, plan.checkpointed)
    lr = (2e-3 if config.model == "demo" else 1e-4) if config.lr is None else config.lr
    rates = {"unet": lr, "text_encoder": lr if config.text_encoder_lr is None else config.text_encoder_lr}
    resolved: dict[str, Any] = {"precision": precision, "base_precision": plan.base, "attention": attention}
    config = replace(  # from here on with every "auto" and None resolved
        config,
        lr=lr,
        text_encoder_lr=rates["text_encoder"],
        lora=replace(config.lora, alpha=config.lora.resolved_alpha),
        dataset=replace(config.dataset, resolution=resolution),
        memory=replace(config.memory, **resolved),
    )

    # Objective and optimiser.
    diffusion = Diffusion(config.diffusion, pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type, device)
    groups = [{"name": name, "params": [p]} for name, p in adapter.groups.items()]
    optimizer = make_optimizer(config.memory.optimizer, groups)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator, channels = torch.Generator(device), pipe.unet.config.in_channels

    # The step from a batch to its gradients, every kernel of it recorded once.
    encode = (lambda posterior: posterior) if source.latents else (lambda images: encode_pixels(pipe.vae, normalise(images)))
    samples = config.dataset.bs * config.grad_accum

    def differentiate(images, spread, noise, timesteps, ids, *others) -> torch.Tensor:
        """Adds the gradients of some samples to `adapter.grad`; returns their share of the loss."""
        with note_if_out_of_memory("encoding images"):
            latents = sample_latents(pipe.vae, encode(images), spread)
        text, area = others[: tell.tensors], others[tell.tensors :]
        losses = diffusion(partial(denoiser, text=text, time_ids=ids), latents, noise, timesteps, *area)
        loss = losses.mean() / (samples / len(images))
        scaler.scale(loss).backward()
        adapter.gather()
        loss = loss.detach()
        adapter.grad[0] += 0 * loss  # a loss that is not finite makes the gradient so, on every rank: the step is not taken
        return loss

    def prepare(batch: Batch, number: int, micro: int) -> tuple[torch.Tensor, ...]:
        """A batch, and what is random about it in step `number`, on the device."""
        generator.manual_seed(seed_of(config.seed, ranks.rank, number, micro))
        latents_shape = (config.dataset.bs, channels, *(batch.size[0] // pipe.vae_scale_factor).tolist())
        images = to_device(batch.images, device)
        text = [to_device(one, device) for one in tell(batch.captions, batch.text)]
        ids = to_device(time_ids(batch.original_size, batch.crop, batch.size), device)
        spread = torch.randn(latents_shape, generator=generator, device=device)
        noise, timesteps = diffusion.draw(latents_shape, generator)
        area = [to_device(area_weights(mask), device) for mask in batch.mask]
        return images, spread, noise, timesteps, ids, *text, *area

    step = GraphedStep(differentiate, [adapter.grad], config.memory.cuda_graph, device)

    def undo() -> None:
        adapter.undo()
        step.release()

    accumulate = Accumulation(step, prepare, undo, plan.micro, plan.if_short)

    # Where the run stands: at its beginning, or where a saved state left it.
    run = Run(log_dir=ranks.from_first(str(config.log_dir / time.strftime("%Y%m%d-%H%M%S"))))
    shapes, flags, policies = layer_shapes(denoiser), flat_options(config), resume_policies(config)
    checkpoints = Checkpoints(config.checkpoints, flags, policies, source, ranks.world, adapter, shapes, optimizer, scaler)
    found = ranks.from_first(checkpoints.find() if ranks.first else None)
    if found:
        run, changes = checkpoints.restore(*found, run.log_dir)
        if run.step >= config.steps:
            if ranks.first:
                print(f"{found[0]} is at step {run.step} already: raise --steps, or start anew with --resume none")
            leave_ranks()
            return os.EX_OK
    start = run.step

    # What the run is about to do.
    images_per_step = config.dataset.bs * config.grad_accum * ranks.world
    log: Log | NoLog = NoLog()
    disk = TolerantWriter()
    if ranks.first:
        check_writable("--out", config.checkpoints.out)
        check_writable("--log-dir", Path(run.log_dir).parent)
        if not (found and checkpoints.in_out(found[0])) and (aside := checkpoints.set_aside()):
            print(f"aside      what another run has left in {config.checkpoints.out} is in {aside} now")
        log = Log(run.log_dir, purge_step=run.step + 1, attempt=TolerantWriter())
        log.add_text("config", f"```json\n{json.dumps(flags, indent=2)}\n```", run.step)
        file, content = next(checkpoints.serialise(config.steps))
        count, layers = adapter.flat.numel(), len(adapter.modules)
        share = 100 * count / total
        if found:
            print(f"resume     step {run.step} of {found[0]}{changes}")
        print(f"model      {config.model}: U-Net and text encoders {total:,} parameters, frozen; {resolution} px")
        print(f"LoRA       rank {config.lora.rank} on {layers} layers, {count:,} parameters trained: {share:.2f} %")
        print(f"data       {source.samples} images with a caption, {len(source.uncaptioned)} without")
        if source.cut:
            print(f"cut short  {', '.join(source.cut)}: the samples before the cut are used")
        print(f"buckets    {describe_buckets(source, stream.sizes, stream.bucket)}")
        print(f"batch      {config.dataset.bs} × {config.grad_accum} accumulated × {ranks.world} processes = {images_per_step}")
        print(f"steps      {config.steps}: each image {config.steps * images_per_step / source.samples:.3g} times, on average")
        launching = "every kernel launched" if step.eager else "CUDA graph"
        print(f"device     {device}, {precision}, {attention} attention, {launching}")
        print(f"memory     {plan}")
        print(f"optimiser  {config.memory.optimizer}, learning rate {rates['unet']:g}, text encoders {rates['text_encoder']:g}")
        print(f"file       {config.checkpoints.out / file}, {len(content) / 1e6:.2f} MB", flush=True)

    # The loop. Randomness is a function of (seed, rank, step), the learning rate of the step.
    stream.left_out = run.left_out
    stream.start = run.samples // config.dataset.bs
    batches = make_loader(stream, pin_memory=device.type == "cuda")
    vae_bytes = sum(p.nbytes for p in pipe.vae.parameters()) + DECODING * resolution**2 * pipe.vae.dtype.itemsize
    tight = plan.weights + vae_bytes > plan.budget
    decode = partial(decode_latents, pipe.vae, tiled=tight)
    gallery = Gallery(pipe, whole.describe, decode, adapter.disabled, prompts, resolution, ranks, stop)

    def report() -> None:
        """Reads what was measured since the last report, looks into steps without a finite loss, and logs."""
        scalars, spoilt = meter.read(images_per_step, scaler.get_scale())
        if any(spoilt):
            step.release()
        examine(run, spoilt)
        if run.bad_steps >= config.max_bad_steps:
            progress.close()
            sys.exit(f"stopped: {run.bad_steps} steps in a row had no finite loss, see {run.log_dir}/nonfinite-*")
        shown = {"lr": f"{optimizer.param_groups[0]['lr']:.2e}", "img_s": f"{scalars['images_per_second']:.2f}"}
        progress.set_postfix(loss=f"{scalars['loss']:.4f}", **shown)
        scalars |= {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        scalars |= dict(zip(("peak_memory_GiB", "peak_reserved_GiB"), peak_memory(device), strict=True))
        scalars["memory_in_use"] = memory_in_use(device)
        for name, value in scalars.items():
            log.add_scalar(name, value, run.step)
        watchdog.see(scalars | {"checksum": adapter.checksum(), "recorded_again": step.recorded_again})

    def compare() -> None:
        """Ends the run if the ranks no longer hold the same LoRA."""
        if name := ranks.first_difference(weights):
            progress.close()
            sys.exit(f"step {run.step}: the ranks no longer hold the same LoRA, {name} is the first that differs: not saved")

    def save() -> None:
        compare()
        if ranks.first and (error := disk("the checkpoint", partial(checkpoints.save, run))) is not None:
            log.add_scalar("largest_error_of_the_file", error, run.step)

    def draw() -> np.ndarray | None:
        """Base and LoRA side by side; None if it was stopped."""
        what = note_if_out_of_memory(f"drawing pictures after step {run.step}; {plan.if_short}")
        with what, temporarily_on(device, resting), torch.compiler.set_stance("force_eager"):  # compiling would take minutes
            return gallery.draw(f"LoRA, step {run.step}")

    weights = {name: delta[:2] for name, delta in adapter.deltas.items()}
    meter, skipped = Meter(device, adapter.groups, LOG_EVERY), set(source.uncaptioned)
    stopping, saved = False, True
    lost: UserError | None = None  # why data can no longer be read
    watchdog = Watchdog(diffusion.weights.mean().item(), ranks.rank)
    examine = partial(examine_steps, config, ranks, stream, denoiser, adapter, prepare, differentiate)
    progress = tqdm(total=config.steps, initial=run.step, unit="step", disable=not ranks.first)
    while run.step < config.steps and not stopping:
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]] * lr_factor(run.step, config)
        since = time.perf_counter()
        try:
            taken: list[Batch] = stop.wait(list, islice(batches, config.grad_accum)) or []  # a signal may come before the data
        except UserError as error:
            taken, lost = [], error
        waited = time.perf_counter() - since
        loss = accumulate(taken, run.step) if taken else None  # None: no data, or no memory
        left = ranks.least(0 if loss is None else 1 if stop.asked else 2)  # not this step, this one, more
        if left == 0:
            break
        assert loss is not None
        stopping = left == 1
        skipped.update(*(batch.skipped for batch in taken))
        ranks.average(adapter.grad)
        ranks.average(loss)
        scaler.unscale_(optimizer)
        norms = adapter.clip(MAX_GRAD_NORM)
        # As a GradScaler tells: the step is skipped on the device.
        optimizer.found_inf = (~norms.isfinite()).any().float()  # type: ignore[attr-defined]
        scaler.step(optimizer)
        update_scale(scaler, loss)
        adapter.refresh()
        meter.end_step(loss, norms, waited)
        run.step, run.samples, saved = run.step + 1, run.samples + images_per_step, False
        progress.update()

        if run.step == start + 2 and ranks.first:
            tqdm.write(measured(device))
        saving = stopping or run.step % config.checkpoints.save_every == 0 or run.step == config.steps
        if run.step % config.check_ranks_every == 0 and not saving:
            compare()
        if saving or run.step % LOG_EVERY == 0:
            report()
            if run.step % LOG_EVERY == 0 and run.leave_out(source.samples):  # not at other saves: another run may not have them
                stream.left_out, stream.start = run.left_out, run.samples // config.dataset.bs
                batches = make_loader(stream, pin_memory=device.type == "cuda")
        if saving:
            save()
            saved = True
        if saving and not stopping:  # the weights first, then pictures
            if prompts and (sheet := step.beside(draw)) is not None:
                log.add_image("compare", sheet, run.step, dataformats="HWC")
            meter.restart()

    # The end, a signal, no memory, or no data.
    if meter.steps:
        report()
    if not saved or ranks.any(disk.failed):  # the last whole step, or once more what was refused
        save()
    progress.close()
    if lost and run.step > start:
        warn_of("train_lora.py", lost)
    short, gone, passed = ranks.any(accumulate.failed), ranks.any(lost is not None), sorted(ranks.union(skipped))
    if ranks.first:
        why = "memory ran out" if short else "the data cannot be read" if gone else "stopped by a signal"
        why = "" if run.step == config.steps else why
        again = "the same command" + " without --resume none" * (config.checkpoints.resume == "none")
        if disk.failed:
            warn(f"step {run.step} could not be saved")
        elif run.saved:
            goes_on = f": {why}, {again} goes on from there" if why else ""
            print(f"wrote {config.checkpoints.out / run.saved[-1]}{goes_on}")
        else:
            print(f"{why} before a step was made: nothing to save")
        log.close()
        for advice in filter(None, (meter.advice(), tell.advice())):
            print(advice)
        if passed:
            print(f"skipped {len(passed)} images, broken, left out or without a caption: {', '.join(passed)}")
    leave_ranks()
    if lost and run.step == start:
        raise lost
    if disk.failed or gone:
        return os.EX_IOERR
    if short:
        return os.EX_OSERR
    return os.EX_OK if run.step == config.steps else os.EX_TEMPFAIL


# Memory.


def plan_memory(
    config: TrainConfig, pipe, resolution: int, ready: dict[str, bool], precision: str, device: torch.device, budget: int
) -> tuple[Plan, Shapes]:
    """How a step fits into `budget` bytes, by a dry run on shapes without weights; and the shapes of its attention.

    `ready`: whether latents and text come from the shards.
    """
    asked, dtype, vae = config.memory.base_precision, DTYPES[precision], vae_dtype(device)
    bases = [asked] if asked in PACKED else [precision, *PACKED] if asked == "auto" and device.type == "cuda" else [precision]
    shapes = blueprint(pipe, with_text=not ready["text"])
    linears = quantisable(shapes)
    unpacked = sum(p.nbytes for p in shapes.parameters())
    unpacked += 0 if ready["latents"] else sum(p.numel() for p in pipe.vae.parameters()) * vae.itemsize
    saved = {base: sum(m.weight.nbytes - packed_bytes(m, base) for m in linears.values()) for base in PACKED}
    adapter = add_lora(shapes, config.lora, shapes.unread, dtype=dtype)
    trained = adapter.flat.numel() * bytes_per_trained(config.memory.optimizer, dtype)
    use_fast_kernels(shapes.unet, stand_in_kernel)
    text = text_shapes(shapes, config.dataset.bs, config.captions.max_tokens // 75)
    costs = dry_run(shapes, block_names(shapes), text, resolution // pipe.vae_scale_factor)
    fixed = {base: unpacked - saved.get(base, 0) + trained for base in bases}
    vae_image = 0 if ready["latents"] else ENCODING * resolution**2 * vae.itemsize
    checkpointing = config.memory.checkpointing
    plan = make_plan(costs, fixed, config.dataset.bs, budget, checkpointing=checkpointing, vae_image=vae_image)
    piece = lambda shape: torch.Size((plan.micro, *shape[1:]))  # noqa: E731
    return plan, Shapes({(piece(q), piece(k)): n for (q, k), n in costs.attention.items()})


def measured(device: torch.device) -> str:
    """What the plan has come to; waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peak, reserved = peak_memory(device)
    seconds = time.perf_counter() - STARTED
    return f"memory     measured peak {peak:.1f} GiB, {reserved:.1f} reserved; two steps done {seconds:.0f} s after the start"


# Steps whose loss was not a finite number. They have changed nothing.


def examine_steps(
    config: TrainConfig, ranks: Ranks, stream: Stream, denoiser: Denoiser, adapter: Adapter, prepare: Callable,
    differentiate: Callable, run: Run, spoilt: list[bool],
) -> None:  # fmt: skip
    """Makes each of the last steps that were `spoilt` once more, sample by sample, and writes what it finds to
    nonfinite-{step}/ beside the log. Counts the hits of samples that are not finite again, and the bad steps in a row.
    """
    for number, bad in enumerate(spoilt, run.step - len(spoilt)):
        run.bad_steps = run.bad_steps + 1 if bad else 0
        if not bad:
            continue
        again, found = copy.copy(stream), []
        again.start = run.samples // config.dataset.bs - (run.step - number) * config.grad_accum * ranks.world
        with suppress(torch.OutOfMemoryError, UserError):  # without memory, or data, what it has seen by then
            for micro, batch in zip(range(config.grad_accum), again, strict=False):
                inputs = prepare(batch, number, micro)
                for n, (name, caption) in enumerate(zip(batch.names, batch.captions, strict=True)):
                    with largest_values(denoiser) as modules:
                        loss = differentiate(*(tensor[n : n + 1] for tensor in inputs)).item()
                    told = {"sample": name, "caption": caption, "timestep": inputs[3][n].item(), "modules": modules}
                    found.append({"finite": math.isfinite(loss + adapter.grad.sum().item()), **told})
                    adapter.refresh()
        adapter.undo()
        guilty = ranks.union({sample["sample"] for sample in found if not sample["finite"]})
        for name in guilty:
            run.hits[name] = run.hits.get(name, 0) + 1
        file = Path(run.log_dir) / f"nonfinite-{number + 1}" / f"rank{ranks.rank}.json"
        TolerantWriter()(str(file), partial(write_atomically, file, json.dumps(found, indent=1).encode()))
        if ranks.first:
            why = f"by {', '.join(sorted(guilty))}" if guilty else "which could not be repeated"
            warn(f"step {number + 1} had no finite loss or gradient and was skipped, {why}: see {file.parent}")


if __name__ == "__main__":
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    with one_line_errors("train_lora.py"):
        try:
            sys.exit(main(tyro.cli(TrainConfig, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))))
        except Stopped:
            print("stopped by a signal before a step was made: nothing to save")
            sys.exit(os.EX_TEMPFAIL)
        except torch.OutOfMemoryError as error:
            helps = "; what helps: less as --vram-gb, --checkpointing all, --base-precision nf4"
            told = describe_out_of_memory(error) + (helps if not hasattr(error, "__notes__") else "")
            warn(f"train_lora.py: {told}")
            sys.exit(os.EX_OSERR)
