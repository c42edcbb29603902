"""The denoising loss in the course of a run, on pictures that were kept out of it and on as many that were not."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.progress import tqdm
from data import Stream
from dataset.sources import Source
from evaluation.record import described, rounded
from evaluation.validation import BANDS, TRAINED, Losses, Probe, losses_of, make_probes, quiet_stream, unweighted
from evaluation.verdict import figures, loss_of_images, measurements_since_best
from lora import Adapter
from memory import note_if_out_of_memory, temporarily_on
from options.training import TrainConfig
from performance.memory_plan import Plan
from run.held_out import HeldOut
from run.ranks import Ranks
from run.setup import TrainingModel, check_together
from run.stop import Upcoming

FEWEST = 3  # timesteps of an image, unless there are too few images for what is affordable
UNASKED, ASKED = 0.03, 0.15  # share of a run that may be spent without --validate, and with it
TRAINING = 3  # forward passes that a step takes for an image


class Validation:
    """Measures at fixed noise and timesteps, base and LoRA alike. The ranks share the images, and each is measured by one of
    them, so that their number changes nothing. What is measured goes into `record`, which rank 0 keeps.
    """

    def __init__(
        self, config: TrainConfig, held_out: HeldOut, stream: Stream, model: TrainingModel, adapter: Adapter, ranks: Ranks,
        plan: Plan, record: dict[str, Any],
    ):  # fmt: skip
        self.config, self.held_out, self.stream, self.model, self.adapter = config, held_out, stream, model, adapter
        self.ranks, self.plan, self.record = ranks, plan, record
        self.diffusion = unweighted(model.pipe, model.device)
        self.probes: dict[str, list[Probe]] = {}
        self.improvement: float | None = None  # of the last measurement
        self.patience = config.validation.patience
        self.every = config.validation.validate_every or int(config.checkpoints.save_every)
        self.times = -(-config.steps // self.every)
        trained = TRAINING * config.steps * config.dataset.bs * config.grad_accum * ranks.world  # in forward passes
        share = ASKED if held_out.asked else UNASKED
        affordable = max(BANDS, int(share * trained / (self.times + 1) / 2))  # pairs of an image and a timestep
        images = min(len(held_out.numbers), affordable // FEWEST)
        # A resumed run goes on as it began, although it may be longer now: otherwise all of before would be lost.
        self.extent = ranks.broadcast(record.get("extent")) or (images, min(BANDS, affordable // max(1, images)))
        self.images, self.timesteps = min(self.extent[0], len(held_out.numbers)), self.extent[1]
        self.cost = 2 * self.images * self.timesteps * (self.times + 1) / trained

    def describe(self) -> str:
        """What is measured, in one line; "" if nothing is to be said."""
        if not self.held_out.numbers:
            return self.held_out.line
        what = f"{self.images} {self.held_out.line}, and as many that are, at {self.timesteps} timesteps"
        return f"{what}, {self.times} times: about {self.cost:.1%} of the run"

    def is_due(self, step: int, last: int) -> bool:
        return bool(self.held_out.numbers) and (step % self.every == 0 or step == last)

    @property
    def over(self) -> bool:
        """Whether --patience ends the run. The same on all ranks."""
        if self.patience is None:
            return False
        return self.ranks.broadcast(measurements_since_best(self.record) >= self.patience)

    @property
    def upcoming(self) -> Upcoming:
        return Upcoming.LAST_STEP if self.over else Upcoming.MORE_STEPS

    def prepare(self) -> None:
        """Reads and encodes the pictures. During set-up: a signal ends the wait for a server that stalls."""
        if not self.held_out.numbers:
            return
        with temporarily_on(self.model.device, self.model.kept_on_host):
            self.probes = {"kept_out": self.probes_of_kept_out(), "trained": self.probes_of_trained()}

    def begin(self) -> None:
        """Measures the base, unless the record of a resumed run holds that."""
        if not self.held_out.numbers:
            return
        described_probes = {name: described(probes) for name, probes in self.probes.items()}
        known = self.record.get("probes") == described_probes and "base" in self.record.get("losses", {})
        if not self.ranks.broadcast(known):
            losses = {"base": self.losses(0.0)}
            self.record |= {"extent": list(self.extent), "probes": described_probes, "losses": losses}

    def probes_of_kept_out(self) -> list[Probe]:
        """Raises UserError if none can be decoded, or if cached latents are of another VAE."""
        source, numbers = self.held_out.kept_out, self.held_out.numbers
        assert source is not None
        chosen = [numbers[n] for n in np.linspace(0, len(numbers) - 1, self.images).round().astype(int)]
        probes = self.make(source, chosen)
        if not probes:
            raise UserError("--validate: none of its pictures can be decoded")
        return probes

    def probes_of_trained(self) -> list[Probe]:
        source = self.held_out.training
        order = np.random.default_rng([self.config.seed, TRAINED]).permutation(np.flatnonzero(source.column("height")))
        return self.make(source, order[: self.images].tolist())

    def make(self, source: Source, numbers: Sequence[int]) -> list[Probe]:
        model, name = self.model, self.model.name
        try:
            if source.vae_signature != self.held_out.training.vae_signature:  # those of training were checked
                check_together(source, model.pipe, name, self.config.captions, has_text=False)
            stream, encode = quiet_stream(source, self.stream), model.denoiser.text_encoder is None
            return make_probes(stream, numbers, self.timesteps, model.full_denoiser, model.vae, model.device, encode)
        except UserError as error:
            raise UserError(str(error).replace("--data", "--validate", 1)) from None

    def measure(self, step: int) -> dict[str, float]:
        """The losses after `step` go into the record. Returns what a log says of them. Called by all ranks."""
        averages: dict[str, float] = {}
        for average, weights in self.adapter.in_use().items():
            with self.adapter.holding(weights):
                self.record.setdefault(f"losses{average}", {})[str(step)] = self.losses(1.0)
            if average:
                losses = {"base": self.record["losses"]["base"], **self.record[f"losses{average}"]}
                improvement = figures(self.record | {"losses": losses}, step).improvement
                averages |= {f"improvement{average}": improvement.mean} if improvement else {}
        found = figures(self.record, step)
        scalars = {"validation_loss": float(loss_of_images(self.record, step).mean()), **averages}
        if found.improvement:
            self.improvement = found.improvement.mean
            scalars |= dict(zip(("improvement", "improvement_low", "improvement_high"), found.improvement, strict=True))
        if self.over and self.ranks.is_first:
            tqdm.write(f"patience   none of the last {self.patience} measurements was better: the run ends at step {step}")
        if found.trained and found.gap:
            scalars |= {"trained": found.trained.mean, "gap": found.gap.mean}
        return {name: value for name, value in scalars.items() if math.isfinite(value)}

    def losses(self, strength: float) -> dict[str, Losses]:
        """{"kept_out", "trained": losses} with the LoRA at this strength; 0 is the base."""
        probes = [probe for part in self.probes.values() for probe in part]
        numbers = range(self.ranks.rank, len(probes), self.ranks.world)
        bar = tqdm(numbers, desc="validation", unit="img", leave=False, disable=not self.ranks.is_first)
        advice = f"validating; {self.plan.oom_advice}"
        with note_if_out_of_memory(advice), self.adapter.scaled(strength):
            of_rank = {
                n: losses_of(probes[n], self.model.denoiser, self.diffusion, self.model.device, self.plan.micro) for n in bar
            }
        found = {n: losses for part in self.ranks.gather(of_rank) for n, losses in part.items()}
        rows = rounded([found[n] for n in range(len(probes))])
        first = len(self.probes["kept_out"])
        return {"kept_out": rows[:first], "trained": rows[first:]}
