"""Where a run stands: its LoRA files, its state, and what may have changed when it goes on from there."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from common.errors import UserError
from common.files import suite_sources, write_atomically
from common.options import Resume, check_options, option
from lora_files.write import check_written, make_header, serialise
from memory import DTYPES
from run.state import find_state, find_states, save_state


@dataclass(frozen=True)
class CheckpointConfig:
    save_every: int = option(150, at_least=1, resume="free")
    """Steps between checkpoints; the last step is always saved."""
    format: Literal["kohya", "diffusers", "both"] = option("kohya", resume="free")
    """Layout of the LoRA files. kohya is read by diffusers, ComfyUI and A1111; diffusers' own by few others."""
    save_dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", resume="free")
    """Dtype of the weights in the files."""
    keep: int | None = option(None, at_least=1, resume="free")
    """Newest LoRA files of this run to keep. None: all, as the best is often not the last."""
    out: Path = option(Path("checkpoints"), resume="free")
    """Folder for LoRA files and the state of the run."""
    resume: str = option("auto", resume="free")
    """'auto' (go on from the newest whole state in --out), 'none' (what is there is moved aside), or a state or the folder
    of a run."""
    resume_override: bool = option(False, resume="free")
    """Go on although options differ from those of the state, with the new ones."""

    def __post_init__(self) -> None:
        check_options(self)


LAYOUT_SUFFIXES = {  # --format: {layout: what its file is called after the step}
    "kohya": {"kohya": ""},
    "diffusers": {"diffusers": ""},
    "both": {"kohya": "", "diffusers": "_diffusers"},
}

HITS = 3  # steps that a sample may spoil before it is left out


@dataclass
class Run:
    """Where a run stands; stored with its state."""

    log_dir: str
    step: int = 0
    samples: int = 0  # of the data stream, over all ranks
    saved: tuple[str, ...] = ()  # LoRA files that this run has written and not yet removed
    bad_steps: int = 0  # in a row
    hits: dict[str, int] = field(default_factory=dict)  # {sample: how many steps it has spoilt}
    left_out: set[str] = field(default_factory=set)

    def leave_out(self, samples: int) -> bool:
        """Leaves out those of all `samples` that have spoilt too many steps. Are there more now?

        Not if that is all of them: then it is not theirs.
        """
        before = self.left_out
        spoilers = {name for name, count in self.hits.items() if count >= HITS}
        self.left_out = before | spoilers if len(before | spoilers) < samples else before
        return len(self.left_out) > len(before)


class Checkpoints:
    """Of one run: `flags` are all of its options and `policies` what each means on resume (common/options.py), `source` its
    images, `world` its processes, `shapes` those of the layers that a LoRA file may have weights for.
    """

    def __init__(
        self, config: CheckpointConfig, flags: dict[str, object], policies: dict[str, Resume], source, world: int, adapter,
        shapes: dict[str, torch.Size], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    ):  # fmt: skip
        self.config, self.flags, self.policies, self.source = config, flags, policies, source
        self.adapter, self.shapes, self.optimizer, self.scaler = adapter, shapes, optimizer, scaler
        self.made = provenance(flags, source.fingerprint, world)

    def find(self) -> tuple[Path, dict] | None:
        """The state to go on from. What this command has saved before counts more than where --resume told it to begin: the
        state in --out if that began with the same --resume PATH, or none, and torchrun or Slurm starts it again.
        """
        resume, out = self.config.resume, self.config.out
        again = any(int(os.environ.get(count, 0)) for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
        if resume != "auto" and (again or resume != "none"):
            with suppress(UserError):  # nothing whole there
                own = find_state("auto", out)
                if own and own[1].get("made", {}).get("flags", {}).get("resume") == resume:
                    return own
        return find_state(resume, out)

    def in_out(self, state: Path) -> bool:
        """Else it is another run's, whose files and log are not ours."""
        return state.parent.resolve() == self.config.out.resolve()

    def set_aside(self) -> Path | None:
        """Moves what another run has left in --out to a folder there, as files of this one would take the place of it."""
        out = self.config.out
        left = [*find_states(out), *sorted(out.glob("pytorch_lora_weights_*"))]
        if not left:
            return None
        aside = next(folder for n in itertools.count(1) if not (folder := out / f"before-{n}").exists())
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        return aside

    def serialise(self, step: int) -> Iterator[tuple[str, bytes]]:
        """Name and content of each LoRA file at `step`."""
        about = make_header(self.flags, self.source.samples, step) | {"sdxl_lora.dataset": self.source.fingerprint}
        deltas, dtype = self.adapter.deltas, DTYPES[self.config.save_dtype]
        for layout, suffix in LAYOUT_SUFFIXES[self.config.format].items():
            yield f"pytorch_lora_weights_{step}{suffix}.safetensors", serialise(deltas, about, layout, dtype)

    def save(self, run: Run) -> float:
        """Writes the LoRA files, checks them, and writes the state of the run; then removes what this run wrote beyond the
        --keep newest. Returns the largest difference of a file's weights from the live ones. Raises OSError.
        """
        out, files, errors = self.config.out, dict(self.serialise(run.step)), []
        dtype, otherwise = DTYPES[self.config.save_dtype], "the last one was kept"

        def check(written: Path) -> None:
            errors.append(check_written(written, self.shapes, self.adapter.deltas, dtype, otherwise))

        for name, content in files.items():
            write_atomically(out / name, content, check)
        run.saved = (*(name for name in run.saved if name not in files), *files)
        state = {"lora": self.adapter.flat, "layers": list(self.adapter.modules), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), "run": asdict(run), "made": self.made}
        save_state(out, state, files)  # with the names of those that go now: killed here, the next save removes them
        kept = run.saved[-self.config.keep * len(files) :] if self.config.keep else run.saved
        for old in (*(out / name for name in run.saved if name not in kept), *out.glob(".pytorch_lora_weights_*")):
            old.unlink(missing_ok=True)  # and what a killed write has left
        run.saved = kept
        return max(errors)

    def restore(self, path: Path, state: dict, log_dir: str) -> tuple[Run, str]:
        """Puts a saved state back. Returns it with a line on what has changed since it was made. It goes on with its log, or
        with a new one in `log_dir` if --log-dir or --out have changed.

        Raises UserError if it is not ours, or of a run that this one cannot go on from.
        """
        if not {"lora", "layers", "optimizer", "scaler", "run", "made"} <= state.keys():
            raise UserError(f"--resume {path}: this is no state of train_lora.py")
        flags = changed(state["made"]["flags"], self.made["flags"], "--")
        beyond = changed(state["made"]["beyond"], self.made["beyond"])
        never = [told for name, told in flags.items() if self.policies[name] == "fixed"]
        if never or state["layers"] != list(self.adapter.modules):
            raise UserError(f"{path} does not fit: {', '.join(never)}: change it back, or another --out, or --resume none")
        differ = [told for name, told in flags.items() if self.policies[name] != "free"]
        if differ and not self.config.resume_override:
            told = ", ".join(differ)
            raise UserError(f"{path} is of another run: {told}: change it back, or another --out, or --resume-override")
        self.adapter.flat.copy_(state["lora"])
        self.adapter.refresh()
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run so far was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        run = Run(**state["run"])
        if not self.in_out(path):
            run.saved = ()
        if not self.in_out(path) or "log_dir" in flags:
            run.log_dir = log_dir
        told = "".join(f"; {change}" for change in [*flags.values(), *beyond.values()])
        return run, told + ("; no longer bit for bit" if "processes" in beyond else "")


def provenance(flags: dict[str, object], fingerprint: str, world: int) -> dict:
    """What a state is made with: every flag, with the content of the data in place of its path; and beyond the flags."""
    suite = hashlib.sha256(b"".join(path.read_bytes() for path in suite_sources()))
    beyond = {"processes": world, "torch": str(torch.__version__), "suite": suite.hexdigest()[:8]}
    return {"flags": flags | {"data": f"files {fingerprint[:8]}"}, "beyond": beyond}


def changed(was: dict, now: dict, flag: str = "") -> dict[str, str]:
    """{name: 'name was -> now'} of what differs; a name that an older state does not know has not changed."""
    differ = {name: value for name, value in now.items() if name in was and was[name] != value}
    return {name: f"{flag}{name.replace('_', '-')} {was[name]} -> {value}" for name, value in differ.items()}
