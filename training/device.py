"""Where networks live, and the arithmetic they use there."""
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def default_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placed(module: M, device: torch.device | str) -> M:
    """``module`` on ``device`` with its filters in channels-last order, which convolutions run faster in."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def frozen(module: M) -> M:
    """``module`` for use without training: evaluation mode, no gradients."""
    module.eval().requires_grad_(False)
    return module


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of matrix products under autocast, or None for fp32. ``auto`` is bf16 where the machine has it."""
    if precision == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else (
            device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return torch.bfloat16 if has_bf16 else None
    return torch.bfloat16 if precision == "bf16" else None
