"""Merges one or several LoRA into a copy of a model, tensor by tensor: only one tensor is in memory at a time.

    python scripts/merge_lora.py sdxl/ merged/ --lora naruto.safetensors                               a diffusers folder
    python scripts/merge_lora.py sd_xl_base_1.0.safetensors merged.safetensors --lora a.safetensors:0.8 --lora b.safetensors

The sums are computed in float32 and written in the dtypes of the base. Every other tensor and file is copied byte for byte.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from common.files import check_writable, read_header
from lora import add_delta
from lora_files.base_weights import STORED_DTYPES, places, weight_files
from lora_files.read import read_lora, read_metadata, with_strength


@dataclass(frozen=True)
class MergeConfig:
    base: Annotated[Path, tyro.conf.Positional]
    """A diffusers folder or a .safetensors checkpoint of SDXL."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder or checkpoint to write: of the same kind as the base."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file of any tool; :0.8 after its name sets its strength. Repeat the flag to merge several."""

    def __post_init__(self) -> None:
        if not self.lora:
            raise UserError("--lora is missing: nothing to merge")


def merged_chunks(stream: BinaryIO, start: int, header: dict, component: str, loras: list) -> Iterator[bytearray]:
    """The data of the new file, tensor by tensor in the order of the old one. `loras`: [(deltas, strength)]."""
    for key in tqdm(sorted(header, key=lambda key: header[key]["data_offsets"]), unit="tensor", leave=False):
        begin, end = header[key]["data_offsets"]
        stream.seek(start + begin)
        data = bytearray(stream.read(end - begin))
        for place in places(component, key, header[key]["shape"]):
            changes = [(deltas[place.module], strength) for deltas, strength in loras if place.module in deltas]
            if changes:
                tensor = torch.frombuffer(data, dtype=STORED_DTYPES[header[key]["dtype"]]).view(header[key]["shape"])
                weight = place.weight_in(tensor)
                total = weight.float()
                for delta, strength in changes:
                    total = add_delta(total, delta, strength)
                weight.copy_(total)  # rounded once
        yield data


def main(config: MergeConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    if config.base.resolve() in config.out.resolve().parents:
        raise UserError(f"{config.out} is inside of {config.base}: write it somewhere else")
    files = weight_files(config.base)
    headers = {file: read_header(file) for file in files}
    shapes = {}
    for file, (_, header) in headers.items():
        for key, entry in header.items():
            for place in places(files[file], key, entry.get("shape", [])):
                shapes[place.module] = place.weight_in(torch.empty(entry["shape"], device="meta")).shape
                if entry["dtype"] not in STORED_DTYPES:
                    raise UserError(
                        f"{file}: {key} is {entry['dtype']}, which cannot be added to: {', '.join(STORED_DTYPES)} can"
                    )
    loras, sources = [], []
    for path, strength in map(with_strength, config.lora):
        deltas = read_lora(path, shapes)
        loras.append((deltas, strength))
        sources.append({"file": path.name, "strength": strength, "hash": read_metadata(path).get("sshs_model_hash")})

    # Written under another name, and renamed when complete.
    check_writable("the folder", config.out.parent)
    part = config.out.with_name(f".{config.out.name}.{os.getpid()}")
    try:
        if config.base.is_dir():
            shutil.copytree(config.base, part, ignore=lambda folder, names: [n for n in names if Path(folder, n) in files])
        for file, component in files.items():
            start, header = headers[file]
            kept = {k: v for k, v in (header.pop("__metadata__", None) or {}).items() if "hash" not in k}
            metadata = {**kept, "sdxl_lora.merged": json.dumps(sources)}
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
    print(f"{config.out}: {config.base} with " + ", ".join(f"{s['file']} × {s['strength']:g}" for s in sources))


if __name__ == "__main__":
    with one_line_errors("merge_lora.py"):
        main(tyro.cli(MergeConfig, description=__doc__))
