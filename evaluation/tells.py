"""Signs in the pictures of a LoRA that it learned too much, or badly: copies, sameness, leaks, spoilt pictures."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.seeds import seed_generator, seed_of
from evaluation.intervals import Interval, share_of
from model.diffusion import Diffusion
from model.sdxl import Denoiser, time_ids

BLOCK_SIDE, FLAT = 8, 3  # pixels; grey levels between its lightest and darkest pixel if it is flat
FEATURE = 24  # pixels: side to which pictures are reduced before they are compared
LEAK_LEVELS = (0.3, 0.5, 0.7, 0.9)  # of the schedule


def flat_share(image: Image.Image) -> float:
    """Share of the picture's blocks of 8 × 8 pixels that show nothing."""
    grey = np.asarray(image.convert("L"), dtype=np.int16)
    h, w = (side // BLOCK_SIDE * BLOCK_SIDE for side in grey.shape)
    blocks = grey[:h, :w].reshape(h // BLOCK_SIDE, BLOCK_SIDE, w // BLOCK_SIDE, BLOCK_SIDE)
    return float((blocks.max(axis=(1, 3)) - blocks.min(axis=(1, 3)) <= FLAT).mean())


def clipped_share(image: Image.Image) -> float:
    """Share of the picture's pixels that are burnt out or pure colour: every channel is 0 or 255."""
    pixels = np.asarray(image.convert("RGB"))
    return float(((pixels == 0) | (pixels == 255)).all(axis=2).mean())


def largest_shares(images: Sequence[Image.Image]) -> dict[str, float]:
    """{"flat", "clipped": the largest share in one of the pictures}: what is usual in the data."""
    shares = {"flat": flat_share, "clipped": clipped_share}
    return {name: max(map(share, images), default=0.0) for name, share in shares.items()}


def features(image: Image.Image) -> np.ndarray:
    """[24, 24, 3] in 0 … 1: a picture of any aspect ratio reduced to a stamp."""
    stamp = image.convert("RGB").resize((FEATURE, FEATURE), Image.Resampling.BOX)
    return np.asarray(stamp, dtype=np.float32) / 255


class Album:
    """Stamps of pictures that were trained on, and of others that were kept out, to find copies among a LoRA's pictures."""

    def __init__(self, trained: dict[str, Image.Image], kept_out: dict[str, Image.Image]):
        """{name: picture} of each; both may be empty."""
        self.names = {"trained": list(trained), "kept_out": list(kept_out)}
        pictures = {"trained": trained, "kept_out": kept_out}
        self.stamps = {kind: [features(p) for p in of.values()] for kind, of in pictures.items()}

    def nearest(self, stamp: np.ndarray) -> dict[str, tuple[str, float] | None]:
        """{"trained", "kept_out": (name, root mean square difference) of the most similar picture there, mirrored or not}."""
        found: dict[str, tuple[str, float] | None] = {}
        for kind, stamps in self.stamps.items():
            distances = [min(difference_of(stamp, other), difference_of(stamp[:, ::-1], other)) for other in stamps]
            at = int(np.argmin(distances)) if distances else None
            found[kind] = None if at is None else (self.names[kind][at], distances[at])
        return found

    def look(self, image: Image.Image) -> dict[str, Any]:
        """What a record says of a picture, but for whether it shows what was asked."""
        return {"flat": flat_share(image), "clipped": clipped_share(image), "nearest": self.nearest(features(image))}

    @property
    def usual_distance(self) -> float | None:
        """The median distance between a picture that was kept out and the trained one that is most like it."""
        found = [nearest for stamp in self.stamps["kept_out"] if (nearest := self.nearest(stamp)["trained"])]
        return float(np.median([distance for _, distance in found])) if found else None


def difference_of(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))


def diversity(pictures: Sequence[Sequence[Image.Image]], base: Sequence[Sequence[Image.Image]]) -> Interval:
    """How far pictures of one prompt and several seeds differ from each other, relative to those of the base: 1 is as much.
    A list of pictures for each prompt.
    """
    return share_of(np.array(list(map(spread_of, pictures))), np.array(list(map(spread_of, base))))


def spread_of(pictures: Sequence[Image.Image]) -> float:
    """Mean over all pairs of the root mean square difference of their features."""
    return float(np.mean([difference_of(features(a), features(b)) for a, b in combinations(pictures, 2)]))


@torch.no_grad()
def predicted_noise(
    denoiser: Denoiser, diffusion: Diffusion, latents: Tensor, text: tuple[Tensor, ...], size: tuple[int, int], number: int
) -> Tensor:
    """What `denoiser`, as it is now, predicts under `text` for the `latents` [1, 4, h, w] of a picture of `size` (h, w), at
    four noise levels: [4, 4, h, w]. The noise is a function of `number`.
    """
    device, rows = latents.device, len(LEAK_LEVELS)
    generator = seed_generator(torch.Generator(), seed_of(number))
    noise = torch.randn((rows, *latents.shape[1:]), generator=generator).to(device)
    t = torch.tensor([int(level * len(diffusion.alphas_cumprod)) for level in LEAK_LEVELS], device=device)
    noisy = diffusion.add_noise(latents.expand(rows, -1, -1, -1), noise, t)
    sides = torch.tensor([size])
    ids = time_ids(sides, torch.zeros_like(sides), sides).to(device)
    outputs = [denoiser(noisy[n : n + 1], t[n : n + 1], text, ids) for n in range(rows)]
    return torch.cat(outputs).float()
