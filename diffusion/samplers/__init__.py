"""The registry of samplers: one function a method, one file a family. Their common signature is in `common.py`.

To add a sampler, write its function in a file of this folder, declare its options in the signature (`options.py`) and
name the function in SAMPLERS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusion.samplers.common import Denoise, Noise, Times, checked
from diffusion.samplers.consistency import consistency
from diffusion.samplers.ddim import ddim
from diffusion.samplers.ddpm import ddpm
from diffusion.samplers.dpm_solver import dpm_solver_multistep, dpm_solver_sde, dpm_solver_singlestep
from diffusion.samplers.euler import euler, euler_ancestral
from diffusion.samplers.flow import flow_euler, flow_heun
from diffusion.samplers.heun import heun
from diffusion.samplers.lcm import lcm
from diffusion.samplers.options import Option, Value, declared_options
from diffusion.samplers.pndm import pndm
from diffusion.samplers.unipc import unipc
from diffusion.schedule import Schedule


@dataclass(frozen=True)
class Sampler:
    """A sampler function and the options that it declares; calling it checks them, and what the network returns."""

    function: Callable[..., Tensor]
    options: Mapping[str, Option]

    def __call__(self, denoise: Denoise, x_T: Tensor, timesteps: Times, schedule: Schedule, prediction_type: str,
                 noise: Noise | None = None, *, trace: list | None = None, **options: Any) -> Tensor:
        """x_0 (B, C, H, W); arguments as in `samplers.common`. Raises ValueError for options that are not valid."""
        return self.function(checked(denoise), x_T, timesteps, schedule, prediction_type, noise, trace=trace,
                             **self.complete(options))

    def complete(self, options: Mapping[str, Any]) -> dict[str, Value]:
        """Every option of the sampler with its value, the default where `options` does not name it. Raises ValueError
        for a value that is not valid and for an option that the sampler does not have."""
        for name in options:
            if name not in self.options:
                raise ValueError(f"{name}: the sampler {self.function.__name__} has no such option; valid: "
                                 f"{', '.join(self.options) or 'none'}")
        return {name: option.checked(options.get(name, option.default)) for name, option in self.options.items()}


SAMPLERS: dict[str, Sampler] = {
    function.__name__: Sampler(function, declared_options(function))
    for function in (ddpm, ddim, euler, euler_ancestral, heun, pndm, dpm_solver_multistep, dpm_solver_singlestep,
                     dpm_solver_sde, unipc, consistency, lcm, flow_euler, flow_heun)
}


def get_sampler(name: str) -> Sampler:
    """The sampler of this name. Raises ValueError that lists the names."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler: value {name!r}; valid: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
