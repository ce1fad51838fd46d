"""A command line of `sample.py`, understood."""
import argparse
from dataclasses import dataclass

from sampling.engine import DrawSettings
from sampling.flags import SAMPLERS, check_combination, check_limits, parser
from sampling.limits import REFINEMENTS, SHARD
from sampling.loading import ModerationChoice, SourceFiles, SystemChoice
from sampling.personal import PersonalFiles
from sampling.plan import Plan


@dataclass(frozen=True)
class Command:
    """A command line, understood. out: the folder of the images, None for the one in the run. verify: files to draw
    again instead. styles: "NAME" or "NAME:STRENGTH", of ``style_file`` or of the repository, which ``list_styles``
    prints instead. bulk: the file of prompts may be of any length; ``shard_size`` requests go into one tar, or into one
    folder of single ``files``."""

    plan: Plan
    system: SystemChoice
    sources: SourceFiles
    draw: DrawSettings
    moderation: ModerationChoice
    out: str | None = None
    metadata: bool = True
    verify: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    style_file: str | None = None
    list_styles: bool = False
    bulk: bool = False
    shard_size: int = SHARD
    files: bool = False


def parse(arguments: list[str]) -> Command:
    """The command line, understood. Raises ValueError in one line for numbers out of range and for flags that do not go
    together."""
    reader = parser()
    options = reader.parse_args(arguments)
    given = {name for name, value in vars(options).items() if value != reader.get_default(name) and value != []}
    check_combination(options, given)
    check_limits(options)
    return command_of(options)


def command_of(options: argparse.Namespace) -> Command:
    """The settings that the flags stand for."""
    same = ("negative", "literal", "chunks", "seed", "sampler", "steps", "guidance", "strength", "interpolate",
            "to_seed", "palette", "palette_weight", "palette_only")
    plan = Plan(prompts=options.prompt, file=options.prompts, count=options.n, settings=options.settings or (),
                axes=options.xy or (), starts=bool(options.init), painted=bool(options.mask),
                inverted=bool(options.invert), weak=bool(options.weak),
                **{name: getattr(options, name) for name in same})
    refinements = REFINEMENTS if options.invert and options.refinements is None else options.refinements
    return Command(
        plan,
        SystemChoice(options.run, options.pretrained, options.tokenizer, options.prediction, sampler_of(options),
                     options.variant, options.weak, options.size, options.tiled, options.speed, options.decoder,
                     PersonalFiles(options.adapter or (), options.embedding or (), options.any_base)),
        SourceFiles(options.init, options.mask, options.invert, refinements),
        DrawSettings(options.batch or (1 if options.pretrained else 64), options.exact, options.frames or 0,
                     options.attention),
        ModerationChoice(options.moderation, options.concepts, options.clip, options.audit and tuple(options.audit)),
        options.out, not options.no_metadata, tuple(options.verify or ()),
        tuple(options.style), options.style_file, options.styles, options.bulk, options.shard_size, options.files)


def sampler_of(options: argparse.Namespace) -> str | None:
    """The sampler that the flags name, or the first of those along an axis; None for the system's own."""
    along = [text.partition("=")[2].split(",")[0].strip() for text in options.xy or () if text.startswith("sampler=")]
    return options.sampler or (along[0] if along and along[0] in SAMPLERS else None)
