"""Which training pictures spoil a LoRA? Ranks them by how much learning more of each helps pictures that it never saw.

    python scripts/attribute.py my-pictures/                         the newest LoRA in checkpoints/, what its run kept out
    python scripts/attribute.py my-pictures/ --lora naruto.safetensors --held-out held-out/

100 %: as much as another picture of the held-out ones would; 0 %: not at all; below: it makes them worse. Writes influence.png,
the least helpful first, and influence.csv with all bands of timesteps. It takes as long as training on each picture ten times.
What comes first need not be wrong: look at it. docs/evaluation.md says what it may mean.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import Options, option
from options.command import parse_command
from options.training import CaptionFilesConfig, DataConfig, LoRAConfig, TrainConfig, ValidationConfig


@dataclass(frozen=True)
class AttributeConfig(Options):
    data: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What the LoRA was trained on: the values of train_lora.py's --data. None given: demo."""
    lora: Path = Path("checkpoints")
    """A LoRA file, or a folder of them: the newest one in it."""
    held_out: str | None = None
    """Pictures of the style that were kept out of training, with captions. None: those that the run kept out itself."""
    caption_files: CaptionFilesConfig = CaptionFilesConfig()
    model: str | None = None
    """None: the model that the LoRA was trained on."""
    timesteps: int = option(10, at_least=10, multiple_of=10)
    """Timesteps, evenly spread, at which the gradient of every picture is computed; more are surer, and take longer."""
    out: Path = Path("influence.png")
    """File for the sheet; the table lies beside it, as .csv."""
    device: str = "auto"
    """'auto', 'cuda', 'cpu', 'mps'."""


if __name__ == "__main__":
    COMMAND = parse_command("attribute.py", AttributeConfig, __doc__)

import re

from PIL import Image

from common.files import check_writable, write_atomically
from common.progress import tqdm
from common.sheets import captioned, png_bytes, tiled
from data import Stream, open_data
from evaluation.influence import Helped, as_csv, helped, in_common, sentences_about
from evaluation.subject import Subject, options_of
from evaluation.validation import picture_of
from evaluation.verdict import percent
from lora import Adapter, add_lora, linear_layers
from lora_files.deltas import Deltas, parameter_shapes
from lora_files.read import newest_lora, read_lora, read_metadata, trained_on
from performance.checkpointing import block_names, checkpoint_blocks
from run.held_out import HeldOut, hold_out, of_folder
from run.lineage import begin_from

MOST_SHOWN = 60  # pictures on the sheet


def pictures_of(config: AttributeConfig, lora: Path, options: dict[str, Any]) -> HeldOut:
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


def come_alive(subject: Subject, deltas: Deltas) -> Adapter:
    """The LoRA as layers whose A and B get gradients; what it has beside linear layers is merged into the model."""
    linear = {name: delta for name, delta in deltas.items() if name in linear_layers(subject.denoiser)}
    if not linear:
        raise UserError("this LoRA changes no linear layer, and only those are compared")
    subject.merge({name: delta for name, delta in deltas.items() if name not in linear})
    rank, names = max(len(A) for A, _, _ in linear.values()), "|".join(map(re.escape, linear))
    adapter = add_lora(subject.denoiser, LoRAConfig(rank, targets=f"^({names})$"), dtype=subject.denoiser.unet.dtype)
    begin_from(adapter, linear)
    if subject.device.type == "cuda":  # a third slower, but 1024 × 1024 pixels take little more than the model
        checkpoint_blocks(subject.denoiser, block_names(subject.denoiser))
    return adapter


def sheet(ranked: list[Helped], stream: Stream, subject: Subject) -> Image.Image:
    """These pictures as training sees them, each with its figure and its caption."""
    numbers, tiles = {name: n for n, name in enumerate(stream.source.names)}, []
    for place, one in enumerate(ranked, 1):
        if found := picture_of(stream, numbers[one.name], subject.pipe.vae, subject.device):
            tiles.append(captioned(found[2], f"{place}. {percent(one.help)}  {Path(one.name).name}", one.caption))
    return tiled(tiles)


def main(config: AttributeConfig) -> None:
    lora = newest_lora(config.lora)
    options = options_of(lora)
    if (base := options.get("base_lora")) and not config.model:
        raise UserError(f"{lora} needs {base[0]}: merge that into its model by merge_lora.py, and name the result by --model")
    check_writable("the folder of --out", config.out.parent)
    data = pictures_of(config, lora, options)
    subject = Subject(config.model or trained_on(lora), config.device)
    adapter = come_alive(subject, read_lora(lora, parameter_shapes(subject.denoiser)))
    assert data.kept_out is not None
    stream = subject.stream(data.training, options)
    held_out = subject.probes(subject.stream(data.kept_out, options), data.numbers, config.timesteps)
    probes = subject.probes(stream, range(data.training.samples), config.timesteps)
    print(f"{lora}: {len(probes)} pictures against {len(held_out)} {data.line}", flush=True)
    common = in_common(tqdm(held_out, desc="held out", unit="img", leave=False), subject, adapter)
    bar = tqdm(probes, desc="trained", unit="img", leave=False)
    ranked = sorted(helped(probe, common, subject, adapter) for probe in bar)
    print("\n".join(sentences_about(ranked)))
    table = config.out.with_suffix(".csv")
    write_atomically(table, as_csv(ranked))
    write_atomically(config.out, png_bytes(sheet(ranked[:MOST_SHOWN], stream, subject)))
    print(f"look       {config.out}, the least helpful first; all figures are in {table}")


if __name__ == "__main__":
    with one_line_errors("attribute.py"):
        main(COMMAND)
