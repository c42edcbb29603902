"""AdamW with 8-bit or 32-bit states, and the update of the loss scale."""

import torch
from torch import Tensor

# Optimiser.


def make_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with weight decay 0.01 over flat parameters.

    `name`: "adamw" or "adamw8bit". Both follow GradScaler's protocol for fused optimisers. An ordinary optimiser's step is
    skipped by the host: GradScaler reads whether a gradient overflowed with .item(), for which the host waits in every step.
    One with `_step_supports_amp_scaling = True` is always called, and does what the flag says by itself, on the device: it
    finds it in its attribute `found_inf`, a float32 scalar that is 0, or above 0 if the step must change nothing. GradScaler
    sets this attribute before `step()` and deletes it afterwards; if the scaler is disabled, the caller may set it.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """8-bit states, quantised in blocks (Dettmers et al. 2021, arXiv:2110.02861).

        Unlike its parent's, this step never makes the host wait for the device. It is always made, and undone on the device
        where `found_inf` is above 0. Only the step count of the bias correction, which is on the host, goes on.
        """

        _step_supports_amp_scaling = True

        @torch.no_grad()
        def step(self) -> None:
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            for i, group in enumerate(self.param_groups):
                for j, p in enumerate(group["params"]):
                    if not self.state[p]:
                        self.init_state(group, p, i, j)
                    changed = [p, *(self.state[p][name] for name in ("state1", "state2", "absmax1", "absmax2"))]
                    backups = [t.clone() for t in changed]
                    self.update_step(group, p, i, j)
                    if found_inf is not None:
                        for tensor, backup in zip(changed, backups, strict=True):
                            tensor.copy_(torch.where(found_inf > 0, backup, tensor))

    return AdamW8bit(groups, weight_decay=0.01, min_8bit_size=0)


def update_scale(scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """Like scaler.update(), except that a loss that is not finite leaves the scale as it was.

    A step is skipped because a gradient overflowed, which a smaller scale avoids, or because the loss itself, which is
    unscaled, is not finite, which no scale can avoid: halving it for every such batch would only lose small gradients.

    `update()` runs twice because the host cannot choose between the two cases without waiting for `loss`. The first call
    does what it always does: it halves or grows the scale and clears the records of this step. The second sets the scale to
    the value that is then selected on the device: the new one, or the one before.

    `loss`: [], of the step, the same on all ranks.
    """
    one = torch.ones_like(loss)
    scale_before = scaler.scale(one)  # 1 × scale: the scale as a tensor, which GradScaler gives only as a number of the host
    scaler.update()
    scaler.update(torch.where(loss.isfinite(), scaler.scale(one), scale_before))


def bytes_per_trained(optimizer: str, dtype: torch.dtype) -> int:
    """Bytes of memory per trained parameter, for everything but activations. `dtype`: of the base and the activations."""
    parameter, gradient = 4, 4  # float32
    low_precision = 0 if dtype == torch.float32 else 2 * dtype.itemsize  # copies of both, see lora.Adapter
    states = 2 + 10 if optimizer == "adamw8bit" else 8  # 10: while it steps, 6 for the backups and 4 for a selected result
    return parameter + gradient + low_precision + states
