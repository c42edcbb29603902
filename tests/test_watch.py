import re
from functools import partial

import pytest
import torch
from tqdm import tqdm

from common.errors import warn
from lora import add_lora
from model.load import read_sdxl
from options.training import LoRAConfig
from run.report import Meter
from run.watchdog import MANY, Watchdog, flat_loss, no_change, no_gradient, no_learning_rate, slow

HEALTHY = {
    "loss": 0.3, "seconds_per_step": 0.5, "steps": 10, "overflows": 0, "not_finite": 0, "memory_in_use": 0.99,
    "recorded_again": 0, "checksum": 1, "grad_norm": 1.0, "grad_norm/unet": 1.0, "grad_norm/text_encoder": 0.1,
    "lr/unet": 1e-4, "lr/text_encoder": 0.0,
}  # fmt: skip


def run(**changed: list) -> list[dict[str, float]]:
    """Twelve readings of a healthy run, in which the last values of the fields `changed` are replaced."""
    readings = [HEALTHY | {"checksum": i} for i in range(12)]
    for name, values in changed.items():
        name = name.replace("norm_", "norm/").replace("lr_", "lr/")  # keyword arguments cannot contain the slash of the tags
        for reading, value in zip(readings[-len(values) :], values, strict=True):
            reading[name] = value
    return readings


flat_at_1 = partial(flat_loss, 1.0)


@pytest.mark.parametrize(
    ("check", "readings", "message"),
    [
        (slow, run(seconds_per_step=[2.6]), "a step takes 2.6 s, not 0.5 as before: the device's memory is 99% full"),
        (slow, run(seconds_per_step=[2.4]), None),
        (slow, run(seconds_per_step=[2.6], memory_in_use=[0.9]), None),  # memory is not the cause
        (slow, run(seconds_per_step=[2.6])[-3:], None),  # too few to compare with
        (slow, run(seconds_per_step=[9, 9], recorded_again=[1, 3]), "recorded again: less as --vram-gb"),
        (slow, run(seconds_per_step=[9, 9], recorded_again=[3, 3], memory_in_use=[0.9] * 12), None),  # pictures, once
        (no_learning_rate, run(lr_unet=[0.0]), "every learning rate is 0"),
        (no_learning_rate, run(), None),  # only one group has a rate of 0
        (no_change, run(checksum=[7, 7]), "the LoRA has not changed"),
        (no_change, run(checksum=[7, 7], overflows=[9]), "the LoRA has not changed"),
        (no_change, run(checksum=[7, 7], overflows=[4], not_finite=[6]), None),  # all steps were skipped
        (no_change, run(checksum=[7, 7], lr_unet=[0.0]), None),  # no_learning_rate reports that
        (no_change, run()[:1], None),
        (no_gradient, run(grad_norm_text_encoder=[0.0]), "text_encoder: trained, but without"),
        (no_gradient, run(), None),
        (no_gradient, run(grad_norm_text_encoder=[float("nan")]), None),
        (flat_at_1, run(loss=[1.06, 0.96] * (MANY // 2)), "the loss stays at 1.01"),
        (flat_at_1, run(loss=[1.03] * MANY), None),
        (flat_at_1, run(loss=[1.0] * (MANY - 1)), None),
        (flat_at_1, run(loss=[1.0] * MANY)[-MANY + 1 :], None),
        (flat_at_1, run(loss=[float("nan")] * MANY), None),
        (partial(flat_loss, 0.25), run(loss=[0.25] * MANY), "the loss stays at 0.25"),  # --weighting
    ],
)
def test_each_check_warns_about_its_readings(check, readings, message):
    result = check(readings)
    assert message in result if message else result is None


def test_each_failure_is_reported_once(capfd):
    """Rank 0 alone reports failures that all ranks share; every rank reports its own slow steps."""
    watchdogs = [Watchdog(1.0), Watchdog(1.0, rank=3)]
    for reading in (*run(), *run(grad_norm_unet=[0.0] * 12, checksum=[7] * 12), *run(seconds_per_step=[5, 5])):
        for watchdog in watchdogs:
            watchdog.see(reading)
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["warning", "warning", "warning", "warning of rank 3"]
    assert "unet: trained, but" in lines[0]
    assert "not changed" in lines[1]
    assert all("takes 5 s" in line for line in lines[2:])


def test_a_warning_starts_on_a_line_of_its_own(capfd):
    with tqdm(total=3):
        warn("something is wrong")
    assert re.search(r"\r +\rsomething is wrong\n", capfd.readouterr().err)  # spaces erase the progress bar


def test_norms_are_of_the_last_step_and_the_watchdog_sees_the_largest():
    meter = Meter(torch.device("cpu"), ["unet", "text_encoder"], 3)
    for norms in ([3.0, 4.0], [0.0, 9.0], [6.0, 8.0]):
        meter.end_step(torch.tensor(1.0), torch.tensor(norms), 0.0)
    scalars, _ = meter.read(1, 1.0)
    assert [scalars[name] for name in ("grad_norm", "grad_norm/unet", "grad_norm/text_encoder")] == [10.0, 6.0, 8.0]
    assert meter.largest_norms == {"grad_norm/unet": 6.0, "grad_norm/text_encoder": 9.0}


def test_the_checksum_sees_a_single_bit(denoiser):
    adapter = add_lora(denoiser, LoRAConfig(rank=2), denoiser.unused)
    before = adapter.checksum()
    assert adapter.checksum() == before
    adapter.flat[5] = torch.nextafter(adapter.flat[5], torch.tensor(9.0))
    assert adapter.checksum() != before


def test_a_run_that_learns_nothing_goes_on_with_warnings(train, monkeypatch):
    """The last layer of the U-Net is zero."""
    read = read_sdxl

    def damaged(*args, **options):
        pipe = read(*args, **options)
        torch.nn.init.zeros_(pipe.unet.conv_out.weight)
        return pipe

    monkeypatch.setattr("model.load.read_sdxl", damaged)
    out, err = train("--steps", 21, "--lr", 0)
    assert "weights_21.safetensors" in out
    assert err.count("warning: ") == 2
    assert err.count("warning: every learning rate is 0, nothing is learnt: give --lr\n") == 1
    assert err.count("warning: unet: trained, but without a gradient: ") == 1
