"""The perceptual term of the autoencoder's loss: LPIPS if its weights are given, else a Laplacian pyramid.

Axis letters: B batch, H W size of the images.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from files.whole import sha256_of
from model.lpips import load_lpips

LEVELS = 5  # largest number of levels of the pyramid
COARSEST = 4  # smallest side of a level in pixels

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # decoded, images (B, 3, H, W) -> (B,)


@dataclass(frozen=True)
class PerceptualConfig:
    """``weight`` 0 switches the term off. ``lpips`` reads ``files``: one with both VGG16 and the heads of LPIPS, or one
    for each. ``pyramid`` needs no files."""

    weight: float = 0.0
    kind: Literal["pyramid", "lpips"] = "pyramid"
    files: tuple[str, ...] = ()

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight: {self.weight}; valid: from 0 up")
        if self.kind == "lpips" and len(self.files) not in (1, 2):
            raise ValueError(f"files: {list(self.files)}; valid for lpips: one file with VGG16 and the heads, or two")
        if self.kind == "pyramid" and self.files:
            raise ValueError(f"files: {list(self.files)}; valid for pyramid: none, the weights are those of lpips")


def perceptual_distance(config: PerceptualConfig, device: torch.device) -> tuple[Distance | None, str]:
    """The distance function of the term, None if it is off, and a line for the manifest. Raises ValueError for bad
    files."""
    if config.weight == 0:
        return None, "off"
    if config.kind == "pyramid":
        return pyramid_distance, "pyramid: L1 over a Laplacian pyramid, no weights"
    lpips = load_lpips(config.files).to(device)
    names = ", ".join(f"{Path(path).name} sha256 {sha256_of(path)[:16]}" for path in config.files)
    return lpips, f"lpips: VGG16 ({names})"


def laplacian_pyramid(images: torch.Tensor) -> list[torch.Tensor]:
    """Images (B, 3, H, W) as details at full size, half, a quarter and so on, and the remainder (Burt and Adelson
    1983).

    `pyramid_sum` restores the images by enlarging and adding from the last to the first.
    """
    levels: list[torch.Tensor] = []
    while len(levels) < LEVELS - 1 and min(images.shape[2:]) >= 2 * COARSEST:
        coarse = downsample(images)
        levels.append(images - upsample_to(coarse, images))
        images = coarse
    return [*levels, images]


def pyramid_sum(levels: list[torch.Tensor]) -> torch.Tensor:
    """The images whose `laplacian_pyramid` is given."""
    images = levels[-1]
    for level in reversed(levels[:-1]):
        images = level + upsample_to(images, level)
    return images


def downsample(images: torch.Tensor) -> torch.Tensor:
    """Images blurred by the binomial filter (1 4 6 4 1) / 16 along both sides, then reduced to every second pixel."""
    channels = images.shape[1]
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype, device=images.device) / 16
    filters = torch.outer(taps, taps).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), filters, stride=2, groups=channels)


def upsample_to(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Images enlarged bilinearly to the height and width of ``like``."""
    return F.interpolate(images, like.shape[2:], mode="bilinear", align_corners=False)


def pyramid_distance(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each level of the Laplacian pyramids, summed over levels (B,); both (B, 3, H, W).

    L1 counts pixels, so a lost shape costs as much as faint noise everywhere. Noise vanishes after the first level,
    but a shape differs at every scale up to its own and is counted at each (the Lap_1 of Bojanowski et al. 2018: with
    means over values its weights 4^j become 1).
    """
    with torch.autocast(images.device.type, enabled=False):  # bf16 would round small differences away
        levels = laplacian_pyramid(decoded.float() - images)  # the pyramid is linear: that of the difference
        return torch.stack([level.abs().mean(dim=(1, 2, 3)) for level in levels]).sum(dim=0)
