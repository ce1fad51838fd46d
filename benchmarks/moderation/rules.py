"""The lexicon against disguises (benchmarks/moderation/obfuscation.py) and on innocent words that look alike.

The lexicon of a file is hashed, so the listed terms are read from its training data.
"""
import numpy as np

from benchmarks.moderation.metrics import estimate, table
from benchmarks.moderation.obfuscation import KINDS, obfuscate
from safety.gate import PromptGate
from safety.keywords import BLOCK
from safety.normalize import normalize
from training.moderation.artefact import PLURALS
from training.moderation.corpus import Corpus
from training.moderation.variations import disguise

SENTENCE = "a photo of {} in the street"


def blocks(gate: PromptGate, text: str) -> bool:
    """Whether listed terms alone would block a text."""
    lexicon = gate.artefact.lexicon
    return any(match.level == BLOCK for match in lexicon.matches(normalize(text, lexicon.is_word)))


def severe_terms(gate: PromptGate, corpus: Corpus) -> list[str]:
    """The listed terms that block in their plain form."""
    plain = sorted({normalize(term.text).plain for term in corpus.terms})
    return [term for term in plain if term and (gate.artefact.lexicon.term(term) or (0, 0))[1] == BLOCK]


def obfuscation_table(gate: PromptGate, corpus: Corpus) -> str:
    """Recall of severe terms and false positives on harmless captions, by kind of disguise."""
    random = np.random.default_rng(0)
    terms = severe_terms(gate, corpus)
    harmless = [row.text for row in corpus.rows if row.split == "test" and row.source == "captions"][:200]
    rows, found, wrong = [], [], []
    for kind in KINDS:
        hit = np.array([blocks(gate, SENTENCE.format(obfuscate(term, kind, random))) for term in terms], float)
        false = np.array([blocks(gate, obfuscate(text, kind, random)) for text in harmless], float)
        long = np.array([len(term.replace(" ", "")) >= 5 for term in terms])
        rows.append([kind, estimate(np.mean, hit, percent=True), f"{100 * hit[long].mean():.1f} %",
                     estimate(np.mean, false, percent=True)])
        found.append(hit)
        wrong.append(false)
    home = np.array([blocks(gate, SENTENCE.format(" ".join(disguise(word, random) if len(word) > 2 else word
                                                           for word in term.split())))
                     for term in terms for _ in range(3)], float)
    rows.append(["mean of all", estimate(np.mean, np.concatenate(found), percent=True), "",
                 estimate(np.mean, np.concatenate(wrong), percent=True)])
    rows.append(["home transforms", estimate(np.mean, home, percent=True), "", ""])
    return (f"## Disguises of {len(terms)} severe terms, and of {len(harmless)} whole captions\n\n"
            + table(("kind", "terms found", "of five letters and more", "captions blocked"), rows))


def trap_table(gate: PromptGate, corpus: Corpus) -> str:
    """The shares of dictionary words that hold a severe term, and of names, that rules and the gate block."""
    terms = [term for term in severe_terms(gate, corpus) if " " not in term]
    listed = {normalize(term.text).plain for term in corpus.terms}
    listed |= {term + ending for term in listed for ending in PLURALS}  # a plural is no innocent word
    traps = sorted(word for word in corpus.words | corpus.names if word.isalpha() and len(word) <= 25
                   and word not in listed and any(term in word for term in terms))
    names = sorted(corpus.names)[::7]
    rows = []
    for name, words in (("words that hold a term", traps), ("names", names)):
        texts = [f"a photo of {word}" for word in words]
        rules = np.array([blocks(gate, text) for text in texts], float)
        action = np.array([gate.check(text).action == "block" for text in texts], float)
        rows.append([name, str(len(words)), *(estimate(np.mean, one, percent=True) for one in (rules, action))])
    return "## Innocent words\n\n" + table(("kind", "number", "blocked by rules", "blocked"), rows)
