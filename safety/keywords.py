"""Finds listed terms in the readings of a text by hashes alone: the file holds no readable term.

A term is stored as 8 bytes of BLAKE2b. A bitmap indexed by CRC-32 rejects almost every other span in a fraction of a
microsecond, and only a span that passes it is hashed. A dictionary and names are stored as a Bloom filter (Bloom 1970).
"""
import bisect
import hashlib
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from safety.disguises import WILD, Reading
from safety.normalize import Normalized

STEM = 5  # least letters of a severe term that counts inside a longer word
WORDS = 4  # words of the longest term
LETTERS = 24  # letters of the longest term found inside another word
PHRASE = 6  # the same for a severe term of several words
JOINED = 8  # least letters of two words that make a term together, even if both are words by themselves
MISSPELT = 6  # least letters of a blocking term that is found although one of its letters is wrong
MISSPELLING = "misspelt"  # kind of such a reading
_HASHES = 3
SIGNAL, FLAG, BLOCK = 1, 2, 3  # levels: counts only for the rule on minors, flags, blocks


@dataclass(frozen=True)
class Term:
    """A listed term for ``Lexicon.build``. ``inside``: it also counts inside a longer unknown word."""

    text: str
    category: int
    level: int
    inside: bool = True


@dataclass(frozen=True)
class Match:
    """A term that was found: its category and level and, for ``explain`` only, the kind of reading and the span."""

    category: int
    level: int
    kind: str
    span: str


def _key(text: str) -> int:
    """The hash of a term."""
    return int.from_bytes(hashlib.blake2b(text.encode("ascii", "replace"), digest_size=8, person=b"term").digest(),
                          "little")


class WordFilter:
    """A set of words as a Bloom filter with about one false positive in a thousand words."""

    def __init__(self, bits: np.ndarray):
        """``bits`` (N,) is uint8, and N a power of two."""
        if bits.dtype != np.uint8 or bits.ndim != 1 or len(bits) & (len(bits) - 1):
            raise ValueError(f"word filter: {bits.dtype} {bits.shape}; valid: a power of two of uint8")
        self.bits, self._bytes, self._mask = bits, bits.tobytes(), 8 * len(bits) - 1

    @classmethod
    def build(cls, words: Iterable[str], size: int = 2**20) -> "WordFilter":
        """The filter of ``words`` in ``size`` bytes."""
        bits = np.zeros(size, np.uint8)
        for word in words:
            for place in cls._places(word, 8 * size - 1):
                bits[place >> 3] |= 1 << (place & 7)
        return cls(bits)

    @staticmethod
    def _places(word: str, mask: int) -> list[int]:
        first = zlib.crc32(word.encode("ascii", "replace"))
        second = first * 0x85EBCA6B >> 13 | 1  # CRC is linear: another start value would give no second hash
        return [(first + i * second) & mask for i in range(_HASHES)]

    def __contains__(self, word: str) -> bool:
        first, bits, mask = zlib.crc32(word.encode("ascii", "replace")), self._bytes, self._mask
        second = first * 0x85EBCA6B >> 13 | 1
        for i in range(_HASHES):
            place = (first + i * second) & mask
            if not bits[place >> 3] >> (place & 7) & 1:
                return False
        return True


def masked_forms(term: str) -> Iterator[str]:
    """``term`` with one or two unknown letters, at most half of them, and never the first or the last letter."""
    places = range(len(term))
    for count in (1, 2):
        if len(term) < max(4, 2 * count):
            return
        for hidden in itertools.combinations(places, count):
            if hidden[0] == 0 or hidden[-1] == len(term) - 1:
                continue
            yield "".join(WILD if i in hidden else c for i, c in enumerate(term))


def misspelt_forms(word: str) -> list[str]:
    """Forms of a word, of MISSPELT letters or more, by which a blocking term is found that differs from it by one
    letter: added, replaced, swapped with the next one, or dropped. WILD stands for a letter of the term that is not in
    the word."""
    places, found = range(len(word)), [word[:i] + WILD + word[i:] for i in range(len(word) + 1)]
    if len(word) >= MISSPELT:
        found += [word[:i] + WILD + word[i + 1:] for i in places]
        found += [word[:i] + word[i + 1:i + 2] + word[i] + word[i + 2:] for i in places]
    if len(word) > MISSPELT:
        found += [word[:i] + word[i + 1:] for i in places]
    return found


def misspelt_codes(word: bytes) -> list[int]:
    """The CRC-32 of each of the ``misspelt_forms`` of a word, in the same order, without building them: the code of a
    text continues that of its beginning."""
    crc, places = zlib.crc32, range(len(word))
    begun = list(itertools.accumulate((word[i:i + 1] for i in places), lambda code, one: crc(one, code), initial=0))
    wild = [crc(b"*", code) for code in begun]
    found = [crc(word[i:], wild[i]) for i in range(len(word) + 1)]
    if len(word) >= MISSPELT:
        found += [crc(word[i + 1:], wild[i]) for i in places]
        found += [crc(word[i + 2:], crc(word[i:i + 1], crc(word[i + 1:i + 2], begun[i]))) for i in places]
    if len(word) > MISSPELT:
        found += [crc(word[i + 1:], begun[i]) for i in places]
    return found


def bold_forms(term: str) -> list[str]:
    """The stored forms of a blocking term: as it is, without spaces, with unknown letters, and without repeats (=)."""
    joined = term.replace(" ", "")
    forms = [term] if len(joined) < STEM and joined != term else [term, joined]
    if joined.isalpha() and len(joined) <= LETTERS:
        forms += masked_forms(joined)
        if len(joined) >= MISSPELT:
            forms += [WILD + joined[1:], joined[:-1] + WILD]
        once = re.sub(r"(.)\1+", r"\1", joined)
        if len(once) >= 4 and once != joined:
            forms.append("=" + once)
    return list(dict.fromkeys(forms))


class Lexicon:
    """Hashed terms, each with a category and a level."""

    def __init__(self, keys: np.ndarray, categories: np.ndarray, levels: np.ndarray, inside: np.ndarray,
                 bitmap: np.ndarray, words: WordFilter):
        """keys (N,) uint64; categories, levels, inside (N,) uint8; bitmap (M,) uint8 with M a power of two."""
        if not len(keys) == len(categories) == len(levels) == len(inside):
            raise ValueError(f"lexicon: {len(keys)} keys, {len(categories)} categories, {len(levels)} levels")
        self.keys, self.categories, self.levels, self.inside, self.bitmap = keys, categories, levels, inside, bitmap
        self.words = words
        if len(keys) > 1 and not (keys[1:] > keys[:-1]).all():
            raise ValueError("lexicon: keys that are not sorted; valid: each larger than the one before")
        # a dict of 170,000 would take a tenth of a second
        self._sorted = np.ascontiguousarray(keys).data
        self._bits, self._mask = bitmap.tobytes(), 8 * len(bitmap) - 1

    @classmethod
    def build(cls, terms: Sequence[Term], words: WordFilter, size: int = 2**18) -> "Lexicon":
        """The lexicon of the terms, of further forms of blocking terms, and of their stems, with a bitmap of ``size``
        bytes. Of two terms with the same text the one with the higher level is kept."""
        found: dict[int, tuple[int, int, bool]] = {}
        bitmap = np.zeros(size, np.uint8)

        def mark(text: str) -> None:
            place = zlib.crc32(text.encode()) & (8 * size - 1)
            bitmap[place >> 3] |= 1 << (place & 7)

        for term in sorted(terms, key=lambda term: term.level):
            severe = term.level >= BLOCK
            joined = term.text.replace(" ", "")
            inside = (term.inside and severe and joined.isalpha()
                      and len(joined) >= (STEM if joined == term.text else PHRASE))
            for form in bold_forms(term.text) if severe else [term.text]:
                mark(form)
                found[_key(form)] = (term.category, term.level, inside and form == joined)
            if inside:
                mark("<" + joined[:STEM])
        keys = sorted(found)
        columns = np.array([found[key] for key in keys], np.uint8).reshape(-1, 3)
        categories, levels, within = (np.ascontiguousarray(columns[:, i]) for i in range(3))
        return cls(np.array(keys, np.uint64), categories, levels, within, bitmap, words)

    def is_word(self, word: str) -> bool:
        """Whether a word is in the dictionary or a name, and no listed term."""
        return word in self.words

    def term(self, text: str) -> tuple[int, int, bool] | None:
        """(category, level, counts inside other words) of a listed term, None for any other text."""
        place = zlib.crc32(text.encode("ascii", "replace")) & self._mask
        if not self._bits[place >> 3] >> (place & 7) & 1:
            return None
        return self._hit(text)

    def _hit(self, text: str) -> tuple[int, int, bool] | None:
        """As ``term``, for a text that the bitmap does not reject."""
        key = _key(text)
        place = bisect.bisect_left(self._sorted, key)
        if place == len(self._sorted) or self._sorted[place] != key:
            return None
        return int(self.categories[place]), int(self.levels[place]), bool(self.inside[place])

    def matches(self, normalized: Normalized, bold: bool = False) -> list[Match]:
        """The listed terms in the words of the text and in its readings. Severe readings find blocking terms only, or
        all terms if ``bold``."""
        one = sought(normalized)
        places: list[list[int]] = [[] for _ in one.ends]
        for place in self._possible(one.codes):
            part = bisect.bisect_right(one.ends, place)
            places[part].append(place - (one.ends[part - 1] if part else 0))
        joined, runs, whole, begun, misspelt = places
        found = {(category, level, "words", span): None
                 for category, level, span in self._in_words(one.words, joined, runs)}
        spans = [one.spans[place] for place in whole]
        spans += self._stems([one.stems[place] for place in begun])
        spans += [one.misspelt_form(place) for place in misspelt]
        for span, reading in spans:
            hit, complete = self._hit(span), reading.whole or reading.kind == MISSPELLING
            if hit and (bold or hit[1] >= BLOCK or not reading.severe) and (complete or hit[2]):
                found[hit[0], hit[1], reading.kind, span] = None
        return [Match(*key) for key in found]

    def _possible(self, codes: np.ndarray) -> list[int]:
        """The indices of the CRC-32 codes (N,) that are set in the bitmap."""
        places = codes & self._mask
        return np.flatnonzero(self.bitmap[places >> 3] >> (places & 7).astype(np.uint8) & 1).tolist()

    def _in_words(self, words: Sequence[str], joined: Sequence[int], runs: Sequence[int]) -> list[tuple[int, int, str]]:
        """(category, level, span) of terms of up to WORDS words, and of two words that make a term together, among the
        places that the bitmap does not reject: of pairs, and of runs of one, two, three and four words."""
        found = []
        for start in joined:
            span = words[start] + words[start + 1]
            hit = self._hit(span) if len(span) >= JOINED else None
            if hit and hit[1] >= BLOCK:
                found.append((start, 0, (hit[0], hit[1], span)))
        for place in runs:
            start, size = place, 1
            while start > len(words) - size:
                start, size = start - (len(words) - size + 1), size + 1
            span = " ".join(words[start:start + size])
            hit = self._hit(span)
            if hit:
                found.append((start, size, (hit[0], hit[1], span)))
        return [one for _, _, one in sorted(found)]

    def _stems(self, places: Sequence[tuple[Reading, int]]) -> list[tuple[str, Reading]]:
        """The spans that begin at the places of readings where a term begins that counts inside other words, and that
        the bitmap does not reject."""
        begun = dict.fromkeys((reading, reading.text[start:start + LETTERS]) for reading, start in places)
        found = [(span[:end], reading) for reading, span in begun for end in range(STEM, len(span) + 1)]
        codes = np.array([zlib.crc32(span.encode("ascii", "replace")) for span, _ in found], np.int64)
        return [found[place] for place in self._possible(codes)]


@dataclass(frozen=True)
class Sought:
    """All that is looked up of a text, the same for every lexicon: ``codes`` (N,) are the CRC-32 codes of its pairs of
    words as one word, of its runs of words, of ``spans``, of ``stems`` and of the misspelt forms of ``unknown``, which
    end at ``ends``; ``forms`` are the ends of the forms of each unknown word."""

    words: list[str]
    spans: list[tuple[str, Reading]]
    stems: list[tuple[Reading, int]]
    unknown: list[Reading]
    forms: list[int]
    codes: np.ndarray
    ends: list[int]

    def misspelt_form(self, place: int) -> tuple[str, Reading]:
        """The form at a place among those of all unknown words, and its reading."""
        owner = bisect.bisect_right(self.forms, place)
        reading = self.unknown[owner]  # the place is counted from the end of the forms of its word
        return misspelt_forms(reading.text)[place - self.forms[owner]], reading._replace(kind=MISSPELLING)


@lru_cache(maxsize=2)  # both lexicons of a gate ask for the same text
def sought(read: Normalized) -> Sought:
    """All that is looked up of a normalised text."""
    crc, words = zlib.crc32, read.plain.split()
    encoded = [word.encode("ascii", "replace") for word in words]
    spaced = [b" " + word for word in encoded]
    code = list(map(crc, encoded))
    parts = [list(map(crc, encoded[1:], code)), list(code)]  # of two words without a space between them; of runs
    for size in range(1, WORDS):
        code = list(map(crc, spaced[size:], code))  # continues over the next word
        parts[1] += code
    owners = [reading for reading in read.readings if reading.whole]
    spans = [(reading.text, reading) for reading in owners]
    spans += [("=" + reading.text, reading) for reading in owners if reading.kind.endswith("once")]
    parts.append([crc(span.encode("ascii", "replace")) for span, _ in spans])
    begun, stems, of_stems = crc(b"<"), list[tuple[Reading, int]](), list[int]()
    for reading in read.readings:
        if not reading.whole:
            letters = reading.text.encode("ascii", "replace")
            starts = range(len(letters) - STEM + 1)
            stems += [(reading, start) for start in starts]
            of_stems += [crc(letters[start:start + STEM], begun) for start in starts]
    unknown = [reading for reading in read.readings
               if reading.kind == "embedded" and MISSPELT - 1 <= len(reading.text) <= LETTERS]
    misspelt = [misspelt_codes(reading.text.encode("ascii", "replace")) for reading in unknown]
    parts += [of_stems, list(itertools.chain.from_iterable(misspelt))]
    return Sought(words, spans, stems, unknown, list(itertools.accumulate(map(len, misspelt))),
                  np.array(list(itertools.chain.from_iterable(parts)), np.int64),
                  list(itertools.accumulate(map(len, parts))))
