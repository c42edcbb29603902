"""Does the base predict what its files say: ε or v, to zero terminal SNR? Measured at the start: a wrong word costs a run."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from data import Stream
from options.training import DiffusionConfig
from run.accumulation import Step, rows_of

MUCH_NOISE = (0.6, 0.75, 0.9)  # of the schedule; with little noise ε and v are nearly the same
NO_BETTER = 0.9  # of the error of predicting nothing: such a model tells neither
CLEARLY = 1.5  # times as large is the other error

LAST_SIGNAL = 0.0683  # √ᾱ of the last timestep of SDXL's own schedule
PAIRS = 16  # of a noise and its opposite: enough that even a model that is wrong at its last timestep is not taken for zero
NOTHING, MUCH = 0.25, 0.4  # of the last signal


def first_rows(step: Step, stream: Stream, piece: int) -> tuple[Any, Tensor]:
    """The inputs of at most `piece` images of the first batch (train_lora.StepInputs), and their latents [B, 4, h, w]."""
    batch = next(iter(stream))
    if isinstance(batch, UserError):  # the data can no longer be read
        raise batch
    text_inputs = step.model.text_inputs
    step.model.text_inputs = copy.copy(text_inputs)  # which counts the captions that it has cut
    x = rows_of(step.inputs(batch, 0, 0), slice(0, piece))
    step.model.text_inputs = text_inputs
    return x, step.model.encode(x.images, x.posterior_noise)


@torch.no_grad()
def measure_prediction(step: Step, x: Any, latents: Tensor) -> dict[str, float]:
    """{'epsilon' or 'v_prediction': mean squared error of the model's output as that, divided by that of 0}, for
    `first_rows`.
    """
    diffusion, errors = step.diffusion, {"epsilon": 0.0, "v_prediction": 0.0}
    for share in MUCH_NOISE:
        t = torch.full_like(x.timesteps, int(share * len(diffusion.alphas_cumprod)))
        output = step.model.denoiser(diffusion.add_noise(latents, x.noise, t), t, x.text, x.time_ids).float()
        targets = {"epsilon": x.noise, "v_prediction": diffusion.velocity(latents, x.noise, t)}
        for name, target in targets.items():
            errors[name] += ((output - target).square().mean() / target.square().mean()).item() / len(MUCH_NOISE)
    return errors


@torch.no_grad()
def measure_last_signal(step: Step, x: Any, latents: Tensor) -> float:
    """√ᾱ of the last timestep that the model was trained to, as a share of that of SDXL's own schedule; for `first_rows`.

    There v = √ᾱ·ε − √(1 − ᾱ)·x_0, so the best output moves by √ᾱ·(1 − λ) with the noise, where the latents have variance λ: not
    at all at zero terminal SNR. Measured in the half of the directions of 2 × 2 latents that vary least, so λ is small, and the
    share of a model of SDXL's schedule somewhat below 1. Latents that the base does not know do no harm: only noise is put in.
    """
    patches = lambda images: F.pixel_unshuffle(images.float(), 2).movedim(1, -1).flatten(0, 2)  # noqa: E731  [B·h·w/4, 16]
    quiet = torch.linalg.eigh((patches(latents).T @ patches(latents)).cpu()).eigenvectors[:, :8].to(latents.device)
    generator = torch.Generator(latents.device).manual_seed(0)
    t, moved = torch.full_like(x.timesteps, len(step.diffusion.alphas_cumprod) - 1), 0.0
    for _ in range(PAIRS):
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        up, down = (step.model.denoiser(sign * noise, t, x.text, x.time_ids) for sign in (1, -1))
        difference, put_in = patches((up - down) / 2) @ quiet, patches(noise) @ quiet
        moved += ((difference * put_in).sum() / put_in.square().sum()).item() / PAIRS
    return moved / LAST_SIGNAL


def check_prediction(step: Step, stream: Stream, piece: int, begun: int, config: DiffusionConfig) -> None:
    """Adds what was measured to `step.model.predicts`; not to a run of `begun` steps that goes on. Raises UserError if it
    contradicts the files of the model, and --prediction-type is auto.
    """
    if begun:
        return
    x, latents = first_rows(step, stream, piece)
    errors, told = measure_prediction(step, x, latents), step.model.pipe.scheduler.config.prediction_type
    other = "epsilon" if told == "v_prediction" else "v_prediction"
    figures = f"error {errors['epsilon']:.2g} as ε, {errors['v_prediction']:.2g} as v"
    if errors[other] < NO_BETTER and CLEARLY * errors[other] < errors[told] and config.prediction_type == "auto":
        raise UserError(
            f"--model {step.model.name} predicts {other}, as its own predictions show ({figures}), but its files say {told}: "
            f"--prediction-type {other} corrects them, --prediction-type {told} leaves them"
        )
    certain = errors[told] < NO_BETTER and CLEARLY * errors[told] < errors[other]
    step.model.predicts += f"; {'measured' if certain else 'measuring cannot tell'}: {figures}"
    if certain and told == "v_prediction":
        check_terminal_snr(step, measure_last_signal(step, x, latents), config.zero_snr)


def check_terminal_snr(step: Step, signal: float, option: str) -> None:
    """As `check_prediction`, for zero terminal SNR, what `measure_last_signal` says of it, and `option`, --zero-snr."""
    told, zero = bool(step.diffusion.alphas_cumprod[-1] < 1e-6), abs(signal) < NOTHING
    figure = f"{signal:.2f} of the signal that SDXL's schedule leaves at the end"
    certain = zero or signal > MUCH
    if certain and zero != told and option == "auto":
        right, files = ("yes", "no") if zero else ("no", "yes")
        raise UserError(
            f"--model {step.model.name} was trained {'to' if zero else 'without'} zero terminal SNR, as its own predictions "
            f"show ({figure}, {0 if told else 1} by its files): --zero-snr {right} corrects the files, --zero-snr {files} "
            "leaves them"
        )
    step.model.predicts += f"; zero terminal SNR {('yes' if zero else 'no') if certain else 'cannot be told'}: {figure}"
