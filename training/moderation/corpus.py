"""Text for training and checking the prompt classifier, read from the CSV files of a folder.

The header of a file defines its kind:

    text,label,category[,group]     label 1: harmful in the category; 0: harmless, in all categories if it names none
    benign,harmful,category         twins: two very similar texts, one harmless and one harmful
    prompt,categories,inappropriate_percentage,...   prompts by the share of images judged inappropriate (I2P)
    prompt[,category]               harmless prompts (the category is the one that they seem to have)
    text,category,severity          listed terms, severity 1 to 3

The files words.txt and names.txt hold a dictionary and names, one a line, and homonyms.txt words that have a harmless
meaning too. A listed term with the category "plain NAME" is no profanity but a plain word of category NAME. Several
categories are joined by "|" or ", " and may be written in any case. Two labelled texts of one group, of which one is
harmful, are twins too.
"""
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from files.text import CsvTable, decode_text, read_lines
from safety.policy import HEADS
from training.moderation.rows import Row, group_alike, paired_by_group, place_composites

SHARE_HARMLESS, SHARE_HARMFUL = 10.0, 50.0  # percent of inappropriate images: at most, at least
ALIASES = {  # names as ``alias`` writes them, with the usual misspellings
    "violence": "violence", "violent": "violence", "shocking": "violence", "sexual": "sexual", "sexaul": "sexual",
    "sexual content": "sexual", "hate": "hate", "hateful": "hate", "self harm": "self_harm", "selfharm": "self_harm",
    "harassment": "harassment", "harrassment": "harassment", "harrasment": "harassment", "harasment": "harassment",
    "unethical": "harassment", "illegal activity": "illegal", "illegal activities": "illegal", "illegal": "illegal",
    "ilegal": "illegal", "privacy": "privacy", "privacy individual": "privacy", "privacy public": "privacy",
}
IGNORED = {"copyright_violations"}  # not covered: counts neither as harmful nor as harmless
REPLACED = {"copro_pairs": "copro_masked"}  # a file that is not read where its better form is


class TextFilesError(ValueError):
    """A folder or file of training text that cannot be used; the message names it and the valid values."""


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
    homonyms: set[str] = field(default_factory=set)


def read_corpus(folders: Iterable[str | Path]) -> Corpus:
    """All text of the folders, with near-duplicates in one group. Raises TextFilesError for what cannot be read."""
    rows: list[Row] = []
    terms: list[ListedTerm] = []
    lists: dict[str, set[str]] = {name: set() for name in ("words.txt", "names.txt", "homonyms.txt")}
    all_folders = list(map(Path, folders))
    for folder in all_folders:
        if not folder.is_dir():
            raise TextFilesError(f"moderator.data.root: no folder {folder}; valid: one with CSV files of text")
        paths = sorted(folder.glob("*.csv"))
        if not paths:
            raise TextFilesError(f"moderator.data.root: no CSV file in {folder}; valid headers: see docs/moderation.md")
        for path in paths:
            better = REPLACED.get(path.stem)
            if better and any((other / f"{better}.csv").is_file() for other in all_folders):
                print(f"{path} is not read: {better}.csv takes its place")
                continue
            read_file(path, rows, terms)
        for name, words in lists.items():
            if (folder / name).is_file():
                words.update(read_lines(folder / name))
    if not any(row.harmful for row in rows) or not any(row.harmless for row in rows):
        raise TextFilesError("moderator.data.root: valid: at least one harmful and one harmless text")
    rows = place_composites(group_alike(paired_by_group(without_slurs(rows, terms))))
    return Corpus(rows, terms, *(words - {""} for words in lists.values()))


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


def alias(name: str) -> str:
    """The name of a category in lower case, with one space for each hyphen, underscore and run of spaces."""
    return " ".join(re.split(r"[\s_-]+", name.strip().lower()))


def categories_of(text: str, where: str) -> list[str]:
    """The categories named in a cell, by our names or those of ALIASES; raises TextFilesError for an unknown one."""
    names = [alias(name) for name in re.split(r"[|,]", text) if name.strip()]
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
    """A row whose label follows from the share of inappropriate images; between the two limits it has none. A high
    share says something about the images of one model and not about the words: its label is a head of its own."""
    share = _number(line["inappropriate_percentage"], where, 0, 100)
    categories_of(line["categories"], where)
    labels = {"unsafe_images": 1.0} if share >= SHARE_HARMFUL else {}
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


def without_slurs(rows: list[Row], terms: Iterable[ListedTerm]) -> list[Row]:
    """The rows without those that are labelled as not hateful although they hold a listed slur of several words."""
    slurs = {term.text for term in terms if " " in term.text and term.severity >= 2
             and re.search("slurs|orientation|religious|disability", term.topic)}
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(slurs))) + r")s?\b") if slurs else None
    return [row for row in rows if not (pattern and row.labels.get("hate") == 0 and "hate" in row.topic.lower()
                                        and pattern.search(row.text.lower()))]
