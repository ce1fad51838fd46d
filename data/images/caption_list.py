"""The captions of an image: their weights, their tags, and the files that hold them.

A list of captions is stored as JSON, [[text, weight], ...].
"""
import json
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from files.text import CsvTable, decode_text, lines_of

Captions = list[tuple[str, float]]
TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")  # the first one of a folder is read
NAME_KEYS, TEXT_KEYS = ("file", "file_name", "image"), ("caption", "text", "captions")


def caption_list(value: Any) -> Captions:
    """Captions from a text, or from a list of texts, [text, weight] or {"text", "weight"}; raises ValueError."""
    entries = value if isinstance(value, list) else [value]
    result: Captions = []
    for entry in entries:
        if isinstance(entry, dict):
            entry = [entry.get("text", entry.get("caption")), entry.get("weight", 1)]
        text, weight = entry if isinstance(entry, list) and len(entry) == 2 else (entry, 1)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a caption must be a text that is not empty, not {str(text)[:80]!r}")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("a caption must be Unicode text; this one holds a half of a character")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e300:
            raise ValueError(f"the weight of a caption must be a number from 0 up, not {str(weight)[:80]!r}")
        result.append((" ".join(text.split()), float(weight)))
    if not result or not sum(weight for _, weight in result):
        raise ValueError("no caption with a weight above 0")
    return result


def plain_name(name: str) -> str:
    """A file name in one form: forward slashes, without "." and "..", and in Unicode NFC, since some systems write an
    umlaut as one character and some as two."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


# ---- tables

@dataclass
class CaptionTable:
    """Captions by the name of a file, relative to the folder of the table; the first line that names each file; and
    (line, reason) of the lines that cannot be read."""

    captions: dict[str, Captions] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[int, str]] = field(default_factory=list)


class NoCaptions(ValueError):
    """A table about images that has no column of captions."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for one that has a key twice, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(name for name in names if names.count(name) > 1)}' is given twice")
    return found


def _json_rows(text: str) -> Iterator[tuple[int, Any, str]]:
    """(line number, row, fault) of the lines of a .jsonl file that are not empty."""
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_unique_keys)
                yield number, row, "" if isinstance(row, dict) else "not a JSON object"
            except (ValueError, RecursionError) as error:
                yield number, None, f"not JSON: {error}"


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, Any, str]]:
    """(line number, row, fault) of the rows of a .csv file. Raises ValueError if its columns are not those."""
    table = CsvTable(text, name)
    if not set(NAME_KEYS) & set(table.columns) or not set(TEXT_KEYS) & set(table.columns):
        raise NoCaptions(f"{name}: columns {table.columns}; valid: file, caption and, if wanted, weight, with commas "
                         "between them")
    for number, row, fault in table:
        yield number, {key: value for key, value in row.items() if key != "weight" or value}, fault


def _captions_of_row(row: dict[str, Any]) -> tuple[str, Captions]:
    """The file that a row names, and its captions. Raises ValueError."""
    name = next((row[key] for key in NAME_KEYS if isinstance(row.get(key), str)), None)
    value = next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)
    if not name or value is None:
        raise ValueError("it lacks a file or a caption")
    weight = row.get("weight")
    if weight is not None:
        if not isinstance(value, str):
            raise ValueError("a weight beside several captions; valid: [[text, weight], ...]")
        try:
            value = [[value, float(weight) if isinstance(weight, str) else weight]]
        except ValueError:
            raise ValueError(f"its weight is {weight[:80]!r}; valid: a number, and text that has commas in quotation "
                             "marks") from None
    return plain_name(name), caption_list(value)


def read_table(path: Path, name: str) -> CaptionTable:
    """The captions in a .jsonl or .csv file, which messages call ``name``. Raises NoCaptions for a .csv file without a
    column of captions, another ValueError for a file of which nothing can be read.

    A line of JSON has "file", "caption" (any value that ``caption_list`` accepts) and optionally "weight"; a CSV table
    has the columns file, caption and optionally weight. Several lines for one file are combined.
    """
    found = CaptionTable()
    text = decode_text(path.read_bytes(), name)
    for number, row, fault in _json_rows(text) if path.suffix == ".jsonl" else _csv_rows(text, name):
        try:
            if fault:
                raise ValueError(fault)
            file, captions = _captions_of_row(row)
            found.captions.setdefault(file, []).extend(captions)
            found.lines.setdefault(file, number)
        except ValueError as error:
            found.refused.append((number, str(error)))
    return found


def text_captions(data: bytes, name: str) -> Captions | None:
    """The captions of a .txt file, one a line; None if it is empty. Raises ValueError if it is not UTF-8."""
    lines: list[Any] = [line for line in lines_of(decode_text(data, name)) if line.strip()]
    return caption_list(lines) if lines else None


# ---- choosing

def caption_by_weight(captions: Captions, draw: float) -> str:
    """The caption that a uniform ``draw`` from [0, 1) selects, each with a probability proportional to its weight."""
    ends = np.cumsum([weight for _, weight in captions])
    return captions[min(int(np.searchsorted(ends, draw * ends[-1], side="right")), len(captions) - 1)][0]


def shuffled_tags(caption: str, keep: int, rng: np.random.Generator) -> str:
    """A caption of comma-separated tags in random order; the first ``keep`` tags stay in front."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    rest = tags[keep:]
    return ", ".join(tags[:keep] + [rest[place] for place in rng.permutation(len(rest))])
