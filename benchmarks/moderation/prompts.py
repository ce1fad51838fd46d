"""The tables of docs/moderation.md: the prompt classifier on text that it was not trained on.

    python -m benchmarks.moderation.prompts --data DIR [DIR ...] [--left-out NAME=FILE ...] [--more NAME=FILE ...]
    python -m benchmarks.moderation.prompts --csv FILE.csv            your own text: text,label,category

`--left-out i2p=FILE` names weights that were trained without that source, which are then tested on all of it. `--more
"no twins=FILE"` names other weights for the ablation, `--run RUN` a run folder with a head on its text encoder. With
`--peers-python` and `--peers-node` other filters are run on the same text. `--card` writes the figures by category into
the card beside the weights.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.moderation.metrics import auc, calibration_error, estimate, match_lengths, recall_at, table
from benchmarks.moderation.peers import peer_answers
from benchmarks.moderation.rules import obfuscation_table, trap_table
from benchmarks.moderation.time import time_tables
from files.text import CsvTable, decode_text
from files.whole import write_text
from pipeline.text_head import EncoderHead
from safety.gate import PromptGate
from safety.normalize import LONGEST, normalize
from safety.policy import HEADS, noisy_or
from safety.prompt import DEFAULT
from training.moderation.corpus import ALIASES, Corpus, alias, read_corpus
from training.moderation.rows import Row

TOPICS = {"sexual": "sexual", "violence": "violence", "disturbing": "shocking", "illegal": "illegal activity",
          "hate": "hate", "self-harm": "self-harm", "harassment": "harassment"}
PARTS = ("rules", "network", "all")
PEERS = ("peer", *(f"I2P {name}" for name in TOPICS), "harmful captions", "harmful prompts of people", "twins, harmful",
         "real prompts", "risky-sounding")


class Judged:
    """Rows and the decisions of one gate on them: ``score[part]`` (B,), ``action`` (B,), ``head`` (B, K)."""

    def __init__(self, gate: PromptGate, rows: list[Row]):
        self.rows = rows
        self.length = np.array([len(row.text) for row in rows])
        found = [gate.check(row.text[:LONGEST]) for row in rows]
        self.action = np.array([decision.action for decision in found])
        self.head = np.array([[decision.scores.get(name, 1.0) for name in HEADS] for decision in found])
        rules = np.array([decision.action == "block" and decision.reason == "rule" for decision in found], float)
        network = np.array([noisy_or(scores.tolist()) for scores in self.head])
        self.score = {"rules": rules, "network": network, "all": np.maximum(network, 2 * rules),
                      "length": self.length.astype(float)}

    def places(self, *, source: str = "", topic: str = "", share: float = -1,
               harmless: bool | None = None) -> np.ndarray:
        """Indices of the rows of a source (a file) with a topic and at least a share of inappropriate images."""
        return np.array([i for i, row in enumerate(self.rows)
                         if source in ("", row.source) and topic in row.topic and row.share >= share
                         and (harmless is None or row.harmless == harmless)], int)


def ranking(positives: np.ndarray, near: np.ndarray, negatives: np.ndarray) -> list[str]:
    """[AUC against negatives of near lengths, AUC against all, recall at 1 %, recall at 5 % against near lengths]."""
    return [estimate(auc, positives, near), estimate(auc, positives, negatives),
            *(estimate(lambda a, b: recall_at(a, b, rate), positives, near) for rate in (0.01, 0.05))]


def ranking_rows(judged: Judged, scores: np.ndarray, share: float) -> list[list[str]]:
    """AUC and recall by category: I2P prompts of at least ``share`` against real prompts of their lengths."""
    negatives, rows = judged.places(source="real_prompts", harmless=True), []
    for name, topic in TOPICS.items():
        positives = judged.places(source="i2p", topic=topic, share=share)
        near = negatives[match_lengths(judged.length[positives], judged.length[negatives])]
        if len(positives) < 10 or len(near) < 10:
            continue
        p, n = scores[positives], scores[near]
        rows.append([name, str(len(p)), str(len(n)), *ranking(p, n, scores[negatives]),
                     estimate(auc, judged.length[positives].astype(float), judged.length[near].astype(float))])
    return rows


RANKING = ("category", "harmful", "harmless", "AUC, lengths matched", "AUC, unmatched", "recall at 1 %",
           "recall at 5 %", "length alone")


def twins(judged: Judged, scores: np.ndarray) -> list[str]:
    """[number, AUC, ordered right, ordered right if the harmful text is not longer, harmful texts blocked]."""
    pairs: dict[int, dict[bool, int]] = {}
    for place, row in enumerate(judged.rows):
        if row.twin >= 0:
            pairs.setdefault(row.twin, {})[row.harmful] = place
    both = np.array([[pair[True], pair[False]] for pair in pairs.values() if len(pair) == 2]).reshape(-1, 2)
    if len(both) < 10:
        return ["-"] * 5
    harmful, harmless = scores[both[:, 0]], scores[both[:, 1]]
    right = (harmful > harmless).astype(float)
    short = right[judged.length[both[:, 0]] <= judged.length[both[:, 1]]]
    blocked = (judged.action[both[:, 0]] == "block").astype(float)
    return [str(len(both)), estimate(auc, harmful, harmless), estimate(np.mean, right),
            f"{estimate(np.mean, short)} of {len(short)}", estimate(np.mean, blocked, percent=True)]


def share_rows(judged: Judged) -> list[list[str]]:
    """The shares of harmless text that are blocked and flagged, by file."""
    rows = []
    for source in sorted({row.source for row in judged.rows if row.harmless}):
        action = judged.action[judged.places(source=source, harmless=True)]
        rows.append([source, str(len(action)), *(estimate(np.mean, (action == name).astype(float), percent=True)
                                                 for name in ("block", "flag"))])
    return rows


def calibration_rows(judged: Judged) -> list[list[str]]:
    """Expected calibration error by category: on all text with a known label, and on a mixture that is half harmful."""
    random, rows = np.random.default_rng(0), []
    for place, name in enumerate(HEADS):
        labels = np.array([row.labels.get(name, np.nan) for row in judged.rows])
        known, scores = np.isfinite(labels), judged.head[:, place]
        ones, zeros = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        if len(ones) < 10:
            continue
        even = np.concatenate([ones, random.choice(zeros, min(len(ones), len(zeros)), replace=False)])
        rows.append([name, *(estimate(lambda both: calibration_error(both[:, 0], both[:, 1]),
                                      np.stack([scores[places], labels[places]], axis=1)) for places in (known, even))])
    return rows


def peer_rows(judged: Judged, options: argparse.Namespace) -> list[list[str]]:
    """The shares that peers and this gate flag or block, of harmful text by category and of harmless text."""
    kept = np.array([i for i, row in enumerate(judged.rows)
                     if row.source != "captions" and (row.share < 0 or row.share >= 50)])
    texts = [judged.rows[i].text for i in kept]
    answers: dict[str, list[bool] | str] = dict(peer_answers(texts, options.peers_python, options.peers_node))
    answers["this, blocked"] = (judged.action[kept] == "block").tolist()
    answers["this, blocked or flagged"] = (judged.action[kept] != "allow").tolist()
    rows = []
    for name, answer in answers.items():
        if isinstance(answer, str):
            rows.append([name, answer, *["-"] * (len(PEERS) - 2)])
            continue
        hit = np.zeros(len(judged.rows))
        hit[kept] = answer
        places = [judged.places(source="i2p", topic=topic, share=50) for topic in TOPICS.values()]
        places += [np.array([i for i in judged.places(source=source) if judged.rows[i].harmful], int)
                   for source in ("copro_masked", "nibbler", "overt_pairs")]
        places += [judged.places(source="real_prompts"), judged.places(source="overt_benign_edge")]
        rows.append([name, *(f"{100 * hit[at].mean():.1f} %" if len(at) else "-" for at in places)])
    return rows


def own_csv(path: Path) -> list[Row]:
    """The rows of a CSV file with text, label (0 or 1) and category; raises ValueError naming what is missing."""
    table = CsvTable(decode_text(path.read_bytes(), str(path)), str(path))
    if not {"text", "label"} <= set(table.columns):
        raise ValueError(f"{path}: header {table.columns or 'of nothing'}; valid: text,label,category")
    rows: list[Row] = []
    for place, line, fault in table:
        if fault or not line["text"].strip() or not line["label"].strip():
            raise ValueError(f"{path}, line {place}: {fault or 'no text or no label; valid: text,label,category'}")
        number = len(rows)
        harmful = line["label"].strip() in ("1", "1.0", "true", "harmful")
        name = ALIASES.get(alias(line.get("category") or ""), "")
        labels = {name: 1.0} if harmful and name else {"": 1.0} if harmful else dict.fromkeys(HEADS, 0.0)
        rows.append(Row(line["text"], labels, path.stem, number, topic=(line.get("category") or "").strip()))
    return rows


def report_csv(gate: PromptGate, path: Path, options: argparse.Namespace) -> None:
    """Print the figures on the user's own text: by category, by what decides, calibration, harmless text."""
    rows = own_csv(path)
    judged = Judged(gate, rows)
    negatives = judged.places(harmless=True)
    if len(negatives) < 10 or len(negatives) == len(rows):
        raise ValueError(f"{path}: {len(rows) - len(negatives)} harmful and {len(negatives)} harmless texts; valid: at "
                         "least one and ten")

    def line(name: str, found: Judged, part: str, topic: str) -> list[str]:
        score = found.score[part]
        positives = np.array([i for i in found.places(topic=topic) if found.rows[i].harmful], int)
        near = negatives[match_lengths(found.length[positives], found.length[negatives])]
        near = near if len(near) else negatives
        p, n = score[positives], score[near]
        blocked = (found.action[positives] == "block").astype(float)
        return [name, str(len(p)), str(len(n)), *ranking(p, n, score[negatives]),
                estimate(np.mean, blocked, percent=True)]

    header = ("harmful", "harmless", *RANKING[3:7], "blocked")
    topics = sorted({row.topic for row in rows if row.harmful})
    print(table(("category", *header), [line(topic or "none", judged, "all", topic) for topic in topics]))
    others = [line(name, Judged(PromptGate.load(weights), rows), "all", "") for name, weights in options.more]
    print("\n" + table(("what decides", *header),
                       [*(line(part, judged, part, "") for part in (*PARTS, "length")), *others]))
    print("\n" + table(("harmless text", "number", "blocked", "flagged"), share_rows(judged)))
    print("\n" + table(("calibration error", "all text", "half harmful"), calibration_rows(judged)))


ABLATION = ("what decides", "twins", "AUC", "ordered right", "where not longer", "blocked", *list(TOPICS)[:4])


def ablation_row(name: str, judged: Judged, part: str = "all") -> list[str]:
    """Twins and the first four categories of I2P, decided by one part of the gate."""
    score = judged.score[part]
    return [name, *twins(judged, score), *(row[3] for row in ranking_rows(judged, score, 50)[:4])]


def ablation_rows(judged: Judged, options: argparse.Namespace) -> list[list[str]]:
    """Each part alone, other weights, and the gate with a head on the text encoder of a run."""
    rows = [ablation_row(part, judged, part) for part in (*PARTS, "length")]
    short = [row for row in judged.rows if row.source != "captions"]
    for name, path in options.more:
        rows.append(ablation_row(name, Judged(PromptGate.load(path), short)))
    if options.run:
        head = EncoderHead.of_run(options.run)
        both = Judged(PromptGate.load(options.weights, encoder=head), short)
        both.score["encoder"] = np.array([noisy_or(list(head(normalize(row.text[:LONGEST]).plain).values()))
                                          for row in short])
        rows += [ablation_row("encoder alone", both, "encoder"), ablation_row("all and encoder", both)]
        print("\n## Harmless text, with the encoder\n")
        print(table(("file", "number", "blocked", "flagged"), share_rows(both)))
    return rows


def write_card(weights: Path, judged: Judged) -> None:
    """Write the figures by category into the card beside the weights."""
    path = weights.with_suffix(".json")
    card = json.loads(path.read_text(encoding="utf-8"))
    found = twins(judged, judged.score["all"])
    card["figures"] = {
        "what": "test split, 95 % bootstrap intervals; docs/moderation.md has all tables",
        "prompts of I2P from 50 % inappropriate images up, against real prompts of their lengths": {
            row[0]: dict(zip(RANKING[1:], row[1:])) for row in ranking_rows(judged, judged.score["all"], 50)},
        "twins": dict(zip(ABLATION[1:6], found)),
        "harmless text": {row[0]: {"number": row[1], "blocked": row[2], "flagged": row[3]} for row in
                          share_rows(judged)},
        "calibration error": {row[0]: {"all text": row[1], "half harmful": row[2]} for row in calibration_rows(judged)}}
    write_text(path, json.dumps(card, indent=1) + "\n")
    print(f"figures written to {path}")


def report(gate: PromptGate, corpus: Corpus, options: argparse.Namespace) -> None:
    """Print all tables, on the test split of the corpus and on the sources left out."""
    judged = Judged(gate, [row for row in corpus.rows if row.split == "test"])
    if options.card:
        write_card(options.weights, judged)
    for share in (50, 80):
        print(f"\n## Test split, I2P from {share} % inappropriate images up\n")
        print(table(RANKING, ranking_rows(judged, judged.score["all"], share)))
    print("\n## Harmless text\n\n" + table(("file", "number", "blocked", "flagged"), share_rows(judged)))
    print("\n## Calibration error\n\n" + table(("category", "all text", "half harmful"), calibration_rows(judged)))
    print("\n## Twins and ablation\n\n" + table(ABLATION, ablation_rows(judged, options)))
    for name, path in options.left_out:
        sources = name.split("+")
        chosen = [row for row in corpus.rows if row.source in sources
                  or row.split == "test" and row.source != "captions"]
        other = Judged(PromptGate.load(path), chosen)
        print(f"\n## Trained without {name}, tested on all of it\n")
        print(table(RANKING, ranking_rows(other, other.score["all"], 50)) if "i2p" in sources else table(
            ("twins", "AUC", "ordered right", "where not longer", "blocked"), [twins(other, other.score["all"])]))
        print("\n" + table(("file", "number", "blocked", "flagged"), share_rows(other)))
    print("\n## Peers: share flagged\n\n" + table(
        PEERS, peer_rows(judged, options)))
    print("\n" + obfuscation_table(gate, corpus) + "\n\n" + trap_table(gate, corpus))
    prompts = [row.text[:LONGEST] for row in judged.rows if row.source in ("i2p", "real_prompts")][:600]
    print(f"\n## Time\n\n{time_tables(gate, prompts)}")
    print(f"\nsize: {options.weights.stat().st_size / 1e6:.2f} MB")


def name_and_path(text: str) -> tuple[str, Path]:
    """The parts of an argument NAME=FILE."""
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"'{text}'; valid: NAME=FILE of weights")
    return name, Path(path)


def main(arguments: list[str]) -> None:
    """Print the tables for a corpus or for the user's own text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="folders of text")
    parser.add_argument("--csv", type=Path, help="your own text")
    parser.add_argument("--weights", type=Path, default=DEFAULT)
    parser.add_argument("--left-out", type=name_and_path, nargs="*", default=[])
    parser.add_argument("--more", type=name_and_path, nargs="*", default=[])
    parser.add_argument("--run", type=Path, help="run folder with a head on its text encoder")
    parser.add_argument("--card", action="store_true", help="write figures into the card beside the weights")
    parser.add_argument("--peers-python", type=Path)
    parser.add_argument("--peers-node", type=Path)
    options = parser.parse_args(arguments)
    gate = PromptGate.load(options.weights)
    if options.csv:
        report_csv(gate, options.csv, options)
    elif options.data:
        report(gate, read_corpus(options.data), options)
    else:
        raise ValueError("no text; valid: --data DIR or --csv FILE")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
