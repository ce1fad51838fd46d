"""The contents of a data set as one HTML page: python -m data.report SOURCE [--out FILE] [--tokenizer FILE]

SOURCE is a folder of images, a folder of shards, or a config with a data section. The page shows counts, sizes, aspect
ratios, lengths of captions in words and tokens, unknown tokens, near-duplicates within and between splits, a contact
sheet, the files that cannot be read, and what is left out. Files that would stop a run are listed and do not stop the
report.
"""
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer as AnyTokenizer
from tqdm import tqdm

from data.catalog import FILE_SOURCES, DataConfig, build_source
from data.images.base import SPLITS, ImageFiles
from data.images.folder_files import LeftOut, left_out_line
from data.images.transforms import Unreadable, may_flip
from data.report.duplicates import near_groups, near_pairs, perceptual_hash, small_version
from data.source import Source
from data.tokenizer import Tokenizer
from files.images import to_pil
from files.pages import contact_sheet, escape, histogram, html_list, inline_image, page, table

THUMBNAILS, CELL = 48, 96  # number of images on the contact sheet, and their side in pixels


@dataclass
class SplitContent:
    """The items read from one split. All lists but ``thumbnails`` and ``unreadable`` have an entry for each of them."""

    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    small: list[np.ndarray] = field(default_factory=list)  # (16, 16, 3)
    thumbnails: list[np.ndarray] = field(default_factory=list)  # (h, w, 3) each, of the first images
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    total: int = 0  # items of the split


def _image_of_item(source: Source, index: int) -> tuple[Image.Image, str, tuple[int, int]]:
    """(RGB image, id, (height, width) of the file) of an item. Raises Unreadable."""
    if isinstance(source, ImageFiles):
        height, width = source.sizes[index].tolist()
        return source.open_image(index, (CELL, CELL)), source.names[index], (height, width)
    item = source[index]
    image = to_pil(item["image"])
    return image, item["id"], (image.height, image.width)


def read_split(source: Source, limit: int, title: str) -> SplitContent:
    """The contents of the first ``limit`` items of a split; every image is decoded once."""
    result = SplitContent(total=len(source))
    for index in tqdm(range(min(len(source), limit)), desc=title, unit="image"):
        try:
            image, name, size = _image_of_item(source, index)
        except Unreadable as error:
            result.unreadable.append((error.name, error.reason))
            continue
        result.names.append(name)
        result.sizes.append(size)
        result.captions.append(source.captions(index))
        result.hashes.append(perceptual_hash(image))
        result.small.append(small_version(image))
        if len(result.thumbnails) < THUMBNAILS:
            image.thumbnail((CELL, CELL))
            result.thumbnails.append(np.asarray(image))
    return result


# ---- sections

def count_table(splits: dict[str, SplitContent]) -> str:
    """Numbers of items and captions of every split."""
    rows = [[name, split.total, len(split.names), len(split.unreadable), sum(map(len, split.captions)),
             len({caption for captions in split.captions for caption in captions})]
            for name, split in splits.items()]
    return table(["split", "items", "looked at", "unreadable", "captions", "different captions"], rows)


def size_section(splits: dict[str, SplitContent], config: DataConfig) -> str:
    """Sizes and aspect ratios, and how many images are smaller than the configured size."""
    every = np.array([size for split in splits.values() for size in split.sizes]).reshape(-1, 2)
    if not len(every):
        return "<p>no image can be read</p>"
    smaller = int((every.min(axis=1) < config.size).sum())
    text = (f"<p>{smaller} of {len(every)} images have a side below {config.size} pixels, the configured size, and "
            "are enlarged.</p>")
    common = Counter(map(tuple, every[:, ::-1].tolist())).most_common(8)
    return (text + histogram(every[:, 1], "width in pixels") + histogram(every[:, 0], "height in pixels")
            + histogram(np.log2(every[:, 1] / every[:, 0]), "aspect ratio, log2(width / height)")
            + table(["most common sizes", "images"], [[f"{w} x {h}", count] for (w, h), count in common]))


def caption_section(captions: Sequence[str]) -> str:
    """Lengths of captions, common words, repeated captions, and captions that forbid mirroring."""
    lengths = np.array([len(caption.split()) for caption in captions])
    common = Counter(word for caption in captions for word in caption.lower().split()).most_common(24)
    fixed = sum(not may_flip(caption) for caption in captions)
    repeated = [(caption, count) for caption, count in Counter(captions).most_common(8) if count > 1]
    return (histogram(lengths, "words of a caption")
            + f"<p>{fixed} of {len(captions)} captions name a side, a direction or writing: their images are never "
              f"mirrored. Most common words: {escape(', '.join(f'{word} {count}' for word, count in common))}.</p>"
            + (table(["most common captions", "times"], repeated) if repeated else ""))


def token_section(captions: Sequence[str], path: Path) -> str:
    """Token lengths and unknown tokens under the tokenizer.json of a run folder or of the tokenizers library.

    Raises ValueError for a file that is no tokenizer.
    """
    length = None
    try:
        ours = Tokenizer.load(path)
        bpe, length = ours.bpe, ours.length
    except ValueError:
        try:
            bpe = AnyTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for what it cannot read
            raise ValueError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}") from None
    encodings = bpe.encode_batch(list(captions), add_special_tokens=False)
    counted = np.array([len(encoding.ids) + 2 for encoding in encodings])  # with start and end
    unk = getattr(bpe.model, "unk_token", None)
    unknown = Counter(caption[begin:end] for caption, encoding in zip(captions, encodings)
                      for token, (begin, end) in zip(encoding.tokens, encoding.offsets) if unk and token == unk)
    said = ("The tokenizer has no unknown token: every string is bytes." if unk is None else
            f"{sum(unknown.values())} unknown tokens of {counted.sum()}"
            + (f", most often: {', '.join(f'{text} {count}' for text, count in unknown.most_common(20))}." if unknown
               else "."))
    cut = "" if length is None else (f"<p>{int((counted > length).sum())} of {len(captions)} captions are longer than "
                                     f"the {length} tokens that are read, and are cut.</p>")
    marks = [] if length is None else [(float(length), "cut")]
    return histogram(counted, "tokens of a caption, with start and end", marks=marks) + f"<p>{escape(said)}</p>" + cut


def duplicate_sections(splits: dict[str, SplitContent], most: int) -> tuple[str, str]:
    """(near-duplicates, overlap between splits), each as HTML; ``most`` is the number of bits that may differ."""
    place = [(name, index) for name, split in splits.items() for index in range(len(split.names))]
    if not place:
        return "<p>no image can be read</p>", ""
    hashes = np.array([value for split in splits.values() for value in split.hashes], dtype=np.uint64)
    small = np.stack([value for split in splits.values() for value in split.small])
    pairs = near_pairs(hashes, small, most)
    groups = near_groups(pairs, len(place))
    parts = [f"<p>{len(pairs)} pairs in {len(groups)} groups, of {len(place)} images: perceptual hashes at most "
             f"{most} of 64 bits apart, and colours at 16 x 16 at most 8 of 255.</p>"]
    for group in groups[:12]:
        names = ", ".join(f"{place[i][0]} {splits[place[i][0]].names[place[i][1]]}" for i in group[:6])
        parts.append(inline_image(contact_sheet([small[i] for i in group[:12]], min(12, len(group)), 16).resize(
            (20 * 3 * min(12, len(group)), 60), Image.Resampling.NEAREST), f"{len(group)} images: {names}"))
    across = Counter(tuple(sorted((place[a][0], place[b][0]))) for a, b in pairs.tolist()
                     if place[a][0] != place[b][0])
    rows = []
    for i, one in enumerate(splits):
        for two in list(splits)[i + 1:]:
            said, heard = ({caption for captions in splits[name].captions for caption in captions}
                           for name in (one, two))
            rows.append([f"{one} and {two}", across[tuple(sorted((one, two)))],
                         len(set(splits[one].names) & set(splits[two].names)), len(said & heard)])
    return "".join(parts), table(["splits", "near-duplicate pairs", "same id", "captions in both"], rows)


def data_report(config: DataConfig, title: str, tokenizer: Path | None = None, limit: int = 20_000,
                most: int = 3) -> str:
    """The report as HTML. Raises ValueError or OSError if there is no data at all."""
    splits: dict[str, SplitContent] = {}
    refused: list[tuple[str, str]] = []
    left_out: LeftOut = {}
    for split in SPLITS:
        source: Source
        if config.source in FILE_SOURCES:
            source = FILE_SOURCES[config.source](getattr(config, config.source), split)  # type: ignore[arg-type]
            refused, left_out = list(source.refused), source.left_out  # the same for every split
        else:
            source = build_source(config, split)  # type: ignore[arg-type]
        splits[split] = read_split(source, limit, split)
    captions = [caption for split in splits.values() for captions in split.captions for caption in captions]
    copies, overlap = duplicate_sections(splits, most)
    thumbnails = [image for split in splits.values() for image in split.thumbnails][:THUMBNAILS]
    bad = refused + [entry for split in splits.values() for entry in split.unreadable]
    sections = [("Counts", count_table(splits)), ("Sizes", size_section(splits, config))]
    if captions:
        sections.append(("Captions", caption_section(captions)))
        if tokenizer is not None:
            sections.append(("Tokens", token_section(captions, tokenizer)))
    sections += [("Near-duplicates", copies), ("Overlap between splits", overlap)]
    if thumbnails:
        sheet = contact_sheet(thumbnails, 8, CELL)
        sections.append(("Contact sheet", inline_image(sheet, f"the first {len(thumbnails)} images")))
    sections.append((f"Unreadable: {len(bad)}", html_list([f"{name}: {reason}" for name, reason in bad])))
    if left_out:
        print(left_out_line(title, left_out), file=sys.stderr)
    sections.append((f"Left out: {sum(map(len, left_out.values()))}", "".join(
        f"<h3>{len(names)} {escape(reason)}</h3>{html_list(names)}" for reason, names in left_out.items())))
    return page(f"Data: {title}", sections)
