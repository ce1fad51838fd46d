"""Whether an image is what its metadata says: drawn again and compared byte by byte."""
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from files.config import from_dict
from files.images import parameters_of, png_bytes, read_image
from files.whole import sha256_of
from pipeline.moderation import blur_image
from sampling.draw import check_requests, decode_images, exact_arithmetic, latents_of_requests
from sampling.loading import SourceFiles, SystemChoice, load_system, read_sources
from sampling.metadata import Call, shared_settings, weight_hashes
from sampling.personal import files_to_verify
from sampling.request import OF_CONFIG, OWN, is_older, older_settings_of, request_of, settings_of


def verify(path: str, given: SystemChoice, files: SourceFiles) -> tuple[bool, str]:
    """Whether a file is what its settings draw, and a line that says so. ``given``, ``files``: the system and the
    images that the caller names, in place of what the settings name.

    Raises ValueError where that cannot be found out: no settings, other weights, an image it was made from missing.
    """
    stored = parameters_of(path)
    try:
        request = request_of(stored)
        call = from_dict(Call, {key: value for key, value in stored.items() if key not in {*OWN, *OF_CONFIG}})
    except ValueError as error:
        raise ValueError(f"{path} holds settings that cannot be drawn: {error}") from None
    choice, files = choice_of(path, call, given), files_of(path, call, files)
    system = load_system(replace(choice, sampler=request.config.sampler))
    check_weights(path, call.weights, weight_hashes(system), choice.path)
    if call.weak and system.guide:
        check_weights(path, call.weak.weights, weight_hashes(system.guide), Path(choice.weak or ""))
    sources = read_sources(files, choice)
    with exact_arithmetic(call.exact.threads if call.exact else torch.get_num_threads()):
        check_requests(system, [request], sources)
        image = decode_images(system, latents_of_requests(system, [request], sources), sources,
                              request)[0]
        settings = older_settings_of(request) if is_older(stored) else settings_of(request)
        if "options" in settings:  # an older version may have known fewer options, and all others at their defaults
            settings["options"] = {name: value for name, value in settings["options"].items()
                                   if name in stored["options"]}
        marked = {"moderation": call.moderation} if call.moderation else {}
        again = png_bytes(blur_image(image) if call.moderation == "blur" else image,
                          {**settings, **shared_settings(system, choice, files, call.exact is not None), **marked})
    return compare(path, again, call.exact is not None)


def check_weights(path: str, made: dict[str, str], found: dict[str, str], source: Path) -> None:
    """Raise ValueError naming a file of ``source`` that is another than the one that an image was made with."""
    if made != found:
        name = min(name for name in {**made, **found} if made.get(name) != found.get(name))
        raise ValueError(f"{path} was made with other weights than those in {source}: {name} has the hash "
                         f"{made.get(name)} there and {found.get(name)} here")


def choice_of(path: str, call: Call, given: SystemChoice) -> SystemChoice:
    """The system that made an image: the one that the caller names, or the run of its metadata. Raises ValueError for
    one that must be named and is not, or must not be and is."""
    if call.pretrained and not given.run and not given.pretrained:
        raise ValueError(f"{path} was made with the checkpoint {call.pretrained!r}; valid: --pretrained PATH beside "
                         "--verify")
    if call.weak and not given.weak:
        raise ValueError(f"{path} was made with the weaker network {call.weak.name!r}; valid: --weak PATH beside "
                         "--verify")
    if given.weak and not call.weak:
        raise ValueError(f"{path} was not made with --weak; valid: --verify without it")
    run = given.run or (None if given.pretrained else str(Path("runs") / Path(call.run or "").name))
    personal = files_to_verify(path, call.adapters, call.embeddings, given.personal)
    return replace(given, run=run, size=call.size, tiled=call.tiled, speed=call.speed, decoder=call.decoder,
                   personal=personal)


def files_of(path: str, call: Call, given: SourceFiles) -> SourceFiles:
    """The files that an image was made from. Raises ValueError for one that is missing, that is another, or that it was
    not made from."""
    for name in ("init", "mask", "invert"):
        file, known = getattr(given, name), getattr(call, name)
        if known and not file:
            raise ValueError(f"{path} was made from the image {known.file!r}; valid: --{name} IMAGE beside --verify")
        if file and not known:
            raise ValueError(f"{path} was not made with --{name}; valid: --verify without it")
        if file and sha256_of(file) != known.sha256:
            raise ValueError(f"{path} was made from another image than {file}; valid: the same bytes")
    return replace(given, refinements=call.refinements)


def compare(path: str, again: bytes, exact: bool) -> tuple[bool, str]:
    """(True, line) when the file holds exactly these bytes, else False and what is different."""
    data = Path(path).read_bytes()
    if data == again:
        return True, f"{path}: equal, {len(data)} bytes"
    a = read_image(path).permute(1, 2, 0).numpy().astype(int)
    with Image.open(io.BytesIO(again)) as second:
        b = np.asarray(second.convert("RGB")).astype(int)
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
