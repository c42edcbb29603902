"""What a LoRA learned, in figures: base against LoRA on pictures of the style that it never saw.

    python scripts/evaluate.py                                        the newest LoRA in checkpoints/, the demo's images
    python scripts/evaluate.py held-out/ --lora naruto.safetensors --trained my-pictures/

1. The denoising loss on held-out images, with the same noise and timesteps for both; the improvement with its 95 % interval, in
   all and in each band of timesteps; with --trained the same on pictures that it was trained on.
2. Pictures drawn from the held-out captions with base and LoRA: whether the base recognises in them what was asked, how much
   those of one prompt differ, whether they copy training pictures, and how far the LoRA works without its trigger.
3. The distance of those pictures to the held-out images: half the L1 distance between their distributions of colours
   (4 x 4 x 4 bins of RGB) and of edge strengths (16 bins). 0 is equal, 1 disjoint.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import Options, option
from options.command import parse_command


@dataclass(frozen=True)
class EvaluateConfig(Options):
    data: Annotated[str | None, tyro.conf.Positional] = None
    """Images of the style that were kept out of training, with captions. None: the demo's, for a LoRA trained on the demo."""
    lora: Path = Path("checkpoints")
    """A LoRA file, or a folder of them: the newest one in it."""
    model: str | None = None
    """None: the model that the LoRA was trained on."""
    trained: str | None = None
    """Images that the LoRA was trained on, to find what it learned by heart."""
    timesteps: int = option(10, at_least=1)
    """Number of timesteps, evenly spread over the schedule, at which the loss of every image is computed."""
    pictures: int = option(8, at_least=0)
    """Number of captions to draw with base and LoRA, with two seeds each; 0: none."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu', 'mps'."""


if __name__ == "__main__":
    COMMAND = parse_command("evaluate.py", EvaluateConfig, __doc__)

import numpy as np
from PIL import Image, ImageOps

from dataset.sources import HELD_OUT, open_source
from evaluation.examination import SEEDS, Examination
from evaluation.subject import Subject, options_of
from evaluation.verdict import StepFigures, figures, percent
from lora_files.deltas import parameter_shapes
from lora_files.read import newest_lora, read_changes, read_metadata, trained_on
from model.check import describe_model


def statistics(images: list[Image.Image]) -> dict[str, np.ndarray]:
    """The distribution of colours [64] and of edge strengths [16] over all pixels of all images, each summing to 1."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])  # [N, H, W, 3] in 0…255
    bins = (pixels // 64).astype(int)
    colours = np.bincount((bins @ np.array([16, 4, 1])).ravel(), minlength=64)
    grey = pixels.mean(axis=3)
    edges = np.hypot(np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1])
    strengths, _ = np.histogram(np.log2(1 + edges), bins=16, range=(0, 8))
    return {"colours": colours / colours.sum(), "edges": strengths / strengths.sum()}


def report(found: StepFigures, examination: Examination, record: dict) -> None:
    """Prints what was measured."""
    probes = examination.probes["kept_out"]
    before, after = (np.mean(record["losses"][key]["kept_out"]) for key in ("base", str(found.step)))
    print(f"held-out denoising loss ({len(probes)} images x {len(probes[0].timesteps)} timesteps, the same noise)")
    print(f"  base {before:.4f}   LoRA {after:.4f}   {100 * (after / before - 1):+.1f} %")
    lines = {"less than the base's": found.improvement, "on as many trained ones": found.trained, "the difference": found.gap}
    for name, interval in lines.items():
        if interval:
            print(f"  {name} {percent(interval)}")
    bands = " ".join(f"{100 * band.mean:.0f}" if band else "-" for band in found.bands)
    print(f"  in each tenth of the schedule, from little noise to much: {bands} %")
    if pictures := record["pictures"][str(found.step)]:
        seen = [sum(picture["recognised"] for picture in record["pictures"][key]) for key in ("base", str(found.step))]
        print(f"what is seen in {len(pictures)} pictures")
        print(f"  what was asked: in {seen[0]} of the base's, in {seen[1]} of the LoRA's")
        if found.prompts:
            print(f"  how clearly, relative to the base's: {percent(found.prompts)}")
    if found.diversity:
        print(f"pictures of one prompt differ {percent(found.diversity)} as much as the base's")
    if found.leak is not None:
        print(f"without the trigger it has {found.leak:.0%} of its effect")
    for tell in found.tells:
        print(f"careful: {tell.sentence}")


def distances(style: list[Image.Image], base: list[Image.Image], tuned: list[Image.Image], side: int) -> None:
    """Prints how far the base's and the LoRA's pictures are from those of the style."""
    squares = ([ImageOps.fit(image.convert("RGB"), (side, side)) for image in images] for images in (style, base, tuned))
    of_style, of_base, of_tuned = map(statistics, squares)
    print(f"distance of {len(base)} pictures to the held-out style images (0 equal, 1 disjoint)")
    for name, reference in of_style.items():
        before, after = (np.abs(drawn[name] - reference).sum() / 2 for drawn in (of_base, of_tuned))
        print(f"  {name:8} base {before:.3f}   LoRA {after:.3f}   {100 * (after / before - 1):+.1f} %")


def main(config: EvaluateConfig) -> None:
    lora = newest_lora(config.lora)
    metadata, options = read_metadata(lora), options_of(lora)
    if config.data is None and metadata.get("sdxl_lora.dataset") != open_source("demo").fingerprint:
        raise UserError(f"{lora} was not trained on the demo's images: name a folder of yours that training has not seen")
    model = config.model or trained_on(lora)
    source, trained = open_source(config.data or str(HELD_OUT)), config.trained and open_source(config.trained)
    subject = Subject(model, config.device)
    deltas = read_changes(lora, parameter_shapes(subject.denoiser))
    if source.fingerprint in (metadata.get("sdxl_lora.dataset"), trained and trained.fingerprint):
        print("these are the pictures that it was trained on: a good loss here may be learning by heart")
    print(f"{lora} on {source.samples} images of {config.data or 'the demo, kept out of training'}")
    print(f"model {model}: predicts {describe_model(subject.pipe)}")
    learned = subject.stream(trained, options) if trained else None
    examination = Examination(subject, subject.stream(source, options), range(source.samples), learned, config.timesteps)
    record = examination.of_base(examination.texts(examination.captions, config.pictures))
    step = int(metadata.get("sdxl_lora.step", 1))
    images = examination.of_lora(record, step, deltas)
    report(figures(record, step), examination, record)
    if images:
        first = slice(None, None, SEEDS)
        distances(list(examination.images["kept_out"].values()), examination.drawn[first], images[first], subject.side)


if __name__ == "__main__":
    with one_line_errors("evaluate.py"):
        main(COMMAND)
