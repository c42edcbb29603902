"""Captions: several for an image, shuffled tags, a prefix, dropout."""

import random
from dataclasses import dataclass

from common.errors import UserError
from common.options import check_options, option


@dataclass(frozen=True)
class CaptionConfig:
    caption_dropout: float = option(0.0, at_least=0, at_most=1)
    """Share of captions replaced by the empty one."""
    shuffle_tags: bool = option(False)
    """Put the parts of a caption, between commas, in another order each time."""
    keep_tags: int = option(0, at_least=0)
    """So many of the first parts stay in front."""
    caption_prefix: str = option("")
    """Put before every caption, for example a trigger word."""
    max_tokens: int = option(75, at_least=75, multiple_of=75)
    """What is longer is cut. 150, 225, …: told in pieces of 75 that are encoded one by one, as A1111 does."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.keep_tags and not self.shuffle_tags:
            raise UserError("--keep-tags does nothing without --shuffle-tags")


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
