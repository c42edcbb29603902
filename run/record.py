"""The record of a run and the page that is made from it, OUT/record.json and OUT/report.html, rewritten at every save."""

import shlex
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.errors import UserError, warn_of, warnings
from common.files import TolerantWriter, sha256_of
from common.options import flat_options
from evaluation.page import write_page
from evaluation.record import PAGE_FILE, forget_after, read_record, write_record
from evaluation.verdict import Verdict, verdict_of
from lora_files.read import read_metadata
from memory import resolve_device
from model.prompts import Prompt
from options.training import TrainConfig
from run.checkpoints import Checkpoints, Run
from run.ending import Ending
from run.log import Curves

CHOSEN = ("resolution", "base_precision", "attention")  # by the run, where they are not given
LIBRARIES = ("torch", "diffusers", "transformers", "bitsandbytes")


class RunRecord:
    """What rank 0 writes of a run for people. `values` is the record: whoever measures something puts it there."""

    def __init__(self, checkpoints: Checkpoints, run: Run, curves: Curves, is_first: bool):
        self.out, self.run, self.checkpoints, self.is_first = checkpoints.config.out, run, checkpoints, is_first
        self.curves = curves
        self.values: dict[str, Any] = {}
        try:
            self.values = read_record(self.out) if is_first else {}
        except UserError as error:
            warn_of("train_lora.py", error)
        forget_after(self.values, run.step)
        self.before = self.values.get("run", {}).get("seconds", 0.0)  # of the run until it was resumed
        self.begun, self.disk = time.perf_counter(), TolerantWriter()

    def begin(self, prompts: list[Prompt], lines: dict[str, str], images_per_step: int) -> None:
        """`prompts`: filled; `lines`: what the run prints at its start; `images_per_step`: of all ranks."""
        if not self.is_first:
            return
        flags, made = self.checkpoints.flags, self.checkpoints.made["beyond"]
        usual = flat_options(TrainConfig(model=str(flags["model"])).resolved(resolve_device(str(flags["device"]))))
        versions = {name: version(name) for name in LIBRARIES} | {"suite": made["suite"], "device": lines["device"]}
        begun = self.values.get("run", {}).get("begun", time.strftime("%Y-%m-%d %H:%M"))
        self.values["run"] = {
            "steps": flags["steps"], "images_per_step": images_per_step, "epoch": self.checkpoints.source.epoch,
            "name": self.checkpoints.config.name, "model": flags["model"], "trigger": flags["trigger"], "begun": begun,
            "log_dir": self.run.log_dir, "command": shlex.join(["python", *sys.argv]), "options": flags, "versions": versions,
            "changed": {
                name: str(value) for name, value in flags.items()
                if name in usual and value != usual[name] and not (name in CHOSEN and usual[name] in (None, "auto"))
            },
        }  # fmt: skip
        self.values |= {"prompts": [prompt.given() for prompt in prompts], "lines": lines}
        self.write()

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.values)

    def write(self, state: str = "running", reason: str = "") -> None:
        """`state`: running, finished, stopped or failed."""
        if not self.is_first or not self.run.saved:  # nothing to show yet, and nothing that the next run would move aside
            return
        seconds = round(self.before + time.perf_counter() - self.begun, 1)
        self.values["run"] |= {"state": state, "reason": reason, "step": self.run.step, "seconds": seconds}
        self.values |= {"warnings": list(warnings), "files": self.saved_files()}
        self.disk("the record of the run", partial(write_record, self.out, self.values))
        self.disk("the page of the run", partial(write_page, self.out, self.values, self.curves.scalars))

    def close(self, ending: Ending) -> None:
        """Writes how the run ended, and prints what was found."""
        states = {Ending.FINISHED: "finished", Ending.STOPPED: "stopped"}
        self.write(states.get(ending, "failed"), ending.reason)
        if self.is_first and self.run.saved:
            print(*self.verdict.sentences, f"page       {self.out / PAGE_FILE}", sep="\n")

    def saved_files(self) -> dict[str, dict[str, str]]:
        """{step: name and SHA-256} of the LoRA files of the run; of several of a step the one that most programs read."""
        known = {file["name"]: (step, file) for step, file in self.values.get("files", {}).items()}
        files = {}
        for path in filter(Path.exists, (self.out / name for name in self.run.saved)):
            with suppress(OSError, UserError):  # taken away meanwhile
                step, file = known.get(path.name) or (read_metadata(path)["sdxl_lora.step"], None)
                files[step] = file or {"name": path.name, "sha256": sha256_of(path.read_bytes())}
        return files
