"""LoRA files: names, layouts and metadata. Inside the suite an adapter is {module path: (A, B, alpha)}; the paths are those
of diffusers' modules.

Written: the kohya layout with SGM block names, which diffusers, ComfyUI and A1111 all match, or diffusers' own.
Read: every layout of LoRA that other tools write.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from lora_files.deltas import Deltas
from lora_files.names import kohya_name

MOST_HEADER = 16 * 2**20  # bytes; one of every layer of SDXL has 0.4 MB. A million keys would take a minute to read


def read_metadata(path: Path) -> dict[str, str]:
    """The header of a LoRA file. Raises UserError if it is not a readable .safetensors file."""
    try:
        with path.open("rb") as file:
            if MOST_HEADER < int.from_bytes(file.read(8), "little") < path.stat().st_size:  # it is there, all of it
                raise UserError(f"--lora {path} is no LoRA: its header alone is above {MOST_HEADER // 2**20} MiB")
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--lora {path} is not a readable .safetensors file: {error}") from None


def trained_on(path: Path) -> str:
    """The --model that a LoRA file of ours was trained with. Raises UserError if its header does not say, or names one that
    is not here: who wrote the file does not decide what is fetched.
    """
    try:
        model = json.loads(read_metadata(path).get("sdxl_lora.config", "{}")).get("model")
    except (ValueError, AttributeError):
        model = None
    if not isinstance(model, str):
        raise UserError(f"--lora {path} does not say which model it was trained on: add --model")
    if model not in ("demo", "sdxl") and not Path(model).exists():
        raise UserError(f"--lora {path} was trained on {model!r}, which is not here: name the model by --model")
    return model


def newest_lora(path: Path) -> Path:
    """A LoRA file as it is; of a folder the newest .safetensors in it. Raises UserError if there is none."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"--lora {path}: no .safetensors file there (train one with train_lora.py)")
    return files[-1]


def with_strength(lora: str) -> tuple[Path, float]:
    """'naruto.safetensors:0.8' -> (path, 0.8); without a finite number 1."""
    name, _, strength = lora.rpartition(":")
    try:
        return (Path(name), float(strength)) if name and math.isfinite(float(strength)) else (Path(lora), 1.0)
    except ValueError:
        return Path(lora), 1.0


# Reading: whatever another tool has written.
A_OR_B_KEY = re.compile(
    r"(.+?)[._]lora(?:_linear_layer)?[._](?:(down|A)|up|B)(?:\.default)?\.weight"
)  # (stem, is it the down half)
COMPONENT_PREFIXES = [  # prefix of a stem -> component; the first that fits
    ("base_model.model.", None),
    ("diffusion_model.", "unet"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("unet.", "unet"),
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("lycoris_", None),
    ("", None),
]
LAYOUTS = [  # what is in a key -> the layout that it is in; the first that fits
    (r"^lora_unet_((in|out)put_blocks|middle_block|time_embed_\d|label_emb|out_)", "kohya with SGM block names"),
    (r"^lora_unet_", "kohya with diffusers block names"),
    (r"^lora_te[12]?_", "kohya"),
    (r"^lycoris_", "LyCORIS"),
    (r"^base_model\.model\.", "raw PEFT"),
    (r"^(diffusion_model|text_encoders)\.", "ComfyUI"),
    (r"\.to_\w+_lora\.(down|up)\.", "diffusers of 2023 (attention processors)"),
    (r"\.lora_([AB]\.|magnitude)", "diffusers/PEFT"),
    (r"\.lora(_linear_layer)?\.(down|up)\.", "diffusers old (.lora.down)"),
]
UNSUPPORTED = {  # what is in a key -> what such a file is
    r"\.(dora_scale|lora_magnitude_vector|magnitude)\b": "DoRA",
    r"\.lora_mid\b": "a LoCon with Tucker decomposition",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.diff(_b)?$": "a difference of whole weights",
    r"bundle_emb": "a LoRA with embeddings in it",
}
NOT_COPIED = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "format")  # not of ΔW
CONTEXT = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # channels that cross-attention reads


def flat(rest: str) -> str:
    """A path inside a component in the one spelling that all layouts lead to: underscores, and the names of today."""
    rest = rest.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")
    rest = re.sub(r"(attn\d_to_out)$", r"\1_0", rest)
    rest = re.sub(r"self_attn_to_([qkv])$", r"self_attn_\1_proj", rest)
    return re.sub(r"self_attn_to_out$", "self_attn_out_proj", rest)


def spellings(path: str) -> list[tuple[str | None, str]]:
    """(component, flat path) under which a module of the model may appear in a file; None: the file names no component."""
    component, _, rest = path.partition(".")
    if component != "unet":
        return [(component, flat(rest)), (None, flat(rest))]
    stability = kohya_name(path).removeprefix("lora_unet_")
    return [(named, name) for named in ("unet", None) for name in (flat(rest), stability)]


def locate(stem: str) -> tuple[str | None, str]:
    """The stem of a key -> (component, flat path)."""
    prefix, component = next((p, c) for p, c in COMPONENT_PREFIXES if stem.startswith(p))
    rest = stem.removeprefix(prefix)
    return (component, flat(rest)) if component or prefix != "base_model.model." else locate(rest)


def layouts(keys: Iterable[str]) -> list[str]:
    """The layouts of a file, by name, that of most keys first. The text encoders of both kinds of kohya are named alike."""
    keys = (key for key in keys if not key.endswith(".alpha"))
    found = Counter(next((name for part, name in LAYOUTS if re.search(part, key)), "unknown") for key in keys)
    if any(name.startswith("kohya ") for name in found):
        del found["kohya"]
    return [name for name, _ in found.most_common()]


def gather(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{stem: {"down", "up", "alpha"}}; what FOREIGN knows is there by its own name, and any other key is a stem of no parts."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, part = key, None
        if match := A_OR_B_KEY.fullmatch(key):
            stem, part = match[1], "down" if match[2] else "up"
        elif key.endswith(".alpha") and tensor.numel() == 1:
            stem, part = key.removesuffix(".alpha"), "alpha"
        elif match := next(filter(None, (re.search(kind, key) for kind in UNSUPPORTED)), None):
            stem, part = key[: match.start()] or key, key[match.start() :].removeprefix(".")
        parts.setdefault(stem, {}).update({part: tensor} if part else {})
    return parts


def foreign(parts: Iterable[str]) -> str | None:
    """What a module of these parts is, unless it is LoRA of plain A and B."""
    return next((kind for pattern, kind in UNSUPPORTED.items() for part in parts if re.search(pattern, f".{part}")), None)


@dataclass(frozen=True)
class Contents:
    """What is in a file and which layers of a model it is for. Nothing is refused yet."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]]
    """{stem: its tensors}, as `gather` sorts them."""
    places: dict[str, str]
    """{stem: module path} of what fits; of another kind of adapter by its name alone."""
    deltas: Deltas
    """Of plain A and B that fit. An α may be anything."""
    wrong: dict[str, list[str]]
    """{what they do: stems}"""


def scan(path: Path, shapes: dict[str, torch.Size]) -> Contents:
    """As `read`, which refuses whatever this finds wrong. Raises UserError only if the file or its metadata is unreadable."""
    metadata = read_metadata(path)
    tensors = load_file(path)
    parts = gather(tensors)
    modules: dict[tuple[str | None, str], list[str]] = {}
    for module in shapes:
        for spelling in spellings(module):
            modules.setdefault(spelling, []).append(module)
    rules = scaling_rules(path, metadata)
    places: dict[str, str] = {}
    deltas: Deltas = {}
    wrong: dict[str, list[str]] = {}
    for stem, mine in parts.items():
        candidates = modules.get(locate(stem), [])
        if not candidates:
            wrong.setdefault("match no layer", []).append(stem)
        elif foreign(mine):
            places[stem] = candidates[0]
        elif {"down", "up"} - mine.keys():
            wrong.setdefault("lack A or B", []).append(stem)
        elif (layer := next((m for m in candidates if fits(mine["down"], mine["up"], shapes[m])), None)) is None:
            wrong.setdefault("have other shapes than their layer", []).append(stem)
        elif layer in deltas:
            wrong.setdefault("are there twice, under two names", []).append(stem)
        else:
            down, up = mine["down"], mine["up"]
            places[stem] = layer
            deltas[layer] = (down, up, float(mine["alpha"]) if "alpha" in mine else rules(layer, len(down)))
    return Contents(path, metadata, tensors, parts, places, deltas, wrong)


def read_lora(path: Path, shapes: dict[str, torch.Size]) -> Deltas:
    """A LoRA file of any layout, mapped onto the layers of a model: `shapes` is {module path: shape of its weight}.

    Read are the kohya layout with SGM's or diffusers' block names, diffusers' and PEFT's, old and new, PEFT's own
    (`adapter_config.json` beside it), ComfyUI's and LyCORIS' prefixes, convolutions included. α comes from its tensor, else
    from the metadata, else it is the rank; rsLoRA's α/√r is turned into the α that gives the same.

    Raises UserError, in one line with counts and the first names, if the file is for another model, is no LoRA of plain
    A and B, or if a key belongs to no layer or lacks its partner.
    """
    contents = scan(path, shapes)
    parts = contents.parts
    if kind := next(filter(None, map(foreign, parts.values())), None):
        raise UserError(f"--lora {path} is {kind}: only LoRA of plain A and B can be merged exactly")
    if not parts:
        raise UserError(f"--lora {path} holds no tensor")
    check_generation(path, parts, shapes)
    if contents.wrong:
        what, stems = next(iter(contents.wrong.items()))
        first = ", ".join(" ".join([stem, *(str(list(t.shape)) for t in parts[stem].values())]) for stem in stems[:3])
        raise UserError(f"--lora {path} does not fit the model: {len(stems)} of {len(parts)} modules {what}, first {first}")
    for stem, module in contents.places.items():
        if not math.isfinite(alpha := contents.deltas[module][2]):
            raise UserError(f"--lora {path}: the alpha of {stem} is {alpha}")
    return contents.deltas


def fits(down: Tensor, up: Tensor, shape: torch.Size) -> bool:
    """Whether up · down has the shape of the weight, linear or convolution: down [r, in, …], up [out, r, …]."""
    if min(down.ndim, up.ndim) < 2 or not len(down):
        return False
    return len(up) == shape[0] and down[0].numel() == shape[1:].numel() and up[0].numel() == len(down)


def check_generation(path: Path, parts: dict[str, dict[str, Tensor]], shapes: dict[str, torch.Size]) -> None:
    """Raises UserError if cross-attention reads another number of channels than the model's: a LoRA for another model."""
    ours = {shape[1] for module, shape in shapes.items() if module.endswith("attn2.to_k")}
    downs = [mine["down"] for stem, mine in parts.items() if flat(stem).endswith("attn2_to_k") and "down" in mine]
    theirs = {down.shape[1] for down in downs if down.ndim > 1}
    if ours and theirs and ours.isdisjoint(theirs):
        told = " and ".join(CONTEXT.get(channels, f"a model of {channels} channels") for channels in sorted(theirs))
        found, needed = (" or ".join(map(str, sorted(channels))) for channels in (theirs, ours))
        raise UserError(f"--lora {path} does not fit the model: it is for {told}, {found} channels of text and not {needed}")


def scaling_rules(path: Path, metadata: dict[str, str]) -> Callable[[str, int], float]:
    """(module path, rank) -> α where no tensor says it: by PEFT's metadata, in the header or in the file beside it."""
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        beside = path.with_name("adapter_config.json")
        if path.name == "adapter_model.safetensors" and beside.is_file():  # PEFT's own names for the two
            told = {f".{key}": value for key, value in json.loads(beside.read_text()).items()}
        if not isinstance(told, dict):
            raise ValueError("it is no table")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"--lora {path}: its PEFT configuration is not readable: {error}") from None

    def alpha(module: str, rank: int) -> float:
        component, _, rest = module.partition(".")
        if f"{component}.lora_alpha" not in told:
            component = ""
        plain = rest.removeprefix("text_model.")
        try:
            value = told.get(f"{component}.lora_alpha", rank)
            for pattern, other in (told.get(f"{component}.alpha_pattern") or {}).items():  # PEFT takes the first that matches
                if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (rest, plain, f"text_model.{plain}")):
                    value = other
                    break
            return float(value) * (rank**0.5 if told.get(f"{component}.use_rslora") else 1)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise UserError(f"--lora {path}: its PEFT configuration is not usable: {error}") from None

    return alpha
