"""Means over images with their 95 % intervals. They are Student's: for a handful of images a bootstrap is far too narrow."""

import math
from typing import NamedTuple

import numpy as np

# 97.5 % quantiles of Student's t for 1 … 10 degrees of freedom; beyond, its expansion around the normal quantile.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Interval(NamedTuple):
    """A mean, and between what it lies with 95 %; NaN if one image alone was measured."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.low)


def quantile(freedom: float) -> float:
    """97.5 % of Student's t distribution with `freedom` degrees of freedom; NaN below 1."""
    if freedom < 1:
        return math.nan
    whole = math.floor(freedom)
    return QUANTILES[whole - 1] if whole <= len(QUANTILES) else 1.96 + 2.372 / whole + 2.823 / whole**2 + 2.556 / whole**3


def around(mean: float, squared_error: float, freedom: float) -> Interval:
    """`squared_error`: that of the mean, in the square."""
    half = quantile(freedom) * math.sqrt(squared_error)
    return Interval(mean, mean - half, mean + half)


def mean_of(values: np.ndarray) -> Interval:
    """Of one number for each image, [N]."""
    return share_of(values, np.ones(len(values)))


def linearised(part: np.ndarray, whole: np.ndarray) -> tuple[float, float, int]:
    """(R, its squared error, degrees of freedom) of R = Σ part / Σ whole over N images, to first order (Cochran 1977, Sampling
    Techniques, section 6.3).
    """
    n, ratio = len(part), part.sum() / whole.sum()
    residuals = (part - ratio * whole) / whole.mean()
    return float(ratio), float(residuals.var(ddof=1) / n) if n > 1 else math.nan, n - 1


def share_of(part: np.ndarray, whole: np.ndarray) -> Interval:
    """Σ part / Σ whole, both [N], a number for each image."""
    return around(*linearised(part, whole))


def difference(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> Interval:
    """share_of(*first) - share_of(*second) of different images (Welch 1947)."""
    (a, a_error, a_freedom), (b, b_error, b_freedom) = linearised(*first), linearised(*second)
    if not min(a_freedom, b_freedom):
        return Interval(a - b, math.nan, math.nan)
    total = a_error + b_error
    parts = a_error**2 / a_freedom + b_error**2 / b_freedom
    return around(a - b, total, total**2 / parts if parts else 1e9)
