"""Rewrites a LoRA file of any tool in the kohya layout (diffusers, ComfyUI, A1111) or in diffusers' own; the same ΔW.

python scripts/convert.py theirs.safetensors ours.safetensors
python scripts/convert.py ours.safetensors for-diffusers.safetensors --format diffusers --save-dtype fp32
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import formats
import memory
from checkpoint import check_writable, write_atomically
from errors import UserError, one_line_errors
from lora import layer_shapes
from sdxl import base_architecture, load_sdxl


@dataclass(frozen=True)
class ConvertConfig:
    lora: Annotated[Path, tyro.conf.Positional]
    """The file to read."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write."""
    format: Literal["kohya", "diffusers"] = "kohya"
    """Layout to write."""
    save_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Dtype of the weights in it."""
    model: str | None = None
    """The model it is for, as train_lora.py's --model. None: SDXL base's architecture, which needs no weights."""


def model_shapes(model: str | None) -> dict[str, torch.Size]:
    """{module path: shape} of every layer that a LoRA may change."""
    names = ("unet", "text_encoder", "text_encoder_2")
    if model is None:
        with torch.device("meta"):
            parts = base_architecture()
    else:
        parts = load_sdxl(model, torch.float32, torch.device("cpu")).components
    return layer_shapes(torch.nn.ModuleDict({name: parts[name] for name in names}))


def main(config: ConvertConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    check_writable("the folder", config.out.parent)
    shapes = model_shapes(config.model)
    deltas = formats.read(config.lora, shapes)
    metadata = {k: v for k, v in formats.read_metadata(config.lora).items() if k not in formats.OF_THE_FILE}
    metadata = formats.LISTED | metadata
    dtype = memory.DTYPES[config.save_dtype]
    data = formats.serialise(deltas, metadata, config.format, dtype)
    errors = []

    def check(written: Path) -> None:
        errors.append(formats.check_written(written, shapes, deltas, dtype, "it was not kept: try --save-dtype fp32"))

    write_atomically(config.out, data, check)
    print(f"{config.out}: {len(deltas)} layers in the {config.format} layout, largest difference {errors[0]:.2g}")


if __name__ == "__main__":
    with one_line_errors("convert.py"):
        main(tyro.cli(ConvertConfig, description=__doc__))
