"""Names of SDXL's modules in LoRA files: kohya's, with SGM blocks, and diffusers' own."""

import re
from collections.abc import Callable
from functools import partial

# diffusers path -> the path in Stability's own (SGM) code, which the kohya layout flattens.
SGM_BLOCKS: list[tuple[str, Callable[..., str]]] = [
    (r"^down_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"input_blocks.{3 * i + j + 1}.1"),
    (r"^down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"input_blocks.{3 * i + j + 1}.0"),
    (r"^mid_block\.attentions\.0", lambda: "middle_block.1"),
    (r"^mid_block\.resnets\.(\d+)", lambda j: f"middle_block.{2 * j}"),
    (r"^up_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"output_blocks.{3 * i + j}.1"),
    (r"^up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"output_blocks.{3 * i + j}.0"),
    (r"^time_embedding\.linear_(\d)", lambda i: f"time_embed.{2 * i - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda i: f"label_emb.0.{2 * i - 2}"),
    (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv$", lambda i: f"input_blocks.{3 * i + 3}.0.op"),
    (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv$", lambda i: f"output_blocks.{3 * i + 2}.2.conv"),
    (r"^conv_in$", lambda: "input_blocks.0.0"),
    (r"^conv_out$", lambda: "out.2"),
    (r"\.conv1$", lambda: ".in_layers.2"),
    (r"\.conv2$", lambda: ".out_layers.3"),
    (r"\.conv_shortcut$", lambda: ".skip_connection"),
    (r"\.time_emb_proj$", lambda: ".emb_layers.1"),
]


def sgm_path(rest: str) -> str:
    """'down_blocks.1.attentions.0.….to_q' -> 'input_blocks.4.1.….to_q', of the U-Net."""
    for pattern, name in SGM_BLOCKS:
        rest = re.sub(pattern, partial(in_sgm, name), rest)
    return rest


def in_sgm(name: Callable[..., str], match: re.Match) -> str:
    return name(*map(int, match.groups()))


def from_sgm(path: str) -> str:
    """The other way: 'input_blocks.4.1.….to_q' -> 'down_blocks.1.attentions.0.….to_q'."""
    leaves = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    whole = {"input_blocks.0.0": "conv_in", "out.2": "conv_out"}
    whole |= {f"time_embed.{2 * i}": f"time_embedding.linear_{i + 1}" for i in range(2)}
    whole |= {f"label_emb.0.{2 * i}": f"add_embedding.linear_{i + 1}" for i in range(2)}
    match = re.fullmatch(r"(input|middle|output)_blocks?\.(?:(\d+)\.)?(\d+)\.(.+)", path)
    if path in whole or not match:
        return whole.get(path, path)
    side, number, kind, rest = match[1], int(match[2] or 0), int(match[3]), leaves.get(match[4], match[4])
    if side == "middle":
        return f"mid_block.attentions.0.{rest}" if kind == 1 else f"mid_block.resnets.{kind // 2}.{rest}"
    block, layer = divmod(number - (side == "input"), 3)
    name = "down" if side == "input" else "up"
    if rest in ("op", "conv"):
        return f"{name}_blocks.{block}.{name}samplers.0.conv"
    return f"{name}_blocks.{block}.{'attentions' if kind == 1 else 'resnets'}.{layer}.{rest}"


def kohya_name(path: str) -> str:
    """'unet.down_blocks.1.attentions.0.….to_q' -> 'lora_unet_input_blocks_4_1_…_to_q', and likewise for both text encoders.

    transformers 5 took the child `text_model` out of one text encoder and left it in the other; files always have it.
    """
    component, _, rest = path.partition(".")
    if component == "unet":
        return f"lora_unet_{sgm_path(rest)}".replace(".", "_")
    prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{diffusers_name(path).partition('.')[2]}".replace(".", "_")


def diffusers_name(path: str) -> str:
    """The same in diffusers' layout: 'text_encoder.encoder.…' -> 'text_encoder.text_model.encoder.…'."""
    component, _, rest = path.partition(".")
    rest = rest.removeprefix("text_model.")
    return f"{component}.{rest}" if component == "unet" or rest == "text_projection" else f"{component}.text_model.{rest}"
