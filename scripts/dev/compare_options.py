"""What does an option change in the loss on pictures that were never trained on, for every band of timesteps?

    python scripts/dev/compare_options.py                              every variant, on the demo
    python scripts/dev/compare_options.py --variants min-snr all       these beside the default
    python scripts/dev/compare_options.py --steps 450 --out runs/long

A variant is a run of train_lora.py with flags of its own; model, pictures and --steps are the same for all. Each LoRA file is
then measured alike, whatever its run minimised: the plain mean squared error of ε, unweighted, at timesteps spread evenly over
the schedule, with noise that is the same for all. Writes table.md and table.json into --out. A run that is there already is not
repeated: after a change of the code, name another folder.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common.errors import UserError, one_line_errors
from common.options import Options, option
from options.command import parse_command

VARIANTS = {  # {name: flags}
    "default": "",
    "seed-1": "--seed 1",  # this one and the next show what is chance
    "seed-2": "--seed 2",
    "lr-4e-3": "--lr 4e-3",  # twice the demo's: is an option better than that?
    "logit-normal": "--timesteps logit-normal:0,1",
    "low-half": "--timesteps 0-500",
    "huber": "--loss huber:0.1",
    "huber-snr": "--loss huber-snr:0.1",
    "l1": "--loss l1",
    "min-snr": "--weighting min-snr:5",
    "soft-min-snr": "--weighting soft-min-snr:5",
    "debiased": "--weighting debiased",
    "offset": "--noise offset:0.05",
    "pyramid": "--noise pyramid:4,0.3",
    "perturbed": "--input-perturbation 0.1",
    "all": "--targets all",
    "style": "--targets style",
    "content": "--targets content",
    "rank-32": "--rank 32 --alpha 8",
    "rank-stabilised": "--rank 32 --alpha 8 --rank-stabilised",
    "lora-plus": "--lora-plus 16 --lr 5e-4",  # A at a quarter of the demo's rate, B at four times
    "max-norm": "--max-norm 1",
    "convolutions": "--conv-rank 4",
    "rank-dropout": "--rank-dropout 0.1",
    "dora": "--dora",
    "adamw": "--optimizer adamw",
    "lion8bit": "--optimizer lion8bit",
    "adafactor": "--optimizer adafactor",
    "prodigy": "--optimizer prodigy",
    "schedulefree": "--optimizer schedulefree",
    "muon": "--optimizer torch.optim.Muon",
    "cosine": "--lr-schedule cosine",
    "rex": "--lr-schedule rex",
    "wsd": "--lr-schedule wsd:0.2",
    "text-lr-full": "--text-encoder-lr 2e-3",  # the demo's --lr
    "text-until": "--text-encoder-until 0.5",
}


@dataclass(frozen=True)
class CompareConfig(Options):
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which ones to compare with the default."""
    steps: int = option(150, at_least=1)
    """Optimiser steps of every run."""
    timesteps: int = option(20, at_least=5, multiple_of=5)
    """At how many every picture is measured."""
    out: Path = Path("runs/compare")
    """Folder for the runs and the table."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu', 'mps'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.variants) - VARIANTS.keys():
            raise UserError(f"--variants {' '.join(sorted(unknown))}: choose from {' '.join(VARIANTS)}")


if __name__ == "__main__":
    COMMAND = parse_command("compare_options.py", CompareConfig, __doc__)

import json
import math
import os
import re
import subprocess
import time
from statistics import median

import numpy as np
import torch

from common.progress import SHOW_PROGRESS, tqdm
from dataset.sources import HELD_OUT, open_source
from evaluation.intervals import share_of
from evaluation.page import read_scalars
from evaluation.record import read_record
from evaluation.subject import Subject
from evaluation.validation import Probe
from lora_files.deltas import parameter_shapes
from lora_files.read import read_changes
from run.log import TAGS, markdown_table

BANDS_SHOWN = 5  # bands of timesteps in the table
TABLE_HEAD = [
    "",
    "all",
    *(f"{1000 * n // BANDS_SHOWN}–{1000 * (n + 1) // BANDS_SHOWN - 1}" for n in range(BANDS_SHOWN)),
    "‖ΔW‖",
    "s/step",
]


def run_variant(name: str, config: CompareConfig, bar: tqdm) -> Path:
    """Trains, and moves the bar. Returns the LoRA file. Raises UserError with the last line of a run that fails."""
    out, log, before = config.out / name, config.out / f"{name}.log", bar.n
    options = ["--steps", config.steps, "--save-every", config.steps, "--no-pictures", "--validate", "none"]
    options += ["--device", config.device, "--out", out, "--log-dir", out / "log", *VARIANTS[name].split()]
    command = [sys.executable, str(ROOT / "train_lora.py"), *map(str, options)]
    with log.open("wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, env=os.environ | {SHOW_PROGRESS: "1"})
    while process.poll() is None:
        time.sleep(0.5)
        steps = re.findall(rf" (\d+)/{config.steps} \[", log.read_text("utf-8", "replace"))
        bar.update(before + max(map(int, steps), default=0) - bar.n)
    bar.update(before + config.steps - bar.n)
    file = out / f"pytorch_lora_weights_{config.steps}.safetensors"
    if process.poll() or not file.is_file():
        raise UserError((log.read_text("utf-8", "replace").splitlines() or [f"exit status {process.poll()}"])[-1])
    return file


def in_columns(subject: Subject, probes: list[Probe], label: str) -> np.ndarray:
    """The losses of the model as it is now: [images, 1 + BANDS_SHOWN], over all timesteps and in each band."""
    losses = np.array(subject.losses(probes, label))
    return np.column_stack([losses.mean(axis=1), losses.reshape(len(losses), BANDS_SHOWN, -1).mean(axis=2)])


def norm_of_change(subject: Subject) -> float:
    """Frobenius norm of ΔW, over all layers."""
    changed = ((weight.cpu().float(), subject.base[name].float()) for name, weight in subject.weights.items())
    return math.sqrt(sum((now - before).square().sum().item() for now, before in changed))


def compare(own: np.ndarray, default: np.ndarray, base: np.ndarray) -> list[tuple[float, float] | None]:
    """For each column, how much further than the default a variant lowers the loss, as a share of what the default lowers it
    by, and half of its 95 % interval over the images; None where the default lowers nothing. Losses: [images, columns].
    """
    pairs = zip((default - own).T, (base - default).T, strict=True)
    shares = [share_of(further, lowered) if lowered.sum() > 0 else None for further, lowered in pairs]
    return [(share.mean, share.high - share.mean) if share else None for share in shares]


def row_of(name: str, result: dict) -> list[str]:
    """A row of the table. The base's and the default's show losses, the others what they changed."""
    title = f"`{VARIANTS[name]}`" if VARIANTS.get(name) else name
    if "failed" in result:
        return [title, result["failed"].replace("|", r"\|"), *[""] * (len(TABLE_HEAD) - 2)]
    cells = [f"{loss:.4f}" for loss in result["losses"]]
    if "compared" in result:
        cells = [f"{100 * share[0]:+.0f} %" if share else "–" for share in result["compared"]]
        if first := result["compared"][0]:
            cells[0] = f"{100 * first[0]:+.1f} ± {100 * first[1]:.1f} %"
    return [title, *cells, *(f"{result[key]:.2g}" if key in result else "" for key in ("norm_of_change", "seconds_per_step"))]


def write_results(config: CompareConfig, results: dict[str, dict], title: str) -> str:
    """Writes table.json and table.md, and returns the latter."""
    text = f"{title}\n\n{markdown_table([TABLE_HEAD, *(row_of(name, result) for name, result in results.items())])}\n"
    (config.out / "table.md").write_text(text, encoding="utf-8")
    content = json.dumps(
        {"title": title, "columns": TABLE_HEAD[1 : 2 + BANDS_SHOWN], "rows": results}, indent=1, ensure_ascii=False
    )
    (config.out / "table.json").write_text(content, encoding="utf-8")
    return text


def main(config: CompareConfig) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    subject, held_out = Subject("demo", config.device), open_source(str(HELD_OUT))
    probes = subject.probes(subject.stream(held_out, {}), range(held_out.samples), config.timesteps)
    title = f"{config.steps} steps, {len(probes)} held-out pictures × {config.timesteps} timesteps, {subject.device.type}, "
    title += f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    losses = {"base": in_columns(subject, probes, "base")}
    results: dict[str, dict] = {"base": {"losses": losses["base"].mean(axis=0).tolist()}}
    names = list(dict.fromkeys(["default", *config.variants]))
    bar = tqdm(total=config.steps * len(names), unit="step", leave=False)
    for name in names:
        bar.set_description(name)
        result = results[name] = {"flags": VARIANTS[name]}
        try:
            subject.merge(read_changes(run_variant(name, config, bar), parameter_shapes(subject.denoiser)))
        except UserError as error:
            if name == "default":
                raise
            result["failed"] = str(error)
        else:
            losses[name] = in_columns(subject, probes, name)
            readings = read_scalars(Path(read_record(config.out / name)["run"]["log_dir"]))[TAGS["seconds_per_step"]]
            result["losses"] = losses[name].mean(axis=0).tolist()
            result["norm_of_change"] = norm_of_change(subject)
            result["seconds_per_step"] = median(seconds for _, seconds in readings)
            if name != "default":
                result["compared"] = compare(losses[name], losses["default"], losses["base"])
        table = write_results(config, results, title)  # after every run, as a later one may be interrupted
        tqdm.write(" | ".join(filter(None, row_of(name, result))))
    bar.close()
    print(table)


if __name__ == "__main__":
    with one_line_errors("compare_options.py"):
        main(COMMAND)
