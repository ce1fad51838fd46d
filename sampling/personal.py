"""The adapters and learned tokens that a call names, put on its system, and what its images say about them."""
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from files.whole import sha256_of
from pipeline.personal import Personal
from pipeline.system import TextToImage

STRONGEST = 10.0  # the largest scale of an adapter, in either direction
ADAPTER, EMBEDDING = "adapter.safetensors", "embedding.safetensors"  # what the stages leave in their run folders


@dataclass(frozen=True)
class PersonalFiles:
    """adapters: FILE or FILE:SCALE, embeddings: FILE, where a run folder stands for the file that its stage left.
    any_base: files of another base are accepted."""

    adapters: Sequence[str] = ()
    embeddings: Sequence[str] = ()
    any_base: bool = False


@dataclass(frozen=True)
class LearnedFile:
    """A file that an image was drawn with; never its folder."""

    file: str
    sha256: str


@dataclass(frozen=True)
class AdapterFile(LearnedFile):
    """... and the scale at which it was merged."""

    scale: float

    def __post_init__(self) -> None:
        check_scale(self.scale, self.file)


def check_scale(scale: float, file: str) -> None:
    """Raises ValueError for a scale that is no number or too large."""
    if not (math.isfinite(scale) and abs(scale) <= STRONGEST):
        raise ValueError(f"--adapter {file}: scale {scale:g}; valid: -{STRONGEST:g} to {STRONGEST:g}, 1 as trained, "
                         "0 for nothing")


def parse_adapter(text: str) -> tuple[Path, float]:
    """(file, scale) of FILE or FILE:SCALE. Raises ValueError for a scale that is none."""
    file, colon, number = text.rpartition(":")
    if not colon or Path(text).exists() or "/" in number or "\\" in number:
        return in_folder(text, ADAPTER), 1.0
    try:
        scale = float(number)
    except ValueError:
        raise ValueError(f"--adapter {text}; valid: FILE or FILE:SCALE, as in style.safetensors:0.8") from None
    check_scale(scale, file)
    return in_folder(file, ADAPTER), scale


def in_folder(text: str, name: str) -> Path:
    """The path of a file, or of the file ``name`` in a folder."""
    return Path(text) / name if Path(text).is_dir() else Path(text)


def personalize(system: TextToImage, files: PersonalFiles) -> None:
    """Put the files on a system, and say which of them do not belong to its base. Raises ValueError or OSError naming
    what does not fit."""
    if not files.adapters and not files.embeddings:
        return
    personal = Personal(system, [parse_adapter(text) for text in files.adapters],
                        [in_folder(text, EMBEDDING) for text in files.embeddings], files.any_base)
    for note in personal.notes:
        print(f"note: {note}", file=sys.stderr)


# ---- metadata

def learned_files(files: PersonalFiles) -> tuple[tuple[AdapterFile, ...], tuple[LearnedFile, ...]]:
    """The adapters and the embeddings of a call as its images name them."""
    adapters = [parse_adapter(text) for text in files.adapters]
    embeddings = [in_folder(text, EMBEDDING) for text in files.embeddings]
    return (tuple(AdapterFile(path.name, sha256_of(path), scale) for path, scale in adapters),
            tuple(LearnedFile(path.name, sha256_of(path)) for path in embeddings))


def check_files(path: str, known: Sequence[LearnedFile], given: Sequence[Path], flag: str) -> None:
    """Raise ValueError unless ``given`` are the files that the image at ``path`` was drawn with, in their order."""
    if known and len(given) != len(known):
        raise ValueError(f"{path} was drawn with {', '.join(file.file for file in known)}; valid: {flag} with "
                         f"{'these files' if len(known) > 1 else 'this file'} beside --verify")
    if given and not known:
        raise ValueError(f"{path} was not drawn with {flag}; valid: --verify without it")
    for file, expected in zip(given, known):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}")
        if sha256_of(file) != expected.sha256:
            raise ValueError(f"{path} was drawn with another {expected.file} than {file}; valid: the same bytes, in "
                             "the same order")


def files_to_verify(path: str, adapters: Sequence[AdapterFile], embeddings: Sequence[LearnedFile],
                    given: PersonalFiles) -> PersonalFiles:
    """The given files at the scales that the image at ``path`` was drawn with. Raises ValueError for others, and for
    another scale that is given."""
    named = [parse_adapter(text) for text in given.adapters]
    words = [in_folder(text, EMBEDDING) for text in given.embeddings]
    check_files(path, adapters, [file for file, _ in named], "--adapter")
    check_files(path, embeddings, words, "--embedding")
    for text, (file, scale), known in zip(given.adapters, named, adapters):
        if scale not in (known.scale, 1.0):
            raise ValueError(f"--adapter {text}: {path} was drawn at scale {known.scale:g}; valid: {file} alone")
    # hashes are compared already: a base that was accepted by force then is accepted again
    return PersonalFiles([f"{file}:{known.scale!r}" for (file, _), known in zip(named, adapters)],
                         [str(file) for file in words], True)
