"""What the images of a call share in their metadata: which weights, at which size, made from which images."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from files.config import to_dict
from files.whole import sha256_of
from pipeline.system import Decoder, Speed, TextToImage
from sampling.limits import MOST_REFINEMENTS
from sampling.loading import SourceFiles, SystemChoice
from sampling.personal import AdapterFile, LearnedFile, learned_files


@dataclass(frozen=True)
class SourceFile:
    """An image that another was made from; never its folder."""

    file: str
    sha256: str

    @classmethod
    def of(cls, path: str | None) -> "SourceFile | None":
        return None if path is None else cls(Path(path).name, sha256_of(path))


@dataclass(frozen=True)
class Exact:
    """How many threads drew an image of ``--exact``."""

    threads: int

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"threads: value {self.threads}; valid: 1 to 1024")


@dataclass(frozen=True)
class Guide:
    """The weaker network of autoguidance: the name of its folder or file, and its weights as in ``Call``."""

    name: str
    weights: dict[str, str]


@dataclass(frozen=True)
class Call:
    """What every image of a call shares beside its request: the system, its size, images it was made from."""

    weights: dict[str, str]  # first 16 digits of the SHA-256 of each file
    run: str | None = None
    pretrained: str | None = None
    size: str | None = None
    tiled: bool = False
    speed: Speed = "exact"
    decoder: Decoder = "full"
    exact: Exact | None = None
    weak: Guide | None = None
    adapters: tuple[AdapterFile, ...] = ()
    embeddings: tuple[LearnedFile, ...] = ()
    init: SourceFile | None = None
    mask: SourceFile | None = None
    invert: SourceFile | None = None
    refinements: int | None = None
    moderation: Literal["flag", "blur"] | None = None  # what was done about the image

    def __post_init__(self) -> None:
        if self.refinements is not None and not 0 <= self.refinements <= MOST_REFINEMENTS:
            raise ValueError(f"refinements: value {self.refinements}; valid: 0 to {MOST_REFINEMENTS}")


def weight_hashes(system: TextToImage) -> dict[str, str]:
    """The first 16 digits of the SHA-256 of each file of a system, as metadata names them."""
    return {name: sha256_of(path)[:16] for name, path in system.files.items()}


def shared_settings(system: TextToImage, choice: SystemChoice, files: SourceFiles, exact: bool) -> dict[str, Any]:
    """The metadata that the images of a call share; defaults are omitted."""
    adapters, embeddings = learned_files(choice.personal)
    call = Call(weight_hashes(system), run=None if choice.pretrained else choice.name,
                pretrained=choice.path.name if choice.pretrained else None, size=choice.size, tiled=choice.tiled,
                speed=system.speed, decoder=choice.decoder,
                exact=Exact(torch.get_num_threads()) if exact else None,
                weak=Guide(Path(choice.weak or "").name, weight_hashes(system.guide)) if system.guide else None,
                adapters=adapters, embeddings=embeddings,
                init=SourceFile.of(files.init), mask=SourceFile.of(files.mask),
                invert=SourceFile.of(files.invert), refinements=files.refinements if files.invert else None)
    return {key: value for key, value in to_dict(call).items() if value not in (None, False, [])
            and (key, value) not in (("speed", "exact"), ("decoder", "full"))}
