"""A text folded to plain words, with all the readings in which a person would find a disguised word.

The order of the steps matters: limit the length; note changes of direction, then delete invisible characters; apply
NFKC and limit the length again; drop marks; fold the case; replace lookalikes of other scripts by ASCII letters; remove
the syntax of prompts; then collect the readings (safety/disguises.py).
"""
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from safety.disguises import IsWord, Piece, Reading, disguised_parts, read_piece, readings_of
from safety.lookalikes import LOOKALIKES

LONGEST = 2000  # characters of a prompt; longer prompts are refused
MOST_DISGUISED = 50  # disguised words of a prompt; the worst of 34,400 prompts and captions has 39

END = frozenset(".,;:!?")  # signs at which a clause ends
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_INVISIBLE = dict.fromkeys([0xAD, 0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x2800, 0x3164, 0xFEFF, 0xFFA0,
                            *range(0x180B, 0x1810), *range(0x200B, 0x2010), *range(0x202A, 0x202F),
                            *range(0x2060, 0x2070), *range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFFC),
                            *range(0xE0000, 0xE0200), *map(ord, _DIRECTIONS)])
_LETTER: dict[int, int | str] = {ord(like): letter for letter, likes in LOOKALIKES.items() for like in likes}
_TURNED = str.maketrans(
    "\u0250\u0254\u01dd\u025f\u0183\u0265\u0131\u027e\u029e\u026f\u0279\u0287\u028c\u028d\u028eqpdbun",
    "acefghijkmrtvwybdpqnu")
_ONLY_TURNED = frozenset("\u0250\u0254\u01dd\u025f\u0183\u0265\u027e\u029e\u0279\u0287\u028c\u028d\u028e")
_LETTER_TURNED: dict[int, int | str] = {**_LETTER, **_TURNED}

# names of networks are read as words, because the model reads them too
_NETWORK = re.compile(r"<\s{0,9}(?:lora|lyco|hypernet)\s{0,9}:", re.IGNORECASE)
_WEIGHT = re.compile(r":\s{0,9}[-+]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s{0,9}(?=[)\]}>])")
_BRACKETS = re.compile(r"\\?[()\[\]{}<>]")
_GLUE = re.compile(r"\\?[()\[\]{}<>]|['\u2019](?!(?:s|t|re|ve|m|ll|d)\b)")
_LATIN = re.compile("[a-z]")


class TextError(ValueError):
    """A text that is not read: it is not text, is empty, or is too long."""


@dataclass(frozen=True)
class Normalized:
    """``plain`` holds words of a-z and 0-9 separated by one space, as the network reads them; ``notes`` name steps of
    the folding that found a disguise; ``clauses`` are the ranges of words of ``plain`` between commas, full stops and
    the ends of lines."""

    plain: str
    notes: tuple[str, ...] = ()
    readings: tuple[Reading, ...] = ()
    clauses: tuple[tuple[int, int], ...] = ()

    def __hash__(self):
        return hash(self.plain)  # a text has thousands of readings, all of which follow from it


def fold(text: str, longest: int = LONGEST) -> tuple[str, tuple[str, ...]]:
    """(lower-case text without prompt syntax, in ASCII as far as possible; notes of the steps that changed it).

    Raises TextError for a value that is not text and for more than ``longest`` characters.
    """
    if not isinstance(text, str):
        raise TextError(f"prompt: {type(text).__name__}; valid: text")
    if len(text) > longest:
        raise TextError(f"prompt: {len(text)} characters; valid: up to {longest}")
    notes: list[str] = []
    if text.isascii():
        text = text.lower()
    else:
        if not _DIRECTIONS.isdisjoint(text):
            notes.append("direction")
        visible = text.translate(_INVISIBLE)
        if len(visible) != len(text):
            notes.append("invisible")
        # marks are dropped before NFKC too, which would sort a thousand of them on one letter in quadratic time
        text = unicodedata.normalize("NFKC", _without_marks(visible))
        if len(text) > longest:  # a cut text would be shorter than what the model reads
            raise TextError(f"prompt: {len(text)} characters once its signs are written out; valid: up to {longest}")
        text = _without_marks(unicodedata.normalize("NFD", text)).casefold()
        text, alike = _without_lookalikes(text)
        notes += ["lookalike"] * alike
    return _BRACKETS.sub("", _WEIGHT.sub("", _NETWORK.sub("<", text))), tuple(notes)


def with_spaces_for_signs(text: str) -> str | None:
    """The text with a space for each bracket, apostrophe and invisible character, which ``fold`` deletes; None for a
    text without any. Tokenizers split words there, so one word of a reader may be several words of the model."""
    visible = text if text.isascii() else text.translate(dict.fromkeys(_INVISIBLE, " "))
    spaced = _GLUE.sub(" ", _WEIGHT.sub("", _NETWORK.sub("<", visible)))
    return spaced if spaced != text else None


def _without_marks(text: str) -> str:
    """The text without combining marks."""
    return "".join([c for c in text if c < "\u0300" or unicodedata.category(c) not in ("Mn", "Me")])


def _without_lookalikes(text: str) -> tuple[str, bool]:
    """The text with letters that look like ASCII replaced, in words that mix scripts or consist of such letters only;
    and whether any word has changed."""
    latin = _LATIN.search(text) is not None
    words, changed = [], False
    for word in text.split():
        if not word.isascii():
            read = word.translate(_LETTER if _ONLY_TURNED.isdisjoint(word) else _LETTER_TURNED)
            if read != word and (read.isascii() and (latin or len(word) == 1) or _LATIN.search(word)):
                word, changed = read, True
        words.append(word)
    return " ".join(words), changed


def latin_words(text: str) -> str:
    """The words of a text that hold a Latin letter as they are written, before any letter is replaced."""
    visible = unicodedata.normalize("NFKC", _without_marks(text.translate(_INVISIBLE)))[:LONGEST]
    return " ".join(word for word in visible.split() if _LATIN.search(word.casefold()))


def is_foreign(text: str) -> bool:
    """Whether most letters are in words without a Latin letter, which the network cannot read."""
    if text.isascii():
        return False
    words = unicodedata.normalize("NFKD", _without_marks(text[:LONGEST]))[:LONGEST].casefold().split()
    letters = [(sum(map(str.isalpha, word)), _LATIN.search(word) is not None) for word in words]
    return 2 * sum(count for count, latin in letters if not latin) > sum(count for count, _ in letters)


def normalize(text: str, is_word: IsWord = lambda word: False, longest: int = LONGEST,
              with_readings: bool = True) -> Normalized:
    """The plain words of a text and its readings, or its words alone; linear in the length of the text.

    Raises TextError as ``fold`` does, and for more than MOST_DISGUISED words that are written with signs or repeated
    letters: each of them has many readings, and no harmless prompt has so many.
    """
    text, notes = fold(text, longest)
    chunks = text.split()
    read = {chunk: read_piece(chunk, is_word) for chunk in dict.fromkeys(chunks)}
    pieces = [read[chunk] for chunk in chunks]
    parts = [part for chunk in read for part in disguised_parts(chunk)]
    count = sum(bool(piece.found) for piece in pieces) + len(parts)
    if count > MOST_DISGUISED:
        raise TextError(f"prompt: {count} words are written with signs or repeated letters; valid: up to "
                        f"{MOST_DISGUISED}")
    plain = " ".join(word for piece in pieces for word in piece.plain)
    readings = readings_of(pieces, parts, is_word) if with_readings else ()
    return Normalized(plain, notes, readings, tuple(clauses_of(text, read)))


def clauses_of(text: str, read: Mapping[str, Piece]) -> Iterator[tuple[int, int]]:
    """(first, end): the range of plain words of each part of a folded text that ends with a comma, a full stop or a
    line."""
    first = end = 0
    for line in text.splitlines():
        for chunk in line.split():
            end += len(read[chunk].plain)
            if end > first and chunk.rstrip("\"'\u2019")[-1:] in END:
                yield first, end
                first = end
        if end > first:
            yield first, end
            first = end
