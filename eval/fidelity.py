"""How close an image is to its original, pixel by pixel: PSNR and SSIM. Axis letters: B batch, C channels, H W size."""
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # of the Gaussian of SSIM, in pixels
K1, K2 = 0.01, 0.03
PEAK = 2.0  # peak to peak of images in [-1, 1]


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image in dB, (B,). Both are (B, 3, H, W) in [-1, 1], peak to peak 2."""
    error = (decoded.float().clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(PEAK**2 / error.clamp(min=1e-12))


def ssim(decoded: Tensor, images: Tensor) -> Tensor:
    """The structural similarity of each image, (B,), at most 1. Both are (B, C, H, W) in [-1, 1].

    Wang et al. 2004, equation 13: means, variances and covariance are taken under a Gaussian window at every place
    where the whole window lies inside the image, and the result is averaged over places and channels, in fp64. Raises
    ValueError for different shapes and for images smaller than the window.
    """
    if decoded.shape != images.shape or images.ndim != 4 or min(images.shape[2:]) < WINDOW:
        raise ValueError(f"images: {tuple(decoded.shape)} and {tuple(images.shape)}; valid: two of one shape "
                         f"(B, C, H, W), H and W at least {WINDOW}")
    channels = images.shape[1]
    offset = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - WINDOW // 2
    gauss = torch.softmax(-offset.square() / (2 * SIGMA**2), dim=0)  # (11,), sums to 1
    row, column = (gauss.view(shape).expand(channels, *shape[1:]) for shape in ((1, 1, 1, -1), (1, 1, -1, 1)))

    def local_mean(values: Tensor) -> Tensor:
        values = F.conv2d(values, row, groups=channels)  # (B, C, H, W - 10)
        return F.conv2d(values, column, groups=channels)  # (B, C, H - 10, W - 10)

    x, y = decoded.double().clamp(-1, 1), images.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x.square(), local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)  # contrast and structure in one, as C3 = C2 / 2
    return (luminance * structure).mean(dim=(1, 2, 3))
