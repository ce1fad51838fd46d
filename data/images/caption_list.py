"""The captions of an image: their weights, their tags, and the files that hold them.

A list of captions is stored as JSON, [[text, weight], ...].
"""
import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.images.transforms import Unreadable

Captions = list[tuple[str, float]]
TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv")
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
            raise ValueError(f"a caption must be a text that is not empty, not {text!r}")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("a caption must be Unicode text; this one holds a half of a character")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of a caption must be a number from 0 up, not {weight!r}")
        result.append((" ".join(text.split()), float(weight)))
    if not result or not sum(weight for _, weight in result):
        raise ValueError("no caption with a weight above 0")
    return result


def lines_of(text: str) -> list[str]:
    """The captions of a .txt file, one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def plain_name(name: str) -> str:
    """A file name in one Unicode form: some systems write an umlaut as one character, some as two."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict | None, str]]:
    """(line number, row, reason) of the rows of a table; an unreadable row is None, with the reason."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    yield (number, row, "") if isinstance(row, dict) else (number, None, "not a JSON object")
                except ValueError as error:
                    yield number, None, f"not JSON: {error}"
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not set(NAME_KEYS) & set(reader.fieldnames or ()) or not set(TEXT_KEYS) & set(reader.fieldnames or ()):
        raise ValueError(f"{path}: columns {reader.fieldnames}; valid: file, caption and, if wanted, weight")
    for row in reader:
        if not row.get("weight"):
            row.pop("weight", None)
        yield reader.line_num, row, ""


def _table_rows(path: Path, text: str) -> Iterator[tuple[int, dict | None, str]]:
    """``_rows``, with ValueError in place of the errors of the csv module."""
    try:
        yield from _rows(path, text)
    except csv.Error as error:
        raise ValueError(f"{path} is not a table that can be read: {error}") from None


def read_table(path: Path) -> tuple[dict[str, Captions], list[tuple[str, str]]]:
    """Captions by file name from captions.jsonl or .csv, and (line, reason) for the lines that cannot be read.

    A line of JSON has "file", "caption" (any value that ``caption_list`` accepts) and optionally "weight"; a CSV table
    has the columns file, caption and optionally weight. Several lines for one file are combined.
    """
    found: dict[str, Captions] = {}
    refused = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, row, reason in _table_rows(path, text):
        try:
            if row is None:
                raise ValueError(reason)
            name = next((row[key] for key in NAME_KEYS if isinstance(row.get(key), str)), None)
            value = next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None)
            if name is None or value is None:
                raise ValueError("it lacks a file or a caption")
            if "weight" in row and isinstance(value, str):
                value = [[value, float(row["weight"])]]
            found.setdefault(plain_name(name), []).extend(caption_list(value))
        except ValueError as error:
            refused.append((f"{path.name} line {number}", str(error)))
    return found, refused


def read_text_file(path: Path, name: str) -> Captions | None:
    """The captions of a .txt file, None if there is no file. Raises Unreadable."""
    try:
        lines: list[Any] = list(lines_of(path.read_bytes().decode("utf-8-sig")))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, OSError) as error:
        raise Unreadable(name, f"its caption {path.name} cannot be read: {error}") from None
    if not lines:
        raise Unreadable(name, f"its caption {path.name} is empty")
    return caption_list(lines)


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
