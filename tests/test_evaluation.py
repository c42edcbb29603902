"""evaluation/: intervals, the split, the judge, signs in pictures and the verdict. Failures are planted, and must be found."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import photograph, source_in_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_choose import light_lora, train_demo

from dataset.buckets import Order
from dataset.images import open_image, to_rgb
from dataset.sources import DEMO, HELD_OUT, PLACE, Source, open_source
from evaluation.examination import SEEDS, Examination
from evaluation.intervals import Interval, difference, mean_of, quantile, share_of
from evaluation.judge import NOISE_LEVELS, Judge, Opinion, Phrase, judged_texts, opinion_of, phrase_of
from evaluation.record import read_record
from evaluation.subject import Subject
from evaluation.tells import Album, clipped_share, diversity, features, flat_share
from evaluation.validation import BANDS, kept_out_of, spread_timesteps
from evaluation.verdict import StepFigures, Tell, best_cell, figures, is_sound, measurements_since_best, recommend, verdict_of
from lora_files.deltas import parameter_shapes
from lora_files.read import read_lora
from model.diffusion import Diffusion
from model.text import tokenize
from options.training import DiffusionConfig

assert light_lora  # a fixture

# Intervals.


def skewed(n: int, times: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(gains, losses, true share) of n images, [times, n] each: losses that differ by factors, gains that are skewed."""
    generator = np.random.default_rng(n)
    whole = generator.lognormal(0, 0.4, (times, n))
    part = whole * (0.55 - 0.15 * generator.gamma(8, 1 / 8, (times, n)))
    return part, whole, 0.4


def coverage(intervals: list, truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def bootstrap(part: np.ndarray, whole: np.ndarray) -> list:
    """The percentile intervals of a bootstrap over images, for every row."""
    generator, n = np.random.default_rng(0), part.shape[1]
    pairs = []
    for p, w in zip(part, whole, strict=True):
        chosen = generator.integers(n, size=(400, n))
        pairs.append(np.quantile(p[chosen].sum(1) / w[chosen].sum(1), (0.025, 0.975)))
    return pairs


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16, 32, 64])
def test_the_interval_holds_the_true_share(n):
    part, whole, truth = skewed(n, 1500)
    ours = coverage([share_of(p, w)[1:] for p, w in zip(part, whole, strict=True)], truth)
    assert 0.92 <= ours <= 0.985
    if n <= 8:
        assert coverage(bootstrap(part[:400], whole[:400]), truth) < ours - 0.05


def test_quantiles_of_student():
    known = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 11: 2.201, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}
    assert {freedom: round(quantile(freedom), 3) for freedom in known} == known
    assert quantile(1e9) == pytest.approx(1.96, abs=1e-3)
    assert quantile(2.9) == quantile(2)  # the wider one
    assert math.isnan(quantile(0))


def test_the_difference_is_that_of_welch():
    first, second = np.array([1.0, 2, 3, 4]), np.array([2.0, 4, 9])
    one = np.ones
    found = difference((first, one(4)), (second, one(3)))
    error = 5 / 3 / 4 + 13 / 3  # variances over n; 2.39 degrees of freedom
    assert found.mean == pytest.approx(-2.5)
    assert found.high - found.mean == pytest.approx(4.303 * math.sqrt(error)) == found.mean - found.low
    other = difference((second, one(3)), (first, one(4)))
    assert other == pytest.approx((-found.mean, -found.high, -found.low))


NUMBER = st.floats(0.01, 10)


@given(st.lists(st.tuples(st.floats(-5, 5), NUMBER), min_size=2, max_size=20), st.floats(0.01, 100))
def test_an_interval_has_no_unit(pairs, scale):
    part, whole = np.array(pairs).T
    found = share_of(part, whole)
    assert share_of(scale * part, scale * whole) == pytest.approx(found, rel=1e-6, abs=1e-6)
    assert share_of(scale * part, whole) == pytest.approx([scale * x for x in found], rel=1e-6, abs=1e-6 * scale)
    assert found.low <= found.mean <= found.high


def test_of_one_picture_the_limits_are_unknown():
    pair = np.array([0.2]), np.array([0.5])
    for found in (share_of(*pair), difference(pair, (np.ones(5), np.ones(5))), mean_of(np.ones(1))):
        assert math.isfinite(found.mean)
        assert not found.known
        assert math.isnan(found.low)
        assert math.isnan(found.high)


# What is kept out, and where in the schedule it is measured.


@given(st.integers(0, 1000), st.integers(1, 30))
def test_one_timestep_in_each_part(image, count):
    found = spread_timesteps(image, count)
    assert [int(t * count) for t in found] == list(range(count))
    if count == BANDS:
        assert found == pytest.approx([0.05 + band / 10 for band in range(BANDS)])


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_a_few_images_cover_every_band(count):
    timesteps = [t for image in range(8) for t in spread_timesteps(image, count)]
    assert {int(t * BANDS) for t in timesteps} == set(range(BANDS))


def made_up(parts: list[int], broken: list[bool], repeats: list[int] | None, weights: list[float] | None) -> Source:
    """A source of as many samples, of a mixture of data sets; each of them is repeated alike, or has a weight."""
    n, part = len(parts), np.array(parts)
    places = np.zeros(n, PLACE)
    places["height"] = places["width"] = np.where(broken, 0, 64)
    source = source_in_memory(places, [f"s{i}" for i in range(n)])
    if weights:
        return replace(source, part=part, shares=tuple((np.array(weights) / sum(weights)).tolist()))
    if repeats:
        times = np.array(repeats)[part]
        draws = np.bincount(part, times)
        return replace(source, part=part, shares=tuple((draws / draws.sum()).tolist()), repeats=times)
    return source


@st.composite
def sources(draw):
    """Of up to three data sets with up to twelve samples each, some of them unreadable; of each at least one can be read."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    parts = [part for part, size in enumerate(sizes) for _ in range(size)]
    broken = [draw(st.booleans()) and part == before for part, before in zip(parts, [-1, *parts], strict=False)]
    kind = draw(st.sampled_from(["plain", "repeats", "weights"]))
    repeats = [draw(st.integers(1, 4)) for _ in sizes] if kind == "repeats" else None
    weights = [draw(st.integers(1, 4)) for _ in sizes] if kind == "weights" else None
    return made_up(parts, broken, repeats, weights)


@given(sources(), st.floats(0.01, 0.99), st.integers(0, 5))
def test_what_is_kept_out(source, share, seed):
    chosen = kept_out_of(source, share, seed)
    readable = source.column("height") > 0
    part = np.zeros(source.samples, int) if source.part is None else source.part
    assert chosen == kept_out_of(source, share, seed) == sorted(set(chosen))
    assert readable[chosen].all()
    left = [n for n in np.flatnonzero(readable) if n not in chosen]
    assert {*part[left]} == {*part}  # of each data set something is left that can be read
    most = sum(max(0, count - 1) for count in np.bincount(part[readable]))
    assert len(chosen) == min(most, max(2, round(share * source.samples)))


def test_at_most_64_are_kept_out_and_the_seed_decides_which():
    source = made_up([0] * 2000, [False] * 2000, None, None)
    first, second = (kept_out_of(source, 0.5, seed) for seed in (0, 1))
    assert len(first) == len(second) == 64
    assert len({*first} & {*second}) < 16


@settings(deadline=None)
@given(sources(), st.floats(0.05, 0.9), st.integers(1, 3), st.integers(0, 3))
def test_no_kept_out_sample_is_drawn_and_every_other_one_is(source, share, bs, seed):
    chosen = kept_out_of(source, share, seed)
    left = source.without(chosen)
    expected = [n for n in range(source.samples) if n not in chosen]
    assert left.names == [source.names[n] for n in expected]
    assert [left.read_sample(n).captions for n in range(left.samples)] == [source.read_sample(n).captions for n in expected]
    assert [left.name(n) for n in range(left.samples)] == left.names
    assert sum(left.shares or (1,)) == pytest.approx(1)
    assert (left.identity() == source.identity()) == (not chosen)
    order = Order(np.zeros(left.samples, int), bs, seed, left.part, left.shares, left.epoch)
    if source.repeats is not None:
        times = source.repeats[expected]
        assert left.epoch == times.sum()
        assert (np.bincount(order.epoch(0), minlength=left.samples) == times).all()
    batches = order.batches()
    drawn = {left.names[n] for _ in range(40 * left.samples // bs + 40) for n in next(batches)[1]}
    assert drawn == {source.names[n] for n in expected}


# The judge.


class Reader:
    """A denoiser that predicts the noise the better, the more like the secret text its text is."""

    def __init__(self, denoiser, diffusion, secret: str):
        self.tokenizers, self.diffusion, self.seen = denoiser.tokenizers, diffusion, []
        self.secret = tokenize(denoiser.tokenizers, [secret], None)

    def encode_text(self, tokens):
        return tokens.float(), (tokens != self.secret).flatten(1).float().mean(1, keepdim=True)

    def __call__(self, noisy, t, text, ids):
        self.seen += [(int(step), x.clone()) for step, x in zip(t, noisy, strict=True)]
        return noisy + 100 * text[1].view(-1, 1, 1, 1)


NRT = Phrase("nrt", True)
TEXTS = {"a cat": "nrt a cat", "a house": "nrt a house", "two dogs": "nrt two dogs", "the sea at night": "nrt the sea at night"}


@pytest.mark.parametrize("styled", [False, True])
def test_the_judge_recognises_the_text_that_explains_a_picture(denoiser, pipe, styled):
    diffusion = Diffusion(DiffusionConfig(), pipe.scheduler.alphas_cumprod, "epsilon", torch.device("cpu"))
    image = photograph(1, 64, 64)
    for plain, text in TEXTS.items():
        judge = Judge(Reader(denoiser, diffusion, text if styled else plain), diffusion, pipe.vae, TEXTS, NRT)
        opinions = {
            other: judge.opinion(image, spelled, 5, styled) for pair in TEXTS.items() for other in [pair[0]] for spelled in pair
        }
        assert {other for other, opinion in opinions.items() if opinion.recognised} == {plain}
        assert max(opinions, key=lambda other: opinions[other].z) == plain
        assert judge.opinion(image, plain, 5, styled) == judge.opinion(image, text, 5, styled)  # however it is spelled


def test_all_texts_get_the_same_noise_whatever_fits_at_once(denoiser, pipe):
    diffusion = Diffusion(DiffusionConfig(), pipe.scheduler.alphas_cumprod, "epsilon", torch.device("cpu"))
    image, found = photograph(2, 72, 64), {}
    for most in (1, 3, 4):
        reader = Reader(denoiser, diffusion, "a cat")
        judge = Judge(reader, diffusion, pipe.vae, TEXTS, NRT)
        judge.most = most
        found[most] = judge.losses(image, 7, False)
        by_level: dict[int, list] = {}
        for step, noisy in reader.seen:
            by_level.setdefault(step, []).append(noisy)
        assert [len(of_texts) for of_texts in by_level.values()] == [len(TEXTS)] * len(NOISE_LEVELS)
        assert all(torch.equal(x, of_texts[0]) for of_texts in by_level.values() for x in of_texts)
    judge, real = Judge(denoiser, diffusion, pipe.vae, TEXTS, NRT), {}
    for judge.most in (1, 4):
        real[judge.most] = judge.losses(image, 7, False)
    np.testing.assert_allclose(found[1], found[3])
    np.testing.assert_allclose(found[1], found[4])
    np.testing.assert_allclose(real[1], real[4], rtol=1e-4)
    assert not np.allclose(real[1], judge.losses(image, 8, False), rtol=1e-4)  # the seed decides about the noise


def test_an_opinion_by_hand():
    assert opinion_of(np.array([1.0, 3, 5]), 0) == (3.0, True)  # others: mean 4, deviation 1
    assert opinion_of(np.array([4.0, 3, 5]), 0) == (0.0, False)
    assert opinion_of(np.array([1.0, 2, 2]), 0).recognised


CAPTION = st.text(max_size=60)


@settings(deadline=None)
@given(
    st.lists(CAPTION, max_size=6),
    CAPTION,
    st.lists(CAPTION.filter(str.strip), min_size=1, max_size=4),
    st.sampled_from(["demo", "sdxl"]),
)
def test_whatever_the_captions_are_every_prompt_can_be_judged(captions, trigger, prompts, model):
    """Prompts of which one has the phrase and another has not, or that are nothing but the phrase, too."""
    phrase = phrase_of(trigger, captions)
    prompts = [text for prompt in prompts for text in (prompt, phrase.add(prompt))] + [phrase.words] * bool(phrase.words)
    texts = judged_texts(prompts, model, phrase)
    assert len(texts) >= 3
    assert len({*texts}) == len({*texts.values()}) == len(texts)
    judge = Judge(None, None, None, texts, phrase)
    judge.losses = lambda image, seed, styled: np.arange(len(texts), dtype=float)
    for prompt in prompts:
        assert judge.opinion(None, prompt, 0, styled=True).recognised in (True, False)


WORD = st.sampled_from(["cat", "dog", "house", "sea", "red", "blue", "night", "day", "man", "woman", "tree", "boat"])
WORDS = st.lists(WORD, min_size=1, max_size=6).map(" ".join)


@given(st.lists(st.lists(WORD, min_size=1, max_size=2).map(" ".join), min_size=2, max_size=8), st.booleans())
def test_a_phrase_that_all_captions_have_is_found(texts, in_front):
    planted = "in clip-art style"
    captions = [f"{planted}, {text}" if in_front else f"{text}, {planted.capitalize()}." for text in texts]
    found = phrase_of("", captions).words
    assert planted in found or len({*texts}) == 1
    if not {*texts[0].split()} & {*" ".join(texts[1:]).split()}:
        assert found == planted
    assert phrase_of(" nrt style, ", captions) == ("nrt style", True)


def test_one_word_or_the_whole_caption_is_no_phrase():
    assert phrase_of("", ["a cat", "a dog"]).words == ""
    assert phrase_of("", ["clip art", "clip art"]).words == ""
    assert phrase_of("", []).words == phrase_of("", [""]).words == ""


@given(WORDS, st.sampled_from([Phrase("nrt style", True), Phrase("in ninja style", False), Phrase("", False)]))
def test_removing_what_was_added_gives_the_text_again(text, phrase):
    assert phrase.remove(phrase.add(text)) == text
    assert phrase.remove(text) == text
    assert phrase.words in phrase.add(text)


def test_a_phrase_is_removed_wherever_it_is():
    phrase = Phrase("nrt style", True)
    assert phrase.remove("a cat, NRT Style, on a roof") == "a cat, , on a roof"
    assert phrase.remove("a cat, nrt style") == "a cat"
    assert Phrase("in style", False).remove("İİİİ a cat in style") == "İİİİ a cat"  # lower() makes these longer


@pytest.mark.parametrize("model", ["demo", "sdxl"])
def test_texts_of_the_judge_differ_in_what_they_show(model):
    for count in range(12):
        prompts = [f"nrt prompt {n}" for n in range(count)]
        texts = judged_texts(prompts, model, NRT)
        assert {*prompts} <= {*texts.values()}
        assert all(text == f"nrt {plain}" for plain, text in texts.items())
        assert len(texts) == max(8, count)


# The verdict.


def probes_of(images: int, timesteps: int) -> list[dict]:
    return [{"name": f"p{i}", "caption": "", "timesteps": spread_timesteps(i, timesteps)} for i in range(images)]


def record_of(kept_out: dict, images: int = 16, prompts: dict | None = None, missing: tuple[int, ...] = ()) -> dict:
    """A record whose LoRA has the loss {step: mean over images} on pictures that were kept out, and in whose pictures the
    prompts are seen {step: so clearly}; `missing`: steps without a file.
    """
    generator = np.random.default_rng(0)
    style = generator.uniform(0.8, 1.2, (images, 4))

    def losses(mean: float) -> dict:
        rows = (mean * style * generator.uniform(0.98, 1.02, style.shape)).tolist()
        return {"kept_out": rows, "trained": rows}

    record = {
        "probes": {"kept_out": probes_of(images, 4), "trained": probes_of(images, 4)},
        "losses": {str(key): losses(mean) for key, mean in {"base": 0.5, **kept_out}.items()},
        "files": {str(step): {"name": f"{step}.safetensors", "sha256": ""} for step in kept_out if step not in missing},
    }
    if prompts:
        picture = {"file": "", "flat": 0.0, "clipped": 0.0, "nearest": {"trained": None, "kept_out": None}}
        record["pictures"] = {
            str(key): [{**picture, "z": z * (1 + i / 9), "recognised": z > 0.5} for i in range(3)]
            for key, z in {"base": 2.0, **prompts}.items()
        }
    return record


FALLING = {40: 0.33, 80: 0.30, 120: 0.28, 160: 0.26, 200: 0.24, 240: 0.23}


def test_the_step_before_the_prompts_are_lost_is_recommended():
    """The clip art of the issue: its loss falls until the last step, but from 160 on its pictures no longer show what was
    asked.
    """
    seen = {40: 1.9, 80: 1.8, 120: 1.6, 160: 0.4, 200: 0.2, 240: 0.1}
    verdict = verdict_of(record_of(FALLING, prompts=seen))
    assert verdict.recommended == 120
    assert [[tell.kind for tell in one.tells] for one in verdict.steps] == [[], [], [], *[["prompts"]] * 3]
    assert verdict.sentences[0].startswith("Take step 120")
    assert "Later files went too far. Step 160" in verdict.sentences[-1]
    assert verdict_of(record_of(FALLING)).recommended == 240  # the loss alone
    assert verdict_of(record_of(FALLING, prompts=seen, missing=(120,))).recommended == 80
    lost = verdict_of(record_of(FALLING, prompts=dict.fromkeys(FALLING, 0.1)))
    assert lost.recommended is None
    assert lost.sentences[0].startswith("Every file went too far")


def test_the_smallest_step_that_is_as_good_is_recommended():
    assert verdict_of(record_of({10: 0.4, 20: 0.2, 30: 0.2, 40: 0.2005})).recommended == 20
    assert verdict_of(record_of({10: 0.4, 20: 0.3, 30: 0.2, 40: 0.25})).recommended == 30
    assert verdict_of(record_of({10: 0.23, 20: 0.2}, images=1)).recommended == 20  # by too much, although not significantly
    assert verdict_of(record_of({10: 0.205, 20: 0.2})).recommended == 20  # by little, but significantly


def test_figures_of_a_record_by_hand():
    record = record_of({7: 0.2})
    base, own = (np.array(record["losses"][key]["kept_out"]).mean(1) for key in ("base", "7"))
    (found,) = verdict_of(record).steps
    assert found.improvement.mean == pytest.approx(1 - own.sum() / base.sum())
    assert found.improvement.low < found.improvement.mean < found.improvement.high
    assert found.gap.mean == pytest.approx(0)
    assert len(found.bands) == BANDS
    assert all(band.mean == pytest.approx(0.6, abs=0.05) for band in found.bands)
    record["losses"]["7"]["trained"] = (np.array(record["losses"]["7"]["trained"]) * 0.4).tolist()
    (found,) = verdict_of(record).steps
    assert found.gap.mean == pytest.approx(0.6 * own.sum() / base.sum())
    assert [tell.kind for tell in found.tells] == ["by heart"]


def test_how_many_measurements_are_not_better():
    assert measurements_since_best({}) == measurements_since_best(record_of({})) == 0
    assert measurements_since_best(record_of({9: 0.4, 10: 0.3, 100: 0.2})) == 0
    assert measurements_since_best(record_of({9: 0.2, 10: 0.3, 100: 0.4})) == 2
    assert measurements_since_best(record_of({9: 0.2, 10: math.nan, 100: math.nan})) == 2


SHARE = st.floats(0, 1)
LOSS = st.one_of(st.floats(0.01, 2), st.sampled_from([0.1, 0.2, math.nan, math.inf]))


@st.composite
def records(draw):
    """Of a run with any part of it missing, and with losses of a LoRA that is broken among them."""
    images, timesteps = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    steps = draw(st.lists(st.integers(1, 50), unique=True, max_size=5))
    rows = st.lists(st.lists(LOSS, min_size=timesteps, max_size=timesteps), min_size=images, max_size=images)
    kinds = st.sampled_from([("kept_out", "trained"), ("kept_out",), ("trained",), ()])
    nearest = st.one_of(
        st.none(), st.just({}), st.fixed_dictionaries({"trained": st.one_of(st.none(), st.tuples(st.text(), SHARE))})
    )
    picture = st.one_of(
        st.none(),
        st.fixed_dictionaries(
            {"file": st.just("x.png")},
            optional={"z": st.floats(-3, 3), "recognised": st.booleans(), "flat": SHARE, "clipped": SHARE, "nearest": nearest},
        ),
    )
    limits = st.tuples(SHARE, SHARE, SHARE).map(sorted).map(lambda x: [x[1], x[0], x[2]])
    extras = st.fixed_dictionaries({}, optional={"leak": SHARE, "diversity": limits})
    keys = ["base", *map(str, steps)]

    def some(values):
        return {key: draw(values) for key in keys if draw(st.integers(0, 4))}

    record = {
        "probes": {kind: probes_of(images, timesteps) for kind in ("kept_out", "trained")},
        "losses": {key: {kind: draw(rows) for kind in draw(kinds)} for key in keys if draw(st.integers(0, 4))},
        "pictures": some(st.lists(picture, max_size=3)),
        "extras": some(extras),
        "files": {key: {"name": key, "sha256": ""} for key in keys[1:] if draw(st.integers(0, 4))},
        "usual_distance": draw(st.one_of(st.none(), SHARE)),
        "data_shares": draw(st.fixed_dictionaries({}, optional={"flat": SHARE, "clipped": SHARE})),
    }
    for name in draw(st.sets(st.sampled_from(sorted(record)))):
        del record[name]
    return record


@settings(deadline=None)
@given(records())
def test_whatever_a_record_holds(record):
    verdict = verdict_of(record)
    steps = [one.step for one in verdict.steps]
    assert steps == sorted(set(steps))
    assert all(isinstance(sentence, str) and sentence.strip() for sentence in verdict.sentences)
    measured = {one.step: one for one in verdict.steps if one.improvement}
    assert all(math.isfinite(one.improvement.mean) for one in measured.values())
    saved = {step: one for step, one in measured.items() if is_sound(one) and str(step) in record.get("files", {})}
    if not saved:
        assert verdict.recommended is None
        return
    assert verdict.recommended in saved
    means = {step: np.mean(record["losses"][str(step)]["kept_out"]) for step in saved}
    best = min(means, key=means.get)
    assert verdict.recommended <= best  # a later one is taken only if it is better
    base = np.mean(record["losses"]["base"]["kept_out"])
    assert means[verdict.recommended] <= means[best] + 0.05 * max(0, base - means[best]) + 1e-9


def figures_at(tells: tuple[str, ...] = ()) -> StepFigures:
    return StepFigures(1, Interval(0.1, 0, 0.2), tells=tuple(Tell(kind, kind) for kind in tells))


def test_the_cell_to_take():
    """The smallest step that at its best strength is as good as any, at that strength; never one with a tell but a leak."""
    records = {0.5: record_of({10: 0.3, 20: 0.3}), 1.0: record_of({10: 0.2, 20: 0.2}), 2.0: record_of({10: 0.4, 20: 0.1})}
    found = {(step, strength): figures_at() for step in (10, 20) for strength in records}
    assert best_cell(records, found) == (20, 2.0)
    assert best_cell(records, {**found, (20, 2.0): figures_at(("prompts",))}) == (10, 1.0)
    assert best_cell(records, {**found, (20, 2.0): figures_at(("leak",))}) == (20, 2.0)
    assert best_cell(records, {cell: figures_at(("flat",)) for cell in found}) is None


@pytest.mark.parametrize(
    ("kind", "own", "quiet"),
    [
        ("flat", {"flat": 0.9}, {"flat": 0.35}),
        ("clipped", {"clipped": 0.9}, {"clipped": 0.35}),
        ("copies", {"nearest": {"trained": ["t", 0.04]}}, {"nearest": {"trained": ["t", 0.06]}}),
    ],
)
def test_what_is_seen_in_one_picture_is_told(kind, own, quiet):
    for change, told in ((own, [kind]), (quiet, [])):
        record = record_of({5: 0.2}, prompts={5: 2.0}) | {"usual_distance": 0.1, "data_shares": {"flat": 0.1, "clipped": 0.1}}
        record["pictures"]["5"][1] |= change
        (found,) = verdict_of(record).steps
        assert [tell.kind for tell in found.tells] == told
        assert recommend(record, (found,)) == (None if told else 5)


@pytest.mark.parametrize(
    ("kind", "own", "quiet"),
    [("sameness", {"diversity": [0.2, 0.1, 0.3]}, {"diversity": [0.45, -0.6, 1.4]}), ("leak", {"leak": 0.9}, {"leak": 0.2})],
)
def test_what_is_seen_in_all_pictures_is_told(kind, own, quiet):
    for extras, told in ((own, [kind]), (quiet, [])):
        record = record_of({5: 0.2}) | {"extras": {"5": extras}}
        (found,) = verdict_of(record).steps
        assert [tell.kind for tell in found.tells] == told
        assert recommend(record, (found,)) == (None if kind in told and kind != "leak" else 5)


# Signs in pictures, on the bundled model. Each is planted, and a good LoRA shows none of them.


@pytest.fixture(scope="module")
def examined(light_lora):
    """(examination, record): of the base, of the light LoRA as step 1, and of 30 times as much of it as step 30."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.subject.SAMPLE_STEPS", 6)
        patch.setattr("evaluation.judge.MOST_TEXTS", 5)
        subject = Subject("demo", "cpu")
        kept_out, trained = (subject.stream(open_source(str(path)), {"trigger": "nrt"}) for path in (HELD_OUT, DEMO))
        examination = Examination(subject, kept_out, range(4), trained, 2)
        record = examination.of_base(examination.texts(examination.captions, 2))
        deltas = read_lora(light_lora, parameter_shapes(subject.denoiser))
        examination.of_lora(record, 1, deltas)
        examination.of_lora(record, 30, deltas, 30.0)
    return examination, record


def told(record: dict, step: int) -> set[str]:
    return {tell.kind for tell in figures(record, step).tells}


def with_pictures(examined, images: list[Image.Image]) -> set[str]:
    """The tells of a LoRA that draws these, in which what was asked is seen as clearly as in the base's."""
    examination, record = examined
    opinions = [Opinion(picture["z"], picture["recognised"]) for picture in record["pictures"]["base"]]
    images = (images * len(opinions))[: len(opinions)]
    looked_at = examination.look(images, opinions)
    return told({**record, "pictures": {**record["pictures"], "9": looked_at}}, 9)


def test_a_lora_that_is_much_too_strong_loses_the_prompts(examined):
    _, record = examined
    good, strong = (figures(record, step) for step in (1, 30))
    assert good.improvement.low > 0
    assert told(record, 1) == {"leak"}  # it never saw the trigger: it works as much without
    assert good.leak > 0.7
    assert "prompts" in told(record, 30)
    assert strong.prompts.mean < 0.6 < good.prompts.mean
    assert verdict_of({**record, "files": {"1": {}, "30": {}}}).recommended == 1


def test_pictures_of_noise_show_nothing_that_was_asked(examined):
    examination, record = examined
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(40, 215, (128, 128, 3), dtype=np.uint8)) for _ in examination.prompts]
    looked_at = examination.look(noise, examination.opinions(noise, styled=False))
    assert told({**record, "pictures": {**record["pictures"], "9": looked_at}}, 9) == {"prompts"}
    assert with_pictures(examined, examination.drawn) == set()  # the base's own


def test_copies_are_found_mirrored_ones_too(examined):
    trained, kept_out = open_source(str(DEMO)), open_source(str(HELD_OUT))
    for n in (0, 17, 47):
        copy = to_rgb(open_image(trained.read_sample(n).image))
        for image in (copy, ImageOps.mirror(copy), copy.resize((96, 96)), copy.resize((100, 128))):
            assert with_pictures(examined, [image]) == {"copies"}
    others = [to_rgb(open_image(kept_out.read_sample(n).image)) for n in range(4, kept_out.samples)]
    for first in range(0, len(others), 4):
        assert with_pictures(examined, others[first : first + 4]) == set()


def test_spoilt_pictures_are_found(examined):
    pixels = np.random.default_rng(0).normal(128, 2000, (128, 128, 3)).clip(0, 255).astype(np.uint8)
    for image, kinds in [
        (Image.new("RGB", (128, 128), "black"), {"flat", "clipped"}),
        (Image.new("RGB", (128, 128), "white"), {"flat", "clipped"}),
        (Image.new("RGB", (128, 128), (120, 130, 90)), {"flat"}),
        (Image.fromarray(pixels), {"clipped"}),
        (photograph(5, 128, 128), set()),
    ]:
        assert with_pictures(examined, [image]) - {"copies"} == kinds
    assert flat_share(Image.new("RGB", (20, 30))) == clipped_share(Image.new("L", (9, 9))) == 1
    half = Image.new("RGB", (16, 16), "white")
    half.paste(photograph(1, 16, 8), (0, 0))
    assert flat_share(half) == 0.5
    assert clipped_share(half) == pytest.approx(0.5, abs=0.05)


def test_one_picture_for_all_seeds_is_told(examined):
    examination, record = examined
    by_prompt = [examination.drawn[n : n + SEEDS] for n in range(0, len(examination.drawn), SEEDS)]
    same = diversity([[first, first] for first, *_ in by_prompt], by_prompt)
    assert same.mean == 0
    assert diversity(by_prompt, by_prompt) == pytest.approx((1, 1, 1))
    for found, kinds in ((same, {"sameness"}), (diversity(by_prompt, by_prompt), set())):
        changed = {**record, "extras": {"9": {"diversity": list(found)}}, "losses": {}}
        assert told({**changed, "pictures": {}}, 9) == kinds
    assert record["extras"]["1"]["diversity"][0] > 0.5


def test_the_album_names_the_most_similar_picture():
    pictures = {f"p{n}": photograph(n, 64, 64) for n in range(6)}
    album = Album(pictures, {"k": photograph(9, 80, 64)})
    for name, image in pictures.items():
        assert album.nearest(features(ImageOps.mirror(image)))["trained"] == (name, pytest.approx(0, abs=1e-6))
    assert album.usual_distance == album.nearest(features(photograph(9, 80, 64)))["trained"][1] > 0.05
    empty = Album({}, {})
    assert empty.nearest(features(pictures["p0"])) == {"trained": None, "kept_out": None}
    assert empty.usual_distance is None


@pytest.mark.parametrize("few", [True, False])
def test_four_pictures_are_learned_by_heart_and_48_are_not(few, tmp_path):
    """Overtrained with the same options, which are those of a small picture to save time."""
    if few:
        source = open_source(str(DEMO))
        for n in (0, 11, 22, 33):
            sample = source.read_sample(n)
            (tmp_path / f"{n}.jpg").write_bytes(sample.image)
            (tmp_path / f"{n}.txt").write_text(sample.captions[0])
    options = ["--steps", 80, "--save-every", 80, "--lr", 5e-3, "--bs", 4, "--rank", 16, "--targets", "all"]
    options += ["--no-train-text-encoder", "--resolution", 64, "--validate", HELD_OUT, "--data", tmp_path if few else "demo"]
    train_demo(tmp_path / "out", *options)
    record = read_record(tmp_path / "out")
    assert told(record, 80) == ({"by heart"} if few else set())
    assert verdict_of(record).recommended == (None if few else 80)


def test_the_judge_asks_about_fewer_texts_at_once_where_memory_runs_out(denoiser, pipe):
    diffusion = Diffusion(DiffusionConfig(), pipe.scheduler.alphas_cumprod, "epsilon", torch.device("cpu"))
    judge = Judge(denoiser, diffusion, pipe.vae, TEXTS, NRT)
    whole, at_once = judge.losses(photograph(3, 64, 64), 7, False), judge.losses_at_once

    def short_of_memory(*arguments):
        if judge.most > 1:
            raise torch.OutOfMemoryError
        return at_once(*arguments)

    judge.losses_at_once = short_of_memory
    np.testing.assert_allclose(judge.losses(photograph(3, 64, 64), 7, False), whole, rtol=1e-4)
    assert judge.most == 1
    judge.losses_at_once = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):  # not for ever
        judge.losses(photograph(3, 64, 64), 7, False)
