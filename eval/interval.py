"""A figure with its 95 % interval: by bootstrap, by the jackknife over groups, or from a standard error."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds what it estimates in about 95 of 100 repetitions; ``note`` says how it was
    found. An interval of no width, of a value known without sampling, is not written."""

    value: float
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        interval = "" if self.low == self.value == self.high else f" ({_short(self.low)} to {_short(self.high)})"
        return _short(self.value) + interval

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit; factor above 0."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high, self.note)


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def estimate_from_error(value: float, error: float, note: str = "", freedom: float = np.inf) -> Estimate:
    """The interval of a value whose error is normal with standard deviation ``error``, itself estimated with
    ``freedom`` degrees (Student 1908)."""
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return Estimate(value, value - reach, value + reach, note)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 1000,
                   note: str = "bootstrap over samples") -> Estimate:
    """Mean of values (N,), one a sample, with the percentile interval over resamplings (Efron 1979).

    Raises ValueError for no values, or for one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values: {len(values)} of which {int((~np.isfinite(values)).sum())} are not finite; valid: "
                         "at least one, all finite")
    times = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    low, high = np.percentile(times @ values / len(values), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), note)


def bootstrap_share(hits: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """`bootstrap_mean` of hits, 0 or 1 each (N,). Where none or all are hits resampling knows no spread, and the
    interval is that of Clopper and Pearson 1934: up to 1 - 0.025^(1/N) away."""
    return with_exact_ends(bootstrap_mean(np.asarray(hits, dtype=np.float64), seed), len(hits))


def with_exact_ends(share: Estimate, count: int) -> Estimate:
    """A bootstrapped share of ``count`` samples, with an interval also where it is 0 or 1."""
    reach = 1 - 0.025 ** (1 / count)
    if share.value == 0:
        return Estimate(0.0, 0.0, max(share.high, reach), share.note)
    return Estimate(1.0, min(share.low, 1 - reach), 1.0, share.note) if share.value == 1 else share


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """(value without the bias of order 1/N, standard error) from the values without each of G equal groups in turn.

    Quenouille 1956, Tukey 1958: with the mean m of the G values, G value - (G - 1) m, which is the straight line in 1/N
    through both sample sizes continued to N = infinity (Chong and Forsyth 2020 fit the same line), and the square root
    of (G - 1)/G sum (value_g - m)^2. Raises ValueError for fewer than 2 groups.
    """
    if len(left_out) < 2:
        raise ValueError(f"left_out: {len(left_out)} groups; valid: from 2 up")
    groups, values = len(left_out), np.asarray(left_out, dtype=np.float64)
    error = float(np.sqrt((groups - 1) / groups * np.square(values - values.mean()).sum()))
    return groups * value - (groups - 1) * float(values.mean()), error
