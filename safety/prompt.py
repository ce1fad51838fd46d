"""A network from text to the probabilities of seven kinds of harm, in a fraction of a millisecond on a CPU.

Hashed character 2-5-grams inside words, words and pairs of words -> bags of embeddings -> a small network, beside a
linear weight for every n-gram ("wide and deep", Cheng et al. 2016; hashing: Weinberger et al. 2009; subwords:
Bojanowski et al. 2017). An n-gram is in a bag once, however often it is in the text (Wang and Manning 2012; Wilbur and
Kim 2009). Inference is NumPy alone. Axis letters: N n-grams, P parts, D embedding width, H hidden, K categories.
"""
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from safety.keywords import Lexicon, WordFilter
from safety.parts import PART_MARGIN
from safety.policy import HEADS, Limits, Policy
from safety.spelling import Spelling

FORMAT = "2"
DEFAULT = Path(__file__).with_name("moderation.safetensors")  # the shipped file; its card is moderation.json
LONGEST_GRAM = 5
FEW = 3  # ranges of words up to which one after the other is faster than all at once
_CODES = np.zeros(128, np.uint64)
_CODES[[ord(c) for c in "abcdefghijklmnopqrstuvwxyz0123456789"]] = np.arange(1, 37)
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, The Art of Computer Programming 3, 6.4)


class ArtefactError(ValueError):
    """A file of moderation that is missing, damaged, or of another format; the message names it."""


def ngram_ids(plain: str, bits: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct buckets, sorted, of the character n-grams, below 2^bits[0], and of words and pairs of words, below
    2^bits[1]: a word that is repeated says no more than a word that is said once.

    plain: words of a-z and 0-9 separated by one space. The spaces around a word count as letters of its n-grams.
    """
    characters, _, words = placed_ngrams(plain, bits)
    return np.unique(characters), np.unique(words)


def placed_ngrams(plain: str, bits: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(buckets of all character n-grams (N,), the word (N,) that each is in, buckets of words and pairs (2M - 1,)) of
    M words. Word i is at place 2i of the last and its pair with the next word at 2i + 1."""
    split = plain.split()
    if not split:
        none = np.zeros(0, np.int64)
        return none, none, none
    codes = _CODES[np.frombuffer(f" {plain} ".encode("ascii", "replace"), np.uint8) & 127]
    space = codes == 0
    before = np.concatenate([[0], np.cumsum(space)])  # spaces before each place
    shift, grams, found, owners = np.uint64(64 - bits[0]), codes, [], []
    for size in range(2, LONGEST_GRAM + 1):
        if len(codes) < size:
            break
        grams = grams[:-1] * np.uint64(37) + codes[size - 1:]
        kept = before[size - 1:len(codes)] == before[1:len(codes) - size + 2]  # no space inside the n-gram
        found.append(grams[kept] + np.uint64(size * 0x1000003))
        owners.append(before[1:len(codes) - size + 2][kept] - 1)
    words = np.empty(2 * len(split) - 1, np.uint64)
    words[::2] = [zlib.crc32(word.encode()) for word in split]
    words[1::2] = words[:-2:2] * np.uint64(31) + words[2::2] * np.uint64(0x85EBCA6B) + np.uint64(97)
    mixed = (words * _MIX) >> np.uint64(64 - bits[1])
    characters = (np.concatenate(found) * _MIX) >> shift
    return characters.astype(np.int64), np.concatenate(owners), mixed.astype(np.int64)


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of the network: log2 of the buckets of characters and of words, embedding width, hidden width."""

    char_bits: int = 17
    word_bits: int = 16
    width: int = 16
    hidden: int = 64

    def __post_init__(self):
        for name, low, high in (("char_bits", 4, 24), ("word_bits", 4, 24), ("width", 1, 256), ("hidden", 1, 4096)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: {low} to {high}")

    @property
    def bits(self) -> tuple[int, int]:
        """log2 of the buckets of characters and of words."""
        return self.char_bits, self.word_bits


class PromptHead:
    """The trained network. Its tables are int8 with one scale for each column; all else is float32."""

    def __init__(self, config: HeadConfig, weights: Mapping[str, np.ndarray]):
        """weights: char.table (2^char_bits, D + K) and word.table (2^word_bits, D + K) int8, their .scale (D + K,),
        hidden.weight (H, 2D), hidden.bias (H,), out.weight (K, H), out.bias (K,), slope (K,), shift (K,).

        Raises ArtefactError for a tensor that is missing, misshapen or not finite.
        """
        columns = config.width + len(HEADS)
        shapes = {"char.table": (2**config.char_bits, columns), "word.table": (2**config.word_bits, columns),
                  "char.scale": (columns,), "word.scale": (columns,),
                  "hidden.weight": (config.hidden, 2 * config.width), "hidden.bias": (config.hidden,),
                  "out.weight": (len(HEADS), config.hidden), "out.bias": (len(HEADS),), "slope": (len(HEADS),),
                  "shift": (len(HEADS),)}
        for name, shape in shapes.items():
            if name not in weights or weights[name].shape != shape:
                got = weights[name].shape if name in weights else "nothing"
                raise ArtefactError(f"moderation weights: {name} is {got}; valid: {shape}")
            if not np.isfinite(weights[name]).all():
                raise ArtefactError(f"moderation weights: {name} is not finite")
        self.config, self.weights = config, dict(weights)

    def bags(self, plain: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (P, 2D) and linear scores (P, K) of P ranges of words: sums over their distinct n-grams divided by
        the square root of the number of these, which is the length of the vector of ones and zeros that says which
        n-grams are there."""
        characters, owners, words = placed_ngrams(plain, self.config.bits)
        ends = np.array(spans, np.int64).reshape(-1, 2)
        order = np.argsort(owners, kind="stable")
        ranges = {"char": (characters[order], np.searchsorted(owners[order], ends)),
                  "word": (words, np.maximum(2 * ends - [0, 1], 2 * ends[:, :1]))}  # a pair is where both words are
        deep, wide = [], np.zeros((len(ends), len(HEADS)), np.float32)
        for name, (ids, places) in ranges.items():
            total, number = distinct_sums(self.weights[f"{name}.table"], ids, places)
            scaled = total * self.weights[f"{name}.scale"] / np.sqrt(np.maximum(number, 1))[:, None]
            deep.append(scaled[:, : self.config.width])
            wide += scaled[:, self.config.width:].astype(np.float32)
        return np.concatenate(deep, axis=1).astype(np.float32), wide

    def logits(self, plain: str, spans: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
        """Logits (P, K) of P ranges of words before calibration, by default of all words."""
        deep, wide = self.bags(plain, [(0, len(plain.split()))] if spans is None else spans)
        w = self.weights
        hidden = np.maximum(deep @ w["hidden.weight"].T + w["hidden.bias"], 0)  # (P, H)
        return hidden @ w["out.weight"].T + w["out.bias"] + wide

    def scores(self, plain: str) -> dict[str, float]:
        """The calibrated probability of each category: sigmoid(slope logit + shift) (Platt 1999)."""
        return self.highest_scores(plain, [(0, len(plain.split()))])

    def highest_scores(self, plain: str, spans: Sequence[tuple[int, int]]) -> dict[str, float]:
        """The highest calibrated probability of each category over ranges of words; NaN if any is NaN. The first range
        is the whole text, the others are parts, whose log odds count PART_MARGIN less."""
        if not plain:
            return dict.fromkeys(HEADS, 0.0)
        z = self.logits(plain, spans) * self.weights["slope"] + self.weights["shift"]  # (P, K)
        z[1:] -= PART_MARGIN
        z = np.clip(z, -60, 60)
        return dict(zip(HEADS, (1 / (1 + np.exp(-z.max(axis=0)))).tolist()))


def _distinct(ids: np.ndarray) -> np.ndarray:
    """The sorted ids without repetitions: np.unique in half its time, which counts for a prompt of a few words."""
    ordered = np.sort(ids)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def distinct_sums(table: np.ndarray, ids: np.ndarray, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums (P, C) int32 of the rows of a table at the distinct ids of each range (P, 2) of ids (N,), and the numbers
    (P,) of these."""
    if len(ranges) <= FEW:
        each = [_distinct(ids[first:end]) for first, end in ranges.tolist()]
        return np.stack([table[own].sum(axis=0, dtype=np.int32) for own in each]), np.array([len(own) for own in each])
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    earlier = np.full(len(ids), -1)  # the last place before each place that has the same id
    earlier[order[again + 1]] = order[again]
    sizes = ranges[:, 1] - ranges[:, 0]
    owner = np.repeat(np.arange(len(ranges)), sizes)
    place = np.arange(sizes.sum()) + np.repeat(ranges[:, 0] - (np.cumsum(sizes) - sizes), sizes)
    first = earlier[place] < ranges[owner, 0]  # the id is not in the range before this place
    number = np.bincount(owner[first], minlength=len(ranges))
    total, held = np.zeros((len(ranges), table.shape[1]), np.int32), number > 0
    if held.any():
        starts = np.cumsum(number) - number
        total[held] = np.add.reduceat(table[ids[place[first]]], starts[held], axis=0, dtype=np.int32)
    return total, number


@dataclass(frozen=True)
class Artefact:
    """The contents of a file of moderation. ``minors`` holds the hashes of terms for minors, ``spelling`` the words
    that the network knows; a file of before has none of these."""

    head: PromptHead
    lexicon: Lexicon
    minors: Lexicon
    spelling: Spelling
    policy: Policy
    card: dict[str, Any]
    hash: str


LEXICON = ("keys", "categories", "levels", "inside", "bitmap")


def tensors_of(head: PromptHead, lexicon: Lexicon, minors: Lexicon, spelling: Spelling) -> dict[str, np.ndarray]:
    """The tensors of a file of moderation by name; ``load_artefact`` reads them back."""
    found = {f"head.{name}": np.ascontiguousarray(value) for name, value in head.weights.items()}
    for kind, one in (("lexicon", lexicon), ("minors", minors)):
        found |= {f"{kind}.{name}": getattr(one, name) for name in LEXICON}
    return {**found, "words.bits": lexicon.words.bits, "spelling.codes": spelling.codes,
            "spelling.costs": spelling.costs}


def content_hash(tensors: Mapping[str, np.ndarray], settings: str) -> str:
    """SHA-256 of the settings and of the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"|{name}|{value.dtype.str}|{value.shape}|".encode() + value.tobytes())
    return digest.hexdigest()


def load_artefact(path: str | Path = DEFAULT) -> Artefact:
    """The contents of a file of moderation; raises ArtefactError if it is missing, if a single byte has changed, or if
    it has another format."""
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"no moderation weights {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged or not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ArtefactError(f"{path} has format {metadata.get('format')!r}; valid: {FORMAT!r}")
    found = content_hash(tensors, metadata.get("settings", ""))
    if found != metadata.get("sha256"):
        raise ArtefactError(f"{path} is damaged: its contents have another SHA-256 than was written")
    try:
        settings = json.loads(metadata["settings"])
        words = WordFilter(tensors["words.bits"])
        lexicon, minors = (Lexicon(**{name: tensors[f"{kind}.{name}"] for name in LEXICON}, words=words)
                           for kind in ("lexicon", "minors"))
        head = PromptHead(HeadConfig(**settings["head"]), {name.removeprefix("head."): value for name, value in
                                                           tensors.items() if name.startswith("head.")})
        spelling = Spelling(tensors.get("spelling.codes", np.zeros(0, np.uint32)),
                            tensors.get("spelling.costs", np.zeros(0, np.uint8)))
        limits, short = ({name: Limits(**value) for name, value in settings[kind].items()} if kind in settings else None
                         for kind in ("limits", "short"))
        policy = Policy(limits or {}, settings["minors"], settings.get("rates"), naming=settings.get("naming"),
                        short=short)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} does not fit this version: {error}") from None
    return Artefact(head, lexicon, minors, spelling, policy, settings, found[:16])
