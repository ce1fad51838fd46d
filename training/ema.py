"""Averaged weights whose horizon grows with the run: the power-function EMA of Karras et al. 2023 (EDM2, section 3.1).

A fixed decay is too long for a short run and too short for a long one. Here the average after t steps weighs step s by
s^gamma, so its width is a fixed share of the run so far, ``std`` = sigma_rel, whatever the length.
"""
import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def gamma_from_std(std: float) -> float:
    """The exponent gamma of an average with relative width ``std`` in (0, 0.28]; EDM2 equation 127."""
    if not 0 < std <= 0.28:
        raise ValueError(f"ema_std: {std}; valid: above 0 up to 0.28 (a share of the run)")
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) falls for gamma > 0: bisection
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = 0.5 * (low + high)
        if (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > std**2:
            low = gamma
        else:
            high = gamma
    return 0.5 * (low + high)


class PowerEma(Generic[M]):
    """Keeps ``average``, a copy of the model in evaluation mode whose weights follow the model's."""

    def __init__(self, model: M, std: float):
        self.gamma = gamma_from_std(std)
        self.average: M = copy.deepcopy(model).eval().requires_grad_(False)
        self._targets = [p.detach() for p in self.average.parameters()]
        self._target_buffers = [b for b in self.average.buffers()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps (1, 2, ...): theta += (1 - beta_t) (model - theta)."""
        # EDM2 equation 2: beta_t = (1 - 1/t)^(gamma + 1); step 1 copies the model
        beta = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(self._targets, [p.detach() for p in model.parameters()], 1 - beta)
        for target, buffer in zip(self._target_buffers, model.buffers()):
            target.copy_(buffer)
