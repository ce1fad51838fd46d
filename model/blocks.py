"""The building blocks of the UNet and the autoencoder.

Axis letters: B batch, C channels, H height, W width, N = H W image tokens, L context tokens, d width of a head.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model.attention import CrossAttention, SelfAttention
from model.norm import GroupNorm
from model.packed import Conv2d


def zero_init(module: nn.Module) -> nn.Module:
    """Set the parameters to zero and return the module, so that the residual branch which it ends initially adds
    nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def call_with_checkpointing(module: nn.Module, *args: Any, recompute: bool) -> Tensor:
    """module(*args). With `recompute` its activations are not kept; the backward pass computes them again.

    This is gradient checkpointing (Chen et al. 2016): only the arguments are kept.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)


def check_groups(channels: tuple[int, ...], groups: int) -> None:
    """Raises ValueError unless `groups` divides every number of channels."""
    for count in channels:
        if groups < 1 or count < 1 or count % groups:
            raise ValueError(f"norm_groups: {groups} does not divide {count} of channels {channels}; valid: a divisor")


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of t (B,) as float32 (B, width), cosines first (Ho et al. 2020 after Vaswani et al. 2017, section
    3.5)."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, width)


class TimeMLP(nn.Module):
    """Maps a timestep to the vector that every residual block adds. It includes their SiLU, which is thus computed
    once."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.linear1 = nn.Linear(channels, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype, *beside: Tensor | None) -> Tensor:
        """t (B,) -> (B, width) in `dtype`; what is `beside`, (B, width) each, is added before the last SiLU."""
        x = timestep_embedding(t, self.channels).to(dtype)
        x = self.linear2(F.silu(self.linear1(x)))
        for vector in beside:
            x = x if vector is None else x + vector
        return F.silu(x)


class ScalarMLP(nn.Module):
    """Maps a number beside the time to a vector that is added to the time embedding.

    It is beta, one over the guidance scale, where guidance is folded in (`diffusion/guidance_free.py`), or the length
    of a jump (`diffusion/shortcut.py`). The last layer starts at zero, so that a network which was trained without
    this input begins with the same predictions. The number lies in [0, 1]; it is stretched to the range that the
    sinusoids are made for.
    """

    def __init__(self, channels: int, width: int, stretch: float = 1000.0):
        super().__init__()
        self.channels, self.stretch = channels, stretch
        self.linear1 = nn.Linear(channels, width)
        self.linear2 = zero_init(nn.Linear(width, width))

    def forward(self, number: Tensor, dtype: torch.dtype) -> Tensor:
        """number (B,) -> (B, width) in `dtype`."""
        return self.linear2(F.silu(self.linear1(timestep_embedding(self.stretch * number, self.channels).to(dtype))))


class Positions(nn.Module):
    """Learned vectors of the rows and of the columns, added to a feature map (Dosovitskiy et al. 2021, appendix D.4).

    Without them attention knows positions only as far as convolutions leak them in from the border, but "above" has
    to be learned as a position. The vectors are embeddings, so that Muon does not treat the tables as matrices.
    """

    def __init__(self, side: int, channels: int, std: float = 0.3):
        super().__init__()
        self.rows, self.columns = nn.Embedding(side, channels), nn.Embedding(side, channels)
        for table in (self.rows, self.columns):
            nn.init.normal_(table.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, side, side) -> the same shape."""
        places = self.rows.weight[:, None] + self.columns.weight[None]  # (H, W, C)
        return x + places.permute(2, 0, 1).to(x.dtype)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + input (Ho et al. 2020, appendix B)."""

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, time_width: int | None = None,
                 dropout: float = 0.0):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.time = None if time_width is None else nn.Linear(time_width, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = None if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x (B, c_in, H, W); time (B, time_width), after SiLU, or `bias` (B or 1, c_out), its projection in this
        block. Returns (B, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        if self.time is not None:
            h = h + (self.time(time) if bias is None else bias)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Downsample(nn.Module):
    """Strided convolution, (B, C, H, W) -> (B, C, H/2, W/2).

    The autoencoder of latent diffusion pads only on the right and below, the UNet on every side.
    """

    def __init__(self, channels: int, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour interpolation followed by a convolution, (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of tokens, (B, N, c_in) -> (B, N, c_out), with weights as in SD-1.x and the cost of a
    Linear."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class GEGLU(nn.Module):
    """Feed-forward layer gated by a GELU (Shazeer 2020, equation 6), hidden width 4 C."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.out(self.dropout(apply_gate(self.proj(x))))  # (B, N, 8C) -> (B, N, 4C) -> (B, N, C)


def apply_gate(x: Tensor) -> Tensor:
    """value gelu(gate) of x (..., 2 C), where value is the first half of its columns and gate the second: (..., C)."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return Gate.apply(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class Gate(torch.autograd.Function):
    """`apply_gate` with the same bits and a cheaper gradient. Autograd would compute the gradients of both halves
    separately and copy them into one tensor, the largest of a transformer block; here they are written into it
    directly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(..., 2 C) -> (..., C)."""
        value, gate = x.chunk(2, dim=-1)
        active = F.gelu(gate)
        ctx.save_for_backward(x, active)
        return value * active

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """(..., C) -> (..., 2 C)."""
        x, active = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_value, of_gate = result.chunk(2, dim=-1)
        torch.mul(gradient, active, out=of_value)
        torch.ops.aten.gelu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return result


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, context_width: int, qk_norm: bool = False, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, heads, context_width, qk_norm=qk_norm)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width, dropout)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, C); k, v (B, heads, L, d) of the context; mask (B, 1, 1, L) or None. Returns (B, N, C)."""
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), k, v, mask)
        return x + self.feed_forward(self.norm3(x))


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a `SpatialTransformer` beside its number of channels, which its heads and norm groups must divide."""

    heads: int
    depth: int  # transformer blocks
    context_width: int
    groups: int  # of the GroupNorm in front
    linear_projection: bool  # weights of the projections around the blocks: Linear, or 1x1 convolution as in SD-1.x
    qk_norm: bool = False
    dropout: float = 0.0


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, appendix E.2.1)."""

    def __init__(self, width: int, config: TransformerConfig):
        super().__init__()
        projection = nn.Linear if config.linear_projection else PointwiseConv
        self.norm = GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in = projection(width, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, config.context_width, config.qk_norm, config.dropout)
            for _ in range(config.depth)
        )
        self.proj_out = zero_init(projection(width, width))

    def forward(self, x: Tensor, keys_values: tuple[tuple[Tensor, Tensor], ...], mask: Tensor | None) -> Tensor:
        """x (B, C, H, W); keys_values has one pair (B, heads, L, d) for each block; mask (B, 1, 1, L). Returns (B, C,
        H, W)."""
        height, width = x.shape[2:]
        h = to_tokens(self.norm(x))  # (B, N, C)
        h = self.proj_in(h)
        for block, (k, v) in zip(self.blocks, keys_values, strict=True):
            h = block(h, k, v, mask)
        return x + to_image(self.proj_out(h), height, width)


class ImageAttention(nn.Module):
    """Self-attention with one head over the pixels of a feature map, added to its input; used in the autoencoder."""

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=eps)
        self.attention = SelfAttention(channels, heads=1, bias=True)
        zero_init(self.attention.out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + to_image(self.attention(to_tokens(self.norm(x))), *x.shape[2:])


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C); no copy when x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(x: Tensor, height: int, width: int) -> Tensor:
    """(B, H W, C) -> (B, C, H, W), a channels_last view."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
