"""The Inception score (Salimans et al. 2016): is each image clearly of one class, and are all classes there?"""
import numpy as np
import torch
from torch import Tensor


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """(mean, standard deviation) over ``splits`` parts of exp E KL(p(y | x) || p(y)), from 1 to the number of classes.

    The logits (N, classes) are shuffled first, as torch-fidelity does with the same seed, because images often come
    sorted. Raises ValueError for fewer images than ``splits`` and for values that are not finite.
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
