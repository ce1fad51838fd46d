"""One picture that is asked for: everything that decides its pixels beside the weights, and back from metadata."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from diffusion.sampling import SamplingConfig
from diffusion.spacing import Spacing
from files.config import ConfigError, from_dict, to_dict
from pipeline.prompts import Prompt, parse_prompt
from pipeline.system import with_options

CHUNKS, MOST_CHUNKS = 4, 64  # contexts that a prompt may fill when nothing is said, and at most
LAST_SEED = 2**62 - 1


def check_seed(seed: int) -> None:
    """Raises ValueError unless a generator takes this seed."""
    if not 0 <= seed <= LAST_SEED:
        raise ValueError(f"seed: value {seed}; valid: 0 to 2^62 - 1")


@dataclass(frozen=True)
class Toward:
    """The other end of an interpolation, and how far on the way there the picture stands: 0 to 1."""

    prompt: str
    seed: int
    weight: float

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight: value {self.weight}; valid: 0 to 1")


@dataclass(frozen=True)
class Request:
    """One picture. ``strength`` is None for one that starts from noise; prompts are as they were written."""

    prompt: str
    seed: int
    config: SamplingConfig
    negative: str = ""
    strength: float | None = None
    toward: Toward | None = None
    literal: bool = False
    chunks: int = CHUNKS

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 1 <= self.chunks <= MOST_CHUNKS:
            raise ValueError(f"chunks: value {self.chunks}; valid: 1 to {MOST_CHUNKS}")

    @property
    def kind(self) -> tuple:
        """What pictures must share to be drawn in one batch."""
        return self.config, self.negative, self.strength, self.toward is None

    def read(self, text: str) -> Prompt:
        """A prompt of this request with its signs understood; raises ValueError for signs that do not fit."""
        return parse_prompt(text, self.chunks, self.literal)


SAMPLING = tuple(field.name for field in fields(SamplingConfig))
OWN = tuple(field.name for field in fields(Request) if field.name != "config")


def settings_of(request: Request) -> dict[str, Any]:
    """The metadata of a request; what is as it is when nothing is said is left out."""
    settings: dict[str, Any] = {"prompt": request.prompt, "seed": request.seed, "negative": request.negative,
                                **to_dict(request.config)}
    if request.strength is not None:
        settings["strength"] = request.strength
    if request.toward is not None:
        settings["toward"] = to_dict(request.toward)
    if request.literal:
        settings["literal"] = True
    if request.chunks != CHUNKS:
        settings["chunks"] = request.chunks
    return settings


def request_of(settings: dict[str, Any]) -> Request:
    """The request whose metadata this is; raises ConfigError for what is missing or cannot be."""
    if missing := [key for key in SAMPLING if key not in settings]:
        raise ConfigError(f"missing key '{missing[0]}'")
    return from_dict(Request, {"config": {key: settings[key] for key in SAMPLING},
                               **{key: settings[key] for key in OWN if key in settings}})


# ---- parameters by name: axes of X/Y grids, and --set

def switch(text: str) -> bool:
    """true or false."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def span(text: str) -> tuple[float, float] | None:
    """low:high, or off for None."""
    if text == "off":
        return None
    low, high = text.split(":")
    return float(low), float(high)


OF_REQUEST: dict[str, Callable[[str], Any]] = {"seed": int, "strength": float, "prompt": str, "negative": str,
                                               "chunks": int}
OF_GUIDANCE: dict[str, Callable[[str], Any]] = {
    "method": str, "interval": span, "rescale": float, "apg_parallel": float, "apg_norm": float, "apg_momentum": float,
    "zero_init": float, "threshold": float, "threshold_limit": float}
OF_SAMPLING: dict[str, Callable[[str], Any]] = {"steps": int, "guidance": float, "sampler": str}
SETTINGS: dict[str, Callable[[str], Any]] = {
    "spacing": str, "eta": float, "order": int, "offset": int, "clean_end": switch, **OF_GUIDANCE}  # without a flag
AXES = {**OF_SAMPLING, **OF_REQUEST, **SETTINGS}
NOUNS: dict[Callable[[str], Any], str] = {int: "a whole number", float: "a number", switch: "true or false",
                                          span: "LOW:HIGH or off"}


@dataclass(frozen=True)
class Axis:
    """One parameter and the values that it takes along a side of the grid."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        texts = [written(value) for value in self.values]
        return texts if self.name == "prompt" else [f"{self.name} {text}" for text in texts]


def written(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "off"
    if isinstance(value, (bool, str)):
        return str(value).lower() if isinstance(value, bool) else value
    return ":".join(f"{part:g}" for part in value) if isinstance(value, tuple) else f"{value:g}"


def parse_axis(text: str) -> Axis:
    """``steps=5,10,20``; texts with commas in them are separated by |: ``prompt=a red star|a moon, at night``.

    Raises ValueError for another parameter and for values that are none of it.
    """
    name, equals, values = text.partition("=")
    if not equals or name not in AXES:
        raise ValueError(f"--xy {text}; valid: PARAMETER=VALUE,VALUE with one of {', '.join(AXES)}")
    words = [word.strip() for word in values.split("|" if "|" in values or name in ("prompt", "negative") else ",")]
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
        config = configured(config, name, parsed)
    return config


def configured(config: SamplingConfig, name: str, value: Any) -> SamplingConfig:
    """``config`` with one parameter of OF_SAMPLING or SETTINGS set; raises ValueError for a value out of range."""
    if name == "guidance":
        return with_options(config, scale=value)
    if name in OF_GUIDANCE:
        return replace(config, guidance=replace(config.guidance, **{name: value}))
    if name == "spacing" and value not in get_args(Spacing):
        raise ValueError(f"spacing: value {value!r}; valid: {', '.join(get_args(Spacing))}")
    return replace(config, **{name: value})


def with_value(request: Request, name: str, value: Any) -> Request:
    """``request`` with one parameter of AXES set; raises ValueError for a value out of range."""
    if name in OF_REQUEST:
        return replace(request, **{name: value})
    return replace(request, config=configured(request.config, name, value))


def crossed(request: Request, axes: Sequence[Axis]) -> list[Request]:
    """Every combination, the first axis (columns) changing fastest."""
    rows = [request] if len(axes) == 1 else [with_value(request, axes[1].name, value) for value in axes[1].values]
    return [with_value(row, axes[0].name, value) for row in rows for value in axes[0].values]


def interpolated(first: Request, prompt: str, seed: int, count: int) -> list[Request]:
    """``count`` requests on the way from one to another prompt and seed, both ends included."""
    return [replace(first, toward=Toward(prompt, seed, k / (count - 1))) for k in range(count)]


def described(config: SamplingConfig) -> dict[str, str]:
    """Sampler, steps and guidance in words, and every other setting that is not as it is when nothing is said."""
    words = {"sampler": config.sampler, "steps": f"{config.steps} steps",
             "guidance": f"guidance {config.guidance.scale:g}"}
    for name in SETTINGS:
        settings: Any = config.guidance if name in OF_GUIDANCE else config
        if (value := getattr(settings, name)) != getattr(type(settings)(), name):
            words[name] = f"{name} {written(value)}"
    return words
