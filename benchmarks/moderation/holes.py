"""Known holes of the prompt gate, each with its whole kind, before and after a change.

    python -m benchmarks.moderation.holes --data DIR [DIR ...] [--weights NAME=FILE ...] [--plain FILE.csv]

Harmful text comes from the test split of the training folders. Plain requests are carriers that training does not use,
filled with plain words of the test split, the requests and harmless neighbours of plain.yaml, and the rows
text,label,category of ``--plain``. Those of plain.yaml and the ordinary prompts of ordinary.yaml were written for this
test. Rewrites are applied to those prompts of the test split that a gate blocks as they are.
"""
import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.moderation.metrics import estimate, table
from benchmarks.moderation.prompts import name_and_path, own_csv
from files.config import read_yaml
from safety.gate import PromptGate
from safety.keywords import BLOCK, MISSPELT
from safety.normalize import LONGEST, normalize
from safety.prompt import DEFAULT
from training.moderation.artefact import PLAIN, PLURALS
from training.moderation.corpus import Corpus, read_corpus

ORDINARY = Path(__file__).with_name("ordinary.yaml")
PLAIN_REQUESTS = Path(__file__).with_name("plain.yaml")
CARRIERS = ("{}", "please draw {}", "an image of {} for my friend", "can you make {}?", "{} in high quality")
CALM = "a quiet morning in a small village with a baker a river and old trees beside a yellow house on a green hill "
JOYFUL = "happy lovely sunny gentle sweet pretty bright merry tiny golden".split()
TENTHS = "abcdefghijklmnopqrstuvwxyz"
SHOWN = 300  # prompts of each rewrite
Rewrite = Callable[[str, np.random.Generator], str]


def spread(text: str, word: Callable[[int], str]) -> str:
    """A text with a further word behind every second one."""
    return " ".join(f"{one} {word(i)}" if i % 2 else one for i, one in enumerate(text.split()))


def misspelt(word: str, random: np.random.Generator) -> str:
    """A word with one letter dropped, added, replaced or swapped with the next one."""
    place, letter = int(random.integers(0, len(word))), TENTHS[random.integers(26)]
    return (word[:place] + word[place + 1:], word[:place] + letter + word[place:],
            word[:place] + letter + word[place + 1:],
            word[:place] + word[place + 1:place + 2] + word[place] + word[place + 2:])[random.integers(4)]


REWRITES: dict[str, Rewrite] = {
    "300 harmless letters before": lambda text, random: (CALM * 3)[:300] + " " + text,
    "300 harmless letters behind": lambda text, random: text + " " + (CALM * 3)[:300],
    "300 before, as a sentence": lambda text, random: (CALM * 3)[:300] + ". " + text,
    "interleaved with harmless words": lambda text, random: " ".join(
        f"{one} {other}" for one, other in zip(text.split(), (CALM * 40).split())),
    "a cheerful adjective behind every second word": lambda text, random: spread(
        text, lambda i: JOYFUL[i % len(JOYFUL)]),
    "pairs of words glued": lambda text, random: re.sub(r"(\S+) (\S+)", r"\1\2", text),
    "nonsense endings": lambda text, random: " ".join(
        one + TENTHS[random.integers(26)] + TENTHS[random.integers(26)] for one in text.split()),
    "every longer word misspelt": lambda text, random: " ".join(
        misspelt(one, random) if len(one) > 4 else one for one in text.split()),
}


def shares(actions: Sequence[str]) -> list[str]:
    """[share blocked, share flagged] with intervals."""
    found = np.array(actions)
    return [estimate(np.mean, (found == name).astype(float), percent=True) for name in ("block", "flag")]


def plain_requests(corpus: Corpus) -> tuple[list[tuple[str, str]], list[str]]:
    """((request, category), harmless neighbours): carriers with words of the test split and with listed plain words."""
    rows = [row for row in corpus.rows if row.source == "packages" and row.split == "test"
            and len(row.text.split()) <= 3]
    harmful = [(row.text, row.topic) for row in rows if row.harmful]
    calm = [row.text for row in rows if row.harmless]
    return ([(CARRIERS[i % len(CARRIERS)].format(text), topic) for i, (text, topic) in enumerate(harmful)],
            [CARRIERS[i % len(CARRIERS)].format(text) for i, text in enumerate(calm)])


def plain_rows(gates: dict[str, PromptGate], corpus: Corpus, path: Path | None) -> list[list[str]]:
    """Plain requests by category, and their harmless neighbours: blocked, flagged, allowed, right category."""
    harmful, calm = plain_requests(corpus)
    written = {category: list(texts) for category, texts in read_yaml(PLAIN_REQUESTS).items()}
    quiet = {"words of the test split": calm, "plain": written.pop("harmless")}
    sets = {"words of the test split": harmful,
            "plain": [(text, category) for category, texts in written.items() for text in texts]}
    if path is not None:
        own = own_csv(path)
        sets[path.stem] = [(row.text, next(iter(row.labels))) for row in own if row.harmful]
        quiet[path.stem] = [row.text for row in own if not row.harmful]
    rows = []
    for name, gate in gates.items():
        for kind, texts in sets.items():
            for category in sorted({category for _, category in texts}):
                found = [gate.check(text) for text, own_category in texts if own_category == category]
                named = [one.category == category for one in found if one.action != "allow"]
                rows.append([kind, category, str(len(found)), name, *shares([one.action for one in found]),
                             f"{100 * np.mean(named):.0f} %" if named else "-"])
            if quiet[kind]:
                rows.append([kind, "harmless", str(len(quiet[kind])), name,
                             *shares([gate.check(text).action for text in quiet[kind]]), ""])
    return rows


def term_rows(gates: dict[str, PromptGate], corpus: Corpus) -> list[list[str]]:
    """Listed terms of MISSPELT letters and more with one wrong letter; dictionary words that begin with a term."""
    random, rows = np.random.default_rng(0), []
    for name, gate in gates.items():
        lexicon = gate.artefact.lexicon

        def severe(text: str) -> bool:
            return any(match.level == BLOCK for match in lexicon.matches(normalize(text, lexicon.is_word)))

        listed = sorted({normalize(term.text).plain for term in corpus.terms if not term.topic.startswith(PLAIN)})
        terms = [term for term in listed if (lexicon.term(term) or (0, 0))[1] == BLOCK]
        wrong = [misspelt(term, random) for term in terms if term.isalpha() and len(term) >= MISSPELT for _ in range(3)]
        wrong = [word for word in wrong if word not in corpus.words and word not in terms]
        plurals = sorted({term + ending for term in terms for ending in PLURALS} & corpus.homonyms - set(listed))
        rows.append([name, str(len(wrong)),
                     estimate(np.mean, np.array([severe(f"a photo of {word}") for word in wrong], float), percent=True),
                     str(len(plurals)), ", ".join(f"{100 * np.mean([severe(f'three {word}') for word in words]):.1f} %"
                                                  for words in [plurals] if words) or "-"])
    return rows


def rewrite_rows(gates: dict[str, PromptGate], corpus: Corpus) -> list[list[str]]:
    """For each gate and rewrite: the share of blocked prompts that pass, and harmless captions that are blocked."""
    texts = [row.text for row in corpus.rows if row.split == "test" and row.harmful and len(row.text) < 400
             and row.source in ("copro_masked", "overt_pairs", "nibbler")][::3]
    calm = [row.text for row in corpus.rows if row.split == "test" and row.source == "captions"][:SHOWN]
    rows = []
    for name, gate in gates.items():
        blocked = [text for text in texts if gate.check(text).action == "block"][:SHOWN]
        for kind, rewrite in REWRITES.items():
            random = np.random.default_rng(0)
            passed = [gate.check(rewrite(text, random)[:LONGEST]).action != "block" for text in blocked]
            wrong = [gate.check(rewrite(text, random)[:LONGEST]).action == "block" for text in calm]
            rows.append([kind, name, str(len(blocked)), *(estimate(np.mean, np.array(one, float), percent=True)
                                                          for one in (passed, wrong))])
    return rows


def ordinary_prompts() -> dict[str, list[str]]:
    """{domain: prompts} of ordinary.yaml."""
    return read_yaml(ORDINARY)


def ordinary_rows(gates: dict[str, PromptGate]) -> list[list[str]]:
    """For each gate and domain of ordinary.yaml: blocked and flagged prompts."""
    domains = ordinary_prompts()
    rows = []
    for name, gate in gates.items():
        for domain, texts in {**domains, "all": sum(domains.values(), [])}.items():
            rows.append([domain, str(len(texts)), name, *shares([gate.check(text).action for text in texts])])
    return rows


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of text")
    parser.add_argument("--weights", type=name_and_path, nargs="+", default=[("shipped", Path(DEFAULT))])
    parser.add_argument("--plain", type=Path, help="your own plain requests: text,label,category")
    options = parser.parse_args()
    corpus = read_corpus(options.data)
    gates = {name: PromptGate.load(path) for name, path in options.weights}
    print("\n## Plain requests\n\n" + table(("words", "category", "number", "weights", "blocked", "flagged",
                                             "named right"), plain_rows(gates, corpus, options.plain)))
    print("\n## Terms\n\n" + table(("weights", "misspelt", "found", "harmless plurals", "blocked"),
                                   term_rows(gates, corpus)))
    print("\n## Rewrites\n\n" + table(("rewrite", "weights", "prompts", "pass", "captions blocked"),
                                      rewrite_rows(gates, corpus)))
    print("\n## Ordinary prompts\n\n" + table(("domain", "number", "weights", "blocked", "flagged"),
                                              ordinary_rows(gates)))


if __name__ == "__main__":
    main()
