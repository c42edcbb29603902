"""What is SDXL: loading, tokens, both text encoders, VAE, micro-conditioning (Podell et al. 2023, arXiv:2307.01952).

The only file that knows diffusers' and transformers' model classes.
"""

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from errors import UserError

NAMES = {
    "demo": str(Path(__file__).parent / "assets/demo/model"),
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
BASE = Path(__file__).parent / "assets/sdxl"  # configurations and tokenizers of SDXL base: a checkpoint file has none

SAMPLERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()


def load_sdxl(model: str, dtype: torch.dtype, device: torch.device) -> StableDiffusionXLPipeline:
    """`read_sdxl`, then to `device`."""
    pipe = read_sdxl(model, dtype)
    pipe.to(device)
    pipe.vae.to(vae_dtype(device))
    return pipe


def vae_dtype(device: torch.device) -> torch.dtype:
    """The VAE is not safe in float16: bfloat16 where the GPU computes in it, else float32."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def read_sdxl(model: str, dtype: torch.dtype, unet: bool = True) -> StableDiffusionXLPipeline:
    """`demo`, `sdxl`, a hub id, a diffusers folder, or a single .safetensors checkpoint -> diffusers' pipeline in `dtype` on
    the host, frozen. Without `unet` that is on the meta device: shapes only, for a quarter of the memory.

    Raises UserError in one line if there is no such model, if it is no SDXL, or if it is not here and cannot be fetched.
    """
    source = NAMES.get(model, model)
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


def blueprint(pipe: StableDiffusionXLPipeline, with_text: bool = True) -> "Denoiser":
    """A Denoiser of the same architecture and dtypes on the meta device: shapes without weights."""
    with torch.device("meta"):
        unet = type(pipe.unet).from_config(pipe.unet.config)
        text_encoder, text_encoder_2 = (type(m)(m.config) for m in (pipe.text_encoder, pipe.text_encoder_2))
    parts = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    parts = {name: part.to(pipe.dtype).eval() for name, part in parts.items()}
    return Denoiser(StableDiffusionXLPipeline(**{**pipe.components, **parts}), with_text)


def base_architecture() -> dict[str, nn.Module]:
    """SDXL base's models on the default device, in the default dtype, as initialised: for shapes, and for measuring."""
    one, two = (CLIPTextConfig.from_pretrained(BASE / name) for name in ("text_encoder", "text_encoder_2"))
    return {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(BASE / "unet")),
        "text_encoder": CLIPTextModel(one),
        "text_encoder_2": CLIPTextModelWithProjection(two),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(BASE / "vae")),
    }


# Bytes that the VAE takes for each pixel and byte of its dtype: 1.5 and 2.4 GiB at 1024 × 1024 in bfloat16.
ENCODING, DECODING = 768, 1220


def native_resolution(pipe: StableDiffusionXLPipeline) -> int:
    """Side in pixels of the images that the model was trained on: 1024 for SDXL."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


BACKTRACK = 20  # tokens: A1111's default "comma_padding_backtrack"


def split_tokens(tokenizer: CLIPTokenizer, captions: list[str], max_tokens: int | None) -> list[tuple[list, list[int]]]:
    """For each caption (its chunks of up to 75 tokens, what is cut off beyond `max_tokens`), without BOS, EOS and padding.

    None: as many chunks as it takes. Where another follows, a chunk ends after the last comma of its last 20 tokens, so that
    no tag is torn: A1111's modules/sd_hijack_clip.py, tokenize_line.
    """
    room, comma, split = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>"), []
    for rest in tokenizer(captions, add_special_tokens=False).input_ids:
        chunks: list[list[int]] = []
        while len(rest) > room and (max_tokens is None or (len(chunks) + 1) * room < max_tokens):
            ends = [i + 1 for i in range(room - BACKTRACK, room + 1) if rest[i] == comma]
            end = min(room, max(ends, default=room))
            chunks, rest = [*chunks, rest[:end]], rest[end:]
        split.append(([*chunks, rest[:room]], rest[room:]))
    return split


def tokenize(tokenizers: list[CLIPTokenizer], captions: list[str], max_tokens: int | None = 75) -> Tensor:
    """captions -> tokens [B, 2, 77·n] int64, one row for each text encoder, in as many chunks n as the longest caption needs.

    Each chunk has its own BOS and EOS, and the padding of its tokenizer; `max_tokens` as in `split_tokens`.
    """
    split = [[chunks for chunks, _ in split_tokens(t, captions, max_tokens)] for t in tokenizers]
    n = max(len(chunks) for captioned in split for chunks in captioned)
    rows = [
        [close_chunks(t, chunks + [[]] * (n - len(chunks))) for chunks in captioned]  # of nothing: an empty caption's
        for t, captioned in zip(tokenizers, split, strict=True)
    ]
    return torch.stack([torch.tensor(row) for row in rows], dim=1)


def close_chunks(tokenizer: CLIPTokenizer, chunks: list[list[int]]) -> list[int]:
    """Chunks of up to 75 tokens -> 77 tokens for each, one after the other."""
    bos, eos, pad = [tokenizer.bos_token_id], [tokenizer.eos_token_id], [tokenizer.pad_token_id]
    room = tokenizer.model_max_length - 2
    return [token for chunk in chunks for token in bos + chunk + eos + pad * (room - len(chunk))]


def time_ids(original_size: Tensor, crop: Tensor, size: Tensor) -> Tensor:
    """SDXL's micro-conditioning: original (h, w), crop (top, left), size (h, w), each [B, 2] in pixels -> [B, 6] float32.

    They stay float32 until after their sinusoid: in bfloat16 1365 would become 1368.
    """
    return torch.cat([original_size, crop, size], dim=1).float()


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels [B, 3, H, W] in [-1, 1] -> posterior [B, 8, H/8, W/8] float32: mean and deviation of the latents."""
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def vae_probe(vae: AutoencoderKL) -> list[float]:
    """Eight numbers that tell one VAE from another, whatever their dtype: mean latents and deviations of a fixed picture.

    Computed in float32 by a copy, where the VAE lies.
    """
    ramp = torch.linspace(-1, 1, 64, device=vae.device)
    pixels = torch.stack([ramp[:, None] * ramp, ramp[:, None].expand(64, 64), -ramp.expand(64, 64)])[None]
    return [round(value, 5) for value in encode_pixels(copy.deepcopy(vae).float(), pixels).mean(dim=(0, 2, 3)).tolist()]


def same_probe(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two probes are of the same weights, but for what a half-precision file of them has lost."""
    scale = max(map(abs, other))
    return len(one) == len(other) and all(abs(a - b) < 0.02 * scale for a, b in zip(one, other, strict=True))


def digest(*modules: nn.Module) -> str:
    """SHA-256 of weights, as they are stored."""
    whole = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            whole.update(name.encode())
            whole.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return whole.hexdigest()


def sample_latents(vae: AutoencoderKL, posterior: Tensor, noise: Tensor) -> Tensor:
    """posterior [B, 8, h, w], noise [B, 4, h, w] -> latents [B, 4, h, w] float32: a sample × scaling_factor."""
    mean, deviation = posterior.float().chunk(2, dim=1)
    return (mean + deviation * noise) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, tiled: bool = False) -> Tensor:
    """latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w] float32 in [-1, 1].

    `tiled`: in overlapping tiles of 512 pixels, for a quarter of the memory; not quite the same picture.
    """
    vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = tiled, 64, 512
    pixels = vae.decode((latents.float() / vae.config.scaling_factor).to(vae.dtype)).sample
    vae.use_tiling = False
    return pixels.float().clamp(-1, 1)


def text_shapes(denoiser: "Denoiser", batch: int, chunks: int) -> tuple[Tensor, ...]:
    """What a denoiser is told of the captions of a batch, on the meta device."""
    room = denoiser.empty.shape[2] * chunks
    if denoiser.text_encoder is not None:
        return (torch.empty(batch, 2, room, dtype=torch.int64, device="meta"),)
    config, dtype = denoiser.unet.config, denoiser.unet.dtype
    context = torch.empty(batch, room, config.cross_attention_dim, dtype=dtype, device="meta")
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return context, torch.empty(batch, pooled, dtype=dtype, device="meta")


class Denoiser(nn.Module):
    """U-Net and both text encoders as one module: everything that can be trained, from tokens to prediction.

    "Train the text encoders?" is then only a question of which parameters require a gradient. Without text it is the U-Net
    alone, which is told context and pooled.
    """

    text_encoder: Any  # None without text
    text_encoder_2: Any
    empty: Tensor

    def __init__(self, pipe: StableDiffusionXLPipeline, with_text: bool = True):
        super().__init__()
        self.unet = pipe.unet
        self.text_encoder, self.text_encoder_2 = (pipe.text_encoder, pipe.text_encoder_2) if with_text else (None, None)
        self.tokenizers = [pipe.tokenizer, pipe.tokenizer_2]
        empty = tokenize(self.tokenizers, [""])
        self.register_buffer("empty", empty.to(pipe.text_encoder.device), persistent=False)
        self.zero_empty = pipe.config.force_zeros_for_empty_prompt

    @property
    def unread(self) -> list[str]:
        """Path prefixes that the prediction does not depend on: text encoder 1 is read at its penultimate layer."""
        if self.text_encoder is None:
            return []
        last = self.text_encoder.config.num_hidden_layers - 1
        return [f"text_encoder.{text_model}encoder.layers.{last}." for text_model in ("", "text_model.")]

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, 2, 77·n] -> context [B, 77·n, d1 + d2], pooled [B, d2].

        Every chunk of 77 goes through the encoders by itself; pooled is that of the first, as A1111, ComfyUI and kohya have it.
        An empty caption gives zeros if the model was trained so (`force_zeros_for_empty_prompt`), as in diffusers' guidance.
        """
        trained = any(p.requires_grad for m in (self.text_encoder, self.text_encoder_2) for p in m.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            chunks = tokens.unflatten(2, (-1, self.text_encoder.config.max_position_embeddings))  # [B, 2, n, 77]
            first = self.text_encoder(chunks[:, 0].flatten(0, 1), output_hidden_states=True)
            second = self.text_encoder_2(chunks[:, 1].flatten(0, 1), output_hidden_states=True)
            context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            context = context.view(len(tokens), tokens.shape[2], -1)
            pooled = second.text_embeds[:: chunks.shape[2]]
            if self.zero_empty:
                told = (chunks != self.empty.to(chunks.device)[:, :, None]).any(dim=(1, 2, 3)).to(pooled.dtype)
                context, pooled = context * told[:, None, None], pooled * told[:, None]
        return context, pooled

    @torch.no_grad()
    def text_probe(self) -> list[float]:
        """Numbers that tell one pair of text encoders from another: some of what they make of a fixed caption."""
        tokens = tokenize(self.tokenizers, ["a picture of a cat"]).to(self.text_encoder.device)
        context, pooled = (states.float() for states in self.encode_text(tokens))
        parts = [part[:: len(part) // 16] for part in (context[0, -1], pooled[0])]
        return [round(value, 5) for part in parts for value in (part / part.abs().max()).tolist()]

    @torch.no_grad()
    def empty_text(self) -> tuple[Tensor, Tensor]:
        """Context [1, 77, d1 + d2] and pooled [1, d2] of the empty caption, on the host."""
        context, pooled = self.encode_text(self.empty.to(self.text_encoder.device))
        return context.cpu(), pooled.cpu()

    @torch.no_grad()
    def describe(self, prompt: str, negative: str | None) -> dict[str, str | Tensor | None]:
        """What diffusers' pipeline is to be told of a prompt and its negative: the texts; or, if one of them has more than 75
        tokens, their context and pooled, both in as many chunks as the longer one needs.
        """
        tokens = tokenize(self.tokenizers, [prompt, negative or ""], None).to(self.text_encoder.device)
        if tokens.shape == (2, *self.empty.shape[1:]):
            return {"prompt": prompt, "negative_prompt": negative}
        (context, pooled), (against, pooled_against) = (self.encode_text(one) for one in tokens.split(1))
        asked: dict[str, str | Tensor | None] = {"prompt_embeds": context, "pooled_prompt_embeds": pooled}
        return asked | {"negative_prompt_embeds": against, "negative_pooled_prompt_embeds": pooled_against}

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: tuple[Tensor, ...], time_ids: Tensor) -> Tensor:
        """[B, 4, h, w], [B], (tokens [B, 2, 77·n],) or (context, pooled) as from `encode_text`, [B, 6] -> prediction
        [B, 4, h, w] in the dtype of the U-Net.
        """
        context, pooled = text if len(text) == 2 else self.encode_text(*text)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        noisy_latents = noisy_latents.to(self.unet.dtype)
        return self.unet(noisy_latents, timesteps, context, added_cond_kwargs=conditions, return_dict=False)[0]


# Captions -> what the denoiser is told of them: an object that the training loop calls with every batch.


class Tokens:
    """Tokens, which the text encoders read in every step; counts what is cut."""

    tensors = 1  # that it gives

    def __init__(self, tokenizers: list[CLIPTokenizer], max_tokens: int):
        self.tokenizers, self.max_tokens = tokenizers, max_tokens
        self.cut: Counter[int] = Counter()

    def __call__(self, captions: list[str], ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """-> (tokens [B, 2, 77·n],)."""
        self.cut.update(len(rest) for _, rest in split_tokens(self.tokenizers[0], captions, self.max_tokens))
        return (tokenize(self.tokenizers, captions, self.max_tokens),)

    def advice(self) -> str | None:
        if not (most := max(self.cut, default=0)):
            return None
        share = f"{1 - self.cut[0] / self.cut.total():.1%} of the captions"
        return f"{share} have more than --max-tokens {self.max_tokens} and were cut, by up to {most} tokens"


class ReadyText:
    """What cache.py has kept of the text encoders; a dropped caption is told as the empty one."""

    tensors = 2

    def __init__(self, empty: tuple[Tensor, Tensor]):
        self.empty = empty

    def __call__(self, captions: list[str], ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """-> (context [B, 77, d1 + d2], pooled [B, d2])."""
        told = torch.tensor([bool(caption) for caption in captions])
        pairs = zip(ready, self.empty, strict=True)
        return tuple(torch.where(told.view(-1, *(t.ndim - 1) * [1]), t.to(none.dtype), none) for t, none in pairs)

    def advice(self) -> None:
        return None
