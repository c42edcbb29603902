"""Prior preservation, so that what was not to be learned stays as it was.

With pictures (DreamBooth: Ruiz et al. 2023, arXiv:2208.12242), those of the class in general are trained on, too. Without, a
part of every batch learns what the base itself predicts, for captions without the trigger.
"""

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.seeds import seed_of
from data import Batch, Workload, open_data
from dataset.captions import without_trigger
from dataset.sources import Source, with_prior
from lora import Adapter
from memory import to_device
from model.diffusion import weights_of_mask
from options.training import CaptionConfig, PriorConfig, TrainConfig
from run.setup import TrainingModel

PRIOR = 21  # separates these random numbers from those of the step


def add_prior(config: TrainConfig, training: Source) -> Source:
    """What batches are drawn from: `training`, and the pictures of --prior-data with their share. Raises UserError if these
    cannot be read, or not beside those.
    """
    if not config.prior.prior_data:
        return training
    files = replace(config.caption_files, caption=None)  # that is a caption for what is to be learned
    try:
        prior = open_data(replace(config.dataset, data=config.prior.prior_data), files)
    except UserError as error:
        raise UserError(f"--prior-data {str(error).removeprefix('--data: ')}") from None
    return with_prior(training, prior, config.prior.prior_share)


def counting_graphs(workload: Workload, config: PriorConfig) -> Workload:
    """Batches differ in how many images learn the prior, too: each number of them has its own CUDA graph."""
    whole = (config.share_of_base * workload.batch).is_integer()
    return workload if whole else workload._replace(shapes=2 * workload.shapes)


class Prior:
    """The pictures of --prior-data have a weight of their own. Without them, the first k images of a batch get captions without
    the trigger, and for a target what the base predicts for those from the same latents. The base: without LoRA, with what
    --base-lora merged.

    k is share · B on average, and never further than 1 from it; which images come first is random already. So the base computes
    only what is needed. With a share of 0 k is 0, and nothing changes.
    """

    def __init__(self, config: PriorConfig, captions: CaptionConfig, seed: int, model: TrainingModel, adapter: Adapter):
        """Raises UserError if captions are encoded already."""
        if config.share_of_base and model.denoiser.text_encoder is None:
            raise UserError(
                "--prior-share: this text was encoded with its trigger already, by cache_latents.py: leave out --text"
            )
        self.config, self.captions, self.seed, self.model, self.adapter = config, captions, seed, model, adapter

    def rows(self, batch: Batch, step: int, place: int) -> tuple[list[str], Tensor | None, Tensor]:
        """(captions; weights of the error [B, 1, h, w] or [B, 1, 1, 1] or None: 1 everywhere; [k]), a function of (seed, step,
        place of the batch in the step), the tensors on the device. A loss mask does not count where the base's prediction is
        learned.
        """
        draw = random.Random(seed_of(self.seed, 0, step, place, PRIOR))
        size = len(batch.captions)
        k = int(self.config.share_of_base * size + draw.random())
        prompts = self.config.prior_prompts
        own = [without_trigger(caption, self.captions) for caption in batch.captions[:k]]
        captions = (draw.choices(prompts, k=k) if prompts else own) + batch.captions[k:]
        weights = None if batch.mask is None else weights_of_mask(batch.mask)
        if k or self.config.prior_data:  # though none of its pictures may be in this batch: one shape, one CUDA graph
            weights = torch.ones(size, 1, 1, 1) if weights is None else weights
            weights[:k] = self.config.prior_weight
            weights[batch.of_prior] *= self.config.prior_weight
        device = self.model.device
        return captions, None if weights is None else to_device(weights, device), torch.empty(k, device=device)

    def target(self, target: Tensor, noisy: Tensor, x: Any) -> Tensor:
        """`target` [B, 4, h, w] with what the base predicts from `noisy` put in; `x`: train_lora.StepInputs."""
        k = len(x.prior)
        if not k:
            return target
        with torch.no_grad(), self.adapter.scaled(0), self.adapter.dropout(None):
            of_base = self.model.denoiser(noisy[:k], x.timesteps[:k], tuple(part[:k] for part in x.text), x.time_ids[:k])
        return torch.cat([of_base.float(), target[k:]])
