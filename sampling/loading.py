"""The system that a call names, the images that it starts from and the moderation that it asks for, loaded."""
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from files.images import MAX_PIXELS, read_image, read_mask
from model.device import default_device
from pipeline.config import read_data_config
from pipeline.loading import load_pretrained, load_run, load_weaker, use_tiny_decoder
from pipeline.moderation import Moderation, moderation_weights
from pipeline.system import Decoder, Speed, TextToImage
from safety.audit import AuditLog, read_key
from safety.policy import Mode
from safety.prompt import DEFAULT
from sampling.draw import Sources
from sampling.limits import RUN, SHIPPED
from sampling.personal import PersonalFiles, personalize

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of files of weights


@dataclass(frozen=True)
class SystemChoice:
    """Which system samples: a run folder, or the published checkpoint at the path ``pretrained``.

    tokenizer, prediction: of a single file that does not hold them. sampler: in place of the checkpoint's own, where
    that cannot be followed. variant: of weights that a folder holds twice. weak: a run folder or a state to be the
    weaker network of autoguidance. size: "N" or "HxW" pixels, None for those of training. tiled: decode in tiles.
    speed: "fast" computes in bf16 (docs/performance.md). decoder: "tiny" is the small one of the run (docs/student.md).
    personal: adapters and learned tokens that are put on it.
    """

    run: str | None = None
    pretrained: str | None = None
    tokenizer: str | None = None
    prediction: str | None = None
    sampler: str | None = None
    variant: str | None = None
    weak: str | None = None
    size: str | None = None
    tiled: bool = False
    speed: Speed = "exact"
    decoder: Decoder = "full"
    personal: PersonalFiles = PersonalFiles()

    @property
    def path(self) -> Path:
        """The folder or file that the system is in."""
        if self.pretrained or self.run:
            return Path(self.pretrained or self.run or "")
        return SHIPPED if SHIPPED.is_dir() and not (Path(RUN) / "config.yaml").is_file() else Path(RUN)

    @property
    def default_output(self) -> Path:
        """The folder of images where none is named: in the run, or under runs/ for weights that came from elsewhere."""
        elsewhere = self.pretrained or self.path == SHIPPED
        return (Path("runs") / self.name if elsewhere else self.path) / "samples" / "out"

    @property
    def name(self) -> str:
        """The whole name of that folder, or of that file without the ending of weights: dots in it are kept."""
        path = Path(os.path.abspath(self.path))
        return path.stem if path.suffix in ENDINGS and not path.is_dir() else path.name


@dataclass(frozen=True)
class SourceFiles:
    """The files of ``Sources``: an image to start from, a mask of what is painted, or an image to invert."""

    init: str | None = None
    mask: str | None = None
    invert: str | None = None
    refinements: int | None = None


@dataclass(frozen=True)
class ModerationChoice:
    """What is done about harm, and by which files. audit: the log and its key."""

    mode: Mode = "block"
    concepts: str | None = None
    clip: str | None = None
    audit: tuple[str, str] | None = None


def load_system(choice: SystemChoice) -> TextToImage:
    """The system that is chosen, with its weaker one, at the size that is chosen. Raises ValueError or OSError naming
    what is missing, damaged or not valid."""
    if choice.pretrained:
        system = load_pretrained(choice.path, default_device(), choice.tokenizer, choice.prediction, None,
                                 choice.sampler, choice.variant)
    else:
        system = load_run(choice.path, default_device(), None)
    if choice.size is not None:
        if not (size := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", choice.size)):
            raise ValueError(f"--size {choice.size}; valid: N, or HxW, in pixels")
        system.set_size(int(size[1]), int(size[2] or size[1]))
    if choice.weak is not None:
        system.guide = load_weaker(system, choice.weak)
    personalize(system, choice.personal)
    system.tiled = choice.tiled
    if choice.decoder == "tiny":
        use_tiny_decoder(system, choice.path)
    return system.at_speed(choice.speed)


def read_sources(files: SourceFiles, system: SystemChoice = SystemChoice()) -> Sources:
    """The images that a call starts from, within the limits of the configuration of a run. Says what should be known of
    a mask. Raises ValueError or OSError for a file that is no image or too large."""
    path, paint = files.init or files.invert, None
    config = system.path / "config.yaml"
    largest = MAX_PIXELS if system.pretrained or not config.is_file() else read_data_config(config).max_pixels
    if files.mask:
        paint, note = read_mask(files.mask, largest)
        if note:
            print(f"note: {note}", file=sys.stderr)
    return Sources(read_image(path, largest) if path else None, paint, files.refinements if files.invert else None)


def load_moderation(choice: ModerationChoice, system: SystemChoice) -> Moderation:
    """The moderation that is chosen. Raises ValueError or OSError for a file that is missing or does not fit."""
    audit = AuditLog(choice.audit[0], read_key(choice.audit[1])) if choice.audit else None
    if system.pretrained:  # what comes with weights of others does not decide what may be drawn with them
        return Moderation.load(choice.mode, DEFAULT, choice.concepts, choice.clip, audit, default_device())
    if moderation_weights(system.path) != DEFAULT:
        print(f"moderation: by {moderation_weights(system.path)}, not by the weights that are shipped", file=sys.stderr)
    return Moderation.of_run(system.path, choice.mode, choice.concepts, choice.clip, audit, default_device())
