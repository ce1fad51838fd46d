"""Metadata, and whether a picture is what its metadata says: drawn again and compared byte by byte."""
import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from files.config import from_dict, to_dict
from files.images import parameters_of, png_bytes, read_mask, read_picture
from files.whole import sha256_of
from pipeline.moderation import hidden
from pipeline.system import TextToImage
from sampling.draw import Sources, check, drawn_latents, exact_arithmetic, pictures
from sampling.options import MOST_REFINEMENTS, load_system
from sampling.request import OWN, SAMPLING, request_of, settings_of


@dataclass(frozen=True)
class SourceFile:
    """A picture that another was made from; never its folder."""

    file: str
    sha256: str

    @classmethod
    def of(cls, path: str | None) -> "SourceFile | None":
        return None if path is None else cls(Path(path).name, sha256_of(path))


@dataclass(frozen=True)
class Exact:
    """How many threads drew a picture of ``--exact``."""

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
    """What every picture of a call shares beside its request: model, size, pictures it was made from."""

    weights: dict[str, str]  # first 16 digits of the SHA-256 of each file
    run: str | None = None
    pretrained: str | None = None
    size: str | None = None
    tiled: bool = False
    exact: Exact | None = None
    weak: Guide | None = None
    init: SourceFile | None = None
    mask: SourceFile | None = None
    invert: SourceFile | None = None
    refinements: int | None = None
    moderation: Literal["flag", "blur"] | None = None  # what was done about the picture

    def __post_init__(self) -> None:
        if self.refinements is not None and not 0 <= self.refinements <= MOST_REFINEMENTS:
            raise ValueError(f"refinements: value {self.refinements}; valid: 0 to {MOST_REFINEMENTS}")


def hashes(system: TextToImage) -> dict[str, str]:
    """The weights of a system, as metadata names them."""
    return {name: sha256_of(path)[:16] for name, path in system.files.items()}


def shared_settings(system: TextToImage, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The metadata that the pictures of a call share; what is as it is when nothing is said is left out."""
    call = Call(hashes(system), run=None if options.pretrained else source.name,
                pretrained=source.name if options.pretrained else None, size=options.size, tiled=options.tiled,
                exact=Exact(torch.get_num_threads()) if options.exact else None,
                weak=Guide(Path(options.weak).name, hashes(system.guide)) if system.guide else None,
                init=SourceFile.of(options.init), mask=SourceFile.of(options.mask),
                invert=SourceFile.of(options.invert), refinements=options.refinements if options.invert else None)
    return {key: value for key, value in to_dict(call).items() if value not in (None, False)}


def sources_of(options: argparse.Namespace) -> Sources:
    """The pictures that a call starts from, read."""
    path = options.init or options.invert
    return Sources(read_picture(path) if path else None, read_mask(options.mask) if options.mask else None,
                   options.refinements if options.invert else None)


def verified(path: str, options: argparse.Namespace) -> tuple[bool, str]:
    """Whether a file is what its settings draw, and a line that says so.

    Raises ValueError where that cannot be found out: no settings, other weights, a picture it was made from missing.
    """
    stored = parameters_of(path)
    try:
        request = request_of(stored)
        call = from_dict(Call, {key: value for key, value in stored.items() if key not in {*OWN, *SAMPLING}})
    except ValueError as error:
        raise ValueError(f"{path} holds settings that cannot be drawn: {error}") from None
    flags = flags_of(path, call, options)
    system, source = load_system(flags)
    check_weights(path, call.weights, hashes(system), source)
    if call.weak and system.guide:
        check_weights(path, call.weak.weights, hashes(system.guide), Path(flags.weak))
    sources = sources_of(flags)
    with exact_arithmetic(call.exact.threads if call.exact else torch.get_num_threads()):
        check(system, [request], sources)
        image = pictures(system, drawn_latents(system, [request], sources), sources)[0]
        made = {"moderation": call.moderation} if call.moderation else {}
        again = png_bytes(hidden(image) if call.moderation == "blur" else image,
                          {**settings_of(request), **shared_settings(system, source, flags), **made})
    return comparison(path, again, call.exact is not None)


def check_weights(path: str, made: dict[str, str], found: dict[str, str], source: Path) -> None:
    """Raise ValueError naming a file of ``source`` that is another than the one that a picture was made with."""
    if made != found:
        name = min(name for name in {**made, **found} if made.get(name) != found.get(name))
        raise ValueError(f"{path} was made with other weights than those in {source}: {name} has the hash "
                         f"{made.get(name)} there and {found.get(name)} here")


def flags_of(path: str, call: Call, options: argparse.Namespace) -> argparse.Namespace:
    """The flags that made a picture: its own, with the model and the pictures named on the command line."""
    if call.pretrained and not options.run and not options.pretrained:
        raise ValueError(f"{path} was made with the checkpoint {call.pretrained!r}; valid: --pretrained PATH beside "
                         "--verify")
    if call.weak and not options.weak:
        raise ValueError(f"{path} was made with the weaker network {call.weak.name!r}; valid: --weak PATH beside "
                         "--verify")
    if options.weak and not call.weak:
        raise ValueError(f"{path} was not made with --weak; valid: --verify without it")
    run = options.run or (None if options.pretrained else str(Path("runs") / Path(call.run or "").name))
    for name in ("init", "mask", "invert"):
        given, known = getattr(options, name), getattr(call, name)
        if known and not given:
            raise ValueError(f"{path} was made from the picture {known.file!r}; valid: --{name} IMAGE beside --verify")
        if given and not known:
            raise ValueError(f"{path} was not made with --{name}; valid: --verify without it")
        if given and sha256_of(given) != known.sha256:
            raise ValueError(f"{path} was made from another picture than {given}; valid: the same bytes")
    names = ("pretrained", "weak", "init", "mask", "invert", "tokenizer", "prediction")
    return argparse.Namespace(run=run, size=call.size, tiled=call.tiled, exact=call.exact is not None,
                              refinements=call.refinements, **{name: getattr(options, name) for name in names})


def comparison(path: str, again: bytes, exact: bool) -> tuple[bool, str]:
    """(True, line) when the file holds exactly these bytes, else False and what is different."""
    data = Path(path).read_bytes()
    if data == again:
        return True, f"{path}: equal, {len(data)} bytes"
    with Image.open(path) as first, Image.open(io.BytesIO(again)) as second:
        a, b = (np.asarray(picture.convert("RGB")).astype(int) for picture in (first, second))
    if a.shape != b.shape:
        return False, f"{path}: not equal, it has {a.shape[:2]} pixels and {b.shape[:2]} are drawn"
    if (a == b).all():
        return False, (f"{path}: not equal, the pixels are but not the file: its settings were changed, or another "
                       "version of Pillow or zlib wrote it")
    away = np.abs(a - b)
    line = f"{path}: not equal, {(away > 0).sum()} of {away.size} values differ, by up to {away.max()} of 255"
    if away.max() <= 1 and not exact:
        line += "; without --exact the size of a batch decides the last bits"
    return False, line
