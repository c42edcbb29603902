"""--validate in runs: what is kept out, what is measured on it, and what becomes of that on resume and at the end."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ONE_HOST, encoded, fork_torchrun, photograph, until

from common.errors import UserError
from evaluation.record import RECORD_FILE, forget_after, picture, read_record, thumbnail, write_record
from evaluation.verdict import verdict_of
from lora import Adapter
from lora_files.read import read_metadata

SIZES = [(64, 64), (96, 64), (64, 128), (80, 72)]


def folder_of(folder: Path, count: int, first: int = 100) -> Path:
    """Small captioned pictures of several shapes."""
    folder.mkdir()
    for i in range(count):
        photograph(first + i, *SIZES[i % len(SIZES)]).save(folder / f"p{i:02}.png")
        (folder / f"p{i:02}.txt").write_text(f"a picture {first + i} in ink style")
    return folder


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Path:
    """24 pictures."""
    return folder_of(tmp_path_factory.mktemp("many") / "many", 24)


@pytest.fixture(scope="session")
def others(tmp_path_factory) -> Path:
    """Three pictures that are not among the many."""
    return folder_of(tmp_path_factory.mktemp("others") / "others", 3, 500)


@pytest.fixture(scope="session")
def a_lora(tmp_path_factory, tiny_model) -> Path:
    """A LoRA for the tiny model whose ΔW is not 0."""
    import torch

    from lora import add_lora
    from lora_files.write import serialise
    from model.load import load_sdxl
    from model.sdxl import Denoiser
    from options.training import LoRAConfig

    denoiser = Denoiser(load_sdxl(str(tiny_model), torch.float32, torch.device("cpu")))
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused)
    for _, B, _ in adapter.deltas.values():
        B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    path.write_bytes(serialise(adapter.deltas, {}, "kohya", torch.float32))
    return path


@pytest.fixture
def measured(monkeypatch) -> list[float]:
    """The strengths at which runs measure: 0 is the base."""
    from run.validation import Validation

    strengths, losses = [], Validation.losses
    monkeypatch.setattr(Validation, "losses", lambda self, strength: strengths.append(strength) or losses(self, strength))
    return strengths


@pytest.fixture
def drawn(monkeypatch) -> set[str]:
    """The names of the pictures that are trained on."""
    names: set[str] = set()
    take = __import__("data").Loader.take

    def noting(loader, count, wait):
        batches = take(loader, count, wait)
        names.update(*(batch.names for batch in batches))
        return batches

    monkeypatch.setattr("data.Loader.take", noting)
    return names


def losses(out: Path) -> dict:
    return read_record(out)["losses"]


def test_without_learning_nothing_is_improved(train, others, tmp_path):
    out, _ = train("--steps", 3, "--save-every", 2, "--validate", others, "--lr", 0)
    record = read_record(tmp_path / "out")
    assert losses(tmp_path / "out")["2"] == losses(tmp_path / "out")["3"] == losses(tmp_path / "out")["base"]
    steps = verdict_of(record).steps
    assert [one.step for one in steps] == [2, 3]
    for one in steps:
        zeros = (0, 0, 0)
        assert one.improvement == one.trained == zeros
        assert one.gap == zeros
        assert {band.mean for band in one.bands if band} == {0}
    assert "Step 2 is not surely better than the base on pictures that it never saw: 0 % (0 to 0) less." in out
    assert np.min(record["losses"]["base"]["kept_out"]) > 0


def test_two_ranks_measure_what_one_does(train, tiny_model, shards, others, a_lora, tmp_path):
    """With a LoRA that is there from the start, and does not learn: what is measured of it depends on nothing else."""
    options = ["--init-lora", a_lora, "--lr", 0, "--steps", 2, "--save-every", 1, "--validate", others]
    train(*options, "--bs", 1, "--grad-accum", 2)
    base = ["--model", tiny_model, "--data", shards, "--rank", 2, "--bs", 1, "--workers", 0, "--device", "cpu", "--no-pictures"]
    command = [*base, *options, "--out", tmp_path / "two", "--log-dir", tmp_path / "runs"]
    process = fork_torchrun("train_lora.py", command, ONE_HOST, tmp_path / "two.txt")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "two.txt").read_text()
    alone, together = (read_record(tmp_path / name) for name in ("out", "two"))
    assert together["probes"] == alone["probes"]
    assert together["losses"] == alone["losses"]
    assert together["losses"]["1"] != together["losses"]["base"]
    assert together["run"]["images_per_step"] == alone["run"]["images_per_step"] == 2


def test_a_run_that_goes_on_measures_as_one_that_never_stopped(train, measured, tmp_path, monkeypatch):
    """What was measured after the step that it goes on from is forgotten, and the base is not measured again, although a
    longer run could afford more.
    """
    monkeypatch.setattr("run.validation.ASKED", 5.0)
    options = ["--validate", folder_of(tmp_path / "two", 2), "--save-every", 2, "--validate-every", 1, "--lr", 1e-2]
    train(*options, "--steps", 5, "--out", tmp_path / "whole")
    assert measured == [0, 1, 1, 1, 1, 1]
    with monkeypatch.context() as patch:
        patch.setattr("lora.Adapter.update_layers", until(iter(range(3)), Adapter.update_layers))
        train(*options, "--steps", 4, status=130)
    assert {*losses(tmp_path / "out")} == {"base", "1", "2", "3"}
    measured.clear()
    train(*options, "--steps", 4, "--validate-every", 4)
    assert measured == [1]
    assert {*losses(tmp_path / "out")} == {"base", "1", "2", "4"}
    monkeypatch.setattr("run.validation.ASKED", 6.0)
    out, _ = train(*options, "--steps", 5)
    assert measured == [1, 1]
    assert "resume     step 4 of" in out
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "out") == {key: whole[key] for key in whole if key != "3"}
    assert len(whole["5"]["kept_out"][0]) == 6


def test_evaluate_measures_what_the_run_did(train, script, tiny_model, others, tmp_path, monkeypatch):
    options = ["--save-dtype", "fp32", "--lr", 3e-2, "--bucket-step", 32]
    train("--steps", 3, "--validate", others, *options)
    record, records = read_record(tmp_path / "out"), []
    of_lora = __import__("evaluation.examination").examination.Examination.of_lora

    def noting(self, record, step, *arguments):
        records.append(record)
        return of_lora(self, record, step, *arguments)

    monkeypatch.setattr("evaluation.examination.Examination.of_lora", noting)
    probes = record["probes"]["kept_out"]
    arguments = ["--lora", tmp_path / "out", "--timesteps", len(probes[0]["timesteps"]), "--pictures", 0, "--device", "cpu"]
    arguments += ["--model", tiny_model]
    out, _ = script("scripts/evaluate.py", others, *arguments)
    assert len(probes) == 3
    assert records[0]["probes"]["kept_out"] == probes
    for key in ("base", "3"):
        np.testing.assert_allclose(records[0]["losses"][key]["kept_out"], record["losses"][key]["kept_out"], rtol=2e-4)
    (of_run,), (of_script,) = verdict_of(record).steps, verdict_of(records[0]).steps
    np.testing.assert_allclose(of_run.improvement, of_script.improvement, rtol=1e-2)
    for one, other in zip(of_run.bands, of_script.bands, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.mean == pytest.approx(other.mean, rel=1e-2, abs=1e-5)
    before, after = (np.mean(record["losses"][key]["kept_out"]) for key in ("base", "3"))
    assert f"  base {before:.4f}   LoRA {after:.4f}   {100 * (after / before - 1):+.1f} %\n" in out
    assert before != pytest.approx(after, rel=1e-3)


def test_what_is_kept_out_is_never_trained_on(train, many, drawn, tmp_path):
    out, _ = train("--data", many, "--validate", 0.2, "--steps", 10, "--flip", "--caption-dropout", 0.5)
    record, everything = read_record(tmp_path / "out"), {str(path) for path in many.glob("*.png")}
    kept_out, trained = ({probe["name"] for probe in record["probes"][kind]} for kind in ("kept_out", "trained"))
    assert len(drawn) == 19
    assert kept_out <= everything - drawn
    assert trained <= drawn
    assert all(probe["caption"].endswith("in ink style") for kind in record["probes"].values() for probe in kind)
    thumbs = record["thumbs"]
    assert {*thumbs["kept_out"]} == everything - drawn
    assert {*thumbs["trained"]} == drawn
    assert picture(thumbs["trained"][min(drawn)]["jpeg"]).size[0] >= 64
    assert "of 24 pictures, never trained on, and as many that are, at" in out
    assert "24 images" not in out  # those of training are counted
    _, err = train("--data", many, "--validate", "none", "--steps", 11, "--resume", tmp_path / "out", status=2)
    assert re.search(r"of another run: .*--data files (\w+), 5 kept out -> files \1", err)


def test_in_one_line_what_cannot_be_measured_on(train, photos, many, others, tmp_path):
    two = folder_of(tmp_path / "two", 2)
    bare = shutil.copytree(others, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    broken = folder_of(tmp_path / "broken", 2)
    for path in broken.glob("*.png"):
        path.write_bytes(path.read_bytes()[:80])
    for data, value, message in [
        (photos, photos, f"--validate {photos} holds pictures that are trained on: a share such as 0.1 keeps some of them out"),
        (two, 0.5, "--validate: there are too few pictures to keep two of them out of training: --validate none"),
        (photos, bare, f"--validate {bare}: no image with a caption there"),
        (photos, tmp_path / "nowhere", f"--validate {tmp_path}/nowhere"),
        (photos, broken, "--validate: none of"),
        (photos, 1.5, "--validate 1.5: a share lies between 0 and 1, as 0.1; 'none' is without"),
        (photos, "nan", "--validate nan: a share lies between 0 and 1"),
    ]:
        _, err = train("--data", data, "--steps", 1, "--validate", value, status=2)
        assert err.startswith(f"train_lora.py: {message}"), err
        assert err.count("\n") == 1
    _, err = train("--data", photos, "--data", others, "--steps", 1, "--validate", others, status=2)
    assert err.startswith(f"train_lora.py: --validate {others} holds pictures that are trained on")
    _, err = train("--validate", "none", "--patience", 2, status=2)
    assert "--patience needs pictures to measure on, but --validate is none" in err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_validate(train, photos, many, tmp_path, measured):
    """Nothing is kept out of a few pictures; otherwise 8 %, however many steps there are: they may be raised later."""
    for name, data, options, line in [
        ("a", photos, ["--steps", 2], "none: fewer than 20 pictures; --validate FOLDER measures on others of yours"),
        ("b", many, ["--steps", 9], "2 of 24 pictures, never trained on, and as many that are, at"),
        ("c", many, ["--steps", 100, "--save-every", 100], "2 of 24 pictures, never trained on, and as many that are, at"),
        ("d", many, ["--steps", 100, "--validate", "none"], ""),
    ]:
        options += ["--no-train-text-encoder", "--resolution", 64, "--bs", 1]
        with pytest.MonkeyPatch.context() as patch:
            if options[1] > 2:  # what is kept out is known before the first step
                patch.setattr("lora.Adapter.update_layers", until(iter(range(1)), Adapter.update_layers))
            out, _ = train("--data", data, *options, "--out", tmp_path / name, status=130 if options[1] > 2 else 0)
        assert bool(line) == ("\nvalidation " in out)
        assert f"\nvalidation {line}" in out or not line
    assert measured == [0, 0]
    assert "losses" not in read_record(tmp_path / "a") or not losses(tmp_path / "a")


@pytest.fixture(scope="session")
def ready(many, others, photos, tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Cached latents of the many, with text and without, and of the others."""
    from conftest import run_main

    folder = tmp_path_factory.mktemp("ready")
    for name, data, options in [("text", many, ["--text", 1]), ("plain", many, []), ("others", others, [])]:
        command = [data, "--model", tiny_model, "--device", "cpu", "--workers", 0, "--out", folder / name, *options]
        assert run_main("scripts/cache_latents.py", *command) == 0
    return {path.name: path for path in folder.iterdir()}


def test_ready_latents_and_text_give_what_pictures_give(train, many, others, ready, tmp_path):
    """A share of them, and a folder of pictures beside them. The base is the same; latents and texts are stored in float16."""
    options = ["--steps", 1, "--no-train-text-encoder", "--lr", 0]
    found = {}
    for name, data, validate in [
        ("a", many, 0.2), ("b", ready["plain"], 0.2), ("c", ready["text"], 0.2),
        ("d", many, others), ("e", ready["text"], others), ("f", ready["plain"], ready["others"]),
    ]:  # fmt: skip
        train("--data", data, "--validate", validate, *options, "--out", tmp_path / name)
        record = read_record(tmp_path / name)
        found[name] = record["losses"]["base"]["kept_out"]
        assert len(record["thumbs"]["kept_out"]) in (3, 5)
        assert all(probe["caption"] for probe in record["probes"]["kept_out"])
    captions = [[probe["caption"] for probe in read_record(tmp_path / name)["probes"]["kept_out"]] for name in "abcdef"]
    assert captions[0] == captions[1] == captions[2]
    np.testing.assert_allclose(found["b"], found["a"], rtol=2e-2)
    np.testing.assert_allclose(found["c"], found["b"], rtol=2e-2)
    for name in "ef":
        np.testing.assert_allclose(found[name], found["d"], rtol=2e-2)


def test_pictures_with_masks_of_other_shapes_and_broken_ones(train, cutouts, others, tmp_path):
    """The losses are of what a mask shows; broken pictures are left out, in whatever way they are broken."""
    folder = shutil.copytree(cutouts, tmp_path / "mixed")
    for name, content in {"a0": b"no picture", "z1": encoded(photograph(3, 64, 64))[:300], "z2": b""}.items():
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text(name)
    for name, options in {"masked": ["--masked-loss"], "whole": [], "square": ["--no-buckets"]}.items():
        train("--validate", folder, "--steps", 1, "--lr", 0, "--out", tmp_path / name, "--bucket-step", 32, *options)
    probes = read_record(tmp_path / "masked")["probes"]["kept_out"]
    assert {Path(probe["name"]).stem for probe in probes} <= {f"cutout{i}" for i in range(4)}
    assert probes
    masked, whole, square = (np.array(losses(tmp_path / name)["base"]["kept_out"]) for name in ("masked", "whole", "square"))
    assert masked.shape == whole.shape
    assert not np.isclose(masked, whole, rtol=1e-3).any()
    assert not np.isclose(square, whole, rtol=1e-3).all()


def test_a_run_without_progress_ends_early(train, others, measured, tmp_path):
    options = ["--steps", 30, "--save-every", 20, "--validate-every", 2, "--patience", 2, "--lr", 0, "--validate", others]
    out, _ = train(*options)
    assert {*losses(tmp_path / "out")} == {"base", "2", "4", "6"}
    assert f"wrote {tmp_path}/out/pytorch_lora_weights_6.safetensors\n" in out
    record = read_record(tmp_path / "out")
    assert (record["run"]["state"], record["run"]["step"], {*record["files"]}) == ("finished", 6, {"6"})
    before = os.listdir(tmp_path / "out")
    measured.clear()
    out, _ = train(*options)
    assert "resume     step 6 of" in out
    assert measured == []
    assert sorted(os.listdir(tmp_path / "out")) == sorted(before)
    assert read_record(tmp_path / "out")["losses"] == record["losses"]
    train(*options[:-6], "--lr", 0, "--validate", others, "--steps", 8)  # without patience it goes on
    assert {*losses(tmp_path / "out")} == {"base", "2", "4", "6", "8"}


def test_a_run_that_learns_is_not_ended(train, others, tmp_path, monkeypatch):
    monkeypatch.setattr("run.validation.measurements_since_best", lambda record: 1)
    out, _ = train("--steps", 3, "--save-every", 1, "--patience", 2, "--validate", others)
    assert {*losses(tmp_path / "out")} == {"base", "1", "2", "3"}
    assert f"page       {tmp_path}/out/report.html" in out


def test_how_often_and_at_what_cost(train, others, tmp_path):
    out, _ = train("--steps", 5, "--validate-every", 2, "--validate", others)
    assert {*losses(tmp_path / "out")} == {"base", "2", "4", "5"}
    pairs = sum(len(probe["timesteps"]) for probe in read_record(tmp_path / "out")["probes"]["kept_out"])
    cost = 2 * pairs * 4 / (3 * 5 * 2)  # the base and three measurements; a step is three passes of two pictures
    line = f"validation 3 pictures of {others}, and as many that are, at 3 timesteps, 3 times: about {cost:.1%} of the run\n"
    assert line in out
    record = read_record(tmp_path / "out")
    assert record["lines"]["validation"] == line.removeprefix("validation ").strip()


def test_a_new_run_moves_the_record_of_the_old_one_aside(train, others, tmp_path):
    train("--steps", 1, "--validate", others)
    old = (tmp_path / "out" / RECORD_FILE).read_bytes()
    out, _ = train("--steps", 2, "--resume", "none")
    aside = tmp_path / "out/before-1"
    assert (aside / RECORD_FILE).read_bytes() == old
    assert (aside / "report.html").is_file()
    assert f"aside      this is a new run: what another has left in {tmp_path}/out is in {aside} now" in out
    record = read_record(tmp_path / "out")
    assert not record["losses"]
    assert {*record["files"]} == {"2"}


def test_a_damaged_record_stops_no_run(train, others, tmp_path):
    train("--steps", 1, "--validate", others)
    path = tmp_path / "out" / RECORD_FILE
    for content in (b"", b"[1]", b'{"losses": []}', b"\xff\xfe{}", b"[" * 100_000, b'{"losses": {"base"'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"record\.json"):
            read_record(tmp_path / "out")
    _, err = train("--steps", 2, "--validate", others)
    assert re.match(rf"train_lora.py: {path} cannot be read .*remove it", err)
    assert {*losses(tmp_path / "out")} == {"base", "2"}
    path.write_bytes(b"[1]")
    _, err = train("--steps", 3, "--validate", others)
    assert err.startswith(f"train_lora.py: {path} is no record of a run: remove it\n")
    assert {*losses(tmp_path / "out")} == {"base", "3"}


def test_a_folder_whose_name_is_no_utf8(train, others, tmp_path):
    """Its name is in the command and in the options, which the record keeps."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bilder\xff"))
    shutil.copytree(others, folder)
    train("--data", folder, "--validate", 0.7, "--steps", 1)
    assert read_record(tmp_path / "out")["run"]["step"] == 1


def test_files_of_the_record(train, others, tmp_path):
    """Of --format both the one that most programs read; those that --keep has removed are gone from it."""
    train("--steps", 3, "--save-every", 1, "--keep", 2, "--format", "both", "--validate", others, "--name", "ink")
    record = read_record(tmp_path / "out")
    assert {step: file["name"] for step, file in record["files"].items()} == {
        "2": "ink-000002.safetensors", "3": "ink-000003.safetensors",
    }  # fmt: skip
    assert {*record["losses"]} == {"base", "1", "2", "3"}
    assert verdict_of(record).recommended in (2, 3)
    assert read_metadata(tmp_path / "out/ink-000003.safetensors")["sdxl_lora.step"] == "3"


def test_what_is_forgotten_when_a_run_goes_on():
    kept = {"base": 0, "9": 1, "10": 2}
    record = {name: {**kept, "11": 3} for name in ("losses", "pictures", "files")} | {"run": {"step": 11}}
    forget_after(record, 10)
    assert record == dict.fromkeys(("losses", "pictures", "files"), kept) | {"run": {"step": 11}}


def test_a_record_is_read_as_it_was_written(tmp_path):
    assert read_record(tmp_path) == {}
    record = {"losses": {"base": {"kept_out": [[0.1, 1 / 3]]}}, "text": "naïve 日本 \udcff"}
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert json.loads((tmp_path / RECORD_FILE).read_text()) == record
    small = picture(thumbnail(photograph(1, 640, 320)))
    assert small.size == (160, 80)
