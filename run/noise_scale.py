"""How noisy the gradient is: the batch that it would take to see where it points."""

from torch import Tensor

from performance.adamw8bit import STATE_BLOCK

EVERY = 8  # blocks of the gradient: one of so many is looked at, a part of every layer, which costs next to nothing
REMEMBERED = 0.95  # of the sums, at each reading
FAR_OFF = 30  # times the images of a step: then it is worth a sentence


class NoiseScale:
    """The simple noise scale tr Σ / |G|² in images, where Σ is the covariance of a single image's gradient and G its mean
    (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    The paper compares the gradients of small batches with that of the whole. Here the small ones are those of the steps since
    the last reading, and the whole is their mean: so it needs no more than one batch of a step, on one device. It takes the
    weights for constant meanwhile. With n steps of b images, E|g|² = |G|² + tr Σ/b, and of their mean |G|² + tr Σ/(n·b).
    """

    def __init__(self, grad: Tensor, images: int):
        """`grad`: the flat gradient; `images`: of a step, on all ranks."""
        whole = len(grad) // STATE_BLOCK * STATE_BLOCK
        self.blocks, self.images = grad[:whole].view(-1, STATE_BLOCK)[::EVERY], images
        self.total, self.squares, self.steps = self.blocks.clone().zero_(), grad.new_zeros(()), 0
        self.signal = self.noise = 0.0

    def see(self) -> None:
        """The gradient of a step, unscaled and not clipped. The host does not wait."""
        self.total += self.blocks
        self.squares += self.blocks.square().sum()
        self.steps += 1

    def read(self) -> float | None:
        """In images; None where nothing can be said yet. The host waits for the device. Overflows spoil a reading, which then
        does not count.
        """
        n, self.steps = self.steps, 0
        of_one, of_mean = self.squares.item() / max(1, n), self.total.square().sum().item() / max(1, n) ** 2
        self.total.zero_()
        self.squares.zero_()
        if n > 1 and of_one < float("inf"):
            self.signal = REMEMBERED * self.signal + (n * of_mean - of_one) / (n - 1)
            self.noise = REMEMBERED * self.noise + (of_one - of_mean) * n / (n - 1) * self.images
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None

    def advice(self) -> str | None:
        """What to do where a step has far too few images."""
        if not (self.signal > 0 and self.noise > FAR_OFF * self.images * self.signal):
            return None
        return (
            f"the gradient is noisy: {self.noise / self.signal:.0f} images would show where it points, a step has "
            f"{self.images}: a larger --grad-accum, or a smaller --lr, learns more evenly"
        )
