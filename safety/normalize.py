"""One text in the several ways a person would read it, so that a word disguised is still found.

The order matters: cap the length; note a change of direction, then delete what is invisible; NFKC, and cap again; drop
marks; fold the case; letters of other scripts that look like ASCII; the syntax of prompts; then the readings.
"""
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from safety.lookalikes import LOOKALIKES

LONGEST = 2000  # characters of a prompt; more is refused
WILD = "*"  # stands for one letter that is not known

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_INVISIBLE = dict.fromkeys([0xAD, 0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x2800, 0x3164, 0xFEFF, 0xFFA0,
                            *range(0x180B, 0x1810), *range(0x200B, 0x2010), *range(0x202A, 0x202F),
                            *range(0x2060, 0x2070), *range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFFC),
                            *range(0xE0000, 0xE0200), *map(ord, _DIRECTIONS)])
_LETTER = {ord(like): letter for letter, likes in LOOKALIKES.items() for like in likes}
_LEET = str.maketrans("0134578@$!|+(<{9#6", "oieastbasiitcccghg")
_LEET_L = str.maketrans("1!|", "lll")
_LEET_WILD = {**_LEET, **str.maketrans("1!|", WILD * 3)}  # an i or an l, word by word
_TURNED = str.maketrans(
    "\u0250\u0254\u01dd\u025f\u0183\u0265\u0131\u027e\u029e\u026f\u0279\u0287\u028c\u028d\u028eqpdbun",
    "acefghijkmrtvwybdpqnu")
_ONLY_TURNED = frozenset("\u0250\u0254\u01dd\u025f\u0183\u0265\u027e\u029e\u0279\u0287\u028c\u028d\u028e")
_COMMON = frozenset(
    "a i am an and are as at be but by can did do for get go had has he her hi him his how if in is it its let may me "
    "my new no not now of off oh old on one or our out own put red run sat saw say see set she sit so sun ten than "
    "that the then they this to too top two up us use was way we who why with you your big boy cat dog day eye far few "
    "fly fog fun gun hat hot ice ink job key kid lot low man map men mix mud oil pan pen pet pig pot raw sea sky son "
    "tea tie toy try van war wet win yes zoo from into over under near like very art all".split())

_NETWORK = re.compile(r"<(?:lora|lyco|hypernet)\s*:[^<>]{0,100}>", re.IGNORECASE)
_WEIGHT = re.compile(r":\s*[-+]?\d*\.?\d+\s*(?=[)\]}])")
_BRACKETS = re.compile(r"\\?[()\[\]{}<>]")
_NO_WORD = re.compile(r"[^a-z0-9]+")
_STRANGE = re.compile(r"[^a-z,.;:?\"'\u2019]|[a-z][,.;:?\"][a-z]|([a-z])\1")
_RUN = re.compile(r"(.)\1+")
_LONG_RUN = re.compile(r"([a-z])\1{2,}")


class TextError(ValueError):
    """A text that is not read: not text, empty, or too long."""


class Reading(NamedTuple):
    """A way to read a part of the text. ``whole``: only a term that fills it counts. ``severe``: only blocking terms
    count, since the reading is a bold one. ``text`` may hold WILD."""

    kind: str
    text: str
    whole: bool = True
    severe: bool = True


@dataclass(frozen=True)
class Normalized:
    """``plain``: words of a-z and 0-9 with one space between, the reading that the network gets too."""

    plain: str
    notes: tuple[str, ...] = ()
    readings: tuple[Reading, ...] = ()


def folded(text: str, longest: int = LONGEST) -> tuple[str, tuple[str, ...]]:
    """(text in ASCII where it can be, lower case and without prompt syntax; what was noted on the way).

    Raises TextError for what is not text and for more than ``longest`` characters.
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
        shown = text.translate(_INVISIBLE)
        if len(shown) != len(text):
            notes.append("invisible")
        # marks go before NFKC too: a thousand of them on one letter would be sorted in quadratic time
        text = unicodedata.normalize("NFKC", _unmarked(shown))[:longest]
        text = _unmarked(unicodedata.normalize("NFD", text)).casefold()
        text, alike = _without_lookalikes(text)
        notes += ["lookalike"] * alike
    text = _BRACKETS.sub("", _WEIGHT.sub("", _NETWORK.sub(" ", text))).replace("|", " | ")
    return text, tuple(notes)


def _unmarked(text: str) -> str:
    return "".join([c for c in text if c < "\u0300" or unicodedata.category(c) not in ("Mn", "Me")])


def _without_lookalikes(text: str) -> tuple[str, bool]:
    """Letters that look like ASCII replaced, in words that mix scripts and in words made of nothing else."""
    latin = any("a" <= c <= "z" for c in text)
    words, changed = [], False
    for word in text.split():
        if not word.isascii():
            read = word.translate(_LETTER if _ONLY_TURNED.isdisjoint(word) else {**_LETTER, **_TURNED})
            ours = any("a" <= c <= "z" for c in word)
            if read != word and (ours or (read.isascii() and latin) or (read.isascii() and len(word) == 1)):
                word, changed = read, True
        words.append(word)
    return " ".join(words), changed


def foreign(text: str) -> bool:
    """Whether most letters are in words without a Latin letter: a text that the network cannot read."""
    if text.isascii():
        return False
    words = unicodedata.normalize("NFKD", _unmarked(text[:LONGEST])).casefold().split()
    letters = [(sum(map(str.isalpha, word)), any("a" <= c <= "z" for c in word)) for word in words]
    return 2 * sum(count for count, latin in letters if not latin) > sum(count for count, _ in letters)


def normalize(text: str, is_word: Callable[[str], bool] = lambda word: False, longest: int = LONGEST) -> Normalized:
    """The readings of a text. ``is_word`` says whether a lower-case word is of the dictionary or a name.

    Linear in the length of the text. Raises TextError as ``folded`` does.
    """
    text, notes = folded(text, longest)
    readings: list[Reading] = []
    plain: list[str] = []
    written: list[str] = []  # the same without any sign read as a letter
    pieces: list[tuple[str, list[Reading]]] = []
    for chunk in text.split():
        if chunk.isalpha() and chunk.isascii() and not _RUN.search(chunk):
            plain.append(chunk)
            written.append(chunk)
            pieces.append((chunk, []))
            continue
        found = list(_disguised(chunk, is_word)) if _STRANGE.search(chunk) else []
        readings += found
        pieces.append((re.sub(r"[^a-z]", "", chunk), found))
        shown = next((r.text for r in found if r.kind == "signs" and is_word(r.text)), chunk)
        plain += _words(shown)
        written += _words(chunk)
    if written != plain:
        readings += [Reading("written", " ".join(written[start:start + size])) for size in (1, 2, 3, 4)
                     for start in range(len(written) - size + 1)]
    known = {word: word in _COMMON or len(word) > 2 and is_word(word) for word in set(plain)}
    readings += _phrases(pieces)
    readings += _joined(plain)
    readings += _split_words(plain, known)
    for word in dict.fromkeys(plain):
        if len(word) >= 4 and not known[word] and word.isalpha():
            if len(word) >= 5:
                readings.append(Reading("embedded", word, whole=False))
            if len(word) <= 24:
                readings.append(Reading("reversed", word[::-1]))
    if not all(known.values()):
        turned = [word if known[word] else word[::-1] for word in plain]
        readings += _windows("reversed", turned, [not known[word] for word in plain])
    return Normalized(" ".join(plain), notes, tuple(dict.fromkeys(readings)))


def _words(chunk: str) -> list[str]:
    return _NO_WORD.sub(" ", chunk.replace("'", "").replace("\u2019", "")).split()


def _windows(kind: str, words: list[str], changed: list[bool]) -> Iterator[Reading]:
    """Two to four neighbours as one word, of which at least one was read in a bold way."""
    for size in (2, 3, 4):
        for start in range(len(words) - size + 1):
            if True in changed[start:start + size]:
                joined = "".join(words[start:start + size])
                if 5 <= len(joined) <= 32:
                    yield Reading(kind, joined)


def _phrases(pieces: list[tuple[str, list[Reading]]]) -> Iterator[Reading]:
    """Terms of several words that are disguised in the same way."""
    for kind in ("separated", "signs", "wildcard", "repeated once", "signs, repeated once"):
        forms = [next((reading.text for reading in found if reading.kind == kind), "") for _, found in pieces]
        if any(forms):
            yield from _windows("phrase, " + kind, [form or bare for form, (bare, _) in zip(forms, pieces)],
                                [bool(form) for form in forms])


def _disguised(chunk: str, is_word: Callable[[str], bool]) -> Iterator[Reading]:
    """Readings of one piece without spaces that is more than a word of letters."""
    chunk = chunk[:64]  # no term is longer; keeps a wall of signs cheap
    core = chunk.strip(",.;:?\"'\u2019")
    letters = sum("a" <= c <= "z" for c in core)
    bare = re.sub(r"[^a-z]", "", core)
    forms = {}
    if bare and bare != core:
        forms["separated"] = bare
    if letters and not core.isalpha():
        for kind, table in (("signs", _LEET), ("signs", {**_LEET, **_LEET_L})):
            read = re.sub(r"[^a-z]", "", core.rstrip("!").translate(table))
            if read and read != bare:
                forms[f"{kind}{len(forms)}"] = read
    for kind, form in list(forms.items()):
        yield Reading(kind.rstrip("0123456789"), form)
        if len(form) >= 6 and not is_word(form) and kind != "separated":
            yield Reading("embedded signs", form, whole=False)
    plain = [("", core)] if core.isalpha() and core.isascii() else []
    for kind, form in [*forms.items(), *plain]:
        yield from _unrepeated(form, is_word, "signs, " if kind.startswith("signs") else "")
    if letters >= 2:
        yield from _with_wildcards(core)


def _unrepeated(word: str, is_word: Callable[[str], bool], kind: str) -> Iterator[Reading]:
    """Letters written several times, once and twice."""
    if is_word(word) or not _RUN.search(word):
        return
    if _LONG_RUN.search(word):
        twice = _LONG_RUN.sub(r"\1\1", word)
        yield Reading(f"{kind}repeated", twice)
        if len(twice) >= 5 and not is_word(twice):
            yield Reading("embedded repeated", twice, whole=False)
    once = _RUN.sub(r"\1", word)
    yield Reading(f"{kind}repeated once", once)
    if len(once) >= 6 and not is_word(once):
        yield Reading("embedded repeated", once, whole=False)


def _with_wildcards(core: str) -> Iterator[Reading]:
    """A sign between letters as one letter that is not known, at most two of them and no more than letters."""
    for table in (_LEET, _LEET_WILD, {}):
        read = re.sub(r"[^a-z]", WILD, core.translate(table)).strip(WILD)
        if 3 <= len(read) <= 20 and 0 < read.count(WILD) <= min(2, sum(c != WILD for c in read)):
            yield Reading("wildcard", read)


def _joined(words: list[str]) -> Iterator[Reading]:
    """Three and more single letters in a row, as one word."""
    start = 0
    while start < len(words):
        end = start
        while end < len(words) and len(words[end]) == 1:
            end += 1
        if end - start >= 3:
            run = "".join(words[start:end])[:64]
            for read in dict.fromkeys((run, run.translate(_LEET))):
                yield Reading("letters", read, severe=True)
                yield Reading("letters inside", read, whole=False)
        start = max(end, start + 1)


def _split_words(words: list[str], known: Mapping[str, bool]) -> Iterator[Reading]:
    """Neighbours of which one is no word of its own, as one word."""
    strange = [word not in _COMMON and (len(word) <= 3 or not known[word]) for word in words]
    if not any(strange):
        return
    for size in (2, 3, 4):
        for start in range(len(words) - size + 1):
            if True in strange[start:start + size]:
                parts = words[start:start + size]
                joined = "".join(parts)
                lengths = [len(part) for part in parts]
                if 1 < max(lengths) <= 16 and len(joined) <= 24 and min(lengths) <= 6 and joined.isalpha():
                    yield Reading("split", joined)
