"""Writes any source as tar shards that webdataset, and data/images/shards.py, read.

    python -m data.write_shards SOURCE OUT [--shard-size 1000]

SOURCE is a folder of images, a folder of shards, or a config (its `data` section).

A sample consists of NNNNNNNNN.jpg (the unchanged bytes of the file, or a PNG for an item that is not a file), a .json
with "id", "captions" [[text, weight], ...] and "split", and a .txt with the caption of the largest weight. Items are
shuffled once, so that every shard is representative of the whole, and shard k holds the items from k * size. A shard is
written under a temporary name and then renamed; an existing shard is not written again. index.json, with the size and
the SHA-256 of every shard, comes last.
"""
import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.command import data_config_of, splits_of
from data.images.base import ImageFiles, Readable
from data.images.caption_list import Captions
from data.images.tar_index import shard_index
from data.images.transforms import Unreadable
from data.source import Source
from files.images import to_pil
from files.whole import whole_file

PLAN = ".plan.json"


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _sample_of_item(source: Source, index: int) -> tuple[bytes, str, str, Captions]:
    """(bytes of the image file, suffix, id, captions) of an item. Raises Unreadable if it cannot be decoded."""
    source = source.source if isinstance(source, Readable) else source
    if isinstance(source, ImageFiles):
        image = source.open_image(index)  # decodes it fully: a shard must hold no image that a run has to skip
        data, suffix = source.file_bytes(index) or (_png(image), ".png")
        return data, suffix, source.names[index], source.weighted_captions(index)
    item = source[index]
    image = to_pil(item["image"])
    return _png(image), ".png", item["id"], [(text, 1.0) for text in item["captions"]]


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar."""
    member = tarfile.TarInfo(name)  # owner and time stay 0, so that the same source gives the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _identity(splits: Mapping[str, Source], size: int) -> dict[str, Any]:
    """A description of the source and the shard size, by which an interrupted job is recognised."""
    digest = hashlib.sha256()
    for split, source in splits.items():
        content = getattr(source, "content", "") or "\n".join(
            f"{caption}" for index in range(min(len(source), 100)) for caption in source.captions(index))
        digest.update(f"{split} {len(source)} {content}\n".encode())
    return {"source": digest.hexdigest(), "shard_size": size}


def _check_plan(out: Path, identity: dict[str, Any]) -> None:
    """Begin a new folder, or continue one of the same job; raises ValueError for any other folder."""
    out.mkdir(parents=True, exist_ok=True)
    plan = out / PLAN
    try:
        known = json.loads(plan.read_text()) if plan.exists() else None
    except ValueError:
        known = {}
    if known is None and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; valid: a new folder, or one that the same command began")
    if known not in (None, identity):
        raise ValueError(f"{out} was begun with another source or shard size; name another folder or remove it")
    with whole_file(plan) as temporary:
        temporary.write_text(json.dumps(identity))


def write_shards(splits: Mapping[str, Source], out: Path, size: int = 1000, share: float = 0.01) -> dict[str, Any]:
    """Write all splits to the folder ``out`` with ``size`` images a shard, and return the content of index.json.

    An image that cannot be decoded is named on stderr and skipped. Raises ValueError if there are more of them than the
    share ``share`` of all images.
    """
    if size < 1:
        raise ValueError(f"shard size: {size}; valid: from 1 image up")
    items = [(split, index) for split, source in splits.items() for index in range(len(source))]
    if not items:
        raise ValueError("the source is empty; there is nothing to write")
    _check_plan(out, _identity(splits, size))
    order = np.random.default_rng(0).permutation(len(items))
    shards = []
    bad = 0
    for number in tqdm(range(-(-len(items) // size)), desc="shards", unit="shard"):
        path = out / f"shard-{number:06d}.tar"
        chosen = order[number * size:(number + 1) * size]
        if not path.exists():
            with whole_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                for place, item in enumerate(chosen, number * size):
                    split, index = items[item]
                    bad += not _add_sample(tar, splits, split, index, f"{place:09d}")
                    if bad > share * len(items):
                        raise ValueError(f"{bad} of {len(items)} images cannot be read, more than bad_share = {share} "
                                         "allows; nothing of this shard is kept")
        about = shard_index(path)
        shards.append({"name": path.name, "bytes": about["bytes"], "sha256": about["sha256"],
                       "samples": len(about["samples"])})
    result = {**_identity(splits, size), "samples": sum(shard["samples"] for shard in shards), "shards": shards}
    with whole_file(out / "index.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _add_sample(tar: tarfile.TarFile, splits: Mapping[str, Source], split: str, index: int, key: str) -> bool:
    """Append a sample to the tar; False if it cannot be read."""
    try:
        data, suffix, name, captions = _sample_of_item(splits[split], index)
    except Unreadable as error:
        print(f"unreadable: {error}", file=sys.stderr)
        return False
    about = {"id": name, "captions": captions, "split": split}
    add_member(tar, key + {".jfif": ".jpg", ".jpe": ".jpg"}.get(suffix, suffix), data)  # as webdataset calls them
    try:
        text = json.dumps(about, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # an id that is no Unicode, as names of files may be
        text = json.dumps(about).encode()
    add_member(tar, key + ".json", text)
    add_member(tar, key + ".txt", max(captions, key=lambda entry: entry[1])[0].encode())
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m data.write_shards`."""
    parser = argparse.ArgumentParser(prog="python -m data.write_shards", description="Writes a source as tar shards.")
    parser.add_argument("source", help="a folder of images or of shards, or a config (.yaml) with a data section")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--shard-size", type=int, default=1000, help="images in a shard (default: 1000)")
    options = parser.parse_args(arguments)
    try:
        share = data_config_of(options.source).bad_share
        index = write_shards(splits_of(options.source), Path(options.out), options.shard_size, share)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues from here") from None
    print(f"{options.out}: {index['samples']} images in {len(index['shards'])} shards")


if __name__ == "__main__":
    main()
