"""Reports what a LoRA file contains, how much it changes each block, and which programs load it correctly.

    python scripts/inspect_lora.py naruto.safetensors                   the report, and its norms as bars in naruto.norms.png
    python scripts/inspect_lora.py checkpoints                          the newest LoRA of a run

What the programs do is not tried out: it follows from the rules in lora_files/compatibility.py.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors, printable
from options.command import parse_command


@dataclass(frozen=True)
class InspectConfig:
    lora: Annotated[Path, tyro.conf.Positional]
    """The file to look at, or a folder: the newest LoRA in it."""
    model: str | None = None
    """The model that the LoRA is for, as train_lora.py's --model. None: demo if its header says so, else SDXL base's
    architecture, which needs no weights."""
    picture: Path | None = None
    """PNG file for the norms; replaced if it exists. None: the LoRA's name with .norms.png, in the current folder."""


if __name__ == "__main__":
    COMMAND = parse_command("inspect_lora.py", InspectConfig, __doc__)

import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import check_writable, write_atomically
from common.progress import tqdm
from common.sheets import lettering, shorten
from lora_files.base_weights import model_shapes
from lora_files.compatibility import COMPONENT_LABELS, RULES, LoraFile, verdict
from lora_files.decompose import delta_svd, truncated_svd
from lora_files.deltas import is_addition
from lora_files.kinds import Delta, Difference, DoRA
from lora_files.read import check_generation, layouts, newest_lora, scan, trained_on

# The report.

HEADER_FIELDS = {  # label in the report -> keys of the metadata; the first that the file has counts
    "base model": ("ss_base_model_version", "modelspec.architecture"),
    "weights": ("ss_sd_model_name",),
    "trained by": ("ss_network_module", "modelspec.implementation"),
    "title": ("modelspec.title", "ss_output_name"),
    "date": ("modelspec.date",),
    "step": ("sdxl_lora.step", "ss_steps"),
}
SMALLEST = 2.0**-19  # below it float16, which ends at 2^-24, keeps 5 of its 11 bits or fewer


def span(values: Sequence[float]) -> str:
    """'8' or '4 to 16'."""
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def overview(file: LoraFile) -> Iterator[str]:
    sizes: Counter = Counter()
    for tensor in file.tensors.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    dtypes = ", ".join(dtype for dtype, _ in sizes.most_common()) or "none"
    yield f"file         {file.path}, {file.path.stat().st_size / 1e6:.1f} MB, {len(file.tensors)} tensors: {dtypes}"
    found = layouts(file.tensors)
    yield f"layout       {'several: ' if len(found) > 1 else ''}{', '.join(found) or 'none'}"
    try:
        check_generation(file.path, file.parts, file.shapes)
    except UserError as error:
        yield f"for          {str(error).rpartition(': it is for ')[2]}"
    for kind, number in Counter(file.kinds.values()).items():
        yield f"kind         {kind} ({number} modules){NO_NORMS.get(kind, '')}"
    try:
        config = json.loads(file.metadata["sdxl_lora.config"]).items()
        flags = [f"{key} {value}" for key, value in config if key in ("model", "targets", "rank", "alpha", "lr", "resolution")]
        reported = {"trained by": f"this suite: {', '.join(flags)}"}
    except (KeyError, ValueError, AttributeError):
        reported = {}
    for label, keys in HEADER_FIELDS.items():
        value = next((file.metadata[key] for key in keys if key in file.metadata), None)
        if value := reported.get(label, value):
            reported[label] = value
            yield f"{label:12} {printable(value)[:100]}"
    if not reported:
        yield "header       says nothing about the training"


def components(file: LoraFile) -> Iterator[str]:
    if file.deltas:
        yield "component        modules        rank        alpha       alpha/rank"
    for component, label in COMPONENT_LABELS.items():
        deltas = [file.deltas[module] for module in file.within(component).values()]
        layers = sum(module.startswith(f"{component}.") and not is_addition(module) for module in file.shapes)
        ranks, alphas = [len(A) for A, *_ in deltas], [alpha for *_, alpha in deltas]
        scales = [alpha / rank for alpha, rank in zip(alphas, ranks, strict=True)]
        if deltas:
            yield f"{label:16} {f'{len(deltas)} of {layers}':14} {span(ranks):11} {span(alphas):11} {span(scales)}"
    if file.without_alpha:
        yield f"{len(file.without_alpha)} modules have no alpha, which means that it is their rank"
    for problem, stems in file.wrong.items():
        yield f"{len(stems)} {problem}, first {printable(', '.join(stems[:3]))}"


BLOCK = re.compile(
    r"unet\.(mid_block|(down|up)_blocks\.\d+)\.\w+\.\d+|unet\.\w+|text_encoder(_2)?\.(text_model\.)?encoder\.layers\.\d+"
)
FLOW = ("down_blocks", "mid_block", "up_blocks", "conv_out")  # named_modules() has another order


@dataclass
class Block:
    modules: int = 0
    frobenius: float = 0.0
    """Of all its ΔW together."""
    spectral: float = 0.0
    """The largest of any ΔW."""


NO_NORMS = {"DoRA": ": what it changes depends on the weights of a model, so these have no norms below"}


def measure_change(change: Delta | Difference, shape: torch.Size) -> tuple[float, float] | None:
    """Frobenius and spectral norm of ΔW, of a weight of `shape`; None if it is not finite. A vector's are its length.

    A whole matrix takes `truncated_svd`'s time.
    """
    if isinstance(change, tuple) and change[1].numel() > 1:
        values = delta_svd(change)[1]
    else:
        if isinstance(change, tuple):  # an addition to a parameter, as one row
            whole = change[0].float() * change[1].float().reshape(()) * change[2]
        else:
            whole = change.of(torch.zeros(shape))
        if not whole.isfinite().all():
            return None
        values = truncated_svd(whole.reshape(shape[0] if len(shape) > 1 else 1, -1), lambda _: 1)[1]
    return values.norm().item(), values[0].item()


def measure_layers(file: LoraFile) -> dict[str, Block]:
    """{name of the block: norms of its ΔW}, in the order in which data flows, without modules that are not finite."""

    def position(module: str) -> tuple[int, int]:
        component, part = module.split(".")[:2]
        return list(COMPONENT_LABELS).index(component), FLOW.index(part) if part in FLOW else -1

    blocks: dict[str, Block] = {}
    others = {name: change for name, change in file.others.items() if not isinstance(change, DoRA)}
    changes = file.deltas | others | file.additions
    found = sorted((m for m in file.shapes if m in changes and m not in file.not_finite), key=position)
    for module in tqdm(found, unit="module", leave=False):
        match = BLOCK.match(module)
        block = blocks.setdefault(re.sub(r"(\.text_model)?\.encoder\.", ".", match[0]) if match else module, Block())
        if measured := measure_change(changes[module], file.shapes[module]):
            block.modules += 1
            block.frobenius = math.hypot(block.frobenius, measured[0])
            block.spectral = max(block.spectral, measured[1])
    return blocks


def norms(blocks: dict[str, Block]) -> Iterator[str]:
    yield "block                                   modules   Frobenius    spectral"
    for name, block in blocks.items():
        yield f"{name:40} {block.modules:6} {block.frobenius:#11.4g} {block.spectral:#11.4g}"


def weights(file: LoraFile) -> Iterator[str]:
    for label, modules, among in (("dead (ΔW = 0)", file.dead, file.deltas), ("not finite", file.not_finite, file.places)):
        first = f": {', '.join(modules[:3])}{', …' if len(modules) > 3 else ''}" if modules else ""
        yield f"{label:14} {len(modules)} of {len(among)} modules{first}"
    lost = total = 0
    for module in file.deltas.keys() - {*file.dead, *file.not_finite}:
        for factor in file.deltas[module][:2]:
            size = factor.float().abs()
            small = (size < SMALLEST) & ((size > 0) | (factor.dtype == torch.float16))  # in float16 a 0 may be a lost weight
            lost += int((small | size.half().isinf()).sum())
            total += factor.numel()
    share = 100 * lost / max(total, 1)
    yield f"lost to fp16   {share:.3g} % of the live weights: beyond 65504, or below 2^-19 and left with 5 bits of 11 or none"


COLOURS = {"unet": "#3b6ea5", "text_encoder": "#c8762b", "text_encoder_2": "#4f8f4a"}
ROW, LABEL, BAR, NUMBER, TOP = 20, 260, 380, 80, 70  # pixels


def draw_norms(blocks: dict[str, Block], title: str) -> Image.Image:
    """Two panels, Frobenius and spectral norm, with a bar for each block. The largest norm of a panel fills its width."""
    width = LABEL + 2 * (BAR + NUMBER)
    image = Image.new("RGB", (width, TOP + ROW * len(blocks) + ROW // 2), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    large = lettering(17)
    large.write(pen, (ROW // 2, 10), shorten(title, width - ROW, large), "black")
    panels = {"frobenius": "Frobenius norm of the change", "spectral": "spectral norm, the largest in the block"}
    for column, (norm, heading) in enumerate(panels.items()):
        left = LABEL + column * (BAR + NUMBER)
        pen.text((left, TOP - 26), heading, fill="black", font=font)
        largest = max(getattr(block, norm) for block in blocks.values()) or 1
        for row, (name, block) in enumerate(blocks.items()):
            y, value = TOP + ROW * row, getattr(block, norm)
            length = round(BAR * value / largest)
            if not column:
                pen.text((LABEL - 8, y + ROW // 2), name, fill="black", font=font, anchor="rm")
            if length:
                pen.rectangle((left, y + 2, left + length - 1, y + ROW - 3), fill=COLOURS[name.partition(".")[0]])
            pen.text((left + length + 5, y + ROW // 2), f"{value:#.3g}", fill="gray", font=font, anchor="lm")
    return image


def main(config: InspectConfig) -> None:
    lora, model = newest_lora(config.lora, ""), config.model
    picture = config.picture or Path(f"{lora.stem}.norms.png")
    check_writable("--picture", picture.parent)
    if picture.is_dir():
        raise UserError(f"--picture {picture} is a folder: name a .png file in it")
    with suppress(UserError):  # of another tool, or for a model that is not here
        model = model or ("demo" if trained_on(lora) == "demo" else None)
    shapes = model_shapes(model)
    file = LoraFile(**vars(scan(lora, shapes)), shapes=shapes)
    blocks = measure_layers(file)
    if model == "demo":
        print("for          the bundled demo model, which no other program has")
    of_weights = weights(file) if file.deltas or file.not_finite else ()
    for section in (overview(file), components(file), norms(blocks) if blocks else (), of_weights):
        if lines := list(section):
            print(*lines, "", sep="\n")
    for program in RULES:
        print(f"{program:10} {printable(verdict(file, program))}")
    if blocks:
        buffer = BytesIO()
        draw_norms(blocks, lora.name).save(buffer, "PNG")
        write_atomically(picture, buffer.getvalue())
        print(f"\n{picture}: the norms as bars")


if __name__ == "__main__":
    with one_line_errors("inspect_lora.py"):
        main(COMMAND)
