"""Guidance folded into the network: one call a step instead of two, and the scale is still chosen at sampling.

Classifier-free guidance samples with eps_s = eps_u + w (eps_c - eps_u), which needs two calls. Solved for the
conditional prediction, with beta = 1 / w, it says

    eps_c = beta eps_s + (1 - beta) eps_u

and eps_c is what training has a target for. Guidance-free training (Chen et al. 2025, arXiv 2501.15420) therefore gives
beta to the network as an input and trains the right-hand side with the usual loss, without a gradient through eps_u:

    | beta eps_s(x_t, c, beta) + (1 - beta) sg[eps_u(x_t)] - eps |^2        eps_u(x_t) = eps_s(x_t, empty, 1)

What it learns as eps_s is the guided prediction itself. beta is drawn anew for every image; an image whose caption was
dropped has beta = 1, for which the loss is the usual one. All of this is linear, so it holds for every prediction type.

Axes: B batch, C channels, H height, W width.
"""

from dataclasses import replace

from torch import Tensor

from diffusion.denoise import DenoiseAtTimes
from diffusion.guidance import GuidanceConfig
from diffusion.schedule import per_image

Scales = tuple[float, float]


def check_scales(scales: Scales, name: str = "guidance_scales") -> None:
    """Raises ValueError unless (lowest, highest) are guidance scales from 1 up."""
    if not 1.0 <= scales[0] <= scales[1] < float("inf"):
        raise ValueError(f"{name}: {list(scales)}; valid: [lowest, highest] with 1 <= lowest <= highest")


def beta_of_uniform(u: Tensor, scales: Scales) -> Tensor:
    """beta = 1 / w (B,) for u (B,) in [0, 1]: even between the ends, so that every share of the range of guidance
    scales that changes the prediction alike is seen alike."""
    low, high = scales
    return 1.0 / high + u * (1.0 / low - 1.0 / high)


def guidance_free(sampling: DenoiseAtTimes, unconditional: DenoiseAtTimes, beta: Tensor) -> DenoiseAtTimes:
    """The conditional prediction that the loss is taken of: beta eps_s + (1 - beta) sg[eps_u], beta (B,).

    sampling: eps_s, bound to the captions and to beta. unconditional: eps_u, bound to the empty caption and to 1; the
    caller sees that no gradient is kept in it.
    """
    def conditional(x_t: Tensor, t: Tensor) -> Tensor:
        share = per_image(beta, x_t)
        return share * sampling(x_t, t) + (1.0 - share) * unconditional(x_t, t).detach()
    return conditional


def check_folded(config: GuidanceConfig, scales: Scales) -> None:
    """Raises ValueError for guidance that a network with folded guidance cannot follow: a scale that it was not trained
    for, or a method that needs the two predictions apart."""
    if not scales[0] <= config.scale <= scales[1]:
        valid = f"{scales[0]:g}" if scales[0] == scales[1] else f"{scales[0]:g} .. {scales[1]:g}"
        raise ValueError(f"scale: value {config.scale:g}; valid: {valid}, what the network was trained for, since "
                         "guidance is folded into it")
    if config.interval is not None and scales[0] > 1.0:
        raise ValueError(f"interval: value {config.interval}; valid: None, outside it the scale is 1, for which the "
                         "network was not trained")
    for name in ("method", "rescale"):
        if getattr(config, name) != getattr(GuidanceConfig(), name):
            raise ValueError(f"{name}: value {getattr(config, name)}; valid: {getattr(GuidanceConfig(), name)}, "
                             "guidance is folded into the network and there is one prediction")


def without_pair(config: GuidanceConfig) -> GuidanceConfig:
    """What is left for the solver when guidance is folded into the network: no second prediction."""
    return replace(config, scale=1.0, interval=None)
