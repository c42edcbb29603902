"""What the base predicts is measured, with the bundled model, which was trained to predict ε."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from common.errors import UserError
from data import Stream
from dataset.sources import open_source
from model.diffusion import Diffusion
from model.load import load_sdxl, with_prediction
from model.sdxl import Denoiser, time_ids
from model.text import tokenize
from model.vae import encode_pixels, normalise, sample_latents
from options.training import CaptionConfig, DataConfig, DiffusionConfig
from run.prediction import check_prediction, check_terminal_snr, first_rows, measure_last_signal, measure_prediction
from train_lora import StepInputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo():
    """(a step as `measure_prediction` uses it, stream)."""
    pipe = load_sdxl("demo", torch.float32, CPU)
    denoiser, vae = Denoiser(pipe), pipe.vae
    stream = Stream(open_source("demo"), DataConfig(bs=2), CaptionConfig(), 128, seed=0)
    diffusion = Diffusion(DiffusionConfig(), pipe.scheduler.alphas_cumprod, "epsilon", CPU)

    def inputs(batch, *_):
        latents = sample_latents(vae, encode_pixels(vae, normalise(batch.images)), torch.zeros(()))
        draws = diffusion.draw(latents.shape, torch.Generator().manual_seed(0))
        ids = time_ids(batch.original_size, batch.crop, batch.size)
        tokens = tokenize(denoiser.tokenizers, batch.captions)
        return StepInputs(latents, draws.noise, *draws, ids, (tokens,), None, None, torch.empty(0))

    encode = lambda latents, _: latents  # noqa: E731
    model = SimpleNamespace(name="demo", pipe=pipe, predicts="", encode=encode, denoiser=denoiser, text_inputs=None)
    return SimpleNamespace(model=model, diffusion=diffusion, inputs=inputs), stream


class AsV:
    """A model that predicts v, from one that predicts ε: v = (ε − √(1 − ᾱ) · x_t) / √ᾱ."""

    def __init__(self, denoiser, alphas_cumprod):
        self.denoiser, self.alphas_cumprod = denoiser, alphas_cumprod

    def __call__(self, noisy, timesteps, text, ids):
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (self.denoiser(noisy, timesteps, text, ids) - (1 - alpha).sqrt() * noisy) / alpha.sqrt()


class OfSchedule:
    """v as a model of the schedule `alphas_cumprod` predicts it that knows the pictures."""

    def __init__(self, alphas_cumprod, latents):
        self.alphas_cumprod, self.latents = alphas_cumprod, latents

    def __call__(self, noisy, timesteps, text, ids):
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * self.latents) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * self.latents


def test_the_error_is_small_as_what_the_model_predicts(demo, monkeypatch):
    step, stream = demo
    x, latents = first_rows(step, stream, 2)
    errors = measure_prediction(step, x, latents)
    assert errors["epsilon"] < 0.2
    assert errors["v_prediction"] > 1
    monkeypatch.setattr(step.model, "denoiser", AsV(step.model.denoiser, step.diffusion.alphas_cumprod))
    errors = measure_prediction(step, x, latents)
    assert errors["v_prediction"] < 0.85
    assert errors["epsilon"] > 1


def test_a_model_that_predicts_v_and_says_it_predicts_noise_is_refused(demo, monkeypatch):
    step, stream = demo
    monkeypatch.setattr(step.model, "denoiser", AsV(step.model.denoiser, step.diffusion.alphas_cumprod))
    with pytest.raises(
        UserError, match=r"predicts v_prediction, as its own .* \(error [\d.]+ as ε, [\d.]+ as v\), but its files say"
    ):
        check_prediction(step, stream, 1, 0, DiffusionConfig())
    check_prediction(step, stream, 1, 7, DiffusionConfig())  # a run that goes on was checked
    check_prediction(step, stream, 1, 0, DiffusionConfig(prediction_type="epsilon"))
    assert step.model.predicts.startswith("; measuring cannot tell: error")


@pytest.mark.parametrize("trained", ["no", "yes"])
@pytest.mark.parametrize("told", ["no", "yes"])
def test_files_that_contradict_the_measured_zero_terminal_snr_are_refused(demo, monkeypatch, trained, told):
    step, stream = demo
    pipe = step.model.pipe
    schedules = {
        name: with_prediction(pipe.scheduler, "v_prediction", rescale_betas_zero_snr=name == "yes") for name in ("no", "yes")
    }
    monkeypatch.setattr(pipe, "scheduler", schedules[told])
    diffusion = Diffusion(DiffusionConfig(), schedules[told].alphas_cumprod, "v_prediction", CPU)
    monkeypatch.setattr(step, "diffusion", diffusion)
    monkeypatch.setattr(step.model, "predicts", "")
    x, latents = first_rows(step, stream, 2)
    monkeypatch.setattr(step.model, "denoiser", OfSchedule(schedules[trained].alphas_cumprod, latents))
    assert measure_last_signal(step, x, latents) == pytest.approx({"no": 1.0, "yes": 0.0}[trained], abs=0.01)
    if trained != told:
        corrects = rf"\([-\d.]+ of the signal .*\): --zero-snr {trained} corrects the files, --zero-snr {told} leaves them"
        with pytest.raises(UserError, match=corrects):
            check_prediction(step, stream, 2, 0, DiffusionConfig())
        monkeypatch.setattr(step.model, "predicts", "")
    check_prediction(step, stream, 2, 0, DiffusionConfig(zero_snr=told if trained != told else "auto"))
    assert f"; zero terminal SNR {trained}: " in step.model.predicts


def test_between_the_two_schedules_it_cannot_tell(demo, monkeypatch):
    step, _ = demo
    monkeypatch.setattr(step.model, "predicts", "")
    check_terminal_snr(step, 0.3, "auto")
    check_terminal_snr(step, -0.6, "auto")  # as no schedule has it
    assert step.model.predicts.count("; zero terminal SNR cannot be told: ") == 2


def test_files_that_say_v_of_a_model_that_predicts_noise(train, tmp_path):
    model = shutil.copytree(ROOT / "assets/demo/model", tmp_path / "model")
    file = model / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    options = ["--model", model, "--data", "demo", "--steps", 1, "--validate", "none"]
    _, error = train(*options, status=2)
    assert re.search(r"predicts epsilon, as .*, but its files say v_prediction: --prediction-type epsilon corrects them", error)
    out, _ = train(*options, "--prediction-type", "epsilon")
    assert re.search(r"predicts   ε, .*; measured: error 0\.\d+ as ε, 1\.\d+ as v", out)
    out, _ = train(*options, "--prediction-type", "v_prediction", "--out", tmp_path / "v")
    assert "predicts   v, " in out


def test_of_random_weights_it_cannot_tell(train):
    out, _ = train("--steps", 1)
    assert "; measuring cannot tell: error" in out
