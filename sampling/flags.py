"""The flags of `sample.py` and which of them go together. Nothing here imports PyTorch: --help takes no time."""
import argparse

from safety.policy import MODES
from sampling.limits import (
    CHUNKS,
    HEAVIEST_PALETTE,
    LARGEST,
    LAST_SEED,
    MOST_CHUNKS,
    MOST_REFINEMENTS,
    PALETTE_WEIGHT,
    REFINEMENTS,
    RUN,
    SHARD,
    STRENGTH,
)

# names that modules define which take seconds to import; a test compares them
SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "pndm", "dpm_solver_multistep", "dpm_solver_singlestep",
            "dpm_solver_sde", "unipc", "consistency", "lcm", "flow_euler", "flow_heun")
SETTINGS = ("spacing", "offset", "reuse", "variance", "noisy_end", "repeats", "eta", "clean_end", "extrapolate",
            "order", "solver_type", "lower_order_final", "euler_at_final", "third_order", "form", "uncorrected",
            "sigma_data", "timestep_scaling", "method", "interval", "rescale", "apg_parallel", "apg_norm",
            "apg_momentum", "zero_init", "threshold", "threshold_limit")
AXES = ("steps", "guidance", "sampler", "seed", "strength", "prompt", "negative", "chunks", "palette_weight", *SETTINGS)
THEMES = ("autumn", "ocean", "forest", "neon", "pastel", "sunset", "earth", "monochrome")
CONCEPTS = "concepts.yaml"

APART = (("init", "invert"), ("init", "interpolate"), ("invert", "interpolate"), ("xy", "interpolate"),
         ("xy", "invert"), ("attention", "interpolate"), ("attention", "invert"), ("run", "pretrained"),
         ("decoder", "tiled"), ("decoder", "pretrained"), ("palette", "invert"), ("weak", "negative"),
         ("weak", "interpolate"), ("weak", "invert"), ("weak", "pretrained"),
         *(("styles", other) for other in ("style", "interpolate", "xy", "invert")),
         *(("bulk", other) for other in ("prompt", "interpolate", "xy", "init", "invert", "frames", "attention",
                                         "styles")))
NEEDS_ONE = (("any_base", ("adapter", "embedding")),)
NEEDS = (("mask", "init"), ("strength", "init"), ("to_seed", "interpolate"), ("refinements", "invert"),
         ("palette_weight", "palette"), ("palette_only", "palette"), ("variant", "pretrained"), ("bulk", "prompts"),
         ("bulk", "out"), ("shard_size", "bulk"), ("files", "bulk"))
OF_VERIFY = {"verify", "run", "weak", "pretrained", "tokenizer", "prediction", "variant", "init", "mask", "invert",
             "adapter", "embedding"}


def parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Draw images of prompts, or edit, invert and verify images.",
        epilog="(word:1.3) and [word] weigh words, {a|b} draws every alternative; docs/sampling.md, docs/prompts.md")
    add = parser.add_argument_group("prompts").add_argument
    add("prompt", nargs="*", help="one or more prompts")
    add("--prompts", metavar="FILE", help="a text file with one prompt a line; with --bulk also .jsonl and .csv")
    add("--negative", default="", metavar="TEXT", help="what guidance pushes away from")
    add("--literal", action="store_true", help="brackets and braces are letters: no weights, no alternatives")
    add("--chunks", type=int, default=CHUNKS, metavar="K", help="contexts that a long prompt may fill before it is cut "
        "(%(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--run", metavar="DIR", help=f"run folder ({RUN} where it is, else the weights that come with the "
        "repository)")
    add("--pretrained", metavar="PATH", help="a published Stable Diffusion 1.x or 2.x instead of a run: a diffusers "
        "folder, or a single .safetensors or .ckpt file")
    add("--tokenizer", metavar="DIR", help="vocab.json and merges.txt for a single file (tokenizer/ beside it)")
    add("--prediction", choices=("epsilon", "v_prediction"), help="what the network predicts, where a single file does "
        "not say it, or in place of what a checkpoint says")
    add("--variant", metavar="NAME", help="fp16 and the like: which weights of a diffusers folder that has them twice")
    add("--adapter", nargs="+", metavar="FILE[:SCALE]", help="LoRA and its kin, merged at this scale (1): .safetensors "
        "of kohya, PEFT, diffusers or the stage lora, or its run folder")
    add("--embedding", nargs="+", metavar="FILE", help="words that were learned from images: .safetensors, .pt or .bin")
    add("--any-base", action="store_true", help="use adapters and embeddings of another base")
    add_sampling(parser)
    add_colours(parser)
    add_editing(parser)
    add_moderation(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="where the images go (samples/out in the run folder)")
    add("--frames", type=int, metavar="N", help="also N predictions of x_0 on the way, as a strip and a GIF")
    add("--attention", action="store_true", help="also where each token is looked at, as a sheet")
    add("--no-metadata", action="store_true", help="leave no settings in the images")
    add("--verify", nargs="+", metavar="FILE", help="draw images again from their own settings and compare all bytes")
    add = parser.add_argument_group("many prompts (docs/bulk.md)").add_argument
    add("--bulk", action="store_true", help="--prompts of any length, text, .jsonl or .csv, into tar shards in --out; "
        "the same command goes on where it was stopped, and several processes share the work")
    add("--shard-size", type=int, default=SHARD, metavar="N", help="requests a shard (%(default)s)")
    add("--files", action="store_true", help="single files in a folder for each shard instead of tars")
    return parser


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The flags of the sampler, of seeds and of sizes."""
    add = parser.add_argument_group("sampling").add_argument
    add("--n", type=int, default=1, help="images a prompt (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the first image, the next has the next (0)")
    add("--steps", type=int, help="sampler steps")
    add("--sampler", help=", ".join(SAMPLERS))
    add("--guidance", type=float, metavar="W", help="guidance scale; 1 is off")
    add("--weak", metavar="PATH", help="autoguidance: push away from a smaller or less trained network instead of the "
        "empty prompt; a run folder with the same autoencoder, or an earlier state of this run "
        "(state/denoiser/step_*.pt)")
    add("--set", nargs="+", metavar="NAME=VALUE", dest="settings", help="settings without a flag of their own, options "
        f"of the sampler among them: {', '.join(SETTINGS)}")
    add("--size", metavar="N or HxW", help="pixels of an image (what the model was trained at)")
    add("--tiled", action="store_true", help="decode in tiles: less memory, approximate")
    add("--decoder", choices=("full", "tiny"), default="full", help="tiny: the run's small decoder, for previews; "
        "approximate (%(default)s)")
    add("--speed", choices=("exact", "fast"), default="exact", help="fast: in bf16 where the machine has it, with "
        "rounding that is measured in docs/performance.md (%(default)s)")
    add("--batch", type=int, help="images computed at a time (64, with --pretrained 1)")
    add("--exact", action="store_true", help="bytes that do not depend on --batch: one image at a time")


def add_colours(parser: argparse.ArgumentParser) -> None:
    """The flags of styles and palettes."""
    add = parser.add_argument_group("styles and colours").add_argument
    add("--style", nargs="+", default=[], metavar="NAME[:STRENGTH]", help="draw in these styles, one after the other, "
        "each with a strength from 0 to 2")
    add("--style-file", metavar="FILE", help="styles as YAML, as a web interface's styles.csv, or as Fooocus' JSON "
        "(configs/styles.yaml)")
    add("--styles", action="store_true", help="list the styles; with prompts, draw each without a style and in "
        "every one")
    add("--palette", default="", metavar="COLOURS", help="colours such as \"#1b3a4b,#f2c14e:0.5\" (a number is a "
        f"share of the image), a theme ({', '.join(THEMES)}), or an image file to take them from")
    add("--palette-weight", type=float, metavar="W", help=f"how strongly samples are drawn to the palette, 0 to "
        f"{HEAVIEST_PALETTE:g} ({PALETTE_WEIGHT}, with --palette-only 0)")
    add("--palette-only", action="store_true", help="afterwards give every pixel the nearest colour of the palette")


def add_editing(parser: argparse.ArgumentParser) -> None:
    """The flags of images that start from others, and of several at once."""
    add = parser.add_argument_group("starting from an image").add_argument
    add("--init", metavar="IMAGE", help="image to image: start from this image")
    add("--strength", type=float, metavar="S", help=f"share of the steps taken from it ({STRENGTH}, with --mask 1)")
    add("--mask", metavar="IMAGE", help="inpainting: paint where the mask is light, keep the rest of --init")
    add("--invert", metavar="IMAGE", help="back to the noise by DDIM and forth again, with the error")
    add("--refinements", type=int, metavar="R", help=f"repeats of each step of --invert ({REFINEMENTS})")
    add = parser.add_argument_group("several at once").add_argument
    add("--interpolate", type=int, metavar="N", help="N images on the way from the first prompt to the second, or "
        "from --seed to --to-seed")
    add("--to-seed", type=int, metavar="SEED", help="noise at the end of --interpolate (with two prompts the same, "
        "with one the next)")
    add("--xy", nargs="+", metavar="NAME=A,B", help=f"a grid over one or two parameters: {', '.join(AXES)}")


def add_moderation(parser: argparse.ArgumentParser) -> None:
    """The flags of the gate."""
    add = parser.add_argument_group("moderation").add_argument
    add("--moderation", choices=MODES, default="block", help="the most that is done about a harmful prompt or image "
        "(%(default)s)")
    add("--concepts", metavar="FILE", help=f"what images must not show, as YAML ({CONCEPTS} in the run folder, where "
        "there is one)")
    add("--clip", metavar="DIR", help="run folder of the CLIP that judges images by --concepts (the run's own)")
    add("--audit", nargs=2, metavar=("LOG", "KEY"), help="append decisions, but no words, to a log")


def flag(name: str) -> str:
    """A parsed name as it is written on the command line."""
    return {"prompt": "a prompt", "settings": "--set"}.get(name, "--" + name.replace("_", "-"))


def check_combination(options: argparse.Namespace, given: set[str]) -> None:
    """Raise ValueError for flags that do not go together; ``given`` are the names of those that are not at their
    defaults."""
    if options.verify and (wrong := sorted(given - OF_VERIFY)):
        raise ValueError(f"{flag(wrong[0])} with --verify; valid: an image has its own settings, only --run, "
                         "--pretrained and the images it was made from are given")
    for first, second in APART:
        if {first, second} <= given:
            raise ValueError(f"{flag(first)} with {flag(second)}; valid: one of them")
    for name, needed in NEEDS:
        if name in given and needed not in given:
            raise ValueError(f"{flag(name)} without {flag(needed)}; valid: both")
    for name, needed_one in NEEDS_ONE:
        if name in given and not given & {*needed_one}:
            raise ValueError(f"{flag(name)} without {' or '.join(map(flag, needed_one))}; valid: both")
    if options.n > 1 and (options.invert or options.interpolate):
        raise ValueError(f"--n with {flag('invert' if options.invert else 'interpolate')}; valid: one of them")


def check_limits(options: argparse.Namespace) -> None:
    """Raise ValueError for a number out of its range."""
    limits = {"n": (1, LARGEST), "batch": (1, LARGEST), "shard_size": (1, LARGEST), "chunks": (1, MOST_CHUNKS),
              "frames": (1, 1000), "refinements": (0, MOST_REFINEMENTS), "interpolate": (2, LARGEST),
              "seed": (0, LAST_SEED), "to_seed": (0, LAST_SEED), "palette_weight": (0, HEAVIEST_PALETTE)}
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            most = "2^32 - 1, all that the generator reads" if high == LAST_SEED else high
            raise ValueError(f"{flag(name)} {value}; valid: {low} to {most}")
