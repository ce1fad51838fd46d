"""Group normalisation (Wu and He 2018) in the form that is fastest for its input.

Axis letters: B batch, C channels, G groups, H height, W width, N = H W pixels.
"""
import torch
from torch import Tensor, nn

# Time of each form over that of the kernel, for feature maps in channels-last order without gradients on one core of an
# AMD EPYC with AVX512-BF16 (torch 2.14); below 1 the form is faster. "copied" normalises a copy in the contiguous
# order, "written out" is the function below.
#
#                        64x16x16  128x16x16  192x8x8  128x8x8  256x4x4  256x2x2
#   float32,  copied        0.6       1.1       1.1      0.8      2.1      1.7
#   float32,  written out   0.5       0.6       0.7      1.3      1.6      4.7
#   bfloat16, copied        0.11      0.3       0.3      0.3      0.4      1.1
#   bfloat16, written out   0.10      0.2       0.25     0.5      0.3      2.9
#
# The kernel adds up a group of two channels in fp32, or of any width in bf16, one value at a time. As in attention the
# batch must not decide: the bits of an image would depend on its neighbours.
WRITTEN_OUT = 12_000, 4_000_000  # smallest and largest number of values of an image; it takes three times the memory


class GroupNorm(nn.GroupNorm):
    """PyTorch's module of that name, with the same weights and, up to rounding, the same results, but without its slow
    path."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in fp32 in a training step under autocast."""
        if not kernel_is_slow(x):
            return super().forward(fp32_in_training(x))
        if WRITTEN_OUT[0] <= x.shape[1] * x.shape[2] * x.shape[3] <= WRITTEN_OUT[1]:
            return written_out_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x if x.dtype == torch.float32 else x.contiguous())


def kernel_is_slow(x: Tensor) -> bool:
    """Whether PyTorch's kernel is slow for x, which is the case in channels-last order on a CPU. With gradients, under
    autocast and inside a compiled graph the kernel is used all the same."""
    return (x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last))


def fp32_in_training(x: Tensor) -> Tensor:
    """x (B, C, H, W) converted to fp32 in a training step under autocast on a CPU, where the kernel is slow for bf16:
    with SiLU, forward and backward of (32, 128, 8, 8) in channels-last order take 3.1 ms on one core, in fp32 1.5 ms;
    written out with a hand-written gradient they take 2.1 ms. The layer after the norm rounds to bf16 again."""
    training = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return x.float() if training and x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def written_out_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) weight + bias with moments over each group of channels, in fp32.

    x (B, C, H, W) and the result are in channels-last order. The variance is that of the centred values, which does
    not suffer from cancellation if the mean is large.
    """
    batch, channels, height, width = x.shape
    count = height * width * channels // groups
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels).float()  # (B, N, C), a view in fp32
    total = pixels.sum(1).view(batch, groups, -1).sum(2, keepdim=True)  # (B, G, 1)
    mean = (total / count).expand(batch, groups, channels // groups).reshape(batch, 1, channels)
    centred = pixels - mean
    square = (centred * centred).sum(1).view(batch, groups, -1).sum(2, keepdim=True)
    scale = (square / count + eps).rsqrt() * weight.float().view(1, groups, -1)  # (B, G, C / G)
    result = torch.addcmul(bias.float(), centred, scale.view(batch, 1, channels)).to(x.dtype)
    return result.view(batch, height, width, channels).permute(0, 3, 1, 2)
