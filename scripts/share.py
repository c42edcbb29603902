"""Makes a folder to give away: a LoRA with its preview, and a page that says what it is and how it is used.

    python scripts/share.py checkpoints --out naruto-lora                      the newest LoRA of a run
    python scripts/share.py checkpoints/naruto-000600.safetensors --out naruto-lora

The weights stay byte for byte; into the header goes a small picture, as ModelSpec has it. The pictures are those that the run
drew at that step. The page is a model card of Hugging Face's, and can be read as it is.
"""

import base64
import io
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors
from options.command import parse_command
from options.training import is_name


@dataclass(frozen=True)
class ShareConfig:
    lora: Annotated[Path, tyro.conf.Positional]
    """A LoRA file of train_lora.py, or a folder of them: the newest in it."""
    out: Path
    """The folder to make."""


if __name__ == "__main__":
    COMMAND = parse_command("share.py", ShareConfig, __doc__)

from PIL import Image

from common.files import check_writable, write_atomically
from common.safetensors_files import encode_header, read_header
from lora_files.read import newest_lora
from model.prompts import from_header

THUMBNAIL = 256  # pixels: the longer side of the picture in the header
BASES = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
SETTINGS = [
    "rank",
    "alpha",
    "targets",
    "steps",
    "bs",
    "grad_accum",
    "lr",
    "text_encoder_lr",
    "lr_schedule",
    "resolution",
    "seed",
]


def with_thumbnail(lora: Path, picture: Path | None) -> bytes:
    """The file with a small JPEG of `picture` in its header."""
    begin, header = read_header(lora)
    if picture:
        try:
            with Image.open(picture) as opened:
                small = opened.convert("RGB")
        except OSError as error:
            raise UserError(f"{picture} cannot be read: {error}: remove it") from None
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        data_url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        header = header | {"__metadata__": header.get("__metadata__", {}) | {"modelspec.thumbnail": data_url}}
    return encode_header(header) + lora.read_bytes()[begin:]


def pictures_of(lora: Path, step: int) -> dict[int, Path]:
    """{number of the prompt, from 1: the LoRA's picture that the run drew at this step}."""
    found = (lora.parent / "samples").glob(f"step-{step:06}-p*-lora.png")
    numbers = {int(match[1]): path for path in found if (match := re.search(r"-p(\d+)-lora", path.name))}
    return dict(sorted(numbers.items()))


def card(name: str, metadata: dict[str, str], config: dict, shown: list[tuple[str, str]]) -> str:
    """The page: front matter of Hugging Face's hub, pictures with their prompts, how it is used, how it was made. `config`: the
    options of the run; `shown`: (prompt, picture).
    """
    base, trigger = BASES.get(str(config["model"]), config["model"]), metadata.get("modelspec.trigger_phrase", "")
    front = {
        "license": metadata.get("modelspec.license", "other"), "base_model": base, "instance_prompt": trigger or None,
        "tags": ["text-to-image", "lora", "diffusers", "stable-diffusion-xl"],
        "widget": [{"text": text, "output": {"url": image}} for text, image in shown],
    }  # fmt: skip
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items() if value), "---"]
    lines += [f"# {name}", "", metadata.get("modelspec.description", f"A LoRA for {base}."), ""]
    lines += [f"![{text}]({image})\n\n*{text}*\n" for text, image in shown]
    lines += ["## Use", ""]
    lines += [f"Write `{trigger}` into the prompt. "] if trigger else []
    lines += [
        f"Put `{name}.safetensors` into `ComfyUI/models/loras/`, or `models/Lora/` of A1111 and Forge; strength 0.7 to 1. In "
        f"diffusers: `pipe.load_lora_weights(\".\", weight_name=\"{name}.safetensors\")`.",
        "", "## Training", "", "| | |", "|---|---|",
        f"| pictures | {metadata['ss_num_train_images']} |", f"| this file | step {metadata['sdxl_lora.step']} |",
    ]  # fmt: skip
    lines += [f"| {key.replace('_', ' ')} | {config[key]} |" for key in SETTINGS if config.get(key) is not None]
    if author := metadata.get("modelspec.author"):
        lines += ["", f"By {author}."]
    return "\n".join(lines) + "\n"


def main(config: ShareConfig) -> None:
    lora = newest_lora(config.lora, "")
    metadata = read_header(lora)[1].get("__metadata__", {})
    try:
        options, step = json.loads(metadata["sdxl_lora.config"]), int(metadata["sdxl_lora.step"])
        metadata["ss_num_train_images"], options["model"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{lora} is no LoRA of train_lora.py: its header does not say how it was made") from None
    prompts, pictures = from_header(lora, metadata), pictures_of(lora, step)
    pictures = {number: path for number, path in pictures.items() if 0 < number <= len(prompts)}
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"--out {config.out} is there already and not an empty folder")
    name = metadata.get("modelspec.title", "")
    name = name if is_name(name) else lora.stem  # a title of another program may be a path
    images = {f"images/{number}.png": picture.read_bytes() for number, picture in pictures.items()}
    shown = [(prompts[number - 1].text, image) for number, image in zip(pictures, images, strict=True)]
    first = next(iter(pictures.values()), None)
    files = {**images, f"{name}.safetensors": with_thumbnail(lora, first)}
    if first:
        files[f"{name}.preview.png"] = first.read_bytes()  # where A1111 and Forge look for it
    files["README.md"] = card(name, metadata, options, shown).encode(errors="replace")
    check_writable("--out", config.out)
    try:
        for file, content in files.items():
            write_atomically(config.out / file, content)
    except OSError as error:
        shutil.rmtree(config.out, ignore_errors=True)
        raise UserError(f"--out {config.out} cannot be written: {error.strerror}") from None
    print(f"{config.out}: {name}.safetensors of step {step}, README.md and {len(pictures)} pictures")
    if not pictures:
        print(f"there are no pictures of this step in {lora.parent / 'samples'}: put some into {config.out} by hand")


if __name__ == "__main__":
    with one_line_errors("share.py"):
        main(COMMAND)
