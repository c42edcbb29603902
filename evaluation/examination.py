"""All that is measured of a finished LoRA, for evaluate.py and choose.py: losses, its pictures, what is seen in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.progress import tqdm
from data import Stream
from evaluation.judge import Judge, Opinion, judged_texts, latents_of, phrase_of, subjects_of
from evaluation.record import described, rounded
from evaluation.subject import Subject
from evaluation.tells import Album, diversity, largest_shares, predicted_noise
from evaluation.validation import TRAINED, picture_of
from lora_files.deltas import Changes
from model.prompts import Prompt
from model.text import tokenize

MOST_COMPARED = 200  # trained pictures that a picture is compared with
SEEDS = 2  # pictures of each prompt, whose difference is the diversity

Record = dict[str, Any]


class Examination:
    """The same pictures, prompts and noise for the base and for each LoRA. What is found has the form of a run's record
    (evaluation/record.py), so that the same verdict reads it.
    """

    def __init__(self, subject: Subject, kept_out: Stream, numbers: Sequence[int], trained: Stream | None, timesteps: int):
        """`numbers`: of the samples of `kept_out` to measure on; as many of `trained`, if that is given. Raises UserError if
        none of them can be decoded.
        """
        self.subject, self.trigger = subject, kept_out.captions.trigger
        self.streams = {"kept_out": (kept_out, list(numbers))}
        if trained:
            order = np.random.default_rng([trained.seed, TRAINED]).permutation(trained.source.samples)
            self.streams["trained"] = trained, order[: len(numbers)].tolist()
        self.probes = {kind: subject.probes(stream, of, timesteps) for kind, (stream, of) in self.streams.items()}
        self.captions = list(dict.fromkeys(probe.caption for probe in self.probes["kept_out"]))
        self.phrase = phrase_of(self.trigger, self.captions)
        self.images = {kind: self.read(stream, of) for kind, (stream, of) in self.streams.items()}
        compared = self.read(trained, range(min(MOST_COMPARED, trained.source.samples))) if trained else {}
        self.album = Album(compared, self.images["kept_out"])
        self.prompts: list[Prompt] = []
        self.drawn: list[Image.Image] = []  # the base's pictures

    def read(self, stream: Stream, numbers: Sequence[int]) -> dict[str, Image.Image]:
        """{name: picture}."""
        found = [picture_of(stream, n, self.subject.pipe.vae, self.subject.device) for n in numbers]
        return {name: image for name, _, image in filter(None, found)}

    def texts(self, first: Sequence[str], count: int) -> list[str]:
        """`count` different prompts: the `first`, then others of what the model knows, in the style."""
        return list(dict.fromkeys([*first, *map(self.phrase.add, subjects_of(self.subject.name))]))[:count]

    def of_base(self, texts: Sequence[str]) -> Record:
        """Measures the base, and draws it with these texts. The model holds no LoRA yet."""
        images = [image for of in self.images.values() for image in of.values()]
        judged = judged_texts(texts, self.subject.name, self.phrase)
        subject = self.subject
        self.judge = Judge(subject.denoiser, subject.diffusion, subject.pipe.vae, judged, self.phrase)
        self.prompts = self.subject.filled(texts, SEEDS)
        self.drawn = self.subject.draw(self.prompts, "base")
        self.predicted = self.predictions()
        return {
            "probes": {kind: described(probes) for kind, probes in self.probes.items()},
            "losses": {"base": self.losses("base")},
            "data_shares": largest_shares(images),
            "usual_distance": self.album.usual_distance,
            "pictures": {"base": self.look(self.drawn, self.opinions(self.drawn, styled=False))},
            "extras": {}, "files": {},
        }  # fmt: skip

    def of_lora(self, record: Record, step: int, deltas: Changes, strength: float = 1.0) -> list[Image.Image]:
        """Measures a LoRA into `record`, under `step`. Returns its pictures; the model is the base again."""
        self.subject.merge(deltas, strength)
        self.judge.forget()
        label, key = f"step {step} × {strength:g}", str(step)
        record["losses"][key] = self.losses(label)
        images = self.subject.draw(self.prompts, label)
        own, predicted = self.opinions(images, styled=True), self.predictions()
        self.subject.merge({})
        best = list(map(max, own, self.opinions(images, styled=False)))
        record["pictures"][key], record["files"][key], record["extras"][key] = self.look(images, best), {}, {}
        if images:
            by_prompt = [[of[n : n + SEEDS] for n in range(0, len(of), SEEDS)] for of in (images, self.drawn)]
            record["extras"][key]["diversity"] = diversity(*by_prompt)
        if predicted is not None and self.predicted is not None:
            with_trigger, without = (predicted - self.predicted).square().flatten(1).mean(dim=1).tolist()
            record["extras"][key]["leak"] = without / max(with_trigger, 1e-12)
        return images

    def losses(self, label: str) -> dict[str, Any]:
        return {kind: rounded(self.subject.losses(probes, label)) for kind, probes in self.probes.items()}

    def opinions(self, images: list[Image.Image], styled: bool) -> list[Opinion]:
        """Of the model as it is, of a picture of each prompt."""
        pairs = tqdm(list(zip(self.prompts, images, strict=True)), desc="judging", unit="img", leave=False)
        return [self.judge.opinion(image, prompt.text, prompt.seed or 0, styled) for prompt, image in pairs]

    def look(self, images: list[Image.Image], opinions: list[Opinion]) -> list[dict[str, Any]]:
        """What a record says of each picture."""
        return [opinion._asdict() | self.album.look(image) for image, opinion in zip(images, opinions, strict=True)]

    @torch.no_grad()
    def predictions(self) -> torch.Tensor | None:
        """What the model predicts for the base's pictures with the trigger and without it, [2, …]; None without a trigger or
        pictures.
        """
        if not self.trigger or not self.drawn:
            return None
        subject, found = self.subject, []
        texts = [prompt.text for prompt in self.prompts]
        for spelled in (texts, list(map(self.phrase.remove, texts))):
            for text, prompt, image in zip(spelled, self.prompts, self.drawn, strict=True):
                states = subject.denoiser.encode_text(tokenize(subject.denoiser.tokenizers, [text], None).to(subject.device))
                latents, size = latents_of(image, subject.pipe.vae), (image.height, image.width)
                found.append(predicted_noise(subject.denoiser, subject.diffusion, latents, states, size, prompt.seed or 0))
        return torch.stack(found).unflatten(0, (2, -1))
