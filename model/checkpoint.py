"""A checkpoint in one file: the names of Stability's code (SGM) for the tensors of diffusers' and transformers' modules."""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

PREFIXES = {  # part of the pipeline -> prefix of its names
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}

# SGM numbers the blocks of each half in one list. input_blocks.0 is conv_in; then every down block i has 3 entries: resnet
# (and attention) 0, resnet (and attention) 1, downsampler. So layer j of down block i is entry 3·i + j + 1:
# down_blocks.1.attentions.0 is in input_blocks.4. An up block has 3 entries, too, resnets (and attentions) 0 to 2; its
# upsampler belongs to the last. Inside an entry .0 is the resnet, .1 the attention. The middle block is resnet .0,
# attention .1 and resnet .2. In time_embed and label_emb .0 and .2 are the linear layers, .1 is SiLU.
Table: TypeAlias = dict[str, str | Callable[[re.Match], str]]  # pattern in a name -> what stands there in a checkpoint
SGM_BLOCKS: Table = {
    r"(?<=resnets\.\d)\.norm1$": ".in_layers.0",
    r"(?<=resnets\.\d)\.norm2$": ".out_layers.0",
    r"^down_blocks\.(\d+)\.attentions\.(\d+)": lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1",
    r"^down_blocks\.(\d+)\.resnets\.(\d+)": lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.(\d+)": lambda m: f"middle_block.{2 * int(m[1])}",
    r"^up_blocks\.(\d+)\.attentions\.(\d+)": lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1",
    r"^up_blocks\.(\d+)\.resnets\.(\d+)": lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0",
    r"^time_embedding\.linear_(\d)": lambda m: f"time_embed.{2 * int(m[1]) - 2}",
    r"^add_embedding\.linear_(\d)": lambda m: f"label_emb.0.{2 * int(m[1]) - 2}",
    r"^down_blocks\.(\d+)\.downsamplers\.0\.conv$": lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op",
    r"^up_blocks\.(\d+)\.upsamplers\.0\.conv$": lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2.conv",
    r"^conv_in$": "input_blocks.0.0",
    r"^conv_out$": "out.2",
    r"^conv_norm_out$": "out.0",
    r"\.conv1$": ".in_layers.2",
    r"\.conv2$": ".out_layers.3",
    r"\.conv_shortcut$": ".skip_connection",
    r"\.time_emb_proj$": ".emb_layers.1",
}
TEXT_ENCODER_2: Table = {  # OpenCLIP's names
    r"^text_model\.": "",
    r"^embeddings\.": "",
    r"^encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm(\d)": r".ln_\1",
    r"^final_layer_norm": "ln_final",
    r"\.self_attn\.out_proj": ".attn.out_proj",
    r"\.self_attn\.[qkv]_proj\.": ".attn.in_proj_",
    r"\.mlp\.fc1": ".mlp.c_fc",
    r"\.mlp\.fc2": ".mlp.c_proj",
    r"^position_embedding\.weight": "positional_embedding",
    r"^text_projection\.weight": "text_projection",
}
VAE: Table = {  # its upward blocks are numbered from the other end
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


def renamed(name: str, table: Table) -> str:
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def sgm_path(path: str) -> str:
    """A path inside the U-Net: 'down_blocks.1.attentions.0.….to_q' -> 'input_blocks.4.1.….to_q'."""
    return renamed(path, SGM_BLOCKS)


def with_text_model(name: str) -> str:
    """The name that the hub's files have for a tensor of text encoder 1, whose `text_model.` transformers 5 has dropped."""
    return f"text_model.{name.removeprefix('text_model.')}"


def checkpoint_names(parameters: Iterable[str]) -> dict[str, list[str]]:
    """{key in a checkpoint: paths of the parameters that it holds, such as 'unet.conv_in.weight'}: one parameter, or of text
    encoder 2 those of q, k and v, as rows in this order.
    """
    names: dict[str, list[str]] = {}
    for parameter in parameters:
        component, _, name = parameter.partition(".")
        if component == "unet":
            path, _, leaf = name.rpartition(".")
            name = f"{sgm_path(path)}.{leaf}"
        elif component == "text_encoder":
            name = with_text_model(name)
        else:
            name = renamed(name, TEXT_ENCODER_2 if component == "text_encoder_2" else VAE)
        names.setdefault(PREFIXES[component] + name, []).append(parameter)
    return {key: sorted(own, key=lambda path: "qkv".find(path.partition("_proj.")[0][-1])) for key, own in names.items()}


def checkpoint_of(parts: Any) -> dict[str, Tensor]:
    """{key: contiguous tensor} of the modules unet, text_encoder, text_encoder_2 and, if it has one, vae of `parts`.

    On the meta device: the keys and shapes of a file that is whole.
    """
    modules = {component: getattr(parts, component) for component in PREFIXES if hasattr(parts, component)}
    state = {f"{component}.{name}": t for component, module in modules.items() for name, t in module.state_dict().items()}
    tensors = {"conditioner.embedders.1.model.logit_scale": torch.ones(())}
    for key, names in checkpoint_names(state).items():
        tensor = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        if key.endswith("text_projection"):
            tensor = tensor.T
        if "attn_1" in key and tensor.ndim == 2:  # a convolution of 1 × 1 pixel, where diffusers has a linear layer
            tensor = tensor[:, :, None, None]
        tensors[key] = tensor.detach().contiguous()
    return tensors
