"""The options of a sampler, declared in one place: the signature of its function.

    def ddim(denoise, x_T, ..., *, trace=None,
             eta: Annotated[float, Option("the share of fresh noise", 0.0, 1.0)] = 0.0) -> Tensor

Name, type and default are those of the parameter; `Option` adds the range and one sentence. Configurations, the command
line, the metadata of images and the table in docs/samplers.md are all made from this, so a new option touches the file
of its sampler, and two lists that tests hold to it: sampling/flags.py and docs/samplers.md.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

Value = bool | int | float | str


@dataclass(frozen=True)
class Option:
    """One option of a sampler.

    sentence: what it does. low, high: the ends of the range of a number, both included.
    The rest is read from the signature by `declared_options`. kind: bool, int, float or str. choices: of a str.
    """

    sentence: str
    low: float = -math.inf
    high: float = math.inf
    name: str = ""
    kind: type = float
    default: Value = 0.0
    choices: tuple[str, ...] = ()

    @property
    def valid(self) -> str:
        """The values that are valid, in words."""
        if self.kind is bool:
            return "true, false"
        if self.choices:
            return ", ".join(self.choices)
        return f"{'a whole number, ' if self.kind is int else ''}{self.low:g} .. {self.high:g}"

    def checked(self, value: Any) -> Value:
        """`value` in the type of this option. Raises ValueError for another type and outside the range."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = number and math.isfinite(value) and self.low <= value <= self.high
        if self.kind is float and inside:
            return float(value)
        if self.kind is int and inside and isinstance(value, int):
            return value
        if self.kind is bool and isinstance(value, bool) or self.kind is str and value in self.choices:
            return value
        raise ValueError(f"{self.name}: value {value!r}; valid: {self.valid}")


def declared_options(function: Callable) -> dict[str, Option]:
    """The options that the signature of a sampler function declares, by name, in its order."""
    found = {}
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        for option in getattr(hints[name], "__metadata__", ()):
            kind = get_args(hints[name])[0]
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            found[name] = replace(option, name=name, kind=str if choices else kind, default=parameter.default,
                                  choices=choices)
    return found
