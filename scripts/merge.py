"""Writes a model with one or several LoRA in its weights, tensor by tensor: it never holds more than one of them.

    python scripts/merge.py sdxl/ merged/ --lora naruto.safetensors                               a diffusers folder
    python scripts/merge.py sd_xl_base_1.0.safetensors merged.safetensors --lora a.safetensors:0.8 --lora b.safetensors

The sums are in float32, the file has the dtypes of the base; every other tensor and file is copied byte for byte.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import formats
from checkpoint import check_writable
from errors import UserError, one_line_errors
from lora import add_delta

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class MergeConfig:
    base: Annotated[Path, tyro.conf.Positional]
    """A diffusers folder or a .safetensors checkpoint of SDXL."""
    out: Annotated[Path, tyro.conf.Positional]
    """What to write: of the same kind."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file of any tool, with :0.8 after it its strength. Again for another."""

    def __post_init__(self) -> None:
        if not self.lora:
            raise UserError("--lora is missing: nothing to merge")


# Where a module of the LoRA lies in a file of weights.


@dataclass(frozen=True)
class Place:
    """A tensor, or its rows from `start` to `stop`, or its transpose."""

    module: str
    start: int = 0
    stop: int | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The module's weight: a view."""
        rows = tensor[self.start : self.stop]
        return rows.T if self.transposed else rows


OPEN_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def places(component: str, key: str, shape: list[int]) -> list[Place]:
    """The modules in a tensor. `component` is 'unet' …, or '' for a checkpoint in which Stability's code names them all."""
    name = key.removesuffix(".weight")
    if component:
        return [Place(f"{component}.{name}")] if name != key and len(shape) > 1 else []
    if name.startswith("model.diffusion_model.") and name != key and len(shape) > 1:
        return [Place("unet." + formats.from_sgm(name.removeprefix("model.diffusion_model.")))]
    if name.startswith("conditioner.embedders.0.transformer.") and name != key and len(shape) > 1:
        return [Place("text_encoder." + name.removeprefix("conditioner.embedders.0.transformer."))]
    if key == "conditioner.embedders.1.model.text_projection":
        return [Place("text_encoder_2.text_projection", transposed=True)]
    if match := re.fullmatch(r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)\.(.+)", name):
        layer = f"text_encoder_2.text_model.encoder.layers.{match[1]}"
        if match[2] == "attn.in_proj_weight":  # q, k and v, one under the other
            n = shape[0] // 3
            return [Place(f"{layer}.self_attn.{x}_proj", i * n, (i + 1) * n) for i, x in enumerate("qkv")]
        if match[2] in OPEN_CLIP and name != key:
            return [Place(f"{layer}.{OPEN_CLIP[match[2]]}")]
    return []


# Files of weights, read by their header.


def weight_files(base: Path) -> dict[Path, str]:
    """{file: component}: of a folder those of U-Net and text encoders; of a checkpoint itself, component ''."""
    if base.is_file():
        return {base: ""}
    if not (base / "model_index.json").is_file():
        raise UserError(f"{base} is neither a file nor a diffusers folder (it has no model_index.json)")
    files = {file: name for name in COMPONENTS for file in sorted((base / name).glob("*.safetensors"))}
    if missing := set(COMPONENTS) - set(files.values()):
        raise UserError(f"{base} has no .safetensors file in {', '.join(sorted(missing))}")
    return files


def read_header(file: Path) -> tuple[int, dict]:
    """(where the data begins, {key: dtype, shape, data_offsets}). Raises UserError if the file is damaged."""
    try:
        with safe_open(file, "pt"):  # checks every offset
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a readable .safetensors file: {error}") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


def merged_chunks(stream: BinaryIO, start: int, header: dict, component: str, loras: list) -> Iterator[bytearray]:
    """The data of the new file, tensor by tensor in the order of the old one."""
    for key in tqdm(sorted(header, key=lambda key: header[key]["data_offsets"]), unit="tensor", leave=False):
        begin, end = header[key]["data_offsets"]
        stream.seek(start + begin)
        data = bytearray(stream.read(end - begin))
        for place in places(component, key, header[key]["shape"]):
            mine = [(deltas[place.module], strength) for deltas, strength in loras if place.module in deltas]
            if mine:
                tensor = torch.frombuffer(data, dtype=DTYPES[header[key]["dtype"]]).view(header[key]["shape"])
                weight = place.of(tensor)
                total = weight.float()
                for delta, strength in mine:
                    total = add_delta(total, delta, strength)
                weight.copy_(total)  # rounded once
        yield data


def main(config: MergeConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    if config.base.resolve() in config.out.resolve().parents:
        raise UserError(f"{config.out} lies in {config.base} itself: write it somewhere else")
    files = weight_files(config.base)
    headers = {file: read_header(file) for file in files}
    shapes = {}
    for file, (_, header) in headers.items():
        for key, about in header.items():
            for place in places(files[file], key, about.get("shape", [])):
                shapes[place.module] = place.of(torch.empty(about["shape"], device="meta")).shape
                if about["dtype"] not in DTYPES:
                    raise UserError(f"{file}: {key} is {about['dtype']}, which cannot be added to: {', '.join(DTYPES)} can")
    loras, told = [], []
    for path, strength in map(formats.with_strength, config.lora):
        deltas = formats.read(path, shapes)
        loras.append((deltas, strength))
        told.append({"file": path.name, "strength": strength, "hash": formats.read_metadata(path).get("sshs_model_hash")})

    # Written aside and renamed when it is whole.
    check_writable("the folder", config.out.parent)
    part = config.out.with_name(f".{config.out.name}.{os.getpid()}")
    try:
        if config.base.is_dir():
            shutil.copytree(config.base, part, ignore=lambda folder, names: [n for n in names if Path(folder, n) in files])
        for file, component in files.items():
            start, header = headers[file]
            kept = {k: v for k, v in (header.pop("__metadata__", None) or {}).items() if "hash" not in k}
            metadata = {**kept, "sdxl_lora.merged": json.dumps(told)}
            text = json.dumps({"__metadata__": metadata, **header}).encode()
            text += b" " * (-len(text) % 8)
            target = part / file.relative_to(config.base) if config.base.is_dir() else part
            with file.open("rb") as source, target.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for chunk in merged_chunks(source, start, header, component, loras):
                    out.write(chunk)
        part.rename(config.out)
    except BaseException as error:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{config.out} could not be written: {error.strerror}") from None
        raise
    print(f"{config.out}: {config.base} with " + ", ".join(f"{t['file']} × {t['strength']:g}" for t in told))


if __name__ == "__main__":
    with one_line_errors("merge.py"):
        main(tyro.cli(MergeConfig, description=__doc__))
