"""Palettes: which colours an image may have, where they come from, and how a sample is moved towards them.

Axis letters: B batch, N pixels, K colours, R projections.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from eval.colour import ciede2000, lab_from_srgb
from files.images import read_image

THEMES: dict[str, tuple[str, ...]] = {
    "autumn": ("#7f2704", "#b5651d", "#d9a441", "#8a9a5b", "#f3e5c3"),
    "ocean": ("#03045e", "#0077b6", "#00b4d8", "#90e0ef", "#f1faee"),
    "forest": ("#1b4332", "#40916c", "#95d5b2", "#6f4e37", "#f1f1e6"),
    "neon": ("#0d0221", "#ff2a6d", "#05d9e8", "#d1f7ff", "#7700a6"),
    "pastel": ("#ffd6e0", "#c1fba4", "#a0c4ff", "#fdffb6", "#e2cfea"),
    "sunset": ("#2d1e4f", "#8e3b75", "#e4572e", "#f4a259", "#ffe3b3"),
    "earth": ("#3e2723", "#795548", "#a1887f", "#c9b79c", "#efe6da"),
    "monochrome": ("#111111", "#444444", "#777777", "#aaaaaa", "#f4f4f4"),
}
LARGEST = 64  # colours
SAMPLES = 512  # colours that stand for a palette or an image in the distance
HEX = re.compile(r"#?([0-9a-fA-F]{3}|[0-9a-fA-F]{6})(?::([0-9.]+))?")


@dataclass(frozen=True)
class Palette:
    """Colours as sRGB in 0..255 and the share of the image that each is to have; the shares add up to 1."""

    name: str
    colours: tuple[tuple[int, int, int], ...]
    shares: tuple[float, ...]

    @property
    def text(self) -> str:
        """The palette as ``parse_palette`` reads it back: colours and shares."""
        return ",".join(f"#{r:02x}{g:02x}{b:02x}:{share:.4f}" for (r, g, b), share in zip(self.colours, self.shares))

    @property
    def srgb(self) -> Tensor:
        """The colours (K, 3) in [0, 1]."""
        return torch.tensor(self.colours, dtype=torch.float32) / 255

    def samples(self, count: int = SAMPLES) -> Tensor:
        """CIELAB values (count, 3) in which each colour has its share, to the nearest whole number of them."""
        ends = (torch.tensor(self.shares, dtype=torch.float64).cumsum(0) * count).round().long()
        return lab_from_srgb(self.srgb)[torch.bucketize(torch.arange(count), ends, right=True).clamp(max=len(ends) - 1)]


def parse_palette(text: str) -> Palette:
    """A palette from a list such as "#1b3a4b,#f2c14e:0.5", the name of a theme, or the path of an image.

    A number behind a colour is its share, the others divide the rest evenly. Raises ValueError with what is valid.
    """
    text = text.strip()
    if text.lower() in THEMES:
        colours = tuple(_rgb(code) for code in THEMES[text.lower()])
        return Palette(text.lower(), colours, (1 / len(colours),) * len(colours))
    parts = [part.strip() for part in text.split(",") if part.strip()]
    matches = [HEX.fullmatch(part) for part in parts]
    if parts and all(matches):
        if len(parts) > LARGEST:
            raise ValueError(f"palette: {len(parts)} colours; valid: up to {LARGEST}")
        return Palette(text, tuple(_rgb(match[1]) for match in matches if match),
                       _shares([match[2] for match in matches if match], text))
    if Path(text).is_file():
        return palette_of_image(Path(text))
    raise ValueError(f"palette: {text!r}; valid: colours such as \"#1b3a4b,#f2c14e\", a theme ({', '.join(THEMES)}), "
                     "or an image file")


def _rgb(code: str) -> tuple[int, int, int]:
    digits = code.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


def _shares(given: Sequence[str | None], text: str) -> tuple[float, ...]:
    try:
        known = [None if share is None else float(share) for share in given]
    except ValueError:
        raise ValueError(f"palette: {text!r}; valid shares: numbers such as 0.5") from None
    rest, free = 1 - sum(share for share in known if share is not None), known.count(None)
    if rest < -1e-6 or (not free and abs(rest) > 1e-3) or (free and rest < 1e-6):
        raise ValueError(f"palette: {text!r}; valid shares: above 0, and 1 together")
    return tuple(rest / free if share is None else share for share in known)


def palette_of_image(path: Path, colours: int = 8) -> Palette:
    """The main colours of an image and their shares, by median cut (Heckbert 1982). Raises ValueError or OSError if it
    cannot be read."""
    small = Image.fromarray(rearrange(read_image(path), "c h w -> h w c").numpy())
    small.thumbnail((128, 128))
    cut = small.quantize(colours, method=Image.Quantize.MEDIANCUT)
    table = np.asarray(cut.getpalette(), dtype=int).reshape(-1, 3)
    counts = np.bincount(np.asarray(cut).ravel())  # (K,)
    order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    return Palette(path.name, tuple((int(r), int(g), int(b)) for r, g, b in table[order]),
                   tuple(float(counts[index] / counts.sum()) for index in order))


def sliced_wasserstein(first: Tensor, second: Tensor, directions: Tensor) -> Tensor:
    """The mean over directions (R, 3) of the squared 2-Wasserstein distance between projections of two sets of points
    (B, N, 3) and (M, 3): (B,). Bonneel et al. 2015.

    In one dimension the distance pairs sorted points; the smaller set is read at the ranks of the larger one.
    """
    ours = (first @ directions.T).sort(dim=1).values  # (B, N, R)
    theirs = (second @ directions.T).sort(dim=0).values  # (M, R)
    ranks = ((torch.arange(ours.shape[1], device=ours.device) + 0.5) / ours.shape[1] * len(theirs)).long()
    return (ours - theirs[ranks]).square().mean(dim=(1, 2))


class PaletteSteer:
    """Moves a predicted x_0 towards images whose colours are distributed like a palette.

    ``weight`` is the size of a step: it multiplies the step that would remove the whole distance if that fell linearly,
    so 1 is strong and 0 is off. ``inner`` steps are taken at each call. Directions are drawn from a seed,
    so that the same settings give the same image.
    """

    def __init__(self, palette: Palette, decode: Callable[[Tensor], Tensor], weight: float = 0.3, inner: int = 1,
                 directions: int = 32, seed: int = 0):
        if not weight > 0:
            raise ValueError(f"palette weight: {weight}; valid: above 0")
        self.decode, self.weight, self.inner = decode, weight, inner
        with torch.inference_mode(False):  # gradients are taken with these, whoever makes this object
            self.target = palette.samples()
            random = torch.Generator().manual_seed(seed)
            self.directions = torch.nn.functional.normalize(torch.randn(directions, 3, generator=random), dim=1)

    def distance(self, x_0: Tensor) -> Tensor:
        """The sliced Wasserstein distance (B,), squared CIELAB units, of the images that latents decode to."""
        images = self.decode(x_0)  # (B, 3, H, W)
        # beyond black and white a value counts as these, but keeps its gradient, or white could never be coloured
        images = (images + (images.clamp(-1, 1) - images).detach()).add(1).div(2)
        pixels = lab_from_srgb(images.permute(0, 2, 3, 1).flatten(1, 2))  # (B, N, 3)
        return sliced_wasserstein(pixels, self.target.to(pixels), self.directions.to(pixels))

    def __call__(self, x_0: Tensor, noisiness: float) -> Tensor:
        """x_0 (B, C, H, W) after the steps. Each is Polyak's: loss / |gradient|^2 of each image, times the weight."""
        for _ in range(self.inner):
            with torch.inference_mode(False), torch.enable_grad():
                moved = x_0.clone().requires_grad_()
                loss = self.distance(moved)  # (B,)
                (gradient,) = torch.autograd.grad(loss.sum(), moved)
            size = gradient.square().sum(dim=(1, 2, 3)).clamp(min=1e-12)  # (B,)
            step = self.weight * (loss.detach() / size)[:, None, None, None] * gradient
            # a step longer than the latent itself leaves what the decoder was trained on
            limit = x_0.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            length = step.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
            x_0 = x_0 - step * (limit / length).clamp(max=1.0)
        return x_0


def map_to_palette(images: Tensor, palette: Palette) -> Tensor:
    """Images uint8 (B, 3, H, W) in which every pixel has the nearest colour of the palette by CIEDE2000."""
    pixels = lab_from_srgb(images.permute(0, 2, 3, 1).float() / 255)  # (B, H, W, 3)
    away = torch.stack([ciede2000(pixels, colour) for colour in lab_from_srgb(palette.srgb)])  # (K, B, H, W)
    table = torch.tensor(palette.colours, dtype=torch.uint8)
    return table[away.argmin(dim=0)].permute(0, 3, 1, 2).contiguous()
