"""Tests that no step is lost or wrong when a run on the bundled model is disturbed at random moments, by signals, stalled
shards, a full disk or a deleted output folder. This program serves the shards itself, by HTTP.

    python scripts/dev/soak.py --minutes 30
    python scripts/dev/soak.py --blows 200

It trains once undisturbed, as the reference, and then again and again with one disturbance ("blow") per start. After each blow
the newest complete state must be of the step that the run had to save, and every LoRA file of a finished run must equal the
reference's. The exit status is 1 if not.
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
from safetensors import SafetensorError
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from common.errors import UserError, one_line_errors
from common.progress import SHOW_PROGRESS
from dataset.remote import TIMEOUT
from dataset.sources import DEMO
from options.command import parse_command
from run.state import find_state

BLOWS = {  # name: (signal, whether the whole process group gets it, status that the run must end with)
    "SIGKILL": (signal.SIGKILL, True, -signal.SIGKILL),
    "SIGKILL, workers live on": (signal.SIGKILL, False, -signal.SIGKILL),
    "SIGTERM": (signal.SIGTERM, True, os.EX_TEMPFAIL),
    "SIGUSR1": (signal.SIGUSR1, True, os.EX_TEMPFAIL),
    "Ctrl-C": (signal.SIGINT, True, os.EX_TEMPFAIL),
}
ON_DISK = ("disk full", "folder deleted")
FITS_A_LOG = 100_000  # limit of the file size in bytes: enough for a log, not for a LoRA file or a state
HANGS = 300  # seconds after which a run counts as hanging


@dataclass(frozen=True)
class SoakConfig:
    minutes: float | None = None
    """How long to go on. None: until --blows."""
    blows: int = 200
    """How many disturbances, if --minutes is not given."""
    steps: int = 40
    """Training steps of a run."""
    save_every: int = 10
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the disturbances and their moments."""


class Shards(BaseHTTPRequestHandler):
    """Answers requests for ranges of the bundled shards; while a stall lasts, it fails in one of several ways."""

    protocol_version = "HTTP/1.1"
    pending, until = 0.0, 0.0  # length of a stall that the next request starts; when the current one ends
    answers: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        if self.pending:  # it starts with a request: this run may need no more data, then the next run meets it
            Shards.pending, Shards.until = 0.0, time.monotonic() + self.pending
        tar, left = DEMO / Path(self.path).name, self.until - time.monotonic()
        answer = random.choice(["silent", "silent half-way", "broken off", "503"]) if left > 0 else "well"
        self.answers[answer] += 1
        if answer == "503" or not tar.is_file():
            self.send_error(503 if answer == "503" else 404)
            return
        first, last = map(int, re.findall(r"bytes=(\d+)-(\d+)", self.headers["Range"])[0])
        part = tar.read_bytes()[first : last + 1]
        if answer == "silent":
            time.sleep(left)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{tar.stat().st_size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2])
        if answer == "silent half-way":
            time.sleep(left)
        if answer == "broken off":
            self.close_connection = True
        else:
            self.wfile.write(part[len(part) // 2 :])

    def log_message(self, *_) -> None:
        """Silent: `answers` counts the requests."""


class Server(ThreadingHTTPServer):
    def handle_error(self, *_) -> None:
        """Silent: a run that is killed closes its connections early."""


def serve() -> str:
    """Starts the server in a thread, for as long as this program runs. Returns the URL of the shards."""
    server = Server(("127.0.0.1", 0), Shards)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/ninja-{{000000..000003}}.tar"


class TrainingRun:
    """train_lora.py in a session of its own. Its output goes to a file beside `out`."""

    def __init__(self, config: SoakConfig, url: str, out: Path):
        options = ["--data", url, "--steps", config.steps, "--save-every", config.save_every, "--keep", config.steps, "--bs", 1]
        options += ["--device", "cpu", "--caption-dropout", 0.2, "--flip", "--out", out, "--log-dir", out / "log"]
        self.log, self.progress = out.parent / "told", rf" (\d+)/{config.steps} \["
        command, env = (
            [sys.executable, "train_lora.py", *map(str, options)],
            os.environ | {"no_proxy": "127.0.0.1", SHOW_PROGRESS: "1"},
        )
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )

    def step(self) -> int:
        """The last step that its progress bar has shown; -1 before the training loop."""
        return max(map(int, re.findall(self.progress, self.log.read_text())), default=-1)

    def wait(self, seconds: float) -> int | None:
        """Waits `seconds`, or until the process ends. Returns its status, or None if it still runs."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        return self.process.poll()

    def end(self) -> int:
        """Waits for the process to end and returns its status. Kills it if it hangs."""
        if self.wait(HANGS) is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def limit_files(self, size: int) -> None:
        """Limits the files that the process may write to `size` bytes: a larger one fails as on a full disk."""
        with suppress(ProcessLookupError):
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def wait_for_a_moment(run: TrainingRun, out: Path, rng: random.Random, usual: float) -> None:
    """Waits for a random moment within `usual` seconds, or, in half of the cases, for one while the run writes a file."""
    if rng.random() < 0.5:
        old_files = {*out.glob(".pytorch*"), *out.glob(".state*")}
        while run.process.poll() is None and {*out.glob(".pytorch*"), *out.glob(".state*")} <= old_files:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    else:
        run.wait(rng.uniform(0, usual))


def strike(run: TrainingRun, out: Path, rng: random.Random) -> tuple[str, str, float]:
    """Sends a signal, causes trouble with data or disk for some seconds, or both, and waits until the run has ended.

    Returns (trouble, name of the signal, seconds that the run took to end after it).
    """
    trouble = rng.choice(["", "", "", "shards stall", "shards stall", *ON_DISK])
    no_signal = [""] * len(BLOWS) if trouble else []  # with trouble, half of the blows have no signal
    name = rng.choice([*BLOWS, *no_signal])
    seconds = rng.choice([rng.uniform(0, TIMEOUT / 2), 1.1 * TIMEOUT]) if trouble else 0  # less than all retries take
    delay = rng.uniform(0, seconds)
    if trouble == "shards stall":
        Shards.pending = seconds
    if trouble == "disk full":
        run.limit_files(FITS_A_LOG)
    if trouble == "folder deleted" and out.exists():
        shutil.rmtree(out.rename(out.with_name("deleted")))  # renamed first: the next run must not find half of a state
    if run.wait(delay) is not None:  # it has ended by itself
        name = ""
    if name:
        number, everywhere, _ = BLOWS[name]
        (os.killpg if everywhere else os.kill)(run.process.pid, number)
    struck = time.monotonic()
    if run.wait(seconds - delay) is None:
        run.limit_files(resource.RLIM_INFINITY)
    run.end()
    return trouble, name, time.monotonic() - struck


def saved_step(out: Path) -> int:
    found = find_state("auto", out)
    return found[1]["run"]["step"] if found else 0


def promised_step(config: SoakConfig, trouble: str, status: int, first: int, struck_at: int, last: int) -> int:
    """The step whose state must be there after a run that ended with `status`.

    It started from step `first`; its progress bar showed `struck_at` at the moment of the blow, and `last` in the end.
    """
    saved_at_end = {os.EX_OK: config.steps, os.EX_TEMPFAIL: last}  # by a run that ends with this status
    if trouble == "folder deleted":
        return saved_at_end.get(status, 0) if last > struck_at else 0
    last_save = ((struck_at if trouble == "disk full" else last) - 1) // config.save_every * config.save_every
    return saved_at_end.get(status, max(first, last_save))


def same_tensors(file: Path, reference: Path) -> bool:
    """Whether two LoRA files hold equal tensors under equal names. False if one of them cannot be read."""
    try:
        a, b = load_file(file), load_file(reference)
    except SafetensorError:
        return False
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def main(config: SoakConfig) -> bool:
    """Runs the test. Returns whether no step was lost and no file was wrong."""
    rng, work, url, start = random.Random(config.seed), Path(tempfile.mkdtemp(prefix="soak")), serve(), time.monotonic()
    reference_out, out = work / "whole", work / "out"
    reference = TrainingRun(config, url, reference_out)
    if reference.end():
        raise UserError(f"the undisturbed run failed: {reference.log.read_text()[-500:]}")
    usual, start, slowest, more = time.monotonic() - start, time.monotonic(), 0.0, True
    kinds: Counter[str] = Counter()
    faults = []
    tally = Counter({"blows": 0, "runs finished": 0, "files compared": 0, "steps lost": 0, "files wrong": 0})
    while more:
        more = tally["blows"] < config.blows if config.minutes is None else time.monotonic() < start + 60 * config.minutes
        if not (more or out.exists()):
            break
        first, run = saved_step(out), TrainingRun(config, url, out)
        if more:  # else let this run finish undisturbed
            wait_for_a_moment(run, out, rng, usual * (1 - first / config.steps / 2))
        struck_at, struck = run.step(), more and run.process.poll() is None
        blow_rng = random.Random(f"{config.seed} {tally['blows']}")  # the n-th blow of a seed is the same, whenever it comes
        trouble, name, seconds = strike(run, out, blow_rng) if struck else ("", "", 0.0)
        status, last, saved, wrong = run.end(), run.step(), saved_step(out), []
        lost = max(0, promised_step(config, trouble, status, first, struck_at, last) - saved)
        allowed = {os.EX_OK, *([os.EX_IOERR] if trouble in ON_DISK else []), *([BLOWS[name][2]] if name else [])}
        # Before its training loop a run has nothing to save, and may end with any status.
        early = struck_at < 0 and (name or trouble in ON_DISK)
        if status == os.EX_TEMPFAIL:
            slowest = max(slowest, seconds)
        if saved == config.steps:
            pairs = [(path, reference_out / path.name) for path in out.glob("*.safetensors")]
            files = [(path, expected) for path, expected in pairs if expected.exists()]
            wrong = [path.name for path, expected in files if not same_tensors(path, expected)]
            tally.update({"runs finished": 1, "files compared": len(files)})
            shutil.rmtree(out)
        kinds.update(filter(None, (trouble, name)))
        tally.update({"blows": struck, "steps lost": lost, "files wrong": len(wrong)})
        blow = " + ".join(filter(None, (trouble, name))) or "nothing"
        line = f"{tally['blows']:4} {blow:42} status {status:3}, step {saved:3} saved"
        print(line, flush=True)
        if lost or wrong or not (early or status in allowed):
            faults.append(f"{line}, {lost} lost, wrong {wrong}: {run.log.read_text()[-300:]}")
        if last >= 0 and "Traceback" in run.log.read_text():
            faults.append(f"{line}, a traceback: {run.log.read_text()[-2000:]}")
    summary = {"minutes": round((time.monotonic() - start) / 60, 1), **tally, "slowest end after a signal": round(slowest, 1)}
    print(json.dumps(summary | {"kinds": kinds, "answers to requests": Shards.answers, "faults": faults}, indent=1))
    if faults:
        print(f"logs and files are kept in {work}")
    else:
        shutil.rmtree(work)
    return not faults


if __name__ == "__main__":
    with one_line_errors("soak.py"):
        sys.exit(not main(parse_command("soak.py", SoakConfig, __doc__)))
