"""A LoRA as a file: layout, metadata, and the check of what was written."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError
from lora_files.deltas import Deltas
from lora_files.names import diffusers_name, kohya_name
from lora_files.read import read_lora


def with_one_alpha(deltas: Deltas) -> Deltas:
    """The same ΔW with one α in each component, the factor moved into B: diffusers mis-scales a kohya file of several."""
    alphas: dict[str, float] = {}
    for path, (A, _, alpha) in deltas.items():  # the largest, so that no factor is above 1; the rank if all are 0
        component = path.split(".")[0]
        alphas[component] = max(alphas.get(component, 0), abs(alpha)) or float(len(A))
    folded = {}
    for path, (A, B, alpha) in deltas.items():
        one = alphas[path.split(".")[0]]
        folded[path] = (A, B.float() * (alpha / one), one)
    return folded


def adapter_metadata(deltas: Deltas) -> dict[str, str]:
    """`lora_adapter_metadata` as every version of diffusers that reads it takes it: flat, complete, names in full."""
    told: dict = {}
    for component in dict.fromkeys(path.split(".")[0] for path in deltas):
        mine = {}  # without text_model, which one text encoder has: PEFT takes a name for the end of a path
        for path, delta in deltas.items():
            if path.startswith(f"{component}."):
                mine[path.partition(".")[2].removeprefix("text_model.")] = delta
        A, _, alpha = next(iter(mine.values()))
        about = {"r": len(A), "lora_alpha": alpha, "target_modules": list(mine), "bias": "none"}
        about["rank_pattern"] = {name: len(a) for name, (a, *_) in mine.items() if len(a) != len(A)}
        about["alpha_pattern"] = {name: other for name, (*_, other) in mine.items() if other != alpha}
        about |= dict.fromkeys(("use_dora", "use_rslora", "lora_bias"), False)
        told |= {f"{component}.{key}": value for key, value in about.items()}
    return {"lora_adapter_metadata": json.dumps(told)}


def serialise(deltas: Deltas, metadata: dict[str, str], layout: str = "kohya", dtype: torch.dtype = torch.float16) -> bytes:
    """The bytes of a .safetensors file, weights in `dtype`: 'kohya' with a 0-dim float32 alpha on every module, the same one
    for all of a component; 'diffusers' with the alphas in its metadata.

    Raises UserError, naming the module, rather than write a value that is not finite.
    """
    tensors: dict[str, Tensor] = {}
    if layout == "diffusers":
        metadata = {**metadata, **adapter_metadata(deltas)}
        for path, (A, B, _) in deltas.items():
            name = diffusers_name(path)
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    else:
        for path, (A, B, alpha) in with_one_alpha(deltas).items():
            name = kohya_name(path)
            tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    tensors = {key: t.to("cpu", t.dtype if t.ndim == 0 else dtype).contiguous() for key, t in tensors.items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key} is not finite in {str(dtype).removeprefix('torch.')}, so no file was written")
    plain = save(tensors)
    header = int.from_bytes(plain[:8], "little")
    digest = hashlib.sha256(plain[8 + header :]).hexdigest()  # of the tensor bytes only, as other tools compute it
    return save(tensors, {**metadata, "sshs_model_hash": digest})


def largest_difference(read_back: Deltas, live: Deltas) -> float:
    """Of any weight between a file and the adapter that it was made of, α/r multiplied in. Infinite if modules differ."""
    if read_back.keys() != live.keys():
        return math.inf
    worst = torch.zeros(())
    for path, (A, B, alpha) in live.items():
        theirs_A, theirs_B, theirs_alpha = read_back[path]
        scaled = theirs_B.float() * (theirs_alpha / alpha if alpha else 1)
        worst = torch.stack([worst, (theirs_A.float() - A.cpu()).abs().max(), (scaled - B.cpu()).abs().max()]).max()
    return worst.item()


A1111_HEADER = {  # without these A1111 and Forge take a file for one of Stable Diffusion 1 and hide it under SDXL
    "ss_network_module": "networks.lora",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_v2": "False",
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
}


def make_header(config: dict, images: int, step: int) -> dict[str, str]:
    """The header: what A1111 and Forge need to list the file under SDXL, ModelSpec 1.0.1, and our own `sdxl_lora.*`.

    `config` holds the flags of the run: rank, alpha, targets, resolution, model, …
    """
    name, side = f"pytorch_lora_weights_{step}", config["resolution"]
    return A1111_HEADER | {
        "ss_network_dim": str(config["rank"]),
        "ss_network_alpha": str(config["alpha"]),
        "ss_network_args": json.dumps({"targets": config["targets"]}),
        "ss_output_name": name,
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(images),
        "ss_steps": str(step),
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "sdxl_lora.step": str(step),
        "sdxl_lora.config": json.dumps(config),
    }


def check_written(path: Path, shapes: dict[str, torch.Size], live: Deltas, dtype: torch.dtype, otherwise: str) -> float:
    """Reads a written file as any other and compares it with what it was made of: the largest difference of any weight.

    Raises UserError, which says what becomes of it, if that is more than rounding to `dtype`.
    """
    error = largest_difference(read_lora(path, shapes), live)
    largest = torch.stack([half.abs().max().float() for A, B, _ in live.values() for half in (A, B)]).max().item()
    if not error <= torch.finfo(dtype).eps * largest:
        raise UserError(f"the LoRA file read back differs from the weights by {error:.3g}, so {otherwise}")
    return error
