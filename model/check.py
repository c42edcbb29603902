"""What the suite relies on in a model, checked once after loading: whole, finite, and of a schedule and latents as SDXL's."""

import math
from collections.abc import Iterable, Mapping

import torch
from diffusers import StableDiffusionXLPipeline

from common.errors import UserError

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def squeezed(shape: Iterable[int]) -> list[int]:
    """A shape without its dimensions of 1: of a linear layer as of a convolution of 1 × 1 pixel."""
    return [size for size in shape if size != 1]


def check_differences(what: str, differences: Mapping[str, Iterable[str]], total: int) -> None:
    """Raises UserError for the first kind of difference, with the first name: {sentence with {} for the name: names}."""
    for sentence, keys in differences.items():
        if found := sorted(keys):
            raise UserError(f"{what} {sentence.format(found[0])} ({len(found)} of {total} tensors)")


def predictions(header: dict) -> dict[str, str]:
    """{place: what a model predicts} as the header of its file says it, which kohya's scripts write."""
    return {key: value for key, value in header.get("__metadata__", {}).items() if key == "modelspec.prediction_type"}


def agreed_prediction(model: str, statements: Mapping[str, str | None]) -> str:
    """'epsilon' or 'v_prediction', from {place: what it says that the model predicts}; epsilon if nothing says so.

    Raises UserError if it is something else, or if two places contradict each other.
    """
    for place, said in statements.items():
        if said not in PREDICTIONS:
            raise UserError(f"--model {model} predicts {said!r}, as {place} says; only epsilon and v_prediction can be used")
    agreed = {PREDICTIONS[str(said)] for said in statements.values()} or {"epsilon"}
    if len(agreed) > 1:
        contradiction = ", ".join(f"{place} says {said}" for place, said in statements.items())
        hint = "--prediction-type of train_lora.py and infer.py decides"
        raise UserError(f"--model {model} contradicts itself about what it predicts: {contradiction}; {hint}")
    return agreed.pop()


def check_channels(model: str, channels: int = 4) -> None:
    """Raises UserError unless the U-Net takes the 4 channels of the latents."""
    if channels != 4:
        kind = "an inpainting model" if channels == 9 else "no SDXL base model"
        raise UserError(f"--model {model} is {kind}: its U-Net takes {channels} channels, not 4")


def check_model(model: str, pipe: StableDiffusionXLPipeline) -> None:
    """Raises UserError unless `pipe` is what training, inference and caching compute with."""
    unet, vae, text, text_2 = pipe.unet.config, pipe.vae.config, pipe.text_encoder.config, pipe.text_encoder_2.config
    check_channels(model, unet.in_channels)
    width, pooled = text.hidden_size + text_2.hidden_size, text_2.projection_dim + 6 * (unet.addition_time_embed_dim or 0)
    needed = {  # {what: (found, needed)}
        "channels of the prediction": (unet.out_channels, 4),
        "channels of the latents": (vae.latent_channels, 4),
        "pixels a side of a latent": (2 ** (len(vae.block_out_channels) - 1), 8),
        "the micro-conditioning": (unet.addition_embed_type, "text_time"),
        "the width of the micro-conditioning": (unet.projection_class_embeddings_input_dim, pooled),
        "channels of the text": (unet.cross_attention_dim, width),
        "the embedding of the guidance": (unet.time_cond_proj_dim, None),
        "the shift of the latents": (vae.shift_factor or None, None),
        "tokens of a chunk": ({text.max_position_embeddings, text_2.max_position_embeddings}, {77}),
    }
    for what, (found, wanted) in needed.items():
        if found != wanted:
            raise UserError(f"--model {model} cannot be used here: {what}: {found}, not {wanted}")
    if type(unet.sample_size) is not int or unet.sample_size < 1:
        raise UserError(f"--model {model}: its U-Net's config.json has no sample_size, the side of its latents")
    for number, (tokenizer, rows) in enumerate(((pipe.tokenizer, text), (pipe.tokenizer_2, text_2)), 1):
        found = len(tokenizer), tokenizer.model_max_length
        if found != (rows.vocab_size, 77):
            of_encoder = f"{found[0]} tokens, {found[1]} in a caption: its encoder needs {rows.vocab_size} and 77"
            raise UserError(f"--model {model}: tokenizer {number} is not the model's: it has {of_encoder}")
        if rows.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: as of SDXL base, where it means the largest token
            raise UserError(f"--model {model}: eos_token_id of text encoder {number} is not its tokenizer's")
    check_statistics(model, vae)
    check_schedule(model, pipe.scheduler)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for key, tensor in getattr(pipe, name).state_dict().items():
            if tensor.is_meta and name != "unet":
                raise UserError(f"--model {model}: {name}.{key} was not read")
            if not tensor.is_meta and not torch.stack(tensor.aminmax()).isfinite().all():
                raise UserError(f"--model {model}: {name}.{key} is not finite in {str(tensor.dtype).removeprefix('torch.')}")


def check_statistics(model: str, vae) -> None:
    """Raises UserError unless the numbers that scale the latents are positive, and as many as the latents have channels."""
    mean, std = vae.latents_mean or [0.0] * 4, vae.latents_std or [1.0] * 4
    rows = (mean, std, [vae.scaling_factor])
    numbers = all(isinstance(x, int | float) and math.isfinite(x) for row in rows if isinstance(row, list) for x in row)
    lengths = [len(row) for row in rows if isinstance(row, list)]
    both = (vae.latents_mean is None) == (vae.latents_std is None)
    if not (numbers and both and lengths == [4, 4, 1] and min(*std, vae.scaling_factor) > 0):
        raise UserError(f"--model {model}: its VAE's latents_mean, latents_std or scaling_factor in config.json are not usable")


def check_schedule(model: str, scheduler) -> None:
    """Raises UserError unless a scheduler of diffusers has ᾱ for every timestep, from which ε or v can be predicted."""
    config, name = scheduler.config, type(scheduler).__name__
    alphas = getattr(scheduler, "alphas_cumprod", None)
    flow = config.get("use_flow_sigmas") or config.get("timestep_type", "discrete") != "discrete"
    if alphas is None or flow or not ((alphas >= 0) & (alphas <= 1)).all() or not (alphas.diff() <= 0).all():
        raise UserError(f"--model {model} has {name}, a schedule that cannot be used here: it has no ᾱ that falls from 1 to 0")
    if config.prediction_type == "epsilon" and (config.get("rescale_betas_zero_snr") or alphas[-1] == 0):
        raise UserError(f"--model {model} predicts ε, but its last timestep is pure noise, from which only v can be predicted")
    type(scheduler).from_config(config).set_timesteps(8)  # raises what sampling would raise


def describe_model(pipe: StableDiffusionXLPipeline) -> str:
    """What was taken from the files of a model and decides what is learned."""
    alphas, vae = pipe.scheduler.alphas_cumprod, pipe.vae.config
    target = "v" if pipe.scheduler.config.prediction_type == "v_prediction" else "ε"
    own = ", the VAE's own mean and deviation" if vae.latents_mean or vae.latents_std else ""
    schedule = f"ᾱ {alphas[0]:.4g} to {alphas[-1]:.4g} in {len(alphas)} timesteps"
    return f"{target}, {schedule}; latents × {vae.scaling_factor:.5g}{own}"
