"""CLIP: an image transformer and a text transformer whose vectors agree if an image and a text belong together.

Radford et al. 2021. With ``regions``, patches and parts of captions have vectors of their own in a second space of the
same width, so that an image can be asked for one thing among others. Axis letters: B images, T texts, P parts of
captions, N patches, L tokens, D width of a transformer, E width of the shared space.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.attention import check_heads
from model.blocks import call_with_checkpointing
from model.text_encoder import Layer, TextEncoder, TextEncoderConfig, end_token_state

# Of the published weights: mean and standard deviation of pixels in [0, 1] over their training images.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_SCALE = 100.0  # of the logits (section 2.5)
REGION_SHARPNESS = 10.0  # of the attention of a text to patches: 0 gives their mean, infinity their maximum
REGION_SCALE, REGION_BIAS = 10.0, -5.0  # of the logits of regions at the start: most texts are in few images


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Shape of an image transformer, and the pixel values that it expects.

    mean, std: of pixels in [0, 1], one for each channel; 0.5 leaves images in [-1, 1] unchanged.
    """

    size: int = 224  # pixels along a side
    patch: int = 32  # pixels along a side of a patch
    channels: int = 3
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    gradient_checkpointing: bool = False  # as in the text encoder

    def __post_init__(self) -> None:
        for name in ("size", "patch", "channels", "width", "layers", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: at least 1")
        if self.size % self.patch:
            raise ValueError(f"patch: {self.patch} does not divide size {self.size}; valid: a divisor")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation: {self.activation!r}; valid: 'quick_gelu', 'gelu'")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: a number for each of {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std: {self.std}; valid: above 0")
        check_heads(self.width, self.heads)

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.size // self.patch) ** 2


@dataclass(frozen=True)
class ClipConfig:
    """Shape of both encoders, the width E of the space they share, the initial temperature, and whether patches have
    vectors too."""

    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    width: int = 512
    temperature: float = 0.07
    regions: bool = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: {self.width}; valid: at least 1")
        if not 1 / LARGEST_SCALE <= self.temperature <= 1e3:
            raise ValueError(f"temperature: {self.temperature}; valid: {1 / LARGEST_SCALE} to 1000")

    @classmethod
    def vit_b_32(cls) -> "ClipConfig":
        """CLIP ViT-B/32: 151,277,313 parameters."""
        image = ImageEncoderConfig(activation="quick_gelu", mean=PIXEL_MEAN, std=PIXEL_STD)
        text = TextEncoderConfig(width=512, heads=8, mlp_width=2048, activation="quick_gelu")
        return cls(image, text, width=512)

    @classmethod
    def vit_l_14(cls) -> "ClipConfig":
        """CLIP ViT-L/14, whose text encoder conditions SD-1.x: 427,616,513 parameters."""
        image = ImageEncoderConfig(patch=14, width=1024, layers=24, heads=16, mlp_width=4096, activation="quick_gelu",
                                   mean=PIXEL_MEAN, std=PIXEL_STD)
        return cls(image, TextEncoderConfig.clip_l(), width=768)


class ImageEncoder(nn.Module):
    """A transformer over the patches of an image and one class token, whose last state represents the image.

    Dosovitskiy et al. 2021, with CLIP's LayerNorm before the first layer.
    """

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.config = config
        scale = config.width**-0.5
        self.patch_embedding = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        self.position_embedding = nn.Embedding(1 + config.patches, config.width)
        self.norm_in = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        nn.init.normal_(self.position_embedding.weight, std=scale)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, size, size) in [-1, 1] -> (B, D). Raises ValueError on another shape."""
        return self.norm_out(self.states(images)[:, 0])  # (B, D)

    def states(self, images: Tensor) -> Tensor:
        """States (B, 1 + N, D) of the class token and of the patches after the last layer, before the last norm."""
        c = self.config
        if images.shape[1:] != (c.channels, c.size, c.size):
            raise ValueError(f"images: {tuple(images.shape)}; valid: (B, {c.channels}, {c.size}, {c.size})")
        patches = rearrange(self.patch_embedding(self.normalise_pixels(images)), "b d h w -> b (h w) d")  # (B, N, D)
        first = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)  # (B, 1, D)
        x = torch.cat([first, patches], dim=1) + self.position_embedding.weight  # (B, 1 + N, D)
        x = self.norm_in(x)
        for layer in self.layers:
            x = call_with_checkpointing(layer, x, recompute=self.config.gradient_checkpointing)
        return x

    def normalise_pixels(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as the pixel values that the weights expect: (pixel in [0, 1] - mean) / std."""
        mean, std = (torch.tensor(x, dtype=images.dtype, device=images.device)[:, None, None]
                     for x in (self.config.mean, self.config.std))  # (channels, 1, 1)
        return (0.5 * images + 0.5 - mean) / std


class Clip(nn.Module):
    """Both encoders, their projections into the shared space, and the temperature of the comparison."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config.image)
        self.text = TextEncoder(config.text)
        self.image_projection = nn.Linear(config.image.width, config.width, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        nn.init.normal_(self.image_projection.weight, std=config.image.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=config.text.width**-0.5)
        if config.regions:  # created last, so that all other weights begin as they do without
            self.region_image = nn.Linear(config.image.width, config.width, bias=False)
            self.region_text = nn.Linear(config.text.width, config.width, bias=False)
            self.region_scale = nn.Parameter(torch.tensor(math.log(REGION_SCALE)))
            self.region_bias = nn.Parameter(torch.tensor(REGION_BIAS))
            nn.init.normal_(self.region_image.weight, std=config.image.width**-0.5)
            nn.init.normal_(self.region_text.weight, std=config.text.width**-0.5)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, T): cosine over temperature of every image with every text. Arguments as for the two methods
        below."""
        # Radford et al. 2021, figure 3
        return self.logit_scale.exp() * self.image_vectors(images) @ self.text_vectors(ids, mask).T

    def image_vectors(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of images (B, channels, size, size) in [-1, 1]; `resize_images` gives other images this
        size."""
        return F.normalize(self.image_projection(self.image(images)), dim=-1)

    def text_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (T, E) of ids int (T, L) with mask bool (T, L), True up to the end token, whose state represents
        the text."""
        return F.normalize(self.text_projection(end_token_state(self.text(ids, mask), mask)), dim=-1)

    def patch_vectors(self, images: Tensor) -> Tensor:
        """Unit vectors (B, N, E) of the patches of images as above, row by row. Needs ``regions``."""
        return self._patch_vectors(self.image.states(images))

    def part_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (P, E) of texts as above that name one thing, to be compared with patches. Needs ``regions``."""
        return F.normalize(self.region_text(end_token_state(self.text(ids, mask), mask)), dim=-1)

    def logits_with_regions(self, images: Tensor, texts: tuple[Tensor, Tensor],
                            parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The logits (B, T) of ``forward`` for the ids and mask of ``texts``, and logits (B, P) that an image shows
        what each of the ``parts`` names, from one pass over the images. The parts are given as ids and masks of one or
        several lengths L. Needs ``regions``."""
        states = self.image.states(images)  # (B, 1 + N, D)
        whole = F.normalize(self.image_projection(self.image.norm_out(states[:, 0])), dim=-1)  # (B, E)
        named = torch.cat([self.part_vectors(*some) for some in parts])  # (P, E)
        found = attend_regions(self._patch_vectors(states), named)  # (B, P)
        return (self.logit_scale.exp() * whole @ self.text_vectors(*texts).T,
                self.region_scale.exp() * found + self.region_bias)

    def _patch_vectors(self, states: Tensor) -> Tensor:
        return F.normalize(self.region_image(self.image.norm_out(states[:, 1:])), dim=-1)

    def resize_images(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) at the size of the image encoder: the shorter side is resized by a cubic filter,
        and the centre is cropped."""
        size, (height, width) = self.config.image.size, images.shape[2:]
        if (height, width) == (size, size):
            return images
        ratio = size / min(height, width)
        shape = [round(height * ratio), round(width * ratio)]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        return images[:, :, top:top + size, left:left + size]  # (B, channels, size, size)

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Limit the factor of the logits to 100, without which training diverges (section 2.5); call it after each
        step."""
        self.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        if self.config.regions:
            self.region_scale.clamp_(max=math.log(LARGEST_SCALE))


def contrastive_loss(logits: Tensor, equal: Tensor | None = None) -> Tensor:
    """The mean cross entropy of finding the text of an image and the image of a text, from logits (B, T): a scalar. The
    first B texts belong to the images, and the others are wrong answers for all images.

    ``equal`` bool (B, T) marks texts that also describe the image. They are no wrong answers and are left out.
    Raises ValueError for fewer texts than images.
    """
    if logits.ndim != 2 or logits.shape[0] > logits.shape[1]:
        raise ValueError(f"logits: {tuple(logits.shape)}; valid: (B, T), one text an image at least")
    pairs = torch.arange(len(logits), device=logits.device)
    if equal is not None:
        others = equal.to(logits.device) & (pairs[:, None] != torch.arange(logits.shape[1], device=logits.device))
        logits = logits.masked_fill(others, -math.inf)
    return 0.5 * (F.cross_entropy(logits, pairs) + F.cross_entropy(logits[:, :len(logits)].T, pairs))


def attend_regions(patches: Tensor, texts: Tensor, sharpness: float = REGION_SHARPNESS) -> Tensor:
    """How much the patches (B, N, E) that a text attends to resemble it, for texts (P, E), all of unit length: cosines
    (B, P). A text is the query of a softmax over the patches, so its score is a mean in which patches count that
    resemble it: the soft form of the maximum in FILIP (Yao et al. 2021, arXiv 2111.07783, section 3.1)."""
    cosines = torch.einsum("b n e, p e -> b p n", patches, texts)
    return (cosines * (sharpness * cosines).softmax(dim=-1)).sum(dim=-1)


def region_loss(logits: Tensor, shown: Tensor) -> Tensor:
    """The cross entropy of deciding for each image and part, from logits (B, P), whether it is ``shown`` bool (B, P):
    the sum over images, the mean over parts, a scalar. Each pair is a question of its own (Zhai et al. 2023,
    arXiv 2303.15343), so that one threshold can hold for all images and a batch may have several right answers."""
    return F.binary_cross_entropy_with_logits(logits, shown.to(logits), reduction="sum") / logits.shape[1]
