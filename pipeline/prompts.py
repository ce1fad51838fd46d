"""The prompt notation: weights, alternatives, and prompts that are longer than one context.

    (red star)  [red star]  (red star:1.3)     weight 1.1, 1 / 1.1, 1.3; nested weights multiply
    {red|blue} star                            every alternative: "red star" and "blue star"
    a red star BREAK a moon                    a new chunk
    \\( \\) \\[ \\] \\{ \\} \\| \\: \\\\           the character itself

The notation is that of AUTOMATIC1111's web interface; what changes from step to step is in prompt_schedule.py. These
are pure functions. Of a tokenizer they use `length`, the special ids and `tokens`, so they work with every tokenizer in
`data/`. Axis letters: B prompts, K chunks, L tokens, D context width.
"""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

SIGNS = re.compile(r"\\.|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[\\:]|[^\\:()\[\]]+", re.DOTALL)
BRACES = re.compile(r"\\.|[{}|\[\]]|\\|[^\\{}|\[\]]+", re.DOTALL)
BREAK = re.compile(r"\s*\bBREAK\b\s*")
ESCAPED = "()[]{}|:\\"
STEP, HEAVIEST = 1.1, 10.0


@dataclass(frozen=True)
class Prompt:
    """A text without notation, one weight for each character, the largest number of chunks that it may fill before it
    is cut, and the characters before which a new chunk begins in any case."""

    text: str
    weights: tuple[float, ...]
    chunks: int = 1
    breaks: tuple[int, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return any(weight != 1.0 for weight in self.weights)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(start, end) of the parts of the text between breaks; an empty one at the end is no part."""
        starts = [0, *self.breaks]
        ends = [start - 1 for start in self.breaks] + [len(self.text)]  # a break left one space
        found = list(zip(starts, ends))
        while len(found) > 1 and not self.text[slice(*found[-1])].strip():
            found.pop()
        return found


def parse_prompt(text: str, chunks: int = 1, literal: bool = False, breaks: bool = True) -> Prompt:
    """The text of a prompt, its weights and its breaks; with ``literal`` every character stands for itself, and without
    ``breaks`` BREAK is a word.

    Raises ValueError for an unmatched bracket and for a weight out of range.
    """
    if literal:
        return Prompt(text, (1.0,) * len(text), chunks)
    letters, weights, starts = "", list[float](), list[int]()
    opened: list[tuple[str, int]] = []  # the bracket, and the character that it stands before
    for match in SIGNS.finditer(text):
        piece = match[0]
        if piece in ("(", "["):
            opened.append((piece, len(letters)))
        elif piece in (")", "]") or match["weight"] is not None:
            partner = "[" if piece == "]" else "("
            if not opened or opened[-1][0] != partner:
                raise ValueError(f"prompt {text!r}: '{piece[-1]}' at letter {match.end()} closes nothing; valid: "
                                 f"\\{piece[-1]} for the sign itself")
            start = opened.pop()[1]
            factor = float(match["weight"]) if match["weight"] else STEP if partner == "(" else 1 / STEP
            weights[start:] = [weight * factor for weight in weights[start:]]
        else:
            piece = piece[1] if len(piece) == 2 and piece[0] == "\\" and piece[1] in ESCAPED else piece
            for number, part in enumerate(BREAK.split(piece) if breaks else [piece]):
                part = " " + part if number else part
                starts += [len(letters) + 1] * bool(number)
                letters, weights = letters + part, weights + [1.0] * len(part)
    if opened:
        raise ValueError(f"prompt {text!r}: '{opened[-1][0]}' is not closed; valid: (word), (word:1.3), [word], or "
                         f"\\{opened[-1][0]} for the sign itself")
    if wrong := [weight for weight in weights if not 0.0 <= weight <= HEAVIEST]:
        raise ValueError(f"prompt {text!r}: weight {wrong[0]:g}; valid: 0 to {HEAVIEST:g}, or \\: for the sign itself")
    return Prompt(letters, tuple(weights), chunks, tuple(starts))


def alternatives(text: str, most: int = 100_000) -> list[str]:
    """All prompts that ``{a|b}`` stands for; the first brace varies slowest. Other notation is left unchanged, also the
    | of square brackets.

    Raises ValueError for an unmatched brace and for more than ``most`` prompts.
    """
    found: list[str] = [""]  # all readings of the text so far
    opened: list[tuple[list[str], list[str]]] = []  # what was found before the brace, the alternatives so far
    square = [0]  # square brackets that are open outside of braces, and in each open brace
    for match in BRACES.finditer(text):
        piece = match[0]
        if piece == "{":
            opened.append((found, []))
            square.append(0)
            found = [""]
        elif piece == "|" and opened and not square[-1]:
            opened[-1][1].extend(found)
            found = [""]
        elif piece == "}":
            if not opened:
                raise ValueError(f"prompt {text!r}: '}}' at letter {match.end()} closes nothing; valid: \\}} for the "
                                 "sign itself")
            before, options = opened.pop()
            square.pop()
            options.extend(found)
            if len(before) * len(options) > most:
                raise ValueError(f"prompt {text!r} stands for more than {most} prompts; valid: up to {most}")
            found = [start + option for start in before for option in options]
        else:
            square[-1] = max(0, square[-1] + (piece == "[") - (piece == "]"))
            found = [start + piece for start in found]
    if opened:
        raise ValueError(f"prompt {text!r}: '{{' is not closed; valid: {{a|b}}, or \\{{ for the sign itself")
    return found


def split_options(text: str) -> list[str]:
    """The parts of a text between | outside of square brackets."""
    found, depth = [""], 0
    for match in BRACES.finditer(text):
        depth = max(0, depth + (match[0] == "[") - (match[0] == "]"))
        if match[0] == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += match[0]
    return found


@dataclass(frozen=True)
class Chunks:
    """A prompt as rows of token ids, each with start and end token and as long as one context.

    ids (K, L) int64; mask (K, L) bool, True at start, tokens and end; weights (K, L), 1 at special tokens.
    ``overflow`` is the end of the text that did not fit. ``texts`` holds the part of the text in each row. ``words``
    maps the position of a token among the K L to the characters that it stands for.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor
    overflow: str
    words: dict[int, str]
    texts: tuple[str, ...] = ()


def chunks_of(prompt: Prompt, tokenizer: Any) -> Chunks:
    """The chunks of a prompt; a prompt that fits into one context gives the ids of ``tokenizer.encode``.

    The text is tokenized as a whole, or from break to break, so weights do not change its ids; a token has the weight
    of its last character.
    """
    tokens, places, parts = list[int](), list[tuple[int, int]](), list[tuple[int, int]]()
    for start, end in prompt.segments:
        encoding = tokenizer.tokens(prompt.text[start:end])
        room = prompt.chunks - len(parts)
        if room > 0:
            parts += [(len(tokens) + first, len(tokens) + last)
                      for first, last in split_tokens(encoding.word_ids, tokenizer.length - 2, room)]
        tokens += encoding.ids
        places += [(start + first, start + last) for first, last in encoding.offsets]
    ids = torch.full((len(parts), tokenizer.length), tokenizer.pad_id, dtype=torch.int64)  # (K, L)
    mask = torch.zeros(ids.shape, dtype=torch.bool)  # (K, L)
    weights, words = torch.ones(ids.shape), {}
    for row, (start, end) in enumerate(parts):
        found = [tokenizer.start_id, *tokens[start:end], tokenizer.end_id]
        ids[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = True
        for place, (first, last) in enumerate(places[start:end], 1):
            weights[row, place] = prompt.weights[max(first, last - 1)]
            words[row * tokenizer.length + place] = prompt.text[first:last].strip()
    end = parts[-1][1]
    lost = prompt.text[places[end][0]:].strip() if end < len(tokens) else ""
    texts = tuple(prompt.text[places[start][0]:places[end - 1][1]] for start, end in parts if end > start)
    return Chunks(ids, mask, weights, lost, words, texts)


def split_tokens(words: Sequence[int | None], room: int, most: int) -> list[tuple[int, int]]:
    """(start, end) of up to ``most`` runs of up to ``room`` tokens, given the word that each token belongs to.

    A run ends between two words where possible. The last permitted run is filled to the end, like a prompt that is
    cut.
    """
    parts: list[tuple[int, int]] = []
    start = 0
    while start < len(words) and len(parts) < most:
        end = min(start + room, len(words))
        if end < len(words) and len(parts) + 1 < most:
            end = next((i for i in range(end, start, -1) if words[i] != words[i - 1]), end)
        parts.append((start, end))
        start = end
    return parts or [(0, 0)]


def weighted_context(context: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Context (B, L, D) with every vector multiplied by its weight (B, L), then scaled back to its former size.

    AUTOMATIC1111 restores the mean of the context. The states of a text encoder end in a LayerNorm, and if that
    leaves a mean near zero, the quotient of two means is arbitrary: with the encoder of an emoji model a weight of 1.3
    on one word multiplied the whole context by -0.8. Here the root mean square is restored instead, over the real
    tokens where ``mask`` (B, L) marks them. A row of weights 1 is returned bit for bit.
    """
    real = torch.ones_like(weights) if mask is None else mask.to(weights.dtype)  # (B, L)
    result = context * weights[..., None]  # (B, L, D)

    def size(x: Tensor) -> Tensor:
        return (x.square().sum(-1) * real).sum(-1).sqrt()  # (B,)

    return result * (size(context) / size(result))[:, None, None]


def join_chunks(context: Tensor, mask: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The contexts (sum of K, L, D) of all chunks, joined to one context for each prompt, (B, largest K times L, D),
    and its mask.

    ``counts`` holds K of each prompt. A prompt with fewer chunks than another is padded, and the mask hides the
    padding, so it reads the same whatever stands beside it. The mask stays None if nothing has to be hidden.
    """
    if max(counts) == 1:
        return context, mask
    if mask is None:
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)  # (sum of K, L)
        if min(counts) == max(counts):
            return rearrange(context, "(b k) l d -> b (k l) d", b=len(counts)), None
    length = max(counts) * context.shape[1]
    rows = context.new_zeros(len(counts), length, context.shape[2])  # (B, K L, D)
    seen = torch.zeros(len(counts), length, dtype=torch.bool, device=context.device)  # (B, K L)
    for row, (part, shown) in enumerate(zip(context.split(list(counts)), mask.split(list(counts)))):
        rows[row, : part.shape[0] * part.shape[1]] = part.flatten(0, 1)
        seen[row, : shown.numel()] = shown.flatten()
    return rows, seen


def mix_contexts(a: Tensor, b: Tensor, weight: float, longest: int = 1024) -> Tensor:
    """The linear interpolation (n, D) of two contexts (m, D) and (k, D) of real tokens.

    Contexts of different lengths are first repeated to their least common multiple. Attention to a context in which
    every state occurs twice equals attention to the context itself, so both ends of the interpolation are the prompts
    themselves, and words at the same relative position of their prompts are mixed. Above ``longest`` the repeats are as
    even as they can be.
    """
    length = min(math.lcm(len(a), len(b)), max(longest, len(a), len(b)))
    places = torch.arange(length, device=a.device)
    a, b = (context[places * len(context) // length] for context in (a, b))  # (n, D) each
    return torch.lerp(a, b, weight)


def pad_contexts(contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Contexts (n, D) of any lengths as one batch (B, L, D), and the mask (B, L) that hides the padding, or None."""
    lengths = [len(context) for context in contexts]
    batch = torch.nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)  # (B, L, D)
    if min(lengths) == max(lengths):
        return batch, None
    places = torch.arange(batch.shape[1], device=batch.device)
    return batch, places < torch.tensor(lengths, device=batch.device)[:, None]
