"""Trains a LoRA on SDXL's U-Net and both text encoders.

    python train_lora.py                                                 one process, the bundled model and data
    torchrun train_lora.py --rank 8 --bs 3                               the same under torchrun
    torchrun train_lora.py --model sdxl --data shards/ --rank 8 --bs 3   the recipe: real SDXL, one GPU
    torchrun --nproc-per-node 2 train_lora.py --model sdxl --data shards/
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500 train_lora.py …

Writes checkpoints/pytorch_lora_weights_{step}.safetensors and, for --resume, checkpoints/state-{n}; TensorBoard logs in runs/.
Exit status: 0 all steps are done and saved; 75 a signal asked it to stop (saved: the same command goes on); 74 the last save
failed, or the data can no longer be read; 71 memory ran out; 2 a mistake in the command. Without data, or without memory for a
gradient, the last whole step is saved.
"""

import time

STARTED = time.perf_counter()  # before the imports: they are part of the wait for the first step

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.options import MAX_SEED, check_options, flat_options, option, resume_policies
from data import Batch, DataConfig, Loader, Stream, open_data
from dataset.captions import CaptionConfig
from lora import Adapter, LoRAConfig, add_lora
from lora_files.deltas import layer_shapes
from memory import MemoryConfig, apply_plan, limit_memory, plan_memory, resolve_device, to_device
from model.diffusion import Diffusion, DiffusionConfig, area_weights
from model.load import native_resolution, read_sdxl
from model.sdxl import time_ids
from performance.cuda_graph import GraphedStep
from run.accumulation import Accumulation
from run.bad_steps import BadSteps, BadStepsConfig
from run.checkpoints import CheckpointConfig, Checkpoints
from run.ending import Ending, agree_on_ending, run_script
from run.gallery import Gallery, GalleryConfig
from run.optimiser import Optimiser, OptimiserConfig
from run.ranks import RanksConfig, join_ranks, leave_ranks
from run.report import LOG_EVERY, Report, ReportConfig
from run.setup import TrainingModel, check_together, seed_of
from run.stop import StopRequest, Upcoming


@dataclass(frozen=True)
class TrainConfig:
    """Every option is declared beside the code that reads it; together they are the flags of this script."""

    lora: LoRAConfig = LoRAConfig()
    dataset: DataConfig = DataConfig()
    captions: CaptionConfig = CaptionConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    gallery: GalleryConfig = GalleryConfig()
    report: ReportConfig = ReportConfig()
    bad_steps: BadStepsConfig = BadStepsConfig()
    ranks: RanksConfig = RanksConfig()
    model: str = option("demo", resume="fixed")
    """'demo' (bundled), 'sdxl' (from the hub), a hub id, a diffusers folder or a .safetensors SDXL checkpoint."""
    steps: int = option(450, at_least=1, resume="free")
    """Optimiser steps."""
    grad_accum: int = option(1, at_least=1)
    """Batches per optimiser step and process."""
    seed: int = option(0, at_least=0, at_most=MAX_SEED)
    """Everything random is a function of it and of the step."""
    device: str = option("auto", resume="free")
    """'auto' (CUDA if there is one), 'cuda', 'cpu'."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.optimiser.warmup > self.steps:
            raise UserError(f"--warmup {self.optimiser.warmup} is longer than --steps {self.steps}")

    def resolved(self, device: torch.device, resolution: int) -> "TrainConfig":
        """With every "auto" and None resolved, but for those that the plan decides."""
        return replace(
            self,
            lora=replace(self.lora, alpha=self.lora.resolved_alpha),
            dataset=replace(self.dataset, resolution=resolution),
            optimiser=self.optimiser.resolved(self.model),
            memory=self.memory.resolved(device),
        )


# The step, in the order in which the data flows.


class StepInputs(NamedTuple):
    """What one forward and backward pass needs, on the device. The first dimension of every tensor is the batch."""

    images: Tensor  # pixels [B, h, w, 3] uint8, or ready-made VAE posteriors [B, 8, h/8, w/8] float16
    posterior_noise: Tensor  # [B, 4, h/8, w/8]: draws the latents from their posterior
    noise: Tensor  # ε [B, 4, h/8, w/8]
    timesteps: Tensor  # [B] int64
    time_ids: Tensor  # [B, 6] float32: SDXL's size and crop conditioning
    text: tuple[Tensor, ...]  # (tokens [B, 2, 77·n],), or ready-made (context [B, 77, d1 + d2], pooled [B, d2])
    area: Tensor | None  # [B, 1, h/8, w/8] with --masked-loss: weights of the squared error


class TrainStep:
    """From a batch to the gradient of A and B. Nothing in `backward` waits for the device: a CUDA graph can hold all of it."""

    def __init__(self, config: TrainConfig, model: TrainingModel, adapter: Adapter, scaler: torch.amp.GradScaler, rank: int):
        self.model, self.adapter, self.scaler = model, adapter, scaler
        scheduler = model.pipe.scheduler
        self.diffusion = Diffusion(config.diffusion, scheduler.alphas_cumprod, scheduler.config.prediction_type, model.device)
        self.samples = config.dataset.bs * config.grad_accum  # of an optimiser step, on this rank
        self.seed, self.rank, self.generator = config.seed, rank, torch.Generator(model.device)

    def inputs(self, batch: Batch, step: int, micro: int) -> StepInputs:
        """A batch on the device, with its random numbers: a function of (seed, rank, step, micro)."""
        device, shape = self.model.device, self.model.latent_shape(batch)
        self.generator.manual_seed(seed_of(self.seed, self.rank, step, micro))
        posterior_noise = torch.randn(shape, generator=self.generator, device=device)
        noise, timesteps = self.diffusion.draw(shape, self.generator)
        images = to_device(batch.images, device)
        ids = to_device(time_ids(batch.original_size, batch.crop, batch.size), device)
        text = tuple(to_device(part, device) for part in self.model.text_inputs(batch.captions, batch.text))
        area = None if batch.mask is None else to_device(area_weights(batch.mask), device)
        return StepInputs(images, posterior_noise, noise, timesteps, ids, text, area)

    def losses(self, x: StepInputs) -> Tensor:
        """The loss of each sample, [B] float32."""
        latents = self.model.encode(x.images, x.posterior_noise)
        noisy = self.diffusion.add_noise(latents, x.noise, x.timesteps)
        prediction = self.model.denoiser(noisy, x.timesteps, x.text, x.time_ids)
        return self.diffusion.loss(prediction, latents, x.noise, x.timesteps, x.area)

    def backward(self, x: StepInputs) -> Tensor:
        """Adds these samples' share of the gradient to `adapter.grad`. Returns their share of the loss, []."""
        loss = self.losses(x).mean() / (self.samples / len(x.images))
        self.scaler.scale(loss).backward()
        self.adapter.collect_gradients()
        self.adapter.spoil_unless_finite(loss.detach())  # so that every rank sees it in the averaged gradient, and skips
        return loss.detach()


def main(config: TrainConfig) -> Ending:
    # Signals, prompts, device, processes.
    stop = StopRequest()
    if config.optimiser.text_encoder_lr is not None and not config.lora.train_text_encoder:
        raise UserError("--text-encoder-lr does nothing with --no-train-text-encoder")
    prompts = config.gallery.read(config.model)
    device = resolve_device(config.device)
    ranks = join_ranks(device, config.ranks.rank_timeout)

    # Data, opened before the model is loaded: a mistake in --data shows at once.
    source = open_data(config.dataset)

    # Model on the host. From here on no option is "auto" or None, but for those that the plan decides.
    pipe = read_sdxl(config.model, config.memory.resolved(device).dtype)
    resolution = config.dataset.resolution or native_resolution(pipe)
    config = config.resolved(device, resolution)
    cached_text = bool(source.text_signature) and not config.lora.train_text_encoder
    check_together(source, pipe, config.model, config.captions, cached_text)
    stream = Stream(source, config.dataset, config.captions, resolution, config.seed, ranks.rank, ranks.world, text=cached_text)
    stream.first_decodable(stream.bucket[0])  # raises UserError if there is none
    budget = ranks.min(limit_memory(config.memory.vram_gb, device))
    plan = plan_memory(pipe, config.lora, config.memory, stream.workload, device, budget)

    # Model on the device, from the inside out: the frozen base, packed if the plan says so; LoRA in place of its linear
    # layers; kernels that call these; compiled blocks of all that; and checkpointing around the blocks.
    model = TrainingModel(pipe, config.model, source, config.captions, stream.workload, plan, device)
    adapter = add_lora(model.denoiser, config.lora, model.denoiser.unused, config.seed, config.memory.dtype)
    attention = apply_plan(model.denoiser, plan, config.memory, device)
    optimiser = Optimiser(config.optimiser, config.memory.optimizer, adapter, config.steps, config.memory.dtype)

    # The step: every batch in pieces of plan.micro samples, each piece one replay of a CUDA graph.
    step = TrainStep(config, model, adapter, optimiser.scaler, ranks.rank)
    backward = GraphedStep(step.backward, [adapter.grad], config.memory.cuda_graph, device)
    accumulate = Accumulation(step, backward, plan.micro, plan.oom_advice)

    # The run: at its beginning, or where a saved state left it.
    flags = flat_options(config) | {"base_precision": plan.base, "attention": attention}
    shapes, policies = layer_shapes(model.denoiser), resume_policies(config)
    checkpoints = Checkpoints(config.checkpoints, flags, policies, source, ranks, adapter, shapes, optimiser)
    run = checkpoints.start_or_resume(ranks.broadcast(config.report.new_log()))
    if run.step >= config.steps:
        return checkpoints.nothing_to_do(run)
    start, samples = run.step, step.samples * ranks.world
    report = Report(run, config.steps, samples, ranks, adapter, optimiser, backward, step.diffusion.mean_weight, STARTED)
    report.opening(model, stream, plan, checkpoints)
    bad_steps = BadSteps(config.bad_steps, config.grad_accum, run, stream, step, backward, ranks)
    gallery = Gallery(model, adapter, prompts, resolution, ranks, stop, plan)
    loader = Loader(stream, run.samples, run.left_out, pin_memory=device.type == "cuda")

    # The loop. Randomness is a function of (seed, rank, step), the learning rate of the step.
    upcoming = Upcoming.MORE_STEPS
    while run.step < config.steps and upcoming is Upcoming.MORE_STEPS:
        optimiser.set_learning_rates(run.step)
        batches = loader.take(config.grad_accum, stop.wait)
        loss = accumulate(batches, run.step)  # None: a signal came before the data, the data is lost, or memory ran out
        upcoming = Upcoming(ranks.min(Upcoming.of(loss, stop)))  # the ranks do what the least of them can
        if loss is None or upcoming is Upcoming.NO_STEP:
            break
        ranks.average(adapter.grad)
        ranks.average(loss)
        norms = optimiser.step(loss)
        run.advance(samples)
        report.after_step(loss, norms, loader.waited)

        logging = run.step % LOG_EVERY == 0
        saving = upcoming is Upcoming.LAST_STEP or run.step % config.checkpoints.save_every == 0 or run.step == config.steps
        if saving or logging:
            bad_steps.examine(report.read())
        if logging and run.leave_out(source.samples):  # not at other saves: the order of batches may not depend on --save-every
            loader.restart(run.samples, run.left_out)
        if saving:
            report.saved(checkpoints.save(run))
        elif run.step % config.ranks.check_ranks_every == 0:
            checkpoints.check_ranks(run)
        if saving and upcoming is Upcoming.MORE_STEPS:  # the weights first, then pictures
            report.pictures(backward.retry_without_graphs(partial(gallery.draw, run.step)))

    # The end: whatever ended the loop, the last whole step is saved.
    bad_steps.examine(report.read())
    report.saved(checkpoints.save_if_needed(run))
    ending = agree_on_ending(
        ranks, finished=run.step == config.steps, out_of_memory=accumulate.failed, data_lost=loader.error is not None,
        not_saved=checkpoints.disk.failed,
    )  # fmt: skip
    report.closing(ending, checkpoints, loader, model.text_inputs.advice())
    leave_ranks()
    if loader.error and run.step == start:
        raise loader.error  # a mistake in --data
    return ending


if __name__ == "__main__":
    sys.exit(run_script("train_lora.py", main, TrainConfig, __doc__))
