"""How far apart a text encoder keeps words, and how far it moves them while the denoiser learns what they look like.

A denoiser can learn what "square" looks like only if the context of "square" differs from that of "circle" and stays
where it is. Both are measured on pairs of captions that differ in one word. Axis letters: L tokens, D width.
"""
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data.source import Source
from data.tokenizer import Tokenizer
from model.text_encoder import TextEncoder, trim_padding

Pairs = Mapping[str, Sequence[tuple[str, str]]]  # kind of word -> pairs of captions that differ in one word
Contexts = dict[str, torch.Tensor]  # caption -> (L, D), without padding


@torch.no_grad()
def contexts_of(text_encoder: TextEncoder, tokenizer: Tokenizer, captions: Sequence[str]) -> Contexts:
    """The context of each caption, on the CPU in fp32."""
    device = text_encoder.token_embedding.weight.device
    ids, mask = (tensor.to(device) for tensor in trim_padding(*tokenizer.encode(list(captions))))
    with torch.autocast(device.type, enabled=False):  # rounding to bf16 would be larger than a small drift
        context = text_encoder(ids, mask)
    return {caption: row[real].float().cpu() for caption, row, real in zip(captions, context, mask)}


def context_distances(text_encoder: TextEncoder, tokenizer: Tokenizer, pairs: Pairs) -> dict[str, float]:
    """By kind of word, the mean of ``distance_at_word`` over its pairs."""
    return distances_of(contexts_of(text_encoder, tokenizer, captions_of(pairs)), tokenizer, pairs)


def distances_of(contexts: Contexts, tokenizer: Tokenizer, pairs: Pairs) -> dict[str, float]:
    """As ``context_distances``, from the contexts of all captions. A pair whose word is cut off by the length of the
    tokenizer is left out, and so is a kind that has no other pairs."""
    found = {}
    for kind, members in pairs.items():
        known = [distance for one, other in members
                 if (distance := distance_at_word(contexts, tokenizer, one, other)) is not None]
        if known:
            found[kind] = sum(known) / len(known)
    return found


def distance_at_word(contexts: Contexts, tokenizer: Tokenizer, one: str, other: str) -> float | None:
    """|a - b| over the mean of |a| and |b|, where a and b are the contexts of two captions at the word in which they
    differ: 0 for equal words, about 1.41 for directions at random. None if the word is cut off."""
    a, b = (contexts[caption][tokens_of(tokenizer, caption, span)].mean(dim=0)
            for caption, span in zip((one, other), differing_word(one, other)))  # (D,)
    return None if a.isnan().any() or b.isnan().any() else float((a - b).norm() / (a.norm() + b.norm()) * 2)


def differing_word(one: str, other: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The characters (from, to) of the word in which two captions differ, in each of them. Raises ValueError unless
    they differ in exactly one."""
    words = list(zip(*(list(re.finditer(r"\S+", caption)) for caption in (one, other))))
    differing = [(a.span(), b.span()) for a, b in words if a.group() != b.group()]
    if len(one.split()) != len(other.split()) or len(differing) != 1:
        raise ValueError(f"'{one}' and '{other}'; valid: captions that differ in one word")
    return differing[0]


def tokens_of(tokenizer: Tokenizer, caption: str, span: tuple[int, int]) -> list[int]:
    """The places of the tokens that share characters with a span of the caption."""
    return [place for place, (begin, end) in enumerate(tokenizer.offsets(caption))
            if begin < span[1] and end > span[0]]


def context_drift(before: Contexts, now: Contexts) -> float:
    """How far the contexts of the same captions have moved, over their size: the mean over all tokens."""
    moved = torch.cat([(now[caption] - before[caption]).norm(dim=-1) for caption in now])
    return float(moved.mean() / torch.cat([context.norm(dim=-1) for context in now.values()]).mean())


def captions_of(pairs: Pairs) -> list[str]:
    """Every caption of the pairs once."""
    return list(dict.fromkeys(caption for members in pairs.values() for pair in members for caption in pair))


class ContextWatch:
    """The distances and the drift that a stage logs. The contexts of the last measurement are a part of checkpoints, so
    that a run that was interrupted logs what an uninterrupted one does."""

    def __init__(self, tokenizer: Tokenizer, source: Source):
        """A source without ``word_pairs`` has nothing to be measured."""
        self.tokenizer = tokenizer
        self.pairs: Pairs = source.word_pairs() if hasattr(source, "word_pairs") else {}
        self.last: Contexts = {}

    def measure(self, text_encoder: TextEncoder) -> dict[str, float]:
        """The distances by kind of word, and the drift since the last call if there was one."""
        if not self.pairs:
            return {}
        now = contexts_of(text_encoder, self.tokenizer, captions_of(self.pairs))
        found = {f"context_distance_{kind}": distance
                 for kind, distance in distances_of(now, self.tokenizer, self.pairs).items()}
        if self.last:
            found["context_drift"] = context_drift(self.last, now)
        self.last = now
        return found

    def state_dict(self) -> dict[str, Any]:
        """The contexts of the last measurement."""
        return dict(self.last)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the contexts of ``state_dict``."""
        self.last = dict(state)
