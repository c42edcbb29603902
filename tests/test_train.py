import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Value
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import ROOT, Forked
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves

import data
from common.errors import UserError
from common.files import TolerantWriter, write_atomically
from common.signals import SIGNALS
from data import Workload
from dataset.images import Decoded
from dataset.latents import pack_latents
from dataset.sources import Source, open_source
from lora import Adapter
from lora_files.deltas import layer_shapes
from lora_files.read import newest_lora, read_lora, read_metadata
from lora_files.write import largest_difference, serialise
from memory import plan_memory
from model.load import read_sdxl
from model.prompts import NEUTRAL_PROMPTS
from model.sdxl import Denoiser
from model.vae import sample_latents
from options.optimiser import OptimiserConfig
from options.training import LoRAConfig, MemoryConfig, TrainConfig
from performance.cuda_graph import GraphedStep
from run.checkpoints import Run
from run.log import TAGS, TensorBoardLog
from run.report import Meter
from run.schedule import lr_factor
from run.state import find_state, find_states, save_state
from run.stop import StopRequest

CPU = torch.device("cpu")
LATENTS_ONLY = Workload(batch=3, resolution=64, chunks=1, shapes=1, has_latents=True, has_text=False)


def weights(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"pytorch_lora_weights_{step}.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def last(folder, measured: str) -> float:
    """The newest value of what is measured in the TensorBoard log below `folder`."""
    (events,) = folder.iterdir()
    return EventAccumulator(str(events)).Reload().Scalars(TAGS[measured])[-1].value


def visible(folder: Path) -> list[str]:
    """Names in a folder but for the run's lock, and the page with its record."""
    return sorted(name for name in os.listdir(folder) if name not in (".lock", "record.json", "report.html"))


def test_a_run_writes_weights_metadata_and_logs(train, tiny_model, shards, tmp_path):
    out, err = train("--steps", 7, "--save-every", 3, "--keep", 2, "--pictures")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == ["pytorch_lora_weights_6.safetensors", "pytorch_lora_weights_7.safetensors"]
    predicted = float(re.search(r"weights_7\.safetensors, ([\d.]+) MB", out)[1])
    assert abs(os.path.getsize(tmp_path / "out" / files[1]) / 1e6 - predicted) < 0.02
    tensors = weights(tmp_path / "out", 7)
    trained = sum(t.numel() for key, t in tensors.items() if key.endswith("weight"))
    assert f"rank 2 on {len(tensors) // 3} layers, {trained:,} parameters trained" in out
    assert "7 images with a caption" in out
    assert "steps      7: each image 2 times, on average; all of them once is 3.5 steps\n" in out
    assert "device     cpu, fp32, sdpa attention, every kernel launched" in out
    assert re.search(
        r"memory     [\d.]+ GiB for tensors: 0 of \d\d parts checkpointed, fp32 base, batch in one piece; predicted", out
    )
    assert re.search(r"memory     measured peak [\d.]+ GiB", out + err)
    assert "7/7" not in err  # stderr is no terminal

    header = read_metadata(tmp_path / "out" / files[1])
    assert header["sdxl_lora.dataset"] == open_source(str(shards)).fingerprint
    config = json.loads(header["sdxl_lora.config"])
    resolved = {"rank": 2, "alpha": 2, "resolution": 64, "lr": 1e-4, "precision": "fp32"}
    expected = {**resolved, "attention": "sdpa", "steps": 7, "model": tiny_model.name}
    assert {name: config[name] for name in expected} == expected
    assert config["text_encoder_lr"] == [pytest.approx(2e-5)]
    (events,) = (tmp_path / "runs").iterdir()
    log = EventAccumulator(str(events)).Reload()
    later = {tag for tag in TAGS.values() if tag.startswith("validation/") or tag == "end/improvement"}
    later.add(TAGS["waiting_for_ranks"])
    assert set(log.Tags()["scalars"]) == set(TAGS.values()) - later
    assert [event.step for event in log.Images("samples/p1")] == [0, 3, 6, 7]
    samples = [f"step-00000{step}{name}.png" for step in (3, 6, 7) for name in ("", "-p1-base", "-p1-lora")]
    assert visible(tmp_path / "out/samples") == sorted([*samples, "step-000000.png", "step-000000-p1-base.png"])
    assert json.loads(header["sdxl_lora.prompts"]) == [{"text": "one picture a save is enough"}]
    assert {"config/text_summary", "prompts/text_summary"} <= set(log.Tags()["tensors"])


def test_training_on_shards_lowers_the_held_out_loss(train, script, tmp_path):
    """The bundled model and data: 48 pictures in shards for training, 16 others for the loss."""
    train("--model", "demo", "--data", "demo", "--steps", 25, "--bs", 3, "--rank", 8)
    out, _ = script("scripts/evaluate.py", "--lora", tmp_path / "out", "--timesteps", 4, "--pictures", 2, "--device", "cpu")
    base, tuned = map(float, re.search(r"base ([\d.]+)   LoRA ([\d.]+)", out).groups())
    assert tuned < 0.9 * base
    assert re.search(r"colours  base 0\.\d+   LoRA 0\.\d+", out)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("adamw8bit", "fp16"), ("adamw", "bf16"), ("adafactor", "fp32"), ("prodigy", "bf16"), ("schedulefree", "fp16"),
    ],
)  # fmt: skip
def test_a_run_resumed_twice_equals_an_uninterrupted_one(train, tmp_path, optimizer, precision):
    """Bit for bit: weights, optimiser state, loss scale, data position, flips, dropout, noise."""
    options = ["--grad-accum", 2, "--flip", "--caption-dropout", 0.3, "--warmup", 2, "--optimizer", optimizer, "--workers", 2]
    options += ["--precision", precision, "--lr", 1e-2]
    train("--steps", 6, *options)
    train("--steps", 2, *options, "--out", tmp_path / "parts")
    train("--steps", 4, *options, "--out", tmp_path / "parts", "--workers", 1)
    out, _ = train("--steps", 6, *options, "--out", tmp_path / "parts")
    assert "resume     step 4 of" in out
    assert equal(weights(tmp_path / "parts", 6), weights(tmp_path / "out", 6))
    assert not equal(weights(tmp_path / "parts", 4), weights(tmp_path / "out", 6))
    uninterrupted, resumed = (find_state("auto", tmp_path / name)[1] for name in ("out", "parts"))
    assert torch.equal(uninterrupted["lora"], resumed["lora"])
    assert uninterrupted["scaler"] == resumed["scaler"]
    assert uninterrupted["run"]["samples"] == resumed["run"]["samples"] == 24
    for expected, actual in zip(*(tree_leaves(state["optimizer"]) for state in (uninterrupted, resumed)), strict=True):
        assert torch.equal(expected, actual) if isinstance(expected, torch.Tensor) else expected == actual
    out, _ = train("--steps", 6, *options, "--out", tmp_path / "parts")
    assert "is at step 6 already" in out


def test_both_layouts_hold_the_same_weights(train, tiny_model, tmp_path):
    out, _ = train("--steps", 5, "--save-every", 2, "--keep", 2, "--format", "both", "--save-dtype", "fp32", "--lr", 1e-2)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    expected = [f"pytorch_lora_weights_{step}{suffix}.safetensors" for step in (4, 5) for suffix in ("", "_diffusers")]
    assert names == sorted(expected)
    assert newest_lora(tmp_path / "out").name == expected[2]  # what other programs read, for share.py and the last lines
    assert f"infer.py --lora {tmp_path}/out/{expected[2]} --compare" in out
    shapes = layer_shapes(Denoiser(read_sdxl(str(tiny_model), torch.float32)))
    kohya, diffusers = (read_lora(tmp_path / "out" / name, shapes) for name in expected[2:])
    assert largest_difference(kohya, diffusers) == 0
    assert any(B.any() for _, B, _ in kohya.values())
    assert last(tmp_path / "runs", "largest_error_of_the_file") == 0  # float32 loses nothing


def test_a_file_that_reads_back_wrong_is_not_kept(train, tmp_path, monkeypatch):
    train("--steps", 1)
    before = (tmp_path / "out/pytorch_lora_weights_1.safetensors").read_bytes()

    def serialise_wrong(deltas, *rest):
        return serialise({p: (A, B + 0.01, alpha) for p, (A, B, alpha) in deltas.items()}, *rest)

    monkeypatch.setattr("run.checkpoints.serialise", serialise_wrong)
    _, err = train("--steps", 2, status=2)
    assert "the LoRA file read back differs from the weights by 0.01, so the last one was kept" in err
    assert (tmp_path / "out/pytorch_lora_weights_1.safetensors").read_bytes() == before
    assert len(visible(tmp_path / "out")) == 2


def test_changed_options_are_shown_on_resume_and_refused_unless_overridden(train, shards, photos, tmp_path):
    train("--steps", 1)
    (state,) = (tmp_path / "out").glob("state-*")
    _, err = train("--steps", 2, "--rank", 4, "--lr", 1e-3, "--resume-override", status=2)
    assert f"{state} does not fit: --rank 2 -> 4, --alpha 2.0 -> 4.0: change it back, or another --out" in err
    _, err = train("--steps", 2, "--optimizer", "adamw", "--alpha", 1, status=2)
    assert "--alpha 2.0 -> 1.0, --optimizer adamw8bit -> adamw" in err
    _, err = train("--steps", 2, "--lr", 2e-4, "--precision", "fp16", status=2)
    changes = r"--precision fp32 -> fp16, --base-precision fp32 -> fp16, --lr 0.0001 -> 0.0002, "
    changes += r"--text-encoder-lr \(2e-05,\) -> \(4e-05,\)"
    assert re.search(rf"is of another run: {changes}: change it back, or --resume-override to go on", err)
    copy = shutil.copytree(shards, tmp_path / "elsewhere")
    out, _ = train("--steps", 2, "--keep", 1, "--data", copy)
    assert f"resume     step 1 of {state}; --keep None -> 1; --steps 1 -> 2\n" in out
    out, _ = train("--steps", 4, "--keep", 1, "--lr", 1e-2, "--precision", "fp16", "--resume-override", "--save-dtype", "fp32")
    assert "step 2 of" in out  # with a new loss scaler for fp16
    assert last(tmp_path / "runs", "lr/unet") == pytest.approx(1e-2)
    train("--steps", 2, "--rank", 4, "--resume", "none")


def test_a_new_run_moves_the_files_of_another_name_aside_and_leaves_what_is_not_of_a_run(train, tmp_path):
    options = ["--save-every", 1, "--no-pictures"]
    train("--steps", 2, "--name", "first", *options)
    (tmp_path / "out/base.safetensors").write_bytes(b"of another tool")
    train("--steps", 1, "--name", "second", "--resume", "none", *options)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["base.safetensors", "second-000001.safetensors"]
    assert len(list((out / "before-1").glob("first-*.safetensors"))) == 2


def test_the_same_command_on_mended_data_is_a_new_run_once_the_old_one_is_done(train, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "photos")
    command = ["--data", data, "--save-every", 1]
    train(*command, "--steps", 2)
    first = weights(tmp_path / "out", 2)
    for text in data.glob("*.txt"):
        text.write_text(f"a mended {text.stem}")
    out, _ = train(*command, "--steps", 2)
    aside = tmp_path / "out/before-1"
    assert f"aside      this is a new run: what another has left in {tmp_path}/out is in {aside} now" in out
    assert equal(weights(aside, 2), first)
    assert not equal(weights(tmp_path / "out", 2), first)
    out, _ = train(*command, "--steps", 2)
    assert "is at step 2 already" in out  # the same data: nothing to do
    out, _ = train(*command, "--steps", 2, "--lr", 1e-3)
    assert "this is a new run" in out
    _, err = train(*command, "--steps", 3, "--lr", 1e-2, status=2)  # longer, so it means to go on
    assert "is of another run: --lr" in err
    (data / "photo2.txt").write_text("another")
    out, _ = train(*command, "--steps", 3, "--lr", 1e-3, "--resume-override")
    assert "resume     step 2 of" in out


def test_the_length_of_a_run_in_epochs(train, photos, tmp_path):
    out, _ = train("--data", photos, "--epochs", 2, "--save-every", "1epoch", "--bs", 2, "--grad-accum", 2)  # 7 pictures
    assert "steps      4: each image 2.29 times" in out
    assert [p.name for p in sorted((tmp_path / "out").glob("*.safetensors"))] == [
        f"pytorch_lora_weights_{step}.safetensors" for step in (2, 4)
    ]


RATES = "the learning rate of the unet goes from {} to {}"


@pytest.mark.parametrize(
    ("before", "after", "jump"),
    [
        (["--steps", 2, "--lr-schedule", "cosine"], ["--steps", 8], RATES.format("5.0e-05", "8.5e-05")),
        (["--steps", 2, "--lr-schedule", "linear", "--warmup", 1], ["--steps", 4], RATES.format("1.0e-04", "6.7e-05")),
        (["--steps", 2, "--warmup", 2], ["--warmup", 4, "--steps", 4], RATES.format("6.7e-05", "6.0e-05")),
        (["--steps", 2, "--lr", 1e-3], ["--lr", 1e-3, "--text-encoder-lr", 0, "--steps", 4],
         "the learning rate of the text encoder goes from 2.0e-04 to 0.0e+00"),
        (["--steps", 2], ["--steps", 4], None),
        (["--steps", 2, "--warmup", 2], ["--steps", 9], None),
    ],
)  # fmt: skip
def test_a_learning_rate_that_jumps_is_shown(train, tmp_path, before, after, jump):
    train(*before)
    kept = [] if "--warmup" in after else [option for option in before[2:] if "--lr" not in after]
    out, _ = train(*kept, *after, "--resume-override")
    (line,) = [line for line in out.splitlines() if line.startswith("resume")]
    assert (f"; {jump}" in line) if jump else ("learning rate" not in line)


def test_a_second_run_in_the_same_folder_is_refused(train, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    hold = "import sys, time; from pathlib import Path; from common.files import lock_folder as l"
    hold += "; lock = l('--out', Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", hold, out], cwd=ROOT, stdout=subprocess.PIPE)
    first.stdout.readline()
    _, err = train("--steps", 1, status=2)
    assert err.splitlines()[-1].startswith(f"train_lora.py: --out {out}: another run is writing there")
    assert os.listdir(out) == [".lock"]
    first.kill()
    first.wait()
    train("--steps", 1)


def test_resuming_into_another_folder_leaves_the_first_run_alone(train, tmp_path, monkeypatch):
    train("--steps", 2, "--save-every", 1)
    train("--steps", 4, "--save-every", 1, "--keep", 1, "--resume", tmp_path / "out", "--out", tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").glob("*.safetensors")) == ["pytorch_lora_weights_4.safetensors"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    options = ["--resume", tmp_path / "out", "--out", tmp_path / "b", "--log-dir", tmp_path / "log"]
    out, _ = train("--steps", 5, *options)
    assert f"resume     step 4 of {tmp_path}/b/state-" in out  # the same command resumes its own state
    assert last(tmp_path / "log", "loss") > 0
    out, _ = train("--steps", 3, "--resume", "none", "--out", tmp_path / "b")
    assert f"aside      this is a new run: what another has left in {tmp_path}/b is in {tmp_path}/b/before-1 now\n" in out
    moved = {p.name for p in (tmp_path / "b/before-1").iterdir()}
    assert {"pytorch_lora_weights_4.safetensors", "pytorch_lora_weights_5.safetensors"} < moved
    assert find_states(tmp_path / "b/before-1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    out, _ = train("--steps", 1, "--resume", "none")  # restarted by Slurm before it had saved anything
    assert "/before-1 now\n" in out
    out, _ = train("--steps", 2, "--resume", "none")
    assert "resume     step 1 of" in out
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    save_state(tmp_path / "foreign", {"a": 1}, {})
    _, err = train("--resume", tmp_path / "foreign", status=2)
    assert "no state of train_lora.py" in err


def test_weights_that_are_not_finite_are_never_written(train, tmp_path):
    _, err = train("--steps", 3, "--lr", 1e30, status=2)
    assert "is not finite in float16, so no file was written" in err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_failed_save_is_tried_again_at_the_next_one(train, tmp_path, monkeypatch):
    def write(path, *rest):
        if "_4." in path.name or "_6." in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        if "_8." in path.name:
            shutil.rmtree(tmp_path / "out")
        write_atomically(path, *rest)

    for module in ("run.state", "run.checkpoints"):
        monkeypatch.setattr(f"{module}.write_atomically", write)
    _, err = train("--steps", 6, "--save-every", 2, status=74)
    assert err.count("No space left on device") == 1
    assert err.endswith("step 6 could not be saved\n")
    out, err = train("--steps", 8, "--save-every", 2)
    assert "resume     step 2 of" in out
    assert err.count("No space left on device") == 1
    assert "weights_8.safetensors" in out
    assert visible(tmp_path / "out") == ["pytorch_lora_weights_8.safetensors", "state-1"]


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("threading.excepthook", threading.excepthook)
    log, attempts = TensorBoardLog(str(tmp_path), 0, TolerantWriter()), []

    def fail(*arguments):
        attempts.append(arguments)
        (tmp_path / "no/file").touch()

    with monkeypatch.context() as broken:
        for method in ("write", "__init__"):
            broken.setattr(f"tensorboard.summary.writer.record_writer.RecordWriter.{method}", fail)
        for step in range(3):
            log.add_scalar("before", step, step)
            log.flush()
    assert len(attempts) <= 2  # a log that failed is not tried again at every call
    monkeypatch.setattr("run.log.AGAIN", 0)
    log.add_scalar("after", 1.0, 3)
    log.close()
    err = capfd.readouterr().err
    assert err.count("could not be written") == 1
    assert "Traceback" not in err
    assert any("after" in EventAccumulator(str(file)).Reload().Tags()["scalars"] for file in tmp_path.iterdir())


@pytest.fixture
def spoilt(monkeypatch):
    """Turns latents above 1000 into NaN within the training step; NaN in a shard would be left out when it is read."""

    def spoil(*arguments):
        latents = sample_latents(*arguments)
        return latents * torch.where(latents.abs().amax(dim=(1, 2, 3), keepdim=True) > 1e3, torch.nan, 1)

    monkeypatch.setattr("run.setup.sample_latents", spoil)


def latents_to_spoil(file: Path, broken: set[int]) -> Path:
    """Writes a shard of three latents; those with a number in `broken` are so large that `spoilt` turns them into NaN."""
    with wds.TarWriter(str(file)) as tar:
        for i in range(3):
            posterior = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(i)).abs()
            posterior *= 1e4 if i in broken else 1
            tar.write(
                {
                    "__key__": f"{i}",
                    "safetensors": pack_latents(Decoded(posterior.numpy(), (64, 64), (0, 0))),
                    "txt": f"picture {i}",
                }
            )
    return file


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw8bit", "fp16"), ("adamw", "fp32")])
def test_a_sample_without_a_finite_loss_is_named_and_left_out(train, spoilt, tmp_path, optimizer, precision):
    options = ["--data", latents_to_spoil(tmp_path / "nan.tar", {1}), "--bs", 1, "--lr", 1e-2, "--save-every", 100]
    options += ["--optimizer", optimizer, "--precision", precision]
    out, err = train(*options, "--steps", 15)
    skipped = [int(step) for step in re.findall(r"step (\d+) had no finite loss .* skipped, by nan\.tar:1: see", err)]
    assert 3 <= len(skipped) <= 4  # one step in three, until step 10
    assert all(step <= 10 for step in skipped)
    assert "skipped 1 images, broken, left out or without a caption: nan.tar:1" in out
    (log,) = (tmp_path / "runs").iterdir()
    (sample,) = json.loads((log / f"nonfinite-{skipped[0]}/rank0.json").read_text())
    assert (sample["sample"], sample["caption"], sample["finite"]) == ("nan.tar:1", "picture 1", False)
    assert 0 <= sample["timestep"] < 1000
    first = sample["modules"]["unet.conv_in"]
    assert first[0] != first[0]  # NaN has reached the U-Net
    assert next(values[0] for name, values in sample["modules"].items() if "text_encoder" in name) > 0  # their text was finite
    state = find_state("auto", tmp_path / "out")[1]
    run, scaler = state["run"], state["scaler"]
    assert precision == "fp32" or scaler["scale"] == 2**16  # not halved: no smaller scale makes this loss finite
    assert (run["hits"], run["left_out"], run["bad_steps"]) == ({"nan.tar:1": len(skipped)}, {"nan.tar:1"}, 0)
    train(*options, "--steps", 7, "--out", tmp_path / "parts")
    train(*options, "--steps", 15, "--out", tmp_path / "parts")
    assert equal(weights(tmp_path / "out", 15), weights(tmp_path / "parts", 15))


def test_steps_without_a_finite_loss_change_nothing_and_end_the_run(train, spoilt, short, tmp_path):
    options = ["--data", latents_to_spoil(tmp_path / "nan.tar", {0, 1, 2}), "--precision", "bf16"]
    train(*options, "--steps", 2)
    assert not any(t.any() for key, t in weights(tmp_path / "out", 2).items() if "lora_up" in key)
    (log,) = (tmp_path / "runs").iterdir()
    short({0, 1, 2})
    out, _ = train(*options, "--steps", 99, "--max-bad-steps", 1, status=71)  # no step was made, so none was bad
    assert "weights_2.safetensors: memory ran out" in out
    short(set())
    _, err = train(*options, "--steps", 99, "--max-bad-steps", 9, status=1)
    assert err.endswith(f"stopped: 10 steps in a row had no finite loss, see {log}/nonfinite-*\n")
    assert visible(tmp_path / "out") == ["pytorch_lora_weights_2.safetensors", "state-1"]
    run = Run("", hits={"a": 3, "b": 3, "c": 2})
    assert not run.leave_out(2)  # that would leave out every sample, so they are not the cause
    assert run.leave_out(3)
    assert run.left_out == {"a", "b"}


def test_unreadable_data_ends_the_run_after_a_save(train, spoilt, tmp_path, monkeypatch):
    """Also after a step without a finite loss, whose samples would be read again to be named."""
    read_sample, count = Source.read_sample, itertools.count()

    def fail(source, n):
        if next(count) > 8:
            raise UserError("--data: the server does not answer")
        return read_sample(source, n)

    monkeypatch.setattr("run.examiner.Examiner.prepare", lambda examiner: None)  # which read during set-up
    monkeypatch.setattr("run.prediction.check_prediction", lambda *_: None)
    with monkeypatch.context() as broken:
        broken.setattr("dataset.sources.Source.read_sample", fail)
        out, err = train("--steps", 9, status=74)
    assert err.endswith("train_lora.py: --data: the server does not answer\n")
    step = int(re.search(r"weights_(\d)\.safetensors: the data cannot be read, the same command goes on from there", out)[1])
    out, _ = train("--steps", step + 1)
    assert f"resume     step {step} of" in out
    monkeypatch.setattr("dataset.sources.Source.read_sample", fail)
    count = itertools.count(5)
    out, _ = train("--data", latents_to_spoil(tmp_path / "nan.tar", {0, 1, 2}), "--out", tmp_path / "b", status=74)
    assert "weights_1.safetensors: the data cannot be read" in out


def test_learning_rates(train, tmp_path):
    configs = {name: OptimiserConfig(lr_schedule=name, warmup=4) for name in ("constant", "cosine", "linear")}
    factor = {name: [lr_factor(step, 24, config) for step in range(24)] for name, config in configs.items()}
    assert all(f[:4] == [0.2, 0.4, 0.6, 0.8] and f[4] == 1 for f in factor.values())
    assert set(factor["constant"][4:]) == {1.0}
    assert factor["linear"][14] == factor["cosine"][14] == pytest.approx(0.5)
    assert factor["linear"][23] == pytest.approx(0.05)
    train("--steps", 2, "--text-encoder-lr", 0, "--lr", 1e-2)
    ups = {key: t.any() for key, t in weights(tmp_path / "out", 2).items() if "lora_up" in key}
    assert {key for key, moved in ups.items() if not moved} == {key for key in ups if "lora_te" in key}


def test_other_options_train(train, tmp_path):
    train("--steps", 2, "--no-train-text-encoder", "--targets", "all", "--checkpointing", "all", "--weighting", "min-snr:5")
    keys = weights(tmp_path / "out", 2).keys()
    assert any("ff_net" in key for key in keys)
    assert not any("lora_te" in key for key in keys)
    train("--steps", 2, "--precision", "bf16", "--resolution", 96, "--targets", r"attn2\.to_[kv]", "--out", tmp_path / "b")
    assert {re.search(r"attn2_to_[kv]", key) is None for key in weights(tmp_path / "b", 2)} == {False}


@pytest.mark.parametrize(("targets", "block"), [("style", 1), ("content", 0)])
def test_one_block_of_the_unet(train, tmp_path, targets, block):
    """B-LoRA's, under kohya's name of it; and the text encoders are taken as they are."""
    train("--steps", 1, "--targets", targets)
    keys = weights(tmp_path / "out", 1).keys()
    layers = {re.fullmatch(rf"lora_unet_output_blocks_{block}_1_.*_(attn[12]_to_(?:q|k|v|out_0))\..*", key)[1] for key in keys}
    assert layers == {f"attn{n}_to_{layer}" for n in (1, 2) for layer in ("q", "k", "v", "out_0")}
    header = read_metadata(tmp_path / "out/pytorch_lora_weights_1.safetensors")
    assert json.loads(header["sdxl_lora.config"])["train_text_encoder"] is False


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_lora_trained_on_a_quantised_base_merges_into_the_original(train, script, tiny_model, tmp_path, base):
    out, _ = train("--steps", 2, "--base-precision", base, "--targets", "all")
    assert f", {base} base, " in out
    config = json.loads(read_metadata(tmp_path / "out/pytorch_lora_weights_2.safetensors")["sdxl_lora.config"])
    assert (config["precision"], config["base_precision"]) == ("fp32", base)
    out, _ = script(
        "infer.py",
        "--lora",
        tmp_path / "out",
        "--model",
        tiny_model,
        "--steps",
        2,
        "--out",
        tmp_path / "images",
        "--prompts",
        "x",
    )
    assert "layers, strength 1" in out


@pytest.fixture
def latents(tmp_path):
    """A shard of three latents."""
    with wds.TarWriter(str(tmp_path / "latents.tar")) as tar:
        for i in range(3):
            posterior = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(i)).abs()
            tar.write(
                {
                    "__key__": f"{i}",
                    "safetensors": pack_latents(Decoded(posterior.numpy(), (64, 64), (0, 0))),
                    "txt": "a picture",
                }
            )
    return tmp_path / "latents.tar"


def test_latents_train_without_the_vae(train, latents, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.AutoencoderKL.encode", None)
    train("--data", latents, "--steps", 2)
    assert weights(tmp_path / "out", 2)
    _, err = train("--data", latents, "--flip", "--out", tmp_path / "b", status=2)
    assert err.startswith("train_lora.py: --flip: these latents were made without mirrored images")
    assert not (tmp_path / "b").exists()


def test_the_masked_loss_from_images_and_from_latents(train, script, tiny_model, cutouts, latents, tmp_path):
    options, results = ["--steps", 2, "--bs", 2, "--bucket-step", 16, "--flip", "--lr", 1e-2], {}

    def run(name: str, data, *more):
        train("--data", data, *options, "--out", tmp_path / name, "--log-dir", tmp_path / name / "runs", *more)
        results[name] = weights(tmp_path / name, 2)

    run("images", cutouts, "--masked-loss")
    cached = ["--model", tiny_model, "--device", "cpu", "--bucket-step", 16, "--flip", "--out", tmp_path / "cached"]
    script("scripts/cache_latents.py", cutouts, *cached, "--masked-loss")
    run("cached", tmp_path / "cached", "--masked-loss")
    assert last(tmp_path / "cached/runs", "loss") == pytest.approx(last(tmp_path / "images/runs", "loss"), rel=1e-3)
    run("ignored", tmp_path / "cached")
    assert not equal(results["cached"], results["ignored"])
    _, err = train("--data", latents, "--masked-loss", "--out", tmp_path / "b", status=2)
    assert err.startswith(
        "train_lora.py: --masked-loss: these latents were made without masks: make them anew with cache_latents.py"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_latents_give_the_loss_curve_of_their_images(train, script, tiny_model, photos, tmp_path, monkeypatch):
    """Up to rounding: latents are stored in float16, which changes the loss by 2e-6 of it.

    Mistakes would show: images shifted by one pixel change it by 3e-4, standard deviations × 0.9 by 6e-4, × 0 by 1e-2.
    """
    bucketed = "--bucket-step", 16, "--flip"
    script(
        "scripts/cache_latents.py", photos, "--model", tiny_model, "--device", "cpu", *bucketed, "--out", tmp_path / "latents"
    )

    def curve(name: str, pictures) -> np.ndarray:
        folders = "--out", tmp_path / name, "--log-dir", tmp_path / name / "runs"
        train("--data", pictures, "--steps", 20, "--lr", 1e-3, *bucketed, *folders)
        (events,) = (tmp_path / name / "runs").iterdir()
        return np.array([scalar.value for scalar in EventAccumulator(str(events)).Reload().Scalars(TAGS["loss"])])

    images, cached = curve("images", photos), curve("cached", tmp_path / "latents")
    assert len(images) == 2
    np.testing.assert_allclose(cached, images, rtol=2e-5)
    fit = data.fit

    def fit_and_shift(*arguments):
        pixels, crop = fit(*arguments)
        return np.roll(pixels, 1, axis=1), crop

    monkeypatch.setattr("data.fit", fit_and_shift)
    assert np.abs(curve("shifted", photos) / images - 1).max() > 1e-4


def test_all_masked_and_nothing_masked(train, photos, tmp_path):
    """Opaque images train bit for bit as without masks; from transparent ones nothing is learnt, and nothing breaks."""
    train("--data", photos, "--steps", 2)
    train("--data", photos, "--steps", 2, "--masked-loss", "--out", tmp_path / "b")
    assert equal(weights(tmp_path / "out", 2), weights(tmp_path / "b", 2))
    Image.new("RGBA", (64, 64), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    (tmp_path / "clear.txt").write_text("nothing to be seen")
    train("--data", tmp_path, "--steps", 2, "--masked-loss", "--lr", 1e-2, "--out", tmp_path / "c")
    ups = [t for key, t in weights(tmp_path / "c", 2).items() if "lora_up" in key]
    assert ups
    assert not any(t.any() for t in ups)


def test_latents_of_another_vae_are_refused(train, script, tiny_model, shards, tmp_path):
    options = ["--device", "cpu", "--model"]
    script("scripts/cache_latents.py", shards, "--out", tmp_path / "ours", *options, tiny_model)
    for precision in ("fp32", "fp16"):  # a VAE that is rounded to fp16 is still the same VAE
        train("--data", tmp_path / "ours", "--steps", 1, "--precision", precision, "--out", tmp_path / precision)
    changed_model = shutil.copytree(tiny_model, tmp_path / "model")
    file = next((changed_model / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({key: 1.1 * t if key.startswith("quant_conv") else t for key, t in tensors.items()}, file)
    script("scripts/cache_latents.py", shards, "--out", tmp_path / "theirs", *options, changed_model)
    _, err = train("--data", tmp_path / "theirs", "--steps", 1, "--out", tmp_path / "b", status=2)
    assert err == f"train_lora.py: --data: these latents were made by another VAE than that of --model {tiny_model}\n"
    assert not (tmp_path / "b").exists()
    _, err = train("--data", tmp_path / "theirs", "--data", tmp_path / "ours", "--out", tmp_path / "b", status=2)
    assert err.endswith("were made by several models: make them anew with scripts/cache_latents.py\n")
    tensors["quant_conv.weight"] *= 1e8
    save_file(tensors, file)
    out, _ = script("scripts/cache_latents.py", shards, "--out", tmp_path / "none", *options, changed_model)
    assert "0 images in 0 shards" in out
    assert out.count("(its latents are not finite in float16)") == 7


def test_buckets_of_several_shapes_and_any_objective_train_and_resume_bit_for_bit(train, tmp_path):
    options = ["--bucket-step", 16, "--flip", "--caption-dropout", 0.2, "--workers", 2]
    options += ["--timesteps", "logit-normal:0,1", "--weighting", "debiased", "--loss", "huber-snr:0.2"]
    options += ["--noise", "pyramid:3,0.5", "--input-perturbation", 0.1]
    out, _ = train(*options, "--steps", 6)
    assert re.search(r"^buckets    [2-5] of 5 buckets, [\d.]+% of the images cropped away, none enlarged$", out, re.M)
    train(*options, "--steps", 3, "--out", tmp_path / "b")
    train(*options, "--steps", 6, "--out", tmp_path / "b")
    assert equal(weights(tmp_path / "out", 6), weights(tmp_path / "b", 6))


def test_long_captions_are_truncated_or_encoded_in_chunks(train, photos, tiny_model, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo0.txt").write_text("a " * 100)
    (folder / "photo1.txt").write_text("a " * 80)
    options = ["--data", folder, "--bs", 1, "--steps", 7, "--no-buckets"]
    out, _ = train(*options)
    assert "28.6% of the captions have more than --max-tokens 75 and were cut, by up to 25 tokens" in out
    out, _ = train(*options, "--max-tokens", 150, "--out", tmp_path / "b")
    assert "of the captions" not in out
    assert not equal(weights(tmp_path / "out", 7), weights(tmp_path / "b", 7))
    pipe, memory = read_sdxl(str(tiny_model), torch.float32), MemoryConfig().resolved(CPU)
    short, long = (plan_memory(pipe, TrainConfig(memory=memory), LATENTS_ONLY._replace(chunks=n), CPU, 2**34) for n in (1, 3))
    assert {k[1] for q, k in long.attention if k[1] != q[1]} == {4 * 77}  # the plan is for what 225 tokens may need
    assert long.predicted > short.predicted


def test_waiting_for_data_is_reported_with_advice(train, tmp_path, monkeypatch):
    meter = Meter(torch.device("cpu"), ["unet"], 10)
    for shares, reported in (([], False), ([0.9], False), ([0.9, 0.04, 0.05], False), ([0.0, 0.05, 0.06], True)):
        meter.shares = shares
        assert bool(meter.advice(has_latents=False)) == reported  # the first reading includes the start of the workers
    choose = data.choose_caption
    monkeypatch.setattr("data.choose_caption", lambda *arguments: time.sleep(0.05) or choose(*arguments))
    out, err = train("--steps", 12, "--save-every", 12)
    assert "warning" not in err
    assert re.search(r"^waiting for data took [1-9]\d% of the time: more --workers, or latents", out, re.M)
    assert last(tmp_path / "runs", "waiting_for_data") > 0.1


def test_a_batch_in_pieces_gives_the_same_run(train, latents, tiny_model, tmp_path):
    """A budget one byte too small for the whole batch: one image at a time, and the same weights up to rounding."""
    memory = MemoryConfig(checkpointing="none", optimizer="adamw").resolved(CPU)
    pipe = read_sdxl(str(tiny_model), torch.float32)
    whole = plan_memory(pipe, TrainConfig(lora=LoRAConfig(rank=2), memory=memory), LATENTS_ONLY._replace(batch=2), CPU, 2**34)
    options = ["--data", latents, "--steps", 2, "--checkpointing", "none", "--optimizer", "adamw"]
    budget = f"{(whole.predicted - 1) / 2**30:.12f}"
    out, _ = train(*options, "--log-dir", tmp_path / "whole")
    assert "batch in one piece" in out
    out, _ = train(*options, "--vram-gb", budget, "--out", tmp_path / "b", "--log-dir", tmp_path / "pieces")
    assert "batch in 2 pieces" in out
    train(*options, "--bs", 1, "--grad-accum", 2, "--out", tmp_path / "c", "--log-dir", tmp_path / "accumulated")
    for scalar in ("loss", "grad_norm"):
        expected_scalar = last(tmp_path / "whole", scalar)
        assert last(tmp_path / "pieces", scalar) == pytest.approx(expected_scalar, rel=1e-4)
        assert last(tmp_path / "accumulated", scalar) == pytest.approx(expected_scalar, rel=0.7)  # with other noise
    expected, actual = weights(tmp_path / "out", 2), weights(tmp_path / "b", 2)
    assert any(t.any() for key, t in expected.items() if "lora_up" in key)
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, atol=1e-4, rtol=1e-2)


@pytest.fixture
def short(monkeypatch):
    """short({2, 5}) makes memory run out at the end of these backward passes (from 0), which have added to the gradient."""
    spoil = Adapter.spoil_unless_finite

    def call(passes: set[int]) -> None:
        count = itertools.count()

        def fail(adapter, loss):
            if next(count) in passes:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has")
            spoil(adapter, loss)

        monkeypatch.setattr("lora.Adapter.spoil_unless_finite", fail)

    return call


def test_a_step_that_runs_out_of_memory_is_repeated_in_halves(train, tmp_path, short):
    """A failed attempt leaves nothing in the gradient: bit for bit with one image at once, else up to rounding."""
    options = ["--steps", 3, "--grad-accum", 2, "--optimizer", "adamw", "--save-dtype", "fp32"]
    for precision, bs in (("bf16", 1), ("fp32", 2)):
        undisturbed, disturbed = tmp_path / f"whole{bs}", tmp_path / f"short{bs}"
        case = [*options, "--precision", precision, "--bs", bs]
        short(set())
        train(*case, "--out", undisturbed / "out", "--log-dir", undisturbed / "runs")
        short({3, 5})  # step 1: its second batch; when repeated, the second piece, with bs 1 the second batch
        _, err = train(*case, "--out", disturbed / "out", "--log-dir", disturbed / "runs")
        assert err.count("out of memory, ") == err.count("from here on in pieces of 1\n") == 2
        assert f"in step 2, {bs} images of 64 × 64 at once (CUDA out of memory. Tried to allocate 2.00 MiB); the plan" in err
        assert bs > 1 or equal(weights(disturbed / "out", 3), weights(undisturbed / "out", 3))
        for scalar in ("loss", "grad_norm"):
            assert last(disturbed / "runs", scalar) == pytest.approx(last(undisturbed / "runs", scalar), rel=1e-3)


def test_if_memory_runs_out_again_the_last_complete_step_is_saved(train, tmp_path, short):
    options = ["--steps", 4, "--optimizer", "adamw"]
    short({2, 3, 4})
    out, err = train(*options, status=71)
    assert "what helps: less as --vram-gb, which plans for it, or --checkpointing all, half of --bs" in err
    assert err.count("tried twice in halves: the run ends\n") == 1
    assert "weights_2.safetensors: memory ran out, the same command goes on from there" in out
    train(*options)
    train(*options, "--out", tmp_path / "whole")
    assert equal(weights(tmp_path / "out", 4), weights(tmp_path / "whole", 4))
    short({0, 1, 2})
    out, _ = train(*options, "--out", tmp_path / "none", status=71)
    assert "wrote" not in out
    assert not visible(tmp_path / "none")


def test_pictures_that_run_out_of_memory_end_the_run_after_its_save(train, tmp_path, monkeypatch):
    scaled = Adapter.scaled

    def run_out(adapter, strength):
        if strength:  # not at step 0, where the base alone is drawn
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has")
        return scaled(adapter, strength)

    monkeypatch.setattr("lora.Adapter.scaled", run_out)
    _, err = train("--steps", 4, "--save-every", 2, "--pictures", status=71)
    assert "train_lora.py: out of memory, drawing pictures after step 2; the plan predicted a peak of" in err
    assert find_state("auto", tmp_path / "out")[1]["run"]["step"] == 2


def test_pictures_change_no_bit_of_what_is_trained(train, tmp_path, monkeypatch):
    """Other than the saves; of several prompts, with a LoRA that is scaled meanwhile, and with a disk that is full."""
    options = ["--steps", 4, "--save-every", 3, "--caption-dropout", 0.3, "--flip"]
    lines = "a --am 0.5 --w 96\n# b\nc --s 1 --n d --d 9\n"
    (tmp_path / "prompts.txt").write_text(lines)
    drawing = ["--pictures", "--prompts", tmp_path / "prompts.txt", "--sample-every", 2]
    train(*options, *drawing)
    sheets = [f"step-00000{step}.png" for step in (0, 2, 4)]
    assert [name for name in visible(tmp_path / "out/samples") if "-p" not in name] == sheets
    train(*options, "--out", tmp_path / "plain")
    assert not (tmp_path / "plain/samples").exists()
    assert equal(weights(tmp_path / "out", 4), weights(tmp_path / "plain", 4))
    with monkeypatch.context() as patch:
        patch.setattr("run.gallery.write_atomically", Mock(side_effect=OSError(28, "No space left on device")))
        _, err = train(*options, *drawing, "--out", tmp_path / "full")
    assert err.count("the pictures could not be written ([Errno 28] No space left on device): training goes on") == 1
    assert equal(weights(tmp_path / "full", 4), weights(tmp_path / "plain", 4))
    train(*options, *drawing, "--steps", 2, "--out", tmp_path / "out", "--resume", "none")
    assert visible(tmp_path / "out/before-1/samples")
    assert visible(tmp_path / "out/samples")[-1] == "step-000002.png"


def test_fp16_with_a_grad_scaler(train, tmp_path):
    """The recipe's precision, on the CPU: the scaler's first steps may overflow, LoRA weights stay float32 and finite."""
    train("--steps", 3, "--precision", "fp16")
    state = find_state("auto", tmp_path / "out")[1]
    assert state["lora"].dtype == torch.float32
    assert state["lora"].isfinite().all()
    assert state["scaler"]["scale"] > 0


def test_broken_images_are_reported_at_the_end(train, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "photo0.jpg").write_bytes(b"no picture")
    (folder / "photo1.txt").unlink()
    out, _ = train("--data", folder, "--steps", 4)
    assert re.search(r"skipped 2 images, .*photo0\.jpg, .*photo1\.jpg$", out, re.MULTILINE)


def test_a_signal_saves_and_the_same_command_resumes(train, tiny_model, shards, tmp_path):
    """Three signals to all processes, as a closed terminal and Slurm send them. The resumed run equals an uninterrupted one."""
    options = ["--bs", 1, "--workers", 2, "--caption-dropout", 0.3]
    folders = ["--out", tmp_path / "out", "--log-dir", tmp_path / "runs", "--no-pictures"]
    command = ["--model", tiny_model, "--data", shards, "--rank", 2, *options, "--steps", 5000, *folders]
    output = tmp_path / "output"
    process = Forked("train_lora.py", *command, output=output)
    while not (output.exists() and "two steps done" in output.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)
    process.wait(120)
    out = output.read_text()
    assert process.poll() == 75, out
    assert "Traceback" not in out
    step = int(re.search(r"weights_(\d+)\.safetensors: stopped by a signal, the same", out)[1])
    assert 2 <= step < 5000
    out, _ = train("--steps", step + 2, *options)
    assert f"step {step} of" in out
    train("--steps", step + 2, *options, "--out", tmp_path / "whole", "--workers", 0)
    assert equal(weights(tmp_path / "out", step + 2), weights(tmp_path / "whole", step + 2))


@pytest.mark.parametrize(
    ("workers", "stalled", "message"),
    [
        (0, 0, "before a step was made: nothing"),
        (0, 4, "weights_2.safetensors: stopped"),
        (1, 4, "weights_2.safetensors: stopped"),
    ],
)
def test_a_signal_ends_the_wait_for_data(train, tmp_path, monkeypatch, workers, stalled, message):
    """Image number `stalled` takes a minute, and a signal comes meanwhile: the steps before it are saved, if there are any."""
    choose, count, options = data.choose_caption, itertools.count(), ["--steps", 4, "--workers", workers]
    refresh, pid, steps, start = Adapter.update_layers, os.getpid(), Value("q", 0), time.monotonic()

    def end_step(adapter):
        refresh(adapter)
        steps.value += 1

    def stall(*arguments):
        if next(count) == stalled:
            while steps.value < stalled // 2:  # a worker is ahead of the training loop
                time.sleep(0.01)
            os.kill(pid, signal.SIGTERM)
            time.sleep(60)
        return choose(*arguments)

    monkeypatch.setattr("lora.Adapter.update_layers", end_step)
    monkeypatch.setattr("run.examiner.Examiner.prepare", lambda examiner: None)  # they read, too: see the next test
    monkeypatch.setattr("run.prediction.check_prediction", lambda *_: None)
    monkeypatch.setattr("data.choose_caption", stall)
    assert message in train(*options, status=75)[0]
    assert time.monotonic() - start < 40
    monkeypatch.setattr("data.choose_caption", choose)
    train(*options)
    train(*options, "--workers", 0, "--out", tmp_path / "whole")
    assert equal(weights(tmp_path / "out", 4), weights(tmp_path / "whole", 4))


@pytest.mark.parametrize(
    "place", ["run.examiner.picture_of", "run.validation.make_probes", "run.prediction.measure_prediction"]
)
def test_a_signal_ends_the_wait_for_pictures_to_measure_on(train, photos, monkeypatch, place):
    def stall(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    start = time.monotonic()
    monkeypatch.setattr(place, stall)
    assert "before a step was made: nothing" in train("--steps", 2, "--validate", photos, status=75)[0]
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("seconds", [1.5, 3])
def test_ctrl_c_while_modules_are_imported_prints_nothing(tmp_path, seconds):
    command = [
        sys.executable,
        "train_lora.py",
        "--steps",
        "9999",
        "--out",
        str(tmp_path / "o"),
        "--log-dir",
        str(tmp_path / "r"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130, 75)
    assert "Traceback" not in output


def test_a_second_ctrl_c_ends_at_once():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        stop = StopRequest()
        stop.end_setup()
        assert stop.wait(int) == 0
        with pytest.raises(ZeroDivisionError):
            stop.wait(lambda: 1 / 0)
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm may signal a job twice
        assert signal.getsignal(signal.SIGTERM) == stop.on_signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        StopRequest()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as under nohup
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_signal_before_the_first_step_ends_the_run(train, monkeypatch):
    monkeypatch.setattr("model.load.read_sdxl", lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1) or time.sleep(60))
    out, err = train("--steps", 2, status=75)
    assert (out, err) == ("stopped by a signal before a step was made: nothing to save\n", "")


def test_output_to_a_full_disk_does_not_end_the_run(train, tmp_path, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115 (closing it fails, too)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, full)
    assert train("--steps", 2) == ("", "")
    assert weights(tmp_path / "out", 2)
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False)])
def test_a_slurm_job_is_requeued_if_a_signal_stopped_it(tmp_path, status, requeued):
    """With stand-ins for Slurm's commands and for python."""
    stand_ins = {
        "srun": 'shift; SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=2 "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; echo host1; echo host2',
        "python": f'echo "$@ $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT"; exit {status}',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[1-2]", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = [ROOT / "scripts/train.slurm", "--steps", "9"]
    completed = subprocess.run(["bash", *script], env=job, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode == status, completed.stderr
    assert completed.stdout.startswith("train_lora.py --steps 9 1 1 2 host1 20007\n")
    assert ("requeue 7" in (tmp_path / "scontrol").read_text()) == requeued


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("fp16", []),
        ("nf4", []),
        ("fp16", ["--conv-rank", 2, "--rank-dropout", 0.2]),
        ("nf4", ["--dora", "--trigger", "nrt", "--prior-share", 0.5]),
        ("fp16", ["--optimizer", "adafactor", "--text-encoder-until", 0.5, "--ema", 0.9]),
        ("fp16", ["--optimizer", "lion8bit", "--text-encoder-lr", 1e-5, 0]),
        ("fp16", ["--optimizer", "schedulefree"]),
        ("fp16", ["--trigger", "nrt", "--prior-data", "{latents}", "--prior-weight", 2]),
    ],
)
def test_a_run_on_a_gpu_is_the_same_with_and_without_a_graph(train, latents, tmp_path, base, more):
    """Pictures at every save release the graph's memory and move the VAE to the GPU and back."""
    options = ["--device", "cuda", "--data", latents, "--steps", 7, "--save-every", 3, "--base-precision", base, "--workers", 2]
    options += ["--pictures", *(str(one).format(latents=latents) for one in more)]
    out, _ = train(*options, "--cuda-graph", "on", "--log-dir", tmp_path / "graph")
    assert "CUDA graph" in out
    train(*options, "--cuda-graph", "off", "--out", tmp_path / "eager", "--log-dir", tmp_path / "launched")
    assert last(tmp_path / "graph", "loss") == pytest.approx(last(tmp_path / "launched", "loss"), rel=1e-2)
    ups = [[t.float().flatten() for key, t in weights(tmp_path / f, 7).items() if "lora_up" in key] for f in ("out", "eager")]
    # lora_up starts at zero: all of it was learnt. Atomic sums differ from run to run; with another seed the cosine is 0.
    assert torch.cosine_similarity(torch.cat(ups[0]), torch.cat(ups[1]), 0) > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", ["off", "on"])
def test_a_gpu_that_fills_up_computes_its_steps_in_halves(train, tmp_path, monkeypatch, cuda_graph):
    """From the third step on, a whole batch allocates as much as the card has, after its backward pass; half a batch does not.

    With CUDA graphs this is in the middle of a capture: the graph is released first, so that the whole batch is captured anew.
    """
    options = ["--device", "cuda", "--bs", 4, "--steps", 4, "--cuda-graph", cuda_graph, "--optimizer", "adamw"]
    train(*options, "--out", tmp_path / "whole", "--log-dir", tmp_path / "undisturbed")
    step, spoil, count, samples = GraphedStep.__call__, Adapter.spoil_unless_finite, itertools.count(), []

    def call_step(self, inputs):
        samples.append(len(inputs.images))
        if next(count) >= 2 and samples[-1] == 4:
            self.release()
        return step(self, inputs)

    def spoil_without_memory(adapter, loss):
        if len(samples) > 2 and samples[-1] == 4 and torch.cuda.is_current_stream_capturing() == (cuda_graph == "on"):
            torch.empty(torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
        spoil(adapter, loss)

    monkeypatch.setattr("performance.cuda_graph.GraphedStep.__call__", call_step)
    monkeypatch.setattr("lora.Adapter.spoil_unless_finite", spoil_without_memory)
    _, err = train(*options)
    assert err.count("CUDA out of memory. Tried to allocate") == 1
    assert "from here on in pieces of 2\n" in err
    assert samples == [4, 4, 4, 2, 2, 2, 2]
    assert last(tmp_path / "runs", "loss") == pytest.approx(last(tmp_path / "undisturbed", "loss"), rel=1e-2)


# A user's mistakes: one line, status 2, nothing written.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere"], "--model /nowhere: no such file or folder"),
        (["--model", "tests"], "--model tests is no diffusers folder"),
        (["--model", "sdxl"], "hf download stabilityai/stable-diffusion-xl-base-1.0"),
        (["--data", "/nowhere"], "train_lora.py: /nowhere does not exist"),
        (["--data", "scripts"], "no image with a caption"),
        (["--rank", 0], "--rank must be at least 1"),
        (["--bs", 0], "--bs must be at least 1"),
        (["--steps", 0], "--steps must be at least 1"),
        (["--seed", -1], "--seed must lie in 0…9223372036854775807, not -1"),
        (["--lr", -1e-4], "--lr must be at least 0, not -0.0001"),
        (["--text-encoder-lr", "nan"], "--text-encoder-lr must be at least 0, not nan"),
        (["--text-encoder-lr", 1e-5, "--no-train-text-encoder"], "--text-encoder-lr does nothing with --no-train-text-encoder"),
        (["--text-encoder-lr", 1e-5, "--targets", "style"], "--text-encoder-lr does nothing with --targets style"),
        (["--warmup", 9, "--steps", 8], "--warmup 9 is longer than --steps 8"),
        (["--pictures", "--prompts", "/nowhere/prompts.txt"], "--prompts /nowhere/prompts.txt: no such file"),
        (["--targets", "no_such_layer"], "--targets 'no_such_layer' matches none"),
        (["--out", "README.md/x"], "--out README.md/x cannot be written"),
        (["--log-dir", "README.md/x"], "--log-dir README.md/x cannot be written"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--resume", "/nowhere"], "--resume /nowhere: no state that can be used"),
        (["--vram-gb", 0.001], "--vram-gb, or what is free, leaves 0.0 GiB for tensors: the smallest plan ("),
        (["--cuda-graph", "on"], "--cuda-graph on needs a CUDA device, not cpu"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes(train, tmp_path, options, message):
    _, err = train(*options, status=2)
    assert err.startswith("train_lora.py: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_xformers_where_it_cannot_be_used(train):
    if torch.cuda.is_available():
        pytest.skip("xFormers runs on this machine")
    _, err = train("--attention", "xformers", status=2)
    assert re.fullmatch(r"train_lora.py: --attention xformers is not usable: .*\n", err)


def test_a_truncated_shard(train, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    tar = folder / "photos-000001.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    out, _ = train("--data", folder, "--steps", 1)
    assert "cut short  photos-000001.tar: the samples before the cut are used" in out


def test_a_named_run_with_a_trigger(train, photos, tiny_model, tmp_path):
    options = ["--data", photos, "--name", "naruto", "--trigger", "nrt style", "--license", "CC0", "--save-every", 1]
    options += ["--prompts", "a cat", "NRT style, a dog"]
    out, _ = train("--steps", 2, *options)
    assert visible(tmp_path / "out") == ["naruto-000001.safetensors", "naruto-000002.safetensors", "state-2"]
    assert [path.name.partition("-")[0] for path in (tmp_path / "runs").iterdir()] == ["naruto"]
    assert f"look       python infer.py --lora {tmp_path}/out/naruto-000002.safetensors --compare\n" in out
    assert f"use it     cp {tmp_path}/out/naruto-000002.safetensors ComfyUI/models/loras/" in out
    header = read_metadata(tmp_path / "out/naruto-000002.safetensors")
    wanted = {"modelspec.trigger_phrase": "nrt style", "modelspec.license": "CC0", "modelspec.title": "naruto"}
    wanted |= {"ss_output_name": "naruto-000002", "modelspec.prediction_type": "epsilon", "ss_sd_model_name": tiny_model.name}
    assert wanted.items() <= header.items()
    assert json.loads(header["ss_tag_frequency"]) == {"pictures": {f"picture number {i}": 1 for i in range(7)}}
    assert "sdxl_lora.prompts" not in header  # no pictures were drawn
    train("--steps", 3, *options, "--no-tags")
    assert "ss_tag_frequency" not in read_metadata(tmp_path / "out/naruto-000003.safetensors")
    assert newest_lora(tmp_path / "out").name == "naruto-000003.safetensors"
    out, _ = train("--steps", 1, *options, "--resume", "none")
    assert len(list((tmp_path / "out/before-1").glob("naruto-*"))) == 3
    train("--steps", 1, *options, "--resume", "none", "--pictures", "--out", tmp_path / "b")
    prompts = json.loads(read_metadata(tmp_path / "b/naruto-000001.safetensors")["sdxl_lora.prompts"])
    assert [prompt["text"] for prompt in prompts] == ["nrt style a cat", "NRT style, a dog"]


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a\nb", "-x"])
def test_names_that_are_none(train, name):
    _, err = train(f"--name={name}", status=2)
    assert "must be a name of letters" in err


@pytest.mark.parametrize("other", [":x2", ":x3"])
def test_other_repeats_are_another_run(train, photos, shards, tmp_path, other):
    data = ["--data", f"{photos}{other}", "--data", shards]
    train(*data, "--steps", 1)
    train(*data, "--steps", 2)
    _, err = train("--data", f"{photos}:x4", "--data", shards, "--steps", 3, "--resume", tmp_path / "out", status=2)
    assert re.search(r"is of another run: --data files \w{8}, \d+ draws an epoch at 0.\d+ 0.\d+ -> files \w{8}, 35 draws", err)


def test_a_style_of_ones_own_is_not_drawn_as_naruto(train, photos, tmp_path):
    train("--data", photos, "--steps", 1, "--trigger", "nrt", "--pictures")
    prompts = json.loads(read_metadata(tmp_path / "out/pytorch_lora_weights_1.safetensors")["sdxl_lora.prompts"])
    assert [prompt["text"] for prompt in prompts] == [f"nrt {text}" for text in NEUTRAL_PROMPTS]
