import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from common.errors import UserError
from model.diffusion import Diffusion, weights_of_mask
from options.training import DiffusionConfig

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def make(prediction_type: str = "epsilon", **options) -> Diffusion:
    return Diffusion(DiffusionConfig(**options), SCHEDULE.alphas_cumprod, prediction_type, torch.device("cpu"))


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_diffusers(prediction_type):
    t = torch.arange(1000)
    snr = compute_snr(SCHEDULE, t)
    wanted = snr.clamp(max=5) / (snr + (prediction_type == "v_prediction"))
    torch.testing.assert_close(make(prediction_type, snr_gamma=5.0).weights, wanted)
    assert torch.equal(make(prediction_type).weights, torch.ones(1000))


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
    diffusion = make(prediction_type, snr_gamma=5.0)
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
    assert torch.equal(first[1], same[1])
    assert not torch.equal(first[0], other[0])
    t = make().draw((20_000, 1, 1, 1), torch.Generator().manual_seed(0))[1]
    assert (t.min(), t.max()) == (0, 999)
    assert abs(t.float().mean() - 499.5) < 10


def test_bad_gamma():
    with pytest.raises(UserError, match="--snr-gamma"):
        DiffusionConfig(snr_gamma=0.0)
