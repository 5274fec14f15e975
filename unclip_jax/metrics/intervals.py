"""How far a measured number can be trusted: intervals for shares, and by the bootstrap (Efron 1979)."""

import math
from collections.abc import Callable

import numpy as np

Z95 = 1.959964


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval for a share of k in n (Wilson 1927), 95% by default; within [0, 1], sound for k = 0 and n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def counts(n: int, replicates: int, seed: int = 0) -> np.ndarray:
    """How often each of n examples is in each resample, f64[replicates, n]; every row sums to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), replicates).astype(np.float64)


def bootstrap(statistic: Callable[[int], float], value: float, replicates: int) -> tuple[float, float]:
    """value -+ 1.96 standard deviations of `statistic(r)`, the value on resample r = 0 … replicates - 1.

    Not the resamples' own percentiles: distances such as FID grow when examples repeat, so those lie too high.
    """
    spread = np.std([statistic(r) for r in range(replicates)], ddof=1)
    return value - Z95 * float(spread), value + Z95 * float(spread)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The interval for the mean of values [N] that the bootstrap tends to: -+ 1.96 sd / sqrt(N)."""
    values = np.asarray(values, np.float64)
    half = Z95 * float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half
