"""A checkpoint in one file, with the names of Stability's code, made of a pipeline: for tests of reading and merging."""

import re

import torch

from lora_files.names import sgm_path

TEXT = {
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
VAE = {
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


def renamed(key: str, table: dict) -> str:
    for pattern, to in table.items():
        key = re.sub(pattern, to, key)
    return key


def checkpoint_of(parts) -> dict[str, torch.Tensor]:
    """{key: tensor} of the modules unet, text_encoder, text_encoder_2 and, if it has one, vae of `parts`."""
    tensors = {"conditioner.embedders.1.model.logit_scale": torch.ones(())}
    for key, tensor in parts.unet.state_dict().items():
        path, _, leaf = key.rpartition(".")
        path = sgm_path(path)
        if ".transformer_blocks." not in path:
            path = renamed(path, {r"\.norm1$": ".in_layers.0", r"\.norm2$": ".out_layers.0", "^conv_norm_out$": "out.0"})
        tensors[f"model.diffusion_model.{path}.{leaf}"] = tensor
    for key, tensor in parts.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    second = parts.text_encoder_2.state_dict()
    for key, tensor in second.items():
        if ".q_proj." in key:  # one tensor: the rows of q, then of k, then of v
            tensor = torch.cat([second[key.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
        if not re.search(r"\.[kv]_proj\.", key):
            name = renamed(key, TEXT)
            tensors[f"conditioner.embedders.1.model.{name}"] = tensor.T if name == "text_projection" else tensor
    for key, tensor in parts.vae.state_dict().items() if hasattr(parts, "vae") else ():
        name = renamed(key, VAE)
        convolution = "attn_1" in name and tensor.ndim == 2  # of 1 × 1 pixel, where diffusers has a linear layer
        tensors[f"first_stage_model.{name}"] = tensor[:, :, None, None] if convolution else tensor
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
