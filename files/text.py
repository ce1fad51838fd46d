"""Text files of others: UTF-8 with or without a byte order mark, lines that end in CR, LF or both, and CSV tables.

``str.splitlines`` would also end a line at a form feed, at U+0085 or at U+2028, which stand inside texts that were
copied from web pages and PDF files.
"""
import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

STRAY = re.compile("[\udc80-\udcff]")  # what a byte that is not UTF-8 is decoded to


def decode_text(data: bytes, name: str) -> str:
    """The text of a file's bytes without a byte order mark. Raises ValueError naming the file and the line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(lines_of(data[:error.start].decode("utf-8-sig", "replace") + "?"))
        raise ValueError(f"{name} is not a text file in UTF-8: byte 0x{data[error.start]:02x} in line {line}") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text; only CR, LF and CR LF end one. A line end at the end of the text begins no further line."""
    lines = io.StringIO(text, newline=None).read().split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file. Raises ValueError if it is not UTF-8, OSError if it cannot be read."""
    return lines_of(decode_text(Path(path).read_bytes(), str(path)))


def stream_lines(path: str | Path, ends: bool = False) -> Iterator[str]:
    """The lines of a text file one by one, for files of any length; ``ends`` leaves their ends on them. Raises
    ValueError naming the first line that is not UTF-8, OSError if the file cannot be read."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="" if ends else None) as file:
        for number, line in enumerate(file, 1):
            if not line.isascii() and (stray := STRAY.search(line)):
                raise ValueError(f"{path} is not a text file in UTF-8: byte 0x{ord(stray[0]) - 0xdc00:02x} in line "
                                 f"{number}")
            yield line if ends else line.removesuffix("\n")


class CsvTable:
    """A CSV table with a header, from its text or from its lines with their ends. ``columns`` are its names; iteration
    yields (line number, values by column, fault) of every row that is not empty, where a row with another number of
    values than the header has its fault in words.

    Raises ValueError naming the line, here and in iteration, for quotation marks that do not match, since the rows
    behind them cannot be told apart, and for a header that names a column twice.
    """

    def __init__(self, text: str | Iterable[str], name: str):
        self._name = name
        self._reader = csv.reader(io.StringIO(text, newline="") if isinstance(text, str) else text, strict=True)
        self.columns = [column.strip() for column in next(self._lists(), (1, []))[1]]
        twice = sorted({column for column in self.columns if self.columns.count(column) > 1})
        if twice:
            raise ValueError(f"{name} has two columns '{twice[0]}'; valid: each once")

    def _lists(self) -> Iterator[tuple[int, list[str]]]:
        while True:
            begin = self._reader.line_num + 1
            try:
                values = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"{self._name} line {begin}: {error}; valid: text in quotation marks is followed by a "
                                 "comma or the end of the line, and such a mark inside it is written twice") from None
            if values:
                yield begin, values

    def __iter__(self) -> Iterator[tuple[int, dict[str, str], str]]:
        for line, values in self._lists():
            fault = ""
            if len(values) != len(self.columns):
                fault = (f"{len(values)} values in {len(self.columns)} columns ({','.join(self.columns)}); valid: text "
                         "that has commas stands in quotation marks")
            yield line, dict(zip(self.columns, values)), fault
