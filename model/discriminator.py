"""The patch discriminator, which judges for each patch of an image whether it is real or decoded (Isola et al. 2017,
section 3.2).

Axis letters: B batch, H W size of the image, h w size of the map of logits.
"""

from dataclasses import dataclass

from torch import Tensor, nn

SLOPE = 0.2  # of LeakyReLU below 0
LARGEST = 8  # channels of the widest convolution, in units of the first


@dataclass(frozen=True)
class DiscriminatorConfig:
    """`layers` is the number of convolutions of stride 2: 3 of them judge patches of 70 x 70 pixels, 2 patches of 34 x
    34, and 1 patches of 16 x 16."""

    channels: int = 64  # of the first convolution
    layers: int = 3

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: at least 1")

    @property
    def smallest(self) -> int:
        """Side in pixels of the smallest image that still gives a logit; the two convolutions of stride 1 each reduce
        the size of the map by one."""
        return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
    """Convolutions with 4 x 4 filters, and batch normalisation between the first and the last; the map is not
    pooled."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        c = config.channels
        layers: list[nn.Module] = [nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for number in range(1, config.layers + 1):
            c_in, c = c, config.channels * min(2**number, LARGEST)
            stride = 2 if number < config.layers else 1
            layers += [nn.Conv2d(c_in, c, 4, stride, padding=1, bias=False), nn.BatchNorm2d(c), nn.LeakyReLU(SLOPE)]
        layers.append(nn.Conv2d(c, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.layers:  # appendix 6.2 of the paper
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of being real for images (B, 3, H, W) in [-1, 1]. Raises ValueError for another shape."""
        smallest = self.config.smallest
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest:
            raise ValueError(f"images: {tuple(images.shape)}; valid: (B, 3, H, W), H and W at least {smallest}")
        return self.layers(images)
