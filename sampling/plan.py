"""What one call asks for, and its requests: prompts times seeds, a grid, or the way between two ends."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusion.sampling import SamplingConfig
from files.text import read_lines
from pipeline.palette import parse_palette
from pipeline.prompts import alternatives
from pipeline.system import with_options
from sampling.limits import CHUNKS, LARGEST, PALETTE_WEIGHT, STRENGTH
from sampling.request import Request, cross, interpolate, parse_axis, with_settings


@dataclass(frozen=True)
class Plan:
    """What one call asks for.

    prompts: as they were written, before their alternatives are spelt out; ``file`` holds more, one a line. count:
    images of each prompt, with ``seed`` and the seeds after it. sampler, steps, guidance: in place of the system's own,
    where they are given. settings: "NAME=VALUE" for the others. strength: None for the default of what is started from.
    palette, palette_weight, palette_only: colours, how strongly samples are drawn to them, and whether there are no
    others. interpolate: images on the way to ``to_seed``. axes: "NAME=A,B" for a grid.
    starts: from an image; painted: with a mask; inverted: an image is inverted; weak: by autoguidance.
    """

    prompts: Sequence[str] = ()
    file: str | None = None
    negative: str = ""
    literal: bool = False
    chunks: int = CHUNKS
    count: int = 1
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    settings: Sequence[str] = ()
    strength: float | None = None
    palette: str = ""
    palette_weight: float | None = None
    palette_only: bool = False
    interpolate: int | None = None
    to_seed: int | None = None
    axes: Sequence[str] = ()
    starts: bool = False
    painted: bool = False
    inverted: bool = False
    weak: bool = False


def read_prompts(plan: Plan) -> list[str]:
    """Prompts of the plan, then those of its file, one a line, with every alternative of each. Raises ValueError when
    there are none or too many, and for one that is not text."""
    prompts = list(plan.prompts)
    if plan.file is not None:
        prompts += [line.strip() for line in read_lines(plan.file) if line.strip()]
        if not prompts:
            raise ValueError(f"{plan.file} holds no prompt; valid: a text file with one prompt a line")
    if not prompts and (plan.inverted or any(axis.startswith("prompt=") for axis in plan.axes)):
        prompts = [""]
    if not prompts:
        raise ValueError("no prompt; valid: python sample.py \"a small red star\", or --prompts FILE")
    for text in (*prompts, plan.negative, *plan.axes):
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):  # Python hands over stray bytes as surrogates
            raise ValueError(f"prompt {text!a} is not text in UTF-8")
    if plan.literal:
        return prompts
    if len(alternatives(plan.negative)) > 1:
        raise ValueError(f"--negative {plan.negative!r} has alternatives; valid: one negative prompt a call")
    return [prompt for text in prompts for prompt in alternatives(text, LARGEST)]


def requests_of_plan(plan: Plan, prompts: Sequence[str], base: SamplingConfig) -> list[Request]:
    """Every image that is requested: ``prompts`` are those of ``read_prompts``, ``base`` the settings of the system.
    Raises ValueError for settings that are not valid or do not go together."""
    scale = 1.0 if plan.inverted and plan.guidance is None else plan.guidance
    config = with_options(base, plan.sampler, plan.steps, scale)
    strength = None
    if plan.starts:
        strength = plan.strength if plan.strength is not None else 1.0 if plan.painted else STRENGTH
    first = Request(prompts[0], plan.seed, config, plan.negative, strength, literal=plan.literal, chunks=plan.chunks,
                    **palette_of_plan(plan))
    if plan.axes:
        return crossed_requests(plan, prompts, first)
    config = with_settings(config, plan.settings)
    if plan.inverted and config.sampler != "ddim":
        raise ValueError(f"--invert with sampler {config.sampler}; valid: --sampler ddim, whose steps can be undone")
    if plan.interpolate:
        if len(prompts) > 2:
            raise ValueError(f"{len(prompts)} prompts with --interpolate; valid: one, or two to go between")
        seed = plan.to_seed if plan.to_seed is not None else plan.seed + (len(prompts) == 1)
        return interpolate(replace(first, config=config), prompts[-1], seed, plan.interpolate)
    if len(prompts) * plan.count > LARGEST:
        raise ValueError(f"{len(prompts) * plan.count} images asked for; valid: up to {LARGEST} a call")
    repeated = [prompt for prompt in prompts for _ in range(plan.count)]
    return [replace(first, prompt=prompt, seed=plan.seed + k, config=config) for k, prompt in enumerate(repeated)]


def palette_of_plan(plan: Plan) -> dict[str, Any]:
    """The palette of every request, by its colours: an image that they were taken from is not needed again."""
    if not plan.palette:
        return {}
    weight = plan.palette_weight if plan.palette_weight is not None else 0.0 if plan.palette_only else PALETTE_WEIGHT
    return {"palette": parse_palette(plan.palette).text, "palette_weight": weight, "palette_only": plan.palette_only}


def crossed_requests(plan: Plan, prompts: Sequence[str], first: Request) -> list[Request]:
    """The cells of an X/Y grid."""
    axes = [parse_axis(text) for text in plan.axes]
    names = [axis.name for axis in axes]
    if len(axes) > 2 or len(set(names)) < len(names):
        raise ValueError(f"--xy {' '.join(plan.axes)}; valid: one or two parameters, each once")
    if len(prompts) > 1 or plan.count > 1:
        raise ValueError(f"{len(prompts) * plan.count} images with --xy; valid: one prompt and --n 1, or "
                         "prompt=ONE|ANOTHER as a parameter")
    if "strength" in names and not plan.starts:
        raise ValueError("--xy strength without --init; valid: both")
    if "palette_weight" in names and not plan.palette:
        raise ValueError("--xy palette_weight without --palette; valid: both")
    if "negative" in names and plan.weak:
        raise ValueError("--xy negative with --weak; valid: one of them")
    if "prompt" in names and (plan.prompts or plan.file):
        raise ValueError("a prompt with --xy prompt; valid: one of them")
    if (count := math.prod(len(axis.values) for axis in axes)) > LARGEST:
        raise ValueError(f"{count} images asked for; valid: up to {LARGEST} a call")
    return cross(first, axes, plan.settings)
