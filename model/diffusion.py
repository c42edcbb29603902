"""The objective: noise a latent, predict the noise, weigh the error (Ho et al. 2020, arXiv:2006.11239).

Timesteps, noise, loss and weighting are chosen once, as objects, by `DiffusionConfig`; the step calls them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from options.training import DiffusionConfig

# Timesteps.


class EvenTimesteps:
    """low ≤ t < high, each as likely."""

    def __init__(self, low: int, high: int, T: int):
        """Raises UserError if the schedule, of `T` timesteps, is shorter."""
        if high > T:
            raise UserError(f"--timesteps {low}-{high}: the schedule of --model has {T} timesteps")
        self.low, self.high = low, high

    def probabilities(self, T: int) -> Tensor:
        t = torch.arange(T)
        return ((self.low <= t) & (t < self.high)).double() / (self.high - self.low)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.low, self.high, (count,), generator=generator, device=generator.device)


class WeightedTimesteps:
    """t as often as its weight says."""

    def __init__(self, weights: Tensor, device: torch.device):
        """`weights`: [T] float64, not negative."""
        self.table = weights / weights.max()  # whose sum is finite
        self.table = self.table / self.table.sum()
        ends = self.table.cumsum(0)
        self.ends = (ends / ends[-1]).float().to(device)
        self.last = int(weights.nonzero()[-1])

    def probabilities(self, T: int) -> Tensor:
        return self.table

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        at = torch.rand(count, generator=generator, device=generator.device)
        return torch.searchsorted(self.ends, at, right=True).clamp(max=self.last)  # the host does not wait, as for multinomial


def choose_timesteps(config: DiffusionConfig, T: int, device: torch.device) -> EvenTimesteps | WeightedTimesteps:
    """Raises UserError if the schedule of `T` timesteps does not have them."""
    kind, values = config.forms["timesteps"]
    if kind == "uniform":
        return EvenTimesteps(0, T, T)
    if kind == "range":
        return EvenTimesteps(int(values[0]), int(values[1]), T)
    if kind == "weights":
        if len(values) > T:
            raise UserError(f"--timesteps: {len(values)} weights for the {T} timesteps of --model")
        return WeightedTimesteps(torch.tensor(values, dtype=torch.float64)[torch.arange(T) * len(values) // T], device)
    mean, deviation = values  # logit(t / T) is normal, as in Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206)
    edges = (torch.logit(torch.arange(T + 1).double() / T) - mean) / deviation
    return WeightedTimesteps(torch.special.ndtr(edges).diff(), device)


# Noise.


def plain_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


class OffsetNoise:
    """A random brightness for each channel of each image is added, with deviation `x`: the variance becomes 1 + x² (Guttenberg
    2023, "Diffusion with offset noise"). Models then learn very dark and very bright pictures.
    """

    def __init__(self, x: float):
        self.x = x

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return plain_noise(shape, generator) + self.x * plain_noise((*shape[:2], 1, 1), generator)


class PyramidNoise:
    """Noise of halves, quarters, … of the size is enlarged and added, each level `decay` times as strong as the one before it
    (Whitaker 2023, "Multi-resolution noise"). Each sample is scaled to a variance of 1 by itself; kohya's scripts scale the
    whole batch, so that there a picture depends on its neighbours, and draw the sizes at random.
    """

    def __init__(self, levels: float, decay: float):
        self.levels, self.decay = int(levels), decay

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        noise, (h, w) = plain_noise(shape, generator), shape[2:]
        for level in range(1, min(self.levels, max(h, w).bit_length() - 1) + 1):
            coarse = plain_noise((*shape[:2], max(1, h >> level), max(1, w >> level)), generator)
            noise += self.decay**level * F.interpolate(coarse, size=(h, w), mode="bilinear")
        return noise / noise.std(dim=(1, 2, 3), correction=0, keepdim=True)


NOISES: dict[str, Callable[..., Callable[[tuple[int, ...], torch.Generator], Tensor]]] = {
    "plain": lambda: plain_noise, "offset": OffsetNoise, "pyramid": PyramidNoise,
}  # fmt: skip


class Draws(NamedTuple):
    """What is random in a step, for B latents of h × w."""

    noise: Tensor  # ε [B, 4, h, w]: what is predicted
    added: Tensor  # [B, 4, h, w]: what is added to the latents; ε, but for --input-perturbation
    timesteps: Tensor  # [B] int64


# Loss and weighting.


def snr_of(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ / (1 − ᾱ): 0 where ᾱ is 0, ∞ where it is 1."""
    return alphas_cumprod / (1 - alphas_cumprod)


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "none": torch.ones_like,
    "min-snr": lambda snr, gamma: (gamma / snr).clamp(max=1),
    "soft-min-snr": lambda snr, gamma: gamma / (snr + gamma),
    "debiased": torch.rsqrt,
}


def weights_of_timesteps(kind: str, values: tuple[float, ...], alphas_cumprod: Tensor, v_prediction: bool) -> Tensor:
    """[T] float64: what the loss is multiplied by. `alphas_cumprod`: [T] float64.

    min-snr       min(SNR, γ) / SNR (Hang et al. 2023, arXiv:2303.09556)
    soft-min-snr  γ / (SNR + γ) (Crowson et al. 2024, arXiv:2401.11605)
    debiased      1 / √SNR (Yu et al. 2023, arXiv:2310.08442); 0 where SNR is 0

    For v all are multiplied by ᾱ = SNR / (SNR + 1): an error of ε is √ᾱ times that of v, so the same prediction then has the
    same loss. kohya's scripts multiply so for min-snr, but weigh v by 1 / (SNR + 1) for debiased; OneTrainer leaves 1 / √SNR.
    """
    snr = snr_of(alphas_cumprod)
    weights = WEIGHTINGS[kind](snr, *values)
    if v_prediction and kind != "none":
        weights = weights * alphas_cumprod
    return weights.nan_to_num(nan=0, posinf=0)


class PseudoHuber:
    """2δ·(√(error² + δ²) − δ): error² where it is small, 2δ·|error| where it is large (Song and Dhariwal 2023,
    arXiv:2310.14189). It learns less from outliers. Written so that nothing is lost where δ is large.
    """

    def __init__(self, deltas: Tensor):
        """`deltas`: δ of each timestep, [T]."""
        self.deltas = deltas

    def __call__(self, error: Tensor, timesteps: Tensor) -> Tensor:
        delta = self.deltas[timesteps].view(-1, *[1] * (error.dim() - 1))
        square = error.square()
        return 2 * delta * square / ((square + delta.square()).sqrt() + delta)


def choose_penalty(kind: str, values: tuple[float, ...], alphas_cumprod: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(error [B, …], timesteps [B]) -> what is averaged, of the shape of the error."""
    if kind == "mse":
        return lambda error, _: error.square()
    if kind == "l1":
        return lambda error, _: error.abs()
    deltas = torch.full_like(alphas_cumprod, values[0])
    if kind == "huber-snr":  # 1 without noise, δ where there is only noise, as kohya's --huber_schedule snr
        deltas = (1 - values[0]) / (1 + snr_of(alphas_cumprod).rsqrt()).square() + values[0]
    return PseudoHuber(deltas)


def weights_of_mask(mask: Tensor) -> Tensor:
    """Loss mask [B, 1, h, w] in 0…1 -> the weights of the error. Scales each mask to mean 1, so that the loss is the mean over
    the unmasked area, however small that is. An empty mask gives weights, and loss, 0.
    """
    area = mask.mean(dim=(1, 2, 3), keepdim=True)
    return mask / torch.where(area > 0, area, 1)


class Diffusion:
    """Noise for latents, and the loss of what a denoiser predicts from them.

    `alphas_cumprod` [T] is ᾱ of diffusers' scheduler; `prediction_type` its 'epsilon' or 'v_prediction'.
    """

    def __init__(self, config: DiffusionConfig, alphas_cumprod: Tensor, prediction_type: str, device: torch.device):
        """Raises UserError if --timesteps does not fit the schedule."""
        self.alphas_cumprod = alphas_cumprod.to(device, torch.float32)
        self.v_prediction = prediction_type == "v_prediction"
        self.perturbation = config.input_perturbation
        forms, alphas = config.forms, alphas_cumprod.cpu().double()
        self.timesteps = choose_timesteps(config, len(alphas), device)
        kind, values = forms["noise"]
        self.draw_noise = NOISES[kind](*values)
        weights = weights_of_timesteps(*forms["weighting"], alphas, self.v_prediction)
        self.weights = weights.to(device, torch.float32)
        self.penalty = choose_penalty(*forms["loss"], self.alphas_cumprod)
        self.deviation = math.hypot(1, values[0]) if kind == "offset" else 1.0  # of the noise

    @property
    def loss_of_zero_prediction(self) -> float:
        """Expected, for ε, by 500 quantiles of its distribution. For v it is about that, as SDXL's latents have a variance of
        about 1.
        """
        T, device = len(self.weights), self.weights.device
        normal = torch.special.ndtri((torch.arange(500) + 0.5) / 500)
        normal = (normal / normal.std(correction=0) * self.deviation).to(device)
        losses = self.penalty(normal.expand(T, -1), torch.arange(T, device=device)).mean(dim=1)
        return (losses * self.weights * self.timesteps.probabilities(T).float().to(device)).sum().item()

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """For latents of `shape` [B, 4, h, w]."""
        noise = self.draw_noise(shape, generator)
        timesteps = self.timesteps.draw(shape[0], generator)
        if not self.perturbation:
            return Draws(noise, noise, timesteps)
        # Ning et al. 2023, arXiv:2301.11706: the latents are noisier than the prediction is told, as they are in sampling.
        return Draws(noise, noise + self.perturbation * plain_noise(shape, generator), timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε, all [B, 4, h, w]."""
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """ε or v."""
        return self.velocity(latents, noise, timesteps) if self.v_prediction else noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0 (Salimans and Ho 2022, arXiv:2202.00512)."""
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, [B] float32. `prediction` of x_t, latents and noise are [B, 4, h, w].

        With the `weights_of_mask` of a loss mask it is Σ mask · error² / (Σ mask · channels), for --loss mse.
        """
        return self.loss_towards(self.target(latents, noise, timesteps), prediction, timesteps, weights)

    def loss_towards(self, target: Tensor, prediction: Tensor, timesteps: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of each sample, [B] float32, where `target` [B, 4, h, w] is what should have been predicted."""
        error = self.penalty(prediction.float() - target, timesteps)
        if weights is not None:
            error = error * weights
        return error.mean(dim=(1, 2, 3)) * self.weights[timesteps]
