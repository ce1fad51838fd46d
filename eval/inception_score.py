"""The Inception score: are images clear, each of one class, and together of all classes (Salimans et al. 2016)?"""
import numpy as np
import torch
from torch import Tensor


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """(mean, standard deviation) over ``splits`` parts of exp E KL(p(y | x) || p(y)), 1 to the number of classes.

    logits (N, classes); they are shuffled first, as in torch-fidelity with the same seed, for images often come
    sorted. Raises ValueError for fewer than ``splits`` images and for values that are not finite.
    """
    if logits.ndim != 2 or splits < 1 or len(logits) < splits or not torch.isfinite(logits).all():
        raise ValueError(f"logits: {tuple(logits.shape)} in {splits} splits, "
                         f"{int((~torch.isfinite(logits)).sum())} values not finite; valid: (N, classes), N at least "
                         "the number of splits")
    order = np.random.RandomState(seed).permutation(len(logits))
    log_p = logits.detach().cpu().double()[torch.from_numpy(order)].log_softmax(dim=1)  # (N, classes)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits:(i + 1) * len(log_p) // splits]
        marginal = part.exp().mean(dim=0).log()  # (classes,)
        scores.append(float((part.exp() * (part - marginal)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
