"""The styles of a call: prompts in them, and what they set that the call leaves open."""
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.styles import DEFAULT, Style, Styled, apply_styles, only_one, parse_style, read_styles
from sampling.plan import Plan
from sampling.request import Mixed, Request


@dataclass(frozen=True)
class ChosenStyles:
    """The styles of a call with their strengths, in order."""

    chosen: tuple[tuple[Style, float], ...] = ()

    @property
    def partial(self) -> bool:
        """Whether one of them has a strength that takes a further prompt: neither 0 nor 1."""
        return any(strength not in (0, 1) for _, strength in self.chosen)

    def of(self, prompt: str, negative: str) -> Styled:
        """A prompt and a negative prompt in these styles."""
        return apply_styles(prompt, negative, self.chosen)


def choose_styles(names: Sequence[str], file: str | None) -> ChosenStyles:
    """The styles that are named, from a file or from those of the repository. Raises ValueError or OSError."""
    if not names:
        return ChosenStyles()
    styles = read_styles(file or DEFAULT)
    return ChosenStyles(tuple(parse_style(name, styles) for name in names))


def styled_plan(plan: Plan, styles: ChosenStyles) -> Plan:
    """The plan with the guidance and the palette of its styles where it names none. Raises ValueError for styles of
    different ones, and for a strength that takes a further prompt with what has a use of its own for two of them."""
    if not styles.chosen:
        return plan
    if styles.partial:
        for name, flag in (("inverted", "--invert"), ("interpolate", "--interpolate")):
            if getattr(plan, name):
                raise ValueError(f"--style with a strength that is not 1 and {flag}; valid: strength 1")
    if any(axis.startswith(("prompt=", "negative=")) for axis in plan.axes):
        raise ValueError("--style with --xy prompt or negative; valid: one of them")
    full = [style for style, strength in styles.chosen if strength == 1]
    guidance = plan.guidance if plan.guidance is not None else only_one([style.guidance for style in full], "guidance")
    palette = plan.palette or only_one([style.palette for style in full], "palette") or ""
    return replace(plan, guidance=guidance, palette=palette)


def style_request(request: Request, styles: ChosenStyles) -> Request:
    """The request in these styles."""
    if not styles.chosen:
        return request
    styled = styles.of(request.prompt, request.negative)
    toward = request.toward
    if toward is not None:
        toward = replace(toward, prompt=styles.of(toward.prompt, "").prompt)
    mixed = tuple(Mixed(prompt, strength) for prompt, strength in styled.further)
    return replace(request, prompt=styled.prompt, negative=styled.negative, toward=toward, mixed=mixed)


def every_style(file: str | None) -> dict[str, ChosenStyles]:
    """By name no style, and each style of a file, or of the repository, at its full strength."""
    return {"no style": ChosenStyles(),
            **{name: ChosenStyles(((style, 1.0),)) for name, style in read_styles(file or DEFAULT).items()}}


def list_of_styles(file: str | None) -> str:
    """The styles of a file, or those of the repository, one a line."""
    styles = read_styles(file or DEFAULT)
    width = max(map(len, styles), default=0)
    return "\n".join("  ".join([f"{style.name:<{width}}", style.prompt or "{prompt}",
                                *([f"[not: {style.negative}]"] if style.negative else []),
                                *([f"[palette: {style.palette}]"] if style.palette else [])])
                     for style in styles.values())
