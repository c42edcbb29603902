"""Turns settings of kohya's sd-scripts (TOML) or its GUI (JSON) into a file for train_lora.py's --config.

    python scripts/from_kohya.py config.toml dataset.toml --out run.toml
    python scripts/from_kohya.py gui.json --out run.toml

Every key is carried over, or named in the file with what is done here instead, or with why it has no effect here.
"""

import json
import math
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, one_line_errors, printable
from common.files import check_writable, write_atomically
from common.options import flag_of, within
from common.text import read_text
from options.command import all_fields, as_toml, atoms, parse_arguments, parse_command
from options.foreign import DIFFERENT, NO_EFFECT, SAME
from options.forms import numbers_of
from options.training import DiffusionConfig, TrainCommand, TrainConfig


@dataclass(frozen=True)
class KohyaConfig:
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The settings: TOML of sd-scripts, its dataset file too, or JSON of the GUI. A later file wins."""
    out: Path
    """The file to write."""


FIELDS = {spec.name: spec for spec in all_fields(TrainConfig)}
VALUES: dict[str, dict[str, Any]] = {  # option here: {their value: the value here}; another value has no counterpart
    "optimizer": {
        "AdamW8bit": "adamw8bit",
        "AdamW": "adamw",
        "True": "adamw8bit",
        "False": "adamw",
        "Lion8bit": "lion8bit",
        "Prodigy": "prodigy",
        "AdamWScheduleFree": "schedulefree",
        "CAME": "came_pytorch.CAME",
        "Lion": "lion_pytorch.Lion",
    },
    "lr_schedule": {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"},
    "precision": {"fp16": "fp16", "bf16": "bf16", "no": "fp32"},
    "save_dtype": {"fp16": "fp16", "bf16": "bf16", "float": "fp32"},
    "checkpointing": {"True": "auto", "False": "auto"},  # the plan decides
    "base_precision": {"True": "int8", "False": "auto"},
    "no_train_text_encoder": {"True": False, "False": True},
}
ZERO_IS_OFF = ("input_perturbation", "save_every", "sample_every", "keep", "text_encoder_lr", "steps", "epochs", "lora_plus",
               "max_norm", "conv_rank", "conv_alpha", "rank_dropout")  # fmt: skip
OBJECTIVE = {  # option here: their keys that it replaces
    "timesteps": ("min_timestep", "max_timestep"), "loss": ("loss_type", "huber_c", "huber_schedule"),
    "weighting": ("min_snr_gamma", "debiased_estimation_loss"),
    "noise": ("noise_offset", "multires_noise_iterations", "multires_noise_discount"),
}  # fmt: skip
FOLDERS = ("data", "prior_data")  # each of their keys adds one
LAST = ("unet_lr", "epoch", "save_every_n_steps")  # they win over learning_rate, lose to steps, win over epochs
THEIR_DEFAULTS = {"rank": {"alpha": 1.0, "bs": 1}, "conv_rank": {"conv_alpha": 1.0}}  # {option: of others, beside it}
NEEDS = {"keep_tags": ("shuffle_tags", False), "text_encoder_lr": ("train_text_encoder", True),
         "conv_alpha": ("conv_rank", None), "prior_weight": ("prior_data", None)}  # fmt: skip  # (another, its default)


def settings(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) of all tables in it, one after the other; additional parameters and network_args as if they were keys."""
    for key, value in table.items():
        if key == "image_dir" and table.get("num_repeats", 1) != 1:  # of this folder
            value = f"{value}:x{table['num_repeats']}"
        if table.get("is_reg"):
            key = {"image_dir": "reg_data_dir", "class_tokens": "class_prompt"}.get(key, key)
        inner = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
        for item in inner:
            yield from settings(item)
        if key == "network_args":
            for pair in value if isinstance(value, list) else shlex.split(str(value)):
                name, _, text = str(pair).partition("=")
                yield name, text
        elif not inner:
            yield key, value
        if key == "additional_parameters":
            for flag, following in pairwise([*shlex.split(str(value)), "--"]):
                name, equals, inline = flag.partition("=")
                if flag.startswith("--"):
                    yield name[2:], inline if equals else "True" if following.startswith("--") else following


def convert(option: str, value: Any) -> Any:
    """The value here. Raises ValueError, KeyError or TypeError if there is none."""
    if option in VALUES:
        return VALUES[option][str(value).capitalize() if str(value) in ("true", "false") else str(value)]
    if option == "resolution":  # 1024, "1024", "1024,1024" or [1024, 1024]: the side of a square of that area
        sides = [int(side) for side in (value if isinstance(value, list) else str(value).split(","))]
        return math.isqrt(sides[0] * sides[-1]) // 8 * 8
    if option == "optimizer_args":  # as a list of name=value, or a text of them
        return value if isinstance(value, list) else shlex.split(str(value))
    if option == "save_every":  # a number of steps, or of epochs as `translate` writes it
        return int(value) if str(value).isdecimal() else value
    kinds = atoms(FIELDS[option].type)
    (kind,) = kinds - {tuple}
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    converted = [kind(one) for one in (value if isinstance(value, list) and tuple in kinds else [value])]
    bounds = {name: bound for name, bound in FIELDS[option].metadata["bounds"].items() if bound is not None}
    for number in converted:
        if (bounds and not within(number, **bounds)) or (kind is int and number != float(value)):
            raise ValueError
    return converted if tuple in kinds else converted[0]


def settle_optimiser(options: dict[str, Any], notes: dict[str, str], theirs: dict[str, Any]) -> None:
    """Settings of the optimiser that have a flag of their own here; restarts of the schedule; what trains the text encoders."""
    kept = []
    for pair in options.pop("optimizer_args", []):
        name, _, text = str(pair).partition("=")
        values = numbers_of(text.strip("()[] "))
        if name in ("betas", "eps", "weight_decay") and values and (name == "betas" or len(values) == 1):
            options[name] = list(values) if name == "betas" else values[0]
        else:
            kept.append(pair)
    options |= {"optimizer_args": kept} if kept else {}
    if theirs.get("lr_scheduler") == "cosine_with_restarts":
        cycles = numbers_of(str(theirs.get("lr_scheduler_num_cycles"))) or (1.0,)
        options["lr_schedule"] = f"cosine-restarts:{cycles[0]:g}"
        for key in ("lr_scheduler", "lr_scheduler_num_cycles"):
            notes.pop(key, None)
    if "lr" in options and options.get("train_text_encoder", True):  # the default here is less than --lr
        options.setdefault("text_encoder_lr", [options["lr"]])


def translate(pairs: list[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """({option here: value}, {their key: what is to be said of it}) of (their key, value)."""
    options: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for key, value in sorted(pairs, key=lambda pair: pair[0] in LAST):
        option = SAME.get(key)
        if key == "save_every_n_epochs" and str(value).isdecimal() and value:
            value = f"{value}epochs"
        if value in ("", "None", None, []):
            notes[key] = "not set"
        elif option is None:
            notes[key] = f"{value!r}: {DIFFERENT.get(key) or NO_EFFECT.get(key) or 'not known here: look whether you need it'}"
        elif option in ZERO_IS_OFF and str(value) in ("0", "0.0"):
            notes[key] = "off"
            options |= {"train_text_encoder": False} if option == "text_encoder_lr" else {}
        elif key == "epoch" and "steps" in options:
            notes[key] = f"{value!r}: the number of steps is given"
        else:
            try:
                converted = convert(option, value)
            except (ValueError, KeyError, TypeError):
                notes[key] = f"{value!r}: not here, so {flag_of(option)} keeps its default"
            else:
                if key == "unet_lr" and "lr" in options:  # then learning_rate is for the text encoders
                    options.setdefault("text_encoder_lr", [options["lr"]])
                options[option.removeprefix("no_")] = options.get(option, []) + converted if option in FOLDERS else converted
    settle(options, notes)
    settle_optimiser(options, notes, dict(pairs))
    add_objective(options, notes, dict(pairs))
    return options, notes


def add_objective(options: dict[str, Any], notes: dict[str, str], theirs: dict[str, Any]) -> None:
    """Options that say in one word what kohya's scripts say with several keys; of those that exclude each other the first."""

    def number(key: str, default: float = 0.0) -> float:
        with suppress(ValueError, TypeError):
            return float(theirs.get(key) or default)
        return default

    found: dict[str, Any] = {}
    passed_over: set[str] = set()  # there they have an effect beside the other: they stay in the notes
    low, high = number("min_timestep"), number("max_timestep", 1000)
    if (low, high) != (0, 1000):
        found["timesteps"] = f"{low:g}-{high:g}"
    kind = {"snr": "huber-snr", "constant": "huber"}.get(str(theirs.get("huber_schedule") or "snr"))
    if theirs.get("loss_type") == "huber" and kind:
        found["loss"] = f"{kind}:{number('huber_c', 0.1):g}"
    elif theirs.get("loss_type") in ("l1", "l2"):
        found["loss"] = {"l1": "l1", "l2": "mse"}[theirs["loss_type"]]
    debiased = str(theirs.get("debiased_estimation_loss")).lower() == "true"
    if gamma := number("min_snr_gamma"):
        found["weighting"] = f"min-snr:{gamma:g}"
        passed_over |= {"debiased_estimation_loss"} if debiased else set()
    elif debiased:
        found["weighting"] = "debiased"
    offset = number("noise_offset")
    if levels := number("multires_noise_iterations"):
        found["noise"] = f"pyramid:{levels:g},{number('multires_noise_discount', 0.3):g}"
        passed_over |= {"noise_offset"} if offset else set()
    elif offset:
        found["noise"] = f"offset:{offset:g}"
    for option, value in found.items():
        with suppress(UserError):  # then its keys stay in the notes
            options[option] = getattr(DiffusionConfig(**{option: value}), option)
            for key in set(OBJECTIVE[option]) - passed_over:
                notes.pop(key, None)


def settle(options: dict[str, Any], notes: dict[str, str]) -> None:
    """What depends on other settings, and what was left to kohya's own defaults."""
    for option, defaults in THEIR_DEFAULTS.items():
        if option in options:
            options |= {name: value for name, value in defaults.items() if name not in options}
    if "lycoris" in f"{notes.get('LoRA_type')} {notes.get('network_module')}".lower():
        drop(options, notes, ("rank", "alpha", "conv_rank", "conv_alpha"), "of another kind of layer: choose it for LoRA")
    if any(notes.get(key, "not set") != "not set" for key in ("optimizer", "optimizer_type")):
        drop(options, notes, ("lr", "text_encoder_lr"), "of another optimizer: choose it for AdamW")
        drop(options, notes, ("optimizer_args", "eps", "weight_decay"), "of another optimizer")
    for option, (other, default) in NEEDS.items():
        if not options.get(other, default):
            drop(options, notes, (option,), f"does nothing here without {flag_of(other)}")


def drop(options: dict[str, Any], notes: dict[str, str], names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if name in options:
            notes[flag_of(name)] = f"{options.pop(name)!r}: {reason}"


def read_settings(file: Path) -> list[tuple[str, Any]]:
    """Raises UserError."""
    try:
        text = read_text(file.read_bytes())
        table = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
        if not isinstance(table, dict):
            raise ValueError("it holds no settings by name")
        return list(settings(table))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is neither TOML of sd-scripts nor JSON of its GUI: {error}") from None


def main(config: KohyaConfig) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} is there already: remove it or choose another name")
    check_writable("the folder of --out", config.out.parent)
    options, notes = translate([pair for file in config.files for pair in read_settings(file)])
    lines = [f"# from {', '.join(map(str, config.files))}"] + [f"{name} = {as_toml(value)}" for name, value in options.items()]
    lines += ["", "# not carried over", *(f"# {printable(key)}: {printable(note)}" for key, note in notes.items())]

    def check(written: Path) -> None:
        try:
            parse_arguments(TrainCommand, ["--config", str(written)])
        except UserError as error:
            raise UserError(str(error).replace(str(written), "from these settings")) from None

    write_atomically(config.out, ("\n".join(lines) + "\n").encode(), check)
    print(f"{config.out}: {len(options)} options; {len(notes)} keys that are not carried over are listed at its end")


if __name__ == "__main__":
    with one_line_errors("from_kohya.py"):
        main(parse_command("from_kohya.py", KohyaConfig, __doc__))
