"""Muon for matrices and convolution filters, AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, so that every direction of
the update has the same size. Its update is scaled to the size of an AdamW update (Liu et al. 2025, equation 4), so
both kinds of parameter share a learning rate. Axis letters: R rows, C columns.
"""
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.adamw import adamw

from model.blocks import ScalarMLP, TimeMLP
from training.distributed import local_slice, slice_like, whole_tensor
from training.polar import Iteration, orthogonalize, polar_factors

__all__ = ["Muon", "matrices_and_others", "filters_to_matrix", "orthogonalize", "matrix_to_filters"]


class Muon(torch.optim.Optimizer):
    """Updates parameter groups marked ``muon`` by orthogonalized Nesterov momentum, and the others by fused AdamW.

    ``dtype`` is that of the iteration, None for bf16 where the machine has it. A run in fp32 iterates in fp32: in bf16
    a difference in the last bit of a gradient may become one in the third digit of an update.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], momentum: float = 0.95,
                 iteration: Iteration = "short", dtype: torch.dtype | None = None):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "momentum": momentum, "muon": False,
                                  "weight_decay": 0.0, "iteration": iteration})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update from the gradients; parameters without a gradient do not change."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["muon"]:
                self._step_muon(parameters, group)
            elif parameters:
                self._step_adamw(parameters, group)

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_([local_slice(m) for m in momenta], [local_slice(g) for g in gradients],
                             1 - group["momentum"])
        # a distributed matrix is gathered, because its singular directions are those of the whole matrix
        updates = [filters_to_matrix(whole_tensor(gradient.lerp(momentum, group["momentum"])), p)  # Nesterov, (R, C)
                   for p, gradient, momentum in zip(parameters, gradients, momenta)]
        directions = polar_factors(updates, group["iteration"], self.dtype)
        weights = [local_slice(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for p, weight, direction in zip(parameters, weights, directions, strict=True):
            size = 0.2 * max(direction.shape) ** 0.5  # root mean square of the update as AdamW's, about 0.2
            weight.add_(slice_like(matrix_to_filters(p, direction), p), alpha=-group["lr"] * size)

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), first=torch.zeros_like(p), second=torch.zeros_like(p))
        states = [self.state[p] for p in parameters]
        gradients = [local_slice(p.grad) for p in parameters if p.grad is not None]
        adamw([local_slice(p) for p in parameters], gradients, [local_slice(s["first"]) for s in states],
              [local_slice(s["second"]) for s in states], [], [s["step"] for s in states], fused=True, amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)


def filters_to_matrix(values: Tensor, filters: Tensor) -> Tensor:
    """Values for filters (R, ...) as a matrix (R, C), with columns in the order of the filters in memory, so that
    nothing is copied. The order of the columns affects only the order of the columns of the result."""
    order = "r c h w -> r (h w c)" if is_channels_last(filters) else "r ... -> r (...)"
    return rearrange(values, order)


def matrix_to_filters(filters: Tensor, matrix: Tensor) -> Tensor:
    """A matrix (R, C) from `filters_to_matrix`, in the shape of the filters."""
    if is_channels_last(filters):
        return rearrange(matrix, "r (h w c) -> r c h w", h=filters.shape[2], w=filters.shape[3])
    return matrix.reshape(filters.shape)


def is_channels_last(filters: Tensor) -> bool:
    """Whether these are filters (R, C, H, W) in channels-last order."""
    return filters.ndim == 4 and filters.is_contiguous(memory_format=torch.channels_last)


def matrices_and_others(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Trainable filters and matrices, and the rest: embeddings, also that of the time, biases and gains.

    A batch has as many times as images where it has thousands of pixels, so the gradient of what embeds them has few
    directions, and making all equally long is mostly noise: with AdamW for it the shapes denoiser came to a loss of
    0.598 in 150 steps instead of 0.639, and a third of the work of Muon is gone.
    """
    embedding = (nn.Embedding, TimeMLP, ScalarMLP)
    embeddings = {id(p) for m in model.modules() if isinstance(m, embedding) for p in m.parameters()}
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    return matrices, [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
