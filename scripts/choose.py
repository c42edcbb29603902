"""Which checkpoint, at which strength? Measures every LoRA of a run on pictures that it never saw, and looks at its own.

    python scripts/choose.py checkpoints/                          the run's own kept-out pictures: a table, and choose.png
    python scripts/choose.py checkpoints/ --data held-out/ --strengths 0.6 0.8 1.0
    python scripts/choose.py checkpoints/ --take 300               copies step 300 to checkpoints/NAME.safetensors

All are measured at the same noise, with the same prompts and seeds. It advises: look at the pictures, and choose yourself.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import check_options, option
from options.command import parse_arguments, parse_command
from options.training import TrainCommand


@dataclass(frozen=True)
class ChooseConfig:
    folder: Annotated[Path, tyro.conf.Positional] = Path("checkpoints")
    """LoRA files of one run; the last one of each step counts."""
    data: str | None = None
    """Pictures of the style that were kept out of training, with captions. None: those that the run kept out itself."""
    strengths: tuple[float, ...] = option((0.4, 0.6, 0.8, 1.0, 1.2), above=0)
    """Strengths of every LoRA: W + strength·ΔW."""
    pictures: int = option(4, at_least=0)
    """Number of prompts to draw with two seeds each, and to look for in the pictures; 0: the losses alone."""
    timesteps: int = option(10, at_least=1)
    """Number of timesteps at which the loss of every picture is computed."""
    take: int | None = None
    """Only copies the file of this step to NAME.safetensors in the folder."""
    model: str | None = None
    """None: the model that the LoRA were trained on."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu', 'mps'."""

    def __post_init__(self) -> None:
        check_options(self)
        if not self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise UserError("--strengths: name one or more different ones")


if __name__ == "__main__":
    COMMAND = parse_command("choose.py", ChooseConfig, __doc__)

from PIL import Image, ImageDraw

from common.files import write_atomically
from common.progress import tqdm
from common.sheets import grid, lettering, png_bytes
from data import open_data
from dataset.sources import open_source
from evaluation.examination import Examination, Record
from evaluation.record import read_record
from evaluation.subject import Subject, options_of
from evaluation.validation import MOST_KEPT_OUT
from evaluation.verdict import StepFigures, best_cell, figures, is_sound, percent
from lora_files.deltas import parameter_shapes
from lora_files.read import read_lora, read_metadata, trained_on, training_steps
from model.prompts import from_header
from run.held_out import HeldOut, hold_out

STRIP = 128  # pixels: width of a cell without a picture


def by_step(folder: Path) -> dict[int, Path]:
    """{step: its LoRA file, of --format both the one that most programs read, of --ema that without it}. Raises UserError if
    there is none.
    """
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: -len(path.name))  # the others have a longer name
    files = {training_steps(path)[0]: path for path in paths if path.stem != taken_name(folder)}
    if not (found := {step: files[step] for step in sorted(files) if step > 0}):
        raise UserError(f"{folder}: no LoRA files of train_lora.py there, with their step in the header")
    return found


def taken_name(folder: Path) -> str:
    """Of the file that --take writes: the LoRA's, or that of the folder."""
    return read_record(folder).get("run", {}).get("name") or folder.resolve().name


def take(folder: Path, step: int) -> None:
    files = by_step(folder)
    if step not in files:
        raise UserError(f"--take {step}: there are steps {', '.join(map(str, files))} in {folder}")
    target = folder / f"{taken_name(folder)}.safetensors"
    write_atomically(target, files[step].read_bytes())
    print(f"{target} is step {step} now")


def data_of_run(folder: Path) -> HeldOut:
    """What the run that wrote the folder was trained on, and what it kept out. Raises UserError if that cannot be told."""
    advice = "name a folder of pictures that it was not trained on by --data"
    log_dir = read_record(folder).get("run", {}).get("log_dir", "")
    if not log_dir or not (file := Path(log_dir) / "config.toml").is_file():
        raise UserError(f"{folder} does not say which pictures its run kept out: {advice}")
    config = parse_arguments(TrainCommand, ["--config", str(file)]).run
    held_out = hold_out(config, open_data(config.dataset, config.caption_files))
    if not held_out.numbers:
        raise UserError(f"the run of {folder} kept no pictures out: {advice}")
    return held_out


def percent_of(found: StepFigures) -> str:
    return percent(found.improvement) if found.improvement else ""


def with_figures(image: Image.Image | None, found: StepFigures, chosen: bool) -> Image.Image:
    """A picture above a strip, whose colour is the improvement; without a picture the strip alone."""
    gain = found.improvement.mean if found.improvement else 0.0
    width = image.width if image else STRIP
    font, height = lettering(width / 12), width // 4
    cell = Image.new("RGB", (width, height + (image.height if image else 0)), "white")
    if image:
        cell.paste(image, (0, 0))
    draw, top, share = ImageDraw.Draw(cell), cell.height - height, min(1.0, max(0.0, gain))
    colour = (round(255 - 190 * share), round(255 - 90 * share), round(255 - 120 * share))  # from white to green
    draw.rectangle((0, top, width, cell.height), fill=colour)
    font.write(draw, (4, top + 2), f"{gain:.0%} less error", "black")
    seen = f"{found.prompts.mean:.0%} seen" if found.prompts else ""
    notes = ["chosen"] * chosen + ["too far"] * (not is_sound(found))
    font.write(draw, (4, top + height // 2), ", ".join(filter(None, [seen, *notes])), "black")
    return cell


def main(config: ChooseConfig) -> None:
    files = by_step(config.folder)
    if config.take is not None:
        take(config.folder, config.take)
        return
    last = list(files.values())[-1]
    options = options_of(last)
    run = None if config.data else data_of_run(config.folder)
    kept_out = run.kept_out if run else open_source(str(config.data))
    assert kept_out is not None
    subject = Subject(config.model or trained_on(last), config.device)
    shapes = parameter_shapes(subject.denoiser)
    deltas = {step: read_lora(path, shapes) for step, path in files.items()}
    trained = subject.stream(run.training, options) if run else None
    numbers = run.numbers if run else range(min(MOST_KEPT_OUT, kept_out.samples))
    examination = Examination(subject, subject.stream(kept_out, options), numbers, trained, config.timesteps)
    print(f"{len(files)} files × {len(config.strengths)} strengths on {len(numbers)} pictures that were kept out", flush=True)
    drawn = [prompt.text for prompt in from_header(last, read_metadata(last))]  # by the run
    base = examination.of_base(examination.texts(drawn, config.pictures))
    records: dict[float, Record] = {strength: deepcopy(base) for strength in config.strengths}
    cells = {(step, strength): None for step in files for strength in config.strengths}
    first: dict[tuple[int, float], Image.Image | None] = {}
    for step, strength in tqdm(cells, desc="files", unit="file"):
        images = examination.of_lora(records[strength], step, deltas[step], strength)
        first[step, strength] = images[0] if images else None
    found = {(step, strength): figures(records[strength], step) for step, strength in cells}
    chosen = best_cell(records, found)
    for (step, strength), cell in found.items():
        tells = "; ".join(tell.sentence for tell in cell.tells)
        seen = f", {cell.prompts.mean:.0%} seen" if cell.prompts else ""
        mark = "  <- chosen" if (step, strength) == chosen else ""
        print(f"step {step:6} × {strength:<4g} {percent_of(cell)}{seen}  {tells}{mark}")
    rows = [[with_figures(first[s, x], found[s, x], (s, x) == chosen) for x in config.strengths] for s in files]
    title = examination.prompts[0].text if examination.prompts else "less error than the base"
    sheet = grid(rows, [f"× {x:g}" for x in config.strengths], [f"step {s}" for s in files], title)
    write_atomically(config.folder / "choose.png", png_bytes(sheet))
    if chosen:
        step, strength = chosen
        print(f"step {step} at strength {strength:g}: {percent_of(found[chosen])} less error than the base")
        print(f"take it    python scripts/choose.py {config.folder} --take {step}")
    else:
        print("every file went too far: train again with a smaller --lr, and save more often")
    print(f"look       {config.folder / 'choose.png'}")


if __name__ == "__main__":
    with one_line_errors("choose.py"):
        main(COMMAND)
