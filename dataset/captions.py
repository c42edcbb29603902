"""Picks one of the captions of an image and applies dropout, shuffling of tags and a trigger."""

import random
import re
import unicodedata
from dataclasses import replace

from common.text import NO_TEXT
from options.training import CaptionConfig, CaptionFilesConfig

BESIDE = CaptionFilesConfig()  # captions beside the pictures, and nothing else
TEXT_SUFFIXES = BESIDE.extensions  # of files with captions, the first of them that has any
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


def with_trigger(caption: str, config: CaptionConfig) -> str:
    trigger = config.trigger
    joined = not trigger or trigger[-1].isspace() or unicodedata.category(trigger[-1]).startswith("P")
    return trigger + ("" if joined else ", " if config.shuffle_tags else " ") + caption


def without_trigger(caption: str, config: CaptionConfig) -> str:
    """What `with_trigger` was given."""
    return caption.removeprefix(with_trigger("", config))


def caption_of_name(stem: str) -> str:
    """'old_town-hall (3)' -> 'old town hall': words without the number at the end."""
    return re.sub(r"[\W_]+", " ", re.sub(r"[\W_]*\d*\W*$", "", stem)).strip()


def choose_caption(captions: list[str], config: CaptionConfig, rng: random.Random) -> str:
    """Picks a caption; applies dropout, shuffling and trigger. Always consumes the same number of random draws from `rng`."""
    caption, dropped, order = rng.choice(captions), rng.random(), rng.random()
    if dropped < config.caption_dropout:
        return ""
    if config.shuffle_tags:
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        rest = tags[config.keep_tags :]
        random.Random(order).shuffle(rest)
        caption = ", ".join(tags[: config.keep_tags] + rest)
    return with_trigger(caption, config)


def example_caption(captions: list[str], config: CaptionConfig, seed: int) -> str:
    """As `choose_caption`, never dropped."""
    return choose_caption(captions, replace(config, caption_dropout=0), random.Random(seed))
