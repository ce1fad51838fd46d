"""Made-up emoji packages with the layout of the real ones, for the tests of the emoji data set."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.emoji.build import FORMAT, PACKAGES, Package, integrity, slug
from data.emoji.emoji import STYLES

SIZE = 32
TINTS = ("red", "lime", "navy", "silver", "gold", "violet", "coral", "teal", "maroon", "olive")
THINGS = ("apple", "box", "fox", "berry", "kite", "drum", "bell", "otter", "umbrella", "lamp", "house", "mouse")
# Solid, so that things can be counted in an image, and different in each style.
SHAPES = {"noto": '<circle cx="16" cy="16" r="14" fill="{}"/>',
          "twemoji": '<rect x="3" y="3" width="26" height="26" fill="{}"/>',
          "openmoji": '<circle cx="16" cy="16" r="12" fill="{}" stroke="black" stroke-width="3"/>',
          "fluent": '<ellipse cx="16" cy="16" rx="14" ry="11" fill="{}"/>',
          "flat": '<path d="M16 2L30 30H2Z" fill="{}"/>'}
TONES = {"light": "1F3FB", "medium-dark": "1F3FE", "dark": "1F3FF"}


def tgz(path: Path, members: dict) -> str:
    """Writes an npm-like archive of JSON members and returns its integrity string."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return integrity(path)


def entries() -> list[dict]:
    """Labels as emojibase writes them: plain things, a person with skin tones and a mirrored drawing."""
    found = [{"label": f"{tint} {thing}", "hexcode": f"{0xE000 + 16 * i + k:04X}-FE0F",
              "tags": [tint, thing, "made up"], "group": 3, "subgroup": 7}
             for i, tint in enumerate(TINTS) for k, thing in enumerate(THINGS)]
    person = {"label": "person walking", "hexcode": "1F6B6", "tags": ["walk"], "group": 1, "subgroup": 2}
    person["skins"] = [{"label": f"person walking: {tone} skin tone", "hexcode": f"1F6B6-{code}", "group": 1,
                        "subgroup": 2} for tone, code in TONES.items()]
    mirrored = {"label": "person walking: facing right", "hexcode": "1F6B6-200D-27A1", "tags": [], "group": 1,
                "subgroup": 2}
    keycap = {"label": "keycap: *", "hexcode": "002A-20E3", "tags": [], "group": 8, "subgroup": 9}
    given_up = {"label": "given up", "hexcode": "F0000", "tags": [], "group": 3, "subgroup": 7}
    return [*found, person, mirrored, keycap, given_up]


def icon_sets(style: str) -> tuple[dict, dict]:
    """(icons.json, chars.json) of a style: names and code points as that package has them."""
    icons, chars = {}, {}
    suffix = "" if style in ("fluent", "flat") else "-skin-tone"  # fluent writes tones shorter
    for i, entry in enumerate(entries()):
        for k, version in enumerate([entry, *entry.get("skins", [])]):
            name = slug(version["label"]).replace("-skin-tone", suffix)
            fill = f"#{(i * 37 + 40) % 200:02x}{(k * 60 + i) % 256:02x}{(200 - i) % 256:02x}"
            icons[name] = {"body": SHAPES[style].format(fill)}
            chars[version["hexcode"].lower().replace("-fe0f", "")] = name
    icons["given-up"]["hidden"] = True
    icons["a-brand"] = {"body": SHAPES[style].format("#654321")}  # no code point: not a Unicode emoji
    icons["keycap-asterisk"] = dict(icons["red-apple"])  # the same drawing under two names
    return {"icons": icons, "width": 32, "height": 32}, chars


def write_packages(folder: Path) -> tuple[Package, ...]:
    """Writes the .tgz files and returns their table, with their own hashes."""
    table = []
    for package in PACKAGES:
        if package.style:
            icons, chars = icon_sets(package.style)
            members = {"icons.json": icons, "chars.json": {} if package.style == "fluent" else chars}
        else:
            members = {"en/data.json": entries(), "en/messages.json": {
                "groups": [{"order": 1, "message": "people & body"}, {"order": 3, "message": "animals & nature"}],
                "subgroups": [{"order": 2, "message": "activities"}, {"order": 7, "message": "mammals"}]}}
        table.append(replace(package, integrity=tgz(folder / package.file, members)))
    return tuple(table)


def items_of(root: Path) -> list[dict]:
    """The items of a built folder."""
    return [json.loads(line) for line in (root / "items.jsonl").read_text().splitlines()]


def emoji_folder(root: Path, size: int) -> Path:
    """A folder as `python -m data.emoji` writes it, with thirty things in every style: discs of their own colours, with
    a white ring for each style."""
    items, images = [], []
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    radius = np.hypot(x, y) / size
    alpha = np.where(radius < 0.4, 255, 0)
    for place, style in enumerate(STYLES):
        ring = (radius > 0.07 * place) & (radius < 0.07 * (place + 1))
        for number in range(30):
            colour = [(number % 3) * 110, number // 3 % 3 * 110, number // 9 * 75]
            name = f"{TINTS[number % 10]}-{THINGS[number // 10]}"
            items.append({"id": f"{style}/{name}", "name": name, "base": name, "tone": "", "style": style,
                          "label": name.replace("-", " "), "tags": ["made up"], "group": "objects", "subgroup": "tool",
                          "licence": "MIT", "rgb": colour})
            images.append(np.stack([*(np.where(ring, 255, channel) * alpha // 255 for channel in colour), alpha]))
    root.mkdir()
    np.save(root / "images.npy", np.stack(images).astype(np.uint8))
    text = "".join(json.dumps(item) + "\n" for item in items)
    (root / "items.jsonl").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (root / "manifest.json").write_text(json.dumps({"format": FORMAT, "size": size, "count": len(items),
                                                    "items_sha256": digest}))
    return root
