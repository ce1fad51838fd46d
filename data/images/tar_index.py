"""The samples of a tar file with the layout of the webdataset library, and the index that is kept beside it.

Members are grouped as webdataset does it: consecutive members of which the names agree up to the first dot behind the
last slash are one sample, and the rest of the name, in lower case, tells what a member is. The image is the member that
is called png, jpg and so on and nothing else, since 0.depth.png beside 0.jpg is another image. The captions are in
json (or jsn), as "captions", "caption" or "text", else in txt (text, transcript). Members with names that webdataset
skips, or that are no files, are counted.
"""
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data.images.caption_list import Captions, caption_list, text_captions
from data.images.folder_files import LeftOut
from data.images.transforms import SUFFIXES, Unreadable, image_size
from files.whole import sha256_of, whole_file

FORMAT = 2
NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
SKIPPED = re.compile(r"__[^/]*__($|/)")  # ... and what its readers skip
JSON_MEMBERS, TEXT_MEMBERS = ("json", "jsn"), ("txt", "text", "transcript")
IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)


@dataclass
class TarSample:
    """The members of a sample by the rest of their names; ``twice`` are the names that occur a second time."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


def tar_samples(tar: tarfile.TarFile, left_out: LeftOut) -> Iterator[TarSample]:
    """The samples of an open tar; members that belong to none are noted in ``left_out``."""
    sample = TarSample("")
    for member in tar:
        name = member.name
        if member.isdir():
            continue
        match = NAME.match(name)
        reason = ("members that are links or no files" if not member.isreg() else
                  "members with a name that webdataset skips" if SKIPPED.match(name) else
                  "hidden members" if name.rpartition("/")[2].startswith(".") else
                  "members without an ending" if match is None else "")
        if reason or match is None:
            left_out.setdefault(reason, []).append(name)
            continue
        if match[1] != sample.key and sample.members:
            yield sample
            sample = TarSample("")
        sample.key, suffix = match[1], match[2].lower()
        if suffix in sample.members:
            sample.twice.append(name)
        else:
            sample.members[suffix] = member
    if sample.members:
        yield sample


def check_end(file: BinaryIO, end: int) -> None:
    """Raise ValueError unless an end mark, and then nothing but zeros, stands at the byte ``end``, behind the last
    member. tarfile, and with it webdataset, takes a damaged header and the end of the file for an end mark, and reads
    nothing behind one."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"it ends at byte {end + len(block)} without an end mark; it was cut short")
    if block.strip(b"\0"):
        raise ValueError(f"the header at byte {end} is damaged")
    while block:
        if block.strip(b"\0"):
            raise ValueError(f"something follows its end mark at byte {end}; tar files cannot be joined end to end")
        block = file.read(1 << 20)


def member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member that is a file."""
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _metadata_and_captions(sample: TarSample, tar: tarfile.TarFile, name: str) -> tuple[dict, Captions | None]:
    """The json of a sample and its captions, None if it has no captions. Raises Unreadable."""
    members = sample.members
    try:
        kind = next((kind for kind in JSON_MEMBERS if kind in members), None)
        about: Any = json.loads(member_bytes(tar, members[kind])) if kind else {}
        if not isinstance(about, dict):
            raise ValueError("its .json is not an object")
        value = about.get("captions") or about.get("caption")
        text = next((kind for kind in TEXT_MEMBERS if kind in members), None)
        if not value and text:
            captions = text_captions(member_bytes(tar, members[text]), f"{name}.{text}")
            if captions:
                return about, captions
        value = value or about.get("text")
        return about, caption_list(value) if value else None
    except (ValueError, RecursionError, tarfile.TarError) as error:
        raise Unreadable(name, f"its captions cannot be read: {error}") from None


def _image_of(sample: TarSample, name: str) -> str:
    """Which member of a sample is its image. Raises Unreadable if that is none or not one."""
    members = ", ".join(sample.members)
    if sample.twice:
        raise Unreadable(name, f"its shard has two members {', '.join(sample.twice)}")
    found = [kind for kind in sample.members if kind in IMAGES]
    if len(found) > 1:
        raise Unreadable(name, f"it has the images {', '.join(found)}; valid: one")
    if not found:
        raise Unreadable(name, f"it has no image; its members: {members}; valid: one called png, jpg, ... behind the "
                               "first dot of its name")
    if sample.members[found[0]].sparse is not None:
        raise Unreadable(name, "its image is stored as a sparse file")
    return found[0]


def index_row(path: Path, sample: TarSample, tar: tarfile.TarFile) -> dict[str, Any]:
    """The row of a sample in the index: {"key", "name", "captions", "members", "split", "suffix", "offset", "bytes",
    "height", "width"}, or {"key", "name", "error"} if something of it cannot be read."""
    name = f"{path.name}/{sample.key}"
    try:
        kind = _image_of(sample, name)
        about, texts = _metadata_and_captions(sample, tar, name)
        image = sample.members[kind]
        # the limit on pixels belongs to a run, hence it is applied when the index is read
        height, width = image_size(member_bytes(tar, image), name, 2**62)
        own = "" if about.get("id") is None else str(about["id"])
        own.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return {"key": sample.key, "name": sample.key, "error": "its id is not Unicode text"}
    except Unreadable as error:
        return {"key": sample.key, "name": sample.key, "error": error.reason}
    return {"key": sample.key, "name": own or sample.key,
            "captions": None if texts is None else [[*entry] for entry in texts],  # lists, as JSON returns them
            "members": ", ".join(sample.members), "split": about.get("split"), "suffix": f".{kind}",
            "offset": image.offset_data, "bytes": image.size, "height": height, "width": width}


def _is_row(row: Any) -> bool:
    """Whether a row that was read back can be used."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not isinstance(row.get("name"), str):
        return False
    numbers = [row.get(name) for name in ("offset", "bytes", "height", "width")]
    return isinstance(row.get("error"), str) or (
        all(type(number) is int and number in range(2**62) for number in numbers[:2])
        and all(type(number) is int and number in range(1, 2**31) for number in numbers[2:]) and "split" in row
        and isinstance(row.get("suffix"), str) and isinstance(row.get("members"), str) and "captions" in row
        and all(isinstance(text, str) and isinstance(weight, float) for text, weight in row["captions"] or ()))


def _kept_index(kept: Path, path: Path) -> dict[str, Any] | None:
    """The index beside a tar, None if there is none that can be used for it."""
    about = path.stat()
    try:
        index = json.loads(kept.read_text(encoding="ascii"))
        if (index["format"], index["bytes"]) != (FORMAT, about.st_size) or not all(map(_is_row, index["samples"])):
            return None
        index["left_out"] = {str(reason): [str(name) for name in names] for reason, names in index["left_out"].items()}
        if not isinstance(index["sha256"], str):
            return None
        # a copy has another modification time: then its bytes decide
        return index if index["time"] == about.st_mtime_ns or index["sha256"] == sha256_of(path) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def shard_index(path: Path) -> dict[str, Any]:
    """The index of a tar, from PATH.index if that fits the tar; otherwise the tar is read and the index written.

    Returns {"format", "bytes", "time", "sha256", "samples": rows, "left_out": names by reason}. Raises ValueError for a
    damaged tar.
    """
    kept = path.with_name(path.name + ".index")
    index = _kept_index(kept, path)
    if index is not None:
        return index
    left_out: LeftOut = {}
    try:
        about = path.stat()
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            rows = [index_row(path, sample, tar) for sample in tar_samples(tar, left_out)]
            check_end(file, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no tar file: {error}") from None
    index = {"format": FORMAT, "bytes": about.st_size, "time": about.st_mtime_ns, "sha256": sha256_of(path),
             "samples": rows, "left_out": left_out}
    try:
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(index), encoding="ascii")  # so that names need not be UTF-8
    except OSError:
        pass  # no permission: the next run reads the tar again
    return index
