import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffusion import Diffusion, DiffusionConfig
from errors import UserError

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def make(prediction_type: str = "epsilon", **options) -> Diffusion:
    return Diffusion(DiffusionConfig(**options), SCHEDULE.alphas_cumprod, prediction_type, torch.device("cpu"))


def test_schedule_noising_and_targets_equal_ddpm_scheduler(pipe):
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, SCHEDULE.alphas_cumprod)
    x0, noise, t = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(make().add_noise(x0, noise, t), SCHEDULE.add_noise(x0, noise, t))
    torch.testing.assert_close(make("v_prediction").target(x0, noise, t), SCHEDULE.get_velocity(x0, noise, t))
    assert make().target(x0, noise, t) is noise


def test_perfect_prediction_has_no_loss_and_zero_prediction_the_noise():
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 900])
    assert torch.equal(make()(lambda x, t: noise, x0, noise, t), torch.zeros(3))
    loss = make()(lambda x, t: torch.zeros_like(x), x0, noise, t)
    torch.testing.assert_close(loss, noise.square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_diffusers(prediction_type):
    t = torch.arange(1000)
    snr = compute_snr(SCHEDULE, t)
    wanted = snr.clamp(max=5) / (snr + (prediction_type == "v_prediction"))
    torch.testing.assert_close(make(prediction_type, snr_gamma=5.0).weights, wanted)
    assert torch.equal(make(prediction_type).weights, torch.ones(1000))


def test_draw_is_a_function_of_the_generator():
    one, same, other = (make().draw((4, 4, 8, 8), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], other[0])
    t = make().draw((20_000, 1, 1, 1), torch.Generator().manual_seed(0))[1]
    assert (t.min(), t.max()) == (0, 999)
    assert abs(t.float().mean() - 499.5) < 10


def test_other_predictions_are_refused():
    with pytest.raises(UserError, match="--model predicts 'sample'"):
        make("sample")


def test_bad_gamma():
    with pytest.raises(UserError, match="--snr-gamma"):
        DiffusionConfig(snr_gamma=0.0)
