"""Decoding in slices changes no bit; in tiles it is exact where the decoder is local, and without seams where not."""

from types import SimpleNamespace

import pytest
import torch

from model.autoencoder import Autoencoder, AutoencoderConfig
from model.decode import decode_sliced, decode_tiled, tile_spans, tile_weights

CONFIG = AutoencoderConfig(channels=(16, 32), latent_channels=3, blocks=1, norm_groups=8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)  # biases of convolutions are drawn at construction
    network, generator = Autoencoder(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter[0].numel() ** 0.5) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
        network.latent_std.copy_(torch.tensor([0.5, 2.0, 3.0]))
    return network.eval()


class Local:
    """An autoencoder that decodes every latent pixel by itself, so that tiles lose nothing."""

    factor, config = 2, SimpleNamespace(image_channels=3)

    def __init__(self):
        self.largest = 0

    def check_latents(self, latents):
        pass

    def decode(self, latents):
        self.largest = max(self.largest, latents.shape[2] * latents.shape[3] * len(latents))
        return torch.tanh(latents).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@torch.no_grad()
def test_slices_are_batches_of_one_bit_for_bit(autoencoder):
    latents = draw(4, 3, 6, 10)
    images = decode_sliced(autoencoder, latents)
    for k in range(4):
        assert torch.equal(images[k:k + 1], autoencoder.decode(latents[k:k + 1]))
    torch.testing.assert_close(images, autoencoder.decode(latents), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"latents: \(4, 2, 6, 10\); valid: \(B, 3, h, w\)"):
        decode_sliced(autoencoder, latents[:, :2])


@pytest.mark.parametrize("tile, overlap", [(8, 2), (8, 4), (5, 0), (16, 3), (7, 1)])
def test_tiles_of_a_local_decoder_are_exact(tile, overlap):
    local, latents = Local(), draw(2, 3, 21, 34)
    images = decode_tiled(local, latents, tile, overlap)
    torch.testing.assert_close(images, local.decode(latents), atol=1e-6, rtol=0)
    local.largest = 0
    decode_tiled(local, latents, tile, overlap)
    assert local.largest <= tile * tile  # never more than one tile of one image


@pytest.mark.parametrize("length", [9, 16, 23, 40])
@pytest.mark.parametrize("tile, overlap", [(8, 0), (8, 3), (8, 4), (1, 0)])
def test_weights_of_tiles_add_up_to_one(length, tile, overlap):
    total, like = torch.zeros(3 * length, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for start, end in tile_spans(length, tile, overlap):
        assert 0 < end - start <= tile
        total[3 * start:3 * end] += tile_weights(start, end, length, overlap, 3, like)
    torch.testing.assert_close(total, torch.ones_like(total))


@torch.no_grad()
def test_what_fits_into_a_tile_is_decoded_whole(autoencoder):
    latents = draw(2, 3, 8, 12)
    assert torch.equal(decode_tiled(autoencoder, latents, 12, 4), decode_sliced(autoencoder, latents))


@torch.no_grad()
def test_seams_are_blended(autoencoder):
    """The error jumps where hard tiles meet, and not where blended ones do; both stay near the whole image."""
    latents = draw(4, 3, 32, 32) + torch.linspace(-1, 1, 32)
    whole = decode_sliced(autoencoder, latents)
    hard, blended = (decode_tiled(autoencoder, latents, 16, overlap) - whole for overlap in (0, 8))

    def step(error: torch.Tensor, column: int) -> torch.Tensor:
        return (error[..., column] - error[..., column - 1]).abs().mean()

    assert step(blended, 32) < 0.3 * step(hard, 32)
    assert max(step(blended, column) for column in range(1, 64)) < 0.7 * step(hard, 32)
    assert blended.square().mean() < hard.square().mean() < 0.3 * whole.var()


@pytest.mark.parametrize("tile, overlap", [(0, 0), (8, 5), (8, -1)])
def test_tiles_that_cannot_be_are_refused(autoencoder, tile, overlap):
    with pytest.raises(ValueError, match=f"tile: {tile} with overlap {overlap}; valid"):
        decode_tiled(autoencoder, draw(1, 3, 4, 4), tile, overlap)
