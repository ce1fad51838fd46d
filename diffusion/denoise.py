"""What the process knows of a network: a callable `denoise(x_t, t) -> prediction`.

x_t is (B, C, H, W), t is (B,), the prediction is shaped like x_t. Some callables act on the *value* of t (guidance in
an interval, inpainting). Reading it from a tensor would make the host wait for the device at every step, so samplers,
which know t as a Python number, ask such a callable for its `at(t)` before they make the tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


class TimedDenoiser(ABC):
    """A `denoise` whose work depends on the value of t, one value for the whole batch."""

    @abstractmethod
    def at(self, t: float) -> Denoise:
        """The callable to use at time t."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at(t[0].item())(x_t, t)  # waits for the device; samplers go through `at`


class Numbered(TimedDenoiser):
    """A `denoise` made of a function of x_t, t (B,) and t as a number, for what is looked up by the number."""

    def __init__(self, call: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        self.call = call

    def at(self, t: float) -> Denoise:
        """The callable to use at time t."""
        return lambda x_t, times: self.call(x_t, times, t)


def denoise_at(denoise: Denoise, t: float) -> Denoise:
    """`denoise` itself, or its `at(t)` when it asks for the value of t."""
    return denoise.at(t) if isinstance(denoise, TimedDenoiser) else denoise
