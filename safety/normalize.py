"""One text in the several ways a person would read it, so that a word disguised is still found.

The order matters: cap the length; note a change of direction, then delete what is invisible; NFKC, and cap again; drop
marks; fold the case; letters of other scripts that look like ASCII; the syntax of prompts; then the readings.
"""
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import add, or_
from typing import NamedTuple, TypeVar

from safety.lookalikes import LOOKALIKES

T = TypeVar("T")
LONGEST = 2000  # characters of a prompt; more is refused
MOST_DISGUISED = 50  # words that are no plain words; of 34,400 prompts and captions the worst has 39
READ = 64  # letters of a piece without spaces that are read at once
CLEAR = 5  # letters from which on signs that make a word of the dictionary leave no doubt
WILD = "*"  # stands for one letter that is not known

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_INVISIBLE = dict.fromkeys([0xAD, 0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x2800, 0x3164, 0xFEFF, 0xFFA0,
                            *range(0x180B, 0x1810), *range(0x200B, 0x2010), *range(0x202A, 0x202F),
                            *range(0x2060, 0x2070), *range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFFC),
                            *range(0xE0000, 0xE0200), *map(ord, _DIRECTIONS)])
_LETTER: dict[int, int | str] = {ord(like): letter for letter, likes in LOOKALIKES.items() for like in likes}
_LEET = str.maketrans("0134578@$!|+(<{9#6", "oieastbasiitcccghg")
_LEET_LINE = {**_LEET, **str.maketrans("|", "l")}  # a bar is an l more often than an i
_LEET_L = {**_LEET, **str.maketrans("1|", "ll")}
_LEET_WILD = {**_LEET, **str.maketrans("1!|", WILD * 3)}  # an i or an l, word by word
_TURNED = str.maketrans(
    "\u0250\u0254\u01dd\u025f\u0183\u0265\u0131\u027e\u029e\u026f\u0279\u0287\u028c\u028d\u028eqpdbun",
    "acefghijkmrtvwybdpqnu")
_ONLY_TURNED = frozenset("\u0250\u0254\u01dd\u025f\u0183\u0265\u027e\u029e\u0279\u0287\u028c\u028d\u028e")
_LETTER_TURNED: dict[int, int | str] = {**_LETTER, **_TURNED}
_COMMON = frozenset(
    "a i am an and are as at be but by can did do for get go had has he her hi him his how if in is it its let may me "
    "my new no not now of off oh old on one or our out own put red run sat saw say see set she sit so sun ten than "
    "that the then they this to too top two up us use was way we who why with you your big boy cat dog day eye far few "
    "fly fog fun gun hat hot ice ink job key kid lot low man map men mix mud oil pan pen pet pig pot raw sea sky son "
    "tea tie toy try van war wet win yes zoo from into over under near like very art all".split())


def _bytes_table(signs: Mapping[int, int | str]) -> tuple[bytes, bytes]:
    """(what each byte is read as, WILD for what is no letter; the bytes that are no letter)."""
    read = [chr(place) for place in range(256)]
    for sign, letter in signs.items():
        read[sign] = letter if isinstance(letter, str) else chr(letter)
    letters = [one if "a" <= one <= "z" else WILD for one in read]
    return "".join(letters).encode(), bytes(place for place in range(256) if letters[place] == WILD)


_AS_WRITTEN, _NO_LETTERS = _bytes_table({})
_BETWEEN = b"abcdefghijklmnopqrstuvwxyz.,-_~/"  # letters, and what may stand between them
_SIGNS = tuple(map(_bytes_table, (_LEET, _LEET_LINE, _LEET_L)))
_WILDS = (_SIGNS[0][0], _bytes_table(_LEET_WILD)[0], _AS_WRITTEN)

_NETWORK = re.compile(r"<\s{0,9}(?:lora|lyco|hypernet)\s{0,9}:", re.IGNORECASE)  # its name is read: so does the model
_WEIGHT = re.compile(r":\s{0,9}[-+]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s{0,9}(?=[)\]}>])")
_BRACKETS = re.compile(r"\\?[()\[\]{}<>]")
_GLUE = re.compile(r"\\?[()\[\]{}<>]|['\u2019](?!(?:s|t|re|ve|m|ll|d)\b)")
_BETWEEN_PARTS = re.compile(r"[|,;:/\\&=.-]+")
_NO_WORD = re.compile(r"[^a-z0-9]+")
_STRANGE = re.compile(r"[^a-z,.;:?\"'\u2019]|[a-z][,.;:?\"][a-z]|([a-z])\1")
_LATIN = re.compile("[a-z]")
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
        text = unicodedata.normalize("NFKC", _unmarked(shown))
        if len(text) > longest:  # to cut it would be to read less than the model does
            raise TextError(f"prompt: {len(text)} characters once its signs are written out; valid: up to {longest}")
        text = _unmarked(unicodedata.normalize("NFD", text)).casefold()
        text, alike = _without_lookalikes(text)
        notes += ["lookalike"] * alike
    return _BRACKETS.sub("", _WEIGHT.sub("", _NETWORK.sub("<", text))), tuple(notes)


def apart(text: str) -> str | None:
    """The text with a space for each bracket, apostrophe and invisible sign, which ``folded`` deletes; None for a text
    without any. A tokenizer parts words there: what is one word to a reader may be several to the model."""
    shown = text if text.isascii() else text.translate(dict.fromkeys(_INVISIBLE, " "))
    spaced = _GLUE.sub(" ", _WEIGHT.sub("", _NETWORK.sub("<", shown)))
    return spaced if spaced != text else None


def _unmarked(text: str) -> str:
    return "".join([c for c in text if c < "\u0300" or unicodedata.category(c) not in ("Mn", "Me")])


def _without_lookalikes(text: str) -> tuple[str, bool]:
    """Letters that look like ASCII replaced, in words that mix scripts and in words made of nothing else."""
    latin = _LATIN.search(text) is not None
    words, changed = [], False
    for word in text.split():
        if not word.isascii():
            read = word.translate(_LETTER if _ONLY_TURNED.isdisjoint(word) else _LETTER_TURNED)
            if read != word and (read.isascii() and (latin or len(word) == 1) or _LATIN.search(word)):
                word, changed = read, True
        words.append(word)
    return " ".join(words), changed


def latin(text: str) -> str:
    """The words of a text that have a Latin letter in them as they are written."""
    shown = unicodedata.normalize("NFKC", _unmarked(text.translate(_INVISIBLE)))[:LONGEST]
    return " ".join(word for word in shown.split() if _LATIN.search(word.casefold()))


def foreign(text: str) -> bool:
    """Whether most letters are in words without a Latin letter: a text that the network cannot read."""
    if text.isascii():
        return False
    words = unicodedata.normalize("NFKD", _unmarked(text[:LONGEST]))[:LONGEST].casefold().split()
    letters = [(sum(map(str.isalpha, word)), _LATIN.search(word) is not None) for word in words]
    return 2 * sum(count for count, latin in letters if not latin) > sum(count for count, _ in letters)


@dataclass(frozen=True)
class _Piece:
    """What stands between two spaces: the words in it as they are and with signs read as letters, its letters alone,
    and its readings."""

    written: tuple[str, ...]
    plain: tuple[str, ...]
    bare: str
    found: tuple[Reading, ...] = ()

    def first(self, kind: str) -> str:
        return next((reading.text for reading in self.found if reading.kind == kind), "")


def _piece(chunk: str, is_word: Callable[[str], bool]) -> _Piece:
    if chunk.isalpha() and chunk.isascii() and (not _RUN.search(chunk) or is_word(chunk)):
        return _Piece((chunk,), (chunk,), chunk)
    found = tuple(_disguised(chunk, is_word)) if _STRANGE.search(chunk) else ()
    written = _words(chunk)
    signs = next((r.text for r in found if r.kind == "signs" and is_word(r.text)), None)
    return _Piece(written, written if signs is None else (signs,), _letters(chunk), found)


def normalize(text: str, is_word: Callable[[str], bool] = lambda word: False, longest: int = LONGEST) -> Normalized:
    """The readings of a text. ``is_word`` says whether a lower-case word is of the dictionary or a name.

    Linear in the length of the text. Raises TextError as ``folded`` does, and for more than MOST_DISGUISED words that
    are written with signs or repeated letters: each has many readings, and nobody asks for a picture that way.
    """
    text, notes = folded(text, longest)
    chunks = text.split()
    known_pieces = {chunk: _piece(chunk, is_word) for chunk in dict.fromkeys(chunks)}
    pieces = [known_pieces[chunk] for chunk in chunks]
    disguised = [piece for piece in pieces if piece.found]
    parts = [part for chunk in known_pieces for part in _parts(chunk)]
    if len(disguised) + len(parts) > MOST_DISGUISED:
        raise TextError(f"prompt: {len(disguised) + len(parts)} words are written with signs or repeated letters; "
                        f"valid: up to {MOST_DISGUISED}")
    readings = [reading for piece in disguised for reading in piece.found]
    readings += [reading for part in parts for reading in _disguised(part, is_word)]
    plain = [word for piece in pieces for word in piece.plain]
    written = [word for piece in pieces for word in piece.written]  # without any sign read as a letter
    if written != plain:
        readings += _bold("written", written)
        for phrases in _neighbours(written, "{} {}".format):
            readings += _bold("written", phrases)
    known = {word: word in _COMMON or len(word) > 2 and is_word(word) for word in set(plain)}
    if disguised:
        readings += _phrases(pieces)
    readings += _mixed(pieces)
    readings += _joined(plain)
    readings += _split_words(plain, known)
    for word in dict.fromkeys(plain):
        if len(word) >= 4 and not known[word] and word.isalpha():
            if len(word) >= 5:
                readings.append(Reading("embedded", word, whole=False))
            if len(word) <= 24:
                readings.append(Reading("reversed", word[::-1]))
    if not all(known.values()):
        unknown = [not known[word] for word in plain]
        every = [word[::-1] for word in plain]
        some = [back if strange else word for word, back, strange in zip(plain, every, unknown)]
        readings += [*_windows("reversed", some, unknown),
                     *_windows("reversed", every, [strange and len(word) > 2 for word, strange in zip(plain, unknown)])]
    return Normalized(" ".join(plain), notes, tuple(dict.fromkeys(readings)))


def _parts(chunk: str) -> Iterator[str]:
    """What stands between signs inside a piece without spaces, where that is disguised in its own right; and the parts
    of one that is longer than ``_disguised`` reads, overlapping by more than the longest term."""
    if not chunk.isalpha():
        parts = [part for part in _BETWEEN_PARTS.split(chunk) if part]
        if len(parts) > 1:
            yield from (part for part in dict.fromkeys(parts) if len(part) > 2 and _STRANGE.search(part))
    yield from (chunk[start:start + READ] for start in range(READ - 24, len(chunk) - 2, READ - 24) if len(chunk) > READ)


def _words(chunk: str) -> tuple[str, ...]:
    return tuple(_NO_WORD.sub(" ", chunk.replace("'", "").replace("\u2019", "")).split())


def _letters(text: str) -> str:
    return text.encode("ascii", "replace").translate(None, _NO_LETTERS).decode()


def _bold(kind: str, texts: Iterable[str]) -> Iterator[Reading]:
    """Reading(kind, text) of each, without a call of Python for each: a hostile text has thousands."""
    return map(partial(tuple.__new__, Reading), zip(repeat(kind), texts, repeat(True), repeat(True)))  # type: ignore


def _neighbours(words: Sequence[T], together: Callable[[T, T], T]) -> Iterator[list[T]]:
    """For two, three and four neighbours: what they are together, from every place on."""
    found = list(words)
    for size in (2, 3, 4):
        found = list(map(together, found, words[size - 1:]))
        yield found


def _windows(kind: str, words: list[str], changed: list[bool]) -> Iterator[Reading]:
    """Two to four neighbours as one word, of which at least one was read in a bold way."""
    every = zip(_neighbours(words, add), _neighbours(changed, or_))
    return _bold(kind, dict.fromkeys(text for texts, bold in every for text, one in zip(texts, bold)
                                     if one and 5 <= len(text) <= 32))


def _phrases(pieces: list[_Piece]) -> Iterator[Reading]:
    """Terms of several words that are disguised in the same way."""
    for kind in ("separated", "signs", "wildcard", "repeated once", "signs, repeated once"):
        forms = [piece.first(kind) if piece.found else "" for piece in pieces]
        if any(forms):
            yield from _windows("phrase, " + kind, [form or piece.bare for form, piece in zip(forms, pieces)],
                                [form != "" for form in forms])


def _mixed(pieces: list[_Piece]) -> Iterator[Reading]:
    """Terms of several words of which each is disguised in another way, spelt in single letters among them."""
    forms, changed = [""], [False]  # the first is where no run of letters ends
    letters = 0  # single ones that end the last form
    for piece in pieces:
        single = len(piece.bare) == 1 and not piece.found
        if single and letters:
            forms[-1] += piece.bare
            letters += 1
            changed[-1] = letters >= 3
            continue
        letters = int(single)
        forms.append(_LONG_RUN.sub(r"\1", piece.first("signs") or piece.first("wildcard") or piece.bare))
        changed.append(bool(piece.found))
    return _windows("phrase, mixed", forms[1:], changed[1:]) if any(changed) else iter(())


def _disguised(chunk: str, is_word: Callable[[str], bool]) -> Iterator[Reading]:
    """Readings of one piece without spaces that is more than a word of letters."""
    core = chunk.strip(",.;:?\"'\u2019")[:READ]  # no term is longer; keeps a wall of signs cheap
    signs = core.encode("ascii", "replace")
    bare = signs.translate(None, _NO_LETTERS).decode()
    forms = {}
    if bare and bare != core:
        forms["separated"] = bare
    if not core.isalpha() and (bare or len(signs) >= 4):  # digits alone may be letters, too
        for table, dropped in _SIGNS:
            read = signs.rstrip(b"!").translate(table, dropped).decode()
            if read and read != bare and read not in forms.values():
                forms[f"signs{len(forms)}"] = read
    # signs inside a word that make a longer word of the dictionary are read as that: other letters in their place are a
    # bolder guess. Signs around a word say nothing about it.
    plain_word = core[:1].isalpha() and core[-1:].isalpha() and any(
        len(form) >= CLEAR and is_word(form) for kind, form in forms.items() if kind != "separated")
    if plain_word:
        forms.pop("separated", None)
    elif len(bare) >= 3 and not signs.translate(None, _BETWEEN) and is_word(bare):
        plain_word = True  # d.o.g
    for kind, form in list(forms.items()):
        yield Reading(kind.rstrip("0123456789"), form)
        if len(form) >= 6 and not is_word(form) and kind != "separated":
            yield Reading("embedded signs", form, whole=False)
    plain = [("", core)] if core.isalpha() and core.isascii() else []
    for kind, form in [*forms.items(), *plain]:
        yield from _unrepeated(form, is_word, "signs, " if kind.startswith("signs") else "")
    if len(bare) >= 2 and not plain_word:
        yield from _with_wildcards(signs)


def _unrepeated(word: str, is_word: Callable[[str], bool], kind: str) -> Iterator[Reading]:
    """Letters written several times, once and twice."""
    if not _RUN.search(word) or is_word(word):
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


def _with_wildcards(signs: bytes) -> Iterator[Reading]:
    """A sign between letters as one letter that is not known, at most two of them and no more than letters."""
    for table in _WILDS:
        read = signs.translate(table).strip(WILD.encode())
        if 3 <= len(read) <= 20 and 0 < read.count(WILD.encode()) <= min(2, len(read) - read.count(WILD.encode())):
            yield Reading("wildcard", read.decode())


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
    if True not in strange:
        return iter(())
    lengths = list(map(len, words))
    every = zip(_neighbours(words, add), _neighbours(strange, or_), _neighbours(lengths, min),
                _neighbours(lengths, max))
    return _bold("split", [text for text in dict.fromkeys(
        text for columns in every for text, one, least, most in zip(*columns)
        if one and len(text) <= 24 and least <= 6 and 1 < most <= 16) if text.isalpha()])
