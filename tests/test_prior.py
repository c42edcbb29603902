"""Prior preservation: a share of each batch learns what the base predicts for captions without the trigger."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lora import shake

from common.errors import UserError
from data import Batch, Workload
from dataset.captions import with_trigger, without_trigger
from dataset.sources import Source
from lora import add_lora
from options.training import CaptionConfig, DataConfig, DiffusionConfig, LoRAConfig, PriorConfig, TrainConfig
from run.accumulation import rows_of
from run.prior import Prior, counting_graphs
from run.ranks import Ranks
from run.setup import TrainingModel
from train_lora import TrainStep

CPU = torch.device("cpu")
SIZE = 10


def batch_of(size: int, mask: torch.Tensor | None = None) -> Batch:
    side = torch.tensor([[64, 64]] * size)
    images = torch.randint(0, 256, (size, 64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    captions = [f"nrt a cat {n}" for n in range(size)]
    return Batch(images, captions, side, torch.zeros_like(side), side, captions, [], mask)


@pytest.fixture
def make_step(pipe):
    """make_step(prior_share=…) -> a TrainStep of the tiny model, whose B are 0."""

    def make(size: int = SIZE, lora: Mapping = MappingProxyType({}), **options) -> TrainStep:
        config = TrainConfig(
            prior=PriorConfig(**options),
            captions=CaptionConfig(trigger="nrt"),
            dataset=DataConfig(bs=size),
            diffusion=DiffusionConfig(weighting="min-snr:5"),
        )
        work = Workload(size, 64, 1, 1, False, False)
        plan = SimpleNamespace(base="fp32", whole_vae=True)
        model = TrainingModel(pipe, "tiny", Source([], [], ""), CaptionConfig(), work, plan, CPU)
        adapter = add_lora(model.denoiser, LoRAConfig(rank=2, **lora), model.denoiser.unused)
        config = dataclasses.replace(config, memory=config.memory.resolved(CPU))
        return TrainStep(config, model, adapter, torch.amp.GradScaler("cpu", enabled=False), Ranks(0, 1))

    return make


def check_losses_and_gradient(step: Any, x: Any, expected: torch.Tensor) -> torch.Tensor:
    """`expected` [B]: the losses of a formula, of which autograd takes the gradient. Returns that."""
    torch.testing.assert_close(step.losses(x), expected, rtol=1e-4, atol=1e-7)
    expected.mean().backward()
    of_formula = step.adapter.grad.clone()
    step.adapter.zero_gradients()
    step.backward(x)
    torch.testing.assert_close(step.adapter.grad, of_formula, rtol=1e-3, atol=1e-6)
    return of_formula


def test_nothing_is_to_be_learned_while_the_model_is_the_base(make_step):
    """Exactly, where all images of a piece learn the prior; and to rounding beside others."""
    step = make_step(prior_share=0.9)
    x = step.inputs(batch_of(SIZE), 0, 0)
    assert len(x.prior) == 9
    assert step.backward(rows_of(x, slice(0, 9))) == 0
    assert not step.adapter.grad.any()
    losses = step.losses(x).detach()
    assert losses[:9].max() < 1e-9 < 1e-3 < losses[9]


def test_the_gradient_is_that_of_the_bases_own_prediction(make_step):
    """Against the formula, with a copy of the base that was made before there was LoRA; the others learn their noise."""
    step = make_step(prior_share=0.25, prior_weight=3.0, prior_prompts=("a dog",))
    shake(step.adapter)
    x = next(x for number in range(9) if len((x := step.inputs(batch_of(SIZE), number, 0)).prior) == 2)
    denoiser, diffusion = step.model.denoiser, step.diffusion
    latents = step.model.encode(x.images, x.posterior_noise)
    noisy = diffusion.add_noise(latents, x.noise, x.timesteps)
    kept = step.adapter.low.clone()
    for module in step.adapter.modules.values():
        module.lora_B.data.zero_()
    with torch.no_grad():
        of_base = denoiser(noisy, x.timesteps, x.text, x.time_ids)
    step.adapter.low.copy_(kept)
    prediction = denoiser(noisy, x.timesteps, x.text, x.time_ids)
    towards = torch.cat([of_base[:2], x.noise[2:]])
    errors = (prediction - towards).square().mean(dim=(1, 2, 3)) * diffusion.weights[x.timesteps]
    expected = torch.cat([3 * errors[:2], errors[2:]])
    check_losses_and_gradient(step, x, expected)
    assert torch.equal(step.adapter.low, kept)
    pieces = [step.losses(rows_of(x, slice(begin, begin + 3))) for begin in range(0, SIZE, 3)]
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-4, atol=1e-7)


def test_ranks_that_are_left_out_do_not_touch_the_base(make_step):
    """It computes fewer images than there are factors for."""
    step = make_step(size=3, lora={"rank_dropout": 0.5}, prior_share=0.4)
    x = next(x for number in range(9) if len((x := step.inputs(batch_of(3), number, 0)).prior) == 1)
    assert x.kept_ranks.shape == (3, step.adapter.dropout.ranks)
    plain = step.losses(x)
    with step.adapter.dropout(x.kept_ranks):
        torch.testing.assert_close(step.losses(x), plain)  # B is 0
        shake(step.adapter)
        loss = step.losses(x)
    assert not torch.allclose(step.losses(x), loss)
    step.backward(x)
    assert step.adapter.dropout.factors is None


def prior_of(seed: int = 0, text_encoder: object = True, **options) -> Prior:
    model = SimpleNamespace(device=CPU, denoiser=SimpleNamespace(text_encoder=text_encoder))
    return Prior(PriorConfig(**options), CaptionConfig(trigger="nrt"), seed, model, None)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.9), st.integers(1, 12), st.integers(0, 2**63 - 1))
def test_the_share_is_met_on_average_and_by_every_batch_within_one(share, size, seed):
    prior, prompts = prior_of(seed, prior_share=share, prior_prompts=("a", "b")), Counter()
    lengths, batch = [], batch_of(size)
    for step in range(300):
        captions, weights, rows = prior.rows(batch, step, 0)
        k = len(rows)
        assert abs(k - share * size) < 1
        assert captions[k:] == batch.captions[k:]
        assert (weights is None) == (k == 0)
        prompts.update(captions[:k])
        lengths.append(k)
    assert abs(sum(lengths) / 300 - share * size) < 0.15  # five standard deviations
    assert set(prompts) <= {"a", "b"}
    assert lengths == [len(prior.rows(batch, step, 0)[2]) for step in range(300)]


def test_other_batches_and_seeds_draw_otherwise():
    def draws(seed=0, place=0):
        prior = prior_of(seed, prior_share=0.5)
        return [len(prior.rows(batch_of(1), step, place)[2]) for step in range(40)]

    assert len({tuple(draws(**one)) for one in ({}, {"seed": 1}, {"place": 1})}) == 3


def test_a_mask_counts_only_where_the_picture_is_learned():
    mask = torch.zeros(4, 1, 8, 8)
    mask[:, :, :4] = 1
    _, weights, rows = prior_of(prior_share=0.5, prior_weight=0.25).rows(batch_of(4, mask), 0, 0)
    assert len(rows) == 2
    assert (weights[:2] == 0.25).all()
    assert torch.equal(weights[2:], 2 * mask[2:])


def test_cached_text_is_refused():
    with pytest.raises(UserError, match=r"--prior-share: this text was encoded with its trigger already"):
        prior_of(text_encoder=None, prior_share=0.5)
    prior_of(text_encoder=None)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=8), st.text(max_size=12), st.booleans())
def test_without_prompts_their_own_captions_lose_the_trigger(trigger, caption, tags):
    config = CaptionConfig(trigger=trigger, shuffle_tags=tags)
    assert without_trigger(with_trigger(caption, config), config) == caption
    prior = Prior(PriorConfig(prior_share=0.9), CaptionConfig(trigger="nrt"), 0, prior_of().model, None)
    captions, _, rows = prior.rows(batch_of(4), 0, 0)
    assert captions == [f"{'' if n < len(rows) else 'nrt '}a cat {n}" for n in range(4)]
    assert len(rows) >= 3


@pytest.mark.parametrize(("share", "size", "graphs"), [(0.0, 3, 5), (0.25, 4, 5), (0.25, 3, 10)])
def test_each_number_of_prior_images_has_its_graph_in_the_plan(share, size, graphs):
    assert counting_graphs(Workload(size, 64, 1, 5, False, False), PriorConfig(prior_share=share)).shapes == graphs


def test_a_run_resumes_bit_for_bit(train, cutouts, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n\na house\n")
    options = ["--data", cutouts, "--masked-loss", "--prior-share", 0.4, "--prior-weight", 2, "--prior-prompts", prompts]
    options += ["--trigger", "nrt", "--grad-accum", 2, "--base-precision", "int8"]
    train(*options, "--steps", 2)
    train(*options, "--steps", 1, "--out", tmp_path / "b")
    train(*options, "--steps", 2, "--out", tmp_path / "b")
    whole, resumed = (load_file(tmp_path / name / "pytorch_lora_weights_2.safetensors") for name in ("out", "b"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(("weight", "masked"), [(0.0, False), (0.5, False), (3.0, True)])
def test_pictures_of_the_prior_learn_their_noise_with_a_weight(make_step, weight, masked):
    """Against the formula. With a weight of 0 the gradient is that of the other rows, bit for bit where these are alone."""
    step = make_step(size=4, prior_data=("reg",), prior_weight=weight or 1.0)
    object.__setattr__(step.prior.config, "prior_weight", weight)  # 0 is no use, so no option
    shake(step.adapter)
    mask = torch.ones(4, 1, 8, 8)
    mask[1:, :, :4] = 0
    batch = dataclasses.replace(batch_of(4, mask if masked else None), of_prior=[True, False, True, False])
    x = step.inputs(batch, 0, 0)
    assert len(x.prior) == 0
    assert torch.equal(x.text[0], step.model.text_inputs(batch.captions, ())[0])  # the stream has left the trigger away
    latents = step.model.encode(x.images, x.posterior_noise)
    noisy = step.diffusion.add_noise(latents, x.noise, x.timesteps)
    errors = (step.model.denoiser(noisy, x.timesteps, x.text, x.time_ids) - x.noise).square()
    errors = (errors * mask / mask.mean(dim=(1, 2, 3), keepdim=True) if masked else errors).mean(dim=(1, 2, 3))
    expected = errors * step.diffusion.weights[x.timesteps] * torch.tensor([weight, 1, weight, 1])
    of_formula = check_losses_and_gradient(step, x, expected)
    if weight == 0:
        step.adapter.zero_gradients()
        for n in (1, 3):
            step.backward(rows_of(x, slice(n, n + 1)))
        torch.testing.assert_close(step.adapter.grad, of_formula, rtol=1e-3, atol=1e-6)
        step.adapter.zero_gradients()
        assert step.backward(rows_of(x, slice(0, 1))) == 0
        assert not step.adapter.grad.any()


def test_the_shape_of_weights_does_not_depend_on_where_the_prior_is():
    """A CUDA graph is recorded once."""
    prior = prior_of(prior_data=("reg",), prior_weight=2.0)
    for mask, shape in ((None, (3, 1, 1, 1)), (torch.ones(3, 1, 8, 8), (3, 1, 8, 8))):
        for of_prior in ([False] * 3, [True, False, True], [True] * 3):
            captions, weights, rows = prior.rows(dataclasses.replace(batch_of(3, mask), of_prior=of_prior), 0, 0)
            assert captions == batch_of(3).captions
            assert weights.shape == shape
            assert weights[:, 0, 0, 0].tolist() == [2 if one else 1 for one in of_prior]
            assert len(rows) == 0
    assert counting_graphs(Workload(3, 64, 1, 5, False, False), PriorConfig(prior_data=("reg",))).shapes == 5
    prior_of(text_encoder=None, prior_data=("reg",))  # encoded captions are as good


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(UserError, match="--prior-prompts does nothing with --prior-data"):
        PriorConfig(prior_data=("reg",), prior_prompts=("a",))
    with pytest.raises(UserError, match=r"--prior-share must lie in 0…0\.9, not 1"):
        PriorConfig(prior_data=("reg",), prior_share=1.0)
    for options in ({"prior_weight": 2.0}, {"prior_prompts": ("a",)}):
        with pytest.raises(UserError, match="do nothing without --prior-share"):
            PriorConfig(**options)
    with pytest.raises(UserError, match=r"--prior-prompts .*no\.txt cannot be read"):
        PriorConfig(prior_share=0.5, prior_prompts=(str(tmp_path / "no.txt"),))
    with pytest.raises(UserError, match=r"--prior-prompts b\.TXT: texts, or one \.txt file with one on each line"):
        PriorConfig(prior_share=0.5, prior_prompts=("a", "b.TXT"))
    with pytest.raises(UserError, match="--prior-weight must be above 0 and at most"):
        PriorConfig(prior_share=0.5, prior_weight=1e308)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        PriorConfig(prior_share=0.5, prior_prompts=(str(tmp_path / "empty.txt"),))
    with pytest.raises(UserError, match="--prior-share needs a --trigger, so that"):
        TrainConfig(prior=PriorConfig(prior_share=0.5))
    with pytest.raises(UserError, match="'a Nrt cat' holds the --trigger"):
        TrainConfig(prior=PriorConfig(prior_share=0.5, prior_prompts=("a Nrt cat",)), captions=CaptionConfig(trigger="nrt"))
