"""A linear classifier of features, for what cannot be measured by geometry: the style of an image.

It is trained on real images. Its accuracy on held-out real images is the ceiling, which stands beside every figure.
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
    """The classes and the layer that separates them; probe(features (N, D)) returns logits (N, K)."""

    classes: tuple[str, ...]
    weight: Tensor  # (D, K), for features from which the mean is subtracted, divided by std
    bias: Tensor  # (K,)
    mean: Tensor  # (D,)
    std: Tensor  # (D,)

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, D) -> logits (N, K)."""
        return ((features.double() - self.mean) / self.std) @ self.weight + self.bias

    def predict(self, features: Tensor) -> list[str]:
        """The most likely class of each image, from features (N, D)."""
        return [self.classes[k] for k in self(features).argmax(dim=1).tolist()]

    def accuracy(self, features: Tensor, labels: Sequence[str], seed: int = 0) -> Estimate:
        """The share of images whose predicted class is their label, with its interval."""
        return bootstrap_share([a == b for a, b in zip(self.predict(features), labels, strict=True)], seed)


def fit_probe(features: Tensor, labels: Sequence[str], decay: float = 0.01) -> Probe:
    """Multinomial logistic regression of labels on features (N, D), with the penalty ``decay``/2 |weight|^2 on features
    of unit variance.

    The problem is convex, so that it has one solution and needs no seed. Every class has the same weight, however many
    images it has. Raises ValueError for another number of labels, for values that are not finite, and for fewer than
    two classes.
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
