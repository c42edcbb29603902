"""The data of a run, split into what is trained on and what is only measured on."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from data import open_data
from dataset.sources import HELD_OUT, Source, open_source, split_weight
from evaluation.validation import MOST_KEPT_OUT, kept_out_of
from options.training import TrainConfig

FEW_IMAGES, USUAL_SHARE = 20, 0.08  # without --validate: below this nothing is kept out, otherwise this share
FEW_STEPS = 100  # below this a run of the demo is a trial, and nothing is measured


@dataclass(frozen=True)
class HeldOut:
    """The two parts of the data."""

    training: Source
    kept_out: Source | None = None  # to read `numbers` from; None: nothing is kept out
    numbers: tuple[int, ...] = ()
    asked: bool = False  # whether --validate was given
    line: str = ""  # which pictures these are, or why there are none


def hold_out(config: TrainConfig, source: Source) -> HeldOut:
    """What --validate says. Raises UserError if it cannot be done."""
    value, share = config.validation.validate, config.validation.share
    if value == "none":
        return HeldOut(source)
    if value is not None and share is None:
        return of_folder(config, source, value)
    if value is None and (config.dataset.data or ("demo",)) == ("demo",):
        if config.steps < FEW_STEPS:
            return HeldOut(source)
        demo = open_source(str(HELD_OUT))
        return HeldOut(source, demo, tuple(range(demo.samples)), line="pictures of the demo that are never trained on")
    if value is None and source.samples < FEW_IMAGES:  # it may not depend on --steps: a run that is lengthened keeps its data
        few = f"none: fewer than {FEW_IMAGES} pictures"
        return HeldOut(source, line=f"{few}; --validate FOLDER measures on others of yours")
    numbers = tuple(kept_out_of(source, share or USUAL_SHARE, config.seed))
    if len(numbers) < 2:
        raise UserError("--validate: there are too few pictures to keep two of them out of training: --validate none")
    line = f"of {source.samples} pictures, never trained on"
    return HeldOut(source.without(numbers), source, numbers, share is not None, line)


def of_folder(config: TrainConfig, source: Source, folder: str) -> HeldOut:
    """All that `folder` holds is kept out. Raises UserError if it cannot be read, or is what is trained on."""
    try:
        kept_out = open_data(replace(config.dataset, data=(folder,)), config.caption_files)
    except UserError as error:
        raise UserError(f"--validate {str(error).removeprefix('--data: ')}") from None
    trained_on = {Path(split_weight(name)[0]) for name in (*config.dataset.data, *config.prior.prior_data)}
    if kept_out.fingerprint == source.fingerprint or Path(split_weight(folder)[0]) in trained_on:
        raise UserError(f"--validate {folder} holds pictures that are trained on: a share such as 0.1 keeps some of them out")
    return HeldOut(source, kept_out, tuple(range(min(MOST_KEPT_OUT, kept_out.samples))), True, f"pictures of {folder}")
