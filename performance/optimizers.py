"""Optimisers by name, or by the path of their class; and what they take in memory."""

import ast
import inspect
import pydoc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from options.optimiser import OptimiserConfig
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


def settings_of(config: OptimiserConfig) -> dict[str, Any]:
    """{name: value} that the user gives an optimiser. A value of --optimizer-args is a number, True, False, None, a tuple where
    there are commas, or else the text.
    """
    given = {"betas": config.betas or None, "eps": config.eps, "weight_decay": config.weight_decay}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, _, text in (pair.partition("=") for pair in config.optimizer_args):
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
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
    chosen = {"lr": groups[0]["lr"]} | OUR_SETTINGS.get(name, {}) | (settings or {})
    fused = name == "adamw" and chosen["fused"] is True and not groups[0]["params"][0].is_mps  # MPS's kernel ignores the flag
    check_settings(name, kind, chosen)
    try:
        optimizer: Any = (kind if name == "adamw8bit" or fused else skipping(kind))(groups, **chosen)
    except Exception as error:  # whatever it is that a class of anybody's raises
        raise UserError(f"--optimizer {name}: {error}; its settings are {', '.join(settable(kind))}") from None
    if averages(optimizer):
        optimizer.train()
    return optimizer


def settable(kind: type[torch.optim.Optimizer]) -> dict[str, inspect.Parameter]:
    """{name: parameter} of what its constructor takes beside the weights."""
    _, *known = inspect.signature(kind).parameters.items()
    return dict(known)


def check_settings(name: str, kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    """Raises UserError for a value that is of another kind than its default, as most classes do not look at theirs."""
    for setting, parameter in settable(kind).items():
        value, usual = settings.get(setting, parameter.default), parameter.default
        if isinstance(usual, tuple) and not (isinstance(value, tuple) and len(value) == len(usual)):
            raise UserError(f"--optimizer {name}: its {setting} are {len(usual)} values, as {usual}, not {value}")
        if isinstance(usual, bool) and not isinstance(value, bool):
            raise UserError(f"--optimizer {name}: {setting} is True or False, not {value}")
        if isinstance(usual, (int, float)) and isinstance(value, str):
            raise UserError(f"--optimizer {name}: {setting} is a number, not {value}")


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


def try_optimizer(name: str, rates: Iterable[float], settings: dict[str, Any] | None = None) -> torch.optim.Optimizer:
    """After its first step on the CPU, with a group for each of the `rates`: A, whose gradient is 0, and B, which is 0, as at
    the beginning of training. Raises UserError if it cannot make that step.
    """
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.zeros(64, 64))], "lr": r} for r in rates
    ]
    for group in groups:
        A, B = group["params"]
        A.grad, B.grad = torch.zeros_like(A), torch.ones_like(B)
    optimizer = make_optimizer(name, groups, settings)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    try:
        optimizer.step()
        if averages(optimizer):
            optimizer.eval()  # type: ignore[attr-defined]
    except Exception as error:
        raise UserError(f"--optimizer {name} cannot make a step: {type(error).__name__}: {error}") from None
    if not all(p.isfinite().all() for group in groups for p in group["params"]):
        raise UserError(f"--optimizer {name}: with these settings its first step makes weights that are no numbers")
    return optimizer


def state_bytes(name: str, settings: dict[str, Any] | None = None) -> float:
    """Bytes of state per trained value: of A or B, of which more is kept. Some classes keep less of B, which is 0."""
    state = try_optimizer(name, [1e-4], settings).state
    large = {p: [t for t in own.values() if isinstance(t, Tensor) and t.numel() > 256] for p, own in state.items()}
    return max((sum(t.nbytes for t in own) / p.numel() for p, own in large.items()), default=0)


def bytes_per_trained(optimizer: str, dtype: torch.dtype, copies: int = 0, settings: dict[str, Any] | None = None) -> float:
    """Bytes of memory per trained parameter, for everything but activations. `dtype`: of the base and the activations;
    `copies` of the weights: those that a step makes, and averages.
    """
    parameter, gradient = 4, 4  # float32
    low_precision = dtype.itemsize  # the copy that the layers compute with, see lora.Adapter
    if optimizer == "adamw8bit":
        states: float = 2 + 10  # 10: while it steps, 6 for the backups and 4 for a selected result
    elif optimizer == "adamw":
        states = state_bytes(optimizer, settings)
    else:
        states = state_bytes(optimizer, settings) + 8  # 8: two float32 intermediate results of a step
    return parameter + gradient + low_precision + states + copies * parameter
