"""Files of SDXL weights: which tensor holds the weight of which module."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from lora_files.deltas import parameter_shapes
from lora_files.names import from_sgm
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


RESBLOCK = {  # OpenCLIP's names in a layer -> transformers'
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}


def places(component: str, key: str, shape: list[int]) -> list[Place]:
    """The weights and biases that the tensor `key` holds.

    `component` is 'unet', 'text_encoder' or 'text_encoder_2'; '' for a checkpoint in one file, which has the names of
    Stability's code.
    """
    path, _, leaf = key.rpartition(".")
    if key == "conditioner.embedders.1.model.text_projection":
        return [Place("text_encoder_2.text_projection.weight", transposed=True)]
    if match := re.fullmatch(r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)\.(.+)\.(\w+)", key):
        layer = f"text_encoder_2.text_model.encoder.layers.{match[1]}"
        if match[3].startswith("in_proj_"):  # the rows of q, then of k, then of v
            n, kind = shape[0] // 3, match[3].removeprefix("in_proj_")
            return [Place(f"{layer}.self_attn.{x}_proj.{kind}", i * n, (i + 1) * n) for i, x in enumerate("qkv")]
        return [Place(f"{layer}.{RESBLOCK[match[2]]}.{leaf}")] if match[2] in RESBLOCK else []
    if leaf not in ("weight", "bias"):
        return []
    if component:
        return [Place(f"{component}.{key}")]
    if path.startswith("model.diffusion_model."):
        return [Place(f"unet.{from_sgm(path.removeprefix('model.diffusion_model.'))}.{leaf}")]
    if path.startswith("conditioner.embedders.0.transformer."):
        return [Place("text_encoder." + key.removeprefix("conditioner.embedders.0.transformer."))]
    return []


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


def model_shapes(model: str | None) -> dict[str, torch.Size]:
    """{path: shape} of layers and parameters, as from `parameter_shapes`. None: SDXL base's architecture, without weights."""
    names = ("unet", "text_encoder", "text_encoder_2")
    if model is None:
        with torch.device("meta"):
            parts = base_architecture()
    else:
        parts = load_sdxl(model, torch.float32, torch.device("cpu")).components
    return parameter_shapes(torch.nn.ModuleDict({name: parts[name] for name in names}))
