"""AdamW with 8-bit states, and the update of the loss scale."""

from functools import cache

import torch
from torch import Tensor

STATE_BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit states


@cache
def adamw8bit() -> type[torch.optim.Optimizer]:
    """AdamW with 8-bit states. A function, because importing bitsandbytes takes seconds."""
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """8-bit states, quantised in blocks (Dettmers et al. 2021, arXiv:2110.02861).

        Unlike its parent's, this step never makes the host wait for the work it has just launched. It is always made, and
        undone on the device where `found_inf` is above 0. The step count of the bias correction is on the host: before the
        next step, or a save, it is corrected by the flag of the last one, which has arrived by then.

        The library keeps 32 bits for tensors below 4,096 values, which hardly take memory. This one does not: the error is that
        of a block, 2 % of an update whatever the size of the tensor (measured), and `flat` stays one parameter a group.
        """

        _step_supports_amp_scaling = True
        last_skipped: tuple[Tensor, torch.cuda.Event | None] | None = None

        def uncount_skipped(self) -> None:
            """Takes the last step back from the count if it changed nothing. Waits for that step on the device."""
            if self.last_skipped is None:
                return
            (flag, arrived), self.last_skipped = self.last_skipped, None
            if arrived:
                arrived.synchronize()
            for state in self.state.values() if flag.item() > 0 else ():
                state["step"] -= 1

        def state_dict(self) -> dict:
            self.uncount_skipped()
            return super().state_dict()

        @torch.no_grad()
        def step(self) -> None:
            self.uncount_skipped()
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            for i, group in enumerate(self.param_groups):
                for j, p in enumerate(group["params"]):
                    if p.grad is None:
                        continue
                    if not self.state[p]:
                        self.init_state(group, p, i, j)
                    changed = [p, *(self.state[p][name] for name in ("state1", "state2", "absmax1", "absmax2"))]
                    backups = [t.clone() for t in changed]
                    self.update_step(group, p, i, j)
                    if found_inf is not None:
                        for tensor, backup in zip(changed, backups, strict=True):
                            tensor.copy_(torch.where(found_inf > 0, backup, tensor))
            if found_inf is not None:
                on_host = found_inf.to("cpu", non_blocking=True, copy=True)
                self.last_skipped = on_host, torch.cuda.current_stream().record_event() if found_inf.is_cuda else None

    return AdamW8bit


def spread(packed: Tensor, filled: Tensor) -> Tensor:
    """packed [n] -> zeros of the shape of `filled` (bool, n of them true), with `packed` where it is true; on the CPU."""
    return torch.zeros(filled.shape, dtype=packed.dtype).masked_scatter_(filled, packed)


def pad_state(state: dict, filled: Tensor) -> None:
    """Brings a parameter's saved state, of a commit that did not pad, into the shape of `filled`, which is True at its values.

    8-bit states are quantised again in the new blocks: what a block had lost to its neighbour's maximum stays lost.
    """
    state.update(state.pop("__bnb_optimizer_quant_state__", {}))
    unpadded = {"exp_avg", "exp_avg_sq", "state1", "state2"} & state.keys() if not filled.all() else ()
    for name in [name for name in unpadded if len(state[name]) != len(filled)]:
        if name.startswith("exp"):
            state[name] = spread(state[name], filled)
            continue
        from bitsandbytes.functional import quantize_blockwise

        code, absmax = state[name.replace("state", "qmap")], name.replace("state", "absmax")
        scales = state[absmax].repeat_interleave(STATE_BLOCK)[: len(state[name])]
        values = spread(code[state[name].long()] * scales, filled)
        state[name], quantised = quantize_blockwise(values, code=code, blocksize=STATE_BLOCK)
        state[absmax] = quantised.absmax


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
