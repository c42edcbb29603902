"""The model as judge of a LoRA's pictures: which of several texts explains a noised picture best?

Losses on given pictures do not see that a LoRA's own pictures fall apart, because that happens along the sampler's path. A
diffusion model that classifies does (Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier",
arXiv:2303.16203), and it needs no other weights. There are two judges: the base, and the model with the LoRA, which is at home
in its style. The better opinion counts: a strong style alone confuses the base, and a LoRA that fell apart confuses both.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from itertools import combinations
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
WORD = r"[^\W_][\w'-]*"
SUBJECTS = (
    "a woman with red hair in a garden", "a cat on a roof", "a house by a lake", "an old man reading a book",
    "a knight on a horse", "a bowl of fruit on a table", "a sailing ship in a storm", "a street at night in the rain",
)  # fmt: skip
DEMO_SUBJECTS = (
    "a boy with blue eyes and spiky yellow hair eating ramen", "a man with brown hair", "a girl with black hair waving",
    "a woman with red hair in a bun at the beach", "a girl with yellow hair, night sky background",
    "an old man with a white beard reading a book", "a woman with green eyes, long red hair and glasses, city background",
    "a smiling girl with purple eyes and blue hair in pigtails drinking tea",
)  # fmt: skip
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
    the `phrase`, for the LoRA}.
    """

    def __init__(self, denoiser: Denoiser, diffusion: Diffusion, vae: Any, texts: dict[str, str], phrase: "Phrase"):
        self.denoiser, self.diffusion, self.vae, self.texts, self.phrase = denoiser, diffusion, vae, texts, phrase
        self.states: dict[bool, tuple[Tensor, Tensor]] = {}  # {styled: context and pooled of the texts}, on the device
        self.most = len(texts)  # predictions at once: fewer once memory ran out

    def forget(self) -> None:
        """The LoRA has changed: so have the states of the texts."""
        self.states.pop(True, None)

    def opinion(self, image: Image.Image, text: str, seed: int, styled: bool) -> Opinion:
        """Of a picture that was drawn from `text`, with the phrase or without. `styled`: the model holds the LoRA."""
        own = list(self.texts).index(text if text in self.texts else self.phrase.remove(text))
        return opinion_of(self.losses(image, seed, styled), own)

    @torch.no_grad()
    def losses(self, image: Image.Image, seed: int, styled: bool) -> np.ndarray:
        """The loss of `image` under each text, [texts]: a mean over noise levels, with noise that is the same for all texts and
        a function of `seed` alone.
        """
        if styled not in self.states:
            spelled = list(self.texts.values() if styled else self.texts)
            self.states[styled] = self.denoiser.encode_text(
                tokenize(self.denoiser.tokenizers, spelled, None).to(self.vae.device)
            )
        while True:
            with suppress(torch.OutOfMemoryError) if self.most > 1 else nullcontext():
                return self.losses_at_once(latents_of(image, self.vae), (image.height, image.width), seed, self.states[styled])
            self.most //= 2

    def losses_at_once(self, latents: Tensor, size: tuple[int, int], seed: int, states: tuple[Tensor, Tensor]) -> np.ndarray:
        """`losses`, from `most` predictions at once. `size`: height and width in pixels."""
        generator = seed_generator(torch.Generator(), seed_of(seed, JUDGE))
        sides = torch.tensor([size])
        ids = time_ids(sides, torch.zeros_like(sides), sides).to(latents.device)
        total = torch.zeros(len(self.texts))
        for level in NOISE_LEVELS:
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            for begin in range(0, len(total), self.most):
                rows = slice(begin, begin + self.most)
                text = (states[0][rows], states[1][rows])
                count = len(text[1])
                t = torch.full((count,), int(level * len(self.diffusion.alphas_cumprod)), device=latents.device)
                x, eps = latents.expand(count, -1, -1, -1), noise.expand(count, -1, -1, -1)
                prediction = self.denoiser(self.diffusion.add_noise(x, eps, t), t, text, ids.expand(count, -1))
                total[rows] += self.diffusion.loss(prediction, x, eps, t).cpu()
        return (total / len(NOISE_LEVELS)).numpy()


def opinion_of(losses: np.ndarray, own: int) -> Opinion:
    """`losses` [texts]: of one picture."""
    others = np.delete(losses, own)
    return Opinion(float((others.mean() - losses[own]) / max(others.std(), 1e-12)), bool(losses[own] <= others.min()))


class Phrase(NamedTuple):
    """The words that call a style: the trigger, or what all captions have in common. The base does not know them."""

    words: str
    in_front: bool

    def add(self, text: str) -> str:
        return f"{self.words} {text}".strip() if self.in_front else f"{text} {self.words}".strip()

    def remove(self, text: str) -> str:
        """Without the words; all of the text if nothing else is in it."""
        end = r"(?:(?<=\W)|(?!\w))"  # 'ink' is not in 'inkwell'
        found = self.words and re.search(rf"(?<!\w){re.escape(self.words)}{end}", text, re.IGNORECASE)
        rest = " ".join((text[: found.start()] + text[found.end() :]).split()).strip(" ,") if found else ""
        return rest or text


def phrase_of(trigger: str, captions: Sequence[str]) -> Phrase:
    """The trigger, or else the longest sequence of words that all `captions` have, if there are several and it is a part of
    most of them: "in clip style".
    """
    if words := trigger.strip(" ,"):
        return Phrase(words, True)
    texts = [f" {' '.join(re.findall(WORD, caption.lower()))} " for caption in captions]
    first = min(texts, key=len, default="").split()
    spans = sorted(combinations(range(len(first) + 1), 2), key=lambda span: span[0] - span[1])
    shared = (" ".join(first[begin:end]) for begin, end in spans if end - begin >= 2)
    found = next((words for words in shared if all(f" {words} " in text for text in texts)), "")
    return Phrase(found if any(text.strip() != found for text in texts) else "", False)


def judged_texts(prompts: Sequence[str], model: str, phrase: Phrase) -> dict[str, str]:
    """The texts that pictures of `prompts` are judged by: those, and up to 8 in all others that the base knows well, {without
    the phrase: with it}.
    """
    texts = {phrase.remove(text): text for text in prompts}
    for subject in subjects_of(model):
        if len(texts) < MOST_TEXTS:
            texts.setdefault(subject, phrase.add(subject))
    return texts


def subjects_of(model: str) -> tuple[str, ...]:
    """Prompts that have nothing in common, of what --model knows."""
    return DEMO_SUBJECTS if model == "demo" else SUBJECTS
