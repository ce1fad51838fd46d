"""Words that were learned from images: a tokenizer that reads them as token ids of their own.

A learned word, such as "<cat>" or the name of a file, stands for one or several rows that were appended to the table of
token embeddings (textual inversion, Gal et al. 2022). It is found in the text itself, as a whole word and whatever its
case; what stands between two learned words is tokenized as before.
"""
import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from data.clip_tokenizer import ClipTokenizer, Tokens
from data.tokenizer import Tokenizer

AnyTokenizer = TypeVar("AnyTokenizer", bound="Tokenizer | ClipTokenizer")


class LearnedTokens:
    """A byte-pair encoding that knows learned words beside its own. ``ids`` maps each word to the ids of its rows."""

    def __init__(self, bpe: Any, ids: Mapping[str, Sequence[int]]):
        self.bpe, self.ids = bpe, {word.lower(): list(rows) for word, rows in ids.items()}
        self.first = min(row for rows in ids.values() for row in rows)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(whole_word, longest_first)), re.IGNORECASE)

    def encode(self, text: str, add_special_tokens: bool = False) -> Any:
        """The encoding of a text without special tokens. Raises ValueError if it is to have some."""
        if add_special_tokens:
            raise ValueError("add_special_tokens: True; valid: False, the tokenizers of this project add their own")
        found, end = Tokens([], [], []), 0
        for match in self.pattern.finditer(text):
            # the space before a learned word belongs to it, as it does to every other word
            self._append(found, text[end:match.start()].rstrip(), end)
            ids = self.ids[match[0].lower()]
            word = next_word(found)
            found.ids.extend(ids)
            found.word_ids.extend([word] * len(ids))
            found.offsets.extend([match.span()] * len(ids))
            end = match.end()
        if end == 0:
            return self.bpe.encode(text, add_special_tokens=False)
        self._append(found, text[end:], end)
        return found

    def _append(self, found: Tokens, text: str, start: int) -> None:
        """Append the encoding of the text that begins at character ``start`` of the whole."""
        if not text.strip():
            return
        part, word = self.bpe.encode(text, add_special_tokens=False), next_word(found)
        found.ids.extend(part.ids)
        found.word_ids.extend(None if number is None else word + number for number in part.word_ids)
        found.offsets.extend((first + start, last + start) for first, last in part.offsets)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Any]:
        """The encodings of texts."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; a learned word is written once for the first of its rows."""
        words = {rows[0]: word for word, rows in self.ids.items()}
        text, known = "", list[int]()
        for number in [*ids, None]:
            if number is not None and number < self.first:
                known.append(number)
                continue
            text += self.bpe.decode(known, skip_special_tokens=skip_special_tokens)
            text, known = text + (f" {words[number]}" if number in words else ""), []
        return text

    def decode_batch(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The texts of rows of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def __getattr__(self, name: str) -> Any:
        if name == "bpe":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.bpe, name)


def next_word(found: Tokens) -> int:
    """The number of the word after those of an encoding."""
    return max((number for number in found.word_ids if number is not None), default=-1) + 1


def whole_word(word: str) -> str:
    """A pattern that finds a word unless letters or digits continue it."""
    before, after = (r"\w" if re.match(r"\w", end) else "" for end in (word[0], word[-1]))
    return (f"(?<!{before})" if before else "") + re.escape(word) + (f"(?!{after})" if after else "")


def check_word(word: str) -> str:
    """The word itself; raises ValueError for one that cannot be found in a prompt."""
    if not word.strip() or word != word.strip() or len(word) > 100 or not word.isprintable():
        raise ValueError(f"token: {word!r}; valid: a word of 1 to 100 characters, such as <cat>")
    return word


def with_learned_tokens(tokenizer: AnyTokenizer, ids: Mapping[str, Sequence[int]]) -> AnyTokenizer:
    """A tokenizer that knows learned words, too; the given one is unchanged."""
    extended = copy.copy(tokenizer)
    extended.bpe = LearnedTokens(tokenizer.bpe, ids)  # type: ignore[assignment]
    return extended
