"""Rows of labelled text, and which of them belong together: twins, near-duplicates, and texts made of other texts.

A group is never split, so that no copy of a training text is tested on.
"""
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from safety.policy import HEADS

ALIKE = 0.6  # least Jaccard similarity of the words of texts in one group
SENTENCE = re.compile(r"(?<=[.!?])\s+")


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


def paired_by_group(rows: list[Row]) -> list[Row]:
    """The rows, with a number for the twins among those with explicit labels: a group of exactly two texts of one file
    and category, of which one is harmful. The numbers are those of the groups, which are unique. Training pushes apart
    only pairs whose harmless text is known to be harmless in all categories."""
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    twins = {group for group, two in found.items() if len(two) == 2 and two[0].twin < 0
             and two[0].topic == two[1].topic != "" and two[0].harmful != two[1].harmful}
    return [replace(row, twin=row.group) if row.group in twins else row for row in rows]


def key_of(text: str) -> str:
    """The words of a text in lower case, by which two copies of it are recognised."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def place_composites(rows: list[Row], common: tuple[str, ...] = ("captions",)) -> list[Row]:
    """The rows, with each text of which at least half the sentences are rows of other files in the split of those. A
    text whose sentences are in different splits is left out, because it would show a test sentence to training.
    Sentences of the ``common`` files do not count in this: a thousand paragraphs share them.
    """
    owner = {key_of(row.text): row for row in reversed(rows) if row.labels}
    found, mixed = [], Counter[str]()
    for row in rows:
        keys = [key_of(sentence) for sentence in SENTENCE.split(row.text)]
        parts = [owner[key] for key in keys if key in owner and owner[key].source != row.source]
        parts = [part for part in parts if part.source not in common] if 2 * len(parts) >= len(keys) > 1 else []
        if len({part.split for part in parts}) > 1:
            mixed[row.source] += 1
            continue
        found.append(replace(row, group=parts[0].group) if parts else row)
    for source, count in sorted(mixed.items()):
        print(f"{source}: {count} texts left out, which hold sentences of two splits")
    return found
