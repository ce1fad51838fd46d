"""One image that is requested: everything that decides its pixels beside the weights, and back from metadata."""
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from diffusion.noise import check_seed
from diffusion.samplers import SAMPLERS
from diffusion.sampling import OLDER_OPTIONS, SamplingConfig, with_sampler
from diffusion.spacing import Spacing
from files.config import ConfigError, from_dict, to_dict
from pipeline.palette import parse_palette
from pipeline.prompt_schedule import NOTATION, WEIGHTS_ONLY, PromptSchedule, has_later_signs, read_prompt
from pipeline.prompts import Prompt, split_options
from pipeline.styles import STRONGEST
from pipeline.system import with_options
from sampling.limits import CHUNKS, HEAVIEST_PALETTE, MOST_CHUNKS, MOST_MIXED, PALETTE_WEIGHT


@dataclass(frozen=True)
class Toward:
    """The other end of an interpolation, and how far on the way there the image stands: 0 to 1."""

    prompt: str
    seed: int
    weight: float

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight: value {self.weight}; valid: 0 to 1")


@dataclass(frozen=True)
class Mixed:
    """A further prompt, and how much its prediction counts: 0 nothing, 1 in place of that of the prompt."""

    prompt: str
    weight: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= STRONGEST:
            raise ValueError(f"weight: value {self.weight}; valid: 0 to {STRONGEST:g}")


@dataclass(frozen=True)
class Request:
    """One image. ``strength`` is None for one that starts from noise; prompts are as they were written, in a version of
    the ``notation``; ``mixed`` are further ones whose predictions are mixed in."""

    prompt: str
    seed: int
    config: SamplingConfig
    negative: str = ""
    strength: float | None = None
    toward: Toward | None = None
    literal: bool = False
    chunks: int = CHUNKS
    notation: int = NOTATION
    palette: str = ""  # colours with their shares, see `pipeline/palette.py`
    palette_weight: float = PALETTE_WEIGHT
    palette_only: bool = False
    mixed: tuple[Mixed, ...] = ()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.palette:
            parse_palette(self.palette)
        if not 0 <= self.palette_weight <= HEAVIEST_PALETTE:
            raise ValueError(f"palette_weight: value {self.palette_weight}; valid: 0 to {HEAVIEST_PALETTE:g}")
        if len(self.mixed) > MOST_MIXED or (self.mixed and self.toward is not None):
            raise ValueError(f"mixed: {len(self.mixed)} prompts; valid: up to {MOST_MIXED}, none in an interpolation")
        if self.notation not in (WEIGHTS_ONLY, NOTATION):
            raise ValueError(f"notation: value {self.notation}; valid: {WEIGHTS_ONLY} or {NOTATION}")
        if not 1 <= self.chunks <= MOST_CHUNKS:
            raise ValueError(f"chunks: value {self.chunks}; valid: 1 to {MOST_CHUNKS}")

    @property
    def kind(self) -> tuple:
        """What images must share to be drawn in one batch."""
        return (self.config, self.negative, self.strength, self.toward is None, self.palette, self.palette_weight,
                self.palette_only, len(self.mixed))

    @property
    def conditions(self) -> tuple[str, ...]:
        """The prompts that the image is to follow, as they were written."""
        return self.prompt, *([self.toward.prompt] if self.toward else []), *(one.prompt for one in self.mixed)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt of the request, as it was written."""
        return *self.conditions, self.negative

    def read(self, text: str) -> Prompt | PromptSchedule:
        """A prompt of this request with its signs understood; raises ValueError for signs that do not fit."""
        return read_prompt(text, self.config.steps, self.chunks, self.literal, self.notation)


OMITTED = {"grid": None, "reuse": 1}  # settings that are not in metadata at these values; older files lack them
SAMPLING = tuple(field.name for field in fields(SamplingConfig) if field.name not in OMITTED)
# the keys of metadata that describe the sampling, in files of any version
OF_CONFIG = {*SAMPLING, *OMITTED, *OLDER_OPTIONS}
OWN = tuple(field.name for field in fields(Request) if field.name != "config")


def settings_of(request: Request) -> dict[str, Any]:
    """The metadata of a request. Every option of the sampler is there; of the request itself defaults are omitted."""
    settings: dict[str, Any] = {"prompt": request.prompt, "seed": request.seed, "negative": request.negative,
                                **to_dict(request.config), "options": request.config.complete_options}
    for name, default in OMITTED.items():
        if settings[name] == default:
            del settings[name]
    if request.strength is not None:
        settings["strength"] = request.strength
    if request.toward is not None:
        settings["toward"] = to_dict(request.toward)
    if request.mixed:
        settings["mixed"] = [to_dict(further) for further in request.mixed]
    if request.literal:
        settings["literal"] = True
    if request.chunks != CHUNKS:
        settings["chunks"] = request.chunks
    if request.palette:
        settings |= {"palette": request.palette, "palette_weight": request.palette_weight,
                     "palette_only": request.palette_only}
    if request.notation != WEIGHTS_ONLY and not request.literal and any(map(has_later_signs, request.texts)):
        settings["notation"] = request.notation  # older files have the same signs, which were text then
    return settings


def request_of(settings: dict[str, Any]) -> Request:
    """The request whose metadata this is. Raises ConfigError for a missing key and for a value that is not valid."""
    required = {*SAMPLING} - {"options"} | {*OLDER_OPTIONS} if is_older(settings) else SAMPLING
    if missing := sorted(key for key in required if key not in settings):
        raise ConfigError(f"missing key '{missing[0]}'")
    request = from_dict(Request, {"config": {key: settings[key] for key in settings if key in OF_CONFIG},
                                  **{key: settings[key] for key in OWN if key in settings}})
    if "notation" not in settings and not request.literal and any(map(has_later_signs, request.texts)):
        return replace(request, notation=WEIGHTS_ONLY)
    return request


def is_older(settings: dict[str, Any]) -> bool:
    """Whether metadata holds three options for every sampler, as older versions wrote it."""
    return "options" not in settings and not OLDER_OPTIONS.keys().isdisjoint(settings)


def older_settings_of(request: Request) -> dict[str, Any]:
    """`settings_of`, in the form that older versions wrote."""
    settings = settings_of(request)
    del settings["options"]
    return {**settings, **{name: request.config.options.get(name, default) for name, default in OLDER_OPTIONS.items()}}


# ---- parameters by name: axes of X/Y grids, and --set

def parse_switch(text: str) -> bool:
    """True of "true" and False of "false"; raises ValueError for another text."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def parse_span(text: str) -> tuple[float, float] | None:
    """(low, high) of "low:high" and None of "off"; raises ValueError for another text."""
    if text == "off":
        return None
    low, high = text.split(":")
    return float(low), float(high)


OF_REQUEST: dict[str, Callable[[str], Any]] = {"seed": int, "strength": float, "prompt": str, "negative": str,
                                               "chunks": int, "palette_weight": float}
OF_GUIDANCE: dict[str, Callable[[str], Any]] = {
    "method": str, "interval": parse_span, "rescale": float, "apg_parallel": float, "apg_norm": float,
    "apg_momentum": float, "zero_init": float, "threshold": float, "threshold_limit": float}
OF_SAMPLING: dict[str, Callable[[str], Any]] = {"steps": int, "guidance": float, "sampler": str}
READERS: dict[type, Callable[[str], Any]] = {bool: parse_switch, int: int, float: float, str: str}
OF_SAMPLER = {name: READERS[option.kind] for sampler in SAMPLERS.values() for name, option in sampler.options.items()}
# what has no flag of its own
SETTINGS: dict[str, Callable[[str], Any]] = {"spacing": str, "offset": int, "reuse": int, **OF_SAMPLER, **OF_GUIDANCE}
AXES = {**OF_SAMPLING, **OF_REQUEST, **SETTINGS}
NOUNS: dict[Callable[[str], Any], str] = {int: "a whole number", float: "a number", parse_switch: "true or false",
                                          parse_span: "LOW:HIGH or off"}


@dataclass(frozen=True)
class Axis:
    """One parameter and the values that it takes along a side of the grid."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        texts = [value_text(value) for value in self.values]
        return texts if self.name == "prompt" else [f"{self.name} {text}" for text in texts]


def value_text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "off"
    if isinstance(value, (bool, str)):
        return str(value).lower() if isinstance(value, bool) else value
    return ":".join(f"{part:g}" for part in value) if isinstance(value, tuple) else f"{value:g}"


def parse_axis(text: str) -> Axis:
    """``steps=5,10,20``; texts with commas in them are separated by |: ``prompt=a red star|a moon, at night``. In
    square brackets, and after a backslash, | does not separate.

    Raises ValueError for another parameter and for values that are none of it.
    """
    name, equals, values = text.partition("=")
    if not equals or name not in AXES:
        raise ValueError(f"--xy {text}; valid: PARAMETER=VALUE,VALUE with one of {', '.join(AXES)}")
    options = (split_options(values) if name in ("prompt", "negative") else
               values.split("|" if "|" in values else ","))
    words = [word.strip() for word in options]
    try:
        return Axis(name, tuple(AXES[name](word) for word in words))
    except ValueError:
        raise ValueError(f"--xy {text}; valid: {NOUNS[AXES[name]]} between the commas") from None


def with_settings(config: SamplingConfig, texts: Sequence[str]) -> SamplingConfig:
    """``config`` with ``NAME=VALUE`` for settings that have no flag of their own; raises ValueError for others."""
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in SETTINGS:
            raise ValueError(f"--set {text}; valid: NAME=VALUE with one of {', '.join(SETTINGS)}")
        try:
            parsed = SETTINGS[name](value.strip())
        except ValueError:
            raise ValueError(f"--set {text}; valid: {NOUNS[SETTINGS[name]]}") from None
        config = with_setting(config, name, parsed)
    return config


def with_setting(config: SamplingConfig, name: str, value: Any) -> SamplingConfig:
    """``config`` with one parameter of OF_SAMPLING or SETTINGS set; raises ValueError for a value out of range and for
    an option that the sampler does not have."""
    if name == "guidance":
        return with_options(config, scale=value)
    if name in OF_GUIDANCE:
        return replace(config, guidance=replace(config.guidance, **{name: value}))
    if name in OF_SAMPLER:
        return replace(config, options={**config.options, name: value})
    if name == "sampler":
        return with_sampler(config, value)
    if name == "spacing" and value not in get_args(Spacing):
        raise ValueError(f"spacing: value {value!r}; valid: {', '.join(get_args(Spacing))}")
    return replace(config, **{name: value})


def with_value(request: Request, name: str, value: Any) -> Request:
    """``request`` with one parameter of AXES set; raises ValueError for a value out of range."""
    if name in OF_REQUEST:
        return replace(request, **{name: value})
    return replace(request, config=with_setting(request.config, name, value))


def cross(request: Request, axes: Sequence[Axis], settings: Sequence[str] = ()) -> list[Request]:
    """Every combination, the first axis (columns) changing fastest, with ``settings`` as ``with_settings`` reads them.

    The sampler is set before its options. Raises ValueError for a cell whose sampler lacks an option.
    """
    requests = []
    for values in itertools.product(*(axis.values for axis in reversed(axes))):
        cell = dict(zip([axis.name for axis in reversed(axes)], values))
        made = with_value(request, "sampler", cell.pop("sampler", request.config.sampler))
        made = replace(made, config=with_settings(made.config, settings))
        for name, value in cell.items():
            made = with_value(made, name, value)
        requests.append(made)
    return requests


def interpolate(first: Request, prompt: str, seed: int, count: int) -> list[Request]:
    """``count`` requests on the way from one to another prompt and seed, both ends included."""
    return [replace(first, toward=Toward(prompt, seed, k / (count - 1))) for k in range(count)]


def describe(config: SamplingConfig) -> dict[str, str]:
    """Sampler, steps and guidance in words, and every other setting that is not at its default, by name."""
    words = {"sampler": config.sampler, "steps": f"{config.steps} steps",
             "guidance": f"guidance {config.guidance.scale:g}"}
    for name in SETTINGS:
        if name in OF_SAMPLER:
            if name in config.options:
                words[name] = f"{name} {value_text(config.options[name])}"
            continue
        settings: Any = config.guidance if name in OF_GUIDANCE else config
        if (value := getattr(settings, name)) != getattr(type(settings)(), name):
            words[name] = f"{name} {value_text(value)}"
    return words
