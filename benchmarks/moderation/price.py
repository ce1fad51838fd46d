"""The operator's tables: how much harm is stopped at which price, what a mode changes, and what a score means.

    python -m benchmarks.moderation.price --data DIR [DIR ...] [--weights FILE]

The rows are those of the test split. The price is the share of real prompts that is blocked: all thresholds are moved
together until it is reached. Calibration is measured on mixtures with a given share of harmful texts, with the prior of
the gate left alone and set to that share.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.moderation.held_out import KINDS, Judgements, by_group, kind_of
from benchmarks.moderation.metrics import calibration_error, estimate, table
from safety.gate import PromptGate
from safety.policy import HEADS, Policy
from safety.prompt import DEFAULT
from training.moderation.corpus import read_corpus
from training.moderation.rows import Row

PRICES = (0.003, 0.01, 0.03)
MIXTURES = (0.01, 0.1, 0.5)
CAPTIONS = ("copro_masked", "nibbler")  # files whose words show the harm


def price_rows(rows: Sequence[Row], judged: Judgements) -> list[list[str]]:
    """[kind, number, share stopped at each price, share blocked and share flagged by the shipped thresholds]."""
    groups = np.array([row.group for row in rows])
    kinds = np.array([kind_of(row) if row.harmful and row.source in CAPTIONS else "" for row in rows])
    real = np.flatnonzero(np.array([row.source for row in rows]) == "real_prompts")
    limits = [np.quantile(judged.margin[real], 1 - price, method="higher") for price in PRICES]
    lines = []
    for kind in KINDS:
        places = np.flatnonzero(kinds == kind)
        if len(places) < 10:
            continue
        lines.append([kind, str(len(places)),
                      *(by_group(lambda at: float((judged.margin[at] > limit).mean()), places, groups)
                        for limit in limits),
                      *(by_group(lambda at: float((judged.action[at] == name).mean()), places, groups)
                        for name in ("block", "flag"))])
    lines.append(["real prompts", str(len(real)), *(f"{100 * price:g} %" for price in PRICES),
                  *(by_group(lambda at: float((judged.action[at] == name).mean()), real, groups)
                    for name in ("block", "flag"))])
    return lines


def mixture_rows(rows: Sequence[Row], judged: Judgements, policy: Policy) -> list[list[str]]:
    """[category, number, calibration error in each mixture with the prior left alone, and with the prior set]."""
    random, lines = np.random.default_rng(0), []
    for place, name in enumerate(HEADS):
        labels = np.array([row.labels.get(name, np.nan) for row in rows])
        ones, zeros = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        if len(ones) < 20:
            continue
        line = [name, str(len(ones))]
        for prior in (False, True):
            for share in MIXTURES:
                size = min(len(zeros), int(len(ones) * (1 - share) / share))
                harmful = random.choice(ones, max(1, min(len(ones), round(size * share / (1 - share)))), replace=False)
                places = np.concatenate([harmful, random.choice(zeros, size, replace=False)])
                moved = policy.with_prior(share if prior else None)
                scores = np.array([moved.at_prior(float(judged.score[i, place]), name) for i in places])
                line.append(estimate(lambda both: calibration_error(both[:, 0], both[:, 1]),
                                     np.stack([scores, labels[places]], axis=1)))
        lines.append(line)
    return lines


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of text")
    parser.add_argument("--weights", type=Path, default=DEFAULT)
    options = parser.parse_args()
    rows = [row for row in read_corpus(options.data).rows if row.labels and row.split == "test"]
    gate = PromptGate.load(options.weights)
    judged = Judgements(gate, rows)
    print("\n## Harm stopped, by the share of real prompts that is blocked\n\n" + table(
        ("harm", "number", *(f"{100 * price:g} %" for price in PRICES), "shipped, blocked", "shipped, flagged"),
        price_rows(rows, judged)))
    shares = [f"{100 * share:g} % harmful" for share in MIXTURES]
    print("\n## Calibration error by mixture\n\n" + table(
        ("category", "harmful", *shares, *(f"{share}, prior set" for share in shares)),
        mixture_rows(rows, judged, gate.artefact.policy)))


if __name__ == "__main__":
    main()
