"""A small decoder for previews: latents to nearly the images that the autoencoder's own decoder makes of them.

After TAESD (Bohan 2023, github.com/madebyollin/taesd): plain 3x3 convolutions with ReLU in residual blocks, no norm, no
attention, few channels, the latent squashed softly first. Axis letters: B batch, C latent channels, H W image size,
h w latent size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.autoencoder import AutoencoderConfig

BOUND = 3.0  # a latent of unit scale is squashed to this range


@dataclass(frozen=True)
class TinyDecoderConfig:
    """`channels` of every layer and `blocks` at every resolution, but for the finest of several, which has one; the
    rest follows from the autoencoder."""

    channels: int = 64
    blocks: int = 3

    def __post_init__(self) -> None:
        for name in ("channels", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: at least 1")


class TinyBlock(nn.Module):
    """Three convolutions, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(*(module for index in range(3) for module in (
            nn.Conv2d(channels, channels, 3, padding=1), *([nn.ReLU()] if index < 2 else []))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> the same shape."""
        return F.relu(x + self.layers(x))


class TinyDecoder(nn.Module):
    """Unit-scale latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1] and not clamped."""

    def __init__(self, config: TinyDecoderConfig, autoencoder: AutoencoderConfig):
        super().__init__()
        c, self.latent_channels, self.stem = config.channels, autoencoder.latent_channels, autoencoder.stem
        layers: list[nn.Module] = [nn.Conv2d(self.latent_channels, c, 3, padding=1), nn.ReLU()]
        for level in range(len(autoencoder.channels)):
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1, bias=False)]
            finest = level and level == len(autoencoder.channels) - 1
            layers += [TinyBlock(c) for _ in range(1 if finest else config.blocks)]
        layers.append(nn.Conv2d(c, autoencoder.image_channels * self.stem**2, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W). Raises ValueError on another shape."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents: {tuple(latents.shape)}; valid: (B, {self.latent_channels}, h, w)")
        x = self.layers(BOUND * torch.tanh(latents / BOUND))  # (B, 3 stem^2, H / stem, W / stem)
        return F.pixel_shuffle(x, self.stem) if self.stem > 1 else x
