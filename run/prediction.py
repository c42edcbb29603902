"""Does the base predict what its files say, ε or v? Measured before the first step: a wrong word there costs a whole run."""

import copy

import torch

from common.errors import UserError
from data import Stream
from run.accumulation import Step, rows_of

MUCH_NOISE = (0.6, 0.75, 0.9)  # of the schedule; with little noise ε and v are nearly the same
NO_BETTER = 0.9  # of the error of predicting nothing: such a model tells neither
CLEARLY = 1.5  # times as large is the other error


@torch.no_grad()
def measure_prediction(step: Step, stream: Stream, piece: int) -> dict[str, float]:
    """{'epsilon' or 'v_prediction': mean squared error of the model's output as that, divided by that of 0}, for at most
    `piece` images of the first batch.
    """
    diffusion = step.diffusion
    batch = next(iter(stream))
    if isinstance(batch, UserError):  # the data can no longer be read
        raise batch
    text_inputs = step.model.text_inputs
    step.model.text_inputs = copy.copy(text_inputs)  # which counts the captions that it has cut
    x = rows_of(step.inputs(batch, 0, 0), slice(0, piece))
    step.model.text_inputs = text_inputs
    latents = step.model.encode(x.images, x.posterior_noise)
    errors = {"epsilon": 0.0, "v_prediction": 0.0}
    for share in MUCH_NOISE:
        t = torch.full_like(x.timesteps, int(share * len(diffusion.alphas_cumprod)))
        output = step.model.denoiser(diffusion.add_noise(latents, x.noise, t), t, x.text, x.time_ids).float()
        targets = {"epsilon": x.noise, "v_prediction": diffusion.velocity(latents, x.noise, t)}
        for name, target in targets.items():
            errors[name] += ((output - target).square().mean() / target.square().mean()).item() / len(MUCH_NOISE)
    return errors


def check_prediction(step: Step, stream: Stream, piece: int, begun: int, option: str) -> None:
    """Adds what was measured to `step.model.predicts`; not to a run of `begun` steps that goes on. Raises UserError if it
    contradicts the files of the model, and `option`, --prediction-type, is auto.
    """
    if begun:
        return
    errors, told = measure_prediction(step, stream, piece), step.model.pipe.scheduler.config.prediction_type
    other = "epsilon" if told == "v_prediction" else "v_prediction"
    figures = f"error {errors['epsilon']:.2g} as ε, {errors['v_prediction']:.2g} as v"
    if errors[other] < NO_BETTER and CLEARLY * errors[other] < errors[told] and option == "auto":
        raise UserError(
            f"--model {step.model.name} predicts {other}, as its own predictions show ({figures}), but its files say {told}: "
            f"--prediction-type {other} corrects them, --prediction-type {told} leaves them"
        )
    certain = errors[told] < NO_BETTER and CLEARLY * errors[told] < errors[other]
    step.model.predicts += f"; {'measured' if certain else 'measuring cannot tell'}: {figures}"
