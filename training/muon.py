"""Muon for matrices and convolution filters, AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, so that every direction of
the update has the same size. Its update is scaled to the size of an AdamW update (Liu et al. 2025, equation 4), so
both kinds of parameter share a learning rate. Axis letters: M matrices of one shape, R rows, C columns.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from model.device import autocast_dtype
from training.distributed import full, local, sliced_like

# Coefficients of the quintic iteration (Jordan et al. 2024): singular values in (0, 1] end between about 0.7 and 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

LONG = 4  # columns to rows from which the second form below is the faster one (two cores, bf16 at twice fp32's speed)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (M, R, C) with every singular value moved close to 1, by Newton-Schulz; same shape.

    The iteration is X <- (a I + b G + c G^2) X with G = X X^T. Two forms of it, whichever is faster: on X, or,
    for long filters, on G alone, of the short side, which touches the long side twice instead of ten times.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # (M, R, C), R <= C
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = iterated_on_gram(x, steps) if x.shape[-1] >= LONG * x.shape[-2] else iterated(x, steps)
    return (x.mT if tall else x).to(matrices.dtype)


def iterated(x: Tensor, steps: int) -> Tensor:
    """The iteration on X (M, R, C) itself, in bf16 where the machine has it."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(autocast_dtype("auto", x.device) or torch.float32)
    for _ in range(steps):
        gram = x @ x.mT  # (M, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterated_on_gram(x: Tensor, steps: int) -> Tensor:
    """The same polynomial, gathered in a matrix (R, R) for each X of (M, R, C) and applied once at the end, in fp32.

    bf16 would not do: its rounding makes small eigenvalues of G negative and the iteration multiplies those by a^2 = 12
    a step. One matrix at a time, which here is faster than a batch.
    """
    a, b, c = NEWTON_SCHULZ
    results = []
    for matrix in x.float():
        gram, product = matrix @ matrix.mT, None
        for _ in range(steps):
            factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # (R, R)
            factor.diagonal().add_(a)
            product = factor if product is None else factor @ product
            gram = factor @ gram @ factor  # all are polynomials of one matrix, so they commute
        results.append(product @ matrix)
    return torch.stack(results)


class Muon(torch.optim.Optimizer):
    """Steps parameter groups marked ``muon`` by orthogonalized Nesterov momentum, the others by fused AdamW."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "momentum": momentum, "muon": False,
                                  "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """One update from the gradients; parameters without one are left alone."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and group["muon"]:
                self._step_muon(parameters, group)
            elif parameters:
                self._step_adamw(parameters, group)

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in parameters:
            shapes.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(p)
        for (rows, columns), alike in shapes.items():
            updates = []
            for p in alike:
                gradient = p.grad if p.grad is not None else torch.zeros_like(p)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                local(momentum).lerp_(local(gradient), 1 - group["momentum"])
                # a matrix that is spread over processes is put together: its directions are those of the whole
                updates.append(full(gradient.lerp(momentum, group["momentum"])).reshape(rows, columns))
            size = 0.2 * max(rows, columns) ** 0.5  # root mean square of the update as AdamW's, about 0.2
            for p, update in zip(alike, orthogonalized(torch.stack(updates))):
                weights = local(p)
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.add_(sliced_like(update.reshape(p.shape), p), alpha=-group["lr"] * size)

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), first=torch.zeros_like(p), second=torch.zeros_like(p))
        states = [self.state[p] for p in parameters]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        adamw([local(p) for p in parameters], gradients, [local(s["first"]) for s in states],
              [local(s["second"]) for s in states], [], [s["step"] for s in states], fused=True, amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)


def matrices_and_others(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Trainable filters and matrices, and the rest: embeddings, biases and gains."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    return matrices, [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
