"""A short run of scripts/dev/soak.py with a smaller model. The training runs are forks of this process: they import nothing."""

import json
from pathlib import Path

import pytest
from conftest import Forked

import train_lora  # noqa: F401
from common.progress import SHOW_PROGRESS
from dataset import remote
from model.load import MODELS
from run.state import save_state


def fork(command: list, stdout, **_) -> Forked:
    """Replaces subprocess.Popen, with the arguments that soak.py uses."""
    return Forked(*command[1:], output=Path(stdout.name))


@pytest.fixture
def soak(script, train, monkeypatch, tiny_model, tmp_path):
    """soak("--blows", 7) runs soak.py and returns its summary. Uses the fixture `train`, which makes the pictures smaller."""
    (tmp_path / "prompts").write_text("one picture")
    monkeypatch.setattr("model.prompts.DEMO_PROMPTS", tmp_path / "prompts")
    monkeypatch.setitem(MODELS, "demo", str(tiny_model))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("subprocess.Popen", fork)
    monkeypatch.setenv(SHOW_PROGRESS, "1")  # soak.py sets it for its children, which are forks of this process here
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    monkeypatch.setattr(remote, "PAUSE", 0.05)

    def call(*options, status=0):
        out, _ = script("scripts/dev/soak.py", "--steps", 12, "--save-every", 3, *options, status=status)
        return json.loads(out[out.index("{\n") : out.rindex("}") + 1])

    return call


def test_nothing_is_lost_or_wrong(soak):
    summary = soak("--blows", 4, "--seed", 678)
    assert summary["blows"] == 4
    assert {"shards stall", "disk full", "folder deleted", "SIGKILL"} <= summary["kinds"].keys()
    assert len(summary["answers to requests"]) > 1  # some requests met a stall
    assert summary["files compared"] >= 4
    assert (summary["steps lost"], summary["files wrong"], summary["faults"]) == (0, 0, [])


def test_lost_steps_and_wrong_weights_are_found(soak, monkeypatch):
    """Every state but the last is saved with other weights and an earlier step."""

    def save(folder, state, files):
        wrong = {"lora": state["lora"] + 1e-3, "run": state["run"] | {"step": state["run"]["step"] - 1}}
        return save_state(folder, state if state["run"]["step"] == 12 else state | wrong, files)

    monkeypatch.setattr("run.checkpoints.save_state", save)
    summary = soak("--blows", 1, "--seed", 12, status=1)
    assert summary["kinds"] == {"SIGTERM": 1}
    assert summary["steps lost"] == 1
    assert summary["files wrong"] >= 3
    assert len(summary["faults"]) == 2
