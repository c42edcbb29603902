"""Converts a LoRA file of any tool to the kohya layout, which diffusers, ComfyUI and A1111 read, or to diffusers' own.

Every ΔW of A and B stays the same, to the rounding of --save-dtype. That of LoHa, LoKr, DoRA or a whole weight becomes one of
--rank, and the error is told.

python scripts/convert_lora.py theirs.safetensors ours.safetensors
python scripts/convert_lora.py loha.safetensors lora.safetensors --rank 64
python scripts/convert_lora.py ours.safetensors for-diffusers.safetensors --format diffusers --save-dtype fp32
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.options import check_options, option
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
    rank: int = option(32, at_least=1)
    """Rank of the layers that are no plain A and B, at most."""
    model: str | None = None
    """The model that the LoRA is for, as train_lora.py's --model; for DoRA that with whose weights it is merged. None: SDXL
    base's architecture, which needs no weights."""

    def __post_init__(self) -> None:
        check_options(self)


if __name__ == "__main__":
    COMMAND = parse_command("convert_lora.py", ConvertConfig, __doc__)


from common.files import check_writable
from lora_files.base_weights import model_parts
from lora_files.decompose import plain_deltas
from lora_files.deltas import parameter_shapes
from lora_files.read import read_changes, read_metadata
from lora_files.write import rank_header, write_lora
from memory import DTYPES


def main(config: ConvertConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    check_writable("the folder", config.out.parent)
    model = model_parts(config.model)
    shapes, metadata = parameter_shapes(model), read_metadata(config.lora)
    changes = read_changes(config.lora, shapes)
    deltas, converted, error = plain_deltas(changes, model, config.rank)
    if not deltas:
        raise UserError(f"{config.lora} holds only additions to norms and biases, which no layout of LoRA can hold")
    if converted:
        metadata |= {"ss_network_module": "networks.lora", "ss_network_args": "{}", **rank_header(deltas)}
    dtype = DTYPES[config.save_dtype]
    _, difference = write_lora(config.out, deltas, metadata, config.format, dtype, shapes)
    if added := sum(name not in deltas and name.removesuffix(".weight") not in deltas for name in changes):
        print(f"left out: {added} additions to norms or biases (.diff, .diff_b, .w_norm, .b_norm)")
    if converted:
        print(
            f"{converted} layers were no plain A and B: of rank {config.rank} or less now, with a relative error of {error:.2%}"
        )
    print(f"{config.out}: {len(deltas)} layers in the {config.format} layout, largest difference {difference:.2g}")


if __name__ == "__main__":
    with one_line_errors("convert_lora.py"):
        main(COMMAND)
