"""A linear classifier on features, to measure what has no geometry: the style of an image.

Trained on real images; what it makes of held-out real ones is the ceiling and is printed beside every figure.
Axis letters: N images, D width of the features, K classes.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.interval import Estimate, bootstrap_share


@dataclass(frozen=True)
class Probe:
    """Classes and the layer that tells them apart; call with features (N, D) for logits (N, K)."""

    classes: tuple[str, ...]
    weight: Tensor  # (D, K), for features less mean over std
    bias: Tensor  # (K,)
    mean: Tensor  # (D,)
    std: Tensor  # (D,)

    def __call__(self, features: Tensor) -> Tensor:
        return ((features.double() - self.mean) / self.std) @ self.weight + self.bias

    def predict(self, features: Tensor) -> list[str]:
        """The likeliest class of each image."""
        return [self.classes[k] for k in self(features).argmax(dim=1).tolist()]

    def accuracy(self, features: Tensor, labels: Sequence[str], seed: int = 0) -> Estimate:
        """Share of images taken for what they should be, with its interval."""
        return bootstrap_share([a == b for a, b in zip(self.predict(features), labels, strict=True)], seed)


def fit_probe(features: Tensor, labels: Sequence[str], decay: float = 0.01) -> Probe:
    """Multinomial logistic regression of features (N, D) on labels, with ``decay``/2 |weight|^2 on features of unit
    variance: convex, so it has one answer and no seed. Each class counts the same, however many images it has.

    Raises ValueError for other counts, for values that are not finite, and for fewer than two classes.
    """
    classes = tuple(sorted(set(labels)))
    if features.ndim != 2 or len(features) != len(labels) or len(classes) < 2 or not torch.isfinite(features).all():
        raise ValueError(f"features, labels: {tuple(features.shape)} and {len(labels)} of {len(classes)} classes; "
                         "valid: a finite vector a label, from 2 classes up")
    x = features.detach().double().cpu()
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x = (x - mean) / std
    target = torch.tensor([classes.index(label) for label in labels])
    share = 1 / (len(classes) * torch.bincount(target, minlength=len(classes)).double())  # (K,)
    weight = torch.zeros(x.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = F.cross_entropy(x @ weight + bias, target, reduction="none")
        value = (share[target] * each).sum() + 0.5 * decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return Probe(classes, weight.detach(), bias.detach(), mean, std)
