"""Reading and writing images: input images and masks, and PNG files with the settings that made them."""
import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, PngImagePlugin

from files.whole import whole_file

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, decoded and turned upright. Raises FileNotFoundError, or ValueError naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image {path}")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        reason = " ".join(str(error).split()).replace(str(path), "it")
        raise ValueError(f"{path} is damaged or no image: {reason}") from None
    if upright.mode not in MODES:
        raise ValueError(f"{path} has pixels of kind {upright.mode}; valid: 8 bits a channel, grey or RGB")
    return upright


def read_image(path: str | Path) -> torch.Tensor:
    """The image in a file as uint8 (3, H, W), on white where it is transparent. Raises as ``open_image``."""
    image = open_image(path)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return rearrange(torch.from_numpy(np.array(image.convert("RGB"))), "h w c -> c h w")


def read_mask(path: str | Path) -> torch.Tensor:
    """bool (H, W), True where the mask is light (128 or more): these pixels are repainted, the others kept."""
    return torch.from_numpy(np.array(open_image(path).convert("L")) >= 128)


def png_bytes(image: torch.Tensor, settings: dict[str, Any] | None) -> bytes:
    """uint8 (3, H, W) as a PNG with ``settings`` as JSON in its text field "parameters"; None writes no field."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt("parameters", json.dumps(settings, ensure_ascii=False, sort_keys=True))
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_bytes(data: bytes, path: Path, new: bool = False) -> None:
    """Write ``data``, whole or not at all; ``new`` as in ``whole_file``."""
    with whole_file(path, new) as temporary:
        temporary.write_bytes(data)


def parameters_of(path: str | Path) -> dict[str, Any]:
    """The settings inside a PNG. Raises ValueError for an image without settings."""
    text = open_image(path).info.get("parameters")
    if text is None:
        raise ValueError(f"{path} holds no settings: it was written with --no-metadata, by another program, or saved "
                         "again since")
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds settings of another program")
    return settings


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Images of uint8 as floats in [-1, 1], of the same shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] rounded to uint8, of the same shape; values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """One image, uint8 (3, H, W) or floating in [-1, 1], as an image of Pillow."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image.detach())
    return Image.fromarray(np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).numpy()))
