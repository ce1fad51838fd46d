"""PSNR and SSIM against scikit-image's, in whatever arithmetic surrounds them."""
import numpy as np
import pytest
import torch
from skimage.data import astronaut, chelsea
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eval.fidelity import psnr, ssim


def photographs(height: int = 64, width: int = 80) -> torch.Tensor:
    """Parts of two photographs, (2, 3, H, W) in [-1, 1]."""
    parts = [photo[60:60 + height, 100:100 + width] for photo in (astronaut(), chelsea())]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).float() / 127.5 - 1


def worsened(images: torch.Tensor, kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return {"noise": images + 0.2 * torch.randn(images.shape, generator=draw),
            "blur": torch.nn.functional.avg_pool2d(images, 5, 1, 2), "dark": 0.6 * images - 0.4,
            "negative": -images}[kind].clamp(-1, 1)


@pytest.mark.parametrize("kind", ["noise", "blur", "dark", "negative"])
def test_equal_to_scikit_image(kind):
    """SSIM: fp64 on both sides, 1e-6; PSNR: fp32 here, 1e-4 dB."""
    images = photographs()
    decoded = worsened(images, kind)
    for i, (ours, db) in enumerate(zip(ssim(decoded, images), psnr(decoded, images))):
        theirs = structural_similarity(decoded[i].double().numpy(), images[i].double().numpy(), data_range=2,
                                       channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert float(ours) == pytest.approx(theirs, abs=1e-6)
        expected = peak_signal_noise_ratio(images[i].double().numpy(), decoded[i].double().numpy(), data_range=2)
        assert float(db) == pytest.approx(expected, abs=1e-4)


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b, c1 = 0.5, -0.25, (0.01 * 2) ** 2
    one, two = torch.full((1, 3, 11, 11), a), torch.full((1, 3, 11, 11), b)
    assert float(ssim(one, two)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)


def test_equal_images_and_values_out_of_range():
    images = photographs()
    torch.testing.assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64))
    white = torch.ones(1, 3, 16, 16)
    assert float(ssim(white + 3, white)) == 1.0  # clipped as a file would be


def test_surrounding_arithmetic_changes_nothing():
    images = photographs()
    decoded = worsened(images, "noise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ssim(decoded, images), psnr(decoded, images)
    assert torch.equal(inside[0], ssim(decoded, images)) and torch.equal(inside[1], psnr(decoded, images))


@pytest.mark.parametrize("shapes", [((2, 3, 16, 16), (2, 3, 16, 15)), ((1, 3, 10, 32), (1, 3, 10, 32))])
def test_images_that_cannot_be_compared_are_refused(shapes):
    with pytest.raises(ValueError, match="valid: two of one shape .* at least 11"):
        ssim(*(torch.zeros(shape) for shape in shapes))
