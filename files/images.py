"""Reading and writing images: one reader of image files and masks, and PNG files with the settings that made them."""
import io
import json
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from files.whole import whole_file

MAX_PIXELS = 80_000_000  # of an image file, where no configuration says otherwise
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # decoders of other formats are never called
# Pillow's own limits would refuse images that max_pixels allows, and PNG files that carry a long description
Image.MAX_IMAGE_PIXELS = None  # ``open_header`` compares with max_pixels instead
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28  # bytes of text and of colour profiles


class BadImage(ValueError):
    """Bytes that cannot be read as an image; the message is the reason."""


class UnsupportedImage(BadImage):
    """An image that is whole, but too large or of pixels that are not read."""


# ---- the one reader of image files: header, pixels, colours

def open_header(file: str | Path | IO[bytes], max_pixels: int = MAX_PIXELS,
                formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image with its header read and its pixels not. Raises BadImage, also above ``max_pixels``."""
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise BadImage(f"not an image in one of the formats {', '.join(formats)}") from None
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise BadImage(reason_of(error)) from None
    if image.width * image.height > max_pixels:
        raise UnsupportedImage(f"{image.width} x {image.height} pixels are more than max_pixels = {max_pixels}")
    return image


def decode_upright(image: Image.Image, turned: bool = True) -> Image.Image:
    """The first frame of an opened image with its pixels read, turned as its EXIF data says; ``turned`` False is for
    one whose data is known to say nothing. Raises BadImage."""
    try:
        image.load()
        return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:
        raise BadImage(reason_of(error)) from None


def rgb_on_background(image: Image.Image, background: str | tuple[int, int, int] = "white") -> Image.Image:
    """8-bit RGB of a decoded image, with ``background`` behind transparent parts; 16 bits are scaled to 8. Raises
    BadImage for pixels of 32 bits."""
    try:
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
            image = _eight_bits(image)
        elif image.mode == "F":
            raise UnsupportedImage("floating pixels; valid: 8 or 16 bits a channel")
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            over = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", over.size, background), over).convert("RGB")
        return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(reason_of(error)) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with transparency if one of its levels is transparent."""
    deep = np.asarray(image).astype(np.int64)
    if deep.min() < 0 or deep.max() > 65535:
        raise UnsupportedImage("pixels of 32 bits; valid: 8 or 16 bits a channel")
    grey = Image.fromarray(((deep + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
    hidden = image.info.get("transparency")
    if hidden is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(deep == hidden, 0, 255).astype(np.uint8))))


def reason_of(error: Exception) -> str:
    """The message of a decoder's error in one line."""
    return (str(error) or type(error).__name__).splitlines()[0].replace("<_io.BytesIO object at ", "<")


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file, decoded and turned upright. Raises FileNotFoundError, or ValueError naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image {path}")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            return decode_upright(open_header(file, max_pixels))
    except (BadImage, OSError) as error:
        raise ValueError(_fault(path, error)) from None


def _fault(path: str | Path, error: Exception) -> str:
    """What is wrong with an image file, with its name."""
    if isinstance(error, UnsupportedImage):
        return f"{path}: {error}"
    return f"{path} is damaged or no image: {reason_of(error)}"


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """The image in a file as uint8 (3, H, W), on white where it is transparent. Raises as ``open_image``."""
    try:
        image = rgb_on_background(open_image(path, max_pixels))
    except BadImage as error:
        raise ValueError(_fault(path, error)) from None
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


def read_mask(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[torch.Tensor, str]:
    """bool (H, W), True where the mask is light (128 or more of 255): these pixels are repainted, the others kept. A
    mask that holds nothing but 0 and 1 is light where it is 1, and transparent parts are white.

    Also returns what its user should know, "" for nothing. Raises as ``open_image``.
    """
    image = open_image(path, max_pixels)
    try:
        grey = np.asarray(rgb_on_background(image).convert("L"))  # (H, W)
    except BadImage as error:
        raise ValueError(_fault(path, error)) from None
    light, note = grey >= 128, ""
    if grey.max() == 1:
        light, note = grey == 1, f"the mask {path} holds nothing but 0 and 1; it is painted where it is 1"
    elif not light.any():
        note = (f"nothing is painted: the mask {path} is dark everywhere, at most {grey.max()} of 255; valid: 128 and "
                "above where the image is painted")
    elif light.all() and ("transparency" in image.info or "A" in image.getbands()):
        note = f"all is painted: the mask {path} is light everywhere, its transparent parts count as white"
    return torch.from_numpy(light), note


# ---- PNG files that know how they were made

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


# ---- values and bytes

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
