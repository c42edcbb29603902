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
from model.load import load_sdxl
from model.sdxl import Denoiser, time_ids
from model.text import tokenize
from model.vae import encode_pixels, normalise, sample_latents
from options.training import CaptionConfig, DataConfig, DiffusionConfig
from run.prediction import check_prediction, measure_prediction
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


def test_the_error_is_small_as_what_the_model_predicts(demo, monkeypatch):
    step, stream = demo
    errors = measure_prediction(step, stream, 2)
    assert errors["epsilon"] < 0.2
    assert errors["v_prediction"] > 1
    monkeypatch.setattr(step.model, "denoiser", AsV(step.model.denoiser, step.diffusion.alphas_cumprod))
    errors = measure_prediction(step, stream, 2)
    assert errors["v_prediction"] < 0.85
    assert errors["epsilon"] > 1


def test_a_model_that_predicts_v_and_says_it_predicts_noise_is_refused(demo, monkeypatch):
    step, stream = demo
    monkeypatch.setattr(step.model, "denoiser", AsV(step.model.denoiser, step.diffusion.alphas_cumprod))
    with pytest.raises(
        UserError, match=r"predicts v_prediction, as its own .* \(error [\d.]+ as ε, [\d.]+ as v\), but its files say"
    ):
        check_prediction(step, stream, 1, 0, "auto")
    check_prediction(step, stream, 1, 7, "auto")  # a run that goes on was checked
    check_prediction(step, stream, 1, 0, "epsilon")
    assert step.model.predicts.startswith("; measuring cannot tell: error")


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
