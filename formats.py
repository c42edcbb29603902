"""LoRA files: names, layout and metadata. Written: the kohya layout with SGM block names, which diffusers, ComfyUI and
A1111 all read. Inside the suite an adapter is {module path: (A, B, alpha)}; the paths are those of diffusers' modules.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from errors import UserError

Deltas = dict[str, tuple[Tensor, Tensor, float]]

# diffusers path -> the path in Stability's own (SGM) code, which the kohya layout flattens.
SGM_BLOCKS = [
    (r"^down_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"input_blocks.{3 * i + j + 1}.1"),
    (r"^down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"input_blocks.{3 * i + j + 1}.0"),
    (r"^mid_block\.attentions\.0", lambda: "middle_block.1"),
    (r"^mid_block\.resnets\.(\d+)", lambda j: f"middle_block.{2 * j}"),
    (r"^up_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"output_blocks.{3 * i + j}.1"),
    (r"^up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"output_blocks.{3 * i + j}.0"),
    (r"^time_embedding\.linear_(\d)", lambda i: f"time_embed.{2 * i - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda i: f"label_emb.0.{2 * i - 2}"),
    (r"\.time_emb_proj$", lambda: ".emb_layers.1"),
]


def kohya_name(path: str) -> str:
    """'unet.down_blocks.1.attentions.0.….to_q' -> 'lora_unet_input_blocks_4_1_…_to_q', and likewise for both text encoders.

    transformers 5 took the child `text_model` out of one text encoder and left it in the other; files always have it.
    """
    component, _, rest = path.partition(".")
    if component == "unet":
        prefix = "lora_unet"
        for pattern, name in SGM_BLOCKS:
            rest = re.sub(pattern, lambda match, name=name: name(*map(int, match.groups())), rest)
    else:
        prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        rest = rest.removeprefix("text_model.")
        rest = rest if rest == "text_projection" else f"text_model.{rest}"
    return f"{prefix}_{rest}".replace(".", "_")


def serialise(deltas: Deltas, metadata: dict[str, str]) -> bytes:
    """The bytes of a .safetensors file in the kohya layout: float16 weights, a 0-dim float32 alpha on every module.

    Raises UserError, naming the module, rather than write a value that is not finite.
    """
    tensors = {}
    for path, (A, B, alpha) in deltas.items():
        name = kohya_name(path)
        tensors[f"{name}.lora_down.weight"] = A.to("cpu", torch.float16).contiguous()
        tensors[f"{name}.lora_up.weight"] = B.to("cpu", torch.float16).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key} is not finite, so no file was written: go on from the last one with a lower --lr")
    plain = save(tensors)
    header = int.from_bytes(plain[:8], "little")
    digest = hashlib.sha256(plain[8 + header :]).hexdigest()  # of the tensor bytes only, as other tools compute it
    return save(tensors, {**metadata, "sshs_model_hash": digest})


def describe(config: dict, images: int, step: int) -> dict[str, str]:
    """The header: what A1111 and Forge need to list the file under SDXL, ModelSpec 1.0.1, and our own `sdxl_lora.*`.

    `config` holds the flags of the run: rank, alpha, targets, resolution, model, …
    """
    name, side = f"pytorch_lora_weights_{step}", config["resolution"]
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["rank"]),
        "ss_network_alpha": str(config["alpha"]),
        "ss_network_args": json.dumps({"targets": config["targets"]}),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_output_name": name,
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(images),
        "ss_steps": str(step),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "sdxl_lora.step": str(step),
        "sdxl_lora.config": json.dumps(config),
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The header of a LoRA file. Raises UserError if it is not a readable .safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--lora {path} is not a readable .safetensors file: {error}") from None


def trained_on(path: Path) -> str:
    """The --model that a LoRA file of ours was trained with. Raises UserError if its header does not say."""
    model = json.loads(read_metadata(path).get("sdxl_lora.config", "{}")).get("model")
    if model is None:
        raise UserError(f"--lora {path} does not say which model it was trained on: add --model")
    return model


def find(path: Path) -> Path:
    """A LoRA file as it is; of a folder the newest .safetensors in it. Raises UserError if there is none."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"--lora {path}: no .safetensors file there (train one with train_lora.py)")
    return files[-1]


def read(path: Path, module_paths: list[str]) -> Deltas:
    """A LoRA file in the kohya layout, mapped onto a model's linear layers by their paths. A missing alpha means rank.

    Raises UserError, naming the first keys, if any key belongs to none of `module_paths` or a pair is incomplete.
    """
    read_metadata(path)  # for its error
    tensors = load_file(path)
    paths = {kohya_name(module): module for module in module_paths}
    parts = {"lora_down.weight", "lora_up.weight", "alpha"}
    unknown = [key for key in tensors if key.partition(".")[0] not in paths or key.partition(".")[2] not in parts]
    if unknown or not tensors:
        told = f"{len(unknown)} of {len(tensors)} keys match no layer, first {', '.join(unknown[:3])}"
        raise UserError(f"--lora {path} does not fit the model (kohya layout expected): {told}")
    deltas = {}
    for name in dict.fromkeys(key.split(".")[0] for key in tensors):
        down, up = tensors.get(f"{name}.lora_down.weight"), tensors.get(f"{name}.lora_up.weight")
        if down is None or up is None:
            raise UserError(f"--lora {path} does not fit the model: {name} lacks lora_down.weight or lora_up.weight")
        alpha = tensors.get(f"{name}.alpha", torch.tensor(float(len(down))))
        deltas[paths[name]] = (down, up, alpha.item())
    return deltas
