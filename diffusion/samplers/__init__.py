"""The registry of samplers: one function a method, one file a family. Their common signature is in `common.py`."""

from diffusion.samplers.common import Sampler
from diffusion.samplers.ddim import ddim
from diffusion.samplers.ddpm import ddpm
from diffusion.samplers.dpm_solver import dpm_solver_multistep, dpm_solver_sde, dpm_solver_singlestep
from diffusion.samplers.euler import euler, euler_ancestral
from diffusion.samplers.flow import flow_euler, flow_heun
from diffusion.samplers.heun import heun
from diffusion.samplers.lcm import lcm
from diffusion.samplers.pndm import pndm
from diffusion.samplers.unipc import unipc

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "pndm": pndm,
    "dpm_solver_multistep": dpm_solver_multistep,
    "dpm_solver_singlestep": dpm_solver_singlestep,
    "dpm_solver_sde": dpm_solver_sde,
    "unipc": unipc,
    "lcm": lcm,
    "flow_euler": flow_euler,
    "flow_heun": flow_heun,
}


def get_sampler(name: str) -> Sampler:
    """The sampler of this name. Raises ValueError that lists the names."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler: value {name!r}; valid: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
