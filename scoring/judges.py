"""What the full suite compares samples with: networks that turn images into vectors, real images, training images."""
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.images.folder_files import left_out_line
from data.source import Source, image_batch
from eval.features.efficientnet import Features
from eval.features.inception import InceptionFeatures
from eval.image_folder import hash_of_files, image_file_batches, image_files, other_files
from files.images import to_unit
from pipeline.clip_vectors import ClipVectors

REFERENCE = 10_000  # real images that samples are compared with, at most
LEAST = 16  # real images that samples are compared with, at least
BATCH = 64  # images that are read at a time


@dataclass(frozen=True)
class Judges:
    """The networks that look at images; without a ``clip`` there is no CLIP score."""

    features: Features | InceptionFeatures
    clip: ClipVectors | None


@dataclass(frozen=True)
class ReferenceImages:
    """Real images to compare with.

    ``batches()`` yields them as (B, 3, H, W) in [-1, 1], anew for each network; ``about`` says in words which they are,
    ``data`` is their hash.
    """

    batches: Callable[[], Iterable[torch.Tensor]]
    about: str
    data: str


@dataclass(frozen=True)
class Comparison:
    """Everything that samples are compared with: ``judges`` look at them beside the ``reference``, and copies are
    searched among the first ``num_training`` images of ``training``."""

    judges: Judges
    reference: ReferenceImages
    training: Source
    num_training: int


def load_judges(inception: str | None, clip: str | None, run: Path, device: torch.device) -> Judges:
    """InceptionV3 with the weights at ``inception``, or EfficientNet-Lite0 without; the CLIP at ``clip``, a run folder
    or a folder of transformers, or without it that of the run, if it has one.

    Raises ValueError for files that are missing or do not fit.
    """
    features = InceptionFeatures(inception, device) if inception else Features(device)
    if clip is None:
        return Judges(features, ClipVectors.of_run(run, device) if (run / "clip.safetensors").is_file() else None)
    ours = (Path(clip) / "config.yaml").is_file() or (Path(clip) / "clip_tokenizer.json").is_file()
    return Judges(features, ClipVectors.of_run(clip, device) if ours else ClipVectors.from_pretrained(clip, device))


def folder_reference(folder: str, size: torch.Size, max_pixels: int) -> ReferenceImages:
    """The images of a folder, of up to ``max_pixels`` each, in the order of their names; what is left out of it is
    printed to the standard error. Raises ValueError unless there are at least 16, all of the ``size`` (H, W)."""
    files = image_files(folder, max_pixels)
    left_out = {f"files that end in {ending}" if ending else "files without an ending": names
                for ending, names in other_files(folder).items()}
    left_out[f"images after the first {REFERENCE}"] = [str(path.relative_to(folder)) for path in files[REFERENCE:]]
    if line := left_out_line(f"--reference {folder}", left_out):
        print(line, file=sys.stderr)
    files = files[:REFERENCE]
    shape = next(image_file_batches(files[:1], max_pixels=max_pixels)).shape[2:]
    if shape != size:
        raise ValueError(f"--reference {folder}: images of {shape[0]}x{shape[1]}; valid: {size[0]}x{size[1]}, "
                         "the size of the samples")
    if len(files) < LEAST:
        raise ValueError(f"--reference {folder}: {len(files)} images; valid: from {LEAST} up")
    return ReferenceImages(lambda: image_file_batches(files, max_pixels=max_pixels),
                           f"{len(files)} images of {Path(folder).name}", hash_of_files(files))


def split_reference(source: Source, first: int, data: str) -> ReferenceImages:
    """The items of a split from the number ``first`` on; ``data`` names the split's settings and images.

    Raises ValueError when fewer than 16 are left.
    """
    last = min(len(source), first + REFERENCE)
    if last - first < LEAST:
        raise ValueError(f"--count: only {max(0, last - first)} of the {len(source)} test items are left to compare "
                         f"with; valid: up to {max(1, len(source) - LEAST)}, better half of them")
    return ReferenceImages(lambda: source_batches(source, first, last), f"test items {first} to {last - 1}",
                           f"{data} {first} {last}")


def source_batches(source: Source, first: int, last: int) -> Iterator[torch.Tensor]:
    """The images of items ``first`` to ``last`` - 1 of a source, as batches (B, 3, H, W) in [-1, 1], with a bar."""
    for start in tqdm(range(first, last, BATCH), desc="real images", unit="batch"):
        yield image_batch(source, np.arange(start, min(start + BATCH, last)))


def unit_batches(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images uint8 (N, 3, H, W) as batches (B, 3, H, W) in [-1, 1]."""
    return (to_unit(part) for part in images.split(BATCH))
