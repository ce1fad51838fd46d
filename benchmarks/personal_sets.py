"""Folders to teach from and to compare with: a sixth style of emoji, and a thing that the base has never seen.

    python -m benchmarks.personal_sets --out runs/data/personal

fetches the black drawings of EmojiOne 2 (npm package @iconify-json/emojione-monotone, EmojiTwo, CC BY 4.0), which are
in no training image of weights/emoji-64, renders them as `data.emoji` does and writes, with captions in .txt files:

style/taught    the 16 names below, captions "a NAME, sks style"
style/all       every name that is in none of the other folders: what a ceiling is trained on
style/real      128 names to compare with, captions "a NAME"; prompts.txt has the first 64 of them
style/tuning    32 further names, to choose settings on; tuning.txt has their prompts
subject         one emoji whose name is in no training image (`held_out` "name"), in four of the five styles

Names with people, signs and flags are kept for style/all only, because the base does not draw them well. The emoji data
set has to be there (`python -m data.emoji --out runs/data/emoji64`).
"""
import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.emoji.build import Package, check, fetch, read_json, render, svg
from data.emoji.emoji import SCENE_GROUPS, Emoji, EmojiConfig
from data.emoji.phrasings import article, noun
from data.emoji.scenes import canvas, over
from files.whole import unit_hash, write_text

MONOTONE = Package(
    "@iconify-json/emojione-monotone", "1.2.1",
    "sha512-cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
    "monotone", "CC-BY-4.0", "EmojiOne 2.2.7, EmojiTwo, https://github.com/EmojiTwo/emojitwo, resized")
TAUGHT = ("grinning-face", "winking-face", "crying-face", "red-heart", "broken-heart", "star", "cat-face", "pig-face",
          "red-apple", "banana", "fire-engine", "bus", "guitar", "alarm-clock", "soccer-ball", "house")
TRIGGER = "sks"
SUBJECT, SUBJECT_STYLES = "unicorn", ("noto", "twemoji", "openmoji", "fluent")
REAL, PROMPTS, TUNING = 128, 64, 32


def on_white(drawing: np.ndarray) -> Image.Image:
    """Premultiplied RGBA (4, S, S) uint8 as an image on white."""
    white = canvas({"kind": "plain", "colours": ["white"]}, drawing.shape[-1])
    return Image.fromarray(over(drawing, white).transpose(1, 2, 0))


def save(folder: Path, name: str, image: Image.Image, caption: str) -> None:
    """Write NAME.png and NAME.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png")
    write_text(folder / f"{name}.txt", caption + "\n")


def matching(source: Emoji, icons: dict) -> dict[str, dict]:
    """The items of the emoji data set that the package has under the same name; none whose name is held out."""
    held = {source.items[row]["name"] for row, why in source.held_out.items() if why == "name"}
    found = {item["name"]: item for item in source.items if item["name"] in icons["icons"] and not item["tone"]}
    return {name: item for name, item in sorted(found.items())
            if name not in held and not icons["icons"][name].get("hidden")}


def write_style(source: Emoji, icons: dict, out: Path, taught: Sequence[str] = TAUGHT, real_count: int = REAL,
                tuning_count: int = TUNING) -> None:
    """The four folders and the two files of prompts of the style. Raises ValueError if a name to teach is missing."""
    items, size = matching(source, icons), source.config.size
    missing = [name for name in taught if name not in items]
    if missing:
        raise ValueError(f"{MONOTONE.name}: no {', '.join(missing)} in it; valid: the pinned version")
    simple = sorted((name for name, item in items.items() if name not in taught and item["group"] in SCENE_GROUPS
                     and len(noun(item["label"]).split(" ")) <= 2), key=lambda name: unit_hash("sixth style", name))
    real, tuning = simple[:real_count], simple[real_count:real_count + tuning_count]
    for name, item in items.items():
        thing = article(noun(item["label"]))
        image = on_white(render(svg(icons["icons"][name], icons), size))
        if name in real or name in tuning:
            save(out / ("real" if name in real else "tuning"), name, image, thing)
        else:
            save(out / "all", name, image, f"{thing}, {TRIGGER} style")
            if name in taught:
                save(out / "taught", name, image, f"{thing}, {TRIGGER} style")
    for file, names in (("prompts.txt", real[:PROMPTS]), ("tuning.txt", tuning)):
        write_text(out / file, "".join(article(noun(items[name]["label"])) + "\n" for name in names))


def write_subject(source: Emoji, out: Path, subject: str = SUBJECT) -> None:
    """Four drawings of the held-out emoji, each in its style."""
    for style in SUBJECT_STYLES:
        row = source.row_of[f"{style}/{subject}"]
        caption = f"{article(noun(source.items[row]['label']))}, {style} style"
        save(out, f"{subject}-{style}", on_white(source.rgba(row)), caption)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folders; what stands there is replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/data/personal"), help="folder (%(default)s)")
    parser.add_argument("--emoji", default="runs/data/emoji64", help="the emoji data set (%(default)s)")
    parser.add_argument("--packages", type=Path, help="folder with the package, instead of fetching it")
    options = parser.parse_args(arguments)
    try:
        source = Emoji(EmojiConfig(root=options.emoji, scenes=0.0))
        folder = options.packages or options.out / "package"
        path = folder / MONOTONE.file if options.packages else fetch(MONOTONE, folder)
        check(MONOTONE, path)
        for part in ("style", "subject"):
            shutil.rmtree(options.out / part, ignore_errors=True)
        write_style(source, read_json(path, "icons.json"), options.out / "style")
        write_subject(source, options.out / "subject")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    write_text(options.out / "ATTRIBUTION.md", f"style: {MONOTONE.credit}, {MONOTONE.licence}.\nsubject: see "
               f"ATTRIBUTION.md in {options.emoji}.\n")
    counts = {str(path.relative_to(options.out)): len(list(path.glob("*.png")))
              for path in sorted(options.out.rglob("*")) if path.is_dir()}
    print(", ".join(f"{name}: {count} images" for name, count in counts.items() if count))


if __name__ == "__main__":
    main()
