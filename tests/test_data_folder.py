"""Folders of images: captions from every kind of file, splits, augmentation, unreadable files, torchvision sets."""
import hashlib
import json
import os
import pickle
import shutil
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from data.catalog import DataConfig, build_source, data_key
from data.images.caption_list import caption_by_weight, caption_list, shuffled_tags
from data.images.folder import Folder, FolderConfig
from data.images.torchvision_sets import CIFAR10, FLOWERS, CifarConfig, CocoConfig, FlowersConfig
from data.loader import read_batch
from data.order import Order
from data.source import caption_in_epoch, image_batch, item_in_epoch
from files.config import from_dict, to_dict

ALL = {"validation": 0.0, "test": 0.0}


def write_image(path, number=0, size=(40, 30)):
    """An image of one colour that tells its number, (width, height) ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number % 256, number // 256, 99)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twenty images with a .txt each."""
    root = tmp_path / "images"
    for number in range(20):
        write_image(root / f"{number:02d}.png", number, (40, 30) if number % 2 else (30, 40))
        (root / f"{number:02d}.txt").write_text(f"picture {number}\n")
    return root


def source_of(root, part="train", unreadable=None, bad_share=0.5, **settings):
    config = DataConfig(source="folder", folder=FolderConfig(root=str(root), size=16, **{**ALL, **settings}),
                        bad_share=bad_share)
    return build_source(config, part, unreadable)


def numbers(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


# ---- captions

def test_a_folder_with_text_files(folder):
    source = source_of(folder)
    assert len(source) == 20 and numbers(source) == list(range(20))
    item = source[7]
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.uint8
    assert item["caption"] == "picture 7" and item["captions"] == source.captions(7) == ("picture 7",)
    assert item["id"] == "07.png" and item["frame"] == (30, 40, 0, 5, 30, 30) and item["flipped"] is False
    assert image_batch(source, np.array([0, 3])).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("table", ["jsonl", "csv", "metadata"])
def test_captions_from_a_table(tmp_path, table):
    decomposed = unicodedata.normalize("NFD", "Übung äöü 图片.png")
    for number, name in enumerate(["a.png", "sub dir/b.PNG", decomposed, "c.d.webp"]):
        write_image(tmp_path / name, number)
    composed = unicodedata.normalize("NFC", decomposed)
    if table == "csv":
        (tmp_path / "captions.csv").write_text(
            f'file,caption,weight\na.png,"one, with a comma",3\na.png,two,1\nsub dir/b.PNG,bee,\n{composed},中文,2\n'
            "c.d.webp,dots,1\n", encoding="utf-8-sig")
    else:
        rows = [{"file": "a.png", "captions": [["one, with a comma", 3], {"text": "two"}]},
                {"file_name": "sub dir/b.PNG", "text": "bee"}, {"file": composed, "caption": "中文", "weight": 2},
                {"file": "c.d.webp", "caption": ["dots"]}]
        name = "metadata.jsonl" if table == "metadata" else "captions.jsonl"
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    source = source_of(tmp_path)
    found = {source[i]["id"]: source[i] for i in range(4)}
    assert found["a.png"]["captions"] == ("one, with a comma", "two") and found["a.png"]["weights"] == (3, 1)
    assert found["a.png"]["caption"] == "one, with a comma"
    assert found["sub dir/b.PNG"]["caption"] == "bee" and found[decomposed]["caption"] == "中文"
    assert found["c.d.webp"]["caption"] == "dots"


def test_captions_are_chosen_by_their_weights():
    captions = caption_list([["often", 3], ["once", 1], ["never", 0]])
    counts = Counter(caption_by_weight(captions, draw) for draw in (np.arange(4000) + 0.5) / 4000)
    assert counts == {"often": 3000, "once": 1000}
    for wrong in ("", [], [["x", -1]], [["x", "y"]], [["x", 0]], 5, [{"weight": 2}], [["x", float("nan")]],
                  "half \ud83d"):
        with pytest.raises(ValueError):
            caption_list(wrong)


def test_every_caption_is_seen_as_often_as_its_weight_says(folder):
    (folder / "captions.jsonl").write_text(json.dumps({"file": "00.png", "captions": [["a", 3], ["b", 1]]}))
    source = source_of(folder)
    counts = Counter(item_in_epoch(source, 0, epoch, 5)["caption"] for epoch in range(400))
    assert set(counts) == {"a", "b"} and abs(counts["a"] - 300) < 5 * 8.7  # standard deviation sqrt(400 * 3/16)
    dropped = sum(caption_in_epoch(source, 0, epoch, 5, 0.25) == "" for epoch in range(400))
    assert abs(dropped - 100) < 5 * 8.7


def test_tags_are_shuffled_behind_those_that_stay():
    rng = np.random.default_rng(0)
    found = {shuffled_tags("a, b,c , d", 2, rng) for _ in range(50)}
    assert found == {"a, b, c, d", "a, b, d, c"}
    assert shuffled_tags("no tags", 0, rng) == "no tags"


# ---- augmentation

def test_what_a_run_sees_is_a_function_of_seed_epoch_and_index(folder):
    y, x = np.mgrid[:30, :40]
    for number in range(20):
        Image.fromarray(np.stack([x * 6, y * 8, x * 0 + number], 2).astype(np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("one, two, three\nfour, five, six")
    settings = {"crop": "random", "flip": 0.5, "shuffle_tags": True}
    one, two = source_of(folder, **settings), source_of(folder, **settings)
    seen = set()
    for epoch in (3, 0, 1):
        for index in (4, 19, 0):
            first = item_in_epoch(one, index, epoch, 8)
            again = item_in_epoch(two, index, epoch, 8)
            assert torch.equal(first.pop("image"), again.pop("image")) and first == again
            assert first["caption"] == caption_in_epoch(one, index, epoch, 8)
            seen.add((first["frame"], first["flipped"], first["caption"]))
    assert len(seen) == 9
    assert item_in_epoch(one, 4, 3, 9)["frame"] != item_in_epoch(one, 4, 3, 8)["frame"]
    assert torch.equal(one[4]["image"], source_of(folder)[4]["image"])  # source[i] knows nothing of it


def test_only_images_whose_captions_all_allow_it_are_mirrored(folder):
    (folder / "00.txt").write_text("a fox\na fox on the left")
    source = source_of(folder, flip=1.0)
    assert [item_in_epoch(source, 0, epoch, 0)["flipped"] for epoch in range(5)] == [False] * 5
    assert all(item_in_epoch(source, 1, epoch, 0)["flipped"] for epoch in range(5))


def test_aspect_buckets(folder):
    source = source_of(folder, buckets=True, step=4)
    order = Order(len(source), 2, source.buckets)
    shapes = {source.shapes[b] for b in source.buckets}
    assert shapes == {(12, 20), (20, 12)} and all(h * w == 240 for h, w in shapes)
    for step in range(9):
        batch = read_batch(source, order.places(step, 4), 2)
        assert tuple(batch.images.shape[2:]) in shapes and batch.frames.shape == (4, 6)
    with pytest.raises(ValueError, match="one aspect bucket a batch"):
        image_batch(source, np.array([0, 1]))


# ---- splits, content

def test_splits_by_hash_and_by_folders(tmp_path, folder):
    for number in range(200):
        write_image(tmp_path / "many" / f"{number}.png", number)
    sizes = {split: source_of(tmp_path / "many", split, validation=0.2, test=0.1, fallback="x")
             for split in ("train", "validation", "test")}
    names = [{source[i]["id"] for i in range(len(source))} for source in sizes.values()]
    assert len(set.union(*names)) == 200 == sum(map(len, names))
    assert abs(len(names[1]) - 40) < 20 and abs(len(names[2]) - 20) < 15
    for split, place in (("train", "train"), ("val", "validation"), ("test", "test")):
        shutil.copytree(folder, tmp_path / "split" / split)
        assert len(source_of(tmp_path / "split", place, split="folders")) == 20
    assert len(source_of(tmp_path / "split", "train", split="hash")) == 60


def test_the_key_follows_the_content_not_the_path(tmp_path, folder):
    def key(root, **settings):
        return data_key(DataConfig(source="folder", folder=FolderConfig(root=str(root), **settings)))

    before = key(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns(".index*"))
    assert key(moved) == before == key(folder, flip=0.5, crop="random")
    assert key(folder, background="black") != before != key(folder, size=32)
    (moved / "03.txt").write_text("another caption")
    assert key(moved) != before
    shutil.copy(folder / "03.txt", moved / "03.txt")
    assert key(moved) == before
    write_image(moved / "03.png", 77, (30, 40))
    assert key(moved) != before


def test_the_index_is_used_and_never_believed_over_the_file(folder):
    source_of(folder)
    rows = [json.loads(line) for line in (folder / ".index.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and rows[3]["sha256"] == hashlib.sha256((folder / "03.png").read_bytes()).hexdigest()
    rows[5]["height"] = 33
    (folder / ".index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert source_of(folder)[5]["frame"][0] == 33  # the file has not changed: it was not read again
    write_image(folder / "05.png", 5, (44, 50))
    assert source_of(folder)[5]["frame"][0] == 50
    for damage in ({"height": 2**70}, {"width": 0}, {"sha256": 5}, {"height": None}):
        (folder / ".index.jsonl").write_text("\n".join(json.dumps({**row, **damage}) for row in rows))
        assert source_of(folder)[5]["frame"][0] == 50
    (folder / ".index.jsonl").write_text("{ damaged")
    assert source_of(folder)[5]["frame"][0] == 50


# ---- what cannot be read

def test_unreadable_files_are_listed_once_and_skipped(folder, tmp_path, capsys):
    (folder / "04.png").write_bytes(b"no image at all")
    (folder / "06.txt").write_bytes(b"\xff\xfe broken")
    (folder / "08.txt").unlink()
    whole = (folder / "10.png").read_bytes()
    (folder / "10.png").write_bytes(whole[:50])  # the header is fine, the pixels are not
    listed = tmp_path / "run" / "unreadable.jsonl"
    source = source_of(folder, unreadable=listed)
    assert len(source) == 17
    found = numbers(source)
    assert found == [n for n in range(20) if n not in (4, 6, 8, 10)][:7] + [11] + list(range(11, 20))
    rows = {row["name"]: row["reason"] for row in map(json.loads, listed.read_text().splitlines())}
    assert set(rows) == {"04.png", "06.png", "08.png", "10.png"}
    assert "not an image" in rows["04.png"] and "06.txt" in rows["06.png"] and "no caption" in rows["08.png"]
    said = capsys.readouterr().err
    assert said.count("unreadable:") == 4
    again = source_of(folder, unreadable=listed)  # a resumed run
    place = found.index(11)
    assert again.captions(place) == ("picture 11",)  # known from the list, before the image is read
    assert numbers(again) == found and capsys.readouterr().err == "" and len(listed.read_text().splitlines()) == 4
    first, second = item_in_epoch(again, place, 2, 3), item_in_epoch(again, place, 2, 3)
    assert first["caption"] == second["caption"] == caption_in_epoch(again, place, 2, 3) == "picture 11"
    assert first["id"] == "11.png"
    knows, meets = source_of(folder, unreadable=listed, crop="random"), source_of(folder, crop="random")
    # the crop of its replacement
    assert item_in_epoch(knows, place, 2, 3)["frame"] == item_in_epoch(meets, place, 2, 3)["frame"]


def test_a_process_learns_from_the_list_what_another_has_met(folder, tmp_path):
    """Latents are encoded by one process and read by all: captions must go with them everywhere."""
    (folder / "10.png").write_bytes((folder / "10.png").read_bytes()[:50])
    one, two = (source_of(folder, unreadable=tmp_path / "list") for _ in range(2))
    assert two.captions(10) == ("picture 10",)
    assert int(one[10]["image"][0, 0, 0]) == 11
    assert two.captions(10) == ("picture 11",) == one.captions(10)


def test_names_that_are_no_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_image(tmp_path / "set" / name, 3)
    (tmp_path / "set" / name).with_suffix(".txt").write_text("latin")
    try:
        source = source_of(tmp_path / "set")
    except OSError:
        pytest.skip("this file system takes no such name")
    assert source[0]["id"] == name and source[0]["caption"] == "latin"
    (tmp_path / "set" / name).write_bytes(b"")
    write_image(tmp_path / "set" / "good.png", 4)
    for _ in range(2):  # listed once, with a name that can be found again
        assert len(source_of(tmp_path / "set", unreadable=tmp_path / "list", fallback="x")) == 1
    assert len((tmp_path / "list").read_bytes().splitlines()) == 1


def test_too_many_unreadable_files_stop_the_run(folder, tmp_path):
    for number in range(3):
        (folder / f"{number:02d}.png").write_bytes((folder / f"{number:02d}.png").read_bytes()[:50])
    source = source_of(folder, unreadable=tmp_path / "list", bad_share=0.1)
    with pytest.raises(ValueError, match=r"3 of 20 images cannot be read, more than data.bad_share = 0.1.*02.png"):
        numbers(source)
    (folder / "05.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 20 images cannot be read.*05.png \(the file is empty\)"):
        source_of(folder, bad_share=0.01)


def test_a_damaged_line_of_a_table_is_named(folder, capsys):
    lines = ['{"file": "00.png", "caption": "good"}', '{"file": ', "[1]", '{"file": "01.png"}']
    (folder / "captions.jsonl").write_text("\n".join(lines))
    source = source_of(folder)
    assert source.captions(0) == ("good",) and source.captions(1) == ("picture 1",)  # its .txt is still there
    said = capsys.readouterr().err
    assert all(f"captions.jsonl line {line}" in said for line in (2, 3, 4))


@pytest.mark.parametrize("settings, message", [
    ({"root": "nowhere"}, "root: 'nowhere' is no folder"), ({"size": 4}, "size: 4; valid: 8"),
    ({"flip": 1.5}, "flip: 1.5"), ({"background": "blurple"}, "background: 'blurple'"),
    ({"buckets": True, "step": 7}, "step: 7; valid: a divisor"), ({"test": 1.0}, "test: 1.0"),
    ({"max_aspect": 0.5}, "max_aspect: 0.5"), ({"keep_tags": -1}, "keep_tags: -1"), ({"max_pixels": 0}, "max_pixels"),
])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Folder(FolderConfig(**settings), "train")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        source_of(tmp_path)


def test_the_configuration_survives_a_round_trip():
    config = from_dict(DataConfig, {"source": "folder", "folder": {"root": "x", "size": 32, "flip": 0.5}})
    assert from_dict(DataConfig, to_dict(config)) == config and config.size == 32
    assert config.image_shapes == [(32, 32)] and DataConfig().image_shapes == [(64, 64)]
    with pytest.raises(ValueError, match="bad_share: 1"):
        from_dict(DataConfig, {"bad_share": 1.0})


# ---- torchvision's sets, tiny ones in their layouts

def test_coco_captions(tmp_path):
    for part, ids in (("train2017", range(6)), ("val2017", range(10, 30))):
        images, notes = [], []
        for number in ids:
            write_image(tmp_path / part / f"{number:012d}.jpg", number)
            images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": 30, "width": 40})
            notes += [{"image_id": number, "id": 9 * number + k, "caption": f"caption {k}\n of {number}"}
                      for k in range(5)]
        path = tmp_path / "annotations" / f"captions_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images[::-1], "annotations": notes}))
    config = DataConfig(source="coco_captions", coco_captions=CocoConfig(root=str(tmp_path), size=16))
    train, validation, test = (build_source(config, split) for split in ("train", "validation", "test"))
    assert len(train) == 6 and len(validation) + len(test) == 20 and min(len(validation), len(test)) > 3
    item = train[4]
    assert abs(int(item["image"][0, 8, 8]) - 4) < 3 and item["captions"] == tuple(f"caption {k} of 4" for k in range(5))
    assert data_key(config)["content"] == train.content
    with pytest.raises(FileNotFoundError, match="cocodataset.org"):
        build_source(DataConfig(source="coco_captions", coco_captions=CocoConfig(root=str(tmp_path / "no"))), "train")


def test_flowers_have_the_labels_that_torchvision_gives(tmp_path, monkeypatch):
    base, count = tmp_path / "flowers-102", 30
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 103, count)
    for number in range(1, count + 1):
        write_image(base / "jpg" / f"image_{number:05d}.jpg", number * 8)
    ids = rng.permutation(np.arange(1, count + 1))
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", {"trnid": ids[:8], "valid": ids[8:14], "tstid": ids[14:]})
    known = {name: (file, hashlib.md5((base / file).read_bytes()).hexdigest())  # the published ones are the whole set's
             for name, file in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", known)
    names = [name.rstrip("?") for name in getattr(datasets.Flowers102, "classes", FLOWERS)]
    assert len(FLOWERS) == 102 and list(FLOWERS) == names
    assert (FLOWERS[0], FLOWERS[72], FLOWERS[101]) == ("pink primrose", "water lily", "blackberry lily")
    for split, theirs in (("train", "test"), ("validation", "val"), ("test", "train")):
        config = DataConfig(source="flowers102", flowers102=FlowersConfig(root=str(tmp_path), size=24))
        source, peer = build_source(config, split), datasets.Flowers102(tmp_path, theirs)
        found = {source[i]["id"]: source[i] for i in range(len(source))}
        assert len(source) == len(peer)
        for path, (image, label) in zip(peer._image_files, peer):
            item = found[f"jpg/{path.name}"]
            assert FLOWERS[label] in item["caption"] and len(item["captions"]) == 4
            assert abs(int(item["image"][0, 9, 9]) - image.getpixel((20, 15))[0]) < 2
    with pytest.raises(FileNotFoundError, match=r"Flowers102\('nowhere', download=True\)"):
        build_source(DataConfig(source="flowers102", flowers102=FlowersConfig(root="nowhere")), "train")


def test_cifar10_is_what_torchvision_reads(tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)

    def written(name, count):
        data = {"data": rng.integers(0, 256, (count, 3072), np.uint8), "labels": rng.integers(0, 10, count).tolist()}
        (base / name).write_bytes(pickle.dumps(data))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}))
    meta = {"filename": "batches.meta", "key": "label_names",
            "md5": hashlib.md5((base / "batches.meta").read_bytes()).hexdigest()}
    for name, value in (("train_list", [written(f"data_batch_{k}", 10) for k in range(1, 6)]),
                        ("test_list", [written("test_batch", 10)]), ("meta", meta)):
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    config = DataConfig(source="cifar10", cifar10=CifarConfig(root=str(tmp_path), validation=0.2))
    train, validation, test = (build_source(config, split) for split in ("train", "validation", "test"))
    peer = datasets.CIFAR10(tmp_path, train=True)
    assert len(train) + len(validation) == 50 and len(validation) > 2 and len(test) == 10
    for source in (train, validation):
        item = source[1]
        image, label = peer[int(item["id"][-5:])]
        assert (item["image"].permute(1, 2, 0).numpy() == np.asarray(image)).all()
        assert peer.classes[label] in item["caption"]
    assert len(data_key(config)["content"]) == 64
    with pytest.raises(FileNotFoundError, match=r"CIFAR10\('nowhere', download=True\)"):
        build_source(DataConfig(source="cifar10", cifar10=CifarConfig(root="nowhere")), "train")
