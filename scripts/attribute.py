"""Which training pictures spoil a LoRA? Ranks them by how much learning more of each helps pictures that it never saw.

    python scripts/attribute.py my-pictures/                         the run in checkpoints/, and what it kept out
    python scripts/attribute.py my-pictures/ --lora naruto.safetensors --held-out held-out/

100 %: as much as another picture of the held-out ones would; 0 %: not at all; below: it makes them worse. Writes influence.png,
the least helpful first, and influence.csv with all bands of timesteps. It takes as long as training on each picture 30 times.
What comes first need not be wrong: docs/evaluation.md says what it may mean.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import Options
from options.command import parse_command
from options.training import CaptionFilesConfig, DataConfig, LoRAConfig, TrainConfig, ValidationConfig


@dataclass(frozen=True)
class AttributeConfig(Options):
    data: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What the LoRA was trained on: the values of train_lora.py's --data. None given: demo."""
    lora: Path = Path("checkpoints")
    """A folder of LoRA files: the newest and two earlier ones of its run, which is surer; or one file, which is faster."""
    held_out: str | None = None
    """Pictures of the style that were kept out of training, with captions. None: those that the run kept out itself."""
    caption_files: CaptionFilesConfig = CaptionFilesConfig()
    model: str | None = None
    """None: the model that the LoRA was trained on."""
    out: Path = Path("influence.png")
    """File for the sheet; the table lies beside it, as .csv."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu', 'mps'."""


if __name__ == "__main__":
    COMMAND = parse_command("attribute.py", AttributeConfig, __doc__)

import re

import numpy as np

from common.files import check_writable, write_atomically
from common.sheets import png_bytes
from data import open_data
from evaluation.influence import as_csv, rank, sentences_about, sheet_of
from evaluation.subject import Subject, options_of
from evaluation.validation import BANDS
from lora import Adapter, add_lora, linear_layers
from lora_files.deltas import Deltas, parameter_shapes
from lora_files.read import newest_lora, read_lora, read_metadata, trained_on, training_steps
from performance.checkpointing import block_names, checkpoint_blocks
from run.held_out import HeldOut, hold_out, of_folder
from run.lineage import begin_from

MOST_FILES, MOST_SHOWN = 3, 60  # of a run that are compared; pictures on the sheet


def trained_and_held_out(config: AttributeConfig, lora: Path, options: dict[str, Any]) -> HeldOut:
    """What the LoRA was trained on, and what was not. `options`: of its run. Raises UserError if that cannot be told."""
    dataset = DataConfig(data=config.data)
    known: dict[str, Any] = {}
    source = open_data(dataset, config.caption_files)
    if source.fingerprint == read_metadata(lora).get("sdxl_lora.dataset"):
        known = {name: options[name] for name in ("steps", "epochs", "seed") if name in options}
        known["validation"] = ValidationConfig(validate=options.get("validate"))
    elif config.held_out:
        print(f"careful: {lora} was trained on other pictures than these, or does not say on which")
    else:
        raise UserError(f"{lora} does not say that it was trained on these: name pictures that it never saw by --held-out")
    run = TrainConfig(dataset=dataset, caption_files=config.caption_files, **known)
    try:
        data = of_folder(run, source, config.held_out) if config.held_out else hold_out(run, source)
    except UserError as error:
        raise UserError(str(error).replace("--validate", "--held-out")) from None
    if not data.numbers:
        raise UserError("the run kept no pictures out: name some of the style that it never saw by --held-out")
    return data


def files_of(path: Path) -> list[Path]:
    """`path` if it is a file; of a folder the newest file and up to two earlier ones of its run, evenly spread."""
    newest = newest_lora(path)
    dataset, folder = read_metadata(newest).get("sdxl_lora.dataset"), sorted(path.glob("*.safetensors"))
    by_step = {training_steps(file)[0]: file for file in folder if dataset == read_metadata(file).get("sdxl_lora.dataset")}
    files = [file for _, file in sorted(by_step.items())] if dataset and path.is_dir() else [newest]
    return [files[int(n)] for n in np.linspace(0, len(files) - 1, min(MOST_FILES, len(files))).round()]


def come_alive(subject: Subject, linear: Deltas) -> Adapter:
    """Layers for a LoRA such as this one, whose A and B get gradients."""
    widest, alpha = max((len(A), alpha) for A, _, alpha in linear.values())
    config = LoRAConfig(rank=widest, alpha=alpha, targets=f"^({'|'.join(map(re.escape, linear))})$")
    adapter = add_lora(subject.denoiser, config, dtype=subject.denoiser.unet.dtype)
    if subject.device.type == "cuda":  # a third slower, but 1024 × 1024 pixels take little more than the model
        checkpoint_blocks(subject.denoiser, block_names(subject.denoiser))
    return adapter


def main(config: AttributeConfig) -> None:
    files = files_of(config.lora)
    options = options_of(files[-1])
    if (base := options.get("base_lora")) and not config.model:
        raise UserError(f"{files[-1]} needs {base[0]}: merge that into its model by merge_lora.py, and name that by --model")
    check_writable("the folder of --out", config.out.parent)
    data = trained_and_held_out(config, files[-1], options)
    subject = Subject(config.model or trained_on(files[-1]), config.device, fast=False)
    loras = [read_lora(file, parameter_shapes(subject.denoiser)) for file in files]
    if not loras[-1].keys() <= linear_layers(subject.denoiser).keys():
        raise UserError(f"{files[-1]} changes more than linear layers, and only a LoRA of these can be compared")
    assert data.kept_out is not None
    stream = subject.stream(data.training, options)
    held_out = subject.probes(subject.stream(data.kept_out, options), data.numbers, BANDS)
    probes = subject.probes(stream, range(data.training.samples), BANDS)
    adapter = come_alive(subject, loras[-1])
    shown = f"{len(files)} files to {files[-1]}" if len(files) > 1 else files[-1]
    print(f"{shown}: {len(probes)} pictures against {len(held_out)} {data.line}", flush=True)
    loading = (begin_from(adapter, deltas) for deltas in loras if deltas.keys() == loras[-1].keys())
    ranked = rank(probes, held_out, loading, subject, adapter)
    print("\n".join(sentences_about(ranked)))
    write_atomically(config.out.with_suffix(".csv"), as_csv(ranked))
    write_atomically(config.out, png_bytes(sheet_of(ranked[:MOST_SHOWN], stream, subject)))
    print(f"look       {config.out}, the least helpful first; all figures are in {config.out.with_suffix('.csv')}")


if __name__ == "__main__":
    with one_line_errors("attribute.py"):
        main(COMMAND)
