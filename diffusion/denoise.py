"""What the process knows of a network: a callable `denoise(x_t, t) -> prediction`, x_t and prediction (B, C, H, W).

A sampler is at one time, so t is a Python number there, an int for a discrete schedule: coefficients can be computed
from it without waiting for a device. Training has a time for each image, and there t is a tensor (B,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]  # in sampling: x_t (B, C, H, W) and one time for all of the batch
DenoiseAtTimes = Callable[[Tensor, Tensor], Tensor]  # in training: x_t (B, C, H, W) and a time for each image, (B,)


def time_tensor(t: float, x: Tensor) -> Tensor:
    """One time for all images of x (B, ...) as the tensor (B,) that a network takes: int64 for an int, fp32 for a
    float. It is filled on the device of x: a copy from the host could not be recorded in a CUDA graph."""
    dtype = torch.int64 if isinstance(t, int) else torch.float32
    return torch.full((x.shape[0],), t, dtype=dtype, device=x.device)
