"""Images at the size that a network was trained on. The filter changes every distance, so it is part of the stamp.

Axis letters: B batch, H W size.
"""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["clean", "bilinear"]
STAMPS = {"clean": "cubic antialiased in float", "bilinear": "bilinear without antialiasing"}


def check_images(images: Tensor) -> None:
    """Raise ValueError unless ``images`` are (B, 3, H, W), floating, finite and in [-1, 1] up to rounding."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}; valid: floating (B, 3, H, W) in [-1, 1]")
    if not torch.isfinite(images).all():
        wrong = (~torch.isfinite(images)).flatten(1).any(dim=1)
        raise ValueError(f"images: {int(wrong.sum())} of {len(images)} hold NaN or infinity, the first is number "
                         f"{int(wrong.nonzero()[0])}; valid: numbers in [-1, 1]")
    if len(images) and images.abs().max() > 1.01:
        raise ValueError(f"images: values from {float(images.min()):.3g} to {float(images.max()):.3g}; valid: [-1, 1]")


def resize_pixels(pixels: Tensor, size: int, how: Resize = "clean") -> Tensor:
    """Pixels (B, 3, H, W) on a scale of 0 to 255 -> (B, 3, size, size), clipped to that scale and not rounded.

    "clean" is Pillow's cubic filter, which averages where it shrinks, on floats (Parmar et al. 2022, section 3.1).
    "bilinear" takes two neighbours along each axis, whatever the factor, as pytorch-fid does; shrinking then aliases.
    Raises ValueError for another name.
    """
    if how not in STAMPS:
        raise ValueError(f"how: {how!r}; valid: {', '.join(STAMPS)}")
    if pixels.shape[2:] == (size, size):
        return pixels
    if how == "clean":
        return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
