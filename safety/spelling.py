"""A further reading of a text for the network: unknown words as the known words that were probably meant.

The noisy channel of Kernighan et al. (1990): of all known words that one wrong letter, a few letters too many at the
end, or a missing space could have turned into the unknown word, the most probable is read. The known words are those of
the training text, by their frequency; they are stored as CRC-32 codes, so that the file holds no readable word.

The code of a text with one change follows from those of its beginnings, because CRC-32 is linear: with the state P_i
after i letters of n, M the step over a zero byte and F the code of the whole, all over GF(2),

    letter i dropped      F + M^(n-1-i) (P_i + P_(i+1))
    letter i replaced     F + M^(n-1-i) T(w_i + c)
    c put before letter i F + M^(n-i) (P_i + M P_i + T(c))

so that the thousand forms of a text's unknown words are found in a few array operations. Words are aligned at their
ends, where the power of M is the same for all. Axis letters: W words, L letters of the longest, C = 26.
"""
import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

LONGEST_WORD = 24  # letters of an unknown word that is read
SHORTEST_EDIT = 4  # letters of a word from which one may be wrong
ENDING = 3  # most letters of an ending without meaning
UNIT = 0.1  # nats of a unit of cost
_ENDING_LETTER = math.log(26) / UNIT  # cost of a letter of an ending
_START = 0xFFFFFFFF
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
_BITS = 20


def _powers() -> np.ndarray:
    """(LONGEST_WORD + 2, 4, 256) uint32: M^k of each byte of a state, by its place."""
    byte = np.arange(256, dtype=np.uint32)
    one = np.array([zlib.crc32(bytes([value])) ^ zlib.crc32(b"\0") for value in range(256)], np.uint32)
    found = [np.stack([byte << np.uint32(8 * place) for place in range(4)])]
    for _ in range(LONGEST_WORD + 1):
        found.append((found[-1] >> np.uint32(8)) ^ one[found[-1] & 255])
    return np.stack(found)


_POWERS = _powers()
_STEP = _POWERS[1, 0]  # T: the state after one byte from the state 0


def zeros_after(states: np.ndarray, count: np.ndarray) -> np.ndarray:
    """M^count of CRC states (uint32), elementwise over arrays that broadcast."""
    return (_POWERS[count, 0, states & 255] ^ _POWERS[count, 1, states >> 8 & 255]
            ^ _POWERS[count, 2, states >> 16 & 255] ^ _POWERS[count, 3, states >> 24])


class Spelling:
    """Known words by their codes, each with a cost: minus the logarithm of its frequency."""

    def __init__(self, codes: np.ndarray, costs: np.ndarray):
        """codes (N,) uint32, ascending; costs (N,) uint8 in units of UNIT nats. Raises ValueError for others."""
        if codes.dtype != np.uint32 or costs.dtype != np.uint8 or codes.shape != costs.shape or codes.ndim != 1:
            raise ValueError(f"spelling: {codes.dtype} {codes.shape}, {costs.dtype} {costs.shape}; valid: uint32 and "
                             "uint8 of one length")
        if len(codes) > 1 and not (codes[1:] > codes[:-1]).all():
            raise ValueError("spelling: codes that are not sorted; valid: each larger than the one before")
        self.codes, self.costs = codes, costs
        self._set = frozenset(codes.tolist())
        self._bitmap = np.zeros(2**_BITS, bool)
        self._bitmap[codes & (2**_BITS - 1)] = True

    @classmethod
    def build(cls, counts: Mapping[str, int], least: int = 3) -> "Spelling":
        """The words of letters that occur at least ``least`` times."""
        kept = {word: count for word, count in counts.items() if count >= least and word.isalpha() and word.isascii()}
        total = sum(kept.values())
        found: dict[int, int] = {}
        for word, count in kept.items():
            cost = min(255, round(math.log(total / count) / UNIT))
            code = zlib.crc32(word.encode())
            found[code] = min(cost, found.get(code, 255))
        order = sorted(found)
        return cls(np.array(order, np.uint32), np.array([found[code] for code in order], np.uint8))

    def __contains__(self, word: str) -> bool:
        return zlib.crc32(word.encode("ascii", "replace")) in self._set

    def respelled(self, words: Sequence[str], is_word: Callable[[str], bool]) -> dict[str, tuple[str, ...]]:
        """The unknown ones of the words of a text, each with the one or two known words that it is read as. Unknown is
        a word of letters that is neither known nor a word by ``is_word``."""
        if not len(self.codes):
            return {}
        unknown = [word for word in dict.fromkeys(words) if 3 <= len(word) <= LONGEST_WORD and word.isalpha()
                   and word not in self and not is_word(word)]
        return self._most_probable([word for word in unknown if word.isascii()]) if unknown else {}

    def _costs_of(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(flat places, costs) of the codes that are known."""
        codes = codes.ravel()
        places = np.flatnonzero(self._bitmap[codes & (2**_BITS - 1)])
        at = np.searchsorted(self.codes, codes[places])
        at[at == len(self.codes)] = 0
        known = self.codes[at] == codes[places]
        return places[known], self.costs[at[known]].astype(np.int64)

    def _most_probable(self, words: list[str]) -> dict[str, tuple[str, ...]]:
        """The reading of least cost of each word that has one."""
        letters, lengths, states = aligned(words)
        width = letters.shape[1]
        after = np.arange(width - 1, -1, -1)  # letters behind each place
        inside = after < lengths[:, None]  # (W, L)
        whole = states[:, -1:] ^ np.uint32(_START)  # (W, 1)
        long = inside & (lengths[:, None] >= SHORTEST_EDIT)
        edit = np.round(np.log(54.0 * lengths + 25) / UNIT).astype(np.int64)
        step = states[:, :-1] ^ zeros_after(states[:, :-1], np.array(1))  # P_i + M P_i, before each place
        last = states[:, -1:] ^ zeros_after(states[:, -1:], np.array(1))
        insert = np.concatenate([zeros_after(step, after + 1), last], axis=1) ^ whole  # (W, L + 1)
        added = _POWERS[np.arange(width, -1, -1) + 1, 0][:, _LETTERS]  # (L + 1, C)
        swapped = letters[:, :-1] ^ letters[:, 1:]
        ends = states[:, :-1] ^ np.uint32(_START)  # the code of what is before each place
        rest = zeros_after(states[:, :-1] ^ np.uint32(_START), after + 1) ^ whole  # and of what is from it on
        forms = (
            (whole ^ zeros_after(states[:, :-1] ^ states[:, 1:], after), long, 0),
            (whole[..., None] ^ _POWERS[after[:, None] + 1, 0, letters[..., None] ^ _LETTERS], long, 0),
            (insert[..., None] ^ added, np.concatenate([long, long[:, -1:]], axis=1), 0),
            (whole ^ _POWERS[after[:-1] + 1, 0, swapped] ^ _POWERS[after[1:] + 1, 0, swapped], long[:, :-1], 0),
            (np.where(inside & (after < ENDING) & (after + 1 < lengths[:, None]), ends, 0), inside, 1),
        )
        rows, costs, kinds, places = [], [], [], []
        for kind, (codes, valid, ending) in enumerate(forms):
            flat, cost = self._costs_of(codes)
            row, place = np.divmod(flat, codes[0].size)
            column = place // (codes[0].size // codes.shape[1])
            good = valid[row, column]
            row, place, column, cost = row[good], place[good], column[good], cost[good]
            rows.append(row)
            places.append(place)
            kinds.append(np.full(len(row), kind))
            costs.append(cost + (np.round(_ENDING_LETTER * (width - column)).astype(np.int64) if ending else edit[row]))
        cut = inside & (after + 1 < lengths[:, None])
        (first, one), (second, two) = (self._costs_of(np.where(cut, codes, 0)) for codes in (ends, rest))
        both, at_one, at_two = np.intersect1d(first, second, assume_unique=True, return_indices=True)
        rows.append(both // width)
        places.append(both % width)
        kinds.append(np.full(len(both), len(forms)))
        costs.append(one[at_one] + two[at_two])
        owners, cost, of_kind, at = map(np.concatenate, (rows, costs, kinds, places))
        order = np.lexsort((cost, owners))  # stable, so that of equal costs the first kind is taken
        best = order[np.flatnonzero(np.diff(owners[order], prepend=-1))]
        chosen = zip(owners[best].tolist(), of_kind[best].tolist(), at[best].tolist())
        return {words[owner]: changed(words[owner], form, where, width) for owner, form, where in chosen}


def aligned(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(letters (W, L) uint8 of words aligned at their ends, lengths (W,), CRC states (W, L + 1) before each place and
    at the end)."""
    width = max(map(len, words))
    encoded = [word.encode() for word in words]
    letters = np.frombuffer(b"".join(word.rjust(width, b"\0") for word in encoded), np.uint8).reshape(-1, width)
    states = np.full((width + 1, len(words)), _START, np.uint32)
    for state, after, column in zip(states, states[1:], letters.T):
        stepped = state >> np.uint32(8) ^ _STEP[(state ^ column) & 255]
        np.copyto(after, stepped, where=column > 0)  # before its first letter a word has the first state
    return letters, np.array(list(map(len, words))), states.T


def changed(word: str, kind: int, place: int, width: int) -> tuple[str, ...]:
    """The word or words that a form stands for: its kind and its place among those of a word aligned at its end."""
    before = width - len(word)  # places before the first letter
    if kind == 0:
        return (word[:place - before] + word[place - before + 1:],)
    if kind in (1, 2):
        at, letter = place // 26 - before, chr(_LETTERS[place % 26])
        return (word[:at] + letter + word[at + (kind == 1):],)
    at = place - before
    if kind == 3:
        return (word[:at] + word[at + 1] + word[at] + word[at + 2:],)
    if kind == 4:
        return (word[:at],)
    return word[:at], word[at:]
