"""The objective: noise a latent, predict the noise, weigh the squared error (Ho et al. 2020, arXiv:2006.11239)."""

import torch
from torch import Tensor

from options.training import DiffusionConfig


def weights_of_mask(mask: Tensor) -> Tensor:
    """Loss mask [B, 1, h, w] in 0…1 -> the weights of the squared error. Scales each mask to mean 1, so that the loss is the
    mean over the unmasked area, however small that is. An empty mask gives weights, and loss, 0.
    """
    area = mask.mean(dim=(1, 2, 3), keepdim=True)
    return mask / torch.where(area > 0, area, 1)


class Diffusion:
    """Noise for latents, and the loss of what a denoiser predicts from them.

    `alphas_cumprod` [T] is ᾱ of diffusers' scheduler; `prediction_type` its 'epsilon' or 'v_prediction'.
    """

    def __init__(self, config: DiffusionConfig, alphas_cumprod: Tensor, prediction_type: str, device: torch.device):
        self.alphas_cumprod = alphas_cumprod.to(device, torch.float32)
        self.v_prediction = prediction_type == "v_prediction"
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self.weights = torch.ones_like(snr)
        if config.snr_gamma:
            self.weights = snr.clamp(max=config.snr_gamma) / (snr + 1 if self.v_prediction else snr)

    @property
    def loss_of_zero_prediction(self) -> float:
        """Expected, for ε: E[w·ε²] = E[w], which is 1 without --snr-gamma. For v it is about that, as SDXL's latents have a
        variance of about 1.
        """
        return self.weights.mean().item()

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise ε of `shape` [B, 4, h, w], and timesteps t [B], uniform over the schedule."""
        noise = torch.randn(shape, generator=generator, device=generator.device)
        timesteps = torch.randint(len(self.alphas_cumprod), shape[:1], generator=generator, device=generator.device)
        return noise, timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε, all [B, 4, h, w]."""
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """ε, or v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0 (Salimans and Ho 2022, arXiv:2202.00512)."""
        if not self.v_prediction:
            return noise
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, [B] float32. `prediction` of x_t, latents and noise are [B, 4, h, w].

        With the `weights_of_mask` of a loss mask it is Σ mask · error² / (Σ mask · channels).
        """
        error = (prediction.float() - self.target(latents, noise, timesteps)).square()
        if weights is not None:
            error = error * weights
        return error.mean(dim=(1, 2, 3)) * self.weights[timesteps]
