"""A LoRA as a file: layout, metadata, and the check of what was written."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError
from common.files import write_atomically
from common.safetensors_files import encode_header
from lora_files.deltas import Changes, Deltas
from lora_files.kinds import DoRA
from lora_files.names import diffusers_name, kohya_name
from lora_files.read import NOT_COPIED, read_changes


def with_one_alpha(deltas: Deltas) -> Deltas:
    """The same ΔW with one α per component; B takes the rest. diffusers scales a kohya file with several α wrongly."""
    common: dict[str, float] = {}  # the largest |α|, so that no B grows; the rank if all α are 0
    for path, (A, _, alpha) in deltas.items():
        component = path.split(".")[0]
        common[component] = max(common.get(component, 0), abs(alpha)) or float(len(A))
    rescaled = {}
    for path, (A, B, alpha) in deltas.items():
        common_alpha = common[path.split(".")[0]]
        rescaled[path] = (A, B.float() * (alpha / common_alpha), common_alpha)
    return rescaled


def adapter_metadata(deltas: Deltas, dora: bool = False) -> dict[str, str]:
    """PEFT's configuration of each component, as the metadata `lora_adapter_metadata`.

    Every version of diffusers that knows this key reads it in this form: flat keys, every field, full module names.
    """
    metadata: dict = {}
    for component in dict.fromkeys(path.split(".")[0] for path in deltas):
        modules = {}  # without text_model, which only one text encoder has: PEFT compares a name with the end of a path
        for path, delta in deltas.items():
            if path.startswith(f"{component}."):
                modules[path.partition(".")[2].removeprefix("text_model.")] = delta
        A, _, alpha = next(iter(modules.values()))
        config = {"r": len(A), "lora_alpha": alpha, "target_modules": list(modules), "bias": "none"}
        config["rank_pattern"] = {name: len(a) for name, (a, *_) in modules.items() if len(a) != len(A)}
        config["alpha_pattern"] = {name: other for name, (*_, other) in modules.items() if other != alpha}
        config |= {"use_dora": dora, "use_rslora": False, "lora_bias": False}
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(metadata)}


def serialise(
    deltas: Deltas, metadata: dict[str, str], layout: str = "kohya", dtype: torch.dtype = torch.float16,
    magnitudes: Mapping[str, Tensor] = MappingProxyType({}),
) -> bytes:  # fmt: skip
    """The bytes of a .safetensors file with the weights in `dtype`, and `metadata` with what `public_header` adds to it.

    'kohya': every module has a 0-dim float32 alpha, the same in all modules of a component. 'diffusers': the alphas are in
    the metadata. `magnitudes`: of DoRA, {module path: [out]}; they stay float32, as what was learned is a small part of them.

    Raises UserError, which names the tensor, if a value is not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    metadata = public_header(metadata, layout)
    if layout == "diffusers":
        metadata = {**metadata, **adapter_metadata(deltas, bool(magnitudes))}
        for path, (A, B, _) in deltas.items():
            name = diffusers_name(path)
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    else:
        for path, (A, B, alpha) in with_one_alpha(deltas).items():
            name = kohya_name(path)
            tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    exact = {f"{diffusers_name(path)}.lora_magnitude_vector": m for path, m in magnitudes.items()}
    if layout != "diffusers":
        exact = {f"{kohya_name(path)}.dora_scale": m[:, None] for path, m in magnitudes.items()}
    tensors = {key: t.to("cpu", t.dtype if t.ndim == 0 else dtype).contiguous() for key, t in tensors.items()}
    tensors |= {key: t.to("cpu", torch.float32).contiguous() for key, t in exact.items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}, so no file was written")
    data = save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[start:]).hexdigest()  # of the tensor bytes only, as other tools compute it
    metadata |= {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return encode_header({"__metadata__": metadata} | json.loads(data[8:start])) + data[start:]


def plain_parts(changes: Changes) -> tuple[Deltas, dict[str, Tensor]]:
    """(A, B and α, also of DoRA; DoRA's magnitudes) of what is such. {module path: …}."""
    deltas, magnitudes = Deltas(), {}
    for name, change in changes.items():
        if isinstance(change, tuple):
            deltas[name] = change
        elif isinstance(change, DoRA):
            ((B, A, _),) = change.direction.halves
            if A is not None:
                deltas[name], magnitudes[name] = (A, B, change.direction.scale * len(A)), change.magnitude
    return deltas, magnitudes


def largest_difference(read_back: Deltas, live: Deltas) -> float:
    """The largest absolute difference of any weight, after scaling the file's B to the α of `live`.

    Infinite if the two have different modules.
    """
    if read_back.keys() != live.keys():
        return math.inf
    largest = torch.zeros(())
    for path, (A, B, alpha) in live.items():
        file_A, file_B, file_alpha = read_back[path]
        scaled_B = file_B.float() * (file_alpha / alpha if alpha else file_alpha)
        live_B = B.float().cpu() if alpha else torch.zeros(())  # with α = 0 the file may say so by α or by B
        differences = (file_A.float() - A.float().cpu()).abs().max(), (scaled_B - live_B).abs().max()
        largest = torch.stack([largest, *differences]).max()
    return largest.item()


# Options that may hold paths or URLs.
LOCATIONS = ("data", "prior_data", "data_cache", "validate", "out", "log_dir", "resume", "model", "prompts")


def without_folders(value: object) -> object:
    """A path or URL, or a list of them, with their base names only: a header is public, and says nothing about a disk."""
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1] if isinstance(value, str | Path) else value


def public_header(metadata: dict[str, str], layout: str) -> dict[str, str]:
    """What every LoRA file says about itself (ModelSpec 1.0.1), with what `metadata` says instead where it says it; without
    folders, and without what is not true of a file made from another.
    """
    own = {key: value for key, value in metadata.items() if key not in NOT_COPIED}
    with suppress(ValueError, AttributeError):
        config = json.loads(own.get("sdxl_lora.config", "")).items()
        own["sdxl_lora.config"] = json.dumps({k: without_folders(v) if k in LOCATIONS else v for k, v in config})
    written = {"modelspec.title": own.get("ss_output_name", "LoRA"), "modelspec.resolution": "1024x1024"}
    written["modelspec.date"] = datetime.now(UTC).date().isoformat()  # no time: the same weights on one day are the same file
    return A1111_HEADER | written | own | {"modelspec.implementation": IMPLEMENTATIONS[layout]}


def rank_header(deltas: Deltas) -> dict[str, str]:
    """Rank and α as kohya's scripts write them: "Dynamic" if not all layers have the same."""
    ranks, alphas = {str(len(A)) for A, *_ in deltas.values()}, {str(alpha) for *_, alpha in deltas.values()}
    found = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    return {key: values.pop() if len(values) == 1 else "Dynamic" for key, values in found.items()}


IMPLEMENTATIONS = {
    "kohya": "https://github.com/Stability-AI/generative-models",
    "diffusers": "https://github.com/huggingface/diffusers",
}
A1111_HEADER = {  # without these A1111 and Forge think that a file is for Stable Diffusion 1, and do not list it under SDXL
    "ss_network_module": "networks.lora",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_v2": "False",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
}


def check_written(
    path: Path, shapes: dict[str, torch.Size], live: Deltas, dtype: torch.dtype, otherwise: str,
    magnitudes: Mapping[str, Tensor] = MappingProxyType({}),
) -> float:  # fmt: skip
    """Reads a written file as any other, and returns its largest difference from the weights `live`.

    Raises UserError if that is more than rounding to `dtype` explains, or if DoRA's `magnitudes` are not what they are here.
    `otherwise` ends its message: what becomes of the file.
    """
    read_back, lengths = plain_parts(read_changes(path, shapes))
    difference = largest_difference(read_back, live)
    kept = {name: magnitude.flatten() for name, magnitude in lengths.items()}
    if kept.keys() != magnitudes.keys() or not all(torch.equal(kept[name], m.cpu()) for name, m in magnitudes.items()):
        difference = math.inf
    largest = torch.stack([factor.abs().max().float() for A, B, _ in live.values() for factor in (A, B)]).max().item()
    if not difference <= torch.finfo(dtype).eps * largest:
        raise UserError(f"the LoRA file read back differs from the weights by {difference:.3g}, so {otherwise}")
    return difference


def write_lora(
    out: Path, deltas: Deltas, metadata: dict[str, str], layout: str, dtype: torch.dtype, shapes: dict[str, torch.Size]
) -> tuple[int, float]:
    """Writes a new LoRA file, and reads it back before it gets its name. Returns its size in bytes, and its largest difference.

    Raises UserError if that is more than rounding.
    """
    data, differences = serialise(deltas, {"modelspec.title": out.stem} | metadata, layout, dtype), []

    def check(written: Path) -> None:
        differences.append(check_written(written, shapes, deltas, dtype, "it was not kept: try --save-dtype fp32"))

    write_atomically(out, data, check)
    return len(data), differences[0]
