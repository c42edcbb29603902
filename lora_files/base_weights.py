"""Files of SDXL weights: which tensor holds the weight of which module."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.safetensors_files import read_header
from lora_files.deltas import parameter_shapes
from model.checkpoint import checkpoint_names
from model.load import base_architecture, load_sdxl

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


# Where the weight of a module is in a file.


@dataclass(frozen=True)
class Place:
    """A parameter is a tensor of a file, or the rows `start` to `stop` of one, or its transpose."""

    parameter: str
    """Its path, which ends in .weight or .bias."""
    start: int = 0
    stop: int | None = None
    transposed: bool = False

    @property
    def module(self) -> str:
        """The path of its module if it is a weight."""
        return self.parameter.removesuffix(".weight")

    def weight_in(self, tensor: Tensor) -> Tensor:
        """The parameter, a view of the tensor."""
        rows = tensor[self.start : self.stop]
        return rows.T if self.transposed else rows


@cache
def checkpoint_parameters() -> dict[str, list[str]]:
    """`checkpoint_names` of SDXL base. A smaller variant has some of its layers, under the same names."""
    with torch.device("meta"):
        parts = base_architecture()
    return checkpoint_names(
        f"{component}.{name}" for component in COMPONENTS for name, _ in parts[component].named_parameters()
    )


def places(component: str, key: str, shape: list[int]) -> list[Place]:
    """The weights and biases that the tensor `key` holds.

    `component` is 'unet', 'text_encoder' or 'text_encoder_2'; '' for a checkpoint in one file, which has the names of
    Stability's code.
    """
    if component:
        return [Place(f"{component}.{key}")] if key.endswith((".weight", ".bias")) else []
    names = checkpoint_parameters().get(key, [])
    if len(names) == 1:
        return [Place(names[0], transposed=key.endswith("text_projection"))]
    return [Place(name, i * shape[0] // 3, (i + 1) * shape[0] // 3) for i, name in enumerate(names)]


# The files.


def weight_files(base: Path) -> dict[Path, str]:
    """{file: component} of the U-Net and both text encoders in a diffusers folder; for a checkpoint in one file {base: ''}.

    Raises UserError if `base` is neither, or a component has no .safetensors file.
    """
    if base.is_file():
        return {base: ""}
    if not (base / "model_index.json").is_file():
        raise UserError(f"{base} is neither a file nor a diffusers folder (it has no model_index.json)")
    files = {file: name for name in COMPONENTS for file in sorted((base / name).glob("*.safetensors"))}
    if missing := set(COMPONENTS) - set(files.values()):
        raise UserError(f"{base} has no .safetensors file in {', '.join(sorted(missing))}")
    return files


def stored_weights(model: Path) -> Iterator[tuple[Path, str, Place, torch.Size]]:
    """(file, key, place, shape) of every weight and bias of a folder or checkpoint.

    Raises UserError if it has none, or one of a dtype that cannot be added to or subtracted from.
    """
    empty = True
    for file, component in weight_files(model).items():
        for key, entry in read_header(file)[1].items():
            for place in places(component, key, entry.get("shape", [])):
                if entry["dtype"] not in STORED_DTYPES:
                    known = ", ".join(STORED_DTYPES)
                    raise UserError(f"{file}: {key} is {entry['dtype']}, which cannot be computed with: {known} can")
                yield file, key, place, place.weight_in(torch.empty(entry["shape"], device="meta")).shape
                empty = False
    if empty:
        raise UserError(f"{model} holds no layer of SDXL in Stability's layout (extract_lora.py reads a LoRA with --resize)")


def model_parts(model: str | None) -> torch.nn.ModuleDict:
    """U-Net and text encoders in float32. None: SDXL base's architecture, without weights."""
    if model is None:
        with torch.device("meta"):
            parts = base_architecture()
    else:
        parts = load_sdxl(model, torch.float32, torch.device("cpu")).components
    return torch.nn.ModuleDict({name: parts[name] for name in COMPONENTS})


def model_shapes(model: str | None) -> dict[str, torch.Size]:
    """{path: shape} of layers and parameters of `model_parts`, as from `parameter_shapes`."""
    return parameter_shapes(model_parts(model))
