"""A folder of images to compare with: it is refused when its images cannot be compared, and read batch by batch."""
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from files.images import MAX_PIXELS, BadImage, UnsupportedImage, decode_upright, open_header, open_image, to_unit

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


def image_files(folder: str | Path, max_pixels: int = MAX_PIXELS) -> list[Path]:
    """The image files of a folder and the folders below it, sorted; all are opaque RGB images of one size, once they
    are turned as their EXIF data says.

    Raises ValueError for files that are damaged, larger than ``max_pixels``, grey, transparent or of another size than
    the first; the message counts each kind and names its first file. Nothing is converted, because the background
    behind a transparent image, or the resizing of a mixed folder, would decide the figure.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not files:
        raise ValueError(f"{folder}: no images; valid: a folder of {', '.join(ENDINGS)} files")
    faults: dict[str, list[Path]] = {}
    size = None
    for path in files:
        try:
            with open(path, "rb") as file:
                image = decode_upright(open_header(file, max_pixels))
            size = size or image.size
            fault = _fault(image, size)
        except UnsupportedImage:
            fault = f"have more than max_pixels = {max_pixels} pixels"
        except (BadImage, OSError):
            fault = "cannot be read"
        if fault:
            faults.setdefault(fault, []).append(path)
    if faults:
        listed = "; ".join(f"{len(paths)} of {len(files)} {fault} (first: {paths[0].relative_to(folder)})"
                           for fault, paths in faults.items())
        raise ValueError(f"{folder}: {listed}; valid: opaque RGB images of one size")
    return files


def other_files(folder: str | Path) -> dict[str, list[str]]:
    """The names of the files of a folder that ``image_files`` leaves out, by their ending in lower case."""
    others: dict[str, list[str]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() not in ENDINGS and path.is_file():
            others.setdefault(path.suffix.lower(), []).append(path.relative_to(folder).as_posix())
    return others


def _fault(image: Image.Image, size: tuple[int, int]) -> str:
    """What is wrong with an image, given the size (W, H) of the first one; "" for nothing."""
    if image.size != size:
        return f"are not {size[0]}x{size[1]} as the first"
    if "A" in image.getbands() or "transparency" in image.info:
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            return "are transparent"
    elif image.mode not in ("RGB", "P"):
        return f"are not RGB but {'grey' if image.mode in ('1', 'L', 'I', 'I;16', 'F') else image.mode}"
    return ""


def image_file_batches(files: Sequence[Path], batch: int = 64, max_pixels: int = MAX_PIXELS) -> Iterator[Tensor]:
    """The images of files that ``image_files`` has found, as batches (B, 3, H, W) in [-1, 1]."""
    for start in range(0, len(files), batch):
        pixels = np.stack([np.asarray(open_image(path, max_pixels).convert("RGB"))
                           for path in files[start:start + batch]])
        yield to_unit(torch.from_numpy(pixels).permute(0, 3, 1, 2))  # (B, 3, H, W)


def hash_of_files(files: Sequence[Path]) -> str:
    """The SHA-256 of the contents of files in their order, in hexadecimal digits; their names do not matter."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
