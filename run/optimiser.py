"""The optimiser step: learning rates, gradient clipping, the loss scale of fp16, averages, a limit of the norms."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from lora import Adapter, padded_size
from options.optimiser import OptimiserConfig
from options.training import LoRAConfig, TrainConfig, first_match
from performance.adamw8bit import STATE_BLOCK, pad_state, update_scale
from performance.linear_group import stacked
from performance.optimizers import ELEMENTWISE, averages, make_optimizer, settable, settings_of, try_optimizer
from run.noise_scale import NoiseScale
from run.schedule import draw_schedule, lr_factor, steps_of_share

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class Optimiser:
    """Updates an adapter from its gradient. With AdamW `step` does not wait for the device."""

    def __init__(self, run: TrainConfig, adapter: Adapter, processes: int, dtype: torch.dtype):
        """`run` is resolved, and its length is in steps. The loss is scaled if `dtype` is float16. Raises UserError if the
        optimiser refuses its settings.
        """
        config, lora, kind, images = run.optimiser, run.lora, run.memory.optimizer, run.dataset.bs * run.grad_accum * processes
        self.config, self.kind, self.adapter, self.steps = config, kind, adapter, run.steps
        self.parameters = adapter.parameters(of_matrices=kind not in ELEMENTWISE)
        groups = [{"name": name, "params": found, "lr": config.lr} for name, found in self.parameters.items()]
        self.optimizer = make_optimizer(kind, groups, settings_of(config))
        self.noise_scale = NoiseScale(adapter.grad, images)
        self.of_B = f", of B {lora.lora_plus:g} times as much" if lora.lora_plus else ""
        self.at_their_rates: Callable[[], AbstractContextManager] = nullcontext
        encoders = dict(zip(TEXT_ENCODERS, 2 * config.text_encoder_lr, strict=False))
        self.resting: set[str] = set()
        self.rest({name for name, rate in encoders.items() if not rate})
        if lora.lora_plus or lora.lr_pattern or len(config.text_encoder_lr) > 1:
            self.at_their_rates = PartRates(adapter, lora, encoders)
        self.limits = [NormLimit(adapter, lora.max_norm)] if lora.max_norm else []
        self.ema = adapter.flat.clone() if config.ema else None
        adapter.in_use = self.in_use
        self.scaler = torch.amp.GradScaler(adapter.flat.device.type, enabled=dtype == torch.float16)

    def rest(self, encoders: set[str]) -> None:
        """Trains these text encoders no further: without a gradient no optimiser touches them, whatever else it does at a rate
        of 0.
        """
        if encoders <= self.resting:
            return
        self.resting |= encoders
        self.adapter.freeze(self.resting)
        for name in self.resting_groups:
            for p in self.parameters.get(name, ()):
                p.grad = None

    @property
    def resting_groups(self) -> list[str]:
        return ["text_encoder"] if self.resting.issuperset(TEXT_ENCODERS) else []

    def set_learning_rates(self, step: int) -> None:
        """For `step`, counted from 0; ends the training of the text encoders where it is time for that."""
        if text_encoders_rest(step, self.steps, self.config):
            self.rest(set(TEXT_ENCODERS))
        for group, rate in zip(self.optimizer.param_groups, self.rates(step, self.steps, self.config).values(), strict=True):
            group["lr"] = rate
        self.step_now = step

    def rates(self, step: int, steps: int, config: OptimiserConfig) -> dict[str, float]:
        """{group: its learning rate} at `step` of a run of `steps` with `config`."""
        of_text = 0.0 if text_encoders_rest(step, steps, config) else max(config.text_encoder_lr)
        of_group = {"unet": config.lr or 0.0, "text_encoder": of_text}
        return {name: of_group[name] * lr_factor(step, steps, config) for name in self.adapter.groups}

    def change_of_rates(self, step: int, flags: dict[str, Any]) -> list[str]:
        """After the state of a run with `flags`, {name: value}, was loaded: the learning rates that are not at `step` what they
        would be with those, each as 'the learning rate … goes from … to …'.
        """
        flags = asdict(self.config) | {"steps": self.steps} | flags
        before = OptimiserConfig(**{spec.name: flags[spec.name] for spec in fields(OptimiserConfig)})
        expected, last = self.rates(step, flags["steps"], before), dict(self.learning_rates())
        self.set_learning_rates(step)
        now = dict(self.learning_rates())
        jumps = {name: f"goes from {last[name]:.1e} to {rate:.1e}" for name, rate in now.items() if rate != expected[name]}
        if len(jumps) == len(now) and len(set(jumps.values())) == 1:
            return [f"the learning rate {next(iter(jumps.values()))}"]
        return [f"the learning rate of the {name.replace('_', ' ')} {jump}" for name, jump in jumps.items()]

    def step(self, loss: Tensor) -> Tensor:
        """One update; none if the gradient is not finite. `adapter.grad` is zero afterwards.

        `loss` [], of the step, the same on all ranks. Returns the L2 norm of each group's gradient, [groups] on the device.
        """
        self.scaler.unscale_(self.optimizer)
        self.noise_scale.see()
        norms = self.adapter.clip(self.config.clip)
        # Every optimiser skips the update where `found_inf` is 1. In fp16 the scaler replaces it by its own; otherwise the
        # scaler is disabled, and this one counts.
        self.optimizer.found_inf = (~norms.isfinite()).any().float()  # type: ignore[attr-defined]
        with self.at_their_rates():
            self.scaler.step(self.optimizer)
        for limit in self.limits:
            limit()
        update_scale(self.scaler, loss)
        self.adapter.update_layers()
        if self.ema is not None:
            warmed_up = (1 + self.step_now) / (10 + self.step_now)  # as TensorFlow's: the beginning is forgotten soon
            self.ema.lerp_(self.adapter.flat, 1 - min(self.config.ema or 0, warmed_up))
        return norms

    def in_use(self) -> dict[str, Tensor | None]:
        """{what follows the name of a file: the weights to save and to measure, of the shape of `flat`}; None: those that are
        trained. Those of "" are to be drawn, too.
        """
        ema: dict[str, Tensor | None] = {} if self.ema is None else {"_ema": self.ema}
        return ema | {"": self.averaged() if averages(self.optimizer) else None}

    def averaged(self) -> Tensor:
        """What a schedule-free optimiser says are the weights to use. What it trains keeps its bits."""
        before = self.adapter.flat.clone()
        self.optimizer.eval()  # type: ignore[attr-defined]
        found = self.adapter.flat.clone()
        self.optimizer.train()  # type: ignore[attr-defined]
        self.adapter.flat.copy_(before)
        return found

    def picture(self) -> np.ndarray:
        """The schedule of the learning rate, [H, W, 3] uint8."""
        return draw_schedule(self.steps, self.config, f"learning rate / {self.config.lr:g}, over the steps")

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before its backward pass: 1 but in fp16. The host waits for the device."""
        return self.scaler.get_scale()

    def learning_rates(self) -> Iterator[tuple[str, float]]:
        """(name of the group, its rate now)."""
        return ((group["name"], group["lr"]) for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        ema = {} if self.ema is None else {"ema": self.ema}
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()} | ema

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`state`: tensors on the CPU. One of an older commit, whose tensors were not padded, is padded in place."""
        if self.kind in ("adamw", "adamw8bit"):
            groups = self.adapter.filled().split([len(p) for p in self.adapter.groups.values()])
            for index, filled in enumerate(groups):
                pad_state(state["optimizer"]["state"].get(index, {}), filled)
        named = settable(type(self.optimizer)).keys() - {"lr"}  # `change_of_rates` tells from what that goes
        own = [{name: group[name] for name in named if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group |= settings  # those of this command, as far as the group has no state that is called alike
        if self.ema is not None:
            self.ema.copy_(state.get("ema", self.adapter.flat))
        if state["scaler"]:  # empty if the run so far was not in fp16
            self.scaler.load_state_dict(state["scaler"])

    def __str__(self) -> str:
        of_text = " and ".join(f"{rate:g}" for rate in self.config.text_encoder_lr)
        until = f" until {self.config.text_encoder_until:.0%} of the run" if self.config.text_encoder_until < 1 else ""
        text = f", text encoders {of_text}{until}" if "text_encoder" in self.adapter.groups else ""
        return f"{self.kind}, learning rate {self.config.lr:g}{text}{self.of_B}, {self.config.lr_schedule}"


def text_encoders_rest(step: int, steps: int, config: OptimiserConfig) -> bool:
    """Whether --text-encoder-until is over; 1 is without end, also for a run that is lengthened."""
    return config.text_encoder_until < 1 and step >= steps_of_share(config.text_encoder_until, steps)


def check_optimiser(run: TrainConfig) -> TrainConfig:
    """`run`, which is resolved. Raises UserError, before the model is read, if its optimiser cannot make a step with its
    settings, or if that step cannot be changed afterwards.
    """
    config, name = run.optimiser, run.memory.optimizer
    rates = [config.lr or 0.0, *(rate for rate in [max(config.text_encoder_lr)] if rate)]
    optimizer = try_optimizer(name, rates, settings_of(config))
    if averages(optimizer) and (run.changes_steps or config.ema):
        ways = "without --ema, --lora-plus, --lr-pattern and --max-norm, and with one --text-encoder-lr"
        raise UserError(f"--optimizer {name} averages by itself: {ways}")
    return run


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
    """Learning rates of single layers (--lr-pattern), of either text encoder, and of every B (--lora-plus; with DoRA of the
    magnitudes, too, as PEFT has it), as multiples of those of their group.

    AdamW's change is proportional to its learning rate, weight decay included: inside this context every weight is changed by
    the rate of its group, and at its end it is moved along the same line by its own. So the order of the buffer, the states and
    the weights with a multiple of 1 are bit for bit those of a run without. Costs a copy of the weights meanwhile.
    """

    def __init__(self, adapter: Adapter, config: LoRAConfig, of_encoders: dict[str, float]):
        """`of_encoders`: {"text_encoder": its rate, …}; that of the group is the larger one."""
        rates = {name: first_match("--lr-pattern", config.lr_pattern, name, 1.0) for name in adapter.deltas}
        largest = max(of_encoders.values(), default=0) or 1.0
        for name in rates:
            rates[name] *= of_encoders.get(name.partition(".")[0], largest) / largest
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
