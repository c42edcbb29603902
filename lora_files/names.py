"""Names of SDXL's modules in LoRA files: kohya's, with the block names of Stability's code (SGM), and diffusers' own."""

import re

from model.checkpoint import sgm_path


def from_sgm(path: str) -> str:
    """The inverse of `sgm_path`: 'input_blocks.4.1.….to_q' -> 'down_blocks.1.attentions.0.….to_q'."""
    leaves = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
        "in_layers.0": "norm1",
        "out_layers.0": "norm2",
    }
    outside_blocks = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    outside_blocks |= {f"time_embed.{2 * i}": f"time_embedding.linear_{i + 1}" for i in range(2)}
    outside_blocks |= {f"label_emb.0.{2 * i}": f"add_embedding.linear_{i + 1}" for i in range(2)}
    match = re.fullmatch(r"(input|middle|output)_blocks?\.(?:(\d+)\.)?(\d+)\.(.+)", path)
    if path in outside_blocks or not match:
        return outside_blocks.get(path, path)
    section, entry, position, rest = match[1], int(match[2] or 0), int(match[3]), leaves.get(match[4], match[4])
    if section == "middle":
        return f"mid_block.attentions.0.{rest}" if position == 1 else f"mid_block.resnets.{position // 2}.{rest}"
    block, layer = divmod(entry - 1 if section == "input" else entry, 3)
    direction = "down" if section == "input" else "up"
    if rest in ("op", "conv"):
        return f"{direction}_blocks.{block}.{direction}samplers.0.conv"
    return f"{direction}_blocks.{block}.{'attentions' if position == 1 else 'resnets'}.{layer}.{rest}"


def kohya_name(path: str) -> str:
    """A module's name in the kohya layout: 'unet.down_blocks.1.attentions.0.….to_q' -> 'lora_unet_input_blocks_4_1_…_to_q'.

    In transformers 5 text encoder 1 has no child `text_model` any more, text encoder 2 has; names in files always contain it.
    """
    component, _, rest = path.partition(".")
    if component == "unet":
        return f"lora_unet_{sgm_path(rest)}".replace(".", "_")
    prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{diffusers_name(path).partition('.')[2]}".replace(".", "_")


def diffusers_name(path: str) -> str:
    """A module's name in diffusers' layout: 'text_encoder.encoder.…' -> 'text_encoder.text_model.encoder.…'."""
    component, _, rest = path.partition(".")
    rest = rest.removeprefix("text_model.")
    return f"{component}.{rest}" if component == "unet" or rest == "text_projection" else f"{component}.text_model.{rest}"
