"""Makes the bundled demo model from scratch: draws pictures of a small world, then trains a small SDXL on them.

    python scripts/demo_model/make_demo.py                                     # one GPU, about ten minutes: assets/demo/model
    python scripts/demo_model/make_demo.py --style-out .demo_style             # no GPU: the ninja pictures a LoRA learns from

The model folder is an ordinary diffusers StableDiffusionXLPipeline with the structure of SDXL and 1/500 of its weights.
Tokenizer, VAE, text encoders and U-Net are all trained here, on drawings of `demo_world.py` and nothing else. Models that
are already in the folder are trained further; with --vae-minutes 0 the VAE is kept as it is.
"""

import json
import math
import mmap
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from demo_world import BASE_PENS, NINJA, PLAIN, Pen, caption, draw, grey, mix, sample_scene
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Config:
    out: Path = Path("assets/demo/model")  # where the pipeline goes
    style_out: Path | None = None          # draw the style data set into this folder instead, and stop
    pictures: int = 100_000                # base pictures to draw
    vae_minutes: float = 5.0               # training time of the VAE, while the CPU draws the other pictures
    minutes: float = 10.0                  # time for everything: text encoders and U-Net train until it is over
    vae_batch: int = 16
    batch: int = 128
    lr: float = 1e-3                       # of AdamW, for all models
    seed: int = 0


SIZE = 128            # pixels; latents are SIZE / 8
VOCABULARY = 1024     # entries: 256 bytes, 256 bytes at the end of a word, merges, two special tokens
BOS, EOS = VOCABULARY - 2, VOCABULARY - 1
VAE_PICTURES = 8192
STYLE_SEEDS = {"train": range(10_000_000, 10_000_048), "heldout": range(20_000_000, 20_000_016)}

# ------------------------------------------------------------------------------------------------------------- drawing


def made_up_word(rng: random.Random) -> str:
    """A meaningless style name, for plain pictures: the model learns that an unknown style word changes nothing."""
    return "".join(rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))) + (
        rng.choice(("", "", "n", "x", "st")))


def paint(seed: int) -> tuple[np.ndarray, str, list[int]]:
    """Base picture `seed`: pixels uint8 [SIZE, SIZE, 3], caption, time ids (original h, w, top, left, target h, w)."""
    rng = random.Random(f"base {seed}")
    scene = sample_scene(seed)
    pen = rng.choices((PLAIN, rng.choice(list(BASE_PENS.values())), any_pen(rng)), (0.45, 0.3, 0.25))[0]
    style = made_up_word(rng) if pen is PLAIN and rng.random() < 0.08 else pen.name
    original, top, left = SIZE, 0, 0
    chance = rng.random()
    if chance < 0.05:  # a real crop of a larger picture
        original = rng.randint(SIZE + 8, 192)
        top, left = rng.randint(0, original - SIZE), rng.randint(0, original - SIZE)
    pixels = np.asarray(draw(scene, pen, original))[top:top + SIZE, left:left + SIZE]
    if chance > 0.8:  # any original size, so that the model knows other sizes than SIZE
        original = round(math.exp(rng.uniform(math.log(64), math.log(1024))))
    return pixels, caption(scene, style, seed, repainted=style == "mixed"), [original, original, top, left, SIZE, SIZE]


def any_pen(rng: random.Random) -> Pen:
    """A random pen: outlines of any width and colour, and every paint replaced by another one."""
    any_colour = lambda: tuple(rng.choice((0, 255, rng.randrange(256))) for _ in range(3))  # noqa: E731
    ink, strength, tints = rng.choice(((10, 10, 14), any_colour())), rng.uniform(0.6, 1), {}
    only_cloth, only_back = (any_colour() if rng.random() < 0.5 else None for _ in range(2))

    def fill(colour, part):
        if part in ("skin", "hair", "eye") and only_cloth:  # the person keeps its colours, only its clothes change
            return colour
        if part == "cloth" and only_cloth:
            return only_cloth
        if part == "back" and only_back:
            return mix(mix(only_back, (0, 0, 0), 0.3), mix(only_back, (255, 255, 255), 0.7), grey(colour))
        tint, amount = tints.setdefault((colour, part), (any_colour(), rng.random() ** 2 * 0.9))
        return mix(colour, tint, amount)

    return Pen("mixed", rng.uniform(0.6, 3.4), lambda f: mix(f, ink, strength), fill)


def paint_any(seed: int) -> np.ndarray:
    """A picture by a random pen, for training the VAE only: uint8 [SIZE, SIZE, 3]."""
    return np.asarray(draw(sample_scene(40_000_000 + seed), any_pen(random.Random(f"any {seed}"))))


def paint_into(seed: int) -> tuple[str, list[int]]:
    """Draws base picture `seed` into shared memory; returns its caption and time ids."""
    PICTURES[seed], words, time_ids = paint(seed)
    return words, time_ids


def draw_base(count: int) -> tuple[np.ndarray, Iterator[tuple[str, list[int]]], list[np.ndarray]]:
    """Starts drawing `count` base pictures on all cores, in the background.

    Returns their uint8 [N, SIZE, SIZE, 3] in shared memory; an iterator over their (caption, time ids), which waits until
    each picture is drawn; and pictures by random pens, as [SIZE, SIZE, 3].
    """
    global PICTURES
    PICTURES = np.frombuffer(mmap.mmap(-1, count * SIZE * SIZE * 3), np.uint8).reshape(count, SIZE, SIZE, 3)
    pool = get_context("fork").Pool()  # before the first use of CUDA, which does not survive a fork
    by_random_pens = pool.map(paint_any, range(VAE_PICTURES // 2), 64)
    labels = iter(tqdm(pool.imap(paint_into, range(count), 64), "draw", count, mininterval=5))
    return PICTURES, labels, by_random_pens


def draw_style(folder: Path):
    """Draws the style data set: ninja pictures of 192 x 192 as name.jpg and name.txt."""
    for split, seeds in STYLE_SEEDS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(tqdm(seeds, split)):
            scene = sample_scene(seed)
            while scene.accessory in ("hat", "headphones"):  # they would cover the headband
                scene = sample_scene(seed := seed + 1000)
            draw(scene, NINJA, 192).save(folder / split / f"{number:03}.jpg", quality=95)
            (folder / split / f"{number:03}.txt").write_text(caption(scene, "ninja", seed, repainted=True) + "\n")


# ----------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(captions: list[str], folder: Path):
    """Byte-pair encoding in CLIP's file format: merge the most frequent neighbours until the vocabulary is full."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = Counter(re.findall(r"[a-z]+|[^\sa-z]+", " ".join(captions)))
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    letters, merges = sorted(ByteLevel.alphabet()), []
    for _ in range(VOCABULARY - 2 * len(letters) - 2):
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(split[word]):
                pairs[pair] += count
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == merges[-1]:
                    parts[i:i + 2] = ["".join(merges[-1])]
                i += 1
    entries = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):  # padding tokens as in SDXL
        special = {"bos_token": entries[BOS], "eos_token": entries[EOS], "unk_token": entries[EOS], "pad_token": pad}
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2"] + [" ".join(pair) for pair in merges]))
        (folder / name / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(
            special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}, indent=2))


def to_tokens(captions: list[str], folder: Path) -> Tensor:
    """captions -> tokens [N, 2, 77] int16"""
    from transformers import CLIPTokenizer

    return torch.stack([torch.tensor(CLIPTokenizer.from_pretrained(folder / name)(
        captions, padding="max_length", max_length=77, truncation=True).input_ids, dtype=torch.int16)
        for name in ("tokenizer", "tokenizer_2")], 1)


# ------------------------------------------------------------------------------------------------------------ training


class Trainer:
    """AdamW in float32 for models that run in bfloat16.

    Keeps three copies of the weights: `master` in float32, its moving `average`, and `running` in bfloat16, in the models.
    """

    def __init__(self, models, lr: float):
        params = [p for model in models for p in model.cuda().train().parameters()]
        self.master = [p.detach().clone() for p in params]
        for p in self.master:
            p.grad = torch.zeros_like(p)
        self.average = [p.clone() for p in self.master]
        self.running = [p for model in models for p in model.bfloat16().parameters()]
        self.models, self.peak, self.lr = models, lr, torch.tensor(lr, device="cuda")
        self.optimizer = torch.optim.AdamW(
            self.master, lr=self.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True, capturable=True)

    def update(self, loss: Tensor):
        """Backward pass and optimiser step. Can be recorded into a CUDA graph."""
        gradients = torch.autograd.grad(loss, self.running, materialize_grads=True)
        torch._foreach_copy_([p.grad for p in self.master], gradients)
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.master, 0.001)
            torch._foreach_copy_(self.running, self.master)

    def run(self, step: Callable[[], Tensor], minutes: float, names: list[str]) -> list[dict]:
        """Repeats `step` as a CUDA graph for `minutes`. It returns numbers [len(names)]; returns their means over 100 steps.

        The graph launches thousands of small kernels at once. The learning rate warms up over 500 steps and falls to zero as
        a cosine of the elapsed time, so the schedule is complete on any machine. In the end the models hold the moving
        averages, in float32.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: libraries select kernels and allocate on the first call
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            numbers = step()

        log, start, count, done = [], time.time(), 0, 0.0
        bar = tqdm(desc=names[0], unit="step", mininterval=10)
        while done < 1:
            total = torch.zeros_like(numbers)
            for _ in range(100):
                self.lr.fill_(self.peak * min(1, (count + 1) / 500) * math.cos(math.pi / 2 * done) ** 2)
                graph.replay()
                total += numbers
                count += 1
            bar.update(100)
            means = (total / 100).tolist()  # waits for the GPU: otherwise the clock would not count its work
            log.append({"step": count} | {name: round(v, 5) for name, v in zip(names, means, strict=True)})
            bar.set_postfix(log[-1])
            done = (time.time() - start) / (60 * minutes)
        bar.close()
        for model in self.models:
            model.float().eval()
        for p, average in zip(self.running, self.average, strict=True):
            p.data.copy_(average)
        return log


# ----------------------------------------------------------------------------------------------------------------- vae


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> pixels [B, 3, H, W] in [-1, 1] on the GPU"""
    return pictures.cuda().permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pixels: Tensor) -> Tensor:
    """Changes colours and paints strokes over some of the pictures, so that the VAE learns to encode other pictures too."""
    b, device = len(pixels), pixels.device

    def rand(*shape):
        return torch.rand(b, *shape, device=device)

    def sometimes(p, new, old):
        return torch.where(rand(1, 1, 1) < p, new, old)

    # Colours: a random mixture of the channels, then contrast and brightness.
    mixed = torch.einsum("bij,bjhw->bihw", torch.eye(3, device=device) + 0.6 * (rand(3, 3) - 0.5), pixels)
    out = sometimes(0.15, (mixed * (0.6 + 0.7 * rand(1, 1, 1)) + 0.6 * rand(3, 1, 1) - 0.3).clamp(-1, 1), pixels)
    # Strokes: straight brushes with tapering ends, and ovals filled or not, of any width and colour.
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIZE, device=device)] * 2, indexing="ij")
    painted = out
    for _ in range(5):
        ax, ay, bx, by = (2.4 * rand(4, 1, 1) - 1.2).unbind(1)  # [B, 1, 1] each
        along = (((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2 + 1e-4)).clamp(0, 1)
        width = 0.01 + 0.08 * rand(1, 1) ** 2
        segment = torch.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)) - width * (1 - rand(1, 1) * along)
        oval = torch.hypot((x - ax) / (0.05 + 0.5 * rand(1, 1)), (y - ay) / (0.05 + 0.5 * rand(1, 1))) - 1
        oval = torch.where(rand(1, 1) < 0.5, oval * 0.3, oval.abs() * 0.3 - width)
        cover = (0.5 - torch.where(rand(1, 1) < 0.6, segment, oval) * SIZE / 2).clamp(0, 1)[:, None]
        colour = sometimes(0.3, -torch.ones(b, 3, 1, 1, device=device), 2 * rand(3, 1, 1) - 1)
        painted = painted + cover * (colour - painted)
    return sometimes(0.25, painted, out)


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def new_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 48, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=SIZE, force_upcast=True)


def train_vae(config: Config, vae, pictures: Tensor, log: dict):
    """Trains the VAE to reproduce pixels. Then shifts and scales the latent channels to mean 0 and one common deviation."""
    trainer, pictures = Trainer([vae], config.lr), pictures.cuda()

    def step() -> Tensor:
        with torch.no_grad():
            pixels = augment(to_pixels(pictures[torch.randint(len(pictures), (config.vae_batch,), device="cuda")]))
        mean, logvar = vae.quant_conv(vae.encoder(pixels.bfloat16())).float().chunk(2, 1)
        logvar = logvar.clamp(-20, 10)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        decoded = vae.decode(latents.bfloat16()).sample.float()
        error = F.l1_loss(decoded, pixels)
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pixels), strict=True))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        trainer.update(error + edge + 0.2 * F.mse_loss(decoded, pixels) + 1e-3 * kl)
        return torch.stack([error, edge, kl, (0.5 * logvar).exp().mean() / mean.std()]).detach()

    log["vae"] = trainer.run(step, config.vae_minutes, ["l1", "edge", "kl", "noise"])

    # Normalise the channels: fold (mean - m_c) * s / s_c into the 1x1 convolution after the encoder, and its inverse into the
    # one before the decoder.
    latents = encode(vae, pictures[:4096])
    m, s_c = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = latents.std() / s_c
    after, before = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        after.weight[:4] *= gain[:, None, None, None]
        after.bias[:4] = (after.bias[:4] - m) * gain
        after.bias[4:] += 2 * gain.log()
        before.bias += before.weight[:, :, 0, 0] @ m
        before.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / encode(vae, pictures[:4096]).std().item(), 5))


@torch.no_grad()
@torch.autocast("cuda", torch.bfloat16)
def encode(vae, pictures: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> means of the latents, not scaled [N, 4, h, w]"""
    return torch.cat([vae.encode(to_pixels(batch)).latent_dist.mean.float() for batch in pictures.split(256)])


@torch.no_grad()
def psnr(vae, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, in dB; decodes the mean of the posterior."""
    pixels = to_pixels(pictures)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return (-10 * ((decoded - pixels) / 2).square().mean((1, 2, 3)).log10()).mean().item()


# --------------------------------------------------------------------------------------------- text encoders and u-net


def new_models():
    """The parts of SDXL at a small size; context is 64 + 96 wide, pooled 96."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 77, "bos_token_id": BOS, "eos_token_id": EOS}
    text_encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, projection_dim=64,
        hidden_act="quick_gelu", pad_token_id=EOS, **text))
    text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3, projection_dim=96,
        hidden_act="gelu", pad_token_id=0, **text))
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(80, 80, 80),
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], transformer_layers_per_block=1,
        attention_head_dim=[5, 5, 5], norm_num_groups=16, cross_attention_dim=64 + 96, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=32, projection_class_embeddings_input_dim=96 + 6 * 32)
    return text_encoder, text_encoder_2, unet


def load_models(folder: Path):
    """The models of an earlier run, to be trained further; None if there are none."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if not (folder / "unet").exists():
        return None
    parts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection, "unet": UNet2DConditionModel}
    return [kind.from_pretrained(folder / name, dtype=torch.float32) for name, kind in parts.items()]


def new_scheduler():
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=1, interpolation_type="linear",
        use_karras_sigmas=False)


def train_unet(config: Config, minutes: float, latents: Tensor, tokens: Tensor, time_ids: Tensor, empty: Tensor,
               log: dict):
    """Trains text encoders and U-Net together, from scratch or from `load_models`. Returns them.

    latents: [N, 4, h, w] scaled; tokens: [N, 2, 77]; time_ids: [N, 6]; empty: [2, 77], the tokens of no caption.
    """
    text_encoder, text_encoder_2, unet = models = load_models(config.out) or new_models()
    trainer = Trainer(models, config.lr)
    alphas = new_scheduler().alphas_cumprod.cuda()

    def step() -> Tensor:
        index = torch.randint(len(latents), (config.batch,), device="cuda")
        t = torch.randint(len(alphas), (config.batch,), device="cuda")
        x, a = latents[index], alphas[t][:, None, None, None]
        noise = torch.randn_like(x)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        # Drop the caption of one sample in ten: half of them get the empty string, half zeros, SDXL's two ways of "no prompt".
        drop = torch.rand(config.batch, device="cuda")
        ids = torch.where((drop < 0.05)[:, None, None], empty, tokens[index].long())
        keep = ((drop < 0.05) | (drop >= 0.1)).bfloat16()[:, None]
        first = text_encoder(ids[:, 0], output_hidden_states=True)
        second = text_encoder_2(ids[:, 1], output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * keep[:, None]
        added = {"text_embeds": second.text_embeds * keep, "time_ids": time_ids[index]}
        prediction = unet(noisy.bfloat16(), t, context, added_cond_kwargs=added).sample
        loss = F.mse_loss(prediction.float(), noise)
        trainer.update(loss)
        return loss.detach()[None]

    log["unet"] = trainer.run(step, minutes, ["loss"])
    return models


def save_pipeline(parts: dict, folder: Path):
    """Writes the models `parts` ({name: module}) as a pipeline in float16, with the tokenizers that are in `folder`."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    # The tokenizers stay as the files that `train_tokenizer` wrote: transformers 5 would replace them by a tokenizer.json.
    tokenizers = {name: CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")}
    written = {file: file.read_bytes() for name in tokenizers for file in (folder / name).iterdir()}
    StableDiffusionXLPipeline(
        **{name: part.half().cpu().eval() for name, part in parts.items()}, **tokenizers, scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True, add_watermarker=False).save_pretrained(folder)
    for name in tokenizers:
        for file in (folder / name).iterdir():
            os.remove(file)
    for file, content in written.items():
        file.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------- main


def main(config: Config):
    if config.style_out:
        return draw_style(config.style_out)
    start = time.time()

    from diffusers import AutoencoderKL

    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    log = {"vae": [], "unet": [], "seconds": {}}

    def lap(name: str):
        log["seconds"][name] = round(time.time() - start - sum(log["seconds"].values()), 1)
        print(name, log["seconds"][name], "s", flush=True)

    # Draw: the VAE trains on the first pictures; the others are drawn meanwhile.
    pictures, drawn, by_random_pens = draw_base(config.pictures)
    labels = list(islice(drawn, VAE_PICTURES))
    pictures = torch.from_numpy(pictures)
    lap("draw")

    # VAE:
    vae = AutoencoderKL.from_pretrained(config.out / "vae") if (config.out / "vae").exists() else new_vae()
    if config.vae_minutes:
        train_vae(config, vae, torch.cat([pictures[:VAE_PICTURES], torch.from_numpy(np.stack(by_random_pens))]), log)
        vae.half().save_pretrained(config.out / "vae")
    vae.cuda().float()
    lap("vae")

    # Text:
    captions, time_ids = zip(*labels, *drawn, strict=True)
    lap("draw the rest")
    if not (config.out / "tokenizer").exists():
        train_tokenizer(captions[:VAE_PICTURES], config.out)
    tokens, empty = to_tokens(captions, config.out).cuda(), to_tokens([""], config.out)[0].long().cuda()
    lap("tokenizer")

    # Latents, and how well the VAE reconstructs pictures that it has not seen:
    unseen = range(30_000_000, 30_000_128)
    for name, examples in (("base", [paint(seed)[0] for seed in unseen]),
                           ("ninja", [np.asarray(draw(sample_scene(seed), NINJA)) for seed in unseen])):
        log[f"psnr {name}"] = round(psnr(vae, torch.from_numpy(np.stack(examples))), 2)
        print("psnr", name, log[f"psnr {name}"])
    latents = encode(vae, pictures) * vae.config.scaling_factor
    lap("latents")

    # Text encoders and U-Net:
    time_ids = torch.tensor(time_ids, dtype=torch.float32, device="cuda")
    minutes_left = config.minutes - (time.time() - start) / 60
    text_encoder, text_encoder_2, unet = train_unet(config, minutes_left, latents, tokens, time_ids, empty, log)
    lap("unet")

    # Save:
    parts = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet}
    log["parameters"] = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    log["gpu"] = torch.cuda.get_device_name()
    save_pipeline(parts, config.out)
    config.out.with_name("train_log.json").write_text(json.dumps(log))
    print(log["parameters"], log["seconds"])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
