"""Where a run can be watched: TensorBoard, and Weights & Biases with --log-to wandb. Both get the same calls."""

import html
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markdown import markdown
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from common.errors import UserError, printable, warn_of
from common.files import TolerantWriter, sha256_of
from common.options import Resume, flag_of, flat_options
from evaluation.page import read_scalars
from model.prompts import Prompt
from options.command import as_toml
from options.training import TrainConfig

AGAIN = 60  # seconds until a log that could not be written is tried again
WAIT = 60  # seconds that the beginning and the end of a run wait for Weights & Biases
TAGS = {  # {what is measured: its tag}; what stands before the slash is the group of the chart
    "loss": "train/loss", "grad_norm": "train/grad_norm", "grad_norm/unet": "train/grad_norm_unet",
    "grad_norm/text_encoder": "train/grad_norm_text_encoder", "lr/unet": "train/lr_unet",
    "lr/text_encoder": "train/lr_text_encoder", "loss_scale": "train/loss_scale", "overflows": "train/overflows",
    "not_finite": "train/not_finite", "noise_scale": "train/noise_scale", "improvement_ema": "validation/improvement_ema",
    "improvement": "validation/improvement", "trained": "validation/trained",
    "improvement_low": "validation/improvement_low", "improvement_high": "validation/improvement_high",
    "gap": "validation/gap", "validation_loss": "validation/loss",
    "images_per_second": "speed/images_per_second", "seconds_per_step": "speed/seconds_per_step",
    "steps": "speed/steps_measured", "waiting_for_data": "speed/waiting_for_data",
    "waiting_for_ranks": "speed/waiting_for_ranks", "peak_memory_GiB": "memory/peak_GiB",
    "peak_reserved_GiB": "memory/reserved_GiB", "memory_in_use": "memory/in_use",
    "largest_error_of_the_file": "files/largest_error", "final_loss": "end/train_loss", "final_improvement": "end/improvement",
}  # fmt: skip


def lines(*measured: str) -> list:
    """A chart with a line for each."""
    return ["Multiline", [f"^{TAGS[name]}$" for name in measured]]


MARGIN = [TAGS[name] for name in ("improvement", "improvement_low", "improvement_high")]
LAYOUT = {  # {page: {chart: its lines}} of what to look at first
    "training": {
        "loss": lines("loss"),
        "gradient norms": lines("grad_norm", "grad_norm/unet", "grad_norm/text_encoder"),
        "learning rates": lines("lr/unet", "lr/text_encoder"),
    },
    "speed and memory": {
        "images per second": lines("images_per_second"),
        "memory in GiB": lines("peak_memory_GiB", "peak_reserved_GiB"),
    },
    "validation": {"improvement": ["Margin", MARGIN], "trained and kept out": lines("trained", "improvement")},
}


def sample_tag(number: int, count: int) -> str:
    """The tag of prompt `number`, from 0, of `count`: sorted by name they are in the order of the prompts."""
    return f"samples/p{number + 1:0{len(str(count))}}"


def markdown_table(rows: list[list[str]]) -> str:
    """The first row is the head."""
    head, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *others])


def shown(text: str) -> str:
    """Markdown, also for a cell of a table, that shows a text as it is."""
    return html.escape(printable(text), quote=False).translate({ord(sign): f"&#{ord(sign)};" for sign in r"\`*_[]|!#~"})


def config_text(flags: dict[str, Any]) -> str:
    """All options as a table; those that are not as usual, given by the user or chosen by the run, are bold."""
    rows = []
    for name, default in flat_options(TrainConfig()).items():
        row = [flag_of(name), shown(as_toml(flags[name]))]
        usual = as_toml(flags[name]) == as_toml(default)
        rows.append([*row, ""] if usual else [f"**{cell}**" for cell in row] + [shown(as_toml(default))])
    return markdown_table([["option", "value", "default, where it is another"], *rows])


def prompts_text(prompts: list[Prompt]) -> str:
    """The prompts as a table, in their order, with the tag of their pictures."""
    rows = [[sample_tag(i, len(prompts)), *(shown(str(cell)) for cell in asdict(p).values())] for i, p in enumerate(prompts)]
    return markdown_table([["pictures", *(spec.name for spec in fields(Prompt))], *rows])


def compared_options(flags: dict[str, Any], policies: dict[str, Resume]) -> dict[str, Any]:
    """{name: number or text} by which runs are compared: what is learned depends on these options."""
    values = {name: value for name, value in flags.items() if name == "steps" or policies[name] != "free"}
    texts = {name: printable(value if isinstance(value, str) else as_toml(value)) for name, value in values.items()}
    return {name: value if type(value) in (int, float) else texts[name] for name, value in values.items()}


class EventWriter(SummaryWriter):
    """TensorBoard's writer, with the calls that every log has: `add_text`, `close` and these three."""

    def __init__(self, folder: str, purge_step: int | None = None):
        """Scalars from `purge_step` on, of a run that was killed, are hidden."""
        super().__init__(folder, purge_step=purge_step)
        self.add_custom_scalars(LAYOUT)

    def add_row(self, row: dict[str, float], step: int) -> None:
        """{tag: value}."""
        for tag, value in row.items():
            self.add_scalar(tag, value, step)

    def add_pictures(self, sheets: dict[str, np.ndarray], step: int) -> None:
        """{tag: [H, W, 3] uint8}."""
        for tag, sheet in sheets.items():
            self.add_image(tag, sheet, step, dataformats="HWC")

    def add_outcome(self, options: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        """Once, at the end: what TensorBoard compares in its tab HPARAMS. `add_hparams` would make that a second run, and
        describe an experiment: the first run's would hide the options that only others have.
        """
        _, *session = hparams(options, metrics)
        for summary in session:
            self._get_file_writer().add_summary(summary, step)
        self.add_row(metrics, step)


class TensorBoardLog:
    """An EventWriter. `attempt` makes each call, so that what the disk refuses is reported once and does not end the run; a
    new file is begun a minute later.
    """

    def __init__(self, folder: str, purge_step: int, attempt: TolerantWriter):
        self.folder, self.attempt, self.tried = folder, attempt, -math.inf
        self.writer: EventWriter | None = EventWriter(folder, purge_step)
        threading.excepthook = not_of_the_disk

    def call(self, name: str, *args, **kwargs) -> None:
        self.tried = time.monotonic()
        writer, self.writer = self.writer or EventWriter(self.folder), None
        getattr(writer, name)(*args, **kwargs)
        self.writer = writer  # not one that has failed: it would go on failing

    def __getattr__(self, name: str):
        if not self.writer and time.monotonic() < self.tried + AGAIN:
            return lambda *args, **kwargs: None
        return lambda *args, **kwargs: self.attempt(f"TensorBoard's {self.folder}", partial(self.call, name, *args, **kwargs))


def not_of_the_disk(args: threading.ExceptHookArgs) -> None:
    """threading.excepthook, but for errors of the disk: the writer's thread ends with them, and the log's next call reports."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


class WandbLog:
    """Weights & Biases. A failure there, of login, network or disk, ends the log with one line, and not the run.

    Its own count of steps ignores what goes back, as after a kill: the step is a value of each row, and the axis of the charts.
    """

    def __init__(self, folder: str, flags: dict[str, Any]):
        """A run that resumes with its `folder` is the same one there. `flags`: {name: value} of every option."""
        self.folder, self.flags = Path(folder), flags
        self.failed = False
        self.attempt(self.begin)

    def attempt(self, call: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            call()
        except Exception as error:  # of several packages
            self.failed = True
            warn_of("Weights & Biases", UserError(f"training goes on without it: {type(error).__name__}: {error}"))

    def begin(self) -> None:
        import wandb

        self.wandb = wandb
        self.folder.mkdir(parents=True, exist_ok=True)  # wandb takes no other, but without a word /tmp
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sdxl-lora"), name=self.folder.name, config=self.flags, resume="allow",
            id=sha256_of(str(self.folder.resolve()).encode())[:16], dir=str(self.folder),
            settings={"console": "off", "init_timeout": WAIT, "finish_timeout": WAIT},
        )  # fmt: skip
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def add(self, step: int, row: Callable[[], dict[str, Any]]) -> None:
        self.attempt(lambda: self.run.log({"step": step, **row()}))

    def add_row(self, row: dict[str, float], step: int) -> None:
        self.add(step, lambda: row)

    def add_pictures(self, sheets: dict[str, np.ndarray], step: int) -> None:
        self.add(step, lambda: {tag: self.wandb.Image(sheet) for tag, sheet in sheets.items()})

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.add(step, lambda: {tag: self.wandb.Html(markdown(text, extensions=["tables"]))})

    def add_outcome(self, options: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        self.add_row(metrics, step)  # it compares the options of `flags`, and the last value of each tag

    def close(self) -> None:
        self.attempt(lambda: self.run.finish())


class Curves:
    """The scalars of a run in memory, for its page: to read a log with its pictures at every save would take long."""

    def __init__(self, folder: str, step: int):
        """Those of a run that resumes are read, up to `step`."""
        read = read_scalars(Path(folder)) if step else {}
        self.scalars = {tag: [reading for reading in readings if reading[0] <= step] for tag, readings in read.items()}

    def add_row(self, row: dict[str, float], step: int) -> None:
        for tag, value in row.items():
            self.scalars.setdefault(tag, []).append((step, value))

    def __getattr__(self, name: str):
        return lambda *args: None  # pictures and texts are on the page already


class Logs:
    """Each call goes to all of them: `add_row`, `add_pictures`, `add_text`, `add_outcome`, `close`."""

    def __init__(self, *logs: TensorBoardLog | WandbLog | Curves):
        self.logs = logs

    def __getattr__(self, name: str):
        return lambda *args: [getattr(log, name)(*args) for log in self.logs]


def open_logs(folder: str, step: int, flags: dict[str, Any], curves: Curves) -> Logs:
    """`curves`, and those that --log-to names, for a run that begins after `step`. `flags`: {name: value} of every option."""
    events = [TensorBoardLog(folder, step + 1, TolerantWriter())] if flags["log_to"] != "wandb" else []
    return Logs(curves, *events, *([WandbLog(folder, flags)] if flags["log_to"] != "tensorboard" else []))
