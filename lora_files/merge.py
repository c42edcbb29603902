"""Merged models on disk: a copy of files with ΔW added tensor by tensor, or a pipeline that was merged in memory."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import check_writable
from common.progress import tqdm
from common.safetensors_files import encode_header, read_header
from lora_files.base_weights import STORED_DTYPES, places, stored_weights, weight_files
from lora_files.deltas import Changes, add_deltas
from model.checkpoint import checkpoint_of, with_text_model
from model.load import Pipeline


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A path beside `out` for the body to write a file or folder at, renamed when it is complete; removed if the body raises.

    Raises UserError if the disk refuses.
    """
    check_writable("the folder", out.parent)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield part
        part.replace(out)
    except BaseException as error:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{out} could not be written: {error.strerror or error}") from None
        raise


def base_shapes(base: Path) -> dict[str, torch.Size]:
    """Shapes of layers and parameters, as from `parameter_shapes`, in the files of a folder or checkpoint."""
    shapes = {}
    for _, _, place, shape in stored_weights(base):
        shapes[place.parameter] = shape
        if len(shape) > 1 and not place.module.endswith("_embedding"):  # no layer
            shapes[place.module] = shape
    return shapes


def merge_files(base: Path, out: Path, loras: list[tuple[Changes, float]], sources: list[dict]) -> None:
    """Writes a copy of a folder or checkpoint with the LoRA added. `sources`: what the headers say about them."""
    files = weight_files(base)
    with written_whole(out) as part:
        if base.is_dir():
            shutil.copytree(base, part, ignore=lambda folder, names: [n for n in names if Path(folder, n) in files])
        for file, component in files.items():
            start, header = read_header(file)
            kept = {k: v for k, v in (header.pop("__metadata__", None) or {}).items() if "hash" not in k}
            kept["sdxl_lora.merged"] = json.dumps(sources)
            target = part / file.relative_to(base) if base.is_dir() else part
            with file.open("rb") as source, target.open("wb") as opened:
                opened.write(encode_header({"__metadata__": kept, **header}))
                for chunk in merged_chunks(source, start, header, component, loras):
                    opened.write(chunk)


def merged_chunks(stream: BinaryIO, start: int, header: dict, component: str, loras: list) -> Iterator[bytearray]:
    """The data of the new file, tensor by tensor in the order of the old one. `loras`: [(deltas, strength)]."""
    for key in tqdm(sorted(header, key=lambda key: header[key]["data_offsets"]), unit="tensor", leave=False):
        begin, end = header[key]["data_offsets"]
        stream.seek(start + begin)
        data = bytearray(stream.read(end - begin))
        for place in places(component, key, header[key]["shape"]):
            names = dict.fromkeys((place.module, place.parameter))  # equal for a bias
            changes = [(deltas[name], strength) for deltas, strength in loras for name in names if name in deltas]
            tensor = torch.frombuffer(data, dtype=STORED_DTYPES[header[key]["dtype"]]).view(header[key]["shape"])
            add_deltas(place.parameter, place.weight_in(tensor), changes)
        yield data


def write_pipeline(pipe: Pipeline, out: Path, sources: list[dict]) -> None:
    """Writes a pipeline as a diffusers folder, or as one checkpoint file in Stability's layout if `out` ends in .safetensors.

    A folder has the names of the hub and one file for each part: ComfyUI and older versions of transformers find nothing
    under the names that transformers 5 gives text encoder 1, and ComfyUI reads no U-Net in several files.
    """
    metadata = {"format": "pt", "sdxl_lora.merged": json.dumps(sources)}
    pipe.unet.to(memory_format=torch.contiguous_format)  # it may be in channels_last, which safetensors refuses
    with written_whole(out) as part:
        if out.suffix == ".safetensors":
            tensors = checkpoint_of(pipe)
            if pipe.scheduler.config.prediction_type == "v_prediction":
                tensors["v_pred"] = torch.ones(1)
                metadata["modelspec.prediction_type"] = "v"
                if pipe.scheduler.config.get("rescale_betas_zero_snr"):
                    tensors["ztsnr"] = torch.ones(1)
            save_file(tensors, part, metadata)
        else:
            for owner in (pipe, pipe.unet, pipe.vae):
                owner.register_to_config(_name_or_path="")  # a path on this machine, which would be written
            pipe.save_pretrained(part, max_shard_size="100GB")
            text = part / "text_encoder/model.safetensors"
            save_file({with_text_model(name): tensor for name, tensor in load_file(text).items()}, text, metadata)
