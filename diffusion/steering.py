"""Steering without training: every predicted x_0 is moved before the sampler uses it.

He et al. 2023, "Manifold Preserving Guided Diffusion", and Lobashev et al. 2025, "Color Conditional Generation with
Sliced Wasserstein Guidance", for the loss that pipeline/palette.py minimises. The gradient is taken with respect to x_0
and does not pass through the network, so a step costs one decoder and its gradient, and any sampler can be used.

Axes: B batch, C channels, H height, W width.
"""
from collections.abc import Callable

from torch import Tensor

from diffusion.denoise import Denoise
from diffusion.prediction import prediction_from_x_0, x_0_from_prediction
from diffusion.schedule import Schedule

Steer = Callable[[Tensor, float], Tensor]  # x_0 (B, C, H, W), sigma_t / alpha_t -> x_0


class SteeredDenoiser:
    """A ``denoise(x_t, t)`` whose predictions imply the x_0 that ``steer`` returns.

    Pure noise (alpha_t = 0) is not steered: there x_0 is the mean of all images that the prompt allows.
    """

    def __init__(self, denoise: Denoise, steer: Steer, schedule: Schedule, prediction_type: str):
        self.denoise, self.steer = denoise, steer
        self.schedule, self.prediction_type = schedule, prediction_type

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """The prediction (B, C, H, W) for x_t (B, C, H, W)."""
        prediction = self.denoise(x_t, t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        if alpha == 0.0 or sigma == 0.0:
            return prediction
        x_0 = x_0_from_prediction(prediction.to(x_t.dtype), x_t, alpha, sigma, self.prediction_type)
        return prediction_from_x_0(self.steer(x_0, sigma / alpha), x_t, alpha, sigma, self.prediction_type)
