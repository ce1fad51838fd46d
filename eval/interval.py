"""A figure with its 95 % interval: by bootstrap, by the jackknife over groups, or from a standard error."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value with the interval that covers what it estimates in about 95 of 100 repetitions.

    ``note`` says how the interval was found. A value that is known without sampling has an interval of no width, which
    is not written.
    """

    value: float
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        interval = "" if self.low == self.value == self.high else f" ({_short(self.low)} to {_short(self.high)})"
        return _short(self.value) + interval

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit; ``factor`` is above 0."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high, self.note)


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def estimate_from_error(value: float, error: float, note: str = "", freedom: float = np.inf) -> Estimate:
    """A value whose error is normal with standard deviation ``error``, which was itself estimated with ``freedom``
    degrees of freedom (Student 1908)."""
    from scipy.special import stdtrit  # late, as it takes longer to import than all that an image needs besides PyTorch
    reach = float(stdtrit(freedom, 0.975)) * error
    return Estimate(value, value - reach, value + reach, note)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 1000,
                   note: str = "bootstrap over samples") -> Estimate:
    """The mean of values (N,), one for each sample, with the percentile interval over resamplings (Efron 1979).

    Raises ValueError where there are no values, or one is not finite.
    """
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values: {len(values)} of which {int((~np.isfinite(values)).sum())} are not finite; valid: "
                         "at least one, all finite")
    times = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    low, high = np.percentile(times @ values / len(values), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), note)


def bootstrap_share(hits: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """The share of hits, each 0 or 1, (N,), with its interval over resamplings, which is exact at shares of 0 and 1."""
    return with_exact_ends(bootstrap_mean(np.asarray(hits, dtype=np.float64), seed), len(hits))


def with_exact_ends(share: Estimate, count: int) -> Estimate:
    """A bootstrapped share of ``count`` samples, with the interval of Clopper and Pearson 1934 where it is 0 or 1.

    There every resampling gives the same share, and the bootstrap would give an interval of no width; the exact one
    reaches up to 1 - 0.025^(1/N) away.
    """
    reach = 1 - 0.025 ** (1 / count)
    if share.value == 0:
        return Estimate(0.0, 0.0, max(share.high, reach), share.note)
    return Estimate(1.0, min(share.low, 1 - reach), 1.0, share.note) if share.value == 1 else share


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """(value without its bias of order 1/N, standard error), from G values that each leave out one of G equal groups.

    With the mean m of these G values, the first is G value - (G - 1) m (Quenouille 1956): the straight line in 1/N
    through both sample sizes, continued to N = infinity (Chong and Forsyth 2020 fit the same line). The second is the
    square root of (G - 1)/G sum (value_g - m)^2 (Tukey 1958). Raises ValueError for fewer than 2 groups.
    """
    if len(left_out) < 2:
        raise ValueError(f"left_out: {len(left_out)} groups; valid: from 2 up")
    groups, values = len(left_out), np.asarray(left_out, dtype=np.float64)
    error = float(np.sqrt((groups - 1) / groups * np.square(values - values.mean()).sum()))
    return groups * value - (groups - 1) * float(values.mean()), error
