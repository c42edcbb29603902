"""Captions: several for an image, shuffled tags, a prefix, dropout."""

import random
from dataclasses import dataclass

from common.errors import UserError


@dataclass(frozen=True)
class CaptionConfig:
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one."""
    shuffle_tags: bool = False
    """Put the parts of a caption, between commas, in another order each time."""
    keep_tags: int = 0
    """So many of the first parts stay in front."""
    caption_prefix: str = ""
    """Put before every caption, for example a trigger word."""
    max_tokens: int = 75
    """What is longer is cut. 150, 225, …: told in pieces of 75 that are encoded one by one, as A1111 does."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"--caption-dropout must lie in 0…1, not {self.caption_dropout}")
        if self.keep_tags < 0:
            raise UserError(f"--keep-tags must be at least 0, not {self.keep_tags}")
        if self.keep_tags and not self.shuffle_tags:
            raise UserError("--keep-tags does nothing without --shuffle-tags")
        if self.max_tokens < 75 or self.max_tokens % 75:
            raise UserError(f"--max-tokens must be a multiple of 75 from 75 up, not {self.max_tokens}")


def choose_caption(captions: list[str], config: CaptionConfig, rng: random.Random) -> str:
    """One of an image's captions, as this draw of it is told to the model. Every call draws the same numbers from `rng`."""
    caption, dropped, order = rng.choice(captions), rng.random(), rng.random()
    if dropped < config.caption_dropout:
        return ""
    if config.shuffle_tags:
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        rest = tags[config.keep_tags :]
        random.Random(order).shuffle(rest)
        caption = ", ".join(tags[: config.keep_tags] + rest)
    return config.caption_prefix + caption
