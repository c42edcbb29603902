"""AdamW in 8 and 32 bits, and its loss scale."""

import torch
from torch import Tensor

# Optimiser.


def make_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with weight decay 0.01 over flat parameters.

    Both kinds take part in GradScaler's protocol for fused optimisers: the skipped step of an overflow is decided on the
    device, so that no step waits for the host.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """8-bit states, quantised in blocks (Dettmers et al. 2021, arXiv:2110.02861).

        Unlike its parent it waits for the device nowhere. A step that overflowed is taken back on the device; the bias
        correction, a number of the host, counts it all the same.
        """

        _step_supports_amp_scaling = True  # GradScaler then sets self.found_inf instead of reading it on the host

        @torch.no_grad()
        def step(self) -> None:
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            for i, group in enumerate(self.param_groups):
                for j, p in enumerate(group["params"]):
                    if not self.state[p]:
                        self.init_state(group, p, i, j)
                    live = [p, *(self.state[p][name] for name in ("state1", "state2", "absmax1", "absmax2"))]
                    kept = [t.clone() for t in live]
                    self.update_step(group, p, i, j)
                    if found_inf is not None:
                        for now, before in zip(live, kept, strict=True):
                            now.copy_(torch.where(found_inf > 0, before, now))

    return AdamW8bit(groups, weight_decay=0.01, min_8bit_size=0)


def update_scale(scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """scaler.update(), but a loss that is not finite leaves the scale as it is: no smaller one would mend that.

    `loss`: [], of the step, the same on all ranks. Does not wait for the device.
    """
    one = torch.ones_like(loss)
    kept = scaler.scale(one)
    scaler.update()
    scaler.update(torch.where(loss.isfinite(), scaler.scale(one), kept))


def bytes_per_trained(optimizer: str, dtype: torch.dtype) -> int:
    """What a trained parameter takes besides the activations: itself, gradient, states, copies in `dtype` and of a step."""
    copies = 0 if dtype == torch.float32 else 2 * dtype.itemsize
    return 4 + 4 + copies + (2 + 10 if optimizer == "adamw8bit" else 8)
