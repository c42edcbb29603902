"""Picks one of the captions of an image and applies dropout, shuffling of tags and a prefix."""

import random
import unicodedata
from dataclasses import replace

from common.text import NO_TEXT
from options.training import CaptionConfig

TEXT_SUFFIXES = ("txt", "caption", "json")  # extensions of files with captions, the first of them that has any
CAPTION_KEYS = ("captions", "text", "caption", "prompt")  # of JSON


def caption_lines(captions: object) -> list[str]:
    """The captions in a text, one on each line, or in a list of texts; of None, none.

    Raises ValueError for anything else, and for what JSON and parquet can hold but is no text.
    """
    if not isinstance(captions, str | list | None):
        raise ValueError("its caption is neither a text nor a list of texts")
    lines = captions.splitlines() if isinstance(captions, str) else captions or []
    lines = [line.strip() for line in lines if isinstance(line, str)]
    if any(NO_TEXT.search(line) for line in lines):
        raise ValueError("its caption holds control characters, or half of a surrogate pair")
    return [line for line in lines if line]


def with_prefix(caption: str, config: CaptionConfig) -> str:
    prefix = config.caption_prefix
    joined = not prefix or prefix[-1].isspace() or unicodedata.category(prefix[-1]).startswith("P")
    return prefix + ("" if joined else ", " if config.shuffle_tags else " ") + caption


def choose_caption(captions: list[str], config: CaptionConfig, rng: random.Random) -> str:
    """Picks a caption and applies dropout, shuffling and prefix. Always consumes the same number of random draws from `rng`."""
    caption, dropped, order = rng.choice(captions), rng.random(), rng.random()
    if dropped < config.caption_dropout:
        return ""
    if config.shuffle_tags:
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        rest = tags[config.keep_tags :]
        random.Random(order).shuffle(rest)
        caption = ", ".join(tags[: config.keep_tags] + rest)
    return with_prefix(caption, config)


def example_caption(captions: list[str], config: CaptionConfig, seed: int) -> str:
    """As `choose_caption`, never dropped."""
    return choose_caption(captions, replace(config, caption_dropout=0), random.Random(seed))
