"""scripts/dev/soak.py in short: a smaller model, and its runs are forks of this process, which has imported all of it."""

import json
from pathlib import Path

import pytest
from conftest import Forked

import train_lora  # noqa: F401
from dataset import remote
from model.load import MODELS
from run.state import save_state


def fork(command: list, stdout, **_) -> Forked:
    """subprocess.Popen as far as soak.py needs it."""
    return Forked(*command[1:], output=Path(stdout.name))


@pytest.fixture
def soak(script, train, monkeypatch, tiny_model, tmp_path):
    """soak("--blows", 7) -> what it tells. `train` is asked for because it makes the pictures smaller."""
    (tmp_path / "prompts").write_text("one picture")
    monkeypatch.setattr("model.render.DEMO_PROMPTS", tmp_path / "prompts")
    monkeypatch.setitem(MODELS, "demo", str(tiny_model))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("subprocess.Popen", fork)
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    monkeypatch.setattr(remote, "PAUSE", 0.05)

    def call(*options, **how):
        out, _ = script("scripts/dev/soak.py", "--steps", 12, "--save-every", 3, *options, **how)
        return json.loads(out[out.index("{\n") : out.rindex("}") + 1])

    return call


def test_nothing_is_lost_or_wrong(soak):
    told = soak("--blows", 4, "--seed", 678)
    assert told["blows"] == 4
    assert {"shards stall", "disk full", "folder deleted", "SIGKILL"} <= told["kinds"].keys()
    assert len(told["answers to requests"]) > 1  # a stall was felt
    assert told["files compared"] >= 4
    assert (told["steps lost"], told["files wrong"], told["faults"]) == (0, 0, [])


def test_what_is_lost_or_wrong_is_found(soak, monkeypatch):
    """States of other weights and of an earlier step."""

    def save(folder, state, beside):
        wrong = {"lora": state["lora"] + 1e-3, "run": state["run"] | {"step": state["run"]["step"] - 1}}
        return save_state(folder, state if state["run"]["step"] == 12 else state | wrong, beside)

    monkeypatch.setattr("run.checkpoints.save_state", save)
    told = soak("--blows", 1, "--seed", 12, status=1)
    assert told["kinds"] == {"SIGTERM": 1}
    assert told["steps lost"] == 1
    assert told["files wrong"] >= 3
    assert len(told["faults"]) == 2
