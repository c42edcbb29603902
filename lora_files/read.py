"""Reading LoRA files in every layout that other tools write, as `Deltas` with the paths of diffusers' modules.

A key such as `lora_unet_input_blocks_4_1_proj_in.lora_down.weight` is a stem, the file's name for a module, and a part:
"down" (A), "up" (B), "alpha", or a tensor of another kind of adapter by its own name.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError, printable, warn
from common.safetensors_files import check_dtypes, read_header
from lora_files.deltas import Changes, Deltas
from lora_files.kinds import MAGNITUDES, Delta, Difference, delta_of, fits_weight
from lora_files.names import kohya_name

MAX_HEADER = 16 * 2**20  # bytes; a LoRA on every layer of SDXL has 0.4 MB. A million keys would take a minute to read


def read_lora_header(path: Path) -> dict:
    """The header of a LoRA file. Raises UserError if it is not a readable .safetensors file, or too large for a LoRA."""
    with suppress(OSError), path.open("rb") as file:
        if MAX_HEADER < int.from_bytes(file.read(8), "little") < path.stat().st_size:  # a longer one is damaged
            raise UserError(f"{path} is no LoRA: its header alone is above {MAX_HEADER // 2**20} MiB")
    return read_header(path)[1]


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a LoRA file."""
    return read_lora_header(path).get("__metadata__", {})


def tensor_hash(path: Path) -> str:
    """SHA-256 of the bytes of the tensors alone, by which A1111 and others know a LoRA."""
    begin, _ = read_header(path)
    return hashlib.sha256(path.read_bytes()[begin:]).hexdigest()


def trained_on(path: Path) -> str:
    """The --model that a LoRA file of this suite was trained with.

    Raises UserError if the header does not say, or names a model that is not here: a LoRA file must not make us download one.
    """
    try:
        model = json.loads(read_metadata(path).get("sdxl_lora.config", "{}")).get("model")
    except (ValueError, AttributeError):
        model = None
    if not isinstance(model, str):
        raise UserError(f"{path} does not say which model it was trained on: add --model")
    here = Path(model, "model_index.json").is_file() or (model.endswith(".safetensors") and Path(model).is_file())
    if model not in ("demo", "sdxl") and not here:
        raise UserError(f"{path} was trained on {model!r}, which is not here: name the model by --model")
    return model


def training_steps(path: Path) -> tuple[int, int]:
    """The step in the header of a LoRA file and that in its name, the last number that is a word of its own; -1: none.

    The first is the second if the header has none, or is not readable.
    """
    numbers = re.findall(r"(?<![^\W_])(?:step)?(\d+)(?![^\W_])", path.stem)
    in_name = int(numbers[-1]) if numbers else -1
    with suppress(UserError):
        metadata = read_metadata(path)
        for value in (metadata.get("sdxl_lora.step", ""), metadata.get("ss_steps", "")):
            if re.fullmatch(r"\d{1,18}", value):  # int() refuses thousands
                return int(value), in_name
    return in_name, in_name


def newest_lora(path: Path, flag: str = "--lora") -> Path:
    """`path` if it is a file; if it is a folder, the .safetensors file in it with the highest step, of several the last one.

    Warns if another was written later, since copying changes times. Raises UserError if there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        lacking = "no .safetensors file there (train one with train_lora.py)" if path.is_dir() else "no such file or folder"
        raise UserError(f"{flag} {path}: {lacking}")
    written = {file: file.stat().st_mtime_ns for file in files}
    steps = {file: training_steps(file) if len(files) > 1 else (-1, -1) for file in files}
    newest, latest = max(files, key=lambda file: (steps[file], written[file])), max(files, key=written.__getitem__)
    if written[latest] > written[newest]:
        taken, later = (f"{file.name} (step {max(steps[file])})" for file in (newest, latest))
        warn(printable(f"{flag} {path}: took {taken}, although {later} was written later: name the file if you mean that"))
    return newest


def with_strength(lora: str, flag: str = "--lora") -> tuple[Path, float]:
    """'naruto.safetensors:0.8' -> (path, 0.8). Without a number after the last colon the strength is 1.

    Raises UserError if that number is not finite.
    """
    name, _, number = lora.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return Path(lora), 1.0
    if not name or Path(lora).exists():
        return Path(lora), 1.0
    if not math.isfinite(strength):
        raise UserError(f"{flag} {lora}: the strength {number} is not a finite number")
    return Path(name), strength


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{key: tensor} of a LoRA file. Raises UserError, which names the first, if a tensor is not finite or holds no weights."""
    check_dtypes(path, read_lora_header(path), exempt=".alpha")  # which some tools store as an integer
    tensors = load_file(path)
    if wrong := [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        raise UserError(f"{path}: {wrong[0]} is not finite ({len(wrong)} of {len(tensors)} tensors)")
    return tensors


# What the keys of other tools look like.

# Groups: the stem; 'down' or 'A', which is None for the factor B.
A_OR_B_KEY = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](?:(down|A)|up|B)(?:\.default)?\.weight")
COMPONENT_PREFIXES = [  # prefix of a stem -> component, None if the prefix does not say; the first that matches counts
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
LAYOUTS = [  # pattern in a key -> layout; the first that matches counts
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
OTHER_KINDS = {  # pattern in a key -> kind of adapter with tensors of its own; the first that matches counts
    r"\.(dora_scale|lora_magnitude_vector|magnitude)\b": "DoRA",
    r"\.lora_mid\b": "a LoCon with Tucker decomposition",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
}
UNSUPPORTED = {  # likewise, of those that are not read
    r"\.oft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.(on_input|ia3_l)\b": "IA3",
    r"\.set_weight$": "whole weights (set_weight)",
    r"\.reshape_weight$": "a LoRA for weights of another shape (reshape_weight)",
    r"\.boft_": "BOFT",
    r"\.vera_lambda": "VeRA",
    r"\.lora_E\b": "AdaLoRA",
    r"\.lora_[AB]\.(default\.)?bias$": "a LoRA with biases (lora_bias)",
    r"\.lora_[AB]\.\w+\.weight$": "a PEFT adapter with another name than default",
    r"bundle_emb": "a LoRA with embeddings in it",
}
# Part of ComfyUI's training node, or of LyCORIS' full and norm -> parameter that it is added to.
ADDITIONS = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
# Metadata about the bytes or the layout of a file: wrong in a file that is made from it.
NOT_COPIED = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "format")
GENERATIONS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by the channels of the text


def flat(rest: str) -> str:
    """A path inside a component, spelled alike for all layouts: underscores for dots, and the current names of modules."""
    rest = rest.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")
    rest = re.sub(r"(attn\d_to_out)$", r"\1_0", rest)
    rest = re.sub(r"self_attn_to_([qkv])$", r"self_attn_\1_proj", rest)
    return re.sub(r"self_attn_to_out$", "self_attn_out_proj", rest)


def spellings(path: str) -> list[tuple[str | None, str]]:
    """Every (component, flat path) that a file may use for a module; component None for files that do not name components."""
    component, _, rest = path.partition(".")
    if component != "unet":
        return [(component, flat(rest)), (None, flat(rest))]
    sgm = kohya_name(path).removeprefix("lora_unet_")
    return [(named, name) for named in ("unet", None) for name in (flat(rest), sgm)]


def locate(stem: str) -> tuple[str | None, str]:
    """A stem -> (component, None if the stem does not name it; flat path)."""
    prefix, component = next((p, c) for p, c in COMPONENT_PREFIXES if stem.startswith(p))
    rest = stem.removeprefix(prefix)
    return (component, flat(rest)) if component or prefix != "base_model.model." else locate(rest)


def layouts(keys: Iterable[str]) -> list[str]:
    """The names of the layouts in a file, that of most keys first.

    Both kohya layouts name text encoders alike, so "kohya" alone is left out where the U-Net's keys say which of them it is.
    """
    keys = (key for key in keys if not key.endswith(".alpha"))
    found = Counter(next((name for part, name in LAYOUTS if re.search(part, key)), "unknown") for key in keys)
    if any(name.startswith("kohya ") for name in found):
        del found["kohya"]
    return [name for name, _ in found.most_common()]


def group_by_stem(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{stem: {part: tensor}}. Parts: "down", "up", "alpha", those of ADDITIONS, and by their own names those of other kinds.

    A key that is none of these becomes a stem without parts.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, part = key, None
        if match := A_OR_B_KEY.fullmatch(key):
            stem, part = match[1], "down" if match[2] else "up"
        elif key.endswith(".alpha") and tensor.numel() == 1:
            stem, part = key.removesuffix(".alpha"), "alpha"
        elif (ending := key.rpartition(".")[2]) in ADDITIONS:
            stem, part = key.removesuffix(f".{ending}"), ending
        elif match := next(filter(None, (re.search(kind, key) for kind in OTHER_KINDS | UNSUPPORTED)), None):
            stem, part = key[: match.start()] or key, key[match.start() :].removeprefix(".")
            part = re.sub(r"^(lora_m\w+)(\.default)?\.weight$", r"\1", part)
        own = parts.setdefault(stem, {})
        if part in own:  # under two names: a stem of its own, which matches no layer
            own, part = parts.setdefault(key, {}), None
        own |= {part: tensor} if part else {}
    return parts


def adapter_kind(parts: Iterable[str], kinds: dict[str, str] = OTHER_KINDS | UNSUPPORTED) -> str | None:
    """Which of `kinds` of adapters a module with these parts is; None: of none of them, such as LoRA of plain A and B."""
    return next((kind for pattern, kind in kinds.items() for part in parts if re.search(pattern, f".{part}")), None)


@dataclass(frozen=True)
class Contents:
    """What a LoRA file holds, and which layers of a model it is for. Nothing has been refused yet."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]]
    """{stem: {part: tensor}}, from `group_by_stem`."""
    places: dict[str, str]
    """{stem: module path} of the stems that fit a layer; a kind of adapter that is not read fits if its name does."""
    deltas: Deltas
    """Of the stems that are plain A and B and fit. α may be NaN or infinite."""
    others: dict[str, Delta | Difference]
    """By module path: of the stems that are of one of OTHER_KINDS and fit."""
    additions: Deltas
    """By parameter path: what is added to norms and biases, and to whole weights."""
    wrong: dict[str, list[str]]
    """{what is wrong with them: stems}"""


def scan(path: Path, shapes: dict[str, torch.Size], read: Callable[[Path], dict[str, Tensor]] = load_file) -> Contents:
    """Reads a LoRA file, its tensors by `read`, and collects what is wrong with it, for which `read_lora` raises errors;
    `shapes` as there.

    Raises UserError only if the file or its metadata is unreadable.
    """
    metadata = read_metadata(path)
    tensors = read(path)
    parts = group_by_stem(tensors)
    modules: dict[tuple[str | None, str], list[str]] = {}
    for module in dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in shapes):
        for spelling in spellings(module):
            modules.setdefault(spelling, []).append(module)
    default_alpha = scaling_rules(path, metadata)
    places: dict[str, str] = {}
    deltas: Deltas = {}
    others: dict[str, Delta | Difference] = {}
    additions: Deltas = {}
    wrong: dict[str, list[str]] = {}
    for stem, own in parts.items():
        candidates = modules.get(locate(stem), [])
        if not candidates:
            wrong.setdefault("match no layer", []).append(stem)
        elif adapter_kind(own, UNSUPPORTED):
            places[stem] = candidates[0]
        else:
            try:
                add_differences(own, candidates, shapes, additions)
                if own.keys() <= ADDITIONS.keys() | {"alpha"} and own.keys() & ADDITIONS.keys():
                    places[stem] = candidates[0]
                    continue
                layer, delta = fitting(own, candidates, shapes, default_alpha)
                if layer in deltas or layer in others:
                    raise ValueError("occur twice, under two names")
                places[stem] = layer
                if isinstance(delta, tuple) and not adapter_kind(own):
                    deltas[layer] = delta
                else:
                    others[layer] = delta
            except ValueError as problem:
                wrong.setdefault(str(problem), []).append(stem)
    return Contents(path, metadata, tensors, parts, places, deltas, others, additions, wrong)


def fitting(
    own: dict[str, Tensor], modules: list[str], shapes: dict[str, torch.Size], default_alpha: Callable[[str, int | None], float]
) -> tuple[str, Delta | Difference]:
    """(module path, ΔW) of the first of `modules` that the parts of a stem fit. Raises ValueError with what is wrong."""
    parts = {p: t.float() if t.element_size() == 1 else t for p, t in own.items() if p not in {"alpha", *ADDITIONS}}  # float8
    if not all(tensor.is_floating_point() for tensor in parts.values()):
        raise ValueError("are of integers, which are no weights without their scales")
    if any(not tensor.numel() or (tensor.ndim < 2 and part not in MAGNITUDES) for part, tensor in parts.items()):
        raise ValueError("have other shapes than their layer")
    for layer in (module for module in modules if module in shapes):

        def alpha(rank: int | None, layer: str = layer) -> float:
            return float(own["alpha"]) if "alpha" in own and rank else default_alpha(layer, rank)

        try:
            delta = delta_of(parts, alpha, shapes[layer])
        except KeyError as part:
            name = part.args[0]
            raise ValueError("lack A or B" if name in ("down", "up") else f"lack {name}") from None
        except RuntimeError:
            continue
        if fits(*delta[:2], shapes[layer]) if isinstance(delta, tuple) else fits_weight(delta, shapes[layer]):
            return layer, delta
    raise ValueError("have other shapes than their layer")


def add_differences(own: dict[str, Tensor], modules: list[str], shapes: dict[str, torch.Size], additions: Deltas) -> None:
    """Puts the parts of a stem that are added to a parameter of one of `modules` into `additions`. Raises ValueError with what
    is wrong.
    """
    for part in own.keys() & ADDITIONS.keys():
        names = (f"{module}.{ADDITIONS[part]}" for module in modules)
        if (name := next((name for name in names if shapes.get(name) == own[part].shape), None)) is None:
            raise ValueError("have other shapes than their layer")
        if name in additions:
            raise ValueError("occur twice, under two names")
        additions[name] = (own[part].float().reshape(1, -1), torch.ones(1, 1), 1.0)


def read_lora(path: Path, shapes: dict[str, torch.Size]) -> Deltas:
    """Reads a LoRA file of any layout for a model whose `shapes` are {module path: shape of its weight}.

    Layouts: kohya with SGM's or diffusers' block names; diffusers and PEFT, old and new; PEFT's own, with
    `adapter_config.json` in the same folder; ComfyUI's and LyCORIS' prefixes. Linear layers and convolutions. α comes from
    its tensor, else from the metadata, else it is the rank; rsLoRA's factor α/√r is returned as α·√r, to be divided by r.

    Raises UserError, in one line with counts and the first names, if the file is for another model or is no LoRA of A and B,
    if a key belongs to no layer, or if A or B is missing.
    """
    changes = read_changes(path, shapes)
    deltas = {name: delta for name, delta in changes.items() if isinstance(delta, tuple)}
    if other := next((type(delta).__name__ for delta in changes.values() if not isinstance(delta, tuple)), None):
        raise UserError(f"{path} is {other}, and this needs LoRA of plain A and B: scripts/convert_lora.py makes one of it")
    return deltas


def read_changes(path: Path, shapes: dict[str, torch.Size]) -> Changes:
    """Reads a file as `read_lora`, also of LoHa, LoKr and DoRA."""
    contents = scan(path, shapes, read_tensors)
    parts = contents.parts
    if kind := next(filter(None, (adapter_kind(own, UNSUPPORTED) for own in parts.values())), None):
        raise UserError(f"{path} is {kind}, which is not read: merge it into its model by the program that it is from")
    if not any(parts.values()):
        raise UserError(f"{path} is no LoRA: {f'{next(iter(parts))} is of a model' if parts else 'it holds no tensor'}")
    check_generation(path, parts, shapes)
    if contents.wrong:
        problem, stems = next(iter(contents.wrong.items()))
        examples = ", ".join(" ".join([stem, *(str(list(t.shape)) for t in parts[stem].values())]) for stem in stems[:3])
        raise UserError(f"{path} does not fit the model: {len(stems)} of {len(parts)} modules {problem}, first {examples}")
    return contents.deltas | contents.others | contents.additions


def fits(down: Tensor, up: Tensor, shape: torch.Size) -> bool:
    """Whether up·down has the `shape` of a linear or convolution weight: down [r, in, …], up [out, r, …]."""
    if min(down.ndim, up.ndim) < 2 or not len(down):
        return False
    return len(up) == shape[0] and down[0].numel() == shape[1:].numel() and up[0].numel() == len(down)


def check_generation(path: Path, parts: dict[str, dict[str, Tensor]], shapes: dict[str, torch.Size]) -> None:
    """Raises UserError if the LoRA's cross-attention reads text of another width than the model's: it is for another model."""
    ours = {shape[1] for module, shape in shapes.items() if module.endswith("attn2.to_k")}
    text = [own for stem, own in parts.items() if flat(stem).endswith("attn2_to_k")]
    theirs = {own[part].shape[1] for own in text for part in ("down", "hada_w1_b") if part in own and own[part].ndim > 1}
    if ours and theirs and ours.isdisjoint(theirs):
        models = " and ".join(dict.fromkeys(GENERATIONS.get(channels, "another model") for channels in sorted(theirs)))
        found, needed = (" or ".join(map(str, sorted(channels))) for channels in (theirs, ours))
        raise UserError(f"{path} does not fit the model: it is for {models}, whose text has {found} channels, not {needed}")


def scaling_rules(path: Path, metadata: dict[str, str]) -> Callable[[str, int | None], float]:
    """A function (module path, rank) -> α, for modules without an alpha tensor; rank None, if a module does not show it: α/r.

    It follows PEFT's configuration, in the header or in the file `adapter_config.json`; without one α is the rank. Raises
    UserError if the configuration is unreadable, as the function does if a value in it is.
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config_file = path.with_name("adapter_config.json")
        if path.name == "adapter_model.safetensors" and config_file.is_file():  # the names that PEFT gives the two files
            config = {f".{key}": value for key, value in json.loads(config_file.read_text("utf-8")).items()}
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path}: its PEFT configuration is not readable: {error}") from None

    def alpha(module: str, rank: int | None) -> float:
        component, _, rest = module.partition(".")
        name = "lora_alpha" if any(key.endswith(".lora_alpha") for key in config) else "alpha"  # LoHa's and LoKr's
        if f"{component}.{name}" not in config:
            component = ""  # PEFT's own file is of one component and does not name it
        short = rest.removeprefix("text_model.")

        def setting(key: str, patterns: str, default: float) -> float:
            value = config.get(f"{component}.{key}", default)
            for pattern, other in (config.get(f"{component}.{patterns}") or {}).items():  # in PEFT the first match counts
                if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (rest, short, f"text_model.{short}")):
                    value = other
                    break
            if not math.isfinite(float(value)):
                raise ValueError(f"the {key} of {module} is {value}")
            return float(value)

        try:
            r = rank or setting("r", "rank_pattern", 1)
            value = setting(name, "alpha_pattern", r) * (r**0.5 if config.get(f"{component}.use_rslora") else 1)
            return value if rank else value / r
        except (ValueError, TypeError, AttributeError, ArithmeticError, re.error) as error:
            raise UserError(f"{path}: its PEFT configuration is not usable: {error}") from None

    return alpha
