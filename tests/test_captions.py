import random

import pytest

from common.errors import UserError
from dataset.captions import choose_caption
from options.training import CaptionConfig

TAGS = "naruto, orange coat, smile, leaf village"


def chosen(config: CaptionConfig, captions: list[str], count: int = 200) -> list[str]:
    return [choose_caption(captions, config, random.Random(i)) for i in range(count)]


def test_without_options_a_caption_is_unchanged():
    assert set(chosen(CaptionConfig(), [TAGS])) == {TAGS}


def test_every_caption_of_an_image_is_chosen():
    counts = [chosen(CaptionConfig(), ["a", "b", "c"]).count(c) for c in "abc"]
    assert min(counts) > 40


def test_tags_change_places_but_the_first_stay():
    seen = set(chosen(CaptionConfig(shuffle_tags=True, keep_tags=1), [TAGS]))
    assert len(seen) == 6
    assert all(sorted(caption.split(", ")) == sorted(TAGS.split(", ")) for caption in seen)
    assert all(caption.startswith("naruto, ") for caption in seen)


def test_prefix_and_dropout():
    seen = chosen(CaptionConfig(caption_prefix="nrt style, ", caption_dropout=0.25), ["a"], 2000)
    assert set(seen) == {"nrt style, a", ""}
    assert 0.2 < seen.count("") / 2000 < 0.3


@pytest.mark.parametrize(
    ("prefix", "shuffle_tags", "wanted"),
    [
        ("nrt", False, "nrt a, b"), ("nrt ", False, "nrt a, b"), ("nrt, ", False, "nrt, a, b"), ("nrt:", False, "nrt:a, b"),
        ("«nrt»", False, "«nrt»a, b"), ("", False, "a, b"), ("nrt", True, "nrt, a, b"), ("x, nrt", True, "x, nrt, a, b"),
        ("nrt style, ", True, "nrt style, a, b"), ("", True, "a, b"),
    ],
)  # fmt: skip
def test_a_prefix_is_a_word_or_kept_tags_in_front(prefix, shuffle_tags, wanted):
    config = CaptionConfig(caption_prefix=prefix, shuffle_tags=shuffle_tags)
    seen = set(chosen(config, ["a, b"]))
    assert seen == ({wanted, wanted.removesuffix("a, b") + "b, a"} if shuffle_tags else {wanted})


def test_options_do_not_change_the_random_draws():
    """Which caption is picked, and whether it is dropped, does not depend on the other options."""
    plain = chosen(CaptionConfig(caption_dropout=0.5), ["a, b", "c, d"])
    shuffled = chosen(CaptionConfig(caption_dropout=0.5, shuffle_tags=True), ["a, b", "c, d"])
    assert [set(caption) for caption in plain] == [set(caption) for caption in shuffled]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"caption_dropout": 2.0}, "--caption-dropout"),
        ({"keep_tags": -1}, "--keep-tags"),
        ({"keep_tags": 2}, "--shuffle-tags"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"max_tokens": 77}, "--max-tokens must be a multiple of 75 from 75 up, not 77"),
    ],
)
def test_bad_options_name_their_flag(options, flag):
    with pytest.raises(UserError, match=flag):
        CaptionConfig(**options)
