"""Names of SDXL's modules in LoRA files: kohya's, with the block names of Stability's code (SGM), and diffusers' own."""

import re
from collections.abc import Callable
from functools import partial

# Pattern of a diffusers path in the U-Net -> its SGM path, from the numbers that the pattern matches.
# SGM numbers the blocks of each half in one list. input_blocks.0 is conv_in; then every down block i has 3 entries: resnet
# (and attention) 0, resnet (and attention) 1, downsampler. So layer j of down block i is entry 3·i + j + 1:
# down_blocks.1.attentions.0 is in input_blocks.4. An up block has 3 entries, too, resnets (and attentions) 0 to 2; its
# upsampler belongs to the last. Inside an entry .0 is the resnet, .1 the attention. The middle block is resnet .0,
# attention .1 and resnet .2. In time_embed and label_emb .0 and .2 are the linear layers, .1 is SiLU.
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


def sgm_path(path: str) -> str:
    """A path inside the U-Net: 'down_blocks.1.attentions.0.….to_q' -> 'input_blocks.4.1.….to_q'."""
    for pattern, name in SGM_BLOCKS:
        path = re.sub(pattern, partial(replacement, name), path)
    return path


def replacement(name: Callable[..., str], match: re.Match) -> str:
    """Calls a function of SGM_BLOCKS with the numbers that its pattern matched."""
    return name(*map(int, match.groups()))


def from_sgm(path: str) -> str:
    """The inverse of `sgm_path`: 'input_blocks.4.1.….to_q' -> 'down_blocks.1.attentions.0.….to_q'."""
    leaves = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    outside_blocks = {"input_blocks.0.0": "conv_in", "out.2": "conv_out"}
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
