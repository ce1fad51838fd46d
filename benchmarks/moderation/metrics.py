"""Metrics of a text classifier: AUC, recall at a false-positive rate, calibration error, each with an interval.

Axis letters: P positives, N negatives, R resamples.
"""
from collections.abc import Callable, Sequence

import numpy as np


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that a positive (P,) scores above a negative (N,); ties count half (Hanley and McNeil 1982)."""
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.mean() / 2 / len(negative))


def recall_at(positive: np.ndarray, negative: np.ndarray, rate: float) -> float:
    """The share of positives above the lowest threshold that at most the share ``rate`` of the negatives exceeds."""
    allowed = int(np.floor(rate * len(negative)))
    threshold = np.sort(negative)[::-1][min(allowed, len(negative) - 1)]
    return float((positive > threshold).mean())


def calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over ``bins`` bins of equal width (Guo et al. 2017, eq. 3)."""
    places = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = [abs(scores[places == b].mean() - labels[places == b].mean()) * (places == b).mean()
            for b in range(bins) if (places == b).any()]
    return float(sum(gaps))


def match_lengths(lengths: np.ndarray, pool: np.ndarray, most: int = 3, within: float = 0.1) -> np.ndarray:
    """Indices into ``pool`` (the lengths of negatives) of up to ``most`` negatives of nearly the length of each
    positive; each negative is used once. A positive may have none."""
    order = np.argsort(pool, kind="stable")
    free = dict.fromkeys(order.tolist())
    found: list[int] = []
    for _ in range(most):
        for length in np.sort(lengths)[::-1]:
            slack = max(5.0, within * length)
            low, high = np.searchsorted(pool[order], (length - slack, length + slack))
            near = [place for place in order[low:high].tolist() if place in free]
            if near:
                best = min(near, key=lambda place: abs(pool[place] - length))
                del free[best]
                found.append(best)
    return np.array(found, int)


def interval(statistic: Callable[..., float], *samples: np.ndarray, resamples: int = 500, seed: int = 0,
             confidence: float = 0.95) -> tuple[float, float]:
    """A percentile bootstrap interval of a statistic of independent samples (Efron 1979)."""
    random = np.random.default_rng(seed)
    values = [statistic(*(sample[random.integers(0, len(sample), len(sample))] for sample in samples))
              for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def estimate(statistic: Callable[..., float], *samples: np.ndarray, percent: bool = False) -> str:
    """A statistic with its interval as text, or a dash if a sample has fewer than ten values."""
    if any(len(sample) < 10 for sample in samples):
        return "-"
    value, (low, high) = statistic(*samples), interval(statistic, *samples)
    if percent:
        return f"{100 * value:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
