"""common/options.py: an option declares its bounds and whether it may change on resume."""

import math
import re
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.run import parse_args

from common.errors import UserError
from common.options import check_options, flag_of, flat_options, leaves, option, resume_policies
from options.training import CheckpointConfig, DataConfig, TrainConfig

HEAVY = ("torch", "diffusers", "transformers", "bitsandbytes", "xformers", "tensorboard")
ANSWER = """
import runpy, sys
for script in {scripts}:
    for arguments, status in (["--help"], 0), (["--rnak"], 2):
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert (end.code or 0) == status, (script, arguments, end.code)
        else:
            raise AssertionError(script)
        assert not sys.modules.keys() & {heavy}, script
"""


def test_help_and_mistakes_answer_before_pytorch_is_imported():
    scripts = ["train_lora.py", "infer.py", *(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]
    code = ANSWER.format(scripts=scripts, heavy=set(HEAVY))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(scripts) > 8


def test_torchrun_leaves_every_flag_to_the_script():
    """It looks at what follows the script's name, too, and ends if a flag abbreviates two of its own, as --log would."""
    for flag in (flag_of(spec.name) for spec, _ in leaves(TrainConfig())):
        for written in (flag, flag.replace("--", "--no-", 1)):
            assert parse_args(["train_lora.py", written, "1"]).training_script_args == [written, "1"]


NUMBERS = st.one_of(st.integers(-(10**6), 10**6), st.floats())


def test_a_number_that_is_none_is_refused_without_bounds_too():
    @dataclass(frozen=True)
    class Config:
        scale: float | tuple[float, ...] = option(1.0)
        other: float = 0.0

        def __post_init__(self) -> None:
            check_options(self)

    Config((1.0, -2.5), -3.0)
    for number in (math.nan, math.inf, -math.inf):
        for values in ((number,), ((1.0, number),), (1.0, number)):
            with pytest.raises(UserError, match=r"--(scale|other) must be a finite number, not -?(nan|inf)$"):
                Config(*values)


def test_every_option_of_training_has_a_resume_policy():
    policies = resume_policies(TrainConfig())
    assert policies.keys() == flat_options(TrainConfig()).keys()
    assert len(policies) > 45
    assert set(policies.values()) == {"fixed", "free", "ask"}
    fixed = {name for name, policy in policies.items() if policy == "fixed"}
    lora = {
        "rank",
        "rank_pattern",
        "alpha",
        "rank_stabilised",
        "conv_rank",
        "conv_alpha",
        "dora",
        "targets",
        "train_text_encoder",
    }
    assert fixed == lora | {"base_lora", "init_lora", "model", "optimizer", "prediction_type", "zero_snr"}


def test_no_two_options_have_one_flag():
    names = [spec.name for spec, _ in leaves(TrainConfig())]
    assert len(names) == len(set(names))


def test_every_dataclass_of_training_checks_its_options():
    """Bounds have no effect unless the dataclass calls check_options."""

    def check(config) -> None:
        for spec in fields(config):
            if is_dataclass(value := getattr(config, spec.name)):
                check(value)
            elif any(bound is not None for bound in spec.metadata["bounds"].values()):
                with pytest.raises(UserError, match=f"^--{spec.name.replace('_', '-')} must "):
                    type(config)(**{spec.name: float("nan")})

    check(TrainConfig())


@given(value=NUMBERS, low=st.integers(-100, 100), high=st.integers(-100, 100), step=st.integers(1, 50))
def test_a_value_is_accepted_if_and_only_if_it_is_within_its_bounds(value, low, high, step):
    @dataclass(frozen=True)
    class Config:
        at_least: float = option(low, at_least=low)
        above: float | None = option(None, above=low)
        between: float = option(low, at_least=low, at_most=low + abs(high))
        whole_steps: float = option(low, multiple_of=step)

        def __post_init__(self) -> None:
            check_options(self)

    finite = value - value == 0
    valid = {
        "at_least": finite and value >= low,
        "above": finite and value > low,
        "between": finite and low <= value <= low + abs(high),
        "whole_steps": finite and value % step == 0,
    }
    base = {"whole_steps": 0}
    for name, accepted in valid.items():
        if accepted:
            Config(**base | {name: value})
        else:
            with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} must .*, not {re.escape(str(value))}$"):
                Config(**base | {name: value})


@given(
    images=st.integers(1, 5000), bs=st.integers(1, 8), accumulated=st.integers(1, 4), processes=st.integers(1, 8),
    epochs=st.floats(0.01, 50),
)  # fmt: skip
def test_epochs_are_looks_at_every_picture(images, bs, accumulated, processes, epochs):
    dataset, checkpoints = DataConfig(bs=bs), CheckpointConfig(save_every=f"{epochs:.3f}epochs")
    config = TrainConfig(dataset=dataset, checkpoints=checkpoints, epochs=epochs, grad_accum=accumulated)
    found = config.in_steps(images, processes)
    samples = bs * accumulated * processes  # of a step
    assert (found.steps - 1) * samples < epochs * images <= found.steps * samples * (1 + 1e-9)
    assert abs(int(found.checkpoints.save_every) - found.steps) * samples <= 0.001 * images + samples


@pytest.mark.parametrize("length", ["0", "0epochs", "1.5", "-3", "epoch", "1week", ""])
def test_lengths_that_are_none(length):
    with pytest.raises(UserError, match="a number of steps from 1 up, or of epochs"):
        CheckpointConfig(save_every=length)
