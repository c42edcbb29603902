"""Looks at the pictures that a run draws: do they show what was asked, do they copy what was trained on, are they empty?"""

from typing import Any

import numpy as np
from PIL import Image

from data import Stream
from dataset.sources import Source
from evaluation.judge import Judge, judged_texts, phrase_of
from evaluation.record import picture, thumbnail
from evaluation.tells import Album, largest_shares
from evaluation.validation import picture_of, quiet_stream, unweighted
from lora import Adapter
from memory import temporarily_on
from model.prompts import Prompt
from run.held_out import HeldOut
from run.setup import TrainingModel

MOST_THUMBNAILS = {"trained": 40, "kept_out": 16}  # shown on the page; pictures are compared with them
CAPTIONS = 200  # that are read to find the words that call the style


class Examiner:
    """Each rank judges the pictures that it has drawn; rank 0 does the rest, and keeps the record."""

    def __init__(
        self, model: TrainingModel, adapter: Adapter, held_out: HeldOut, stream: Stream, prompts: list[Prompt],
        record: dict[str, Any], is_first: bool,
    ):  # fmt: skip
        self.model, self.adapter, self.held_out, self.stream = model, adapter, held_out, stream
        self.record, self.is_first = record, is_first
        phrase = phrase_of(stream.captions.trigger, list(held_out.training.local_captions(CAPTIONS)))
        texts = judged_texts([prompt.text for prompt in prompts], model.name, phrase)
        self.judge = Judge(model.full_denoiser, unweighted(model.pipe, model.device), model.vae, texts, phrase)
        self.album = Album({}, {})

    def prepare(self) -> None:
        """Small pictures of the data, unless the record of a resumed run holds them. During set-up: a signal ends the wait for
        a server that stalls.
        """
        if not self.is_first:
            return
        if "thumbs" not in self.record:
            kept_out = self.held_out.kept_out
            with temporarily_on(self.model.device, self.model.kept_on_host):
                parts = {"trained": self.thumbnails("trained", self.held_out.training, range(self.held_out.training.samples))}
                parts["kept_out"] = self.thumbnails("kept_out", kept_out, self.held_out.numbers) if kept_out else {}
            self.record["thumbs"] = parts
        thumbs: dict[str, dict[str, Any]] = self.record["thumbs"]
        pictures = {kind: {name: picture(of["jpeg"]) for name, of in named.items()} for kind, named in thumbs.items()}
        self.album = Album(**pictures)
        self.record["data_shares"] = largest_shares([*pictures["trained"].values(), *pictures["kept_out"].values()])
        self.record["usual_distance"] = self.album.usual_distance

    def thumbnails(self, kind: str, source: Source, numbers: Any) -> dict[str, dict[str, str]]:
        """{name: caption and small picture} of some of these samples, evenly spread."""
        most = MOST_THUMBNAILS[kind]
        stream = quiet_stream(source, self.stream)
        chosen = [numbers[n] for n in np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)]
        found = [picture_of(stream, int(n), self.model.vae, self.model.device) for n in chosen]
        return {name: {"caption": caption, "jpeg": thumbnail(image)} for name, caption, image in filter(None, found)}

    def opinion(self, image: Image.Image, prompt: Prompt, strength: float) -> dict[str, Any]:
        """The better opinion of base and LoRA of a picture that was drawn at this strength. The model is on the device."""
        opinions = []
        for scale in {0.0, strength}:
            with self.adapter.scaled(scale):
                opinions.append(self.judge.opinion(image, prompt.text, prompt.seed or 0, styled=scale != 0))
        return max(opinions)._asdict()

    def look(self, image: Image.Image, file: str, opinion: dict[str, Any]) -> dict[str, Any]:
        """What the record says of a picture in `file`."""
        return {"file": file, **opinion, **self.album.look(image)}
