"""The command line of `sample.py`: its flags, which of them go together, and the system that they name."""
import argparse
import math
import re
import sys
from pathlib import Path

from diffusion.samplers import SAMPLERS
from diffusion.sampling import SamplingConfig
from model.device import default_device
from pipeline.loading import load_pretrained, load_run, load_weaker
from pipeline.moderation import CONCEPTS, Moderation, weights_of
from pipeline.prompts import alternatives
from pipeline.system import TextToImage, with_options
from safety.audit import AuditLog, read_key
from safety.policy import MODES
from safety.prompt import DEFAULT
from sampling.request import (
    AXES,
    CHUNKS,
    LAST_SEED,
    MOST_CHUNKS,
    SETTINGS,
    Request,
    crossed,
    interpolated,
    parse_axis,
    with_settings,
)

LARGEST = 100_000  # pictures of one call
RUN = "runs/shapes"
STRENGTH = 0.6  # of image to image; inpainting begins from noise
REFINEMENTS, MOST_REFINEMENTS = 3, 100
APART = (("init", "invert"), ("init", "interpolate"), ("invert", "interpolate"), ("xy", "interpolate"),
         ("xy", "invert"), ("attention", "interpolate"), ("attention", "invert"), ("run", "pretrained"),
         ("weak", "negative"), ("weak", "interpolate"), ("weak", "invert"), ("weak", "pretrained"))
NEEDS = (("mask", "init"), ("strength", "init"), ("to_seed", "interpolate"), ("refinements", "invert"))
OF_VERIFY = {"verify", "run", "weak", "pretrained", "tokenizer", "prediction", "init", "mask", "invert"}


def parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Draw pictures of prompts, or edit, invert and verify pictures.",
        epilog="(word:1.3) and [word] weigh words, {a|b} draws every alternative; docs/sampling.md, docs/prompts.md")
    add = parser.add_argument_group("prompts").add_argument
    add("prompt", nargs="*", help="one or more prompts")
    add("--prompts", metavar="FILE", help="a text file with one prompt a line")
    add("--negative", default="", metavar="TEXT", help="what guidance pushes away from")
    add("--literal", action="store_true", help="brackets and braces are letters: no weights, no alternatives")
    add("--chunks", type=int, default=CHUNKS, metavar="K", help="contexts that a long prompt may fill before it is cut "
        "(%(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--run", metavar="DIR", help=f"run folder ({RUN})")
    add("--pretrained", metavar="PATH", help="a published Stable Diffusion 1.x or 2.x instead of a run: a diffusers "
        "folder, or a single .safetensors or .ckpt file")
    add("--tokenizer", metavar="DIR", help="vocab.json and merges.txt for a single file (tokenizer/ beside it)")
    add("--prediction", choices=("epsilon", "v_prediction"), help="what a single file of 2.x predicts, which it does "
        "not say")
    add = parser.add_argument_group("sampling").add_argument
    add("--n", type=int, default=1, help="pictures a prompt (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the first picture, the next has the next (0)")
    add("--steps", type=int, help="sampler steps")
    add("--sampler", help=", ".join(SAMPLERS))
    add("--guidance", type=float, metavar="W", help="guidance scale; 1 is off")
    add("--weak", metavar="PATH", help="autoguidance: push away from a smaller or less trained network instead of the "
        "empty prompt; a run folder with the same autoencoder, or an earlier state of this run "
        "(state/denoiser/step_*.pt)")
    add("--set", nargs="+", metavar="NAME=VALUE", dest="settings", help="settings without a flag of their own: "
        f"{', '.join(SETTINGS)}")
    add("--size", metavar="N or HxW", help="pixels of a picture (what the model was trained at)")
    add("--tiled", action="store_true", help="decode in tiles: less memory, approximate")
    add("--batch", type=int, help="pictures computed at a time (64, with --pretrained 1)")
    add("--exact", action="store_true", help="bytes that do not depend on --batch: one picture at a time")
    add = parser.add_argument_group("starting from a picture").add_argument
    add("--init", metavar="IMAGE", help="image to image: start from this picture")
    add("--strength", type=float, metavar="S", help=f"share of the steps taken from it ({STRENGTH}, with --mask 1)")
    add("--mask", metavar="IMAGE", help="inpainting: paint where the mask is light, keep the rest of --init")
    add("--invert", metavar="IMAGE", help="back to the noise by DDIM and forth again, with the error")
    add("--refinements", type=int, metavar="R", help=f"repeats of each step of --invert ({REFINEMENTS})")
    add = parser.add_argument_group("several at once").add_argument
    add("--interpolate", type=int, metavar="N", help="N pictures on the way from the first prompt to the second, or "
        "from --seed to --to-seed")
    add("--to-seed", type=int, metavar="SEED", help="noise at the end of --interpolate (with two prompts the same, "
        "with one the next)")
    add("--xy", nargs="+", metavar="NAME=A,B", help=f"a grid over one or two parameters: {', '.join(AXES)}")
    add_moderation(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="where the pictures go (samples/out in the run folder)")
    add("--frames", type=int, metavar="N", help="also N predictions of x_0 on the way, as a strip and a GIF")
    add("--attention", action="store_true", help="also where each token is looked at, as a sheet")
    add("--no-metadata", action="store_true", help="leave no settings in the pictures")
    add("--verify", nargs="+", metavar="FILE", help="draw pictures again from their own settings and compare all bytes")
    return parser


def add_moderation(parser: argparse.ArgumentParser) -> None:
    """The flags of the gate."""
    add = parser.add_argument_group("moderation").add_argument
    add("--moderation", choices=MODES, default="block", help="the most that is done about a harmful prompt or picture "
        "(%(default)s)")
    add("--concepts", metavar="FILE", help=f"what pictures must not show, as YAML ({CONCEPTS} in the run folder, where "
        "there is one)")
    add("--clip", metavar="DIR", help="run folder of the CLIP that judges pictures by --concepts (the run's own)")
    add("--audit", nargs=2, metavar=("LOG", "KEY"), help="append decisions, but no words, to a log")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; raises ValueError in one line for numbers out of range and flags that do not go together."""
    reader = parser()
    options = reader.parse_args(arguments)
    given = {name for name, value in vars(options).items() if value != reader.get_default(name) and value != []}

    def flag(name: str) -> str:
        return {"prompt": "a prompt", "settings": "--set"}.get(name, "--" + name.replace("_", "-"))

    if options.verify and (wrong := sorted(given - OF_VERIFY)):
        raise ValueError(f"{flag(wrong[0])} with --verify; valid: a picture has its own settings, only --run, "
                         "--pretrained and the pictures it was made from are given")
    for first, second in APART:
        if {first, second} <= given:
            raise ValueError(f"{flag(first)} with {flag(second)}; valid: one of them")
    for name, needed in NEEDS:
        if name in given and needed not in given:
            raise ValueError(f"{flag(name)} without {flag(needed)}; valid: both")
    limits = {"n": (1, LARGEST), "batch": (1, LARGEST), "chunks": (1, MOST_CHUNKS), "frames": (1, 1000),
              "refinements": (0, MOST_REFINEMENTS), "interpolate": (2, LARGEST), "seed": (0, LAST_SEED),
              "to_seed": (0, LAST_SEED)}
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            most = "2^62 - 1" if high == LAST_SEED else high
            raise ValueError(f"{flag(name)} {value}; valid: {low} to {most}")
    if options.n > 1 and (options.invert or options.interpolate):
        raise ValueError(f"--n with {flag('invert' if options.invert else 'interpolate')}; valid: one of them")
    if options.batch is None:
        options.batch = 1 if options.pretrained else 64
    return options


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then those of the file, one a line, with every alternative of each. Raises
    ValueError when there are none or too many, and for one that is not text."""
    prompts = list(options.prompt)
    if options.prompts is not None:
        try:
            lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{options.prompts} is not a text file in UTF-8") from None
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{options.prompts} holds no prompt; valid: a text file with one prompt a line")
    axes = options.xy or []
    if not prompts and (options.invert or any(axis.startswith("prompt=") for axis in axes)):
        prompts = [""]
    if not prompts:
        raise ValueError("no prompt; valid: python sample.py \"a small red star\", or --prompts FILE")
    for text in (*prompts, options.negative, *axes):
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):  # Python hands over stray bytes as surrogates
            raise ValueError(f"prompt {text!a} is not text in UTF-8")
    if options.literal:
        return prompts
    if len(alternatives(options.negative)) > 1:
        raise ValueError(f"--negative {options.negative!r} has alternatives; valid: one negative prompt a call")
    return [prompt for text in prompts for prompt in alternatives(text, LARGEST)]


def requests_of(options: argparse.Namespace, prompts: list[str], base: SamplingConfig) -> list[Request]:
    """Every picture that is asked for. Raises ValueError for settings that cannot be or do not go together."""
    scale = 1.0 if options.invert and options.guidance is None else options.guidance
    config = with_settings(with_options(base, options.sampler, options.steps, scale), options.settings or [])
    if options.invert and config.sampler != "ddim":
        raise ValueError(f"--invert with sampler {config.sampler}; valid: --sampler ddim, whose steps can be undone")
    strength = None
    if options.init:
        strength = options.strength if options.strength is not None else 1.0 if options.mask else STRENGTH
    first = Request(prompts[0], options.seed, config, options.negative, strength, literal=options.literal,
                    chunks=options.chunks)
    if options.xy:
        return crossed_requests(options, prompts, first)
    if options.interpolate:
        if len(prompts) > 2:
            raise ValueError(f"{len(prompts)} prompts with --interpolate; valid: one, or two to go between")
        seed = options.to_seed if options.to_seed is not None else options.seed + (len(prompts) == 1)
        return interpolated(first, prompts[-1], seed, options.interpolate)
    if len(prompts) * options.n > LARGEST:
        raise ValueError(f"{len(prompts) * options.n} pictures asked for; valid: up to {LARGEST} a call")
    repeated = [prompt for prompt in prompts for _ in range(options.n)]
    return [Request(prompt, options.seed + k, config, options.negative, strength, None, options.literal, options.chunks)
            for k, prompt in enumerate(repeated)]


def crossed_requests(options: argparse.Namespace, prompts: list[str], first: Request) -> list[Request]:
    """The cells of an X/Y grid."""
    axes = [parse_axis(text) for text in options.xy]
    names = [axis.name for axis in axes]
    if len(axes) > 2 or len(set(names)) < len(names):
        raise ValueError(f"--xy {' '.join(options.xy)}; valid: one or two parameters, each once")
    if len(prompts) > 1 or options.n > 1:
        raise ValueError(f"{len(prompts) * options.n} pictures with --xy; valid: one prompt and --n 1, or "
                         "prompt=ONE|ANOTHER as a parameter")
    if "strength" in names and not options.init:
        raise ValueError("--xy strength without --init; valid: both")
    if "negative" in names and options.weak:
        raise ValueError("--xy negative with --weak; valid: one of them")
    if "prompt" in names and (options.prompt or options.prompts):
        raise ValueError("a prompt with --xy prompt; valid: one of them")
    if (count := math.prod(len(axis.values) for axis in axes)) > LARGEST:
        raise ValueError(f"{count} pictures asked for; valid: up to {LARGEST} a call")
    return crossed(first, axes)


def load_system(options: argparse.Namespace) -> tuple[TextToImage, Path]:
    """The system that is asked for, with its weaker one, drawing at the size asked for, and the folder or file that it
    is in."""
    if options.pretrained:
        source = Path(options.pretrained)
        system = load_pretrained(source, default_device(), options.tokenizer, options.prediction, None)
    else:
        source = Path(options.run or RUN)
        system = load_run(source, default_device(), None)
    if options.size is not None:
        if not (size := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", options.size)):
            raise ValueError(f"--size {options.size}; valid: N, or HxW, in pixels")
        system.set_size(int(size[1]), int(size[2] or size[1]))
    if options.weak is not None:
        system.guide = load_weaker(system, options.weak)
    system.tiled = options.tiled
    return system, source


def moderation_of(options: argparse.Namespace, source: Path) -> Moderation:
    """The moderation that is asked for. Raises ValueError or OSError for a file that is missing or does not fit."""
    audit = AuditLog(options.audit[0], read_key(options.audit[1])) if options.audit else None
    if options.pretrained:  # what comes with weights of others does not decide what may be drawn with them
        return Moderation.load(options.moderation, DEFAULT, options.concepts, options.clip, audit, default_device())
    if weights_of(source) != DEFAULT:
        print(f"moderation: by {weights_of(source)}, not by the weights that are shipped", file=sys.stderr)
    return Moderation.of_run(source, options.moderation, options.concepts, options.clip, audit, default_device())
