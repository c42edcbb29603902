"""Trains a LoRA on SDXL's U-Net and both text encoders.

    python train_lora.py                                                 one process, the bundled model and data
    torchrun train_lora.py --rank 8 --bs 3                               the same under torchrun
    torchrun train_lora.py --model sdxl --data shards/ --rank 8 --bs 3   the recipe: real SDXL, one GPU
    torchrun --nproc-per-node 2 train_lora.py --model sdxl --data shards/
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500 train_lora.py …

Writes checkpoints/pytorch_lora_weights_{step}.safetensors, pictures to checkpoints/samples/ and, for --resume,
checkpoints/state-{n}; TensorBoard logs in runs/.
Exit status: 0 all steps are done and saved; 75 a signal asked it to stop (saved: the same command goes on); 74 the last save
failed, or the data can no longer be read; 71 memory ran out; 1 training went wrong, as the last line says; 2 a mistake in the
command. Without data, or without memory for a gradient, the last whole step is saved.
"""

import time

STARTED = time.perf_counter()  # before the imports: they are part of the wait for the first step

import sys
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from options.command import parse_command
from options.training import TrainCommand, TrainConfig

if __name__ == "__main__":
    COMMAND = parse_command("train_lora.py", TrainCommand, __doc__).run  # before PyTorch, whose import takes seconds

import torch
from torch import Tensor

from common.options import flat_options, resume_policies
from common.seeds import seed_generator, seed_of
from data import Batch, Loader, Stream, open_data
from lora import Adapter, add_lora
from lora_files.deltas import layer_shapes
from memory import DTYPES, apply_plan, limit_memory, note_if_out_of_memory, plan_memory, resolve_device, to_device
from model.diffusion import Diffusion
from model.load import native_resolution, read_sdxl
from model.sdxl import time_ids
from performance.cuda_graph import GraphedStep
from run.accumulation import Accumulation, rows_of
from run.bad_steps import BadSteps
from run.checkpoints import Checkpoints
from run.ending import Ending, agree_on_ending, run_script
from run.examiner import Examiner
from run.gallery import Gallery, prompts_to_draw
from run.header import run_header
from run.held_out import hold_out
from run.lineage import Lineage
from run.optimiser import Optimiser, check_optimiser
from run.prediction import check_prediction
from run.prior import Prior, add_prior, counting_graphs
from run.ranks import join_ranks, leave_ranks
from run.record import RunRecord
from run.report import LOG_EVERY, Report
from run.setup import TrainingModel, check_together
from run.stop import StopRequest, Upcoming
from run.validation import Validation


class StepInputs(NamedTuple):
    """What one forward and backward pass needs, on the device, for B images of H × W pixels; h = H/8, w = W/8."""

    images: Tensor  # [B, H, W, 3] uint8, or cached VAE posteriors [B, 8, h, w] float16
    posterior_noise: Tensor  # [B, 4, h, w]: draws the latents from their posterior
    noise: Tensor  # ε [B, 4, h, w]
    added_noise: Tensor  # [B, 4, h, w]: ε, but for --input-perturbation
    timesteps: Tensor  # [B] int64
    time_ids: Tensor  # [B, 6] float32: SDXL's size and crop conditioning
    text: tuple[Tensor, ...]  # (tokens [B, 2, 77·n],), or cached (context [B, 77, d1 + d2], pooled [B, d2])
    loss_weights: Tensor | None  # [B, 1, h, w] with --masked-loss, [B, 1, 1, 1] with a prior
    kept_ranks: Tensor | None  # [B, Σ r] with --rank-dropout
    prior: Tensor  # [k], only its length counts: the first k images learn what the base predicts (--prior-share)


class TrainStep:
    """From the batches of a step to the gradient of A and B, in the order in which the data flows."""

    def __init__(self, config: TrainConfig, model: TrainingModel, adapter: Adapter, scaler: torch.amp.GradScaler, rank: int):
        self.model, self.adapter, self.scaler = model, adapter, scaler
        scheduler = model.pipe.scheduler
        self.diffusion = Diffusion(config.diffusion, scheduler.alphas_cumprod, scheduler.config.prediction_type, model.device)
        self.samples = config.dataset.bs * config.grad_accum  # of a step, on this rank
        self.seed, self.rank, self.generator = config.seed, rank, torch.Generator(model.device)
        self.prior = Prior(config.prior, config.captions, config.seed, rank, model, adapter)
        self.graphed = GraphedStep(self.backward, [adapter.grad], config.memory.cuda_graph, model.device)

    def gradient(self, batches: list[Batch], step: int, piece: int) -> Tensor:
        """The gradient of `step`, counted from 0, is added to `adapter.grad`, from at most `piece` images at once.

        Returns the mean loss, [] on the device.
        """
        loss = torch.zeros((), device=self.model.device)
        for index, batch in enumerate(batches):
            h, w = batch.size[0].tolist()
            with note_if_out_of_memory(f"in step {step + 1}, {piece} images of {h} × {w} at once"):
                inputs = self.inputs(batch, step, index)
                for begin in range(0, len(batch.images), piece):
                    loss = loss + self.graphed(rows_of(inputs, slice(begin, begin + piece)))
        return loss

    def inputs(self, batch: Batch, step: int, index: int) -> StepInputs:
        """Batch `index` of a step on the device, with its random numbers: a function of (seed, rank, step, index)."""
        device, shape = self.model.device, self.model.latent_shape(batch)
        seed_generator(self.generator, seed_of(self.seed, self.rank, step, index))
        posterior_noise = torch.randn(shape, generator=self.generator, device=device)
        draws = self.diffusion.draw(shape, self.generator)
        images = to_device(batch.images, device)
        ids = to_device(time_ids(batch.original_size, batch.crop, batch.size), device)
        captions, weights, prior = self.prior.rows(batch, step, index)
        text = tuple(to_device(part, device) for part in self.model.text_inputs(captions, batch.text))
        kept_ranks = self.adapter.dropout.draw(shape[0], self.generator)
        return StepInputs(images, posterior_noise, *draws, ids, text, weights, kept_ranks, prior)

    def backward(self, x: StepInputs) -> Tensor:
        """Adds the share of these images to the gradient, and returns their share of the loss. Nothing here waits for the
        device, so that a CUDA graph can hold all of it.
        """
        with self.adapter.dropout(x.kept_ranks):
            loss = self.losses(x).mean() / (self.samples / len(x.images))
            self.scaler.scale(loss).backward()
        self.adapter.spoil_unless_finite(loss.detach())  # so that every rank sees it in the averaged gradient, and skips
        return loss.detach()

    def losses(self, x: StepInputs) -> Tensor:
        """The loss of each image, [B] float32."""
        latents = self.model.encode(x.images, x.posterior_noise)
        noisy = self.diffusion.add_noise(latents, x.added_noise, x.timesteps)
        target = self.prior.target(self.diffusion.target(latents, x.noise, x.timesteps), noisy, x)
        prediction = self.model.denoiser(noisy, x.timesteps, x.text, x.time_ids)
        return self.diffusion.loss_towards(target, prediction, x.timesteps, x.loss_weights)


def main(config: TrainConfig) -> Ending:
    # Signals, prompts, device, processes.
    stop = StopRequest()
    prompts = prompts_to_draw(config.gallery, config.captions, config.model)
    device = resolve_device(config.device)
    config = check_optimiser(config.resolved(device))
    dtype = DTYPES[config.memory.precision]
    ranks = join_ranks(device, config.ranks.rank_timeout)

    # Data, opened before the model is loaded: a mistake in --data shows at once.
    held_out = hold_out(config, open_data(config.dataset, config.caption_files))
    source, drawn = held_out.training, add_prior(config, held_out.training)
    has_text = bool(source.text_signature) and not config.lora.train_text_encoder

    # Model on the host, and the plan by which a step fits into the memory of the device.
    pipe = read_sdxl(config.model, dtype, True, config.diffusion.prediction_type, config.diffusion.zero_snr)
    lineage = Lineage(config.lineage, pipe)
    lineage.merge(has_text)
    resolution = config.dataset.resolution or native_resolution(pipe)
    config = replace(config, dataset=replace(config.dataset, resolution=resolution))
    check_together(source, pipe, config.model, config.captions, has_text)
    stream = Stream(drawn, config.dataset, config.captions, resolution, config.seed, ranks.rank, ranks.world, has_text)
    config = config.in_steps(drawn.epoch, ranks.world)
    stream.first_decodable(stream.bucket[0])  # raises UserError if no image can be decoded
    budget = ranks.min(limit_memory(config.memory.vram_gb, device))
    plan = plan_memory(pipe, config, counting_graphs(stream.workload, config.prior), device, budget)

    # Model on the device, from the inside out: the base, LoRA in place of linear layers, fast layers, checkpointing.
    model = TrainingModel(pipe, config.model, source, config.captions, stream.workload, plan, device)
    adapter = add_lora(model.denoiser, config.lora, model.denoiser.unused, config.seed, dtype, device)
    lineage.begin(adapter)
    attention = apply_plan(model.denoiser, plan, config.memory, device)
    optimiser = Optimiser(config, adapter, ranks.world, dtype)
    train_step = TrainStep(config, model, adapter, optimiser.scaler, ranks.rank)
    accumulate = Accumulation(train_step, plan.micro, plan.oom_advice)

    # The run: at its beginning, or where a saved state left it.
    flags = flat_options(config) | {"base_precision": plan.base, "attention": attention} | lineage.flags
    header = partial(run_header, flags, source, pipe.scheduler.config.prediction_type, prompts)
    shapes, policies = layer_shapes(model.denoiser), resume_policies(config)
    checkpoints = Checkpoints(config.checkpoints, flags, policies, drawn, ranks, adapter, shapes, optimiser, header)
    run = checkpoints.start_or_resume(ranks.broadcast(config.report.new_log(config.checkpoints.name)))
    if run.step >= config.steps:
        return checkpoints.nothing_to_do(run)
    start, samples_per_step = run.step, train_step.samples * ranks.world
    report = Report(run, config.steps, samples_per_step, ranks, train_step, optimiser, STARTED)
    checkpoints.prepare_out()
    record = RunRecord(checkpoints, run, report.curves, ranks.is_first)
    bad_steps = BadSteps(config.bad_steps, config.grad_accum, run, stream, train_step, ranks)
    validation = Validation(config, held_out, stream, model, adapter, ranks, plan, record.values)
    validation.prepare()
    check_prediction(train_step, stream, plan.micro, run.step, config.diffusion)
    examiner = Examiner(model, adapter, held_out, stream, prompts, record.values, ranks.is_first)
    gallery = Gallery(config.gallery, model, adapter, prompts, resolution, config.checkpoints, ranks, stop, plan, examiner)
    stop.end_setup()  # from here on the loop notices a signal: an exception would leave worker processes half made
    loader = Loader(stream, run.samples, run.left_out, pin_memory=device.type == "cuda")
    report.opening(stream, plan, checkpoints, lineage, gallery.prompts, validation.describe())
    validation.begin()
    report.pictures(gallery.begin(run.step))
    record.begin(gallery.prompts, report.lines, samples_per_step)

    # The loop. What is random, and the learning rate, are functions of the step.
    upcoming = validation.upcoming
    with report.progress:
        while run.step < config.steps and upcoming is Upcoming.MORE_STEPS:
            optimiser.set_learning_rates(run.step)
            batches = loader.take(config.grad_accum, stop.wait)
            loss = accumulate(batches, run.step)  # None: a signal came before the data, the data is lost, or memory ran out
            upcoming = Upcoming(ranks.min(Upcoming.of(loss, stop)))  # the ranks do what the least of them can
            if loss is None or upcoming is Upcoming.NO_STEP:  # here, or on another rank
                break
            ranks.average(adapter.grad)
            ranks.average(loss)
            norms = optimiser.step(loss)
            run.advance(samples_per_step)
            report.after_step(loss, norms, loader.waited)

            logging = run.step % LOG_EVERY == 0
            saving = upcoming is Upcoming.LAST_STEP or checkpoints.is_due(run.step, config.steps)
            drawing = upcoming is Upcoming.MORE_STEPS and gallery.is_due(run.step, config.steps, saving)
            validating = upcoming is Upcoming.MORE_STEPS and validation.is_due(run.step, config.steps)
            if run.step % config.ranks.check_ranks_every == 0 and not saving:
                checkpoints.check_ranks(run)
            if saving or drawing or validating or logging:
                bad_steps.examine(report.read())
            if logging and run.leave_out(drawn.samples):  # not at other saves: batches may not depend on --save-every
                loader.restart(run.samples, run.left_out)
            if saving:
                report.saved(checkpoints.save(run))
            if validating:  # after the weights are safe
                report.validated(train_step.graphed.retry_without_graphs(partial(validation.measure, run.step)))
                upcoming = validation.upcoming
            if drawing:
                report.pictures(train_step.graphed.retry_without_graphs(partial(gallery.draw, run.step), gallery.fits))
            if saving or validating or drawing:
                record.write()

    # The end: whatever ended the loop, the last whole step is saved.
    bad_steps.examine(report.read())
    report.saved(checkpoints.save_if_needed(run))
    ending = agree_on_ending(
        ranks, finished=run.step == config.steps or validation.over, out_of_memory=accumulate.failed,
        data_lost=loader.error is not None, not_saved=checkpoints.disk.failed,
    )  # fmt: skip
    report.closing(ending, checkpoints, loader, model.text_inputs.advice(), validation.improvement)
    record.close(ending)
    leave_ranks()
    if loader.error and run.step == start:
        raise loader.error  # a mistake in --data
    return ending


if __name__ == "__main__":
    sys.exit(run_script("train_lora.py", main, COMMAND))
