"""Decoding with less memory: one picture at a time, and in overlapping tiles.

The decoder's activations at full resolution are the largest of the whole system: with the autoencoder of Stable
Diffusion one map of 256 channels at 512 x 512 pixels is 268 MB in fp32, and several are alive at a time. Axis letters:
B batch, C latent channels, h w latent size, f image pixels to a latent pixel.
"""

import torch
from torch import Tensor

from model.autoencoder import Autoencoder


def decode_sliced(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Unit-scale latents (B, C, h, w) -> images (B, 3, f h, f w), one picture at a time: the memory of one.

    Bit for bit what `decode` gives for a batch of one. Raises ValueError on another shape.
    """
    autoencoder.check_latents(latents)
    return torch.cat([autoencoder.decode(latent) for latent in latents.split(1)])


def decode_tiled(autoencoder: Autoencoder, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """Unit-scale latents (B, C, h, w) -> images (B, 3, f h, f w), in overlapping tiles: the memory of one tile.

    An approximation: normalisation and attention see a tile instead of the picture, so colours drift by a little from
    tile to tile. Where tiles overlap they are mixed with weights that rise linearly from their edges, which hides the
    seams. Latents that fit into one tile are decoded whole. tile, overlap: latent pixels along a side. Raises
    ValueError unless 0 <= overlap <= tile / 2.
    """
    if tile < 1 or not 0 <= 2 * overlap <= tile:
        raise ValueError(f"tile: {tile} with overlap {overlap}; valid: tile from 1 up, overlap from 0 to tile / 2")
    autoencoder.check_latents(latents)
    (height, width), f = latents.shape[2:], autoencoder.factor
    if height <= tile and width <= tile:
        return decode_sliced(autoencoder, latents)
    images = latents.new_zeros(len(latents), autoencoder.config.image_channels, f * height, f * width)
    for top, bottom in spans(height, tile, overlap):
        for left, right in spans(width, tile, overlap):
            part = decode_sliced(autoencoder, latents[:, :, top:bottom, left:right])  # (B, 3, f tile, f tile)
            weights = (ramp(top, bottom, height, overlap, f, images)[:, None]
                       * ramp(left, right, width, overlap, f, images))  # (f tile, f tile)
            images[:, :, f * top:f * bottom, f * left:f * right] += weights * part
    return images


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of tiles that cover 0 .. length, `overlap` shared between neighbours; the last may be shorter."""
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - overlap)
    return [(start, min(start + tile, length)) for start in starts]


def ramp(start: int, end: int, length: int, overlap: int, f: int, like: Tensor) -> Tensor:
    """Weights (f (end - start),) of a tile along one side; those of all tiles add up to 1 at every pixel.

    They rise over the overlap with the tile before and fall over the one after, where there is one.
    """
    weights = torch.ones(f * (end - start), dtype=like.dtype, device=like.device)
    rising = (torch.arange(f * overlap, dtype=like.dtype, device=like.device) + 0.5) / max(f * overlap, 1)
    if start > 0:
        weights[:f * overlap] = rising
    if end < length:
        weights[len(weights) - f * overlap:] = rising.flip(0)  # rising + its flip is 1
    return weights
