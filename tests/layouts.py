"""LoRA files with the tensor names of other tools. A second implementation on purpose: lora_files/ uses other rules.

Only SGM's block names are taken from lora_files/names.py; test_interop.py checks them with diffusers.
"""

import re
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_files.deltas import Deltas
from lora_files.names import kohya_name
from run.header import run_header, step_header

SUFFIXES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft named": (".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers scripts": (".lora.down.weight", ".lora.up.weight"),
    "diffusers text": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "processors": ("_lora.down.weight", "_lora.up.weight"),
}


def with_text_model(rest: str) -> str:
    rest = rest.removeprefix("text_model.")
    return rest if rest == "text_projection" else f"text_model.{rest}"


def stem(path: str, layout: str) -> str:
    """The name of a module in a layout."""
    component, _, rest = path.partition(".")
    number = {"unet": "", "text_encoder": "1", "text_encoder_2": "2"}[component]
    if layout == "kohya SGM":
        return kohya_name(path)
    if layout == "kohya diffusers":
        prefix = "lora_unet_" if component == "unet" else f"lora_te{number}_"
        return prefix + (rest if component == "unet" else with_text_model(rest)).replace(".", "_")
    if layout == "lycoris":
        return f"lycoris_{rest}".replace(".", "_") if component == "unet" else stem(path, "kohya diffusers")
    if layout == "diffusers":
        return f"{component}." + (rest if component == "unet" else with_text_model(rest))
    if layout == "processors":  # diffusers of 2023
        name = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", stem(path, "diffusers"))
        return re.sub(r"\.([qkv]|out)_proj$", r".to_\1", name)
    if layout == "transformers 5":
        return f"{component}.{rest}"
    if layout == "raw peft":
        return f"base_model.model.{rest}"
    assert layout == "comfy"
    if component == "unet":
        dotted = kohya_name(path).removeprefix("lora_unet_")
        head = re.match(r"(input_blocks|output_blocks|middle_block|time_embed|label_emb|out)((_\d+)*)", dotted)
        below = rest.split(".", {"down_blocks": 4, "up_blocks": 4, "mid_block": 3}[rest.split(".")[0]])[-1]
        return "diffusion_model." + head[0].replace("_", ".").replace("blocks.", "blocks.").replace(
            "input.blocks", "input_blocks").replace("output.blocks", "output_blocks").replace(
            "middle.block", "middle_block") + "." + below  # fmt: skip
    return f"text_encoders.clip_{'l' if number == '1' else 'g'}.transformer.{with_text_model(rest)}"


def named(deltas: Deltas, layout: str, suffix: str, alpha: bool) -> dict[str, Tensor]:
    """The tensors of a file; with `alpha`, those of α too."""
    tensors = {}
    down, up = SUFFIXES[suffix]
    for path, (A, B, value) in deltas.items():
        name = stem(path, layout)
        tensors |= {f"{name}{down}": A.clone(), f"{name}{up}": B.clone()}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(value)
    return tensors


def write(file, deltas: Deltas, layout: str, suffix: str, alpha: bool, metadata=None) -> None:
    save_file(named(deltas, layout, suffix, alpha), file, metadata)


def make_header(config: dict, images: int, step: int) -> dict[str, str]:
    """The header of a file of a run with the options `config` on so many images."""
    source = SimpleNamespace(samples=images, fingerprint="", local_captions=lambda most: ["a house, red"])
    return run_header(config, source, "epsilon", []) | step_header(config.get("name"), step)
