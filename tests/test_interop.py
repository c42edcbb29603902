"""diffusers and PEFT as the oracle: the same file gives the same weights, the same outputs and the same picture."""

import copy
import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from layouts import make_header, named, with_text_model
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from test_lora import inputs
from torch import Tensor

from lora import merge_lora
from lora_files.deltas import Deltas, layer_shapes
from lora_files.read import read_lora
from lora_files.write import serialise
from model.sdxl import Denoiser
from model.text import tokenize
from options.training import ATTENTION, EVERYTHING

pytestmark = pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")  # of metadata for absent layers

PARTS = ["unet", "text_encoder", "text_encoder_2"]
# One of each kind of name, in every block. diffusers needs out_proj to recognise kohya's names in a text encoder.
FEWER = r"\.(to_q|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|out_proj|fc2)$"
CONVOLUTIONS = r"\.conv(1|2|_shortcut)$|samplers\.0\.conv$|\.time_emb_proj$|\.attn1\.to_q$"  # and a linear layer of each block


@pytest.fixture(scope="module")
def plain(tiny_model):
    """diffusers' own pipeline of the tiny model. A test must leave it unchanged."""
    gc.freeze()  # PEFT makes so many objects that the garbage collector would scan all of torch again and again
    yield StableDiffusionXLPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    gc.unfreeze()


def turns(*values):
    """(module path, its number) -> one of the values, in turn."""
    return lambda path, i: values[i % len(values)]


def random_deltas(
    shapes: dict[str, torch.Size], layers: str = EVERYTHING, rank: Callable = lambda path, i: 4, alpha: Callable | None = None
) -> Deltas:
    """A ΔW for each layer that matches `layers`. `rank`, `alpha`: (module path, its number) -> value; α None: the rank."""
    generator, deltas = torch.Generator().manual_seed(0), {}
    for i, path in enumerate(path for path in shapes if re.search(layers, path)):
        r, (out, *inner) = rank(path, i), shapes[path]
        A = 0.1 * torch.randn(r, *inner, generator=generator)
        B = 0.1 * torch.randn(out, r, *[1] * (len(inner) - 1), generator=generator)
        deltas[path] = (A, B, float(alpha(path, i) if alpha else r))
    return deltas


# The same file, three times: by diffusers, by us, by hand.


@contextmanager
def borrowed(plain) -> Iterator[StableDiffusionXLPipeline]:
    """A copy of the pipeline, since it remembers a strength, with the same modules; restores their weights on exit."""
    base, pipe = weights(plain), copy.copy(plain)
    try:
        yield pipe
    finally:
        pipe.unload_lora_weights()
        Denoiser(plain).load_state_dict(base)


def weights(pipe) -> dict[str, Tensor]:
    """A copy of all weights of U-Net and text encoders."""
    return {key: tensor.clone() for key, tensor in Denoiser(pipe).state_dict().items()}


def fused(plain, file, strength: float = 1.0) -> dict[str, Tensor]:
    """All weights after diffusers and PEFT have loaded and fused the file."""
    with borrowed(plain) as pipe:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        pipe.fuse_lora(PARTS, lora_scale=strength)
        pipe.unload_lora_weights()
        return weights(pipe)


def merged(plain, file, strength: float = 1.0) -> dict[str, Tensor]:
    """All weights after we have read and merged it."""
    with borrowed(plain) as pipe:
        model = Denoiser(pipe)
        merge_lora(model, read_lora(file, layer_shapes(model)), strength)
        return weights(pipe)


def check(plain, deltas: Deltas, *loaded: dict[str, Tensor], strength: float = 1.0) -> None:
    """Every weight in `loaded` is W + strength · (α/r) · B · A, computed here, and all are equal, to 1e-6."""
    base = weights(plain)
    wanted = dict(base)
    for path, (A, B, alpha) in deltas.items():
        delta = strength * alpha / len(A) * (B.flatten(1) @ A.flatten(1)).view_as(base[f"{path}.weight"])
        assert delta.abs().max() > 1e-3, path  # a thousand times the tolerance
        wanted[f"{path}.weight"] = base[f"{path}.weight"] + delta
    for one, other in combinations([*loaded, wanted], 2):
        check_alike(one, other)


def check_alike(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    wrong = [key for key in one if not (one[key] - other[key]).abs().max() <= tolerance]
    assert not wrong, f"{len(wrong)} weights differ, first {wrong[0]}"


def merged_like_diffusers(model, file, tolerance: float = 1e-6) -> int:
    """Checks that diffusers and we load the same weights from a file. Returns how many weights it changes."""
    plain = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32)
    ours = merged(plain, file)
    check_alike(ours, fused(plain, file), tolerance)
    return sum(not torch.equal(tensor, ours[key]) for key, tensor in weights(plain).items())


# Every kind of file.


def by_component(deltas: Deltas) -> dict[str, dict]:
    """{component: {name of the module inside: (A, B, α)}}."""
    parts = {part: {} for part in PARTS}
    for path, delta in deltas.items():
        component, _, name = path.partition(".")
        parts[component][name] = delta
    return parts


def short(name: str) -> str:
    """'….ff.net.0.proj' -> 'ff.net.0.proj'."""
    return re.search(r"(to_out\.0|ff\.net\.0\.proj|ff\.net\.2|\w+)$", name)[0]


def without_text_model(name: str) -> str:
    return name.removeprefix("text_model.")


def configuration(deltas: Deltas, target: Callable[[str], str] = short, **more) -> dict:
    """`lora_adapter_metadata` with one rank and one α per component. `target`: name of a module -> how it is listed."""
    table = {}
    for component, modules in by_component(deltas).items():
        A, _, alpha = next(iter(modules.values()))
        config = {"r": len(A), "lora_alpha": alpha, "target_modules": sorted({target(name) for name in modules})} | more
        table |= {f"{component}.{key}": value for key, value in config.items()}
    return table


def configuration_without(part: str) -> Callable[[Deltas], dict]:
    return lambda deltas: {key: value for key, value in configuration(deltas).items() if part not in key}


def patterns(deltas: Deltas) -> dict:
    """The same with a pattern for the rank and one for the α of every module."""
    table = configuration(deltas, without_text_model)
    for component, modules in by_component(deltas).items():
        table[f"{component}.rank_pattern"] = {f"^{name}": len(A) for name, (A, *_) in modules.items()}
        table[f"{component}.alpha_pattern"] = {f"^{name}": alpha for name, (*_, alpha) in modules.items()}
    return table


PORTABLE = dict.fromkeys(["use_dora", "use_rslora", "lora_bias"], False)
PORTABLE |= {"rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
KINDS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
KINDS += ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def renamed(*pairs: tuple[str, str]) -> Callable[[dict], dict]:
    """A function that renames tensors: (pattern, replacement) for their keys."""

    def rename(key: str) -> str:
        for pattern, new in pairs:
            key = re.sub(pattern, new, key)
        return key

    return lambda tensors: {rename(key): tensor for key, tensor in tensors.items()}


def without_alpha(value: float) -> Callable[[dict], dict]:
    """A function that removes every α of this value from tensors."""
    return lambda tensors: {key: t for key, t in tensors.items() if not (key.endswith(".alpha") and t == value)}


@dataclass(frozen=True)
class Row:
    """A kind of file: the layers, ranks and α that it means, and the way in which it writes them."""

    layout: str = "diffusers"
    suffix: str = "peft"
    layers: str = FEWER
    rank: Callable = turns(4)
    alpha: Callable | None = None
    metadata: Callable[[Deltas], dict] | None = None
    edit: Callable[[dict], dict] = dict  # what happens to the tensors before they are saved

    def write(self, file, shapes) -> Deltas:
        """Writes the file and returns the deltas that it means."""
        deltas = random_deltas(shapes, self.layers, self.rank, self.alpha)
        tensors = named(deltas, self.layout, self.suffix, alpha=self.suffix == "kohya")
        header = {"lora_adapter_metadata": json.dumps(self.metadata(deltas))} if self.metadata else None
        save_file(self.edit(tensors), file, header)
        return deltas


Peft = partial(Row, alpha=turns(1.0))
Kohya = partial(Row, layout="kohya SGM", suffix="kohya", alpha=turns(1.0))

LOADED = {  # correctly by diffusers 0.42.1, PEFT 0.21.2, transformers 5.23.0
    "PEFT": Row(layers=EVERYTHING),  # without any α: it is the rank
    "PEFT, text encoder 1 as transformers 5 names it": Row(layout="transformers 5", layers=EVERYTHING),
    "PEFT, alpha in lora_B": Peft(edit=lambda tensors: {key: t / 4 if "lora_B" in key else t for key, t in tensors.items()}),
    "PEFT, metadata with short names": Peft(metadata=configuration),
    "PEFT, metadata with full names": Peft(metadata=partial(configuration, target=without_text_model)),
    "PEFT, portable metadata": Peft(metadata=partial(configuration, **PORTABLE)),
    "PEFT, rsLoRA": Row(alpha=turns(2.0), metadata=partial(configuration, lora_alpha=1.0, use_rslora=True)),  # 1/√4 is 2/4
    "PEFT, mixed ranks": Row(rank=turns(2, 4, 8)),
    "PEFT, mixed ranks and alphas by patterns": Row(rank=turns(2, 4, 8), alpha=turns(1.0, 3.0), metadata=patterns),
    "PEFT, attention only, metadata of more": Peft(layers=ATTENTION, metadata=partial(configuration, target_modules=KINDS)),
    "PEFT, convolutions": Row(layers=CONVOLUTIONS),
    "diffusers, lora.down and lora_linear_layer": Row(
        suffix="diffusers scripts", layers=EVERYTHING, edit=renamed((r"^(text_encoder.*)\.lora\.", r"\1.lora_linear_layer."))
    ),
    "diffusers, attention processors of 2023": Row(layout="processors", suffix="processors", layers=ATTENTION),
    "kohya, SGM names": Kohya(layers=EVERYTHING),
    "kohya, diffusers names": Kohya(layout="kohya diffusers", layers=EVERYTHING),
    "kohya, no alpha": Kohya(alpha=None, edit=without_alpha(4)),
    "kohya, mixed ranks, one alpha": Kohya(rank=turns(2, 4, 8)),
    "kohya, one alpha for the U-Net, one for text": Kohya(alpha=lambda path, i: 1.0 if path.startswith("unet") else 3.0),
    "kohya, convolutions, SGM names": Kohya(layers=CONVOLUTIONS),
    "kohya, convolutions, diffusers names": Kohya(layout="kohya diffusers", layers=CONVOLUTIONS),
}

MISREAD = {  # by diffusers, without an error
    "kohya, unequal alphas": Kohya(rank=turns(2, 4, 8), alpha=turns(1.0, 2.0, 4.0, 8.0)),
    "kohya, alpha on every second module": Kohya(alpha=turns(1.0, 4.0), edit=without_alpha(4)),
    "diffusers, lora.down and lora_A": Row(
        edit=renamed((r"(unet.*attn.*)lora_A", r"\1lora.down"), (r"(unet.*attn.*)lora_B", r"\1lora.up"))
    ),
}

REFUSED = {  # by diffusers, although the meaning is clear
    "PEFT, metadata without targets": Peft(metadata=configuration_without("target_modules")),
    "PEFT, metadata of the U-Net only": Row(
        alpha=lambda path, i: 1.0 if path.startswith("unet") else 4.0, metadata=configuration_without("text_encoder")
    ),
    "PEFT, targets with text_model": Peft(metadata=partial(configuration, target=with_text_model)),
    "PEFT, alpha tensors": Kohya(layout="diffusers", edit=renamed(("lora_down", "lora_A"), ("lora_up", "lora_B"))),
    "kohya, no text_model": Kohya(edit=renamed(("_text_model", ""))),
    "kohya, metadata of PEFT": Kohya(metadata=partial(configuration, lora_alpha=3.0)),  # its tensors say 1
}


@pytest.mark.parametrize("row", LOADED.values(), ids=LOADED)
def test_diffusers_and_we_load_the_same_weights(plain, tmp_path, row):
    file = tmp_path / "x.safetensors"
    deltas = row.write(file, layer_shapes(Denoiser(plain)))
    kernels = {A.shape[-1] for A, *_ in deltas.values() if A.ndim == 4}
    assert kernels == ({1, 3} if row.layers == CONVOLUTIONS else set())
    check(plain, deltas, fused(plain, file), merged(plain, file))


@pytest.mark.parametrize("row", (MISREAD | REFUSED).values(), ids=MISREAD | REFUSED)
def test_we_read_what_diffusers_does_not(plain, tmp_path, row):
    file = tmp_path / "x.safetensors"
    deltas = row.write(file, layer_shapes(Denoiser(plain)))
    check(plain, deltas, merged(plain, file))


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("row", MISREAD.values(), ids=MISREAD)
def test_written_by_us_diffusers_reads_it(plain, tmp_path, row, layout):
    file = tmp_path / "x.safetensors"
    shapes = layer_shapes(Denoiser(plain))
    deltas = row.write(file, shapes)
    file.write_bytes(serialise(read_lora(file, shapes), {}, layout, torch.float32))
    check(plain, deltas, fused(plain, file), merged(plain, file))


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_what_diffusers_itself_saves(plain, tmp_path, rslora):
    """Adapters added by PEFT with α ≠ rank and mixed ranks, saved by diffusers with its metadata, against its fusing."""
    torch.manual_seed(0)
    with borrowed(plain) as pipe:
        kept = {}
        for name in PARTS:
            targets = ["to_q", "to_out.0", "ff.net.2"] if name == "unet" else ["q_proj", "fc1"]
            pattern = {"rank_pattern": {"ff.net.2": 2}, "alpha_pattern": {"ff.net.2": 5}} if name == "unet" else {}
            config = LoraConfig(
                r=4, lora_alpha=3, target_modules=targets, use_rslora=rslora, init_lora_weights=False, **pattern
            )
            part = getattr(pipe, name)
            part.add_adapter(config)
            layers = get_peft_model_state_dict(part)
            kept[f"{name}_lora_layers"] = layers if name == "unet" else convert_state_dict_to_diffusers(layers)
            kept[f"{name}_lora_adapter_metadata"] = config.to_dict()
        pipe.save_lora_weights(tmp_path, **kept)
        pipe.fuse_lora(PARTS)
        pipe.unload_lora_weights()
        theirs = weights(pipe)
    (file,) = tmp_path.glob("*.safetensors")
    ours = merged(plain, file)
    check_alike(ours, theirs)
    assert sum(not torch.equal(tensor, ours[key]) for key, tensor in weights(plain).items()) > 50


# Outputs and pictures.

PROMPTS = ["a cat", "two dogs"]


def written(deltas: Deltas, file, layout: str) -> Deltas:
    """Writes a file as train_lora.py does and returns what is in it: float16."""
    config = {"model": "demo", "rank": 4, "alpha": 2.0, "targets": "all", "resolution": 128}
    file.write_bytes(serialise(deltas, make_header(config, images=1, step=1), layout))
    return {path: (A.half().float(), B.half().float(), alpha) for path, (A, B, alpha) in deltas.items()}


@torch.no_grad()
def outputs(pipe, scale: float | None = None) -> list[Tensor]:
    """Context, pooled and a prediction, by diffusers' own calls with their own argument for the strength."""
    context, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False, lora_scale=scale)
    batch = inputs()
    options = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch["time_ids"]}, "return_dict": False}
    options["cross_attention_kwargs"] = scale and {"scale": scale}
    return [context, pooled, *pipe.unet(batch["noisy_latents"], batch["timesteps"], context, **options)]


@torch.no_grad()
def our_outputs(plain, file, strength: float) -> list[Tensor]:
    with borrowed(plain) as pipe:
        model = Denoiser(pipe)
        merge_lora(model, read_lora(file, layer_shapes(model)), strength)
        tokens = tokenize(model.tokenizers, PROMPTS)
        return [*model.encode_text(tokens), model(**inputs() | {"text": (tokens,)})]


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_outputs_at_full_and_half_strength(plain, tmp_path, layout):
    """Ours merged, diffusers' as separate layers; half strength in each of the three ways that diffusers has."""
    file = tmp_path / "x.safetensors"
    deltas = written(random_deltas(layer_shapes(Denoiser(plain)), alpha=turns(2.0)), file, layout)
    check(plain, deltas, fused(plain, file, 0.5), merged(plain, file, 0.5), strength=0.5)
    base, full, half = outputs(plain), our_outputs(plain, file, 1.0), our_outputs(plain, file, 0.5)
    with borrowed(plain) as pipe:
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        pairs = [(outputs(pipe), full), (outputs(pipe, 0.5), half)]
        pipe.set_adapters(pipe.get_active_adapters(), 0.5)
        pairs.append((outputs(pipe), half))
    for theirs, ours in pairs:
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-6)
    for different in (base, full):
        assert all((one - other).abs().max() > 0.01 for one, other in zip(half, different, strict=True))


@pytest.fixture(scope="module")
def demo():
    return StableDiffusionXLPipeline.from_pretrained(ROOT / "assets/demo/model", dtype=torch.float32)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_the_demo_draws_the_same_picture(script, demo, tmp_path, layout):
    """infer.py, which merges the LoRA, against diffusers' pipeline, which computes it in separate layers."""
    file, prompt = tmp_path / "x.safetensors", "a boy with blue eyes"
    written(random_deltas(layer_shapes(Denoiser(demo)), alpha=turns(2.0)), file, layout)
    options = ["--prompts", prompt, "--steps", 6, "--guidance", 4, "--seed", 3, "--device", "cpu"]
    script("infer.py", "--model", "demo", "--lora", file, "--out", tmp_path / "images", *options)
    ours = np.asarray(Image.open(tmp_path / "images/1.png"), int)

    def draw(pipe) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        return np.asarray(pipe(prompt, num_inference_steps=6, guidance_scale=4.0, generator=generator).images[0], int)

    with borrowed(demo) as pipe:
        base = draw(pipe)
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        theirs = draw(pipe)
    # Not 0: x·(W + ΔW) and x·W + x·ΔW are rounded differently, which turns 3 of 49,152 values to the next grey level.
    assert np.abs(theirs - ours).max() <= 1
    assert np.abs(base - ours).mean() > 20
