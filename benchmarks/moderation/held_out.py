"""Harm stopped and harmless text blocked, on held-out groups of the training text, by several files of weights.

    python -m benchmarks.moderation.held_out --data DIR [DIR ...] [--weights NAME=FILE ...]

All weights are judged on the same rows: those of the test split, whose groups no training run reads. "At 1 %" moves all
thresholds together, on the scale of log odds, until 1 % of the real prompts of the test split are blocked, so that
weights with other thresholds can be compared. Intervals are bootstrapped over groups, because twins and copies are not
independent.
"""
import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.moderation.metrics import auc, table
from benchmarks.moderation.prompts import name_and_path
from safety import parts
from safety.gate import PromptGate
from safety.normalize import LONGEST, normalize
from safety.parts import judged_texts
from safety.policy import HEADS
from safety.prompt import DEFAULT
from training.moderation.artefact import BLOCKING, NEVER
from training.moderation.corpus import categories_of, read_corpus
from training.moderation.rows import Row

RULE = 60.0  # the margin of a text that a rule blocks: above that of every score
KINDS = ("sexual", "violence", "shocking", "hate", "self_harm", "harassment", "illegal", "privacy")


class Judgements:
    """The decisions of one gate on rows: action and category of each, and its margin, which is the largest distance of
    a score above its threshold in log odds."""

    def __init__(self, gate: PromptGate, rows: Sequence[Row]):
        found = [gate.check(row.text[:LONGEST]) for row in rows]
        self.action = np.array([decision.action for decision in found])
        self.category = np.array([decision.category for decision in found])
        policy = gate.artefact.policy

        def margin(text: str, scores: Mapping[str, float]) -> float:
            limits = policy.limits_for(number_of_words(gate, text))
            return max((_log_odds(scores[name]) - _log_odds(limits[name].block) for name in BLOCKING
                        if limits[name].block < min(1.0, NEVER)), default=-RULE)

        self.margin = np.array([RULE if decision.action == "block" and decision.reason != "score"
                                else margin(row.text, decision.scores) for row, decision in zip(rows, found)])
        self.score = np.array([[decision.scores.get(name, 1.0) for name in HEADS] for decision in found])


def number_of_words(gate: PromptGate, text: str) -> int:
    """The number of words of a text as the gate reads it, by which it chooses its thresholds."""
    read = normalize(text[:LONGEST], longest=10**6, with_readings=False)
    return parts.number_of_words(judged_texts(read, gate.artefact.spelling, gate.artefact.lexicon.is_word))


def _log_odds(probability: float) -> float:
    kept = min(max(probability, 1e-9), 1 - 1e-9)
    return float(np.log(kept / (1 - kept)))


def by_group(statistic: Callable[[np.ndarray], float], places: np.ndarray, groups: np.ndarray, percent: bool = True,
             resamples: int = 300) -> str:
    """A statistic of the rows at ``places`` with a 95 % interval from resampled groups, as text."""
    if len(places) < 10:
        return "-"
    random, own = np.random.default_rng(0), groups[places]
    _, first, sizes = np.unique(own, return_index=True, return_counts=True)
    order = np.argsort(own, kind="stable")
    members = np.split(places[order], np.cumsum(sizes)[:-1])
    values = []
    for _ in range(resamples):
        values.append(statistic(np.concatenate([members[i] for i in random.integers(0, len(first), len(first))])))
    low, high = np.nanquantile(values, (0.025, 0.975))
    value, scale = statistic(places), 100 if percent else 1
    if percent:
        return f"{scale * value:.1f} % ({scale * low:.1f}-{scale * high:.1f})"
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def kind_of(row: Row) -> str:
    """The kind of harm of a row: its category, with "shocking" apart from the rest of violence."""
    if row.topic.lower() == "shocking":
        return "shocking"
    return categories_of(row.topic, row.source)[0] if row.topic else ""


def harm_rows(rows: Sequence[Row], found: dict[str, Judgements]) -> list[list[str]]:
    """[file, kind, number, and for each gate: blocked, blocked or flagged, blocked at 1 %, right category named]."""
    groups = np.array([row.group for row in rows])
    kinds = np.array([kind_of(row) if row.harmful else "" for row in rows])
    source = np.array([row.source for row in rows])
    real = np.flatnonzero(source == "real_prompts")
    lines = []
    for file in sorted(set(source[kinds != ""])):
        for kind in KINDS:
            places = np.flatnonzero((source == file) & (kinds == kind))
            if len(places) < 10:
                continue
            line = [file, kind, str(len(places))]
            for one in found.values():
                limit = np.quantile(one.margin[real], 0.99, method="higher")
                blocked, stopped = one.action == "block", one.action != "allow"
                right = np.array([rows[i].labels.get(one.category[i], 0) == 1 for i in range(len(rows))])
                line += [by_group(lambda at: float(blocked[at].mean()), places, groups),
                         f"{100 * stopped[places].mean():.1f} %",
                         by_group(lambda at: float((one.margin[at] > limit).mean()), places, groups),
                         f"{100 * right[places][blocked[places]].mean():.0f} %" if blocked[places].any() else "-"]
            lines.append(line)
    return lines


def harmless_rows(rows: Sequence[Row], found: dict[str, Judgements]) -> list[list[str]]:
    """[file, number, and for each gate: blocked, flagged]: harmless texts, and twins whose own category is harmless."""
    groups = np.array([row.group for row in rows])
    calm = np.array([bool(row.labels) and not row.harmful for row in rows])
    source, lines = np.array([row.source for row in rows]), []
    for file in sorted(set(source[calm])):
        places = np.flatnonzero(calm & (source == file))
        line = [file, str(len(places))]
        for one in found.values():
            line += [by_group(lambda at: float((one.action[at] == name).mean()), places, groups)
                     for name in ("block", "flag")]
        lines.append(line)
    return lines


def twin_rows(rows: Sequence[Row], found: dict[str, Judgements]) -> list[list[str]]:
    """[file, pairs, gate, AUC of the margin over all twins, ordered right]."""
    lines = []
    for file in ("overt_pairs", "copro_masked"):
        pairs: dict[int, dict[bool, int]] = {}
        for place, row in enumerate(rows):
            if row.source == file and row.twin >= 0:
                pairs.setdefault(row.twin, {})[row.harmful] = place
        both = np.array([[pair[True], pair[False]] for pair in pairs.values() if len(pair) == 2]).reshape(-1, 2)
        if len(both) < 10:
            continue
        for name, one in found.items():
            rank = 1 - np.prod(1 - one.score, axis=1) + one.margin * (one.margin >= RULE)
            number = np.arange(len(both))
            lines.append([file, str(len(both)), name,
                          by_group(lambda at: auc(rank[both[at, 0]], rank[both[at, 1]]), number, number, False),
                          by_group(lambda at: float((rank[both[at, 0]] > rank[both[at, 1]]).mean()), number, number)])
    return lines


def ranking_lines(rows: Sequence[Row], found: dict[str, Judgements]) -> list[list[str]]:
    """[category, harmful, harmless, gate, AUC of its own score, recall at 1 %]: harmful rows of a category against all
    harmless rows that are no captions."""
    groups = np.array([row.group for row in rows])
    calm = np.array([row.harmless and row.source not in ("captions", "scenes") for row in rows])
    lines = []
    for k, name in enumerate(HEADS):
        harmful = np.array([row.labels.get(name, 0) == 1 for row in rows])
        places = np.flatnonzero(harmful | calm)
        if harmful.sum() < 10:
            continue
        for gate, one in found.items():
            score = one.score[:, k]

            def recall(at: np.ndarray) -> float:
                return float((score[at[harmful[at]]] > np.quantile(score[at[calm[at]]], 0.99)).mean())

            lines.append([name, str(harmful.sum()), str(calm.sum()), gate,
                          by_group(lambda at: auc(score[at[harmful[at]]], score[at[calm[at]]]), places, groups, False,
                                   100),
                          by_group(recall, places, groups, True, 100)])
    return lines


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of text")
    parser.add_argument("--weights", type=name_and_path, nargs="+", default=[("shipped", Path(DEFAULT))])
    parser.add_argument("--source", nargs="*", default=[], help="judge all rows of these files, not the test split")
    options = parser.parse_args()
    rows = [row for row in read_corpus(options.data).rows if row.labels
            and (row.split == "test" if not options.source else row.source in options.source
                 or row.split == "test" and row.source == "real_prompts")]
    found = {name: Judgements(PromptGate.load(path), rows) for name, path in options.weights}
    names = list(found)
    print("\n## Harm\n\n" + table(("file", "kind", "number", *(f"{name}, {what}" for name in names for what in (
        "blocked", "or flagged", "at 1 %", "named right"))), harm_rows(rows, found)))
    print("\n## Harmless text\n\n" + table(("file", "number", *(f"{name}, {what}" for name in names for what in (
        "blocked", "flagged"))), harmless_rows(rows, found)))
    print("\n## Twins\n\n" + table(("file", "pairs", "weights", "AUC", "ordered right"), twin_rows(rows, found)))
    print("\n## Ranking by category\n\n" + table(("category", "harmful", "harmless", "weights", "AUC", "recall at 1 %"),
                                                 ranking_lines(rows, found)))


if __name__ == "__main__":
    main()
