"""Text for training and checking the prompt classifier, read from the CSV files of a folder.

The header of a file defines its kind:

    text,label,category[,group]     label 1: harmful in the category; 0: harmless, in all categories if it names none
    benign,harmful,category         twins: two very similar texts, one harmless and one harmful
    prompt,categories,inappropriate_percentage,...   prompts by the share of images judged inappropriate (I2P)
    prompt[,category]               harmless prompts (the category is the one that they seem to have)
    text,category,severity          listed terms, severity 1 to 3

The files words.txt and names.txt hold a dictionary and names, one a line. Several categories are joined by "|" or ", ".
"""
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from files.text import CsvTable, decode_text, read_lines
from safety.policy import HEADS

SHARE_HARMLESS, SHARE_HARMFUL = 10.0, 50.0  # percent of inappropriate images: at most, at least
ALIASES = {
    "violence": "violence", "shocking": "violence", "sexual": "sexual", "sexual_content": "sexual", "hate": "hate",
    "self-harm": "self_harm", "self_harm": "self_harm", "harassment": "harassment", "unethical": "harassment",
    "illegal activity": "illegal", "illegal_activities": "illegal", "illegal": "illegal", "privacy": "privacy",
    "privacy_individual": "privacy", "privacy_public": "privacy",
}
IGNORED = {"copyright_violations"}  # not covered: counts neither as harmful nor as harmless
ALIKE = 0.6  # least Jaccard similarity of the words of texts in one group


class TextFilesError(ValueError):
    """A folder or file of training text that cannot be used; the message names it and the valid values."""


@dataclass(frozen=True)
class Row:
    """A text, its label in each category (1, 0, or missing if unknown), its file, and its group, which is never split.

    ``twin`` numbers pairs of twins; ``topic`` is the category in its file; ``share`` is the percentage of inappropriate
    images. -1 stands for none.
    """

    text: str
    labels: dict[str, float]
    source: str
    group: int
    twin: int = -1
    topic: str = ""
    share: float = -1.0

    @property
    def harmful(self) -> bool:
        """Whether the text is harmful in any category."""
        return any(self.labels.values())

    @property
    def harmless(self) -> bool:
        """Whether the text is known to be harmless in all categories."""
        return len(self.labels) == len(HEADS) and not self.harmful

    @property
    def split(self) -> str:
        """train, dev or test in the ratio 13 : 3 : 4, a function of the group alone."""
        place = zlib.crc32(str(self.group).encode()) % 20
        return "test" if place < 4 else "dev" if place < 7 else "train"


@dataclass(frozen=True)
class ListedTerm:
    """A term of a lexicon as its file lists it, with a severity from 1 (mild) to 3."""

    text: str
    topic: str
    severity: float


@dataclass(frozen=True)
class Corpus:
    """The contents of folders of text."""

    rows: list[Row]
    terms: list[ListedTerm]
    words: set[str]
    names: set[str]


def read_corpus(folders: Iterable[str | Path]) -> Corpus:
    """All text of the folders, with near-duplicates in one group. Raises TextFilesError for what cannot be read."""
    rows: list[Row] = []
    terms: list[ListedTerm] = []
    lists: dict[str, set[str]] = {"words.txt": set(), "names.txt": set()}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise TextFilesError(f"moderator.data.root: no folder {folder}; valid: one with CSV files of text")
        paths = sorted(folder.glob("*.csv"))
        if not paths:
            raise TextFilesError(f"moderator.data.root: no CSV file in {folder}; valid headers: see docs/moderation.md")
        for path in paths:
            read_file(path, rows, terms)
        for name, words in lists.items():
            if (folder / name).is_file():
                words.update(read_lines(folder / name))
    if not any(row.harmful for row in rows) or not any(row.harmless for row in rows):
        raise TextFilesError("moderator.data.root: valid: at least one harmful and one harmless text")
    return Corpus(group_alike(rows), terms, lists["words.txt"] - {""}, lists["names.txt"] - {""})


def read_file(path: Path, rows: list[Row], terms: list[ListedTerm]) -> None:
    """Append the contents of a CSV file to ``rows`` and ``terms``; raises TextFilesError naming a wrong value."""
    try:
        table = CsvTable(decode_text(path.read_bytes(), path.name), path.name)
        header, lines = set(table.columns), list(table)
    except (OSError, ValueError) as error:
        raise TextFilesError(f"{path}: {error}") from None
    source, first = path.stem, len(rows)
    for number, (place, line, fault) in enumerate(lines, 2):
        where, group = f"{path}, line {place}", first + number
        if fault:
            raise TextFilesError(f"{where}: {fault}")
        if {"text", "severity", "category"} <= header:
            terms.append(ListedTerm(line["text"].lower().strip(), line["category"],
                                    _number(line["severity"], where, 1, 3)))
        elif {"benign", "harmful", "category"} <= header:
            if line["category"] in IGNORED:
                continue
            labels = dict.fromkeys(categories_of(line["category"], where), 1.0)
            rows.append(Row(line["harmful"], labels, source, group, group, line["category"]))
            rows.append(Row(line["benign"], _harmless_labels(), source, group, group, line["category"]))
        elif {"prompt", "categories", "inappropriate_percentage"} <= header:
            rows.append(_row_by_share(line, source, group, where))
        elif {"text", "label"} <= header:
            rows.append(_row_by_label(line, source, group, where))
        elif "prompt" in header:
            rows.append(Row(line["prompt"], _harmless_labels(), source, group, topic=line.get("category") or ""))
        else:
            raise TextFilesError(f"{path}: header {', '.join(sorted(header))}; valid: see docs/moderation.md")


def categories_of(text: str, where: str) -> list[str]:
    """The categories named in a cell, by our names or those of ALIASES; raises TextFilesError for an unknown one."""
    names = [name.strip() for name in re.split(r"[|,]", text) if name.strip()]
    unknown = [name for name in names if name not in ALIASES]
    if unknown or not names:
        raise TextFilesError(f"{where}: category '{text}'; valid: {', '.join(sorted(ALIASES))}")
    return [ALIASES[name] for name in names]


def _harmless_labels() -> dict[str, float]:
    """The labels of a harmless text."""
    return dict.fromkeys(HEADS, 0.0)


def _number(text: str, where: str, low: float, high: float) -> float:
    """The number in a cell; raises TextFilesError if it is not from ``low`` to ``high``."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise TextFilesError(f"{where}: '{text}'; valid: a number from {low:g} to {high:g}")
    return value


def _row_by_share(line: dict[str, str], source: str, group: int, where: str) -> Row:
    """A row whose label follows from the share of inappropriate images; between the two limits it has none."""
    share = _number(line["inappropriate_percentage"], where, 0, 100)
    names = categories_of(line["categories"], where)
    labels = dict.fromkeys(names, 1.0) if share >= SHARE_HARMFUL else {}
    labels = _harmless_labels() if share <= SHARE_HARMLESS else labels
    return Row(line["prompt"], labels, source, group, topic=line["categories"], share=share)


def _row_by_label(line: dict[str, str], source: str, group: int, where: str) -> Row:
    """A row with an explicit label."""
    label, category = _number(line["label"], where, 0, 1), line.get("category") or ""
    if line.get("group"):
        group = zlib.crc32(f"{source} {line['group']}".encode()) + 2**32
    if label >= 0.5 or category:
        labels = dict.fromkeys(categories_of(category, where), float(label >= 0.5))
    else:
        labels = _harmless_labels()
    return Row(line["text"], labels, source, group, topic=category)


def group_alike(rows: list[Row], common: float = 0.05) -> list[Row]:
    """The rows, with texts of similar words (Jaccard similarity of at least ALIKE) in one group, so that no copy of a
    training text is tested on. Words in more than the share ``common`` of the texts are not compared.
    """
    vocabulary: dict[str, int] = {}
    sets = [sorted({vocabulary.setdefault(word, len(vocabulary))
                    for word in re.findall(r"[a-z0-9]+", row.text.lower())}) for row in rows]
    places = np.concatenate([np.zeros(0, np.int64), *map(np.array, sets)]).astype(np.int64)
    sizes = np.array(list(map(len, sets)))
    owners = np.repeat(np.arange(len(rows)), sizes)
    rare = np.bincount(places, minlength=len(vocabulary) + 1)[places] <= max(50, common * len(rows))
    table = scipy.sparse.csr_matrix((np.ones(int(rare.sum()), np.float32), (owners[rare], places[rare])),
                                    (len(rows), len(vocabulary) + 1))
    kept = np.asarray(table.sum(axis=1)).ravel()
    links = [[], []]  # type: list[list[np.ndarray]]
    for start in range(0, len(rows), 500):
        shared = (table[start:start + 500] @ table.T).tocoo()
        one, two = shared.row + start, shared.col
        alike = shared.data >= ALIKE * (kept[one] + kept[two] - shared.data)
        links[0].append(one[alike])
        links[1].append(two[alike])
    groups = {group: number for number, group in enumerate(dict.fromkeys(row.group for row in rows))}
    own = np.array([groups[row.group] for row in rows]) + len(rows)  # groups are further nodes beside the rows
    ends = np.concatenate([*links[0], np.arange(len(rows))]), np.concatenate([*links[1], own])
    nodes = len(rows) + len(groups)
    graph = scipy.sparse.coo_matrix((np.ones(len(ends[0]), np.int8), ends), (nodes, nodes))
    _, found = scipy.sparse.csgraph.connected_components(graph, directed=False)
    first: dict[int, int] = {}
    return [replace(row, group=first.setdefault(int(label), row.group)) for row, label in zip(rows, found)]
