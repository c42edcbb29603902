"""Converts a LoRA file of any tool to the kohya layout, which diffusers, ComfyUI and A1111 read, or to diffusers' own.

Every ΔW stays the same, to the rounding of --save-dtype.

python scripts/convert_lora.py theirs.safetensors ours.safetensors
python scripts/convert_lora.py ours.safetensors for-diffusers.safetensors --format diffusers --save-dtype fp32
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from options.command import parse_command


@dataclass(frozen=True)
class ConvertConfig:
    lora: Annotated[Path, tyro.conf.Positional]
    """The file to read."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write."""
    format: Literal["kohya", "diffusers"] = "kohya"
    """Layout to write."""
    save_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Dtype of the weights in the new file."""
    model: str | None = None
    """The model that the LoRA is for, as train_lora.py's --model. None: SDXL base's architecture, which needs no weights."""


if __name__ == "__main__":
    COMMAND = parse_command("convert_lora.py", ConvertConfig, __doc__)


from common.files import check_writable
from lora_files.base_weights import model_shapes
from lora_files.deltas import is_addition
from lora_files.read import read_lora, read_metadata
from lora_files.write import write_lora
from memory import DTYPES


def main(config: ConvertConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    check_writable("the folder", config.out.parent)
    shapes = model_shapes(config.model)
    deltas = read_lora(config.lora, shapes)
    added = [deltas.pop(name) for name in list(deltas) if is_addition(name)]
    if not deltas:
        raise UserError(f"{config.lora} holds only additions (.diff, .diff_b), which no layout of LoRA can hold")
    dtype = DTYPES[config.save_dtype]
    _, difference = write_lora(config.out, deltas, read_metadata(config.lora), config.format, dtype, shapes)
    if added:
        print(f"left out: {len(added)} additions to norms, biases or whole weights (.diff, .diff_b)")
    print(f"{config.out}: {len(deltas)} layers in the {config.format} layout, largest difference {difference:.2g}")


if __name__ == "__main__":
    with one_line_errors("convert_lora.py"):
        main(COMMAND)
