"""A checkpoint in one file: the names of Stability's code (SGM) for the tensors of diffusers' and transformers' modules."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

PREFIXES = {  # part of the pipeline -> prefix of its names
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}

# Pattern of a diffusers path in the U-Net -> its SGM path, from the numbers that the pattern matches.
# SGM numbers the blocks of each half in one list. input_blocks.0 is conv_in; then every down block i has 3 entries: resnet
# (and attention) 0, resnet (and attention) 1, downsampler. So layer j of down block i is entry 3·i + j + 1:
# down_blocks.1.attentions.0 is in input_blocks.4. An up block has 3 entries, too, resnets (and attentions) 0 to 2; its
# upsampler belongs to the last. Inside an entry .0 is the resnet, .1 the attention. The middle block is resnet .0,
# attention .1 and resnet .2. In time_embed and label_emb .0 and .2 are the linear layers, .1 is SiLU.
SGM_BLOCKS: list[tuple[str, Callable[..., str]]] = [
    (r"(?<=resnets\.\d)\.norm1$", lambda: ".in_layers.0"),
    (r"(?<=resnets\.\d)\.norm2$", lambda: ".out_layers.0"),
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
    (r"^conv_norm_out$", lambda: "out.0"),
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


TEXT_ENCODER_2 = {  # pattern in a name of text encoder 2 -> what stands in OpenCLIP's
    r"^text_model\.": "",
    r"^embeddings\.": "",
    r"^encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm(\d)": r".ln_\1",
    r"^final_layer_norm": "ln_final",
    r"\.self_attn\.out_proj": ".attn.out_proj",
    r"\.self_attn\.q_proj\.": ".attn.in_proj_",
    r"\.mlp\.fc1": ".mlp.c_fc",
    r"\.mlp\.fc2": ".mlp.c_proj",
    r"^position_embedding\.weight": "positional_embedding",
    r"^text_projection\.weight": "text_projection",
}
VAE = {  # the same for the VAE; its upward blocks are numbered from the other end
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"up_blocks\.(\d)\.resnets": lambda match: f"up.{3 - int(match[1])}.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.(\d)\.upsamplers\.0": lambda match: f"up.{3 - int(match[1])}.upsample",
    r"mid_block\.resnets\.(\d)": lambda match: f"mid.block_{int(match[1]) + 1}",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.to_out\.0": "attn_1.proj_out",
    r"attn_1\.to_([qkv])": r"attn_1.\1",
    r"conv_shortcut": "nin_shortcut",
    r"conv_norm_out": "norm_out",
}


def renamed(name: str, table: dict) -> str:
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def with_text_model(name: str) -> str:
    """The name that the hub's files have for a tensor of text encoder 1, whose `text_model.` transformers 5 has dropped."""
    return f"text_model.{name.removeprefix('text_model.')}"


def checkpoint_of(parts: Any) -> dict[str, Tensor]:
    """{key: contiguous tensor} of the modules unet, text_encoder, text_encoder_2 and, if it has one, vae of `parts`.

    On the meta device: the keys and shapes of a file that is whole.
    """
    tensors = {"conditioner.embedders.1.model.logit_scale": torch.ones(())}
    for name, tensor in parts.unet.state_dict().items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{PREFIXES['unet']}{sgm_path(path)}.{leaf}"] = tensor
    for name, tensor in parts.text_encoder.state_dict().items():
        tensors[PREFIXES["text_encoder"] + with_text_model(name)] = tensor
    second = parts.text_encoder_2.state_dict()
    for name, tensor in second.items():
        if ".q_proj." in name:  # one tensor: the rows of q, then of k, then of v
            tensor = torch.cat([second[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
        if not re.search(r"\.[kv]_proj\.", name):
            key = renamed(name, TEXT_ENCODER_2)
            tensors[PREFIXES["text_encoder_2"] + key] = tensor.T if key == "text_projection" else tensor
    for name, tensor in parts.vae.state_dict().items() if hasattr(parts, "vae") else ():
        key = renamed(name, VAE)
        convolution = "attn_1" in key and tensor.ndim == 2  # of 1 × 1 pixel, where diffusers has a linear layer
        tensors[PREFIXES["vae"] + key] = tensor[:, :, None, None] if convolution else tensor
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
