"""One picture that is asked for: everything that decides its pixels beside the weights, and back from metadata."""
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from diffusion.sampling import SamplingConfig
from pipeline import with_options
from prompts import Prompt, parse_prompt
from training.config import ConfigError, from_dict, to_dict

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


# ---- axes of X/Y grids

@dataclass(frozen=True)
class Axis:
    """One parameter and the values that it takes along a side of the grid."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in self.values]
        return texts if self.name == "prompt" else [f"{self.name} {text}" for text in texts]


AXES: dict[str, type] = {"steps": int, "guidance": float, "sampler": str, "seed": int, "strength": float, "prompt": str,
                         "negative": str, "spacing": str, "eta": float, "order": int}


def parse_axis(text: str) -> Axis:
    """``steps=5,10,20``; texts with commas in them are separated by |: ``prompt=a red star|a moon, at night``.

    Raises ValueError for another parameter and for values that are none of it.
    """
    name, equals, values = text.partition("=")
    if not equals or name not in AXES:
        raise ValueError(f"--xy {text}; valid: PARAMETER=VALUE,VALUE with one of {', '.join(AXES)}")
    words = [word.strip() for word in values.split("|" if "|" in values or name in ("prompt", "negative") else ",")]
    kind = AXES[name]
    try:
        return Axis(name, tuple(kind(word) for word in words))
    except ValueError:
        noun = "a whole number" if kind is int else "a number"
        raise ValueError(f"--xy {text}; valid: {noun} between the commas") from None


def with_value(request: Request, name: str, value: Any) -> Request:
    """``request`` with one parameter of AXES set; raises ValueError for a value out of range."""
    if name in ("seed", "strength", "prompt", "negative"):
        return replace(request, **{name: value})
    if name == "guidance":
        return replace(request, config=with_options(request.config, scale=value))
    return replace(request, config=replace(request.config, **{name: value}))


def crossed(request: Request, axes: Sequence[Axis]) -> list[Request]:
    """Every combination, the first axis (columns) changing fastest."""
    rows = [request] if len(axes) == 1 else [with_value(request, axes[1].name, value) for value in axes[1].values]
    return [with_value(row, axes[0].name, value) for row in rows for value in axes[0].values]


def interpolated(first: Request, prompt: str, seed: int, count: int) -> list[Request]:
    """``count`` requests on the way from one to another prompt and seed, both ends included."""
    return [replace(first, toward=Toward(prompt, seed, k / (count - 1))) for k in range(count)]
