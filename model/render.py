"""Renders prompts: the denoising loop of diffusers' StableDiffusionXLPipeline, for several prompts at once."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.progress import tqdm
from common.seeds import seed_generator
from model.prompts import Prompt
from model.sdxl import Denoiser, time_ids
from model.vae import DECODING
from performance.cuda_graph import GraphedStep

SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 5.0  # of a prompt that does not say, where a LoRA is looked at
DENOISING = 128  # peak bytes per pixel of the U-Net's input and per byte of its dtype: counted 88, the rest is for workspaces
MOST_AT_ONCE = 8  # prompts: more of them fill a GPU no better, and a signal has to wait for all
WORTH_RECORDING = 10  # calls of the U-Net: what a CUDA graph saves in so many, recording it takes


class Renderer:
    """Draws prompts with one model, as its weights are at that moment.

    The U-Net runs as a CUDA graph for each size of batch that it is called with often. A graph reads the weights by address: it
    stays valid when they change in place, as in merging a LoRA and in `Adapter.scaled`, and not when they are moved.
    """

    def __init__(self, pipe: Any, denoiser: Denoiser, decode: Callable[[Tensor], Tensor], room: int | None = None):
        """`pipe`: its `scheduler` samples. `denoiser`: on its device. `decode`: latents [1, 4, h, w] -> pixels [1, 3, 8h, 8w]
        in [-1, 1]. `room`: bytes that drawing may take on CUDA; None: what is free at the first picture of a size.
        """
        self.pipe, self.denoiser, self.decode, self.room = pipe, denoiser, decode, room
        self.device = denoiser.unet.device
        self.graphed = GraphedStep(self.predict, [], "auto", self.device)
        self.calls: Counter[tuple] = Counter()  # of the U-Net, by the shapes of its inputs
        self.most: dict[tuple, int] = {}  # {(pixels of a prompt for the U-Net, for the VAE): prompts at once}

    def draw(self, prompts: Sequence[Prompt], label: str = "") -> list[Image.Image]:
        """The pictures of `prompts`. Raises UserError if one is not finite. `label`: title of the progress bar, if any."""
        images: dict[int, Image.Image] = {}
        for i, image in self.each(prompts, label):
            if isinstance(image, UserError):
                raise image
            images[i] = image
        return [images[i] for i in range(len(prompts))]

    def each(self, prompts: Sequence[Prompt], label: str = "") -> Iterator[tuple[int, Image.Image | UserError]]:
        """(number, picture) of each prompt, which is `filled`, when it is finished; an error if it is not finite.

        A picture starts from noise drawn on the CPU with the seed of its prompt. On the CPU prompts are drawn one by one, so
        that a picture depends on no other prompt. On CUDA those of one size, number of steps, guidance and length are drawn
        together: the same arithmetic, rounded differently for each size of batch. The strength of a prompt is not read here.
        """
        self.pipe.scheduler = from_last_timestep(self.pipe.scheduler)
        texts = [self.denoiser.describe(prompt.text, prompt.negative) for prompt in prompts]
        alike = defaultdict(list)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            chunks = text["prompt_embeds"].shape[1]
            alike[prompt.width, prompt.height, prompt.steps, prompt.guidance, prompt.guidance_rescale, chunks].append(i)
        with tqdm(total=len(prompts), desc=label, unit="img", leave=False, disable=not label) as bar:
            for numbers in alike.values():
                while numbers:
                    finished = self.first_of([prompts[i] for i in numbers], [texts[i] for i in numbers])
                    for i, image in zip(numbers, finished, strict=False):
                        if image is None:  # cast to 8 bits it would be black
                            what = f"picture {i + 1}, {prompts[i].text[:40]!r}"
                            yield i, UserError(f"{what}, has values that are not finite: try --precision bf16 or fp32")
                        else:
                            yield i, image
                    bar.update(len(finished))
                    del numbers[: len(finished)]

    def first_of(self, prompts: list[Prompt], texts: list[dict[str, Tensor]]) -> list[Image.Image | None]:
        """Pictures of as many of the first prompts, which are alike, as there is memory for; None is one that is not finite.

        If memory runs out, half as many are drawn at once from then on. Raises torch.OutOfMemoryError if one is too many.
        """
        key = pixels_at_once(prompts[0])
        if key not in self.most:
            self.most[key] = self.at_once(prompts[0])
        while True:
            rounds = math.ceil(len(prompts) / self.most[key])
            count = math.ceil(len(prompts) / rounds)  # batches of about one size
            try:
                latents = self.denoise(prompts[:count], texts[:count])
                return [self.picture(one) for one in latents.split(1)]
            except torch.OutOfMemoryError:
                if count == 1 and self.graphed.eager:
                    raise
            self.graphed.eager |= count == 1
            self.most[key] = max(1, count // 2)
            self.release()  # out of the except block, which would keep what was allocated

    def at_once(self, prompt: Prompt) -> int:
        """How many prompts like this one are drawn together."""
        if self.device.type != "cuda":
            return 1
        room = self.room
        if room is None:
            torch.cuda.empty_cache()
            room = torch.cuda.mem_get_info(self.device)[0]
        denoising, decoding = drawing_bytes(prompt, self.denoiser.unet.dtype, self.pipe.vae.dtype)
        return max(1, min(MOST_AT_ONCE, (room - decoding) // denoising))

    @torch.no_grad()
    def denoise(self, prompts: list[Prompt], texts: list[dict[str, Tensor]]) -> Tensor:
        """Latents [B, 4, h, w] of prompts that are alike: the operations of StableDiffusionXLPipeline, in its order. `texts`:
        of each prompt, as from `Denoiser.describe`.
        """
        first, scheduler = prompts[0], self.pipe.scheduler
        width, height, guidance = first.width or 0, first.height or 0, first.guidance or 0.0
        kinds = ("negative_", "") if guidance > 1 else ("",)
        context = torch.cat([text[f"{kind}prompt_embeds"] for kind in kinds for text in texts])
        pooled = torch.cat([text[f"{kind}pooled_prompt_embeds"] for kind in kinds for text in texts])
        size = torch.tensor([[height, width]] * len(context))
        ids = time_ids(size, torch.zeros_like(size), size).to(self.device)

        scheduler.set_timesteps(first.steps)  # on the CPU: a scheduler that reads one does not wait for the device
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # otherwise it searches for the timestep
        generators = [seed_generator(torch.Generator("cpu"), prompt.seed or 0) for prompt in prompts]
        scale = self.pipe.vae_scale_factor
        shape = (1, self.denoiser.unet.config.in_channels, height // scale, width // scale)
        noise = torch.cat([torch.randn(shape, generator=generator, dtype=context.dtype) for generator in generators])
        latents = noise.to(self.device) * scheduler.init_noise_sigma
        options = self.pipe.prepare_extra_step_kwargs(generators, 0.0)

        timesteps = scheduler.timesteps
        shapes = (context.shape, noise.shape)
        self.calls[shapes] += len(timesteps)
        predict = self.graphed if self.calls[shapes] >= WORTH_RECORDING else self.predict
        for t, on_device in zip(timesteps, timesteps.float().to(self.device), strict=True):
            noisy = scheduler.scale_model_input(torch.cat([latents] * len(kinds)), t)
            prediction = predict((noisy, on_device, (context, pooled), ids))
            # Without guidance a copy: a scheduler may keep it, and the graph overwrites it.
            prediction = guided(prediction, guidance, first.guidance_rescale or 0) if guidance > 1 else prediction.clone()
            latents = scheduler.step(prediction, t, latents, **options, return_dict=False)[0].to(context.dtype)
        return latents

    def predict(self, inputs: tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]) -> Tensor:
        """(noisy latents [N, 4, h, w], timestep [] float32, (context, pooled), time ids [N, 6]) -> prediction [N, 4, h, w]."""
        return self.denoiser(*inputs)

    def picture(self, latents: Tensor) -> Image.Image | None:
        """Latents [1, 4, h, w] as a picture; None if they, or what is decoded, are not finite."""
        pixels = self.decode(latents)[0]
        return to_image(pixels) if latents.isfinite().all() and pixels.isfinite().all() else None

    def release(self) -> None:
        """Gives the memory of the graphs back."""
        self.calls.clear()
        self.graphed.release()


def guided(prediction: Tensor, guidance: float, rescale: float) -> Tensor:
    """Classifier-free guidance of predictions [2·B, 4, h, w], first those of the negative prompts -> [B, 4, h, w].

    By `rescale`, φ in 0..1, it is mixed with itself at the standard deviation that the prediction of the prompt has, picture by
    picture, which guidance enlarges (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """
    negative, positive = prediction.chunk(2)
    mixed = negative + guidance * (positive - negative)
    if not rescale:
        return mixed
    deviation, wanted = (x.std(dim=(1, 2, 3), keepdim=True) for x in (mixed, positive))
    return rescale * (mixed * (wanted / deviation)) + (1 - rescale) * mixed


def pixels_at_once(prompt: Prompt) -> tuple[int, int]:
    """Pixels of a prompt for the U-Net, which guidance doubles, and for the VAE."""
    pixels = (prompt.width or 0) * (prompt.height or 0)
    return pixels * (2 if (prompt.guidance or 0) > 1 else 1), pixels


def drawing_bytes(prompt: Prompt, unet: torch.dtype, vae: torch.dtype) -> tuple[int, int]:
    """Bytes that drawing one picture takes beside the weights: denoising, which takes as much again for each picture more in a
    batch, and decoding.
    """
    denoised, decoded = pixels_at_once(prompt)
    return DENOISING * denoised * unet.itemsize, DECODING * decoded * vae.itemsize


def from_last_timestep(scheduler: Any) -> Any:
    """The scheduler; if ᾱ of its last timestep is 0, so that sampling has to begin at pure noise, with "trailing" timesteps
    (Lin et al. 2023, arXiv:2305.08891). "leading", SDXL's own, never visits the last one.
    """
    if scheduler.alphas_cumprod[-1] > 1e-6 or scheduler.config.get("timestep_spacing") == "trailing":
        return scheduler
    return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] as an image of 8 bits per channel."""
    return Image.fromarray(pixels.permute(1, 2, 0).add(1).mul(127.5).round().byte().cpu().numpy())
