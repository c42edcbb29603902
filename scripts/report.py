"""Writes the page of a run, report.html, into its folder: what it has learned, its pictures, its curves and its data.

    python scripts/report.py checkpoints
    python scripts/report.py checkpoints --log-dir runs/20261127-133017      where its log is by now

train_lora.py does so at every save. Of a run without record.json it shows what its LoRA files, samples and log hold.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from options.command import parse_command


@dataclass(frozen=True)
class PageConfig:
    out: Annotated[Path, tyro.conf.Positional] = Path("checkpoints")
    """The folder of the run: train_lora.py's --out."""
    log_dir: Path | None = None
    """The TensorBoard log of this run. None: where the run has written it."""


if __name__ == "__main__":
    COMMAND = parse_command("report.py", PageConfig, __doc__)

import json
from contextlib import suppress

from common.files import sha256_of
from common.options import flat_options
from evaluation.page import read_scalars, write_page
from evaluation.record import PAGE_FILE, read_record
from lora_files.read import read_metadata
from model.prompts import Prompt, from_header
from model.render import SAMPLE_GUIDANCE, SAMPLE_STEPS
from options.training import TrainConfig
from run.state import find_state

USUAL = Prompt("", seed=0, steps=SAMPLE_STEPS, guidance=SAMPLE_GUIDANCE)


def record_of_files(out: Path) -> dict:
    """The record of a run that has written none: what its files say. Raises UserError if there are none."""
    headers: dict[int, tuple[Path, dict[str, str], dict]] = {}
    for path in sorted(out.glob("*.safetensors"), reverse=True):  # of --format both: name_diffusers, then name, which stays
        with suppress(UserError, KeyError, ValueError, TypeError):  # another program's, or damaged
            metadata = read_metadata(path)
            headers[int(metadata["sdxl_lora.step"])] = path, metadata, dict(json.loads(metadata["sdxl_lora.config"]))
    pictures = pictures_of_run(out / "samples")
    if not headers and not pictures:
        raise UserError(f"{out} holds no record.json, LoRA or samples of train_lora.py: name the --out of a run")
    newest, metadata, options = headers[max(headers)] if headers else (out, {}, {})
    defaults = json.loads(json.dumps(flat_options(TrainConfig())))
    step = max([*headers, *(int(key) for key in pictures if key != "base")], default=0)
    prompts = [prompt.filled(i, USUAL).given() for i, prompt in enumerate(from_header(newest, metadata))]
    prompts += [{"text": f"prompt {i + 1}"} for i in range(len(prompts), max(map(len, pictures.values()), default=0))]
    run = {key: options[key] for key in ("name", "model", "trigger") if options.get(key)} | {
        "step": step,
        "steps": options.get("steps", step),
        "images_per_step": options.get("bs", 0) * options.get("grad_accum", 1),
        "epoch": int(metadata.get("ss_num_train_images", 0)),
        "changed": {key: value for key, value in options.items() if defaults.get(key, value) != value},
    }
    files = {str(n): {"name": path.name, "sha256": sha256_of(path.read_bytes())} for n, (path, *_) in sorted(headers.items())}
    with suppress(UserError, OSError):
        if found := find_state("auto", out):
            run["log_dir"] = found[1]["run"]["log_dir"]
    return {"run": run, "files": files, "prompts": prompts, "pictures": pictures}


def pictures_of_run(samples: Path) -> dict[str, list[dict | None]]:
    """{"base" or step: its pictures, by the number of the prompt}."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(samples.glob("step-*.png"), reverse=True):  # the first picture of the base comes last, and stays
        if match := re.fullmatch(r"step-(\d+)-p(\d+)-(base|lora)", path.stem):
            key = "base" if match[3] == "base" else str(int(match[1]))
            found.setdefault(key, {})[int(match[2])] = {"file": f"{samples.name}/{path.name}"}
    count = max((number for drawn in found.values() for number in drawn), default=0)
    return {key: [drawn.get(number) for number in range(1, count + 1)] for key, drawn in found.items()}


def main(config: PageConfig) -> None:
    out = config.out
    record = read_record(out) or record_of_files(out)
    log_dir = config.log_dir or record["run"].get("log_dir")
    scalars = read_scalars(Path(log_dir)) if log_dir else {}
    if config.log_dir and not scalars:
        raise UserError(f"--log-dir {log_dir} holds no TensorBoard log: name the folder of one run, as runs/20261127-133017")
    try:
        write_page(out, record, scalars)
    except OSError as error:
        raise UserError(f"{out / PAGE_FILE} cannot be written: {error.strerror}") from None
    print(f"page       {out / PAGE_FILE}{'' if scalars else ', without curves: no log was found, --log-dir names it'}")


if __name__ == "__main__":
    with one_line_errors("report.py"):
        main(COMMAND)
