"""Colours as they are seen: CIELAB, and the CIEDE2000 difference, as functions of tensors.

sRGB of IEC 61966-2-1, white point D65. Values of sRGB are in [0, 1] here; the last axis holds the three coordinates.
"""
import math

import torch
from torch import Tensor

LINEAR_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)
KNEE = (6 / 29) ** 3  # where CIELAB's cube root is continued by a line


def lab_from_srgb(srgb: Tensor) -> Tensor:
    """CIELAB (..., 3) of sRGB values (..., 3) in [0, 1]: L in 0..100, a and b about -110..110."""
    low = srgb <= 0.04045
    # the power is taken of a safe number where the line is meant: its gradient must not become NaN there
    linear = torch.where(low, srgb / 12.92, ((srgb.masked_fill(low, 0.5) + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(LINEAR_TO_XYZ, dtype=srgb.dtype, device=srgb.device)
    xyz = linear @ matrix.T / torch.tensor(WHITE, dtype=srgb.dtype, device=srgb.device)  # (..., 3)
    dark = xyz <= KNEE
    f = torch.where(dark, xyz / (3 * (6 / 29) ** 2) + 4 / 29, xyz.masked_fill(dark, 0.5) ** (1 / 3))
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def ciede2000(first: Tensor, second: Tensor) -> Tensor:
    """The CIEDE2000 colour difference of CIELAB values (..., 3) that broadcast against each other: (...).

    Sharma, Wu and Dalal 2005, "The CIEDE2000 color-difference formula", equations 2 to 22, with all weights 1. About 1
    is just noticed side by side.
    """
    l_1, a_1, b_1 = first.unbind(-1)
    l_2, a_2, b_2 = second.unbind(-1)
    mean_c = (torch.hypot(a_1, b_1) + torch.hypot(a_2, b_2)) / 2
    stretch = 1.5 - 0.5 * (mean_c**7 / (mean_c**7 + 25.0**7)).sqrt()  # 1 + G
    a_1, a_2 = stretch * a_1, stretch * a_2
    c_1, c_2 = torch.hypot(a_1, b_1), torch.hypot(a_2, b_2)
    h_1, h_2 = (torch.rad2deg(torch.atan2(b, a)) % 360 for a, b in ((a_1, b_1), (a_2, b_2)))
    grey = c_1 * c_2 == 0  # a grey has no hue
    turn = (h_2 - h_1 + 180) % 360 - 180  # the short way round, as equation 10
    turn = torch.where((h_2 - h_1) == 180, turn.abs(), turn).masked_fill(grey, 0.0)
    d_hue = 2 * (c_1 * c_2).sqrt() * torch.sin(torch.deg2rad(turn) / 2)
    hue = (h_1 + h_2) / 2
    far = (h_1 - h_2).abs() > 180
    hue = torch.where(far, torch.where(h_1 + h_2 < 360, hue + 180, hue - 180), hue)
    hue = torch.where(grey, h_1 + h_2, hue)
    lightness, chroma = (l_1 + l_2) / 2, (c_1 + c_2) / 2

    def cosine(factor: float, degrees: float) -> Tensor:
        return torch.cos(torch.deg2rad(factor * hue + degrees))

    t = 1 - 0.17 * cosine(1, -30) + 0.24 * cosine(2, 0) + 0.32 * cosine(3, 6) - 0.20 * cosine(4, -63)
    square = (lightness - 50) ** 2
    s_l = 1 + 0.015 * square / (20 + square).sqrt()
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    rotation = -2 * (chroma**7 / (chroma**7 + 25.0**7)).sqrt() * torch.sin(
        math.radians(60) * torch.exp(-(((hue - 275) / 25) ** 2)))
    d_l, d_c, d_h = (l_2 - l_1) / s_l, (c_2 - c_1) / s_c, d_hue / s_h
    return (d_l**2 + d_c**2 + d_h**2 + rotation * d_c * d_h).clamp(min=0).sqrt()


def palette_error(images: Tensor, palette: Tensor) -> Tensor:
    """The mean over pixels of the CIEDE2000 difference to the nearest colour of a palette: (B,).

    images uint8 (B, 3, H, W); palette sRGB (K, 3) in [0, 1].
    """
    pixels = lab_from_srgb(images.permute(0, 2, 3, 1).flatten(1, 2).float() / 255)  # (B, N, 3)
    colours = lab_from_srgb(palette.float())
    nearest = torch.stack([ciede2000(pixels, colour) for colour in colours]).amin(dim=0)  # (B, N)
    return nearest.mean(dim=1)
