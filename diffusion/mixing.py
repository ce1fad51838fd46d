"""Several prompts in one image: their predictions are mixed at every step.

    mixed = own + sum_k w_k (further_k - own)

At one x_t all four kinds of prediction are affine in the score, and the factors of own and further sum to one, so this
is the same mixture of scores for each of them: that of a density proportional to p_own prod_k (p_k / p_own)^w_k (Liu et
al. 2022, "Compositional Visual Generation with Composable Diffusion Models", section 3). At one noise level this family
is exponential in w, hence

    d/dw E_w[log p_k / p_own] = Var_w[log p_k / p_own] >= 0

and the evidence for the further prompt can only rise with its weight, which holds for no mixture of contexts. That the
mixture of noisy densities is not the noised mixture is the approximation of all guidance.

Axes: B batch, K further prompts, C channels, H height, W width.
"""
import torch
from torch import Tensor

from diffusion.denoise import Denoise


def mixed(denoise: Denoise, weights: Tensor) -> Denoise:
    """A denoiser of B images from one that sees (K + 1) B of them, bound to the further prompts, K times B, and to the
    B own ones behind them. ``weights`` (K, B): 0 is the own prompt alone, 1 the further one alone."""
    return lambda x_t, t: _mixture(denoise(x_t.repeat(len(weights) + 1, 1, 1, 1), t), weights)


def mixed_pair(doubled: Denoise, weights: Tensor) -> Denoise:
    """As ``mixed``, for guidance: from a denoiser that is bound to B unconditional conditions before those of
    ``mixed``, one of x_t twice, (2B, C, H, W), that predicts for the unconditional conditions and the mixtures."""

    def pair(x_t: Tensor, t: float) -> Tensor:
        one = x_t[: len(x_t) // 2]
        predictions = doubled(one.repeat(len(weights) + 2, 1, 1, 1), t)  # ((K + 2) B, C, H, W)
        return torch.cat([predictions[: len(one)], _mixture(predictions[len(one):], weights)])

    return pair


def _mixture(predictions: Tensor, weights: Tensor) -> Tensor:
    """The mixture (B, C, H, W) of predictions ((K + 1) B, C, H, W)."""
    *further, own = predictions.chunk(len(weights) + 1)
    return own + sum(w[:, None, None, None].to(own) * (one - own) for w, one in zip(weights, further))
