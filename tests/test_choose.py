"""scripts/choose.py: every file of a run at several strengths."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main
from PIL import Image
from safetensors.torch import load_file, save_file
from test_validation import folder_of

from dataset.sources import HELD_OUT, open_source
from evaluation.record import read_record
from lora_files.read import newest_lora, read_metadata


def scaled_copy(path: Path, target: Path, factor: float) -> None:
    """The same LoRA with B multiplied."""
    tensors = {name: t * factor if "lora_up" in name else t for name, t in load_file(path).items()}
    assert any("lora_up" in name for name in tensors)
    save_file(tensors, target, read_metadata(path))


def train_demo(out: Path, *options: object) -> Path:
    """A LoRA of the bundled model, the newest one in `out`."""
    command = ["--workers", 0, "--no-pictures", "--device", "cpu", "--save-dtype", "fp32", "--out", out, *options]
    assert run_main("train_lora.py", *command, "--log-dir", out.parent / "runs") == 0
    return newest_lora(out)


@pytest.fixture(scope="session")
def light_lora(tmp_path_factory) -> Path:
    """One that has begun to learn the demo."""
    options = ["--steps", 16, "--lr", 3e-3, "--bs", 2, "--rank", 4, "--validate", "none"]
    return train_demo(tmp_path_factory.mktemp("light") / "out", *options)


def cells(out: str) -> dict[tuple[int, float], str]:
    """{(step, strength): what the table says of it}."""
    rows = re.findall(r"^step +(\d+) × ([\d.]+) +(.*)$", out, re.MULTILINE)
    return {(int(step), float(strength)): line for step, strength, line in rows}


def chosen_of(out: str) -> tuple[int, float]:
    """The one that is marked, and that the end names."""
    (cell,) = [cell for cell, line in cells(out).items() if line.endswith("<- chosen")]
    assert f"\nstep {cell[0]} at strength {cell[1]:g}: " in out
    return cell


def test_a_lora_of_half_the_size_is_taken_at_twice_the_strength(script, light_lora, tmp_path):
    """Of its own choice, among strengths of which each is twice the one before."""
    held_out = open_source(str(HELD_OUT))
    for n in range(5):
        sample = held_out.read_sample(n)
        (tmp_path / f"{n}.jpg").write_bytes(sample.image)
        (tmp_path / f"{n}.txt").write_text(sample.captions[0])
    options = ["--data", tmp_path, "--pictures", 0, "--timesteps", 3, "--device", "cpu", "--strengths"]
    strengths = [0.5, 1, 2, 4, 8]
    whole, half = tmp_path / "whole", tmp_path / "half"
    for folder in (whole, half):
        folder.mkdir()
    shutil.copy(light_lora, whole)
    scaled_copy(light_lora, half / light_lora.name, 0.5)
    found = {folder: script("scripts/choose.py", folder, *options, *strengths)[0] for folder in (whole, half)}
    (step, strength), (other_step, other_strength) = (chosen_of(found[folder]) for folder in (whole, half))
    assert step == other_step == 16
    assert other_strength == 2 * strength
    assert strength in strengths[1:-1]  # neither end: the choice is one
    gains = {cell: int(re.match(r"(-?\d+) %", line)[1]) for cell, line in cells(found[whole]).items()}
    assert len(gains) == len(strengths)
    assert gains[16, strength] == max(gains.values()) > 5
    for cell, line in cells(found[half]).items():
        if cell[1] > strengths[0]:
            assert line.removesuffix("  <- chosen") == cells(found[whole])[16, cell[1] / 2].removesuffix("  <- chosen")


def test_the_run_s_own_pictures_and_the_sheet(train, script, tiny_model, tmp_path):
    """What the run kept out is measured, and found by the options that it was started with."""
    data = folder_of(tmp_path / "data", 24)
    train("--data", data, "--validate", 0.1, "--steps", 2, "--save-every", 1, "--lr", 1e-2, "--trigger", "nrt")
    options = ["--model", tiny_model, "--strengths", 0.5, 1, "--timesteps", 2, "--pictures", 1, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.subject.SAMPLE_STEPS", 2)
        patch.setattr("evaluation.judge.MOST_TEXTS", 3)
        out, _ = script("scripts/choose.py", tmp_path / "out", *options)
    assert "2 files × 2 strengths on 2 pictures that were kept out\n" in out
    assert {*cells(out)} == {(1, 0.5), (1, 1), (2, 0.5), (2, 1)}
    with Image.open(tmp_path / "out/choose.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[0] > 2 * 64
    assert pixels.shape[1] > 2 * 64
    assert pixels.std() > 10
    assert f"look       {tmp_path}/out/choose.png\n" in out
    if "<- chosen" in out:
        assert f"take it    python scripts/choose.py {tmp_path}/out --take {chosen_of(out)[0]}\n" in out
    else:
        assert "every file went too far" in out


def test_taking_a_step(train, script, tmp_path):
    """Of --format both the file that most programs read. The copy does not count as one of the files."""
    train("--steps", 3, "--save-every", 1, "--name", "ink", "--format", "both")
    folder = tmp_path / "out"
    for step in (2, 1):
        out, _ = script("scripts/choose.py", folder, "--take", step)
        assert out == f"{folder}/ink.safetensors is step {step} now\n"
        assert (folder / "ink.safetensors").read_bytes() == (folder / f"ink-{step:06}.safetensors").read_bytes()
    _, err = script("scripts/choose.py", folder, "--take", 7, status=2)
    assert err == f"choose.py: --take 7: there are steps 1, 2, 3 in {folder}\n"
    out, _ = train("--steps", 4, "--name", "ink", "--format", "both")  # the run goes on beside it
    assert "resume     step 3 of" in out
    assert {*read_record(folder)["files"]} == {"1", "2", "3", "4"}


def test_a_folder_without_a_name_is_the_name(train, script, tmp_path):
    train("--steps", 1)
    script("scripts/choose.py", tmp_path / "out", "--take", 1)
    assert (tmp_path / "out/out.safetensors").read_bytes() == (tmp_path / "out/pytorch_lora_weights_1.safetensors").read_bytes()


def test_in_one_line_what_cannot_be_chosen(train, script, photos, tiny_model, tmp_path):
    def refused(message: str, *arguments: object) -> None:
        _, err = script("scripts/choose.py", *arguments, "--device", "cpu", status=2)
        assert err.startswith(f"choose.py: {message}"), err
        assert err.count("\n") == 1

    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    refused(f"{empty}: no LoRA files of train_lora.py there", empty)
    refused(f"{tmp_path}/nowhere: no LoRA files of train_lora.py there", tmp_path / "nowhere")
    refused("--strengths: name one or more different ones", out, "--strengths", 1, 1)
    refused("--strengths must be above 0", out, "--strengths", 0)
    train("--steps", 1, "--validate", "none")
    refused(f"the run of {out} kept no pictures out: name a folder of pictures", out)
    refused(f"{tmp_path}/nothing", out, "--data", tmp_path / "nothing", "--model", tiny_model)
    shutil.rmtree(tmp_path / "runs")
    refused(f"{out} does not say which pictures its run kept out: name a folder of pictures", out)
    (out / "record.json").write_text("{")
    refused(f"{out}/record.json cannot be read", out)
