"""run/log.py: tags, pages, tables, what runs are compared by, and Weights & Biases by a stand-in."""

import itertools
import math
import re
import sys
from html import unescape

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams import metadata

from common.errors import UserError
from common.options import flat_options, resume_policies
from lora import Adapter
from model.prompts import Prompt
from options.optimiser import OptimiserConfig
from options.training import LoRAConfig, ReportConfig, TrainConfig
from run.log import LAYOUT, TAGS, EventWriter, WandbLog, compared_options, config_text, prompts_text, sample_tag
from run.report import Meter

LATER = {tag for tag in TAGS.values() if tag.startswith("validation/")}  # not in runs as short as here, of one process
LATER |= {"train/noise_scale", "speed/waiting_for_ranks"}
WANDB = """
calls = []

class Image:
    def __init__(self, pixels):
        self.shape = pixels.shape

class Html:
    def __init__(self, data):
        self.html = data

class Run:
    def define_metric(self, name, step_metric=None, hidden=None):
        calls.append((name, step_metric))

    def log(self, row):
        calls.append(row)

    def finish(self):
        calls.append("finish")

def init(project, name, config, resume, id, dir, settings):
    calls.append({"id": id, "name": name, "dir": dir, "resume": resume, "config": config})
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name, which records calls. wandb() returns those since the last time."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(WANDB)
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that what was there comes back
    del sys.modules["wandb"]
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def taken() -> list:
        calls = sys.modules["wandb"].calls
        taken, calls[:] = list(calls), []
        return taken

    return taken


def cells(markdown: str) -> list[list[str]]:
    """The texts of a table as TensorBoard shows it, with * around what is bold."""
    rows = markdown_to_safe_html(markdown).split("<tr>")[1:]
    found = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[unescape(re.sub("</?strong>", "*", cell)) for cell in row] for row in found]


def test_every_tag_is_in_a_group_and_of_one_measurement():
    assert len(set(TAGS.values())) == len(TAGS)
    groups = {"train", "validation", "speed", "memory", "files", "end"}
    assert all(re.fullmatch(rf"({'|'.join(groups)})/\w+", tag) for tag in TAGS.values())
    meter = Meter(torch.device("cpu"), ["unet", "text_encoder"], 1)
    meter.end_step(torch.tensor(1.0), torch.ones(2), 0.0)
    assert meter.read(1, 1.0)[0].keys() <= TAGS.keys()  # with the rest of a real run: test_train.py


def test_each_line_of_a_chart_is_one_tag():
    for kind, names in (chart for page in LAYOUT.values() for chart in page.values()):
        for name in names:
            match = [tag for tag in TAGS.values() if (re.match(name, tag) if kind == "Multiline" else name == tag)]
            assert len(match) == 1, name  # 'train/loss' alone would take in train/loss_scale


@given(st.integers(1, 1200))
def test_pictures_sort_in_the_order_of_the_prompts(count):
    tags = [sample_tag(i, count) for i in range(count)]
    assert tags == sorted(tags)
    assert tags[0] == f"samples/p{'1'.zfill(len(str(count)))}"


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_tables_show_texts_as_they_are(text):
    assert cells(prompts_text([Prompt(text), Prompt("b")]))[1][1] == text


def test_the_table_of_options_marks_what_is_not_as_usual():
    config = TrainConfig(lora=LoRAConfig(targets=r"attn2\.to_(k|v)$"), optimiser=OptimiserConfig(lr=1e-3))
    head, *rows = cells(config_text(flat_options(config)))
    assert head == ["option", "value", "default, where it is another"]
    assert [row for row in rows if row[2] or "*" in row[0]] == [
        ["*--targets*", '*"attn2\\\\.to_(k|v)$"*', '"attention"'],
        ["*--lr*", "*0.001*", "None"],
    ]
    assert ["--save-every", "150", ""] in rows
    assert len(rows) == len(flat_options(config))


def hyperparameters(folder) -> dict:
    """What TensorBoard compares a run by, from the events in its folder."""
    log = EventAccumulator(str(folder)).Reload()
    assert metadata.EXPERIMENT_TAG not in log.summary_metadata  # one run's would hide options of the others
    content = log.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    started = metadata.parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.items()}


def test_a_run_can_be_compared_by_its_options_and_its_end(train, tmp_path, monkeypatch):
    with monkeypatch.context() as short:
        spoil, passes = Adapter.spoil_unless_finite, itertools.count()

        def fail(adapter, loss):
            if next(passes):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            spoil(adapter, loss)

        short.setattr("lora.Adapter.spoil_unless_finite", fail)
        train("--steps", 2, "--flip", status=71)
    (folder,) = (tmp_path / "runs").iterdir()
    assert metadata.SESSION_START_INFO_TAG not in EventAccumulator(str(folder)).Reload().summary_metadata  # not at its end
    train("--steps", 2, "--flip")
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_dir()] == [folder]  # one inside would be another run
    options = hyperparameters(folder)
    assert options.items() >= {"rank": 2, "bs": 2, "lr": 1e-4, "steps": 2, "flip": "true", "buckets": "true"}.items()
    assert not options.keys() & {"out", "log_dir", "workers", "prompts"}  # nothing that is learned depends on them
    log = EventAccumulator(str(folder)).Reload()
    assert [(one.step, one.value) for one in log.Scalars("end/train_loss")] == [(2, log.Scalars("train/loss")[-1].value)]


def test_metrics_are_in_the_same_events(tmp_path):
    writer = EventWriter(str(tmp_path))
    options = compared_options(flat_options(TrainConfig()), resume_policies(TrainConfig()))
    writer.add_outcome(options, {TAGS["final_improvement"]: 0.25}, 7)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert hyperparameters(tmp_path) == options
    (improvement,) = EventAccumulator(str(tmp_path)).Reload().Scalars("end/improvement")
    assert (improvement.step, improvement.value) == (7, 0.25)


def test_wandb_gets_what_tensorboard_gets_and_survives_a_resume(train, wandb, tmp_path):
    train("--steps", 1, "--log-to", "wandb", "--pictures")
    begun, *rows, end = wandb()
    assert end == "finish"
    assert begun["config"].items() >= {"rank": 2, "log_to": "wandb"}.items()
    assert rows[:2] == [("step", None), ("*", "step")]
    texts = {tag: value.html for row in rows[2:] for tag, value in row.items() if hasattr(value, "html")}
    assert "<td>--targets</td>" in texts["config"]
    assert "<td>one picture a save is enough</td>" in texts["prompts"]
    tags = {tag for row in rows[2:] for tag in row} - {"step", "config", "prompts", "samples/p1", "schedule"}
    assert tags == set(TAGS.values()) - LATER - {"end/improvement"}
    assert [(row["step"], row["samples/p1"].shape[2]) for row in rows[2:] if "samples/p1" in row] == [(0, 3), (1, 3)]
    out, _ = train("--steps", 2, "--log-to", "wandb")
    assert "curves" not in out  # there is nothing for TensorBoard
    again, *rows, _ = wandb()
    assert [again[name] for name in ("id", "dir", "resume")] == [begun["id"], begun["dir"], "allow"]
    assert [row["step"] for row in rows[2:] if "train/loss" in row] == [2]
    assert not list((tmp_path / "runs").rglob("events*"))
    out, _ = train("--steps", 3, "--log-to", "both")
    assert "curves" in out
    assert wandb()[-1] == "finish"
    assert len(list((tmp_path / "runs").rglob("events*"))) == 1


@pytest.mark.parametrize("part", ["def init", "def log", "def finish"])
def test_a_failure_of_wandb_ends_its_log_with_one_line_and_not_the_run(wandb, tmp_path, capfd, part):
    file = tmp_path / "packages/wandb.py"
    start = WANDB.index(part)
    indent = "        " if part != "def init" else "    "
    broken = f"{WANDB[start:].partition(':')[0]}:\n{indent}raise RuntimeError('no\\nnetwork')\n"
    file.write_text(WANDB[:start] + broken + WANDB[start:].partition("\n")[2])
    log = WandbLog(str(tmp_path / "run"), {"rank": 2})
    for step in range(3):
        log.add_row({"train/loss": math.nan}, step)
    log.close()
    assert capfd.readouterr().err == "Weights & Biases: training goes on without it: RuntimeError: no network\n"


def test_without_the_package_one_line_says_what_to_install(train, monkeypatch, tmp_path):
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "wandb", None)
        _, err = train("--log-to", "wandb", "--model", "no-such-model", status=2)
    assert err.endswith("--log-to wandb needs a package that is not here: pip install 'wandb>=0.31'\n")
    assert err.count("\n") == 1
    (tmp_path / "wandb").mkdir()  # where wandb writes unless told otherwise
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="--log-to both needs a package"):
        ReportConfig(log_to="both")
