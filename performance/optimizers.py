"""Optimisers by name, or by the path of their class; and what they take in memory."""

import ast
import inspect
import pydoc
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from performance.adamw8bit import adamw8bit

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",  # Loshchilov and Hutter 2017, arXiv:1711.05101
    "lion8bit": "bitsandbytes.optim.Lion8bit",  # Chen et al. 2023, arXiv:2302.06675
    "adafactor": "torch.optim.Adafactor",  # Shazeer and Stern 2018, arXiv:1804.04235
    "prodigy": "prodigyopt.Prodigy",  # Mishchenko and Defazio 2023, arXiv:2306.06101
    "schedulefree": "schedulefree.AdamWScheduleFree",  # Defazio et al. 2024, arXiv:2405.15682
}
OUR_SETTINGS: dict[str, dict[str, Any]] = {  # where the recipe, or its guide for LoRA, is not the default
    "adamw8bit": {"weight_decay": 0.01, "min_8bit_size": 0}, "lion8bit": {"min_8bit_size": 0},
    "adamw": {"weight_decay": 0.01, "fused": True},
    "adafactor": {"eps": (None, 1.0)},  # or else a step is as small as B, which begins at 0
    "prodigy": {"use_bias_correction": True, "safeguard_warmup": True},
}  # fmt: skip
ELEMENTWISE = {"adamw8bit", "adamw", "lion8bit", "prodigy", "schedulefree"}  # one flat parameter is to them as many matrices


def read_settings_of_optimizer(pairs: Iterable[str]) -> dict[str, Any]:
    """('name=value', …) -> {name: value}: a number, True, False, None, a tuple where there are commas, or else the text."""
    settings = {}
    for name, _, text in (pair.partition("=") for pair in pairs):
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings


def make_optimizer(name: str, groups: list[dict], settings: dict[str, Any] | None = None) -> torch.optim.Optimizer:
    """An optimiser of these parameter groups, by one of options.optimiser.NAMES or the path of a class.

    It follows GradScaler's protocol for fused optimisers. An ordinary optimiser's step is skipped by the host: GradScaler reads
    whether a gradient overflowed with .item(), for which the host waits in every step. One with `_step_supports_amp_scaling =
    True` is always called, and does what the flag says by itself: it finds it in its attribute `found_inf`, a float32 scalar
    on the device that is 0, or above 0 if the step must change nothing. GradScaler sets this attribute before `step()` and
    deletes it afterwards; if the scaler is disabled, the caller may set it. adamw8bit and adamw do so on the device; of others
    nobody knows what a step changes, so for them the host waits.

    Raises UserError if there is no such class, or if it does not take the settings or the parameters.
    """
    kind = found_class(name)
    skips = name == "adamw8bit" or (name == "adamw" and not groups[0]["params"][0].is_mps)  # MPS's kernel ignores the flag
    chosen = {"lr": groups[0]["lr"]} | OUR_SETTINGS.get(name, {}) | (settings or {})
    try:
        optimizer: Any = (kind if skips else skipping(kind))(groups, **chosen)
    except (TypeError, ValueError, AssertionError) as error:
        _, *known = inspect.signature(kind).parameters
        raise UserError(f"--optimizer {name}: {error}; its settings are {', '.join(known)}") from None
    if averages(optimizer):
        optimizer.train()
    return optimizer


def found_class(name: str) -> type[torch.optim.Optimizer]:
    if name == "adamw8bit":
        return adamw8bit()
    try:
        kind = pydoc.locate(OPTIMIZERS.get(name, name))
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"--optimizer {name} cannot be imported: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"--optimizer {name} is no optimiser of PyTorch's kind")
    return kind


def skipping(kind: Any) -> Any:
    """The same optimiser, whose step changes nothing where `found_inf` is above 0. The host waits for that."""

    class Skipping(kind):
        _step_supports_amp_scaling = True

        def step(self, closure: None = None) -> None:
            flags = {name: self.__dict__.pop(name, None) for name in ("found_inf", "grad_scale")}  # some refuse to see them
            if not flags["found_inf"].item():
                super().step()
            self.__dict__ |= flags

    Skipping.__name__ = kind.__name__
    return Skipping


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what it trains are not the weights to use: they are there between `eval()` and `train()` (schedule-free)."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


@cache
def state_bytes(name: str) -> float:
    """Bytes of state per trained value, counted after a step of a small matrix on the CPU."""
    p = torch.nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones_like(p)
    optimizer = make_optimizer(name, [{"params": [p], "lr": 1.0}])
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    state = (value for value in optimizer.state[p].values() if isinstance(value, Tensor) and value.numel() > 256)
    return sum(value.nbytes for value in state) / p.numel()


def bytes_per_trained(optimizer: str, dtype: torch.dtype, copied: bool = False) -> float:
    """Bytes of memory per trained parameter, for everything but activations. `dtype`: of the base and the activations;
    `copied`: a step copies the weights.
    """
    parameter, gradient = 4, 4  # float32
    low_precision = dtype.itemsize  # the copy that the layers compute with, see lora.Adapter
    if optimizer == "adamw8bit":
        states: float = 2 + 10  # 10: while it steps, 6 for the backups and 4 for a selected result
    elif optimizer == "adamw":
        states = 8
    else:
        states = state_bytes(optimizer) + 8  # 8: two float32 intermediate results of a step
    return parameter + gradient + low_precision + states + (parameter if copied else 0)
