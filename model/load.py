"""Loads SDXL from the Hugging Face hub, a diffusers folder or a single checkpoint file."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from common.files import ROOT
from common.safetensors_files import check_dtypes, read_header, why_no_safetensors
from model.check import agreed_prediction, check_channels, check_differences, check_model, predictions, squeezed
from model.checkpoint import PREFIXES, checkpoint_of
from model.vae import vae_dtype

Pipeline: TypeAlias = StableDiffusionXLPipeline  # for other rooms, which must not import diffusers before this package

MODELS = {
    "demo": str(ROOT / "assets/demo/model"),
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
CLASSES = {  # of the pipeline -> the class that the suite knows
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
BASE = ROOT / "assets/sdxl"  # configurations and tokenizers of SDXL base, which a checkpoint file does not contain

for library in (diffusers_logging, transformers_logging):  # what is wrong with a model is said by its check, in one line
    library.set_verbosity_error()
    library.disable_progress_bar()


def load_sdxl(
    model: str, dtype: torch.dtype, device: torch.device, prediction: str = "auto", zero_snr: str = "auto"
) -> Pipeline:
    """Like `read_sdxl`, then moved to `device`; the VAE in `vae_dtype`."""
    pipe = read_sdxl(model, dtype, prediction=prediction, zero_snr=zero_snr)
    pipe.to(device)
    pipe.vae.to(vae_dtype(device))
    return pipe


def read_sdxl(model: str, dtype: torch.dtype, unet: bool = True, prediction: str = "auto", zero_snr: str = "auto") -> Pipeline:
    """Returns diffusers' pipeline in `dtype`, on the CPU, frozen, in eval mode, and checked by `model.check`.

    `model`: "demo", "sdxl", a hub id, a diffusers folder, or a single .safetensors checkpoint. With `unet=False` the U-Net is
    on the meta device: shapes without weights, which saves three quarters of the memory. `prediction`: what the model predicts,
    "epsilon" or "v_prediction"; `zero_snr`: "yes" or "no", does its schedule end at zero terminal SNR (Lin et al. 2023,
    arXiv:2305.08891)? "auto": what its files say.

    Raises UserError if there is no such model, if it is not SDXL or not whole, if it holds numbers or a schedule that cannot
    be used here, or if it is neither on this machine nor can be downloaded.
    """
    source = MODELS.get(model, model)
    path = Path(source)
    try:
        if path.is_dir():
            pipe = from_folder(model, path, dtype, unet, prediction)
        elif path.exists():
            pipe = from_checkpoint(model, path, dtype, unet, prediction)
        elif path.suffix.lower() in WEIGHT_SUFFIXES or path.is_absolute() or source.startswith(".") or source.count("/") != 1:
            raise UserError(f"--model {model}: no such file or folder (nor 'demo', 'sdxl' or a hub id like owner/name)")
        else:
            pipe = from_folder(model, download(source, dtype), dtype, unet, prediction)
        if zero_snr != "auto":
            told = pipe.scheduler.config.prediction_type
            pipe.scheduler = with_prediction(pipe.scheduler, told, rescale_betas_zero_snr=zero_snr == "yes")
            if (pipe.scheduler.alphas_cumprod[-1] < 1e-6) != (zero_snr == "yes"):
                raise UserError(f"--zero-snr {zero_snr} cannot be had with {type(pipe.scheduler).__name__} of --model {model}")
        check_model(model, pipe)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the libraries raise anything for files that are not as they expect
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        if path.exists():
            kind = "folder" if path.is_dir() else "checkpoint"
            raise UserError(f"--model {model} is no complete SDXL {kind}: {reason}") from None
        raise UserError(
            f"--model {model} needs files of {source} that are not on this machine and could not be fetched ({reason}); where "
            f"there is network run `hf download {source} --local-dir sdxl`, copy the folder here and pass --model sdxl/"
        ) from None
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # image by image: the memory of a batch of 1
    for name in CLASSES:
        getattr(pipe, name).requires_grad_(False).eval()
    return pipe


def download(repository: str, dtype: torch.dtype) -> Path:
    """The local copy of a repository; for float16 with its "fp16" files, which are half as large, if it has them."""
    options = {"use_safetensors": True}
    if dtype == torch.float16:
        try:
            return Path(StableDiffusionXLPipeline.download(repository, variant="fp16", **options))
        except ValueError:  # raised by diffusers if the repository has no such files
            pass
    return Path(StableDiffusionXLPipeline.download(repository, **options))


def from_folder(model: str, folder: Path, dtype: torch.dtype, unet: bool, prediction: str) -> Pipeline:
    """Reads a diffusers folder. The libraries fill what the files lack with random numbers: their report is checked."""
    check_folder(model, folder)
    parts: dict[str, Any] = {}
    statements: dict[str, str | None] = {}
    for name, kind in CLASSES.items():
        headers = {file: read_header(file)[1] for file in (folder / name).glob("*.safetensors")}
        for file, header in headers.items():
            check_dtypes(file, header, exempt="position_ids")
            statements |= predictions(header) if name == "unet" else {}
        if name == "unet" and not unet:
            parts[name] = empty_unet(folder / name, dtype)
            continue
        halves = [file for file in headers if ".fp16." in file.name]
        part, report = kind.from_pretrained(
            folder / name, dtype=dtype, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False,
            variant="fp16" if halves and (dtype == torch.float16 or len(halves) == len(headers)) else None,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        differences = {
            "lacks {}": report["missing_keys"],
            "has {}, which SDXL does not know": report["unexpected_keys"],
            "has another shape of {}": [key for key, *_ in report["mismatched_keys"]],
        }
        check_differences(f"--model {model} is no complete SDXL folder: {name}", differences, len(part.state_dict()))
        parts[name] = part
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False, **parts)
    statements["scheduler_config.json"] = pipe.scheduler.config.get("prediction_type", "epsilon")
    told = agreed_prediction(model, statements) if prediction == "auto" else prediction
    pipe.scheduler = with_prediction(pipe.scheduler, told)
    return pipe


def with_prediction(scheduler: Any, prediction: str, **changes: bool) -> Any:
    """The scheduler for a model that predicts 'epsilon' or 'v_prediction'. `changes`: of its configuration."""
    config = {"clip_sample": False} | dict(scheduler.config)  # without it DDIM would clip latents like pixels
    return type(scheduler).from_config(config | changes, prediction_type=prediction)


def empty_unet(config: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A U-Net on the meta device from the configuration in a folder."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config)).to(dtype)


def check_folder(model: str, folder: Path) -> None:
    """Raises UserError unless `folder` is a diffusers folder of SDXL's pipeline and its classes."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--model {model} is no diffusers folder: it has no model_index.json")
    try:
        entries = json.loads(index.read_text("utf-8"))
        kind = entries.get("_class_name")
    except (ValueError, AttributeError):
        raise UserError(f"--model {model}: model_index.json is not JSON") from None
    if kind != "StableDiffusionXLPipeline":
        raise UserError(f"--model {model} is no SDXL: its model_index.json says {kind}, not StableDiffusionXLPipeline")
    for name, part in CLASSES.items():
        if (found := (entries.get(name) or [None])[-1]) != part.__name__:
            raise UserError(f"--model {model} is no SDXL: its {name} is {found}, not {part.__name__}")


def from_checkpoint(model: str, path: Path, dtype: torch.dtype, unet: bool, prediction: str) -> Pipeline:
    """Reads one .safetensors file in Stability's layout, without network. The keys `v_pred` and `ztsnr` mean the same as in
    ComfyUI: the model predicts v; its last timestep is pure noise.

    diffusers fills what the file lacks with random numbers, so the names and shapes are compared first. Raises UserError if
    they are not those of SDXL base.
    """
    if path.suffix != ".safetensors":  # diffusers goes by the name, and would take it for a pickle
        raise UserError(f"--model {model} {why_no_safetensors(path) or 'must be renamed to end in .safetensors'}")
    header = read_header(path)[1]
    check_dtypes(path, header, exempt="position_ids")
    shapes = {key: entry["shape"] for key, entry in header.items() if key.startswith(tuple(PREFIXES.values()))}
    if not shapes:
        raise UserError(f"--model {model} is no checkpoint in Stability's layout; a LoRA belongs to --lora")
    with torch.device("meta"):
        wanted = {key: tensor.shape for key, tensor in checkpoint_of(SimpleNamespace(**base_architecture())).items()}
    unused = re.compile(r"logit_scale$|position_ids$|\.model_ema\.")
    check_channels(model, *shapes.get("model.diffusion_model.input_blocks.0.0.weight", [])[1:2])
    same_size = {key for key in shapes.keys() & wanted if squeezed(shapes[key]) == squeezed(wanted[key])}
    differences = {
        "lacks {}": [key for key in wanted if key not in shapes and not unused.search(key)],
        "has {}, which SDXL does not know": [key for key in shapes if key not in wanted and not unused.search(key)],
        "has another shape of {}": [key for key in wanted if key in shapes and key not in same_size],
    }
    check_differences(f"--model {model} is no SDXL base checkpoint: it", differences, len(wanted))
    if edm := sorted(key for key in header if key.startswith("edm_")):
        raise UserError(f"--model {model} has {edm[0]}: a schedule of EDM cannot be used here, only one with alphas_cumprod")
    options = {"dtype": dtype, "add_watermarker": False, "low_cpu_mem_usage": False}
    if not unet:
        options["unet"] = empty_unet(BASE / "unet", dtype)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # otherwise diffusers loads everything in float32 first: 14 GiB instead of 7
    try:
        pipe = StableDiffusionXLPipeline.from_single_file(str(path), config=str(BASE), local_files_only=True, **options)
    finally:
        torch.set_default_dtype(default_dtype)
    statements = predictions(header) | ({"the key v_pred": "v_prediction"} if "v_pred" in header else {})
    zero_snr = {"rescale_betas_zero_snr": True} if "ztsnr" in header else {}
    told = agreed_prediction(model, statements) if prediction == "auto" else prediction
    pipe.scheduler = with_prediction(pipe.scheduler, told, **zero_snr)
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
