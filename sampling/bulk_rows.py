"""The requests of a bulk call, read one by one from a file of any length: text, JSON lines or CSV.

    a small red star                                                                  text: a prompt a line
    {"prompt": "a small red star", "seed": 7, "settings": {"steps": 4}}               .jsonl: an object a line
    prompt,seed,negative,steps                                                        .csv: a header, then the rows

Requests are counted through: the place of a row in the file, its alternatives and ``--n`` give each a number, which
does not depend on who draws it. ``windows`` cuts them into pieces of equal size, which are drawn together.
"""
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from files.text import CsvTable, stream_lines
from pipeline.prompts import alternatives
from sampling.limits import LARGEST
from sampling.request import AXES, NOUNS, Axis, Request, cross, value_text
from sampling.styling import ChosenStyles, style_request

OWN = ("prompt", "seed", "negative")
NOT_OF_A_ROW = {*OWN, "strength", "palette_weight"}  # these need an image or a palette beside them
OF_A_ROW = tuple(name for name in AXES if name not in NOT_OF_A_ROW)  # settings by name
KEYS = (*OWN, "settings")  # of an object


@dataclass(frozen=True)
class Row:
    """A row of the file: the number of its line, and what it says; None where it leaves that to the call."""

    line: int
    prompt: str
    seed: int | None = None
    negative: str | None = None
    settings: tuple[Axis, ...] = ()


@dataclass(frozen=True)
class Numbered:
    """A request, its number in the whole call and the line that asks for it."""

    number: int
    line: int
    request: Request


@dataclass(frozen=True)
class Orders:
    """What a bulk call draws: the rows of ``file``, ``count`` images for each prompt of a row. ``template`` has what a
    row does not say; without a seed of its own a request has that of the template plus its number."""

    file: str
    template: Request
    count: int = 1
    styles: ChosenStyles = ChosenStyles()

    def rows(self) -> Iterator[tuple[int, Row, list[str]]]:
        """(number of its first request, row, its prompts with their alternatives) of every row. Raises ValueError
        naming the line of a row that is not valid."""
        number = 0
        for row in read_rows(self.file):
            prompts = [row.prompt] if self.template.literal else self._valid(row, alternatives, row.prompt, LARGEST)
            yield number, row, prompts
            number += len(prompts) * self.count

    def requests_of(self, first: int, row: Row, prompts: list[str]) -> list[Numbered]:
        """The requests of a row whose first one has the number ``first``. Raises ValueError naming its line."""
        return self._valid(row, self._requests_of, first, row, prompts)

    def _requests_of(self, first: int, row: Row, prompts: list[str]) -> list[Numbered]:
        request = cross(self.template, row.settings)[0] if row.settings else self.template
        negative = self.template.negative if row.negative is None else row.negative
        if row.negative and not request.literal and len(alternatives(negative)) > 1:
            raise ValueError(f"negative {negative!r} has alternatives; valid: one negative prompt a row")
        seed = request.seed + first if row.seed is None else row.seed
        repeated = [prompt for prompt in prompts for _ in range(self.count)]
        return [Numbered(first + k, row.line, style_request(
            replace(request, prompt=prompt, seed=seed + k, negative=negative), self.styles))
            for k, prompt in enumerate(repeated)]

    def _valid(self, row: Row, make: Callable[..., list], *arguments: Any) -> list:
        """``make(*arguments)``, whose errors name the line."""
        try:
            return make(*arguments)
        except ValueError as error:
            raise ValueError(f"{self.file} line {row.line}: {error}") from None

    def windows(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Numbered]]]:
        """(number of the window, its requests) of those windows of ``size`` requests that are ``wanted`` when they are
        reached; the others are only counted."""
        current, mine, held = -1, False, list[Numbered]()
        for first, row, prompts in self.rows():
            made: list[Numbered] = []
            for place in range(len(prompts) * self.count):
                if (first + place) // size != current:
                    if mine:
                        yield current, held
                    current, held = (first + place) // size, []
                    mine = wanted(current)
                if mine:
                    made = made or self.requests_of(first, row, prompts)
                    held.append(made[place])
        if mine:
            yield current, held


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, by its ending; empty lines are none. Raises ValueError naming the line of one that is not
    valid, OSError for a file that cannot be read."""
    kinds = {".jsonl": rows_of_json, ".ndjson": rows_of_json, ".csv": rows_of_csv}
    for row in kinds.get(Path(path).suffix.lower(), rows_of_text)(str(path)):
        for text in (row.prompt, row.negative or ""):
            if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
                raise ValueError(f"{path} line {row.line}: {text!a} is not text in Unicode")
        yield row


def rows_of_text(path: str) -> Iterator[Row]:
    """A row for each line that is not empty."""
    for line, text in enumerate(stream_lines(path), 1):
        if text.strip():
            yield Row(line, text.strip())


def rows_of_json(path: str) -> Iterator[Row]:
    """A row for each line, an object with a prompt. Raises ValueError."""
    for line, text in enumerate(stream_lines(path), 1):
        if not text.strip():
            continue
        where = f"{path} line {line}"
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON ({error}); valid: {{\"prompt\": \"a red star\"}}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {text.strip()[:60]}; valid: {{\"prompt\": \"a red star\"}}")
        if unknown := [key for key in values if key not in KEYS]:
            raise ValueError(f"{where}: unknown key '{unknown[0]}'; valid: {', '.join(KEYS)}")
        values = {key: value for key, value in values.items() if value is not None}
        if "prompt" not in values:
            raise ValueError(f"{where} has no prompt; valid: {{\"prompt\": \"a red star\"}}")
        settings = values.pop("settings", {})
        kinds = {"prompt": (str, "a text"), "negative": (str, "a text"), "seed": (int, "a whole number")}
        for key, value in values.items():
            if not isinstance(value, kinds[key][0]) or isinstance(value, bool):
                raise ValueError(f"{where}: {key}: {value!r}; valid: {kinds[key][1]}")
        if not isinstance(settings, dict):
            raise ValueError(f"{where}: settings: {settings!r}; valid: {{\"steps\": 4}}")
        yield Row(line, values["prompt"], values.get("seed"), values.get("negative"),
                  settings_of_row(settings, where))


def rows_of_csv(path: str) -> Iterator[Row]:
    """A row for each of a CSV table with a column "prompt"; an empty cell leaves its value to the call. Raises
    ValueError."""
    table = CsvTable(stream_lines(path, ends=True), path)
    if unknown := [column for column in table.columns if column not in (*OWN, *OF_A_ROW)]:
        raise ValueError(f"{path} has a column '{unknown[0]}'; valid: {', '.join((*OWN, *OF_A_ROW))}")
    if "prompt" not in table.columns:
        raise ValueError(f"{path} has no column 'prompt'; valid: a header that names its columns")
    for line, cells, fault in table:
        where = f"{path} line {line}"
        if fault:
            raise ValueError(f"{where}: {fault}")
        given = {column: cell.strip() for column, cell in cells.items() if cell.strip()}
        try:
            seed = int(given["seed"]) if "seed" in given else None
        except ValueError:
            raise ValueError(f"{where}: seed: {given['seed']!r}; valid: a whole number") from None
        settings = {name: value for name, value in given.items() if name not in OWN}
        yield Row(line, given.get("prompt", ""), seed, given.get("negative"), settings_of_row(settings, where))


def settings_of_row(values: dict[str, Any], where: str) -> tuple[Axis, ...]:
    """Settings by name, as ``cross`` takes them. Raises ValueError that begins with ``where``."""
    found = []
    for name, value in values.items():
        if name not in OF_A_ROW:
            raise ValueError(f"{where}: unknown setting '{name}'; valid: {', '.join(OF_A_ROW)}")
        try:
            text = value_text(tuple(value) if isinstance(value, list) else value)
            found.append(Axis(name, (AXES[name](text.strip()),)))
        except (ValueError, TypeError):
            valid = NOUNS.get(AXES[name], "a text")
            raise ValueError(f"{where}: {name}: {value!r}; valid: {valid}") from None
    return tuple(found)
