"""Named styles: parts of the prompt and of the negative prompt, a guidance scale and a palette.

They are read from YAML (configs/styles.yaml), from the styles.csv of AUTOMATIC1111's web interface, and from the JSON
lists of Fooocus.
"""
import csv
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.config import from_dict, read_yaml

DEFAULT = Path(__file__).parents[1] / "configs" / "styles.yaml"  # those of the repository
STRONGEST = 2.0  # strength of a style
PLACE = "{prompt}"  # where a style puts the prompt; without it the style stands behind the prompt
COLUMNS = {"name", "prompt", "negative_prompt"}


@dataclass(frozen=True)
class Style:
    """A style. ``prompt`` holds {prompt} where the prompt goes. ``guidance`` and ``palette`` are used where a call does
    not name its own."""

    name: str
    prompt: str = ""
    negative: str = ""
    guidance: float | None = None
    palette: str = ""

    def of_prompt(self, prompt: str) -> str:
        """The prompt in this style."""
        return joined(prompt, self.prompt)


@dataclass(frozen=True)
class StyleFile:
    """The content of a YAML file of styles."""

    styles: tuple[Style, ...]


@dataclass(frozen=True)
class Styled:
    """A prompt and a negative prompt in styles of strength 1, and for each style of another strength the prompt in that
    style, too, with its strength."""

    prompt: str
    negative: str
    further: tuple[tuple[str, float], ...] = ()


def joined(text: str, part: str) -> str:
    """``text`` in the place that ``part`` has for it, or before it."""
    if PLACE in part:
        return part.replace(PLACE, text)
    return ", ".join(piece for piece in (text.strip(), part.strip()) if piece)


def read_styles(path: str | Path) -> dict[str, Style]:
    """The styles of a file by name, in its order. Raises ValueError or OSError in one line for another kind of file, a
    name that occurs twice, and rows without one."""
    path = Path(path)
    if path.suffix.lower() == ".csv":
        found = _from_csv(path)
    elif path.suffix.lower() == ".json":
        found = _from_json(path)
    else:
        found = list(from_dict(StyleFile, read_yaml(path)).styles)
    styles: dict[str, Style] = {}
    for style in found:
        if not style.name.strip() or style.name in styles:
            what = "occurs twice" if style.name.strip() else "is empty"
            raise ValueError(f"{path}: the name {style.name!r} {what}; valid: a name of its own for each style")
        styles[style.name] = style
    return styles


def _from_csv(path: Path) -> list[Style]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if not {"name", "prompt"} <= set(reader.fieldnames or ()) <= COLUMNS:
                raise ValueError(f"{path} has the columns {', '.join(reader.fieldnames or ()) or 'none'}; valid: "
                                 f"{', '.join(sorted(COLUMNS))}")
            return [_style(path, f"row {reader.line_num}", row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, row {reader.line_num}: {error}; valid: a table in UTF-8") from None


def _from_json(path: Path) -> list[Style]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}; valid: a list of objects with {', '.join(sorted(COLUMNS))}")
    return [_style(path, f"entry {number + 1}", row) for number, row in enumerate(rows)]


def _style(path: Path, where: str, row: dict[str, Any]) -> Style:
    unknown = [key for key in row if key not in COLUMNS]
    values = {key: "" if row.get(key) is None else row[key] for key in COLUMNS}
    if unknown or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"{path}, {where}: {f'unknown {unknown[0]}' if unknown else 'a value is no text'}; valid: "
                         f"{', '.join(sorted(COLUMNS))}, each a text")
    return Style(values["name"], values["prompt"], values["negative_prompt"])


def parse_style(text: str, styles: dict[str, Style]) -> tuple[Style, float]:
    """A style and its strength, of "NAME" or "NAME:STRENGTH". Raises ValueError that offers the nearest names."""
    name, strength = text, 1.0
    if text not in styles and ":" in text:
        name, _, number = text.rpartition(":")
        try:
            strength = float(number)
        except ValueError:
            strength = -1.0
        if not 0 <= strength <= STRONGEST:
            raise ValueError(f"--style {text}; valid: NAME:STRENGTH with a strength from 0 to {STRONGEST:g}")
    if name not in styles:
        near = difflib.get_close_matches(name, styles, n=3, cutoff=0.4) or list(styles)
        raise ValueError(f"--style {name}; valid: {', '.join(near)} (all of them: --styles)")
    return styles[name], strength


def apply_styles(prompt: str, negative: str, chosen: Sequence[tuple[Style, float]]) -> Styled:
    """A prompt in the chosen styles, one after the other; a style of strength 0 is left out."""
    def prompt_in(own: int | None = None) -> str:
        """The prompt in the styles of strength 1, and in the one at a place."""
        text = prompt
        for place, (style, strength) in enumerate(chosen):
            if strength == 1 or place == own:
                text = style.of_prompt(text)
        return text

    for style, strength in chosen:
        if strength == 1:
            negative = joined(negative, style.negative)
    further = [(prompt_in(place), strength) for place, (_, strength) in enumerate(chosen) if strength not in (0, 1)]
    return Styled(prompt_in(), negative, tuple(further))


def only_one(values: Sequence[Any], what: str) -> Any:
    """The one value among those that are set, None if there is none. Raises ValueError for different ones."""
    found = list(dict.fromkeys(value for value in values if value not in (None, "")))
    if len(found) > 1:
        raise ValueError(f"--style: styles with {what} {' and '.join(map(str, found))}; valid: styles with the same, "
                         f"or --{what}")
    return found[0] if found else None
