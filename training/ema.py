"""Averaged weights whose horizon grows with the run: the power-function EMA of Karras et al. 2023 (EDM2, section 3.1).

A fixed decay is too slow for a short run and too fast for a long one. In this average step s has a weight
proportional to s^gamma, so its width is a fixed share of the run so far, ``std`` = sigma_rel, whatever the length.
"""
import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from training.distributed import local_slice, whole_tensor

M = TypeVar("M", bound=nn.Module)


def gamma_from_std(std: float) -> float:
    """The exponent gamma of an average with relative width ``std`` in (0, 0.28]; EDM2 equation 127. Raises ValueError
    for another width."""
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
    """A copy of the model in evaluation mode whose weights are the average of the model's."""

    def __init__(self, model: M, std: float):
        self.std, self.gamma = std, gamma_from_std(std)
        self.average: M = copy.deepcopy(model).eval().requires_grad_(False)
        self.tensors = [p.detach() for p in self.average.parameters()]
        self.sharded = False

    def shard(self, model: nn.Module) -> None:
        """Distribute the copy like the model, whose weights were just distributed and are still those of the copy."""
        self.sharded = True
        self.tensors = [p.detach().clone() for p in model.parameters()]
        set_parameters(self.average, [torch.empty_like(p, device="meta") for p in self.average.parameters()])

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after ``step`` steps (1, 2, ...): theta += (1 - beta_t) (model -
        theta)."""
        # EDM2 equation 2: beta_t = (1 - 1/t)^(gamma + 1); step 1 copies the model
        beta = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_([local_slice(t) for t in self.tensors],
                             [local_slice(p.detach()) for p in model.parameters()], 1 - beta)
        for target, buffer in zip(self.average.buffers(), model.buffers()):
            target.copy_(buffer)

    def averaged_model(self) -> M:
        """The averaged model. If it is distributed over processes, it is gathered, and all of them must call this."""
        if not self.sharded:
            return self.average
        result = copy.deepcopy(self.average)
        set_parameters(result, [whole_tensor(tensor) for tensor in self.tensors])
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers by name, as this process holds them."""
        return {**self.average.state_dict(), **self._named()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `state_dict` returned."""
        if not self.sharded:
            self.average.load_state_dict(state)
            return
        for name, tensor in {**dict(self.average.named_buffers()), **self._named()}.items():
            local_slice(tensor).copy_(local_slice(state[name]))

    def _named(self) -> dict[str, Tensor]:
        return {name: tensor for (name, _), tensor in zip(self.average.named_parameters(), self.tensors)}


def set_parameters(module: nn.Module, tensors: list[Tensor]) -> None:
    """Replace the parameters of ``module`` by ``tensors``, in the order of ``module.parameters()``, without
    gradients."""
    for name, tensor in zip([name for name, _ in module.named_parameters()], tensors, strict=True):
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
