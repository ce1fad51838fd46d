"""From the bytes of an image file to uint8 (3, H, W): decoding, orientation, background, aspect buckets, crops.

Axis letters: H W requested size, h w size of the whole image.
"""
import io
import math
import re

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor

from files.images import BadImage, decode_upright, open_header, reason_of, rgb_on_background

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # decoders of other formats are never called
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width

# Mirroring makes these captions wrong: they name sides, directions, or writing, which would read backwards.
_FIXED = re.compile(r"\b(left|right|leftmost|rightmost|facing|faces|clockwise|anti-?clockwise|counter-?clockwise|east|"
                    r"west|text|texts|word|words|letter|letters|lettering|alphabet|writing|written|writes|handwriting|"
                    r"handwritten|inscription|caption|captioned|title|titled|label|labell?ed|sign|signs|signage|"
                    r"signature|logo|logos|poster|number|numbers|digit|digits|numeral|numerals|says|saying|reads|"
                    r"reading|spells|spelling|clock|clocks|map|maps|flag|flags|page|newspaper|billboard|"
                    r"left-handed|right-handed|mirrored)\b|[\"\u201c\u201d\u00ab\u00bb]", re.IGNORECASE)


class Unreadable(ValueError):
    """An image or a caption that cannot be read; has the ``name`` of the file and the ``reason``."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.name, self.reason)


def may_flip(caption: str) -> bool:
    """Whether a caption stays true for the mirrored image: it names no side, direction or writing."""
    return _FIXED.search(caption) is None


def rgb_of(name: str) -> tuple[int, int, int]:
    """RGB of a colour such as "white" or "#ff8000"; raises ValueError for an unknown colour."""
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError:
        raise ValueError(f"background: '{name}'; valid: a colour such as white or #ff8000") from None
    return red, green, blue


# ---- decoding

def _orientation(image: Image.Image) -> int:
    """EXIF orientation from the header, 1 for upright. (Pillow would decode a PNG to search behind its pixels.)"""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(0x0112, 1))


def _open_header(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The image with its header read and its pixels not. Raises Unreadable, also above ``max_pixels``."""
    if not data:
        raise Unreadable(name, "the file is empty")
    try:
        return open_header(io.BytesIO(data), max_pixels, FORMATS)
    except BadImage as error:
        raise Unreadable(name, str(error)) from None


def image_size(data: bytes, name: str, max_pixels: int) -> tuple[int, int]:
    """(height, width) of the upright image, from its header. Raises Unreadable."""
    image = _open_header(data, name, max_pixels)
    width, height = image.size
    try:
        if image.format == "TIFF":  # Pillow 11 and later turn the size of a TIFF, but of no other format, at once
            width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
        turned = _orientation(image) in TURNED
    except Exception as error:  # damaged EXIF data
        raise Unreadable(name, reason_of(error)) from None
    return (width, height) if turned else (height, width)


def decode_image(data: bytes, name: str, background: tuple[int, int, int], max_pixels: int,
                 least: int = 0) -> Image.Image:
    """The first frame, upright, as 8-bit RGB on ``background``. Raises Unreadable.

    A JPEG whose sides exceed twice ``least`` may be decoded at a half, a quarter or an eighth of its size, at a
    fraction of the cost; ``least`` = 0 decodes at full size.
    """
    image = _open_header(data, name, max_pixels)
    try:
        if image.format == "JPEG" and least:
            image.draft(None, (2 * least, 2 * least))
        turned = _orientation(image) != 1  # asked of the header, as in image_size
        return rgb_on_background(decode_upright(image, turned), background)
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise Unreadable(name, reason_of(error)) from None


# ---- sizes

def bucket_sizes(size: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """Sizes (H, W) of at most ``size`` squared pixels, multiples of ``step``, with ratios up to ``max_aspect``.

    For every width the largest height that fits, as in NovelAI's aspect ratio bucketing (2022), and the transposed
    sizes. The list is sorted and includes the square.
    """
    found = {(size, size)}
    for one in range(step, int(size * math.sqrt(max_aspect)) + 1, step):
        other = size * size // one // step * step
        if other >= step and max(one, other) <= max_aspect * min(one, other):
            found |= {(one, other), (other, one)}
    # of several sizes with one side in common only the largest is kept: beside (64, 256), (64, 192) wastes pixels
    return sorted((h, w) for h, w in found if not any((h, wider) in found for wider in range(w + step, 8 * size, step))
                  and not any((taller, w) in found for taller in range(h + step, 8 * size, step)))


def nearest_bucket(sizes: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """Index (N,) of the bucket whose log aspect ratio is nearest to that of each size (N, 2)."""
    ratios = np.log(sizes[:, 0] / sizes[:, 1])  # (N,)
    have = np.log([h / w for h, w in buckets])  # (K,)
    return np.abs(ratios[:, None] - have[None]).argmin(axis=1)


def crop_to_size(image: Image.Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5),
                 flip: bool = False, whole: tuple[int, int] | None = None) -> tuple[torch.Tensor, tuple[float, ...]]:
    """The largest crop with the aspect ratio of ``size`` = (H, W), resized (bicubic, antialiased), uint8 (3, H, W).

    ``place`` is the position of the crop, from (0, 0) for the top left to (1, 1) for the bottom right. Also returns
    the frame (h, w, top, left, height, width) of the crop in pixels of the image, or in pixels of ``whole`` = (h, w)
    if ``image`` is a reduced version of it. A mirrored image has the frame of the crop before mirroring.
    """
    (height, width), (h, w) = size, (image.height, image.width)
    scale = max(height / h, width / w)
    part_h, part_w = min(height / scale, h), min(width / scale, w)
    top, left = (h - part_h) * place[0], (w - part_w) * place[1]
    box = (left, top, min(left + part_w, w), min(top + part_h, h))
    small = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = rearrange(torch.from_numpy(np.array(small)), "h w c -> c h w").contiguous()
    full_h, full_w = whole or (h, w)
    down, across = full_h / h, full_w / w
    return pixels, (full_h, full_w, top * down, left * across, part_h * down, part_w * across)
