"""--prior-data: pictures of the class in general, mixed into the batches as in DreamBooth."""

import json
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import encoded, photograph
from hypothesis import given
from hypothesis import strategies as st
from test_folder import source_of
from test_train import equal, weights

from data import Stream
from dataset.buckets import Order
from dataset.sources import open_mixture, open_source, with_prior
from lora_files.read import read_metadata
from options.training import CaptionConfig, DataConfig, PriorConfig, TrainConfig
from run.prior import add_prior


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), kind=st.sampled_from([":x{}", ":{}", ""]),
    prior=st.lists(st.integers(1, 30), min_size=1, max_size=2), share=st.floats(0.05, 0.9), epochs=st.integers(1, 30),
)  # fmt: skip
def test_the_share_of_the_draws_is_exact_and_an_epoch_is_one_look_at_each_other_picture(sizes, kind, prior, share, epochs):
    """Whatever the data are a mixture of: within the draws, the share of each picture is what it was without a prior."""
    names = [*map(str, range(len(sizes) + len(prior)))]
    sources = dict(zip(names, map(source_of, [*sizes, *prior]), strict=True))
    with patch("dataset.sources.open_source", lambda name, *_: sources[name]):
        training = open_mixture(tuple(name + kind.format(int(name) + 1) for name in names[: len(sizes)]))
        both = with_prior(training, open_mixture(tuple(names[len(sizes) :])), share)
    assert both.epoch * (1 - share) == pytest.approx(training.epoch)
    assert [both.read_sample(n).of_prior for n in range(both.samples)] == [False] * sum(sizes) + [True] * sum(prior)
    order = Order(np.zeros(both.samples, int), 1, 3, both.part, both.shares, both.epoch)
    counts = sum(np.bincount(order.epoch(number), minlength=both.samples) for number in range(epochs))
    draws, parts = epochs * order.size, len(both.shares)
    assert abs(counts[training.samples :].sum() - share * draws) <= parts
    alone = np.zeros(training.samples, int) if training.part is None else training.part
    shares = np.array(training.shares or (1.0,))[alone] / np.bincount(alone)[alone]
    assert (abs(counts[: training.samples] - (1 - share) * draws * shares) < 2).all()


@pytest.fixture
def reg(tmp_path) -> Path:
    """Five captioned pictures, of which one is broken. Two have a shape of their own."""
    folder = tmp_path / "reg"
    folder.mkdir()
    for i in range(5):
        (folder / f"reg{i}.png").write_bytes(encoded(photograph(20 + i, 120, 60 if i > 2 else 110)) if i else b"no picture")
        (folder / f"reg{i}.txt").write_text(f"class, picture {i}")
    return folder


def test_captions_of_the_prior_get_no_trigger(photos, reg):
    """Everything else about them is as for the others. Batches of one bucket mix both, and a broken picture is replaced."""
    config = TrainConfig(dataset=DataConfig(bs=2, bucket_step=16), prior=PriorConfig(prior_data=(str(reg),)))
    both = add_prior(config, open_source(str(photos)))
    stream = Stream(both, config.dataset, CaptionConfig(trigger="nrt", shuffle_tags=True, caption_dropout=0.2), 64, seed=1)
    seen, mixed = Counter(), 0
    for _, batch in zip(range(200), stream, strict=False):
        assert batch.of_prior == [Path(name).name.startswith("reg") for name in batch.names]
        mixed += len({*batch.of_prior}) == 2
        for of_prior, caption in zip(batch.of_prior, batch.captions, strict=True):
            kind = "dropped" if not caption else "trigger" if caption.startswith("nrt, picture") else caption.partition(",")[0]
            seen[of_prior, kind.rstrip(" 1234")] += 1
    assert mixed > 20
    assert {*seen} == {(False, "dropped"), (True, "dropped"), (False, "trigger"), (True, "class"), (True, "picture")}
    assert sum(count for (of_prior, _), count in seen.items() if of_prior) / 400 == pytest.approx(0.4, abs=0.06)  # ⅘ of a half


def test_a_batch_without_a_picture_that_can_be_read_is_of_what_takes_its_place(reg):
    """Whether it is then learned with the weight of the prior follows from the picture, not from the one it stands for."""
    both = with_prior(open_source(str(reg)), open_source(str(reg)), 0.5)
    stream = Stream(both, DataConfig(bs=1, bucket_step=16), CaptionConfig(trigger="nrt"), 64, seed=1)
    broken, whole = 5, 1  # of the prior; of the others
    batch = stream.batch([0], [broken])
    assert (batch.names, batch.of_prior, batch.captions) == ([both.name(whole)], [False], ["nrt class, picture 1"])


def test_nothing_but_the_steps_knows_the_prior(train, photos, reg, tmp_path):
    """The same pictures are kept out with it as without, and neither the page nor the LoRA file counts it."""
    options = ["--data", photos, "--trigger", "nrt", "--validate", 0.3, "--epochs", 1, "--pictures", "--caption", "nrt style"]
    found = {}
    for name, more in (("without", []), ("with", ["--prior-data", reg, "--prior-share", 0.25])):
        out, _ = train(*options, *more, "--out", tmp_path / name)
        record = json.loads((tmp_path / name / "record.json").read_text())
        (file,) = (tmp_path / name).glob("*.safetensors")
        header = read_metadata(file)
        kept = [header[key] for key in ("ss_num_train_images", "sdxl_lora.dataset", "ss_tag_frequency")]
        looks = record["run"]["steps"] * record["run"]["images_per_step"] / record["run"]["epoch"]
        found[name] = kept, record["probes"], record["thumbs"], record["losses"]["base"], looks, out
    assert found["with"][:4] == found["without"][:4]
    assert "photo" in json.dumps(found["with"][2])
    assert found["with"][4] == found["without"][4] == pytest.approx(1.2)  # looks at each
    # 5 pictures are left, of two at once: an epoch is 2.5 steps, or 3.33 with a quarter for the prior.
    assert "steps      3: each image 1.2 times" in found["without"][5]
    assert "steps      4: each image of --data 1.2 times" in found["with"][5]
    assert "images with a caption (5 of --prior-data) (1 cannot be read" in found["with"][5]
    assert json.loads(header["sdxl_lora.config"])["prior_data"] == ["reg"]  # no folder: it is public


def test_a_run_resumes_bit_for_bit_and_only_with_the_same_pictures(train, cutouts, reg, tmp_path):
    options = ["--data", cutouts, "--masked-loss", "--flip", "--trigger", "nrt", "--prior-weight", 2, "--grad-accum", 2]
    options += ["--base-precision", "int8", "--lr", 1e-2, "--workers", 1, "--bucket-step", 16]
    with_prior = [*options, "--prior-data", reg]
    train(*with_prior, "--steps", 4)
    train(*with_prior, "--steps", 2, "--out", tmp_path / "b")
    moved = shutil.copytree(reg, tmp_path / "moved" / "reg")
    train(*options, "--prior-data", moved, "--steps", 4, "--out", tmp_path / "b")
    assert equal(weights(tmp_path / "out", 4), weights(tmp_path / "b", 4))
    (moved / "reg1.txt").write_text("another caption")
    for changed in (["--prior-data", moved], [*with_prior[-2:], "--prior-share", 0.4], ["--prior-share", 0.5]):
        _, err = train(*options, *changed, "--steps", 6, "--resume", tmp_path / "b", status=2)
        assert "is of another run: " in err
        assert err.count("\n") == 1


def test_cached_latents_and_text(train, script, tiny_model, cutouts, reg, tmp_path):
    """Captions that are encoded already hold a trigger or not: there is nothing to leave away."""
    options = ["--masked-loss", "--bucket-step", 16]
    for name, folder, trigger in (("cached", cutouts, "nrt"), ("cached-reg", reg, "")):
        command = [folder, "--model", tiny_model, "--device", "cpu", "--out", tmp_path / name, "--text", 1]
        script("scripts/cache_latents.py", *command, "--trigger", trigger, *options)
    options += ["--no-train-text-encoder", "--lr", 1e-2, "--steps", 2, "--data", tmp_path / "cached"]
    for weight in (1, 4):
        prior = ["--prior-data", tmp_path / "cached-reg", "--prior-weight", weight]
        train(*options, *prior, "--out", tmp_path / f"weight{weight}")
    assert not equal(weights(tmp_path / "weight1", 2), weights(tmp_path / "weight4", 2))
    _, err = train(*options, "--prior-data", reg, status=2)
    assert err == "train_lora.py: --prior-data and --data hold both images and latents: train on one kind\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prior-data", "nowhere"], "--prior-data nowhere"),
        (["--prior-data", ""], "--prior-data the name of the data is empty"),
        (["--prior-data", "{reg}", "--prior-share", 1], "--prior-share must lie in 0…0.9, not 1"),
        (["--prior-data", "{reg}", "--prior-prompts", "a"], "--prior-prompts does nothing with --prior-data"),
        (["--prior-share", 0.5], "--prior-share needs a --trigger"),
        (["--prior-weight", 2], "--prior-weight and --prior-prompts do nothing without --prior-share or --prior-data"),
        (["--prior-data", "{reg}", "--validate", "{reg}"], "--validate {reg} holds pictures that are trained on"),
        (["--prior-data", "{empty}"], "--prior-data {empty}: no image with a caption there (1 have none: put name.txt"),
    ],
)
def test_mistakes_end_in_one_line(train, photos, reg, tmp_path, options, message):
    """--caption is for what is to be learned: a picture of the prior without a caption gets none."""
    empty = tmp_path / "empty"
    empty.mkdir()
    photograph(1, 80, 80).save(empty / "a.png")
    options = [str(option).format(reg=reg, empty=empty) for option in options]
    _, err = train("--data", photos, "--caption", "nrt style", "--steps", 1, *options, status=2)
    assert err.startswith(f"train_lora.py: {message.format(reg=reg, empty=empty)}")
    assert err.count("\n") == 1
