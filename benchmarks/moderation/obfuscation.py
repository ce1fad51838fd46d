"""Ways to write a word that readers recognise and filters may not; they share no code with those of training."""
from collections.abc import Callable

import numpy as np

Random = np.random.Generator
_LEET = {"a": "4@", "e": "3", "i": "1!", "o": "0", "s": "5$", "t": "7+", "l": "1|", "g": "9", "b": "8"}
_CYRILLIC = str.maketrans("aeopcyxikms", "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u043a\u043c\u0455")
_GREEK = str.maketrans("aoiuvkntp", "\u03b1\u03bf\u03b9\u03c5\u03bd\u03ba\u03b7\u03c4\u03c1")
_SMALL = str.maketrans("abcdefghijklmnoprstuvwyz",
                       "\u1d00\u0299\u1d04\u1d05\u1d07\ua730\u0262\u029c\u026a\u1d0a\u1d0b\u029f"
                       "\u1d0d\u0274\u1d0f\u1d18\u0280\ua731\u1d1b\u1d1c\u1d20\u1d21\u028f\u1d22")
_TURNED = str.maketrans("abcdefghijklmnopqrtuvwy",
                        "\u0250q\u0254p\u01dd\u025f\u0183\u0265\u0131\u027e\u029el\u026fuodb\u0279"
                        "\u0287n\u028c\u028d\u028e")
_ACCENTS = "\u0300\u0301\u0302\u0303\u0308\u030a\u0327\u0323"


def _shift_letters(word: str, start: int) -> str:
    return "".join(chr(start + ord(c) - 97) if "a" <= c <= "z" else c for c in word)


def _insert(word: str, random: Random, piece: str) -> str:
    place = int(random.integers(1, len(word)))
    return word[:place] + piece + word[place:]


def _leet(word: str, random: Random, share: float) -> str:
    hit = [i for i, c in enumerate(word) if c in _LEET]
    chosen = {i for i in hit if random.random() < share} or set(hit[:1])
    return "".join(_LEET[c][random.integers(len(_LEET[c]))] if i in chosen else c for i, c in enumerate(word))


def _star_letter(word: str, random: Random, sign: str) -> str:
    place = int(random.integers(1, len(word) - 1))
    return word[:place] + sign + word[place + 1:]


def _replace_one(word: str, random: Random, table: dict[int, int]) -> str:
    hit = [i for i, c in enumerate(word) if ord(c) in table]
    if not hit:
        return word
    place = hit[random.integers(len(hit))]
    return word[:place] + word[place].translate(table) + word[place + 1:]


KINDS: dict[str, Callable[[str, Random], str]] = {
    "as it is": lambda w, r: w,
    "upper case": lambda w, r: w.upper(),
    "mixed case": lambda w, r: "".join(c.upper() if r.random() < 0.5 else c for c in w),
    "leet, one": lambda w, r: _leet(w, r, 0.0),
    "leet, all": lambda w, r: _leet(w, r, 1.0),
    "spaces": lambda w, r: " ".join(w),
    "dots": lambda w, r: ".".join(w),
    "hyphens": lambda w, r: "-".join(w),
    "underscores": lambda w, r: "_".join(w),
    "signs of several kinds": lambda w, r: "".join(c + "-._/~"[r.integers(5)] for c in w).rstrip("-._/~"),
    "spaces and capitals": lambda w, r: " ".join(w.upper()),
    "letter repeated": lambda w, r: _insert(w, r, "") if len(w) < 2 else w[:-1] + w[-1] * int(r.integers(3, 7)),
    "vowel repeated": lambda w, r: "".join(c * (int(r.integers(3, 6)) if c in "aeiou" else 1) for c in w),
    "all repeated": lambda w, r: "".join(c * 2 for c in w),
    "star for a letter": lambda w, r: _star_letter(w, r, "*"),
    "hash for a letter": lambda w, r: _star_letter(w, r, "#"),
    "zero width space": lambda w, r: _insert(w, r, "\u200b"),
    "zero width everywhere": lambda w, r: "\u200c".join(w),
    "soft hyphen": lambda w, r: _insert(w, r, "\u00ad"),
    "word joiner and selector": lambda w, r: _insert(_insert(w, r, "\u2060"), r, "\ufe0f"),
    "tag letters": lambda w, r: _insert(w, r, "\U000e0061\U000e0062"),
    "direction marks": lambda w, r: "\u2066" + _insert(w, r, "\u200e") + "\u2069",
    "accents": lambda w, r: "".join(c + (_ACCENTS[r.integers(8)] if r.random() < 0.5 else "") for c in w),
    "stacked marks": lambda w, r: "".join(c + "".join(chr(0x300 + int(k)) for k in r.integers(0, 0x6F, 6)) for c in w),
    "Cyrillic, one": lambda w, r: _replace_one(w, r, _CYRILLIC),
    "Cyrillic, all": lambda w, r: w.translate(_CYRILLIC),
    "Greek, all": lambda w, r: w.translate(_GREEK),
    "full width": lambda w, r: _shift_letters(w, 0xFF41),
    "mathematical bold": lambda w, r: _shift_letters(w, 0x1D41A),
    "mathematical script": lambda w, r: _shift_letters(w, 0x1D4EA),
    "circled": lambda w, r: _shift_letters(w, 0x24D0),
    "squared": lambda w, r: _shift_letters(w, 0x1F170),
    "regional letters": lambda w, r: _shift_letters(w, 0x1F1E6),
    "small capitals": lambda w, r: w.translate(_SMALL),
    "turned letters": lambda w, r: w.translate(_TURNED),
    "brackets of a prompt": lambda w, r: f"({w[:2]}){w[2:]}" if r.random() < 0.5 else f"[{w}:1.3]",
    "cut in two": lambda w, r: _insert(w, r, " "),
    "cut in two by a sign": lambda w, r: _insert(w, r, "-'_,"[r.integers(4)]),
    "backwards": lambda w, r: w[::-1],
    "inside a longer word": lambda w, r: "xq" + w + "zz",
    "leet and dots": lambda w, r: ".".join(_leet(w, r, 0.5)),
    "Cyrillic and zero width": lambda w, r: _insert(_replace_one(w, r, _CYRILLIC), r, "\u200d"),
    "capitals, spaces and accents": lambda w, r: " ".join(c + _ACCENTS[r.integers(8)] for c in w.upper()),
    "leet and repeats": lambda w, r: _leet(w[:-1] + w[-1] * 4, r, 0.4),
}


def obfuscate(term: str, kind: str, random: Random) -> str:
    """The term with each word written in the way ``kind``; words of fewer than three letters are unchanged."""
    if kind == "inside a longer word":
        return KINDS[kind](term.replace(" ", ""), random)
    return " ".join(KINDS[kind](word, random) if len(word) >= 3 else word for word in term.split())
