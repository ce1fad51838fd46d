"""What a folder of images holds: images, captions in text files and tables, and everything else, by the reason why it
is left out.
"""
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data.images.caption_list import TABLES, Captions, NoCaptions, plain_name, read_table, text_captions
from data.images.transforms import SUFFIXES

INDEX = ".index.jsonl"
MOST_REASONS = 12  # reasons in the line about what is left out
LeftOut = dict[str, list[str]]  # names by the reason why they are left out


def left_out_line(where: object, left_out: LeftOut) -> str:
    """What is left out in one line: how many names by reason, with the first of each; "" if that is nothing."""
    parts = [f"{len(names)} {reason} ({names[0]}{', ...' if len(names) > 1 else ''})"
             for reason, names in sorted(left_out.items(), key=lambda entry: (-len(entry[1]), entry[0])) if names]
    if len(parts) > MOST_REASONS:
        parts[MOST_REASONS:] = [f"{len(parts) - MOST_REASONS} further kinds"]
    return f"left out of {where}: {'; '.join(parts)}" if parts else ""


@dataclass
class FolderFiles:
    """Names relative to the folder, with forward slashes. ``texts`` are the .txt files by the name that they share with
    an image, without ending; ``tables`` lie in the order of their depth."""

    images: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=dict)

    def leave_out(self, reason: str, names: Iterable[str]) -> None:
        """Note that ``names`` are left out."""
        self.left_out.setdefault(reason, []).extend(names)


def stem_of(name: str) -> str:
    """The name of an image or text file without its ending, in one Unicode form: the two share it."""
    return plain_name(name.rpartition(".")[0])


def find_files(root: Path) -> FolderFiles:
    """All files below ``root``. Links to folders are followed unless they lead back to a folder that they lie in."""
    found = FolderFiles()
    texts: list[str] = []
    above = {str(root): {os.path.realpath(root)}}  # folder -> the real folders that lead to it, itself included

    def closed(error: OSError) -> None:
        found.leave_out(f"folders that cannot be opened: {error.strerror}", [os.path.relpath(error.filename, root)])

    for folder, below, files in os.walk(root, followlinks=True, onerror=closed):
        chain, kept = above.pop(folder), []
        for name in sorted(below):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if name.startswith("."):
                found.leave_out("hidden folders", [_relative(path, root)])
            elif real in chain:
                found.leave_out("links to a folder that they lie in", [_relative(path, root)])
            else:
                above[path] = chain | {real}
                kept.append(name)
        below[:] = kept
        for name in sorted(files):
            _sort_in(found, texts, _relative(os.path.join(folder, name), root), name)
    found.images.sort()
    found.tables.sort(key=lambda name: (name.count("/"), name))
    stems = {stem_of(name) for name in found.images}
    for name in sorted(texts, reverse=True):  # .txt before .TXT
        if stem_of(name) not in stems:
            found.leave_out("text files without an image of their name", [name])
        elif stem_of(name) in found.texts:
            found.leave_out("text files beside another of their name", [name])
        else:
            found.texts[stem_of(name)] = name
    return found


def _relative(path: str, root: Path) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def _sort_in(found: FolderFiles, texts: list[str], name: str, last: str) -> None:
    """Put the file ``name``, whose last part is ``last``, where it belongs."""
    ending = PurePosixPath(last.lower()).suffix
    if last.startswith("."):
        if last != INDEX and ending in SUFFIXES:
            found.leave_out("hidden images", [name])
        elif last != INDEX:
            found.leave_out("other hidden files", [name])
    elif ending in SUFFIXES:
        found.images.append(name)
    elif ending == ".txt":
        texts.append(name)
    elif last in TABLES:
        found.tables.append(name)
    else:
        found.leave_out(f"files that end in {ending}" if ending else "files without an ending", [name])


# ---- captions

@dataclass
class FolderCaptions:
    """Captions by image; the reason by image for captions that cannot be read; and (line of a table, reason)."""

    captions: dict[str, Captions] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)


def read_captions(root: Path, found: FolderFiles) -> FolderCaptions:
    """The captions of all images that were found; what is left out of them is noted in ``found``. Raises ValueError
    or OSError for a table of which nothing can be read.

    The names in a table are relative to its folder, as in the imagefolder layout of the datasets library. The table
    nearest to an image decides, then its .txt.
    """
    result = FolderCaptions()
    rows = _rows_of_tables(root, found, result)
    for name in found.images:
        text = found.texts.get(stem_of(name))
        captions = rows.get(plain_name(name))
        if captions is not None:
            result.captions[name] = captions
            if text is not None:
                found.leave_out("text files of images that a table names", [text])
        elif text is not None:
            try:
                captions = text_captions((root / text).read_bytes(), text)
                if captions is None:
                    raise ValueError(f"{text} is empty")
                result.captions[name] = captions
            except (ValueError, OSError) as error:
                result.wrong[name] = f"its caption cannot be read: {error}"
    return result


def _rows_of_tables(root: Path, found: FolderFiles, result: FolderCaptions) -> dict[str, Captions]:
    """The captions in the tables by name of the image, nearer tables last; wrong lines are appended to ``result``."""
    images = {plain_name(name) for name in found.images}
    rows: dict[str, Captions] = {}
    read: set[str] = set()  # folders of which a table was read
    for name in sorted(found.tables, key=lambda name: (name.count("/"), TABLES.index(name.rpartition("/")[2]))):
        folder = name.rpartition("/")[0]
        if folder in read:
            found.leave_out("tables beside one that is read", [name])
            continue
        try:
            table = read_table(root / name, str(root / name))
        except NoCaptions:
            if name.rpartition("/")[2] != "metadata.csv":  # which may be about anything
                raise
            found.leave_out("tables without a column caption or text", [name])
            continue
        read.add(folder)
        result.lines += [(f"{name} line {number}", reason) for number, reason in table.refused]
        for file, captions in table.captions.items():
            image = plain_name(f"{folder}/{file}") if folder and not file.startswith("/") else file
            place = f"{name} line {table.lines[file]}: {file}"
            if image not in images:
                found.leave_out("rows of tables that name no image here", [place])
            elif image in rows:
                found.leave_out("images of whose tables only the nearest is read", [image])
            rows[image] = captions
    return rows


def caption_files_state(root: Path, found: FolderFiles) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of every file of captions, -1 for what cannot be opened."""
    state = []
    for name in sorted([*found.tables, *found.texts.values()]):
        try:
            about = os.stat(root / name)
            state.append((name, about.st_size, about.st_mtime_ns))
        except OSError:
            state.append((name, -1, -1))
    return state
