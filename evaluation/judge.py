"""The model as judge of a LoRA's pictures: which of several texts explains a noised picture best?

Losses on given pictures do not see that a LoRA's own pictures fall apart, because that happens along the sampler's path. A
diffusion model that classifies does (Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier",
arXiv:2303.16203), and it needs no other weights. There are two judges: the base, and the model with the LoRA, which is at home
in its style. The better opinion counts: a strong style alone confuses the base, and a LoRA that fell apart confuses both.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.seeds import seed_generator, seed_of
from model.diffusion import Diffusion
from model.sdxl import Denoiser, time_ids
from model.text import tokenize
from model.vae import encode_pixels, normalise, sample_latents

NOISE_LEVELS = (0.5, 0.6, 0.7, 0.8)  # of the schedule: where what is in a picture is decided
MOST_TEXTS = 8
JUDGE = 21  # separates its noise from that of training


class Opinion(NamedTuple):
    """What the judge makes of a picture that a text was drawn from."""

    z: float  # how far the text's loss lies below those of the other texts, in their standard deviations
    recognised: bool  # no other text explains the picture better


@torch.no_grad()
def latents_of(image: Image.Image, vae: Any) -> Tensor:
    """[1, 4, h, w] on the device of the VAE: the mean of its posterior."""
    posterior = encode_pixels(vae, normalise(torch.tensor(np.asarray(image.convert("RGB")))[None].to(vae.device)))
    return sample_latents(vae, posterior, torch.zeros_like(posterior[:, :4]))


class Judge:
    """Asks `denoiser`, which has text encoders, as it is at that moment. `texts`: at least 3, {text for the base: the same with
    the trigger, for the LoRA}; `most`: predictions at once.
    """

    def __init__(self, denoiser: Denoiser, diffusion: Diffusion, vae: Any, texts: dict[str, str], most: int):
        self.denoiser, self.diffusion, self.vae, self.texts, self.most = denoiser, diffusion, vae, texts, most

    @property
    def passes(self) -> int:
        """Forward passes for one opinion."""
        return len(self.texts) * len(NOISE_LEVELS)

    def opinion(self, image: Image.Image, text: str, seed: int, styled: bool) -> Opinion:
        """Of a picture that was drawn from `text`, with the trigger or without. `styled`: the model holds the LoRA."""
        spelled = list(self.texts.values() if styled else self.texts)
        own = next(n for n, pair in enumerate(self.texts.items()) if text in pair)
        return opinion_of(self.losses(image, spelled, seed), own)

    @torch.no_grad()
    def losses(self, image: Image.Image, texts: list[str], seed: int) -> np.ndarray:
        """The loss of `image` under each text, [texts]: a mean over noise levels, with noise that is the same for all texts and
        a function of `seed` alone.
        """
        device, latents = self.vae.device, latents_of(image, self.vae)
        tokens = tokenize(self.denoiser.tokenizers, texts, None).to(device)
        states = [self.denoiser.encode_text(tokens[n : n + 1]) for n in range(len(tokens))]
        context, pooled = (torch.cat(parts) for parts in zip(*states, strict=True))
        generator = seed_generator(torch.Generator(), seed_of(seed, JUDGE))
        size = torch.tensor([[image.height, image.width]])
        ids = time_ids(size, torch.zeros_like(size), size).to(device)
        total = torch.zeros(len(texts))
        for level in NOISE_LEVELS:
            noise = torch.randn(latents.shape, generator=generator).to(device)
            for begin in range(0, len(texts), self.most):
                rows = slice(begin, begin + self.most)
                count = len(context[rows])
                t = torch.full((count,), int(level * len(self.diffusion.alphas_cumprod)), device=device)
                x, eps = latents.expand(count, -1, -1, -1), noise.expand(count, -1, -1, -1)
                text, sizes = (context[rows], pooled[rows]), ids.expand(count, -1)
                prediction = self.denoiser(self.diffusion.add_noise(x, eps, t), t, text, sizes)
                total[rows] += self.diffusion.loss(prediction, x, eps, t).cpu()
        return (total / len(NOISE_LEVELS)).numpy()


def opinion_of(losses: np.ndarray, own: int) -> Opinion:
    """`losses` [texts]: of one picture."""
    others = np.delete(losses, own)
    return Opinion(float((others.mean() - losses[own]) / max(others.std(), 1e-12)), bool(losses[own] <= others.min()))


def judged_texts(prompts: list[str], captions: list[str], usual: list[str], trigger: str) -> dict[str, str]:
    """The texts that pictures of `prompts` are judged by: those, and others that they could be mistaken for, from the captions
    of the data and then the `usual` prompts of the model, up to 8 in all. {without the trigger, which the base does not know:
    with it}.
    """
    texts: dict[str, str] = {}
    wanted = max(MOST_TEXTS, len(set(prompts)))
    for text in (*prompts, *captions, *usual):
        plain = without_trigger(text, trigger)
        if len(texts) < wanted and plain and plain not in texts:
            texts[plain] = text if plain != text else f"{trigger} {text}".strip()
    return texts


def without_trigger(text: str, trigger: str) -> str:
    word = trigger.strip(" ,")
    at = text.lower().find(word.lower()) if word else -1
    return text if at < 0 else " ".join((text[:at] + text[at + len(word) :]).split()).strip(" ,")
