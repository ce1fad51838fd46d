"""Decoding with less memory: one image at a time, and in overlapping tiles.

The decoder's activations at full resolution are the largest of the whole system: with the autoencoder of Stable
Diffusion one map of 256 channels at 512 x 512 pixels takes 268 MB in fp32, and several exist at a time. Axis letters: B
batch, C latent channels, h w latent size, f image pixels to a latent pixel.
"""

import torch
from torch import Tensor

from model.autoencoder import Autoencoder


def decode_sliced(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Images (B, 3, f h, f w) of unit-scale latents (B, C, h, w), decoded one at a time with the memory of one.

    Every image equals bit for bit what `decode` gives for a batch of one. Raises ValueError for another shape.
    """
    autoencoder.check_latents(latents)
    return torch.cat([autoencoder.decode(latent) for latent in latents.split(1)])


def decode_tiled(autoencoder: Autoencoder, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """Images (B, 3, f h, f w) of unit-scale latents (B, C, h, w), decoded in overlapping tiles with the memory of one
    tile.

    This is an approximation: normalisation and attention see a tile instead of the image, so colours drift slightly
    from tile to tile. Where tiles overlap, they are blended with weights that rise linearly from their edges, which
    hides the seams. Latents that fit into one tile are decoded whole. tile, overlap: latent pixels along a side. Raises
    ValueError unless 0 <= overlap <= tile / 2.
    """
    if tile < 1 or not 0 <= 2 * overlap <= tile:
        raise ValueError(f"tile: {tile} with overlap {overlap}; valid: tile from 1 up, overlap from 0 to tile / 2")
    autoencoder.check_latents(latents)
    (height, width), f = latents.shape[2:], autoencoder.factor
    if height <= tile and width <= tile:
        return decode_sliced(autoencoder, latents)
    images = latents.new_zeros(len(latents), autoencoder.config.image_channels, f * height, f * width)
    for top, bottom in tile_spans(height, tile, overlap):
        for left, right in tile_spans(width, tile, overlap):
            part = decode_sliced(autoencoder, latents[:, :, top:bottom, left:right])  # (B, 3, f tile, f tile)
            weights = (tile_weights(top, bottom, height, overlap, f, images)[:, None]
                       * tile_weights(left, right, width, overlap, f, images))  # (f tile, f tile)
            images[:, :, f * top:f * bottom, f * left:f * right] += weights * part
    return images


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of the tiles that cover 0 .. length; neighbours share `overlap`, and the last tile may be
    shorter."""
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - overlap)
    return [(start, min(start + tile, length)) for start in starts]


def tile_weights(start: int, end: int, length: int, overlap: int, f: int, like: Tensor) -> Tensor:
    """Weights (f (end - start),) of a tile along one side; the weights of all tiles sum to 1 at every pixel.

    They rise over the overlap with the previous tile and fall over the overlap with the next one, if these exist.
    """
    weights = torch.ones(f * (end - start), dtype=like.dtype, device=like.device)
    rising = (torch.arange(f * overlap, dtype=like.dtype, device=like.device) + 0.5) / max(f * overlap, 1)
    if start > 0:
        weights[:f * overlap] = rising
    if end < length:
        weights[len(weights) - f * overlap:] = rising.flip(0)  # rising + its flip is 1
    return weights
