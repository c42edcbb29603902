"""SDXL from the hub, a diffusers folder or one checkpoint file."""

import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.errors import UserError
from common.files import ROOT
from model.vae import vae_dtype

MODELS = {
    "demo": str(ROOT / "assets/demo/model"),
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
BASE = ROOT / "assets/sdxl"  # configurations and tokenizers of SDXL base: a checkpoint file has none


def load_sdxl(model: str, dtype: torch.dtype, device: torch.device) -> StableDiffusionXLPipeline:
    """`read_sdxl`, then to `device`."""
    pipe = read_sdxl(model, dtype)
    pipe.to(device)
    pipe.vae.to(vae_dtype(device))
    return pipe


def read_sdxl(model: str, dtype: torch.dtype, unet: bool = True) -> StableDiffusionXLPipeline:
    """`demo`, `sdxl`, a hub id, a diffusers folder, or a single .safetensors checkpoint -> diffusers' pipeline in `dtype` on
    the host, frozen. Without `unet` that is on the meta device: shapes only, for a quarter of the memory.

    Raises UserError in one line if there is no such model, if it is no SDXL, or if it is not here and cannot be fetched.
    """
    source = MODELS.get(model, model)
    path = Path(source)
    options = {"dtype": dtype, "add_watermarker": False, "low_cpu_mem_usage": False, "use_safetensors": True}
    try:
        if not unet:
            where = {"subfolder": "unet"} if path.suffix != ".safetensors" else {}
            told = UNet2DConditionModel.load_config(source if where else BASE / "unet", **where)
            with torch.device("meta"):
                options["unet"] = UNet2DConditionModel.from_config(told).to(dtype)
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
    pipe.vae.enable_slicing()  # one image at a time: the memory of a batch of 1
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(False).eval()
    return pipe


def from_hub(repository: str, dtype: torch.dtype, options: dict) -> StableDiffusionXLPipeline:
    """Fetches half-size files for float16 where the repository has them."""
    if dtype == torch.float16:
        try:
            return StableDiffusionXLPipeline.from_pretrained(repository, variant="fp16", **options)
        except ValueError:  # diffusers: no such files in this repository
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


def from_checkpoint(model: str, path: Path, options: dict) -> StableDiffusionXLPipeline:
    """One .safetensors file in Stability's own layout; needs no network. `v_pred` and `ztsnr` in it mean what they mean to
    ComfyUI: a model that predicts v, one whose last timestep is pure noise.

    diffusers would leave at random whatever the file lacks, so the parameters are counted first.
    Raises UserError if it is not SDXL base's architecture.
    """
    held = dict.fromkeys(CHECKPOINT.values(), 0)
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for key in keys:
                prefix = next((p for p in CHECKPOINT if key.startswith(p)), None)
                if prefix and not key.endswith(("position_ids", "logit_scale")):
                    held[CHECKPOINT[prefix]] += math.prod(file.get_slice(key).get_shape())
    except SafetensorError as error:
        raise UserError(f"--model {model} is no readable .safetensors file: {error}") from None
    with torch.device("meta"):
        for name, part in base_architecture().items():
            asked = sum(p.numel() for p in part.parameters())
            if held[name] != asked:
                raise UserError(f"--model {model} is no SDXL base checkpoint: {held[name]:,} values of {name}, not {asked:,}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(options["dtype"])  # diffusers would hold everything in float32 first: 14 GiB instead of 7
    try:
        pipe = StableDiffusionXLPipeline.from_single_file(str(path), config=str(BASE), local_files_only=True, **options)
    finally:
        torch.set_default_dtype(before)
    if "v_pred" in keys:
        how = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in keys}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **how)
    return pipe


def base_architecture() -> dict[str, nn.Module]:
    """SDXL base's models on the default device, in the default dtype, as initialised: for shapes, and for measuring."""
    one, two = (CLIPTextConfig.from_pretrained(BASE / name) for name in ("text_encoder", "text_encoder_2"))
    return {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(BASE / "unet")),
        "text_encoder": CLIPTextModel(one),
        "text_encoder_2": CLIPTextModelWithProjection(two),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(BASE / "vae")),
    }


def native_resolution(pipe: StableDiffusionXLPipeline) -> int:
    """Side in pixels of the images that the model was trained on: 1024 for SDXL."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor
