"""The KL autoencoder between images and latents. The scale of a latent is known in this file only.

Rombach et al. 2022, section 3.1. Axis letters: B batch, C latent channels, H height, W width, h = H / f, w = W / f.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import Downsample, ImageAttention, ResBlock, Upsample, call_with_checkpointing, check_groups
from model.norm import GroupNorm

EPS = 1e-6  # of every GroupNorm


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder; `channels` has one entry for each resolution, the finest first."""

    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2  # residual blocks of a level in the encoder; one more in the decoder
    mid_attention: bool = True
    stem: int = 1  # fold stem x stem pixels into channels, because full-resolution convolutions are expensive
    norm_groups: int = 32
    gradient_checkpointing: bool = False  # recompute residual blocks in the backward pass: less memory

    def __post_init__(self) -> None:
        for name in ("image_channels", "latent_channels", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: at least 1")
        if not self.channels:
            raise ValueError("channels: (); valid: at least one count")
        if not 1 <= self.stem <= 16:
            raise ValueError(f"stem: {self.stem}; valid: 1 to 16")
        check_groups(self.channels, self.norm_groups)

    @property
    def factor(self) -> int:
        """The number of image pixels to one latent pixel, along one side."""
        return self.stem * 2 ** (len(self.channels) - 1)

    @classmethod
    def sd(cls) -> "AutoencoderConfig":
        """The autoencoder of Stable Diffusion 1.x and 2.x: 83,653,863 parameters, f = 8."""
        return cls()


SD_LATENT_STD = 1 / 0.18215  # latent_std of the published weights; their latent_mean is 0


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents: mean and logvar, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std noise, with standard normal noise (B, C, h, w). Raises ValueError on another shape."""
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise: {tuple(noise.shape)}; valid: {tuple(self.mean.shape)}")
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over each image: (B,)."""
        # KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2 (Kingma and Welling 2014, appendix B).
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(dim=1)


class Middle(nn.Module):
    """A residual block, attention over the pixels and a second residual block, at the coarsest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resblock1 = ResBlock(channels, channels, groups, EPS)
        self.attention = ImageAttention(channels, groups, EPS) if attention else None
        self.resblock2 = ResBlock(channels, channels, groups, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, c, h, w)."""
        x = self.resblock1(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.resblock2(x)


class Level(nn.Module):
    """Residual blocks at one resolution, followed by a change of resolution or none."""

    def __init__(self, widths: list[tuple[int, int]], groups: int, resample: nn.Module | None, recompute: bool):
        super().__init__()
        self.recompute = recompute
        self.resblocks = nn.ModuleList(ResBlock(c_in, c_out, groups, EPS) for c_in, c_out in widths)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H', W')."""
        for block in self.resblocks:
            x = call_with_checkpointing(block, x, recompute=self.recompute)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> features (B, 2C, h, w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, last = config.channels, len(config.channels) - 1
        self.stem = config.stem
        self.conv_in = nn.Conv2d(config.image_channels * config.stem**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        c_in = channels[0]
        for level, c in enumerate(channels):
            widths = [(c_in, c)] + [(c, c)] * (config.blocks - 1)
            resample = Downsample(c, symmetric=False) if level < last else None
            self.down.append(Level(widths, config.norm_groups, resample, config.gradient_checkpointing))
            c_in = c
        self.mid = Middle(c_in, config.norm_groups, config.mid_attention)
        self.norm_out = GroupNorm(config.norm_groups, c_in, eps=EPS)
        self.conv_out = nn.Conv2d(c_in, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2C, h, w)."""
        x = self.conv_in(F.pixel_unshuffle(x, self.stem) if self.stem > 1 else x)  # (B, c_0, H / stem, W / stem)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # (B, 2C, h, w)


class Decoder(nn.Module):
    """Latent (B, C, h, w) -> image (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.channels
        self.stem = config.stem
        c_in = channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, c_in, 3, padding=1)
        self.mid = Middle(c_in, config.norm_groups, config.mid_attention)
        self.up = nn.ModuleList()
        for level, c in reversed(list(enumerate(channels))):
            widths = [(c_in, c)] + [(c, c)] * config.blocks
            self.up.append(Level(widths, config.norm_groups, Upsample(c) if level else None,
                                 config.gradient_checkpointing))
            c_in = c
        self.norm_out = GroupNorm(config.norm_groups, c_in, eps=EPS)
        self.conv_out = nn.Conv2d(c_in, config.image_channels * config.stem**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z))  # (B, c_last, h, w)
        for level in self.up:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, 3 stem^2, H / stem, W / stem)
        return F.pixel_shuffle(x, self.stem) if self.stem > 1 else x  # (B, 3, H, W)


class Autoencoder(nn.Module):
    """Encoder, decoder, and the mean and scale of each channel of the latents between them.

    `moments` and `decode_raw` use raw latents, as the training loss does. `encode` and `decode` use latents of unit
    scale, as everything outside this file does.
    """

    latent_mean: Tensor  # (C,)
    latent_std: Tensor  # (C,)

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant = nn.Conv2d(c, c, 1)
        self.decoder = Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(c))
        self.register_buffer("latent_std", torch.ones(c))
        # Start with little noise on the latent (std 0.05): at the default std 1 the decoder first learns to ignore it.
        with torch.no_grad():
            assert self.quant.bias is not None
            self.quant.bias[c:] = 2 * math.log(0.05)

    @property
    def factor(self) -> int:
        """The number of image pixels to one latent pixel, along one side."""
        return self.config.factor

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def moments(self, images: Tensor) -> Posterior:
        """images (B, 3, H, W) in [-1, 1] -> raw posterior (B, C, h, w), logvar within [-30, 20].

        Raises ValueError on other channels or a size that is not a multiple of `factor`.
        """
        channels, f = self.config.image_channels, self.factor
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"images: {tuple(images.shape)}; valid: (B, {channels}, H, W), H and W multiples of {f}")
        mean, logvar = self.quant(self.encoder(images)).chunk(2, dim=1)  # each (B, C, h, w)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> images (B, 3, H, W). Raises ValueError on another shape."""
        self.check_latents(latents)
        return self.decoder(self.post_quant(latents))

    def check_latents(self, latents: Tensor) -> None:
        """Raises ValueError unless latents are (B, C, h, w)."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents: {tuple(latents.shape)}; valid: (B, {self.latent_channels}, h, w)")

    def encode(self, images: Tensor) -> Posterior:
        """images (B, 3, H, W) in [-1, 1] -> posterior of unit-scale latents (B, C, h, w)."""
        raw = self.moments(images)
        mean = (raw.mean - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)
        return Posterior(mean, raw.logvar - 2 * _per_channel(self.latent_std).log())

    def decode(self, latents: Tensor) -> Tensor:
        """Unit-scale latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1] and not clamped.

        Raises ValueError on another shape.
        """
        self.check_latents(latents)
        return self.decode_raw(latents * _per_channel(self.latent_std) + _per_channel(self.latent_mean))

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Set latent_mean and latent_std to the moments of latents sampled for `batches` of images (B, 3, H, W).

        The noise of the posterior enters through its variance and is not drawn. Raises ValueError if there are no
        images, or if a channel is constant.
        """
        count = 0
        total = torch.zeros(self.latent_channels, dtype=torch.float64, device=self.latent_mean.device)
        total_square = torch.zeros_like(total)
        for images in batches:
            posterior = self.moments(images)
            mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
            total += mean.sum(dim=(0, 2, 3))
            total_square += (mean.square() + variance).sum(dim=(0, 2, 3))
            count += mean.numel() // self.latent_channels
        if not count:
            raise ValueError("batches: no images; valid: at least one")
        mean = total / count
        std = (total_square / count - mean.square()).clamp_min(0).sqrt()
        if not bool(torch.isfinite(std).all()) or bool((std <= 1e-6).any()):
            raise ValueError(f"batches: latent std {std.tolist()}; valid: finite and above zero in every channel")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)


def _per_channel(x: Tensor) -> Tensor:
    return x[:, None, None]  # (C, 1, 1)
