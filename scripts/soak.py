"""Kills, signals and full disks at random moments of a run on the bundled model: no step may be lost or wrong.

    python scripts/soak.py --minutes 30
    python scripts/soak.py --kills 200

A run is made once undisturbed, and then again and again with what can happen to it. After each blow the newest whole state must
be at most --save-every steps behind what the run had told, and in the end every LoRA file equal to the undisturbed run's.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import find_state
from errors import UserError, one_line_errors

BLOWS = {  # name: (signal, to the whole group, status that the run then ends with)
    "SIGKILL": (signal.SIGKILL, True, -signal.SIGKILL),
    "SIGKILL, workers live on": (signal.SIGKILL, False, -signal.SIGKILL),
    "SIGTERM": (signal.SIGTERM, True, os.EX_TEMPFAIL),
    "SIGUSR1": (signal.SIGUSR1, True, os.EX_TEMPFAIL),
    "Ctrl-C": (signal.SIGINT, True, os.EX_TEMPFAIL),
}


@dataclass(frozen=True)
class SoakConfig:
    minutes: float | None = None
    """How long. None: until --kills."""
    kills: int = 200
    """How many blows, if --minutes is not given."""
    steps: int = 40
    """Of a run."""
    save_every: int = 5
    """Steps between its checkpoints."""
    seed: int = 0
    """Of the moments."""


class Run:
    """train_lora.py in a session of its own, and the last step that it told."""

    def __init__(self, config: SoakConfig, out: Path):
        options = ["--steps", config.steps, "--save-every", config.save_every, "--keep", config.steps, "--bs", 1]
        options += ["--device", "cpu", "--caption-dropout", 0.2, "--flip", "--out", out, "--log-dir", out / "log"]
        self.told = (out.parent / "told").open("w+")
        how = {"cwd": ROOT, "stdout": self.told, "stderr": subprocess.STDOUT, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, "train_lora.py", *map(str, options)], **how)

    def text(self) -> str:
        return Path(self.told.name).read_text()

    def step(self) -> int:
        return max(map(int, re.findall(r" (\d+)/\d+ \[", self.text())), default=0)

    def end(self) -> int:
        return self.process.wait(timeout=300)


def saved_step(out: Path) -> int:
    found = find_state("auto", out)
    return found[1]["run"]["step"] if found else 0


def same(one: Path, other: Path) -> bool:
    """Whether two LoRA files hold the same numbers; one of a step that the other run did not save counts as such."""
    if not other.exists():
        return True
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def wait_for_a_moment(run: Run, out: Path, rng: random.Random) -> None:
    """Anywhere in the run; every second time while it writes."""
    if rng.random() < 0.5:
        before = {*out.glob(".pytorch*"), *out.glob(".state*")}
        while run.process.poll() is None and {*out.glob(".pytorch*"), *out.glob(".state*")} <= before:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    else:
        end = time.monotonic() + rng.uniform(0, 40)
        while run.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)


def main(config: SoakConfig) -> None:
    rng, work = random.Random(config.seed), Path(tempfile.mkdtemp(prefix="soak"))
    whole, out = work / "whole", work / "out"
    reference = Run(config, whole)
    if reference.end():
        raise UserError(f"the undisturbed run failed: {reference.text()[-500:]}")
    began, blows, finished, lost, wrong = time.monotonic(), Counter(), 0, [], []
    while sum(blows.values()) < config.kills if config.minutes is None else time.monotonic() < began + 60 * config.minutes:
        before, run = saved_step(out), Run(config, out)
        wait_for_a_moment(run, out, rng)
        name = rng.choice([*BLOWS, "disk full"])
        if run.process.poll() is None and name == "disk full":
            fits_a_log = (100_000, resource.RLIM_INFINITY)  # bytes: but neither a LoRA file nor a state
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, fits_a_log)
            fine = run.end() in (os.EX_OK, os.EX_IOERR)
        elif run.process.poll() is None:
            number, everywhere, status = BLOWS[name]
            young = run.step() == 0  # before its loop it has nothing to save, and may end as any program
            (os.killpg if everywhere else os.kill)(run.process.pid, number)
            fine = run.end() in ((status, os.EX_OK) if not young else (status, -number, 130, 1, os.EX_OK))
        else:
            name, fine = "none", run.end() == os.EX_OK
        blows[name] += 1
        after = saved_step(out)
        due = 0 if name == "disk full" else max(0, run.step() - 1) // config.save_every * config.save_every
        if after < max(before, due):
            lost.append(f"{name}: {run.step()} steps told, state of {after}, before {before}")
        if not fine:
            lost.append(f"{name}: status {run.process.returncode}: {run.text()[-300:]}")
        if after == config.steps:
            finished += 1
            wrong += [path.name for path in out.glob("*.safetensors") if not same(path, whole / path.name)]
            shutil.rmtree(out)
        print(f"{sum(blows.values()):4} {name:26} step {after:3}  {finished} finished", flush=True)
    minutes = (time.monotonic() - began) / 60
    told = {"minutes": round(minutes, 1), "blows": blows, "finished": finished, "lost": lost, "wrong": wrong}
    print(json.dumps(told, indent=1))
    shutil.rmtree(work)
    if lost or wrong:
        sys.exit(1)


if __name__ == "__main__":
    with one_line_errors("soak.py"):
        main(tyro.cli(SoakConfig))
