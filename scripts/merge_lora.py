"""Merges one or several LoRA into a copy of a model, tensor by tensor: only one tensor is in memory at a time.

    python scripts/merge_lora.py sdxl/ merged/ --lora naruto.safetensors                               a diffusers folder
    python scripts/merge_lora.py sd_xl_base_1.0.safetensors merged.safetensors --lora a.safetensors:0.8 --lora b.safetensors

The sums are computed in float32 and written in the dtypes of the base. Every other tensor and file is copied byte for byte.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from options.command import parse_command


@dataclass(frozen=True)
class MergeConfig:
    base: Annotated[Path, tyro.conf.Positional]
    """A diffusers folder or a .safetensors checkpoint of SDXL."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder or checkpoint to write: of the same kind as the base."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA, LoHa, LoKr or DoRA file of any tool; :0.8 after its name sets its strength. Repeat the flag to merge several."""

    def __post_init__(self) -> None:
        if not self.lora:
            raise UserError("--lora is missing: nothing to merge")


if __name__ == "__main__":
    COMMAND = parse_command("merge_lora.py", MergeConfig, __doc__)


from lora_files.merge import base_shapes, merge_files
from lora_files.read import read_changes, read_metadata, with_strength


def main(config: MergeConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    if config.base.exists() and config.base.is_dir() == (config.out.suffix == ".safetensors"):
        kind = "a folder" if config.base.is_dir() else "a file, x.safetensors,"
        raise UserError(f"{config.out} must be {kind} as {config.base} is: infer.py --save-merged writes either")
    if config.base.resolve() in config.out.resolve().parents:
        raise UserError(f"{config.out} is inside of {config.base}: write it somewhere else")
    shapes = base_shapes(config.base)
    loras, sources = [], []
    for path, strength in map(with_strength, config.lora):
        deltas = read_changes(path, shapes)
        loras.append((deltas, strength))
        sources.append({"file": path.name, "strength": strength, "hash": read_metadata(path).get("sshs_model_hash")})
    merge_files(config.base, config.out, loras, sources)
    print(f"{config.out}: {config.base} with " + ", ".join(f"{s['file']} × {s['strength']:g}" for s in sources))


if __name__ == "__main__":
    with one_line_errors("merge_lora.py"):
        main(COMMAND)
