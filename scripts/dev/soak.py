"""Kills, signals, stalled shards, full disks and deleted folders at random moments of a run on the bundled model: no step may
be lost or wrong. Its shards are served from here, by HTTP.

    python scripts/dev/soak.py --minutes 30
    python scripts/dev/soak.py --blows 200

A run is made once undisturbed, and then again and again with what can happen to it. After each blow the newest whole state must
be of the step that was promised, and in the end every LoRA file equal to the undisturbed run's. Ends with status 1 if not.
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
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from common.errors import UserError, one_line_errors
from dataset.remote import TIMEOUT
from dataset.sources import DEMO
from run.state import find_state

BLOWS = {  # name: (signal, to the whole group, status that the run then ends with)
    "SIGKILL": (signal.SIGKILL, True, -signal.SIGKILL),
    "SIGKILL, workers live on": (signal.SIGKILL, False, -signal.SIGKILL),
    "SIGTERM": (signal.SIGTERM, True, os.EX_TEMPFAIL),
    "SIGUSR1": (signal.SIGUSR1, True, os.EX_TEMPFAIL),
    "Ctrl-C": (signal.SIGINT, True, os.EX_TEMPFAIL),
}
ON_DISK = ("disk full", "folder deleted")
FITS_A_LOG = 100_000  # bytes: but neither a LoRA file nor a state
HANGS = 300  # seconds that no run takes


@dataclass(frozen=True)
class SoakConfig:
    minutes: float | None = None
    """How long. None: until --blows."""
    blows: int = 200
    """How many, if --minutes is not given."""
    steps: int = 40
    """Of a run."""
    save_every: int = 10
    """Steps between its checkpoints."""
    seed: int = 0
    """Of the moments."""


class Shards(BaseHTTPRequestHandler):
    """Parts of the bundled shards, or what comes from a server in trouble."""

    protocol_version = "HTTP/1.1"
    pending, until = 0.0, 0.0  # seconds of a trouble that no request has met yet; when one ends
    answers: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        if self.pending:  # so that a trouble is felt, if not by this run, which may have all its data, then by the next
            Shards.pending, Shards.until = 0.0, time.monotonic() + self.pending
        tar, left = DEMO / Path(self.path).name, self.until - time.monotonic()
        how = random.choice(["silent", "silent half-way", "broken off", "503"]) if left > 0 else "well"
        self.answers[how] += 1
        if how == "503" or not tar.is_file():
            self.send_error(503 if how == "503" else 404)
            return
        first, last = map(int, re.findall(r"bytes=(\d+)-(\d+)", self.headers["Range"])[0])
        part = tar.read_bytes()[first : last + 1]
        if how == "silent":
            time.sleep(left)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{tar.stat().st_size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2])
        if how == "silent half-way":
            time.sleep(left)
        if how == "broken off":
            self.close_connection = True
        else:
            self.wfile.write(part[len(part) // 2 :])

    def log_message(self, *_) -> None:
        """They are counted."""


class Server(ThreadingHTTPServer):
    def handle_error(self, *_) -> None:
        """Who was killed hangs up early."""


def serve() -> str:
    """-> the URL of the shards, as long as this program runs."""
    server = Server(("127.0.0.1", 0), Shards)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/ninja-{{000000..000003}}.tar"


class TrainingRun:
    """train_lora.py in a session of its own, and the last step that it told."""

    def __init__(self, config: SoakConfig, url: str, out: Path):
        options = ["--data", url, "--steps", config.steps, "--save-every", config.save_every, "--keep", config.steps, "--bs", 1]
        options += ["--device", "cpu", "--caption-dropout", 0.2, "--flip", "--out", out, "--log-dir", out / "log"]
        self.told, self.bar = out.parent / "told", rf" (\d+)/{config.steps} \["
        command, env = [sys.executable, "train_lora.py", *map(str, options)], os.environ | {"no_proxy": "127.0.0.1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=self.told.open("w"), stderr=subprocess.STDOUT
        )

    def step(self) -> int:
        """-1 before its loop."""
        return max(map(int, re.findall(self.bar, self.told.read_text())), default=-1)

    def wait(self, seconds: float) -> int | None:
        """So long, or until it ends -> its status, if it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        return self.process.poll()

    def end(self) -> int:
        """Its status; one that hangs is killed."""
        if self.wait(HANGS) is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def limit_files(self, size: int) -> None:
        with suppress(ProcessLookupError):
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def wait_for_a_moment(run: TrainingRun, out: Path, rng: random.Random, usual: float) -> None:
    """Anywhere in the `usual` seconds of a run; every second time while it writes."""
    if rng.random() < 0.5:
        before = {*out.glob(".pytorch*"), *out.glob(".state*")}
        while run.process.poll() is None and {*out.glob(".pytorch*"), *out.glob(".state*")} <= before:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    else:
        run.wait(rng.uniform(0, usual))


def strike(run: TrainingRun, out: Path, rng: random.Random) -> tuple[str, str, float]:
    """A signal, some seconds of a trouble, or both -> (trouble, signal, seconds that the run then took to end)."""
    trouble = rng.choice(["", "", "", "shards stall", "shards stall", *ON_DISK])
    name = rng.choice([*BLOWS, *([""] * len(BLOWS) if trouble else [])])
    seconds = rng.choice([rng.uniform(0, TIMEOUT / 2), 1.1 * TIMEOUT]) if trouble else 0  # less than all tries of a request
    at = rng.uniform(0, seconds)
    if trouble == "shards stall":
        Shards.pending = seconds
    if trouble == "disk full":
        run.limit_files(FITS_A_LOG)
    if trouble == "folder deleted" and out.exists():
        shutil.rmtree(out.rename(out.with_name("deleted")))  # at once: half a state would be refused by the next run
    name = name if run.wait(at) is None else ""
    if name:
        number, everywhere, _ = BLOWS[name]
        (os.killpg if everywhere else os.kill)(run.process.pid, number)
    struck = time.monotonic()
    if run.wait(seconds - at) is None:
        run.limit_files(resource.RLIM_INFINITY)
    run.end()
    return trouble, name, time.monotonic() - struck


def saved_step(out: Path) -> int:
    found = find_state("auto", out)
    return found[1]["run"]["step"] if found else 0


def promised_step(config: SoakConfig, trouble: str, status: int, before: int, then: int, told: int) -> int:
    """The step that must be saved. The run began at `before`, told `then` when it was struck, and `told` in the end."""
    said = {os.EX_OK: config.steps, os.EX_TEMPFAIL: told}  # by a run that ends so
    if trouble == "folder deleted":
        return said.get(status, 0) if told > then else 0
    last_save = ((then if trouble == "disk full" else told) - 1) // config.save_every * config.save_every
    return said.get(status, max(before, last_save))


def same(one: Path, other: Path) -> bool:
    """Whether two LoRA files hold the same numbers."""
    try:
        a, b = load_file(one), load_file(other)
    except SafetensorError:
        return False
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def main(config: SoakConfig) -> bool:
    """Returns whether nothing was lost or wrong."""
    rng, work, url, began = random.Random(config.seed), Path(tempfile.mkdtemp(prefix="soak")), serve(), time.monotonic()
    whole, out = work / "whole", work / "out"
    reference = TrainingRun(config, url, whole)
    if reference.end():
        raise UserError(f"the undisturbed run failed: {reference.told.read_text()[-500:]}")
    usual, began, slowest, more = time.monotonic() - began, time.monotonic(), 0.0, True
    kinds: Counter[str] = Counter()
    faults = []
    tally = Counter({"blows": 0, "runs finished": 0, "files compared": 0, "steps lost": 0, "files wrong": 0})
    while more:
        more = tally["blows"] < config.blows if config.minutes is None else time.monotonic() < began + 60 * config.minutes
        if not (more or out.exists()):
            break
        before, run = saved_step(out), TrainingRun(config, url, out)
        if more:  # else nothing happens to it any more
            wait_for_a_moment(run, out, rng, usual * (1 - before / config.steps / 2))
        then, struck = run.step(), more and run.process.poll() is None
        nth = random.Random(f"{config.seed} {tally['blows']}")  # which does not depend on when it comes
        trouble, name, seconds = strike(run, out, nth) if struck else ("", "", 0.0)
        status, told, after, wrong = run.end(), run.step(), saved_step(out), []
        lost = max(0, promised_step(config, trouble, status, before, then, told) - after)
        ends = {os.EX_OK, *([os.EX_IOERR] if trouble in ON_DISK else []), *([BLOWS[name][2]] if name else [])}
        young = then < 0 and (name or trouble in ON_DISK)  # before its loop it has nothing to save, and may end as any program
        if status == os.EX_TEMPFAIL:
            slowest = max(slowest, seconds)
        if after == config.steps:
            files = [(path, whole / path.name) for path in out.glob("*.safetensors") if (whole / path.name).exists()]
            wrong = [ours.name for ours, theirs in files if not same(ours, theirs)]
            tally.update({"runs finished": 1, "files compared": len(files)})
            shutil.rmtree(out)
        kinds.update(filter(None, (trouble, name)))
        tally.update({"blows": struck, "steps lost": lost, "files wrong": len(wrong)})
        what = " + ".join(filter(None, (trouble, name))) or "nothing"
        what = f"{tally['blows']:4} {what:42} status {status:3}, step {after:3} saved"
        print(what, flush=True)
        if lost or wrong or not (young or status in ends):
            faults.append(f"{what}, {lost} lost, wrong {wrong}: {run.told.read_text()[-300:]}")
        if told >= 0 and "Traceback" in run.told.read_text():
            faults.append(f"{what}, a traceback: {run.told.read_text()[-2000:]}")
    summary = {"minutes": round((time.monotonic() - began) / 60, 1), **tally, "slowest end after a signal": round(slowest, 1)}
    print(json.dumps(summary | {"kinds": kinds, "answers to requests": Shards.answers, "faults": faults}, indent=1))
    if faults:
        print(f"kept for a look: {work}")
    else:
        shutil.rmtree(work)
    return not faults


if __name__ == "__main__":
    with one_line_errors("soak.py"):
        sys.exit(not main(tyro.cli(SoakConfig, description=__doc__)))
