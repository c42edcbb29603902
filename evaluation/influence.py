"""How much each training picture helps a LoRA with pictures that it never saw: their gradients, compared.

A small step on a picture x changes the loss of a held-out picture v by -lr · ∇L(x)·∇L(v), with gradients with respect to A and
B, and a run by about the sum of that over its checkpoints (TracIn, Pruthi et al. 2020, arXiv:2002.08484). How long a gradient
is depends more on the timestep, and on how simple a picture is, than on whether it belongs (Xie et al. 2024, arXiv:2401.09031).
So only directions are compared, in each band of timesteps by itself.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError
from common.progress import tqdm
from common.sheets import TILE, captioned, tiled
from data import Stream
from evaluation.intervals import Interval, share_of
from evaluation.subject import Subject
from evaluation.validation import BANDS, Probe, losses_at, picture_of, text_of
from evaluation.verdict import percent
from lora import Adapter

# Of the loss in fp16, whose gradients would underflow; the first whose gradient is finite is taken.
SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
WORST, BEST = 10, 3  # pictures that are named
LITTLE = 0.5  # help, below which a picture deserves a look


def directions(probe: Probe, subject: Subject, adapter: Adapter) -> Iterator[Tensor]:
    """In each band, the gradient of the probe's mean loss there with respect to all A and B, [P] float32 on the host, scaled to
    length 1; 0 if nothing depends on them. The probe has BANDS · n timesteps. Raises UserError if a gradient is not finite.
    """
    count = len(probe.timesteps) // BANDS
    for begin in range(0, len(probe.timesteps), count):
        for scale in SCALES if adapter.low.dtype == torch.float16 else SCALES[-1:]:
            adapter.zero_gradients()
            text = text_of(probe, subject.denoiser, subject.device)
            part = slice(begin, begin + count)
            loss = losses_at(probe, part, text, subject.denoiser, subject.diffusion, subject.device).mean()
            (scale * loss).backward()
            length = adapter.grad.norm().item()
            if np.isfinite(length):
                break
        else:
            raise UserError(f"{probe.name}: its gradient is not finite")
        yield (adapter.grad / max(length, 1e-30)).cpu()


class Common(NamedTuple):
    """What pictures have in common."""

    means: list[Tensor]  # [BANDS] of [P]: the mean of their directions
    similarity: np.ndarray  # [BANDS]: of two of them on average, -1 … 1


def in_common(probes: Iterable[Probe], subject: Subject, adapter: Adapter) -> Common:
    """Of the direction of each of these pictures only the sum is kept. Raises UserError if there are fewer than two."""
    sums, count = [torch.zeros_like(adapter.flat, device="cpu") for _ in range(BANDS)], 0
    for probe in probes:
        for total, direction in zip(sums, directions(probe, subject, adapter), strict=True):
            total += direction
        count += 1
    if count < 2:
        raise UserError("it takes two held-out pictures or more: what they have in common is the measure")
    # |Σ u|² = Σ |u|² + Σ of all pairs, and each u has length 1.
    pairs = [(total.square().sum().item() - count) / (count * (count - 1)) for total in sums]
    return Common([total / count for total in sums], np.array(pairs))


class Helped(NamedTuple):
    """How much a step on a training picture helps the held-out ones: 1 as much as one of themselves helps the others, 0 not at
    all, below 0 it harms them.
    """

    help: Interval  # over the bands
    name: str
    caption: str
    bands: list[float]  # [BANDS]; their mean is that of `help`


def similarity_to(common: Common, probe: Probe, subject: Subject, adapter: Adapter) -> np.ndarray:
    """The mean cosine between the gradient of this picture and those of the held-out ones in each band, [BANDS]."""
    own = directions(probe, subject, adapter)
    return np.array([float(direction @ mean) for direction, mean in zip(own, common.means, strict=True)])


def helped(probe: Probe, similarity: np.ndarray, among: np.ndarray) -> Helped:
    """`similarity` [BANDS] of a picture to the held-out ones, and theirs `among` themselves, both summed over checkpoints.
    Raises UserError if they have nothing in common.
    """
    if (usual := among.mean()) <= 0:
        raise UserError("the held-out pictures have nothing in common: give more of them, of one style")
    return Helped(share_of(similarity, among), probe.name, probe.caption, (similarity / usual).tolist())


def rank(
    probes: Sequence[Probe], held_out: Sequence[Probe], checkpoints: Iterable, subject: Subject, adapter: Adapter
) -> list[Helped]:
    """The pictures of `probes`, the least helpful first. Taking the next of `checkpoints` puts that into the adapter."""
    similarity, among = np.zeros((len(probes), BANDS)), np.zeros(BANDS)
    for number, _ in enumerate(checkpoints, 1):
        common = in_common(tqdm(held_out, desc=f"file {number}, held out", unit="img", leave=False), subject, adapter)
        bar = tqdm(probes, desc=f"file {number}, trained", unit="img", leave=False)
        similarity += [similarity_to(common, probe, subject, adapter) for probe in bar]
        among += common.similarity
    return sorted(helped(probe, row, among) for probe, row in zip(probes, similarity, strict=True))


def sheet_of(ranked: Sequence[Helped], stream: Stream, subject: Subject) -> Image.Image:
    """These pictures of `stream` as training sees them, each with its figure and its caption."""
    numbers, tiles = {name: n for n, name in enumerate(stream.source.names)}, []
    for place, one in enumerate(ranked, 1):
        if found := picture_of(stream, numbers[one.name], subject.pipe.vae, subject.device):
            picture = ImageOps.contain(found[2], (TILE, TILE))
            tiles.append(captioned(picture, f"{place}. {percent(one.help)}  {Path(one.name).name}", one.caption))
    return tiled(tiles)


def as_csv(ranked: Iterable[Helped]) -> bytes:
    """A line for each picture."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["picture", "help", "low", "high", *(f"band {band}" for band in range(1, BANDS + 1)), "caption"])
    for one in ranked:
        writer.writerow([one.name, *(f"{x:.4f}" for x in (*one.help, *one.bands)), one.caption])
    return text.getvalue().encode(errors="replace")


def sentences_about(ranked: list[Helped]) -> Iterator[str]:
    """The two ends of the list, the least helpful first, and what to do."""
    yield "how much learning more of it helps the held-out pictures, and its 95 % interval over the bands of timesteps"
    for i, one in enumerate(ranked):
        if i < WORST or i >= len(ranked) - BEST:
            yield f"  {percent(one.help):>24}  {one.name}"
        elif i == WORST:
            yield f"  {'…':>24}"
    weak = sum(one.help.mean < LITTLE for one in ranked)
    some = f"{weak} of {len(ranked)} help less than half as much as another held-out picture would"
    if weak > len(ranked) / 2:
        yield f"{some}: it has learned its pictures by heart,"
        yield "or the held-out ones are of another style. Earlier files, or other held-out pictures, tell more than this list."
    elif weak:
        yield f"{some}: look at them, and at their captions."
        yield "Leave out what does not belong, and train again; keep what is rare on purpose."
    else:
        yield "All help at least half as much as another held-out picture would; the captions of the first are worth a look."
