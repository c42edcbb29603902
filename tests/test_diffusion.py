"""The objective: timesteps, noise, weighting and loss against their formulas, diffusers and kohya's scripts."""

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from model.diffusion import Diffusion, choose_timesteps, weights_of_mask, weights_of_timesteps
from options.forms import FORMS
from options.optimiser import OptimiserConfig
from options.training import DiffusionConfig

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO_SNR = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
CPU = torch.device("cpu")
WEIGHTINGS = ["none", "min-snr:5", "soft-min-snr:5", "debiased"]


def make(prediction_type: str = "epsilon", schedule=SCHEDULE, **options) -> Diffusion:
    return Diffusion(DiffusionConfig(**options), schedule.alphas_cumprod, prediction_type, CPU)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_schedule_noising_and_targets_equal_ddpm_scheduler(pipe):
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, SCHEDULE.alphas_cumprod)
    x0, noise, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(make().add_noise(x0, noise, t), SCHEDULE.add_noise(x0, noise, t))
    torch.testing.assert_close(make("v_prediction").target(x0, noise, t), SCHEDULE.get_velocity(x0, noise, t))
    assert make().target(x0, noise, t) is noise


def test_a_perfect_prediction_has_no_loss_and_a_zero_prediction_that_of_the_noise():
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 900])
    assert torch.equal(make().loss(noise, x0, noise, t), torch.zeros(3))
    loss = make().loss(torch.zeros_like(x0), x0, noise, t)
    torch.testing.assert_close(loss, noise.square().mean(dim=(1, 2, 3)))


# Weighting.


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_diffusers(prediction_type):
    t = torch.arange(1000)
    snr = compute_snr(SCHEDULE, t)
    wanted = snr.clamp(max=5) / (snr + (prediction_type == "v_prediction"))
    torch.testing.assert_close(make(prediction_type, weighting="min-snr:5").weights, wanted)
    assert torch.equal(make(prediction_type).weights, torch.ones(1000))


def test_debiased_weights_of_noise_equal_those_of_kohyas_scripts():
    """They take an SNR of at most 1,000 (apply_debiased_estimation in library/custom_train_functions.py)."""
    snr = compute_snr(SCHEDULE, torch.arange(1000))
    torch.testing.assert_close(make(weighting="debiased").weights, snr.sqrt().reciprocal())
    assert snr.max() < 1500


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
@pytest.mark.parametrize("loss", ["mse"])
def test_the_same_prediction_has_the_same_loss_as_noise_and_as_v(weighting, loss):
    x0, noise, guess = torch.randn(3, 40, 4, 8, 8, dtype=torch.float64)
    t = torch.linspace(0, 999, 40).long()
    alpha = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1).double()
    noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    x0_of_guess = (noisy - (1 - alpha).sqrt() * guess) / alpha.sqrt()
    v_of_guess = alpha.sqrt() * guess - (1 - alpha).sqrt() * x0_of_guess
    as_noise = make(weighting=weighting, loss=loss).loss(guess, x0, noise, t)
    as_v = make("v_prediction", weighting=weighting, loss=loss).loss(v_of_guess, x0, noise, t)
    torch.testing.assert_close(as_v, as_noise, rtol=1e-3, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["none", "min-snr", "soft-min-snr", "debiased"]), st.floats(1e-3, 1e3), st.booleans(),
       st.lists(st.floats(0, 1), min_size=1, max_size=9))  # fmt: skip
def test_weights_are_finite_for_every_schedule(kind, gamma, v_prediction, alphas):
    """SNR = 0 and ∞ among them."""
    values = (gamma,) if "snr" in kind else ()
    weights = weights_of_timesteps(kind, values, torch.tensor([*alphas, 0.0, 1.0]).double(), v_prediction)
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("loss", ["mse", "l1", "huber:0.1", "huber-snr:0.1"])
def test_a_schedule_of_zero_terminal_snr_has_a_finite_loss_and_gradient(prediction_type, weighting, loss):
    diffusion = make(prediction_type, ZERO_SNR, weighting=weighting, loss=loss)
    guess = torch.zeros(4, 4, 8, 8, requires_grad=True)
    x0, noise = torch.randn(2, 4, 4, 8, 8)
    losses = diffusion.loss(guess, x0, noise, torch.tensor([0, 500, 998, 999]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert guess.grad.isfinite().all()
    assert math.isfinite(diffusion.loss_of_zero_prediction)


# Loss.


def test_pseudo_huber_lies_between_its_limits():
    x0, noise, guess = torch.randn(3, 2, 4, 8, 8)
    t = torch.tensor([10, 900])
    losses = {
        form: make(loss=form).loss(guess, x0, noise, t) for form in ("mse", "l1", "huber:1000", "huber:0.0001", "huber:1")
    }
    torch.testing.assert_close(losses["huber:1000"], losses["mse"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["huber:0.0001"] / 0.0002, losses["l1"], rtol=1e-3, atol=0)
    error = (guess - noise).double()
    torch.testing.assert_close(losses["huber:1"].double(), (2 * ((error**2 + 1).sqrt() - 1)).mean(dim=(1, 2, 3)))


def test_the_delta_that_follows_the_snr_is_that_of_kohyas_scripts():
    """get_huber_threshold_if_needed in library/train_util.py, huber_schedule "snr"."""
    alphas = SCHEDULE.alphas_cumprod
    sigmas = ((1 - alphas) / alphas) ** 0.5
    torch.testing.assert_close(make(loss="huber-snr:0.1").penalty.deltas, (1 - 0.1) / (1 + sigmas) ** 2 + 0.1)


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"loss": "l1"}, {"loss": "huber:0.5"}, {"weighting": "min-snr:5"}, {"noise": "offset:0.5"}),
        {"timesteps": "600-900", "weighting": "debiased", "loss": "huber-snr:0.2"},
    ],
)
def test_the_loss_of_a_zero_prediction_is_what_is_said(options):
    diffusion = make(**options)
    draws = diffusion.draw((40_000, 4, 4, 4), generator())
    loss = diffusion.loss(torch.zeros_like(draws.noise), draws.noise, draws.noise, draws.timesteps).mean()
    assert diffusion.loss_of_zero_prediction == pytest.approx(loss.item(), rel=0.02)


# Timesteps.


@pytest.mark.parametrize("form", ["uniform", "200-800", "logit-normal:0,1", "logit-normal:-1.5,0.4", "weights:0,1,3,0,2"])
def test_timesteps_are_drawn_by_their_density(form):
    """χ² of 50 bins: with 49 degrees of freedom it is above 100 in one of 30,000 draws."""
    diffusion, count = make(timesteps=form), 100_000
    t = diffusion.draw((count, 1, 1, 1), generator(1)).timesteps
    seen = np.bincount(t.numpy() // 20, minlength=50)
    if form == "uniform":
        share = np.full(1000, 1e-3)
    elif form == "200-800":
        share = np.where((np.arange(1000) >= 200) & (np.arange(1000) < 800), 1 / 600, 0)
    elif form.startswith("weights"):
        share = np.repeat([0, 1, 3, 0, 2], 200) / 1200
    else:
        mean, deviation = map(float, form.partition(":")[2].split(","))
        z = torch.randn(4_000_000, generator=generator(2)).double() * deviation + mean  # the definition, and not the table
        share = np.bincount((torch.sigmoid(z) * 1000).long().clamp(max=999).numpy(), minlength=1000) / len(z)
    expected = share.reshape(50, 20).sum(axis=1) * count
    assert not seen[expected == 0].any()
    usual = expected > 5
    assert ((seen - expected)[usual] ** 2 / expected[usual]).sum() < 110
    torch.testing.assert_close(diffusion.timesteps.probabilities(1000).sum(), torch.tensor(1.0).double())


def test_weights_are_read_from_a_file_and_stay_in_the_options(tmp_path):
    (tmp_path / "w.txt").write_text("0, 1\n3 0 2\n")
    config = DiffusionConfig(timesteps=str(tmp_path / "w.txt"))
    assert config == DiffusionConfig(timesteps="weights:0,1,3,0,2")


# Noise.


def test_offset_noise_has_the_variance_that_is_said_and_is_alike_within_a_channel():
    noise = make(noise="offset:0.5").draw((4000, 4, 4, 4), generator()).noise
    assert noise.var().item() == pytest.approx(1.25, rel=0.02)
    flat = noise.flatten(2)
    assert (flat[..., 0] * flat[..., 7]).mean().item() == pytest.approx(0.25, abs=0.02)  # x² between pixels of a channel
    assert (flat[:, 0, 0] * flat[:, 1, 0]).mean().item() == pytest.approx(0, abs=0.06)  # none between channels


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.floats(0.05, 0.95), st.integers(1, 40), st.integers(1, 40))
def test_pyramid_noise_of_each_sample_has_variance_1(count, levels, decay, h, w):
    noise = make(noise=f"pyramid:{levels},{decay}").draw((count, 4, h, w), generator()).noise
    torch.testing.assert_close(noise.var(dim=(1, 2, 3), correction=0), torch.ones(count), rtol=1e-4, atol=1e-4)
    alone = make(noise=f"pyramid:{levels},{decay}").draw((count, 4, h, w), generator()).noise
    assert torch.equal(noise, alone)


def test_pyramid_noise_correlates_more_the_nearer_pixels_are():
    noise = make(noise="pyramid:6,0.8").draw((500, 4, 32, 32), generator()).noise
    near, far = ((noise[..., :-d] * noise[..., d:]).mean().item() for d in (1, 16))
    assert near > 0.4
    assert near > far + 0.15


def test_input_perturbation_is_added_and_not_predicted():
    plain, perturbed = (make(input_perturbation=g).draw((2000, 4, 4, 4), generator()) for g in (0.0, 0.3))
    assert plain.added is plain.noise
    assert torch.equal(perturbed.noise, plain.noise)
    assert torch.equal(perturbed.timesteps, plain.timesteps)
    assert (perturbed.added - perturbed.noise).std().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "min-snr"}, "--weighting min-snr: choose from none, min-snr:γ"),
        ({"weighting": "min-snr:0"}, "--weighting min-snr:0: it is min-snr:γ, with γ between 0 and inf"),
        ({"weighting": "debiased:3"}, "--weighting debiased:3: choose from"),
        ({"loss": "huber:nan"}, "it is huber:δ"),
        ({"loss": "huber:1,2"}, "it is huber:δ"),
        ({"loss": "huber:1e30"}, "it is huber:δ, with δ between 1e-06 and 1e+06"),  # δ² is infinite in float32
        ({"loss": "huber-snr:1e-30"}, "it is huber-snr:δ"),
        ({"noise": "pyramid:2.5,0.3"}, "LEVELS between 0 and 13"),
        ({"noise": "offset:"}, "it is offset:x"),
        ({"timesteps": "800-200"}, "HIGH, which is not drawn, must be the larger one"),
        ({"timesteps": "nowhere.txt"}, "choose from uniform, LOW-HIGH"),
        ({"timesteps": "weights:0,0"}, "not all of them 0"),
        ({"timesteps": "weights:1,-1"}, "numbers of at least 0"),
        ({"timesteps": "weights:" + "1," * 1001}, "1001 weights for the 1000 timesteps"),
        ({"timesteps": "0-1001"}, "the schedule of --model has 1000 timesteps"),
        ({"input_perturbation": -0.1}, "--input-perturbation"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(UserError) as error:
        make(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("weights", ["weights:1e308,1e308,0", "weights:1e-320,1e-320,0"])
def test_only_the_ratios_of_weights_count(weights):
    timesteps = choose_timesteps(DiffusionConfig(timesteps=weights), 9, torch.device("cpu"))
    assert torch.equal(timesteps.probabilities(9), torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0]).double() / 6)
    assert set(timesteps.draw(500, generator()).tolist()) == set(range(6))


@given(st.sampled_from(sorted(FORMS)), st.text(max_size=12))
def test_any_text_is_read_or_refused(option, text):
    group, config = OptimiserConfig if option == "lr_schedule" else DiffusionConfig, None
    with suppress(UserError):
        config = group(**{option: text})
    assert config is None or group(**{option: getattr(config, option)}) == config


# The loss mask.


def masked_loss(mask: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Loss [B] of predictions that are wrong by `error` [B, 4, h, w]."""
    t = torch.full((len(error),), 500)
    return make().loss(error, torch.zeros_like(error), torch.zeros_like(error), t, weights_of_mask(mask))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (104, 152)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_mask_of_ones_changes_no_bit(prediction_type, size):
    x0, noise, t = torch.randn(3, 4, *size), torch.randn(3, 4, *size), torch.tensor([1, 500, 900])
    guess = torch.randn(3, 4, *size)
    diffusion = make(prediction_type, weighting="min-snr:5")
    plain = diffusion.loss(guess, x0, noise, t)
    assert torch.equal(diffusion.loss(guess, x0, noise, t, weights_of_mask(torch.ones(3, 1, *size))), plain)


def test_the_masked_loss_is_the_mean_over_the_masked_area():
    error, mask = torch.randn(3, 4, 6, 5, requires_grad=True), torch.rand(3, 1, 6, 5)
    mask[0, :, :4], mask[1, :, 1:] = 0, 0
    loss = masked_loss(mask, error)
    wanted = (mask * error.square()).sum(dim=(1, 2, 3)) / (4 * mask.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(masked_loss(mask / 3, error), loss)  # only the ratio of weights matters
    assert torch.equal(masked_loss(mask, torch.where(mask > 0, error, 1e6)), loss)
    loss.sum().backward()
    assert torch.equal(error.grad != 0, (mask > 0).expand(-1, 4, -1, -1))


def test_an_empty_mask_gives_no_loss():
    error, mask = torch.randn(2, 4, 6, 5, requires_grad=True), torch.zeros(2, 1, 6, 5)
    mask[1, 0, 2, 3] = 1 / 255
    loss = masked_loss(mask, error)
    torch.testing.assert_close(loss, torch.stack([torch.tensor(0.0), error[1, :, 2, 3].square().mean()]))
    loss.mean().backward()
    assert not error.grad[0].any()
    assert error.grad[1].isfinite().all()


def test_draw_is_a_function_of_the_generator():
    first, same, other = (make().draw((4, 4, 8, 8), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[2], same[2])
    assert not torch.equal(first[0], other[0])
    t = make().draw((20_000, 1, 1, 1), torch.Generator().manual_seed(0))[2]
    assert (t.min(), t.max()) == (0, 999)
    assert abs(t.float().mean() - 499.5) < 10
