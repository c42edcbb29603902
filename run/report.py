"""What a run reports of itself: lines on the terminal, a progress bar, and what goes to the logs."""

import math
import sys
import textwrap
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.errors import first_names, warn, warn_of
from common.files import TolerantWriter, check_writable, write_atomically
from common.progress import tqdm
from common.text import duration
from data import Loader, Stream
from memory import forget_peak_memory, memory_in_use, peak_memory
from model.prompts import Prompt
from options.command import options_as_toml
from performance.memory_plan import Plan
from run.accumulation import Step
from run.advice import concerns, next_steps
from run.bad_steps import not_finite
from run.checkpoints import Checkpoints, Run
from run.ending import Ending
from run.lineage import Lineage
from run.log import TAGS, Curves, Logs, compared_options, config_text, open_logs, prompts_text
from run.optimiser import Optimiser
from run.ranks import Ranks
from run.watchdog import Watchdog

LOG_EVERY = 10  # steps; reading makes the host wait for the device, and so do saves and checks of the ranks
FINAL = 10  # readings whose mean is the final loss
LINE_EVERY = 60  # seconds between lines on the progress where stderr is no terminal


class Report:
    """Rank 0 prints and logs. The other ranks only measure, and warn if their device becomes slow."""

    def __init__(
        self,
        run: Run,
        steps: int,
        samples_per_step: int,
        ranks: Ranks,
        train_step: Step,
        optimiser: Optimiser,
        started: float,
    ):
        """`steps`: the last one; `started`: time.perf_counter() of the script. Raises UserError if it cannot write the log."""
        self.run, self.steps, self.samples_per_step, self.ranks = run, steps, samples_per_step, ranks
        self.adapter, self.model, self.graphed = train_step.adapter, train_step.model, train_step.graphed
        self.optimiser, self.started, self.first_step = optimiser, started, run.step
        self.line_at = started  # when the last line on the progress was printed
        self.device = self.model.device
        self.meter = Meter(self.device, self.adapter.groups, LOG_EVERY)
        self.watchdog = Watchdog(train_step.diffusion.loss_of_zero_prediction, ranks.rank)
        self.curves = Curves(run.log_dir, run.step if ranks.is_first else 0)
        self.progress = tqdm(disable=True)
        self.log = Logs()
        if ranks.is_first:
            check_writable("--log-dir", Path(run.log_dir).parent)

    def opening(
        self, stream: Stream, plan: Plan, checkpoints: Checkpoints, lineage: Lineage, prompts: list[Prompt], validation: str
    ) -> None:
        """Begins the log, prints what the run is about to do, and begins to measure. `validation`: what is measured beside."""
        self.lines = self.summary(stream, plan, checkpoints, lineage, validation)
        if self.ranks.is_first:
            self.log = open_logs(self.run.log_dir, self.run.step, checkpoints.flags, self.curves)
            self.log.add_text("config", config_text(checkpoints.flags), self.run.step)
            self.log.add_pictures({"schedule": self.optimiser.picture()}, self.run.step)
            if prompts:
                self.log.add_text("prompts", prompts_text(prompts), self.run.step)
            content = options_as_toml(checkpoints.flags | lineage.options, sys.argv).encode(errors="backslashreplace")
            file = Path(self.run.log_dir) / "config.toml"
            TolerantWriter()(str(file), partial(write_atomically, file, content))
            for name, line in self.lines.items():
                if line:
                    print(f"{name:10} {line}", flush=True)
        self.progress = tqdm(total=self.steps, initial=self.run.step, unit="step", disable=not self.ranks.is_first)
        self.meter.restart()

    def summary(
        self, stream: Stream, plan: Plan, checkpoints: Checkpoints, lineage: Lineage, validation: str
    ) -> dict[str, str]:
        """{name: what the run is about to do}, in the order of printing; "" is left out."""
        flags, source = checkpoints.flags, stream.source
        total, trained, layers = self.model.parameter_count, self.adapter.parameter_count, len(self.adapter.modules)
        processes, samples = self.ranks.world, self.samples_per_step
        epochs, once = self.steps * samples / source.epoch, source.epoch / samples
        ranks = ", ".join([str(flags["rank"]), *flags["rank_pattern"]])
        picture = "image of --data" if source.prior else "image"
        launching = "every kernel launched" if self.graphed.eager else "CUDA graph"
        return {
            "resume": checkpoints.resumed,
            "model": f"{flags['model']}: U-Net and text encoders {total:,} parameters, frozen; {stream.resolution} px",
            "merged": lineage.merged,
            "predicts": self.model.predicts,
            "LoRA": f"rank {ranks} on {layers} layers, {trained:,} parameters trained: {100 * trained / total:.2f} %",
            "goes on": lineage.begun,
            "data": "\ndata       ".join([source.account(), *source.left_out()]),
            "caption": textwrap.shorten(stream.example(), 150, placeholder=" …"),
            "cut short": f"{', '.join(source.truncated)}: the samples before the cut are used" if source.truncated else "",
            "buckets": stream.describe(),
            "batch": f"{flags['bs']} × {flags['grad_accum']} accumulated × {processes} processes = {samples}",
            "validation": validation,
            "steps": f"{self.steps}: each {picture} {epochs:.3g} times, on average; all of them once is {once:.3g} steps",
            "device": f"{self.device}, {flags['precision']}, {flags['attention']} attention, {launching}",
            "memory": str(plan),
            "optimiser": str(self.optimiser),
            "file": checkpoints.describe_file(self.steps),
            "note": "\nnote       ".join(concerns(stream, epochs, self.device.type == "cpu", total)),
        }

    def after_step(self, loss: torch.Tensor, norms: torch.Tensor, waited: float) -> None:
        """`loss` [] and `norms` [groups] on the device, as for the meter; `waited`: seconds, for data."""
        self.meter.end_step(loss, norms, waited)
        self.progress.update()
        if self.run.step == self.first_step + 2 and self.ranks.is_first:
            tqdm.write(self.measured())

    def measured(self) -> str:
        """The memory that the plan has led to. The host waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        peak, reserved = peak_memory(self.device)
        seconds = time.perf_counter() - self.started
        return (
            f"memory     measured peak {peak:.1f} GiB, {reserved:.1f} reserved; two steps done {seconds:.0f} s after the start"
        )

    def read(self) -> list[bool]:
        """Logs what was measured since the last reading, and lets the watchdog check it. Returns for each step since then
        whether it was bad (run/bad_steps.py). The host waits for the device.
        """
        if not self.meter.steps:
            return []
        first = not self.meter.shares
        scalars, spoilt = self.meter.read(self.samples_per_step, self.optimiser.scale)
        if self.ranks.world > 1:
            scalars["waiting_for_ranks"] = self.ranks.waited() / (scalars["steps"] * scalars["seconds_per_step"])
        rates = dict(self.optimiser.learning_rates())
        shown = {"lr": f"{next(iter(rates.values())):.2e}", "img_s": f"{scalars['images_per_second']:.2f}"}
        self.progress.set_postfix(loss=f"{scalars['loss']:.4f}", **shown)
        if self.ranks.is_first and self.progress.disable and time.perf_counter() > self.line_at + LINE_EVERY:
            self.line_at = time.perf_counter()
            rate, loss = scalars["images_per_second"], scalars["loss"]
            print(f"step       {self.run.step} of {self.steps}: loss {loss:.4f}, {rate:.3g} img/s", flush=True)
        if first and self.ranks.is_first and (left := self.steps - self.run.step):
            rest = duration(left * scalars["seconds_per_step"])
            tqdm.write(f"time       about {rest} for the {left} steps left, without pictures")
        if noise_scale := self.optimiser.noise_scale.read():
            scalars["noise_scale"] = noise_scale
        scalars |= {f"lr/{name}": rate for name, rate in rates.items()}
        scalars |= dict(zip(("peak_memory_GiB", "peak_reserved_GiB"), peak_memory(self.device), strict=True))
        scalars["memory_in_use"] = memory_in_use(self.device)
        self.show(scalars)
        checks = {"checksum": self.adapter.checksum(), "recorded_again": self.graphed.recorded_again}
        resting = {f"grad_norm/{name}" for name in self.optimiser.resting_groups}
        reading = scalars | self.meter.largest_norms | checks
        self.watchdog.see({name: value for name, value in reading.items() if name not in resting})
        return spoilt

    def show(self, measured: dict[str, float]) -> None:
        """{name: value} at this step, for the logs: the names of TAGS."""
        self.log.add_row({TAGS[name]: value for name, value in measured.items()}, self.run.step)

    def saved(self, error: float | None) -> None:
        """After a save; `error` as Checkpoints.save returns it."""
        if error is not None:
            self.show({"largest_error_of_the_file": error})

    def validated(self, scalars: dict[str, float]) -> None:
        """{name: value} of a validation. The time that it took counts for no step."""
        self.show(scalars)
        self.meter.restart()

    def pictures(self, sheets: dict[str, np.ndarray]) -> None:
        """{tag: [H, W, 3] uint8}. The time that saving and drawing took counts for no step, and what memory pictures before
        the first step took not for the plan.
        """
        if sheets:
            self.log.add_pictures(sheets, self.run.step)
        if self.run.step == 0:
            forget_peak_memory(self.device)
        self.meter.restart()

    def closing(
        self, ending: Ending, checkpoints: Checkpoints, loader: Loader, advice: str | None, improvement: float | None = None
    ) -> None:
        """Prints how the run ended, and `advice` for the next one. Called by all ranks. `improvement`: by how much the
        validation loss fell.
        """
        if loader.error and self.run.step > self.first_step:
            warn_of("train_lora.py", loader.error)
        names = sorted(self.ranks.union(loader.skipped))
        if not self.ranks.is_first:
            return
        command = "the same command" + (" without --resume none" if checkpoints.config.resume == "none" else "")
        if ending is Ending.NOT_SAVED:
            warn(f"step {self.run.step} {ending.reason}")
        elif self.run.saved:
            next_time = f": {ending.reason}, {command} goes on from there" if ending.reason else ""
            file = checkpoints.config.out / self.run.saved[-1]
            print(f"wrote {file}{next_time}")
            if ending is Ending.FINISHED:
                self.outcome(checkpoints, improvement)
                events = self.run.log_dir if checkpoints.flags["log_to"] != "wandb" else None
                print(*next_steps(file, events, str(checkpoints.flags["model"])), sep="\n")
        else:
            print(ending.nothing_saved)
        self.log.close()
        waiting, noise = self.meter.advice(loader.stream.source.has_latents), self.optimiser.noise_scale.advice()
        for line in filter(None, (waiting, noise, advice)):
            print(line)
        if names:
            print(f"skipped {len(names)} images, broken, left out or without a caption: {first_names(names)}")

    def outcome(self, checkpoints: Checkpoints, improvement: float | None) -> None:
        """Logs what this run can be compared by with others. The loss of ten steps would say little."""
        losses = [loss for one in self.watchdog.readings[-FINAL:] if math.isfinite(loss := one["loss"])]
        metrics = {TAGS["final_loss"]: sum(losses) / len(losses)} if losses else {}
        if improvement is not None:
            metrics[TAGS["final_improvement"]] = improvement
        self.log.add_outcome(compared_options(checkpoints.flags, checkpoints.policies), metrics, self.run.step)


class Meter:
    """Loss and gradient norms of each step, images per second and share of the time spent waiting for data since the last
    reading, which comes after `most` steps at the latest. Only reading makes the host wait for the device.
    """

    def __init__(self, device: torch.device, groups: Collection[str], most: int):
        self.groups = groups
        self.losses, self.norms = torch.zeros(most, device=device), torch.zeros(most, len(groups), device=device)
        self.shares: list[float] = []  # of every reading
        self.largest_norms: dict[str, float] = {}  # of each group, over the steps of the last reading
        self.restart()

    def restart(self) -> None:
        self.steps = 0
        self.losses.zero_()
        self.since, self.waited = time.perf_counter(), 0.0

    def end_step(self, loss: torch.Tensor, norms: torch.Tensor, waited: float) -> None:
        """`loss`: mean over all ranks; `norms` [groups]: of the gradient of each; `waited`: seconds, for data."""
        self.losses[self.steps], self.norms[self.steps] = loss, norms
        self.steps, self.waited = self.steps + 1, self.waited + waited

    def read(self, images_per_step: int, scale: float) -> tuple[dict[str, float], list[bool]]:
        """({name: value for the log}, for each step whether it was spoilt). The loss is the mean of the finite ones, the norms
        are of the last step, what was waited is this rank's; images are those of all.
        """
        of_groups = self.norms[: self.steps]
        losses, norms = self.losses[: self.steps].tolist(), of_groups.norm(dim=1).tolist()
        names = [f"grad_norm/{name}" for name in self.groups]
        self.largest_norms = dict(zip(names, of_groups.amax(dim=0).tolist(), strict=True))
        finite, seconds = list(filter(math.isfinite, losses)), time.perf_counter() - self.since
        self.shares.append(self.waited / seconds)
        spoilt = not_finite(losses, norms, scale)
        scalars = {
            "loss": sum(finite) / len(finite) if finite else math.nan,
            "grad_norm": norms[-1],
            **dict(zip(names, of_groups[-1].tolist(), strict=True)),
            "images_per_second": self.steps * images_per_step / seconds,
            "seconds_per_step": seconds / self.steps,
            "steps": self.steps,
            "waiting_for_data": self.shares[-1],
            "loss_scale": scale,
            "overflows": sum(not math.isfinite(norm) for norm in norms) - sum(spoilt),
            "not_finite": sum(spoilt),
        }
        self.restart()
        return scalars, spoilt

    def advice(self, has_latents: bool) -> str | None:
        """What to do where data is the bottleneck; `has_latents`: they are cached already.

        The first reading does not count: the workers had just been started.
        """
        share = sum(self.shares[1:]) / max(1, len(self.shares) - 1)
        if share > 0.05:
            helps = "" if has_latents else ", or latents made ready by scripts/cache_latents.py"
            return f"waiting for data took {share:.0%} of the time: more --workers{helps}"
        return None
