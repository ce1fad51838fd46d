"""The training objective, its weightings over the noise level, and the draw of training times.

Axes: B batch.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.denoise import DenoiseAtTimes
from diffusion.prediction import check_prediction_type, target, unknown
from diffusion.schedule import Schedule, per_image
from diffusion.spacing import shifted_time

Weighting = Literal["none", "min_snr", "soft_min_snr", "p2"]
TimestepSampling = Literal["uniform", "stratified", "sobol", "logit_normal", "stratified_logit_normal"]


def diffusion_loss(
    denoise: DenoiseAtTimes,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    schedule: Schedule,
    prediction_type: str,
    weighting: str = "none",
) -> Tensor:
    """Weighted squared error of each image, (B,) fp32, averaged over its elements.

    denoise: takes a time for each image, t (B,), not one for all of them as in sampling.
    x_0, eps: (B, C, H, W). t: (B,), integers for a discrete schedule, floats in (0, 1] for flow.
    weighting: "none" is the plain error of the target (Ho et al. 2020, eq. 14, for epsilon); others: `loss_weight`
        with its gamma of 5.
    Raises ValueError for shapes that do not fit and for combinations that cannot be trained.
    """
    check_prediction_type(schedule, prediction_type)
    if x_0.shape != eps.shape or t.shape != x_0.shape[:1]:
        raise ValueError(f"x_0 {tuple(x_0.shape)}, eps {tuple(eps.shape)} and t {tuple(t.shape)} do not fit; "
                         "valid: (B, C, H, W), the same, and (B,)")
    alpha, sigma = per_image(schedule.alpha(t), x_0), per_image(schedule.sigma(t), x_0)  # (B, 1, 1, 1)
    x_t = alpha * x_0 + sigma * eps
    prediction = denoise(x_t, t)
    wanted = target(x_0, eps, alpha, sigma, prediction_type)
    if prediction.shape != wanted.shape:
        raise ValueError(f"denoise returned {tuple(prediction.shape)} for {tuple(x_0.shape)}; valid: the same shape")
    error = (prediction.float() - wanted.float()).square().flatten(1).mean(1)  # (B,)
    if weighting == "none":
        return error
    return loss_weight(alpha.flatten(), sigma.flatten(), prediction_type, weighting) * error


def loss_weight(alpha: Tensor, sigma: Tensor, prediction_type: str, weighting: str, gamma: float = 5.0) -> Tensor:
    """Factor (B,) on the squared error of this target at these levels (B,).

    A weighting is defined on the error of x_0; the error of any other target is that error times the squared slope
    of the target with respect to x_0 at fixed x_t, so the factor is weight(x_0) / slope^2. With variance preserved
    this gives, for min_snr, min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v and
    min(SNR, gamma) for x_0.
    """
    snr = (alpha / sigma) ** 2
    if weighting == "none":
        return torch.ones_like(snr)
    if prediction_type == "epsilon":
        # apart from the general rule, because min(SNR, g) / SNR would be 0 / 0 in fp32 for a vanishing SNR
        if weighting == "min_snr":
            return (gamma / snr).clamp(max=1.0)
        if weighting == "soft_min_snr":
            return gamma / (snr + gamma)
        if weighting == "p2":
            return 1.0 / (1.0 + snr)
        raise unknown_weighting(weighting)
    return x_0_weight(snr, weighting, gamma) / squared_slope(alpha, sigma, prediction_type)


def x_0_weight(snr: Tensor, weighting: str, gamma: float) -> Tensor:
    """Weight (B,) of the squared error of x_0."""
    if weighting == "min_snr":
        # Hang et al. 2023; gamma = 5
        return snr.clamp(max=gamma)
    if weighting == "soft_min_snr":
        # Crowson et al. 2024 (HDiT): a smooth minimum of SNR and gamma
        return snr * gamma / (snr + gamma)
    if weighting == "p2":
        # Choi et al. 2022 with k = 1 and exponent 1: the epsilon loss over (1 + SNR)
        return snr / (1.0 + snr)
    raise unknown_weighting(weighting)


def squared_slope(alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Square of d target / d x_0 at fixed x_t, where eps = (x_t - alpha x_0) / sigma."""
    if prediction_type == "epsilon":
        return (alpha / sigma) ** 2
    if prediction_type == "sample":
        return torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return ((alpha**2 + sigma**2) / sigma) ** 2  # SNR + 1 when variance is preserved
    if prediction_type == "flow":
        return ((alpha + sigma) / sigma) ** 2
    raise unknown(prediction_type)


def unknown_weighting(weighting: str) -> ValueError:
    """The error for a weighting that does not exist."""
    return ValueError(f"weighting: value {weighting!r}; valid: {', '.join(get_args(Weighting))}")


def sample_timesteps(
    n: int,
    kind: str,
    schedule: Schedule,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Training times (n,) on the generator's device: int64 in 0 .. T-1, or float32 in (0, 1] for flow.

    kind: "uniform", independent draws; "stratified", one draw in each n-th of the range, in random order (the batch
        covers all noise levels, so the gradient is less noisy); "sobol", a scrambled Sobol sequence, the same idea
        with power-of-two strata; "logit_normal", sigmoid of a normal(mean, std), which dwells on middle levels
        (Esser et al. 2024, eq. 19); "stratified_logit_normal", the same from one draw in each n-th of its probability.
    """
    device = generator.device
    if kind == "uniform":
        u = torch.rand(n, generator=generator, device=device)
    elif kind in ("stratified", "stratified_logit_normal"):
        order = torch.randperm(n, generator=generator, device=device)
        u = (order + torch.rand(n, generator=generator, device=device)) / n
        if kind == "stratified_logit_normal":
            u = torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(1e-6, 1.0 - 1e-6)).float())
    elif kind == "sobol":
        seed = int(torch.randint(2**31, (1,), generator=generator, device=device))
        u = torch.quasirandom.SobolEngine(1, scramble=True, seed=seed).draw(n)[:, 0].to(device)
    elif kind == "logit_normal":
        u = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))
    else:
        raise ValueError(f"kind: value {kind!r}; valid: {', '.join(get_args(TimestepSampling))}")
    u = u.clamp(max=1.0 - 2.0**-24)  # (order + rand) / n may round up to 1
    if schedule.is_flow:
        # 1 - u is never 0: t = 0 has no noise and nothing to learn. For logit_normal the mean keeps its sign.
        t = u.clamp(min=1e-6) if kind.endswith("logit_normal") else 1.0 - u
        return shifted_time(t, schedule.config.shift)
    return (u * schedule.steps).long().clamp(max=schedule.steps - 1)
