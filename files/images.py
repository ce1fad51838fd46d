"""Pictures in and out: what a call starts from, and PNG files that know how they were made."""
import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from files.whole import whole_file

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def opened(path: str | Path) -> Image.Image:
    """The picture in a file, whole and turned upright. Raises FileNotFoundError, or ValueError naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture {path}")
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except UNREADABLE as error:
        reason = " ".join(str(error).split()).replace(str(path), "it")
        raise ValueError(f"{path} is damaged or no picture: {reason}") from None
    if upright.mode not in MODES:
        raise ValueError(f"{path} has pixels of kind {upright.mode}; valid: 8 bits a channel, grey or RGB")
    return upright


def read_picture(path: str | Path) -> torch.Tensor:
    """uint8 (3, H, W); what is transparent is laid on white."""
    picture = opened(path)
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # (3, H, W)


def read_mask(path: str | Path) -> torch.Tensor:
    """bool (H, W), True where the mask is light (128 and above): that is painted, the rest is kept."""
    return torch.from_numpy(np.array(opened(path).convert("L")) >= 128)


def png_bytes(image: torch.Tensor, settings: dict[str, Any] | None) -> bytes:
    """uint8 (3, H, W) as a PNG, ``settings`` as JSON in its text field "parameters"; None leaves nothing in it."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt("parameters", json.dumps(settings, ensure_ascii=False, sort_keys=True))
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_bytes(data: bytes, path: Path) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def parameters_of(path: str | Path) -> dict[str, Any]:
    """The settings inside a PNG. Raises ValueError for a picture without."""
    text = opened(path).info.get("parameters")
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
