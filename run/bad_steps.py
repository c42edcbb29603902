"""Where a number that is not finite comes from."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


@contextmanager
def largest_values(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """{path: [largest |activation|, largest |its gradient|]} of every module without children, as the model runs inside.

    NaN where there was one. Every value is read by the host, so this is for looking into a step, not for every step.
    """
    seen: dict[str, list[float]] = {}

    def note(name: str, which: int, tensor: Tensor) -> None:
        old, new = seen.setdefault(name, [0.0, 0.0]), tensor.detach().abs().max().item()
        if not new <= old[which] and old[which] == old[which]:  # a NaN takes the place of any number, and keeps it
            old[which] = new

    def hook(name: str, module: nn.Module, given: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            note(name, 0, output)
            if output.requires_grad:
                output.register_hook(partial(note, name, 1))

    leaves = ((name, module) for name, module in model.named_modules() if next(module.children(), None) is None)
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
