"""The device of a network, and the arithmetic that it uses there."""
import functools
import platform
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def default_device() -> torch.device:
    """CUDA if it is available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place_on(module: M, device: torch.device | str) -> M:
    """Move ``module`` to ``device``, store its filters in channels-last order, in which convolutions are faster, and
    return it."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def freeze(module: M) -> M:
    """Set ``module`` to evaluation mode, switch off its gradients, and return it."""
    module.eval().requires_grad_(False)
    return module


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of matrix products under autocast, or None for fp32. ``auto`` is bf16 if the machine has bf16
    arithmetic."""
    if precision == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else (
            device.type == "cpu" and cpu_has_bf16())
        return torch.bfloat16 if has_bf16 else None
    return torch.bfloat16 if precision == "bf16" else None


@functools.lru_cache(maxsize=None)
def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 instructions. oneDNN claims so for every CPU with AVX512, but emulated bf16 takes five
    times as long as fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
