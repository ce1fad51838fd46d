"""Shards: written from any source, read one by one or as a stream, and the same to the webdataset library."""
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data.catalog import DataConfig, build_source, data_key
from data.command import splits_of
from data.images.folder import FolderConfig
from data.images.shards import ShardsConfig
from data.images.tar_index import shard_index
from data.loader import Loader
from data.order import Order
from data.shapes.shapes import ShapesConfig
from data.write_shards import main, write_shards

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty images of three formats, some with two captions."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        name = f"täglich {number}{('.png', '.jpg', '.webp')[number % 3]}"
        Image.fromarray(rng.integers(0, 256, (20, 28, 3), np.uint8)).save(root / name)
        rows.append({"file": name, "caption": [[f"first {number}", 2], [f"zweites, 中 {number}", 1]][: 1 + number % 2]})
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    main([str(folder), str(out), "--shard-size", "7"])
    return out


def config_of(root, **settings):
    return DataConfig(source="shards", shards=ShardsConfig(root=str(root), size=16, **settings))


def test_shards_hold_what_the_folder_holds(folder, shards):
    index = json.loads((shards / "index.json").read_text())
    assert index["samples"] == 60 and [shard["samples"] for shard in index["shards"]] == [7] * 8 + [4]
    for split in SPLITS:
        one = build_source(DataConfig(source="folder", folder=FolderConfig(root=str(folder), size=16)), split)
        two = build_source(config_of(shards), split)
        first = {one[i]["id"]: one[i] for i in range(len(one))}
        assert len(one) == len(two) and len(first) == len(one)
        for i in range(len(two)):
            item = two[i]
            mate = first[item["id"]]
            assert torch.equal(item.pop("image"), mate.pop("image")) and item == mate
    assert data_key(config_of(shards))["content"] == build_source(config_of(shards), "test").content


def test_the_same_source_gives_the_same_bytes_and_an_interrupted_writer_goes_on(folder, shards, tmp_path, monkeypatch):
    splits = splits_of(str(folder))
    calls = []

    def stopped(path):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return shard_index(path)

    monkeypatch.setattr("data.write_shards.shard_index", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_shards(splits, tmp_path / "out", 7)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "index.json").exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(times) == 4 and not list((tmp_path / "out").glob("*.part"))
    write_shards(splits, tmp_path / "out", 7)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # not written again
    for path in shards.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert (tmp_path / "out" / "index.json").read_text() == (shards / "index.json").read_text()
    with pytest.raises(ValueError, match="begun with another source or shard size"):
        write_shards(splits, tmp_path / "out", 8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty"):
        write_shards(splits, tmp_path / "mine", 7)


def test_drawn_sources_can_be_written_too(tmp_path):
    config = DataConfig(shapes=ShapesConfig(size=16, train=9, validation=2, test=2))
    splits = {split: build_source(config, split) for split in SPLITS}
    write_shards(splits, tmp_path / "out", 5)
    for split in SPLITS:
        found = build_source(config_of(tmp_path / "out"), split)
        mates = {splits[split][i]["id"]: splits[split][i] for i in range(len(splits[split]))}
        assert len(found) == len(mates)
        for i in range(len(found)):
            item = found[i]
            assert torch.equal(item["image"], mates[item["id"]]["image"])
            assert item["captions"] == mates[item["id"]]["captions"]


def test_a_config_with_a_data_section_is_a_source_of_the_command(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text("name: x\ndata: {source: shapes, shapes: {size: 16, train: 3, validation: 1, test: 0}}")
    main([str(path), str(tmp_path / "out")])
    assert "4 images in 1 shards" in capsys.readouterr().out
    for text, message in (("data: {sauce: shapes}", "unknown key 'data.sauce'"), ("name: x", "no data section"),
                          ("data: {source: photos}", "data.source: got 'photos'; valid: one of shapes"),
                          ("data: {shapes: {size: 3}}", "data.shapes.size"), ("data: [", "not valid YAML")):
        path.write_text(text)
        with pytest.raises(SystemExit, match=message):
            main([str(path), str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="neither a folder nor a config"):
        main([str(tmp_path / "nothing"), str(tmp_path / "other")])


# ---- the webdataset library

def test_webdataset_reads_our_shards(shards):
    wds = pytest.importorskip("webdataset")
    files = sorted(map(str, shards.glob("*.tar")))
    found = {}
    for sample in wds.WebDataset(files, shardshuffle=False).decode("pil"):
        suffix = next(key for key in sample if key in ("png", "jpg", "webp"))
        found[sample["json"]["id"]] = (sample[suffix], sample["json"], sample["txt"])
    assert len(found) == 60
    for split in SPLITS:
        source = build_source(config_of(shards), split).source
        for i in range(len(source)):
            image, about, text = found[source.names[i]]
            assert about["split"] == split
            assert [tuple(entry) for entry in about["captions"]] == source.weighted_captions(i)
            assert text == source[i]["caption"]
            assert (np.asarray(source.open_image(i)) == np.asarray(image.convert("RGB"))).all()


def test_we_read_shards_that_webdataset_wrote(tmp_path):
    wds = pytest.importorskip("webdataset")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 16, 16, 3), np.uint8)
    with wds.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=5, verbose=0) as writer:
        for number, image in enumerate(images):
            key = f"dir.d/{number:04d}" if number % 2 else f"{number:04d}"  # a dot in a folder's name starts no suffix
            writer.write({"__key__": key, "png": Image.fromarray(image), "txt": f"number {number}"})
    source = build_source(config_of(tmp_path, validation=0.0, test=0.0), "train")
    assert len(source) == 12
    for i in range(12):
        number = int(source[i]["caption"].split()[1])
        assert (source[i]["image"].permute(1, 2, 0).numpy() == images[number]).all()


def test_the_layout_of_img2dataset(tmp_path):
    """Caption in .txt and in .json, where an image may be missing or damaged."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        def add(name, data):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        file = io.BytesIO()
        Image.new("RGB", (20, 16), "red").save(file, "JPEG")
        add("000000000.jpg", file.getvalue())
        add("000000000.json", json.dumps({"caption": "red", "key": "000000000", "width": 20}).encode())
        add("000000000.txt", b"red")
        add("000000001.json", json.dumps({"caption": "gone"}).encode())
        add("000000002.jpg", b"damaged")
        add("000000002.txt", b"x")
        add("000000003.jpg", file.getvalue())
        add("000000003.json", b"{ half of it")
        add("000000004.JPG", file.getvalue())
        add("000000004.txt", "zwölf\nand another".encode())
    settings = ShardsConfig(str(tmp_path), 16, test=0.0, validation=0.0)
    config = DataConfig(source="shards", shards=settings, bad_share=0.9)
    source = build_source(config, "train", tmp_path / "list")
    assert [source.captions(i) for i in range(len(source))] == [("red",), ("zwölf", "and another")]
    assert source[0]["frame"][:2] == (16, 20)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "list").read_text().splitlines()]
    assert len(reasons) == 3 and "no image" in reasons[0] and "not an image" in reasons[1]
    assert "captions cannot be read" in reasons[2]


# ---- damage

def test_a_changed_shard_is_read_anew_and_a_damaged_one_is_named(shards, tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "one.tar"
    first, second = sorted(shards.glob("*.tar"))[:2]
    path.write_bytes(first.read_bytes())
    before = shard_index(path)
    assert shard_index(path) == before
    path.write_bytes(second.read_bytes())
    assert shard_index(path)["sha256"] != before["sha256"]
    content = build_source(config_of(tmp_path / "a"), "train").content
    path.rename(tmp_path / "a" / "two.tar")
    assert build_source(config_of(tmp_path / "a"), "train").content != content
    (tmp_path / "a" / "bad.tar").write_bytes(b"this is no tar file at all, whatever its name says" * 40)
    with pytest.raises(ValueError, match="bad.tar is damaged or no tar file"):
        build_source(config_of(tmp_path / "a"), "train")
    with pytest.raises(FileNotFoundError, match="python -m data.shards SOURCE OUT"):
        build_source(config_of(tmp_path / "none"), "train")


def test_a_shard_cut_short_after_its_index_was_made_loses_only_its_end(shards, tmp_path):
    for path in sorted(shards.glob("shard*"))[:4]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = config_of(tmp_path, validation=0.0, test=0.0)
    source = build_source(DataConfig(source="shards", shards=settings.shards, bad_share=0.5), "train")
    with open(tmp_path / "shard-000001.tar", "r+b") as file:
        file.truncate(4000)
    names = [source[i]["id"] for i in range(len(source))]
    assert 0 < len(source) - len(set(names)) < 8


def test_workers_read_shards_like_this_process(shards):
    source = build_source(config_of(shards, crop="random", flip=0.5), "train")
    order = Order(len(source), 4)
    source[0]  # a tar is open already when the workers begin
    with Loader(source, order, 8, 4, workers=0) as one, Loader(source, order, 8, 4, workers=2) as two:
        for step in range(14):
            first, second = one.batch_at(step), two.batch_at(step)
            assert torch.equal(first.images, second.images) and first.captions == second.captions
            assert torch.equal(first.frames, second.frames)
