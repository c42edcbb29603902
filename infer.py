"""Pictures of the base model and of the same model with a LoRA merged in: same prompts, same seeds, side by side.

python infer.py --compare                             the newest LoRA in checkpoints/: base | LoRA, in images/
python infer.py --prompts "a cat in Naruto style"     pictures with the LoRA only
python infer.py --lora naruto.safetensors --model sdxl --scale 0.4 0.7 1.0 --sampler dpm++ --steps 25     a column each
python infer.py --grid scale seed --scale 0.4 0.7 1.0 --seed 1 2 3    one sheet of both, grid.png
python infer.py --lora naruto.safetensors:0.8 --lora ink.safetensors:0.5 --lora-parts unet                several at once
python infer.py --save-merged merged/                 also writes W + ΔW as an ordinary diffusers folder
python infer.py --save-merged merged.safetensors      or as one checkpoint file, for other programs
"""

import re
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import tyro

from common.errors import UserError, one_line_errors
from common.options import MAX_SEED, check_options, option
from options.command import parse_command
from options.training import resolve_precision

Axis = Literal["lora", "scale", "seed", "prompt", "guidance", "steps"]
OWN_NAMES = re.compile(r"\d+(-base|-lora(-[\de.-]+)?)?|compare|grid(-\d+-\d+)?")  # of the pictures that this script writes
PARTS = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}


@dataclass(frozen=True)
class InferConfig:
    compare: bool = False
    """Render the base model too, as the first column (or row) beside those with LoRA."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file of any tool, or a folder of them: the newest in it; `:0.8` after it is its strength. May be repeated, to
    merge several. None given: checkpoints/."""
    lora_parts: str = "unet,te1,te2"
    """What of the LoRA is merged: U-Net, text encoders 1 and 2."""
    model: str | None = None
    """As in training. None: the model that the LoRA was trained on, from its header."""
    prompts: tuple[str, ...] = ()
    """Texts, or one file: a prompt on each line, with kohya's options such as --w 832, or TOML. None given: those that the run
    of the LoRA drew, from its header, or else the evaluation prompts of the model."""
    negative: str | None = option(None, text=True)
    """Negative prompt."""
    seed: tuple[int, ...] = option((0,), at_least=0, at_most=MAX_SEED)
    """Picture i starts from the noise of seed + i; where the seed is an axis of --grid, from that of the seed itself."""
    size: str | None = None
    """Width and height in pixels, such as 832x1216. None: the model's own."""
    steps: tuple[int, ...] = option((30,), at_least=1, at_most=1000)
    """Denoising steps."""
    guidance: tuple[float, ...] = option((5.0,), at_least=0)
    """Classifier-free guidance scale; 1 is without."""
    guidance_rescale: float = option(0.0, at_least=0, at_most=1)
    """How far guidance keeps the contrast of the prediction without it (Lin et al. 2023, arXiv:2305.08891); 0.7 suits a model
    of zero terminal SNR."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of all LoRA together: W + scale·ΔW. Several: a column of pictures for each."""
    grid: tuple[Axis, Axis] | None = None
    """Columns and rows of one sheet, grid.png, with a picture for each two of the values that their flags have. Of a prompt
    that is no axis the first is drawn, and all LoRA are merged together unless they are one."""
    sampler: Literal["default", "ddim", "dpm++", "euler", "euler-a", "unipc"] = "default"
    """Sampler of diffusers. default: the model's own."""
    out: Path = Path("images")
    """Folder for the pictures: 1-base.png, 1-lora.png …; side by side 1.png, 2.png, … and all of them compare.png."""
    save_merged: Path | None = None
    """Where to write the merged model: a diffusers folder, or x.safetensors, a checkpoint in one file; for one --scale only."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the model predicts. auto: as its files say."""
    zero_snr: Literal["auto", "yes", "no"] = "auto"
    """Does its schedule end at zero terminal SNR? auto: as its files say."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on CUDA, fp32 on CPU. The VAE is never fp16."""
    device: str = "auto"
    """'auto' (CUDA if there is one, else the CPU), 'cuda', 'cpu', 'mps'."""

    def __post_init__(self) -> None:
        check_options(self)
        for axis in ("seed", "steps", "guidance", "scale"):
            if not getattr(self, axis):
                raise UserError(f"--{axis} needs a number")
            if len(set(getattr(self, axis))) < len(getattr(self, axis)):
                raise UserError(f"--{axis} has a value twice: their pictures would have one name")
            if len(getattr(self, axis)) > 1 and axis not in self.axes:
                raise UserError(f"--{axis} has several values: give one, or name {axis} in --grid, such as --grid scale {axis}")
        if len(set(self.axes)) == 1:
            raise UserError(f"--grid {' '.join(self.axes)}: name two different ones")
        if self.compare and not {"lora", "scale"} & set(self.axes):
            raise UserError("--compare needs lora or scale in --grid, beside which the base is drawn")
        if self.save_merged and len(self.scale) > 1:
            raise UserError("--save-merged writes one model: give one --scale")
        if wrong := set(self.lora_parts.split(",")) - PARTS.keys():
            raise UserError(f"--lora-parts {','.join(sorted(wrong))}: choose from {','.join(PARTS)}")

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """What the columns and the rows of pictures are."""
        return self.grid or ("scale", "prompt")


if __name__ == "__main__":
    COMMAND = parse_command("infer.py", InferConfig, __doc__)

from PIL import Image

from common.files import check_writable, write_atomically
from common.sheets import grid, png_bytes, side_by_side, stack
from lora import merge_loras
from lora_files.deltas import Changes, check_fit, parameter_shapes
from lora_files.merge import write_pipeline
from lora_files.read import newest_lora, read_changes, read_metadata, read_tensors, tensor_hash, trained_on, with_strength
from memory import DTYPES, resolve_device, speed_up
from model.check import describe_model
from model.load import Pipeline, load_sdxl, native_resolution
from model.prompts import Prompt, from_header, generation_parameters, parse_size, read_prompts, times
from model.render import Renderer
from model.sdxl import SAMPLERS, Denoiser
from model.vae import decode_latents
from performance.attention import drawing_kernel


def read_loras(config: InferConfig, files: list[tuple[Path, float]], denoiser: Denoiser) -> list[tuple[Changes, float]]:
    """(ΔW of the chosen parts, strength) of every LoRA. Raises UserError for a file that does not fit the model."""
    prefixes = tuple(PARTS[part] for part in config.lora_parts.split(","))
    loras: list[tuple[Changes, float]] = []
    for file, strength in files:
        deltas = read_changes(file, parameter_shapes(denoiser))
        chosen = {name: delta for name, delta in deltas.items() if name.startswith(prefixes)}
        print(f"LoRA {file}: {len(chosen)} of {len(deltas)} layers, strength {strength:g}")
        loras.append((chosen, strength))
    return loras


Drawing = tuple[tuple[int, ...], Prompt]  # numbers of the LoRA that are merged at the strength of the prompt: () is the base


def plan_table(
    config: InferConfig, files: list[tuple[Path, float]], prompts: list[Prompt], size: dict[str, int]
) -> tuple[list[str], list[str], list[list[Drawing]]]:
    """Names of columns, names of rows, and the pictures, row by row: one for each two values of the axes. With --compare the
    base is the first value of one of them. What a prompt says itself comes before the flags, but not before an axis. `size`:
    width and height.
    """
    one_scale = not config.grid and len(config.scale) == 1
    unique = len({file.stem for file, _ in files}) == len(files)
    names = [(file.stem if unique else f"{file.parent.name}/{file.stem}") + times(strength) for file, strength in files]
    axes: dict[str, list[tuple[str, dict[str, Any]]]] = {  # {axis: [(label, what it sets)]}
        "lora": [(name, {"loras": (n,)}) for n, name in enumerate(names)],
        "scale": [("LoRA", {})] if one_scale else [(f"LoRA × {scale:g}", {"strength": scale}) for scale in config.scale],
        "prompt": [(prompt.text, {"prompt": n}) for n, prompt in enumerate(prompts)],
    }
    axes |= {name: [(f"{name} {n}", {name: n}) for n in getattr(config, name)] for name in ("seed", "guidance", "steps")}
    columns, rows = (axes[axis] for axis in config.axes)
    if config.compare:
        axis = next(axis for axis in config.axes if axis in ("lora", "scale"))
        axes[axis].insert(0, ("base", {"loras": (), "strength": 0.0}))
    flags: dict[str, Any] = {"seed": config.seed[0], "steps": config.steps[0], "guidance": config.guidance[0]}
    flags |= {"negative": config.negative, "guidance_rescale": config.guidance_rescale, "strength": config.scale[0]}
    defaults = Prompt("", **(flags | size))
    cells: list[list[Drawing]] = [[] for _ in rows]
    for (_, row), drawings in zip(rows, cells, strict=True):
        for _, column in columns:
            settings: dict[str, Any] = {"prompt": 0, "loras": tuple(range(len(files)))} | row | column
            number, chosen = settings.pop("prompt"), settings.pop("loras")
            drawings.append((chosen, replace(prompts[number], **settings).filled(number, defaults)))
    return [label for label, _ in columns], [label for label, _ in rows], cells


def draw_table(
    cells: list[list[Drawing]], pipe: Pipeline, model: str, files: list[tuple[Path, float]], loras: list[tuple[Changes, float]],
    last: tuple[tuple[int, ...], float] | None,
) -> list[list[Image.Image]]:  # fmt: skip
    """The pictures, drawn one merged model after the other: merging costs nothing per step. Prints the seconds that each
    took. `last`: numbers and strength of what the model holds afterwards; None: that is left open.
    """
    merges: dict[tuple[tuple[int, ...], float], dict[Drawing, None]] = {}  # a picture that is twice in the table is drawn once
    for chosen, prompt in chain(*cells):
        merges.setdefault((chosen, prompt.strength or 0.0), {})[chosen, prompt] = None
    if last:
        merges[last] = merges.pop(last, {})
    denoiser = Denoiser(pipe)
    for part in (denoiser, pipe.vae):
        speed_up(part, drawing_kernel(pipe.device))
    renderer = Renderer(pipe, denoiser, partial(decode_latents, pipe.vae))
    pictures: dict[Drawing, Image.Image] = {}
    weights = check_fit(denoiser, {name: delta for deltas, _ in loras for name, delta in deltas.items()})
    several = sum(bool(chosen) for chosen, _ in merges) > 1
    base = {name: weight.cpu().clone() for name, weight in weights.items()} if several else {}
    for (chosen, strength), drawings in merges.items():
        for name, weight in base.items():
            weights[name].copy_(weight)
        merge_loras(denoiser, [(loras[n][0], strength * loras[n][1]) for n in chosen])
        names = {files[n][0].stem: (strength * files[n][1], tensor_hash(files[n][0])[:12]) for n in chosen}
        label = "base" if not chosen else ("LoRA" if len(chosen) == len(files) else "".join(names)) + times(strength)
        begin = time.perf_counter()
        images = renderer.draw([prompt for _, prompt in drawings], label)
        if images:
            print(f"{label}: {(time.perf_counter() - begin) / len(images):.2f} s per image")
        for drawing, image in zip(drawings, images, strict=True):
            image.info["parameters"] = generation_parameters(drawing[1], pipe.scheduler, model, names)
            pictures[drawing] = image
    return [[pictures[drawing] for drawing in row] for row in cells]


def main(config: InferConfig) -> None:
    # The LoRA, the model it was trained on, and what to draw.
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    size = parse_size(config.size)
    files = [(newest_lora(path), strength) for path, strength in map(with_strength, config.lora or ("checkpoints",))]
    model = config.model or trained_on(files[0][0])
    of_header = [] if config.prompts else from_header(files[0][0], read_metadata(files[0][0]))
    prompts = of_header or read_prompts(config.prompts, model)
    if config.prompts and len(prompts) > 1 and "prompt" not in config.axes:
        raise UserError(f"--prompts has {len(prompts)} texts: give one, or name prompt in --grid")
    for file, _ in files:
        read_tensors(file)  # a file that is damaged shows before the model is loaded
    pipe = load_sdxl(model, DTYPES[precision], device, config.prediction_type, config.zero_snr)
    loras = read_loras(config, files, Denoiser(pipe))
    if config.save_merged:
        check_empty("--save-merged", config.save_merged)
    check_writable("--out", config.out)

    # How pictures are made: diffusers' sampler.
    own_scheduler, side = pipe.scheduler, native_resolution(pipe)
    if config.sampler != "default":
        pipe.scheduler = SAMPLERS[config.sampler].from_config(pipe.scheduler.config)
    print(f"model {model}: predicts {describe_model(pipe)}")
    print(f"{device}, {precision}, {' and '.join(map(str, config.steps))} steps of the {config.sampler} sampler")

    # Pictures, and the sheets that show them side by side.
    columns, rows, cells = plan_table(config, files, prompts, {"width": side, "height": side} | size)
    last = (tuple(range(len(files))), config.scale[0]) if config.save_merged else None
    pictures = sheets(config, columns, rows, cells, draw_table(cells, pipe, model, files, loras, last))
    move_older_pictures(config.out)
    for name, image in pictures.items():
        write_atomically(config.out / name, png_bytes(image))
    print(f"pictures in {config.out}/: {', '.join(pictures)}")

    if config.save_merged:
        pipe.scheduler = own_scheduler
        sources = [{"file": file.name, "strength": config.scale[0] * strength} for file, strength in files]
        write_pipeline(pipe, config.save_merged, sources)
        print(f"merged model in {config.save_merged}")


def sheets(
    config: InferConfig, columns: list[str], rows: list[str], cells: list[list[Drawing]], images: list[list[Image.Image]]
) -> dict[str, Image.Image]:
    """{file name: picture}: each clean picture, and the sheets that show them side by side with what they are drawn from."""
    if config.grid:
        files = {f"grid-{y}-{x}.png": image for y, row in enumerate(images, 1) for x, image in enumerate(row, 1)}
        return files | {"grid.png": grid(images, columns, rows, "" if "prompt" in config.axes else cells[0][0][1].text)}
    if len(columns) == 1:
        return {f"{y}.png": image for y, (image,) in enumerate(images, 1)}
    files, stacked = {}, []
    for y, (row, drawings, text) in enumerate(zip(images, cells, rows, strict=True), 1):
        names = columns
        if len(config.scale) == 1:  # then each prompt may have its own
            names = [f"LoRA{times(prompt.strength)}" if loras else "base" for loras, prompt in drawings]
        stacked.append(side_by_side(dict(zip(names, row, strict=True)), text))
        clean = {re.sub("[^a-z0-9.-]+", "-", column.lower()): image for column, image in zip(columns, row, strict=True)}
        files |= {f"{y}.png": stacked[-1]} | {f"{y}-{name}.png": image for name, image in clean.items()}
    return files | {"compare.png": stack(stacked)}


def move_older_pictures(folder: Path) -> None:
    """Moves the pictures of an earlier call into `older` in this folder, in the place of those of the same name there."""
    if older := [path for path in folder.glob("*.png") if OWN_NAMES.fullmatch(path.stem)]:
        (folder / "older").mkdir(exist_ok=True)
        for path in older:
            path.replace(folder / "older" / path.name)
        print(f"older pictures are in {folder / 'older'}")


def check_empty(flag: str, path: Path) -> None:
    """Raises UserError if there is a file of that name, or a folder that is not empty, or if it cannot be written."""
    if path.exists() and (not path.is_dir() or any(path.iterdir()) or path.suffix == ".safetensors"):
        raise UserError(f"{flag} {path} is there already and not an empty folder")
    check_writable(flag, path.parent)


if __name__ == "__main__":
    with one_line_errors("infer.py"):
        main(COMMAND)
