"""Convolutions that keep a copy of their weights in the order in which the kernels of the CPU read them.

oneDNN reads weights in blocks of its own choice, and PyTorch reorders the weights at every call. For a large feature
map this costs nothing, but for a map of 2x2 pixels the reordering takes longer than the convolution. Here weights that
no longer change are reordered once. The result is the same, up to the order of sums.

Axis letters: B batch, C channels, H height, W width.
"""
from typing import Any

import torch
from torch import Tensor, nn

# A convolution as it is over one with reordered weights (one core of an AMD EPYC with AVX512-BF16, torch 2.14, fp32,
# batch 2): 256 -> 256 channels at 2x2 2.1, 512 -> 256 at 2x2 2.7, 192 -> 192 at 4x4 1.4, 128 -> 128 at 8x8 1.14,
# 64 -> 64 at 16x16 1.07, 128 -> 128 at 16x16 1.01. Linear layers: 0.9 to 1.2, not worth a second copy.
PIXELS = 64  # up to how many pixels of a feature map the weights are reordered
LARGEST = 16 * 2**20  # bytes of weights of one layer: a second copy of larger ones is not worth its memory

reorder: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)  # PyTorch calls it in its own compiler


class Conv2d(nn.Conv2d):
    """PyTorch's module of that name, but faster on small maps once its weights are frozen."""

    packed: tuple[tuple, Tensor] | None = None  # what the weights were reordered for, and the reordered weights

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not self.packs(x):
            return super().forward(x)
        weight = self.weight
        made_for = (x.shape, x.dtype, weight.data_ptr(), weight._version)
        if self.packed is None or self.packed[0] != made_for:
            self.packed = made_for, reorder(
                weight.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, x.shape)
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed[1], self.bias, self.padding, self.stride,
                                                       self.dilation, self.groups, "none", [], "")

    def packs(self, x: Tensor) -> bool:
        """Whether reordered weights are used: only if the weights are frozen and any change of them would be
        noticed."""
        weight = self.weight
        return (x.device.type == "cpu" and x.shape[2] * x.shape[3] <= PIXELS and not weight.requires_grad
                and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
                and weight.nbytes <= LARGEST and weight.dtype == x.dtype and not weight.is_inference()
                and x.dtype in (torch.float32, torch.bfloat16) and not (torch.is_grad_enabled() and x.requires_grad)
                and torch.backends.mkldnn.is_available() and reorder is not None)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the reordered weights, which can be neither copied nor written."""
        return {name: value for name, value in self.__dict__.items() if name != "packed"}
