"""The readings of disguised words: signs for letters, spelt and repeated letters, cut, joined and reversed words.

A reading is one way in which a person could read a part of a text. The input is folded text (safety/normalize.py), cut
at its spaces into pieces. The work is linear in the length of the text.
"""
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, repeat
from operator import add, or_
from typing import NamedTuple, TypeVar

T = TypeVar("T")
IsWord = Callable[[str], bool]  # whether a lower-case word is in the dictionary or a name
READ = 64  # letters of a piece that are read at once
CLEAR = 5  # a dictionary word of at least so many letters, written with signs, leaves no doubt
WILD = "*"  # stands for one unknown letter

_LEET = str.maketrans("0134578@$!|+(<{9#6", "oieastbasiitcccghg")
_LEET_LINE = {**_LEET, **str.maketrans("|", "l")}  # a bar is more often an l than an i
_LEET_L = {**_LEET, **str.maketrans("1|", "ll")}
_LEET_WILD = {**_LEET, **str.maketrans("1!|", WILD * 3)}  # each may be an i or an l
_COMMON = frozenset(
    "a i am an and are as at be but by can did do for get go had has he her hi him his how if in is it its let may me "
    "my new no not now of off oh old on one or our out own put red run sat saw say see set she sit so sun ten than "
    "that the then they this to too top two up us use was way we who why with you your big boy cat dog day eye far few "
    "fly fog fun gun hat hot ice ink job key kid lot low man map men mix mud oil pan pen pet pig pot raw sea sky son "
    "tea tie toy try van war wet win yes zoo from into over under near like very art all".split())


def _bytes_table(signs: Mapping[int, int | str]) -> tuple[bytes, bytes]:
    """(the letter that each byte is read as, WILD for bytes that are no letter; the bytes that are no letter)."""
    read = [chr(place) for place in range(256)]
    for sign, letter in signs.items():
        read[sign] = letter if isinstance(letter, str) else chr(letter)
    letters = [one if "a" <= one <= "z" else WILD for one in read]
    return "".join(letters).encode(), bytes(place for place in range(256) if letters[place] == WILD)


_AS_WRITTEN, _NO_LETTERS = _bytes_table({})
_BETWEEN = b"abcdefghijklmnopqrstuvwxyz.,-_~/"  # letters and common separators
_SIGNS = tuple(map(_bytes_table, (_LEET, _LEET_LINE, _LEET_L)))
_WILDS = (_SIGNS[0][0], _bytes_table(_LEET_WILD)[0], _AS_WRITTEN)

_BETWEEN_PARTS = re.compile(r"[|,;:/\\&=.-]+")
_NO_WORD = re.compile(r"[^a-z0-9]+")
_STRANGE = re.compile(r"[^a-z,.;:?\"'\u2019]|[a-z][,.;:?\"][a-z]|([a-z])\1")
_RUN = re.compile(r"(.)\1+")
_LONG_RUN = re.compile(r"([a-z])\1{2,}")


class Reading(NamedTuple):
    """One way to read a part of a text. ``whole``: a term must fill the whole reading. ``severe``: only blocking terms
    count, because the reading is speculative. ``text`` may hold WILD."""

    kind: str
    text: str
    whole: bool = True
    severe: bool = True


@dataclass(frozen=True)
class Piece:
    """The text between two spaces: its words as written and with signs read as letters, its letters alone, and its
    readings, of which undisguised words have none."""

    written: tuple[str, ...]
    plain: tuple[str, ...]
    bare: str
    found: tuple[Reading, ...] = ()

    def first(self, kind: str) -> str:
        """The first reading of a kind, or an empty text."""
        return next((reading.text for reading in self.found if reading.kind == kind), "")


def read_piece(chunk: str, is_word: IsWord) -> Piece:
    """The piece of a text without spaces."""
    if chunk.isalpha() and chunk.isascii() and (not _RUN.search(chunk) or is_word(chunk)):
        return Piece((chunk,), (chunk,), chunk)
    found = tuple(_readings_of_chunk(chunk, is_word)) if _STRANGE.search(chunk) else ()
    written = _words(chunk)
    signs = next((r.text for r in found if r.kind == "signs" and is_word(r.text)), None)
    return Piece(written, written if signs is None else (signs,), _letters(chunk), found)


def readings_of(pieces: Sequence[Piece], parts: Sequence[str], is_word: IsWord) -> tuple[Reading, ...]:
    """All readings of a text of ``pieces``, of which ``parts`` are disguised by themselves, without repetitions."""
    disguised = [piece for piece in pieces if piece.found]
    readings = [reading for piece in disguised for reading in piece.found]
    readings += [reading for part in parts for reading in _readings_of_chunk(part, is_word)]
    plain = [word for piece in pieces for word in piece.plain]
    written = [word for piece in pieces for word in piece.written]  # without any sign read as a letter
    if written != plain:
        readings += _readings("written", written)
        for phrases in neighbours(written, "{} {}".format):
            readings += _readings("written", phrases)
    known = {word: word in _COMMON or len(word) > 2 and is_word(word) for word in set(plain)}
    if disguised:
        readings += _phrases(pieces)
    readings += _mixed_phrases(pieces)
    readings += _spelt_words(plain)
    readings += _split_words(plain, known)
    readings += _unknown_words(plain, known)
    return tuple(dict.fromkeys(readings))


def _unknown_words(words: list[str], known: Mapping[str, bool]) -> Iterator[Reading]:
    """Unknown words as they are and backwards, and neighbours of which one is read backwards."""
    for word in dict.fromkeys(words):
        if len(word) >= 4 and not known[word] and word.isalpha():
            if len(word) >= 5:
                yield Reading("embedded", word, whole=False)
            if len(word) <= 24:
                yield Reading("reversed", word[::-1])
    if not all(known.values()):
        unknown = [not known[word] for word in words]
        every = [word[::-1] for word in words]
        some = [back if strange else word for word, back, strange in zip(words, every, unknown)]
        yield from _windows("reversed", some, unknown)
        yield from _windows("reversed", every,
                            [strange and len(word) > 2 for word, strange in zip(words, unknown)])


def disguised_parts(chunk: str) -> Iterator[str]:
    """The parts between the signs of a text without spaces that are disguised by themselves; and, for a text longer
    than READ, parts that overlap by more than the longest term."""
    if not chunk.isalpha():
        parts = [part for part in _BETWEEN_PARTS.split(chunk) if part]
        if len(parts) > 1:
            yield from (part for part in dict.fromkeys(parts) if len(part) > 2 and _STRANGE.search(part))
    yield from (chunk[start:start + READ] for start in range(READ - 24, len(chunk) - 2, READ - 24) if len(chunk) > READ)


def _words(chunk: str) -> tuple[str, ...]:
    """The words of letters and digits in a text, with apostrophes dropped."""
    return tuple(_NO_WORD.sub(" ", chunk.replace("'", "").replace("\u2019", "")).split())


def _letters(text: str) -> str:
    """The letters a-z of a text."""
    return text.encode("ascii", "replace").translate(None, _NO_LETTERS).decode()


def _readings(kind: str, texts: Iterable[str]) -> Iterator[Reading]:
    """Reading(kind, text) of each text, without a Python call for each: a hostile text has thousands."""
    return map(partial(tuple.__new__, Reading), zip(repeat(kind), texts, repeat(True), repeat(True)))  # type: ignore


def neighbours(words: Sequence[T], together: Callable[[T, T], T]) -> Iterator[list[T]]:
    """For sizes two, three and four: the values of all runs of so many neighbours, combined with ``together``."""
    found = list(words)
    for size in (2, 3, 4):
        found = list(map(together, found, words[size - 1:]))
        yield found


def _windows(kind: str, words: list[str], changed: list[bool]) -> Iterator[Reading]:
    """Runs of two to four neighbours as one word, if at least one of them has ``changed``."""
    every = chain.from_iterable(map(compress, neighbours(words, add), neighbours(changed, or_)))
    return _readings(kind, [text for text in dict.fromkeys(every) if 5 <= len(text) <= 32])


def _phrases(pieces: Sequence[Piece]) -> Iterator[Reading]:
    """Readings of neighbours that are disguised in the same way."""
    for kind in ("separated", "signs", "wildcard", "repeated once", "signs, repeated once"):
        forms = [piece.first(kind) if piece.found else "" for piece in pieces]
        if any(forms):
            yield from _windows("phrase, " + kind, [form or piece.bare for form, piece in zip(forms, pieces)],
                                [form != "" for form in forms])


def _mixed_phrases(pieces: Sequence[Piece]) -> Iterator[Reading]:
    """Readings of neighbours that are disguised in different ways, including words spelt in single letters."""
    forms, changed = [""], [False]  # a first form for single letters to attach to
    letters = 0  # number of single letters at the end of the last form
    for piece in pieces:
        single = len(piece.bare) == 1 and not piece.found
        if single and letters:
            forms[-1] += piece.bare
            letters += 1
            changed[-1] = letters >= 3
            continue
        letters = int(single)
        read = piece.found and (piece.first("signs") or piece.first("wildcard")) or piece.bare
        forms.append(_LONG_RUN.sub(r"\1", read))
        changed.append(bool(piece.found))
    return _windows("phrase, mixed", forms[1:], changed[1:]) if any(changed) else iter(())


def _readings_of_chunk(chunk: str, is_word: IsWord) -> Iterator[Reading]:
    """Readings of a text without spaces that is more than a word of letters."""
    core = chunk.strip(",.;:?\"'\u2019")[:READ]  # no term is longer, and a wall of signs stays cheap
    signs = core.encode("ascii", "replace")
    bare = signs.translate(None, _NO_LETTERS).decode()
    forms = {}
    if bare and bare != core:
        forms["separated"] = bare
    if not core.isalpha() and (bare or len(signs) >= 4):  # digits alone may stand for letters
        for table, dropped in _SIGNS:
            read = signs.rstrip(b"!").translate(table, dropped).decode()
            if read and read != bare and read not in forms.values():
                forms[f"signs{len(forms)}"] = read
    # Signs inside a word are read as the dictionary word that they make, if it is long: other letters would be a more
    # speculative reading. Signs around a word do not count.
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
        yield from _without_repeats(form, is_word, "signs, " if kind.startswith("signs") else "")
    if len(bare) >= 2 and not plain_word:
        yield from _with_wildcards(signs)


def _without_repeats(word: str, is_word: IsWord, kind: str) -> Iterator[Reading]:
    """Readings with repeated letters reduced to two and to one."""
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
    """Readings with signs between letters as unknown letters: at most two, and no more than the known letters."""
    for table in _WILDS:
        read = signs.translate(table).strip(WILD.encode())
        if 3 <= len(read) <= 20 and 0 < read.count(WILD.encode()) <= min(2, len(read) - read.count(WILD.encode())):
            yield Reading("wildcard", read.decode())


def _spelt_words(words: list[str]) -> Iterator[Reading]:
    """Three or more single letters in a row, read as one word."""
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
    """Neighbours read as one word, if one of them is not a word by itself."""
    strange = [word not in _COMMON and (len(word) <= 3 or not known[word]) for word in words]
    if True not in strange:
        return iter(())
    lengths = list(map(len, words))
    every = zip(neighbours(words, add), neighbours(strange, or_), neighbours(lengths, min),
                neighbours(lengths, max))
    return _readings("split", [text for text in dict.fromkeys(
        text for columns in every for text, one, least, most in zip(*columns)
        if one and least <= 6 and 1 < most <= 16) if len(text) <= 24 and text.isalpha()])
