"""The optimiser step: learning rates, gradient clipping, the loss scale of fp16, a limit of the norms."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from lora import Adapter, padded_size
from options.training import LoRAConfig, OptimiserConfig, first_match
from performance.adamw8bit import STATE_BLOCK, make_optimizer, pad_state, update_scale
from performance.linear_group import stacked

MAX_GRAD_NORM = 1.0


def lr_factor(step: int, steps: int, config: OptimiserConfig) -> float:
    """What the learning rates are multiplied by at `step` of `steps`, counted from 0."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}[config.lr_schedule]


class Optimiser:
    """Updates an adapter from its gradient. `step` does not wait for the device."""

    def __init__(
        self, config: OptimiserConfig, lora: LoRAConfig, kind: str, adapter: Adapter, steps: int, dtype: torch.dtype
    ):  # fmt: skip
        """`config` is resolved; `lora`: what `adapter` was made by; `kind`: --optimizer; `steps`: of the run. The loss is
        scaled if `dtype` is float16.
        """
        self.config, self.kind, self.adapter, self.steps = config, kind, adapter, steps
        self.rates: dict[str, Any] = {"unet": config.lr, "text_encoder": config.text_encoder_lr}
        self.optimizer = make_optimizer(kind, [{"name": name, "params": [p]} for name, p in adapter.groups.items()])
        self.of_B = f", of B {lora.lora_plus:g} times as much" if lora.lora_plus else ""
        self.at_their_rates: Callable[[], AbstractContextManager] = nullcontext
        if lora.lora_plus or lora.lr_pattern:
            self.at_their_rates = PartRates(adapter, lora)
        self.limits = [NormLimit(adapter, lora.max_norm)] if lora.max_norm else []
        self.scaler = torch.amp.GradScaler(adapter.flat.device.type, enabled=dtype == torch.float16)

    def set_learning_rates(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * lr_factor(step, self.steps, self.config)

    def change_of_rates(self, step: int, flags: dict[str, Any]) -> list[str]:
        """After the state of a run with `flags`, {name: value}, was loaded: the learning rates that are not at `step` what they
        would be with those, each as 'the learning rate … goes from … to …'.
        """
        flags = asdict(self.config) | {"steps": self.steps} | flags
        before = OptimiserConfig(**{spec.name: flags[spec.name] for spec in fields(OptimiserConfig)})
        expected: dict[str, Any] = {"unet": before.lr, "text_encoder": before.text_encoder_lr}
        last = dict(self.learning_rates())
        self.set_learning_rates(step)
        now = dict(self.learning_rates())
        jumps = {
            name: f"goes from {last[name]:.1e} to {rate:.1e}" for name, rate in now.items()
            if rate != expected[name] * lr_factor(step, flags["steps"], before)
        }  # fmt: skip
        if len(jumps) == len(now) and len(set(jumps.values())) == 1:
            return [f"the learning rate {next(iter(jumps.values()))}"]
        return [f"the learning rate of the {name.replace('_', ' ')} {jump}" for name, jump in jumps.items()]

    def step(self, loss: Tensor) -> Tensor:
        """One update; none, decided on the device, if the gradient is not finite. `adapter.grad` is zero afterwards.

        `loss` [], of the step, the same on all ranks. Returns the L2 norm of each group's gradient, [groups] on the device.
        """
        self.scaler.unscale_(self.optimizer)
        norms = self.adapter.clip(MAX_GRAD_NORM)
        # Both optimisers skip the update where `found_inf` is 1. In fp16 the scaler replaces it by its own; otherwise the
        # scaler is disabled, and this one counts.
        self.optimizer.found_inf = (~norms.isfinite()).any().float()  # type: ignore[attr-defined]
        with self.at_their_rates():
            self.scaler.step(self.optimizer)
        for limit in self.limits:
            limit()
        update_scale(self.scaler, loss)
        self.adapter.update_layers()
        return norms

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before its backward pass: 1 but in fp16. The host waits for the device."""
        return self.scaler.get_scale()

    def learning_rates(self) -> Iterator[tuple[str, float]]:
        """(name of the group, its rate now)."""
        return ((group["name"], group["lr"]) for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`state`: tensors on the CPU. One of an older commit, whose tensors were not padded, is padded in place."""
        groups = self.adapter.filled().split([len(p) for p in self.adapter.groups.values()])
        for index, filled in enumerate(groups):
            pad_state(state["optimizer"]["state"].get(index, {}), filled)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run so far was not in fp16
            self.scaler.load_state_dict(state["scaler"])

    def __str__(self) -> str:
        text = f", text encoders {self.rates['text_encoder']:g}" if "text_encoder" in self.adapter.groups else ""
        return f"{self.kind}, learning rate {self.rates['unet']:g}{text}{self.of_B}"


# What may be done to a step beside AdamW: on the device, to the whole buffer at once, without a state.


def by_block(adapter: Adapter, value: Callable[[str, int], float], dtype: torch.dtype) -> Tensor:
    """`value` (path of a layer; 0 for A, 1 for B, 2 for DoRA's magnitude) of each STATE_BLOCK of `adapter.flat`, none of which
    holds two of them, [blocks, 1].
    """
    parts = [(name, n, part) for name, own in adapter.masters.items() for n, part in enumerate(own)]
    counts = torch.tensor([padded_size(part.numel()) // STATE_BLOCK for *_, part in parts])
    values = torch.tensor([value(name, n) for name, n, _ in parts], dtype=dtype)
    return values.repeat_interleave(counts)[:, None].to(adapter.flat.device)


class PartRates:
    """Learning rates of single layers (--lr-pattern), and of every B (--lora-plus; with DoRA of the magnitudes, too, as PEFT
    has it), as multiples of those of their group.

    AdamW's change is proportional to its learning rate, weight decay included: inside this context every weight is changed by
    the rate of its group, and at its end it is moved along the same line by its own. So the order of the buffer, the states and
    the weights with a multiple of 1 are bit for bit those of a run without. Costs a copy of the weights meanwhile.
    """

    def __init__(self, adapter: Adapter, config: LoRAConfig):
        rates = {name: first_match("--lr-pattern", config.lr_pattern, name, 1.0) for name in adapter.deltas}
        of_part = [1.0, config.lora_plus or 1.0, config.lora_plus or 1.0]
        self.blocks = adapter.flat.view(-1, STATE_BLOCK)
        self.multiples = by_block(adapter, lambda name, n: rates[name] * of_part[n], torch.float32)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = self.blocks.clone()
        yield
        torch.lerp(before, self.blocks, self.multiples, out=self.blocks)


class NormLimit:
    """After a step: every ΔW is at most so large (--max-norm; Frobenius norm). B and A shrink alike, as kohya's
    scale_weight_norms; a layer within the limit keeps its bits.

    ‖B·A‖² is the sum of BᵀB ∘ AAᵀ, r × r each, for all layers of a shape at once. Costs a copy of those meanwhile.
    """

    def __init__(self, adapter: Adapter, largest: float):
        shapes = defaultdict(list)
        for name, (A, B, alpha) in adapter.deltas.items():
            shapes[A.shape, B.shape, alpha].append(name)
        self.largest, self.blocks = largest, adapter.flat.view(-1, STATE_BLOCK)
        self.alike = []
        for ((rank, *_), _, alpha), names in shapes.items():
            factors = zip(*(adapter.deltas[name][:2] for name in names), strict=True)
            As, Bs = ([factor.flatten(1) for factor in of_layers] for of_layers in factors)
            self.alike.append((abs(alpha) / rank, As, Bs))
        numbers = {name: i for i, name in enumerate(name for names in shapes.values() for name in names)}
        self.layers = by_block(adapter, lambda name, _: numbers[name], torch.int64)

    def norms(self) -> Tensor:
        """‖ΔW‖ of every layer, [layers] float32 on the device, in the order of `alike`."""
        found = []
        for scale, As, Bs in self.alike:
            A, B = stacked(As), stacked(Bs)
            square = ((B.mT @ B) * (A @ A.mT)).sum((1, 2))
            found.append(scale * square.clamp(min=0).sqrt())
        return torch.cat(found)

    @torch.no_grad()
    def __call__(self) -> None:
        shrink = (self.largest / self.norms()).clamp(max=1).sqrt()
        self.blocks.mul_(shrink[self.layers])
