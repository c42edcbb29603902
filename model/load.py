"""Loads SDXL from the Hugging Face hub, a diffusers folder or a single checkpoint file."""

import json
import math
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.errors import UserError
from common.files import ROOT
from model.vae import vae_dtype

Pipeline: TypeAlias = StableDiffusionXLPipeline  # for other rooms, which must not import diffusers before this package

MODELS = {
    "demo": str(ROOT / "assets/demo/model"),
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
BASE = ROOT / "assets/sdxl"  # configurations and tokenizers of SDXL base, which a checkpoint file does not contain


def load_sdxl(model: str, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """Like `read_sdxl`, then moved to `device`; the VAE in `vae_dtype`."""
    pipe = read_sdxl(model, dtype)
    pipe.to(device)
    pipe.vae.to(vae_dtype(device))
    return pipe


def read_sdxl(model: str, dtype: torch.dtype, unet: bool = True) -> Pipeline:
    """Returns diffusers' pipeline in `dtype`, on the CPU, frozen and in eval mode.

    `model`: "demo", "sdxl", a hub id, a diffusers folder, or a single .safetensors checkpoint. With `unet=False` the U-Net is
    on the meta device: shapes without weights, which saves three quarters of the memory.

    Raises UserError if there is no such model, if it is not SDXL, or if it is neither on this machine nor can be downloaded.
    """
    source = MODELS.get(model, model)
    path = Path(source)
    options = {"dtype": dtype, "add_watermarker": False, "low_cpu_mem_usage": False, "use_safetensors": True}
    try:
        if not unet:
            if path.suffix == ".safetensors":
                unet_config = UNet2DConditionModel.load_config(BASE / "unet")
            else:
                unet_config = UNet2DConditionModel.load_config(source, subfolder="unet")
            with torch.device("meta"):
                options["unet"] = UNet2DConditionModel.from_config(unet_config).to(dtype)
        if path.is_dir():
            check_folder(model, path)
            variant = "fp16" if any(path.glob("unet/*.fp16.safetensors")) else None
            pipe = StableDiffusionXLPipeline.from_pretrained(path, variant=variant, local_files_only=True, **options)
        elif path.suffix == ".safetensors" and path.is_file():
            pipe = from_checkpoint(model, path, options)
        elif path.suffix == ".safetensors" or path.is_absolute() or source.startswith(".") or source.count("/") != 1:
            raise UserError(f"--model {model}: no such file or folder (nor 'demo', 'sdxl' or a hub id like owner/name)")
        else:
            pipe = from_hub(source, dtype, options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if path.exists():
            kind = "folder" if path.is_dir() else "checkpoint"
            raise UserError(f"--model {model} is no complete SDXL {kind}: {str(error).splitlines()[0][:300]}") from None
        raise UserError(
            f"--model {model} needs files of {source} that are not on this machine and could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0][:150]}); where there is network run "
            f"`hf download {source} --local-dir sdxl`, copy the folder here and pass --model sdxl/"
        ) from None
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # image by image: the memory of a batch of 1
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(False).eval()
    return pipe


def from_hub(repository: str, dtype: torch.dtype, options: dict) -> Pipeline:
    """Loads a repository, for float16 from its "fp16" files, which are half as large, if it has them."""
    if dtype == torch.float16:
        try:
            return StableDiffusionXLPipeline.from_pretrained(repository, variant="fp16", **options)
        except ValueError:  # raised by diffusers if the repository has no such files
            pass
    return StableDiffusionXLPipeline.from_pretrained(repository, **options)


def check_folder(model: str, folder: Path) -> None:
    """Raises UserError unless `folder` is a diffusers folder of the SDXL base architecture."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--model {model} is no diffusers folder: it has no model_index.json")
    try:
        kind = json.loads(index.read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"--model {model}: model_index.json is not JSON") from None
    if kind != "StableDiffusionXLPipeline":
        raise UserError(f"--model {model} is no SDXL: its model_index.json says {kind}, not StableDiffusionXLPipeline")


CHECKPOINT = {  # prefix of the names in a checkpoint file -> part of the pipeline
    "model.diffusion_model.": "unet",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "first_stage_model.": "vae",
}


def from_checkpoint(model: str, path: Path, options: dict) -> Pipeline:
    """Reads one .safetensors file in Stability's layout, without network. The keys `v_pred` and `ztsnr` mean the same as in
    ComfyUI: the model predicts v; its last timestep is pure noise.

    diffusers leaves a parameter that the file lacks at its random initialisation, so this counts the parameters first.
    Raises UserError if they are not those of SDXL base.
    """
    sizes = dict.fromkeys(CHECKPOINT.values(), 0)
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for key in keys:
                prefix = next((p for p in CHECKPOINT if key.startswith(p)), None)
                if prefix and not key.endswith(("position_ids", "logit_scale")):
                    sizes[CHECKPOINT[prefix]] += math.prod(file.get_slice(key).get_shape())
    except SafetensorError as error:
        raise UserError(f"--model {model} is no readable .safetensors file: {error}") from None
    with torch.device("meta"):
        for name, part in base_architecture().items():
            expected = sum(p.numel() for p in part.parameters())
            if sizes[name] != expected:
                raise UserError(
                    f"--model {model} is no SDXL base checkpoint: {sizes[name]:,} values of {name}, not {expected:,}"
                )
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(options["dtype"])  # otherwise diffusers loads everything in float32 first: 14 GiB instead of 7
    try:
        pipe = StableDiffusionXLPipeline.from_single_file(str(path), config=str(BASE), local_files_only=True, **options)
    finally:
        torch.set_default_dtype(default_dtype)
    if "v_pred" in keys:
        objective = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in keys}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **objective)
    return pipe


def base_architecture() -> dict[str, nn.Module]:
    """SDXL base's models with random weights, on the default device and in the default dtype: for shapes and benchmarks."""
    text_config, text_config_2 = (CLIPTextConfig.from_pretrained(BASE / name) for name in ("text_encoder", "text_encoder_2"))
    return {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(BASE / "unet")),
        "text_encoder": CLIPTextModel(text_config),
        "text_encoder_2": CLIPTextModelWithProjection(text_config_2),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(BASE / "vae")),
    }


def native_resolution(pipe: StableDiffusionXLPipeline) -> int:
    """Side in pixels of the images that the model was trained on: 1024 for SDXL."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor
