"""Folders as people have them: links are followed, and what is left out is counted by its reason."""
import json
import os
import re

import pytest
from PIL import Image

from data.catalog import DataConfig, build_source
from data.command import data_config_of
from data.images.folder import OUTSIDE, Folder, FolderConfig
from data.images.folder_files import MOST_REASONS, left_out_line
from data.images.transforms import SUFFIXES, decode_image, image_size
from data.report.__main__ import main as report
from data.write_shards import main as write_shards


def image(path, value=0, size=(16, 16), kind=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path, kind, **more)


def read(root, part="train", **settings):
    return Folder(FolderConfig(root=str(root), size=16, fallback="x", **{"validation": 0, "test": 0, **settings}), part)


def names(source):
    return [source.names[i] for i in range(len(source))]


def test_linked_folders_and_files_are_read_and_circles_are_not(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    image(root / "a" / "0.png")
    image(elsewhere / "deep" / "1.png", 1)
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "2.png").symlink_to(elsewhere / "deep" / "1.png")
    (root / "a" / "back").symlink_to(root, target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a", target_is_directory=True)
    (elsewhere / "home").symlink_to(root / "a", target_is_directory=True)  # linked/home/back is a circle of two links
    (root / "broken.png").symlink_to(root / "nothing.png")
    source = read(root)
    assert names(source) == ["2.png", "a/0.png", "linked/deep/1.png", "linked/home/0.png"]
    assert source.refused == [("broken.png", "No such file or directory")]
    assert source.left_out == {"links to a folder that they lie in": [
        "a/back", "a/self", "linked/home/back", "linked/home/self"]}
    assert int(source[2]["image"][0, 0, 0]) == 1


def test_something_that_is_no_file_stops_nothing(tmp_path):
    image(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")  # reading it would wait for a writer without end
    source = read(tmp_path)
    assert names(source) == ["0.png"] and source.refused == [("1.png", "it is no regular file")]


def test_common_endings_are_read(tmp_path):
    kinds = {".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
    for number, suffix in enumerate(SUFFIXES):
        image(tmp_path / f"{number}{suffix}", 200, kind=kinds.get(suffix, "JPEG"))
        image(tmp_path / f"capitals{number}{suffix.upper()}", 200, kind=kinds.get(suffix, "JPEG"))
    source = read(tmp_path)
    assert len(source) == 2 * len(SUFFIXES) and not source.left_out and not source.refused
    assert all(abs(int(source[i]["image"][0, 8, 8]) - 200) < 4 for i in range(len(source)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_the_size_of_a_turned_image_is_that_of_its_pixels(tmp_path, kind, turn):
    about = Image.Exif()
    about[0x0112] = turn
    image(tmp_path / "x", size=(24, 16), kind=kind, exif=about)
    data = (tmp_path / "x").read_bytes()
    upright = decode_image(data, "x", (0, 0, 0), 10**6)
    assert image_size(data, "x", 10**6) == (upright.height, upright.width) == ((24, 16) if turn > 4 else (16, 24))


def test_values_without_a_known_range_are_refused(tmp_path):
    image(tmp_path / "0.png")
    Image.new("F", (16, 16), 0.5).save(tmp_path / "1.tif")
    Image.new("I", (16, 16), 70_000).save(tmp_path / "2.tif")
    source = build_source(DataConfig(source="folder", folder=FolderConfig(
        root=str(tmp_path), size=16, validation=0, test=0, fallback="x"), bad_share=0.9), "train", tmp_path / "list")
    assert [source[i]["id"] for i in range(3)] == ["0.png"] * 3
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "list").read_text().splitlines()]
    assert sum("valid: 8 or 16 bits a channel" in reason for reason in reasons) == 2


def test_folders_of_splits_by_any_of_their_names_and_what_lies_outside(tmp_path):
    for number, name in enumerate(["Train", "training", "Val", "valid", "dev", "VALIDATION", "test", "eval", "extra"]):
        image(tmp_path / name / f"{number}.png", number)
    image(tmp_path / "root.png")
    parts = {part: read(tmp_path, part, split="folders") for part in ("train", "validation", "test")}
    assert {part: sorted(int(name[-5]) for name in names(source)) for part, source in parts.items()} == {
        "train": [0, 1], "validation": [2, 3, 4, 5], "test": [6, 7]}
    assert parts["test"].left_out == {OUTSIDE: ["extra/8.png", "root.png"]} and parts["test"].found == 8
    assert data_config_of(str(tmp_path)).folder.split == "folders"


def test_what_is_left_out_is_said_once_and_is_on_the_report(tmp_path, capsys):
    root = tmp_path / "set"
    for number in range(4):
        image(root / f"{number}.png", number)
        (root / f"{number}.txt").write_text("a caption")
    for name in ("a.svg", "b.svg", ".hidden.png", ".DS_Store", "README", "lost.txt", ".git/x.png", "c.heic"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    config = DataConfig(source="folder", folder=FolderConfig(root=str(root), size=16))
    for part in ("train", "validation", "test"):
        build_source(config, part, tmp_path / "list")
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("left out of") == 1
    assert "2 files that end in .svg (a.svg, ...)" in said
    for other in ("1 hidden images", "1 hidden folders", "1 other hidden files (.DS_Store)", "files that end in .heic",
                  "1 files without an ending", "1 text files without an image of their name (lost.txt)"):
        assert other in said
    build_source(config, "train", tmp_path / "list")
    assert capsys.readouterr().err == ""  # another process of the run, or a resumed one
    (root / "d.mp4").write_bytes(b"x")
    build_source(config, "train", tmp_path / "list")
    assert "1 files that end in .mp4" in capsys.readouterr().err
    report([str(root), "--out", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text()
    assert "Left out: 9" in text and re.search(r"2 files that end in .svg.*a\.svg.*b\.svg", text)
    assert "2 files that end in .svg" in capsys.readouterr().err


def test_the_commands_say_it_once_as_well(tmp_path, capsys):
    image(tmp_path / "set" / "0.png")
    (tmp_path / "set" / "0.txt").write_text("x")
    image(tmp_path / "set" / "1.png")
    (tmp_path / "set" / "2.svg").write_text("x")
    (tmp_path / "c.yaml").write_text(f"data: {{source: folder, bad_share: 0.6, folder: {{root: {tmp_path / 'set'}}}}}")
    write_shards([str(tmp_path / "c.yaml"), str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "1 images in 1 shards" in said.out
    assert said.err.count("left out of") == said.err.count("unreadable: 1.png: it has no caption") == 1


def test_a_line_about_many_reasons_ends():
    line = left_out_line("X", {f"files that end in .{n}": [f"a.{n}"] for n in range(99)})
    assert line.count(";") == MOST_REASONS and line.endswith(f"{99 - MOST_REASONS} further kinds")
    assert left_out_line("X", {}) == ""
