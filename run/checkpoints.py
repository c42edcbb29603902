"""The progress of a run: its LoRA files, its state, and what may have changed when it resumes from there."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import TolerantWriter, check_writable, lock_folder, suite_sources, write_atomically
from common.options import Resume
from dataset.sources import Source
from lora import Adapter
from lora_files.read import read_metadata
from lora_files.write import check_written, serialise
from memory import DTYPES
from options.optimiser import OptimiserConfig
from options.training import CheckpointConfig, DiffusionConfig, LoRAConfig, PriorConfig
from run.ending import Ending, RunFailed
from run.header import file_stem, step_header
from run.optimiser import Optimiser
from run.ranks import Ranks, leave_ranks
from run.state import find_state, find_states, save_state

LAYOUT_SUFFIXES = {  # --format: {layout of a file: what its name ends in, after the step}
    "kohya": {"kohya": ""},
    "diffusers": {"diffusers": ""},
    "both": {"diffusers": "_diffusers", "kohya": ""},  # the last is the newest: the one that most programs read
}

FOR_PEOPLE = ("samples", "record.json", "report.html")  # what else a run leaves in --out

MAX_SPOILT_STEPS = 3  # a sample that has spoilt so many is left out


@dataclass
class Run:
    """The progress of a run; stored with its state, so these names are those of every saved state."""

    log_dir: str
    step: int = 0
    samples: int = 0  # position in the data stream, over all ranks
    saved: tuple[str, ...] = ()  # LoRA files that this run has written and not yet removed
    bad_steps: int = 0  # in a row
    hits: dict[str, int] = field(default_factory=dict)  # {sample: how many steps it has spoilt}
    left_out: set[str] = field(default_factory=set)

    def advance(self, samples: int) -> None:
        """One step on `samples` samples of all ranks was made."""
        self.step, self.samples = self.step + 1, self.samples + samples

    def leave_out(self, samples: int) -> bool:
        """Leaves out the samples that have spoilt too many steps. Returns whether there are more than before.

        If that would be all `samples` of the data set, it adds none: then the samples are not the cause.
        """
        before = self.left_out
        spoilers = {name for name, count in self.hits.items() if count >= MAX_SPOILT_STEPS}
        self.left_out = before | spoilers if len(before | spoilers) < samples else before
        return len(self.left_out) > len(before)


class Checkpoints:
    """Saves and resumes one run. What the disk refuses to store is reported once, and tried again at the next save."""

    def __init__(
        self, config: CheckpointConfig, flags: dict[str, Any], policies: dict[str, Resume], source: Source, ranks: Ranks,
        adapter: Adapter, shapes: dict[str, torch.Size], optimiser: Optimiser, header: Callable[[], dict[str, str]],
    ):  # fmt: skip
        """`flags`: {name: value} of every option, and `policies` what each means on resume (common/options.py); `shapes`:
        {module path: shape of W} of the layers that a LoRA file may have weights for; `header`: `run_header`, which may read a
        whole model, so it is called once, for the first file.
        """
        self.config, self.flags, self.policies, self.source, self.ranks = config, flags, policies, source, ranks
        self.adapter, self.shapes, self.optimiser, self.header = adapter, shapes, optimiser, cache(header)
        self.made = provenance(flags, source, ranks.world)
        self.disk = TolerantWriter()
        self.saved_step = 0  # of the last attempt to save, or of the state that was loaded
        self.resumed = ""  # one line: from which state, and what has changed since
        self.state: Path | None = None  # folder of the state that was loaded

    def start_or_resume(self, log_dir: str) -> Run:
        """The beginning of a run with its log in `log_dir`, or what a saved state left. Rank 0 looks for the state.

        From here on no other run can write to --out. Raises UserError if one does, or if --out cannot be written.
        """
        if self.ranks.is_first:
            check_writable("--out", self.config.out)
            self.lock = lock_folder("--out", self.config.out)
        found = self.ranks.broadcast(self.find() if self.ranks.is_first else None)
        if not found or self.is_finished_other_run(found[1]):
            return Run(log_dir)
        self.state, state = found
        run, changes = self.restore(self.state, state, log_dir)
        self.saved_step, self.resumed = run.step, f"step {run.step} of {self.state}{changes}"
        return run

    def is_finished_other_run(self, state: dict) -> bool:
        """Whether --resume auto has found a run that is done, and that this command would not lengthen: it has other data, as
        when a caption was mended, or other options and no more steps. A new run begins, and `prepare_out` keeps the old files.
        """
        if self.config.resume != "auto" or self.config.resume_override or "made" not in state:
            return False
        flags, step = state["made"]["flags"], state["run"]["step"]
        changes = {name for name in changed(known_options(flags), self.made["flags"]) if self.policies[name] != "free"}
        return step >= flags["steps"] and bool(changes) and ("data" in changes or step >= self.made["flags"]["steps"])

    def nothing_to_do(self, run: Run) -> Ending:
        """The state has made all steps already."""
        if self.ranks.is_first:
            print(f"{self.state} is at step {run.step} already: raise --steps, or start anew with --resume none")
        leave_ranks()
        return Ending.FINISHED

    def find(self) -> tuple[Path, dict] | None:
        """The state to resume from.

        If torchrun or Slurm starts a command again, or --resume names a path, then what this very command has saved in --out
        comes first: its state says that it began with the same --resume.
        """
        resume, out = self.config.resume, self.config.out
        restarted = any(int(os.environ.get(count, 0)) for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
        if resume != "auto" and (restarted or resume != "none"):
            with suppress(UserError):  # nothing whole there
                own = find_state("auto", out)
                if own and own[1].get("made", {}).get("flags", {}).get("resume") == resume:
                    return own
        return find_state(resume, out)

    def belongs_to_out(self, state: Path) -> bool:
        """Whether a state is of a run in --out. Files and log of any other run are not ours to write."""
        return state.parent.resolve() == self.config.out.resolve()

    def prepare_out(self) -> None:
        """On rank 0: moves what another run has left in --out to a folder there, so that this run overwrites nothing of it."""
        if not self.ranks.is_first:
            return
        out = self.config.out
        loras = [path for path in sorted(out.glob("*.safetensors")) if is_ours(path)]  # --name may have been another
        paths = [*find_states(out), *loras, *(path for name in FOR_PEOPLE for path in out.glob(name))]
        if not paths or (self.state and self.belongs_to_out(self.state)):
            return
        folders = (out / f"before-{n}" for n in itertools.count(1))
        aside = next(folder for folder in folders if not folder.exists())
        aside.mkdir()
        for path in paths:
            path.replace(aside / path.name)
        print(f"aside      this is a new run: what another has left in {out} is in {aside} now", flush=True)

    def serialise(self, step: int) -> Iterator[tuple[str, bytes, torch.Tensor | None]]:
        """Name, content and weights (Adapter.in_use) of each LoRA file at `step`."""
        name = self.config.name
        header = self.header() | step_header(name, step)
        live, dtype = self.adapter, DTYPES[self.config.save_dtype]
        for average, weights in live.in_use().items():
            for layout, suffix in LAYOUT_SUFFIXES[self.config.format].items():
                with live.holding(weights):
                    content = serialise(live.deltas, header, layout, dtype, live.magnitudes)
                yield f"{file_stem(name, step)}{average}{suffix}.safetensors", content, weights

    def describe_file(self, step: int) -> str:
        """Name and size that the LoRA file will have."""
        *_, (name, content, _) = self.serialise(step)
        return f"{self.config.out / name}, {len(content) / 1e6:.2f} MB"

    def is_due(self, step: int, last: int) -> bool:
        return step % int(self.config.save_every) == 0 or step == last

    def check_ranks(self, run: Run) -> None:
        """Raises RunFailed if the ranks no longer hold the same LoRA."""
        if name := self.ranks.first_difference(self.adapter.masters):
            raise RunFailed(
                f"step {run.step}: the ranks no longer hold the same LoRA, {name} is the first that differs: not saved"
            )

    def save(self, run: Run) -> float | None:
        """Compares the ranks, then rank 0 writes. Returns the largest difference of a file's weights from the live ones; None
        if the disk refused, and on the other ranks. Raises RunFailed if the ranks differ.
        """
        self.check_ranks(run)
        self.saved_step = run.step
        return self.disk("the checkpoint", partial(self.write, run)) if self.ranks.is_first else None

    def save_if_needed(self, run: Run) -> float | None:
        """`save`, if the last step is not saved or the disk refused it."""
        return self.save(run) if self.ranks.any(run.step != self.saved_step or self.disk.failed) else None

    def write(self, run: Run) -> float:
        """Writes the LoRA files, checks them, and writes the state of the run; then removes what this run wrote beyond the
        --keep newest. Returns the largest difference of a file's weights from the live ones.

        Raises OSError, and UserError if the weights are not finite or a file does not read back as they are.
        """
        out, live, errors = self.config.out, self.adapter, []
        dtype, consequence = DTYPES[self.config.save_dtype], "the last one was kept"

        def check(written: Path) -> None:
            errors.append(check_written(written, self.shapes, live.deltas, dtype, consequence, live.magnitudes))

        files: dict[str, bytes] = {}
        for name, content, weights in self.serialise(run.step):
            with live.holding(weights):
                write_atomically(out / name, content, check)
            files[name] = content
        run.saved = (*(name for name in run.saved if name not in files), *files)
        state = {"lora": self.adapter.flat, "layers": list(self.adapter.modules), **self.optimiser.state_dict()}
        state |= {"run": asdict(run), "made": self.made}
        save_state(out, state, files)  # it still names the files removed below: killed here, the next save removes them
        kept = run.saved[-self.config.keep * len(files) :] if self.config.keep else run.saved
        partly_written = out.glob(f".{self.config.pattern}")  # by a process that was killed
        for old in (*(out / name for name in run.saved if name not in kept), *partly_written):
            old.unlink(missing_ok=True)
        run.saved = kept
        return max(errors)

    def restore(self, path: Path, state: dict, log_dir: str) -> tuple[Run, str]:
        """Loads a saved state. Returns the run, and what has changed since the state was made. The run continues its log, or
        has a new one in `log_dir` if --log-dir or --out have changed.

        Raises UserError if it is not ours, or of a run that this one cannot continue.
        """
        if not {"lora", "layers", "optimizer", "scaler", "run", "made"} <= state.keys():
            raise UserError(f"--resume {path}: this is no state of train_lora.py")
        before = known_options(state["made"]["flags"])
        flags = changed(before, self.made["flags"], "--")
        beyond = changed(state["made"]["beyond"], self.made["beyond"])
        fixed = [change for name, change in flags.items() if self.policies[name] == "fixed"]
        if not fixed and state["layers"] != list(self.adapter.modules):
            fixed = ["LoRA on other layers"]
        if fixed:
            raise UserError(f"{path} does not fit: {', '.join(fixed)}: change it back, or another --out, or --resume none")
        not_free = ", ".join(change for name, change in flags.items() if self.policies[name] != "free")
        if not_free and not self.config.resume_override:
            ways = "change it back, or --resume-override to go on with it, or --resume none to start anew"
            raise UserError(f"{path} is of another run: {not_free}: {ways}")
        self.adapter.load(state["lora"])
        self.optimiser.load_state_dict(state)
        run = Run(**state["run"])
        rates = self.optimiser.change_of_rates(run.step, before)
        if not self.belongs_to_out(path):
            run.saved = ()
        if not self.belongs_to_out(path) or "log_dir" in flags:
            run.log_dir = log_dir
        changes = "".join(f"; {change}" for change in [*flags.values(), *rates, *beyond.values()])
        return run, changes + ("; no longer bit for bit" if "processes" in beyond else "")


def is_ours(path: Path) -> bool:
    """Whether a .safetensors file is a LoRA that this suite has trained."""
    with suppress(UserError, OSError):
        return "sdxl_lora.config" in read_metadata(path)
    return False


def provenance(flags: dict[str, object], source: Source, world: int) -> dict:
    """What a state was made with: every flag, with what the data are in place of their path; and what is no flag."""
    suite = hashlib.sha256(b"".join(path.read_bytes() for path in suite_sources()))
    beyond = {"processes": world, "torch": str(torch.__version__), "suite": suite.hexdigest()[:8]}
    return {"flags": flags | {"data": source.identity()}, "beyond": beyond}


def known_options(flags: dict[str, Any]) -> dict[str, Any]:
    """The options of a saved state. One that knows less of LoRA, the objective, the prior or the optimiser had their defaults;
    --snr-gamma was the name of a weighting, and both text encoders had one rate.
    """
    gamma = flags.get("snr_gamma")
    weighting = {"weighting": f"min-snr:{gamma:g}"} if gamma else {}
    known = asdict(LoRAConfig()) | asdict(DiffusionConfig()) | asdict(PriorConfig()) | asdict(OptimiserConfig())
    rate = flags.get("text_encoder_lr")
    trained = flags.get("train_text_encoder", True)
    one_rate = {"text_encoder_lr": (rate if trained else 0.0,)} if isinstance(rate, float) else {}
    return known | weighting | flags | one_rate


def changed(old: dict, new: dict, prefix: str = "") -> dict[str, str]:
    """{name: 'name old -> new'} of what differs; a name that an older state does not know has not changed."""
    differ = {name: value for name, value in new.items() if name in old and old[name] != value}
    return {name: f"{prefix}{name.replace('_', '-')} {old[name]} -> {value}" for name, value in differ.items()}
