"""Prompts that change from step to step.

    [cow|horse]                  step 1 reads "cow", step 2 "horse", step 3 "cow" ...
    [from:to:when]               "to" in place of "from" after `when` steps
    [to:when]  [from::when]      the same with nothing in place of one of them

`when` with a point in it is a share of the steps, otherwise their number. The notation is that of AUTOMATIC1111's web
interface (prompt_parser.py). Brackets may stand inside each other. Axis letters: B prompts, L tokens, D context width.
"""
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from pipeline.prompts import Prompt, parse_prompt

PIECES = re.compile(r"\\.|[()\[\]:|]|\\|[^\\()\[\]:|]+", re.DOTALL)
NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*", re.ASCII)
OTHERS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>|\bAND\b")  # signs of the web interface that are not read here
DEEPEST = 50  # changing parts inside each other
WEIGHTS_ONLY, NOTATION = 1, 2  # versions of the notation: without and with what changes, and BREAK
Context: TypeAlias = tuple[Tensor, Tensor | None]  # (B, L, D) and the mask (B, L)


# ---- the notation

@dataclass(frozen=True)
class Changing:
    """A part of a prompt that changes: its options, each a sequence of parts. Without ``when`` they take turns, with it
    the second option follows the first. ``source`` is the part as it was written, ``depth`` counts the parts inside."""

    options: tuple[tuple["Part", ...], ...]
    when: str | None
    source: str
    depth: int = 1

    def option(self, step: int, steps: int) -> tuple["Part", ...]:
        """What step ``step`` of ``steps`` reads; they are counted from 1."""
        if self.when is None:
            return self.options[(step - 1) % len(self.options)]
        return self.options[0] if step <= self.last_step(steps) else self.options[1]

    def last_step(self, steps: int) -> int:
        """The last of ``steps`` that reads the first of two options; 0 if none does."""
        value = float(self.when or 0) * (steps if "." in (self.when or "") else 1)
        return int(max(0.0, min(value, steps)))


Part: TypeAlias = str | Changing


def parse_parts(text: str) -> tuple[tuple[Part, ...], list[str]]:
    """A prompt as parts, and the brackets with a colon in them that are text, because they end in no number.

    Raises ValueError for brackets without a partner, for | and : in one pair of brackets, and for changing parts that
    are too deep inside each other.
    """
    parse_prompt(text)  # from here on every bracket has its partner
    opened: list[tuple[str, list[list[Part]], list[str]]] = [("", [[]], [])]  # bracket, what it holds, its : and |
    unread: list[str] = []
    for match in PIECES.finditer(text):
        piece = match[0]
        bracket, segments, signs = opened[-1]
        if piece in ("(", "["):
            opened.append((piece, [[]], []))
        elif piece in (")", "]"):
            opened.pop()
            closed = bracket_parts(text, segments, signs, unread) if piece == "]" else ["(", *segments[0], ")"]
            opened[-1][1][-1].extend(closed)
        elif piece in (":", "|") and bracket == "[":
            segments.append([])
            signs.append(piece)
        else:
            segments[-1].append(piece)
    return tuple(opened[0][1][0]), unread


def bracket_parts(text: str, segments: list[list[Part]], signs: list[str], unread: list[str]) -> list[Part]:
    """The parts that square brackets stand for, given their content and the ``signs`` between its segments: one that
    changes, or the brackets themselves, which are weights then. Adds to ``unread`` as ``parse_parts`` says."""
    written: list[Part] = ["[", *segments[0]]
    for sign, segment in zip(signs, segments[1:]):
        written += [sign, *segment]
    written.append("]")
    if not signs:
        return written
    source = "".join(part if isinstance(part, str) else part.source for part in written)
    if len({*signs}) == 2:
        raise ValueError(f"prompt {text!r}: '{source}' has both | and :; valid: [a|b], [a:b:0.5], or \\| and \\: for "
                         "the signs themselves")
    number = NUMBER.fullmatch("".join(part if isinstance(part, str) else "[" for part in segments[-1]))
    if signs[0] == ":" and (number is None or len(segments) > 3):
        unread.append(source)
        return written
    depth = 1 + max([0, *(part.depth for segment in segments for part in segment if isinstance(part, Changing))])
    if depth > DEEPEST:
        raise ValueError(f"prompt {text[:40]!r} ...: more than {DEEPEST} changing parts inside each other; valid: up "
                         f"to {DEEPEST}")
    if signs[0] == "|":
        return [Changing(tuple(map(tuple, segments)), None, source, depth)]
    assert number is not None
    before, after = ([], segments[0]) if len(segments) == 2 else segments[:2]
    return [Changing((tuple(before), tuple(after)), number[1], source, depth)]


def text_at_step(parts: Sequence[Part], step: int, steps: int) -> str:
    """What is written at a step, counted from 1."""
    return "".join(part if isinstance(part, str) else text_at_step(part.option(step, steps), step, steps)
                   for part in parts)


def all_options(parts: Sequence[Part]) -> str:
    """What is written at any step, one option after the other: no text of a step has words that are not in it."""
    return "".join(part if isinstance(part, str) else " ".join(all_options(option) for option in part.options)
                   for part in parts)


def changing_parts(parts: Sequence[Part]) -> Iterator[Changing]:
    """Every part that changes, with those inside of it."""
    for part in parts:
        if isinstance(part, Changing):
            yield part
            for option in part.options:
                yield from changing_parts(option)


def signs_of_others(text: str) -> list[str]:
    """What the web interface would read as signs and this project reads as text: networks to load, compositions, and
    brackets that look like a change without the number of a step."""
    return [*dict.fromkeys([*OTHERS.findall(text), *parse_parts(text)[1]])]


def unread_options(text: str, steps: int, taken: int) -> list[str]:
    """The changes of a prompt that do not happen in the first ``taken`` of ``steps``, as they are written."""
    found = []
    for part in changing_parts(parse_parts(text)[0]):
        first = part.last_step(steps)
        if part.when is not None and (first >= taken or first == 0 and part.options[0]):
            found.append(part.source)
        elif part.when is None and len(part.options) > taken:
            found.append(part.source)
    return found


# ---- the prompts and contexts of steps

@dataclass(frozen=True)
class PromptSchedule:
    """A prompt that changes: the prompts that it goes through, each once, the place among them of the prompt of each
    step, and all of its options as one prompt, which is there to be checked."""

    prompts: tuple[Prompt, ...]
    of_step: tuple[int, ...]
    whole: Prompt


AnyPrompt: TypeAlias = str | Prompt | PromptSchedule


def read_prompt(text: str, steps: int, chunks: int = 1, literal: bool = False,
                notation: int = NOTATION) -> Prompt | PromptSchedule:
    """A prompt with all its signs understood, for a run of ``steps``. Raises ValueError for signs that do not fit."""
    if literal or notation == WEIGHTS_ONLY:
        return parse_prompt(text, chunks, literal, breaks=False)
    parts, _ = parse_parts(text)
    if all(isinstance(part, str) for part in parts):
        return parse_prompt(text, chunks)
    texts = [text_at_step(parts, step, steps) for step in range(1, steps + 1)]
    places = {written: place for place, written in enumerate(dict.fromkeys(texts))}
    return PromptSchedule(tuple(parse_prompt(written, chunks) for written in places),
                          tuple(places[written] for written in texts), parse_prompt(all_options(parts), chunks))


def has_later_signs(text: str) -> bool:
    """Whether a prompt is read otherwise than by the first version of the notation."""
    try:
        prompt = read_prompt(text, 1)
    except ValueError:
        return True
    return isinstance(prompt, PromptSchedule) or bool(prompt.breaks)


def as_prompt(prompt: AnyPrompt) -> Prompt | PromptSchedule:
    """A prompt as it is, and a string read literally."""
    return parse_prompt(prompt, literal=True) if isinstance(prompt, str) else prompt


def text_of(prompt: AnyPrompt) -> str:
    """All words of a prompt."""
    return prompt if isinstance(prompt, str) else (prompt.whole if isinstance(prompt, PromptSchedule) else prompt).text


def prompts_of(prompt: Prompt | PromptSchedule) -> tuple[Prompt, ...]:
    """The prompts that the network reads in turn: one, unless it changes."""
    return prompt.prompts if isinstance(prompt, PromptSchedule) else (prompt,)


def prompt_at_step(prompt: AnyPrompt, step: int) -> str | Prompt:
    """The prompt of a step, counted from 0; the last one lasts."""
    if not isinstance(prompt, PromptSchedule):
        return prompt
    return prompt.prompts[prompt.of_step[min(step, len(prompt.of_step) - 1)]]


@dataclass(frozen=True)
class StepContexts:
    """What the network reads on the way: its contexts, each once, and the place among them of that of each step."""

    contexts: tuple[Context, ...]
    of_step: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[AnyPrompt], encode: Callable[[list[str | Prompt]], Context]) -> "StepContexts":
        """Those of B prompts that are read together; ``encode`` gives the context of B prompts that do not change."""
        steps = max([1, *(len(prompt.of_step) for prompt in prompts if isinstance(prompt, PromptSchedule))])
        places: dict[tuple, int] = {}
        of_step = [places.setdefault(tuple(prompt_at_step(prompt, step) for prompt in prompts), len(places))
                   for step in range(steps)]
        return cls(tuple(encode(list(rows)) for rows in places), tuple(of_step))

    def place(self, times: Sequence[float], t: float) -> int:
        """The place of the context at time t of a run along falling ``times``: that of the last step that begins at t
        or before. A solver that looks between or ahead of its steps thus reads the prompt of the time it looks at."""
        step = max(0, bisect_right(times, -t, key=lambda time: -time) - 1)
        return self.of_step[min(step, len(self.of_step) - 1)]
