"""Names of SDXL's modules in LoRA files: kohya's, with the block names of Stability's code (SGM), and diffusers' own."""

from model.checkpoint import sgm_path


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
