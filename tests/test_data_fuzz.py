"""A thousand damaged inputs for the commands of data/: each ends well, or with exit code 1 and one line."""
import io
import json
import os
import random
import shutil
import tarfile
import traceback
import warnings

import numpy as np
import pytest
from PIL import Image

from data.report.__main__ import main as report
from data.tokenizer import Tokenizer, TokenizerConfig
from data.write_shards import main as write_shards

ODD = [b'"', b"\n", b"\r", b",", b"\xff\xfe", b"\xe2\x80\xa8", b"\x00", b"\x85", b"{", b"[" * 3000, b"null", b"-1",
       b"1e999", b"9" * 5000, b"NaN", b"\\ud800", b"..", b"/", b"\xef\xbb\xbf", b"<b>", b": ", b"  - ",
       b"!!python/object:os.system x"]
VALUES = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x" * 2000, "\u2028", "\ud800", [], {}, [[]], {"a": 1},
          ["x", -1], [["x", 2**2000]], "../../etc", "train", "1.png"]


def image_bytes(value, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (16 + value, 16), (value, 9, 9)).save(file, kind)
    return file.getvalue()


def folder_files():
    """A folder with every kind of file that is read."""
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    files = {f"{n}.{kind.lower()}": image_bytes(n, kind) for n, kind in enumerate(kinds)}
    files |= {f"{n}.txt": f"number {n}\nand another\n".encode() for n in range(3)}
    files["captions.csv"] = b'file,caption,weight\n3.gif,"a fox, red",2\n3.gif,b,\n'
    files["sub/4.tiff"] = image_bytes(4, "TIFF")
    files["sub/metadata.jsonl"] = (b'{"file_name": "4.tiff", "text": "x"}\n'
                                   b'{"file_name": "5.png", "captions": [["y", 2]]}\n')
    files["more/metadata.csv"] = b"file_name,text\n6.png,six\n"
    files["more/6.png"] = image_bytes(6)
    return files


def shard_folder():
    """Two shards of another writer, with lists of both kinds."""
    files = {}
    for name in ("00000", "00001"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for n in range(3):
                about = {"caption": f"number {n}", "captions": [["a", 1], ["b", 2]], "id": f"{name}{n}", "split": "val"}
                for ending, data in (("png", image_bytes(n)), ("json", json.dumps(about).encode()), ("txt", b"x")):
                    info = tarfile.TarInfo(f"{n}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        files[f"{name}.tar"] = file.getvalue()
        files[f"{name}_stats.json"] = json.dumps({"successes": 3}).encode()
    listed = [{"url": name, "nsamples": 3, "filesize": len(data)} for name, data in files.items() if "tar" in name]
    files["index.json"] = json.dumps({"shardlist": listed}).encode()
    return files


def odd_json(value, draw):
    """A JSON value with one part replaced."""
    places = []

    def visit(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    if isinstance(value, (dict, list)):
        visit(value)
    if not places:
        return draw.choice(VALUES)
    node, key = draw.choice(places)
    if isinstance(node, dict) and draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(VALUES)
    return value


def damaged(data, draw):
    """The bytes with a few changes."""
    kind = draw.randrange(7)
    if kind < 2:  # a part of JSON, in a file of one value or of lines
        try:
            lines = data.decode().splitlines() if b"\n{" in data else [data.decode()]
            place = draw.randrange(len(lines))
            lines[place] = json.dumps(odd_json(json.loads(lines[place]), draw))
            return "\n".join(lines).encode()
        except (ValueError, IndexError):
            pass
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(out) + 1)
        if kind == 2:
            del out[place:]
        elif kind == 3:
            del out[place:place + draw.randrange(1, 600)]
        elif kind == 4:
            out[place:place] = out[draw.randrange(len(out) + 1):][:draw.randrange(1, 1200)]
        elif kind == 5 and out:
            out[min(place, len(out) - 1)] = draw.randrange(256)
        else:
            out[place:place + draw.choice((0, 1, 4))] = draw.choice(ODD)
    return bytes(out)


def write(files, root):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        os.utime(root / name, ns=(10**18, 10**18))  # so that a kept index fits the files that were not changed


def ends_well(command, arguments):
    """Whether the command ended well; it may refuse in one line, and nothing else."""
    try:
        command([str(argument) for argument in arguments])
        return True
    except SystemExit as stop:
        assert isinstance(stop.code, str) and stop.code.startswith("error: ") and "\n" not in stop.code, stop.code
        return False


@pytest.fixture(scope="module")
def inputs(root, tmp_path_factory):
    """(files, arguments) by kind; {} stands for the folder of the files."""
    base = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train(["a red fox", "number 1"] * 9, TokenizerConfig(vocab_size=300, length=8)).to_json()
    size = np.load(root / "images.npy", mmap_mode="r").shape[-1]
    folder, shards = folder_files(), shard_folder()
    for name, files in (("folder", folder), ("shards", shards)):  # with the indices that the first reading leaves
        write(files, base / name)
        ends_well(report, [base / name, "--out", base / "r.html"])
        files |= {str(path.relative_to(base / name)): path.read_bytes() for path in (base / name).rglob("*")
                  if "index" in path.name}
    assert ".index.jsonl" in folder and "00000.tar.index" in shards
    emoji = {name: (root / name).read_bytes() for name in ("manifest.json", "items.jsonl", "images.npy")}
    config = (b"name: x\nseed: 1\ndata:\n  source: %s\n  bad_share: 0.9\n  folder: {root: ROOT, size: 16}\n"
              b"  shards: {root: ROOT, size: 16, fallback: x}\n  emoji: {root: ROOT, size: %d, held_out_scenes: 2, "
              b"scenes: 0.0, styles: [noto]}\n  shapes: {size: 16, train: 3, validation: 1, test: 1}\n")
    return {
        "folder": (folder, ["{}"]), "shards": (shards, ["{}"]),
        "folder by config": ({**folder, "c.yaml": config % (b"folder", size)}, ["{}/c.yaml"]),
        "shards by config": ({**shards, "c.yaml": config % (b"shards", size)}, ["{}/c.yaml"]),
        "emoji": ({**emoji, "c.yaml": config % (b"emoji", size)}, ["{}/c.yaml", "--limit", "5"]),
        "shapes": ({"c.yaml": config % (b"shapes", size)}, ["{}/c.yaml"]),
        "tokenizer": ({**folder, "t.json": tokenizer.encode()}, ["{}", "--tokenizer", "{}/t.json"])}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_damaged_inputs_end_in_one_line(inputs, tmp_path, part, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)  # the disk is not what is tested
    warnings.simplefilter("ignore")  # Pillow's, about damaged files
    well, failed = 0, []
    for number in range(250 * part, 250 * part + 250):
        draw = random.Random(number)
        kind = draw.choice(list(inputs))
        files, arguments = inputs[kind]
        files, folder = dict(files), tmp_path / str(number)
        for _ in range(draw.choice((1, 1, 2, 3))):
            name = draw.choice(sorted(files))
            files[name] = damaged(files[name], draw)
        if draw.random() < 0.1:
            del files[draw.choice(sorted(files))]
        if "c.yaml" in files:
            files["c.yaml"] = files["c.yaml"].replace(b"ROOT", str(folder).encode())
        write(files, folder)
        given = [argument.format(folder) for argument in arguments]
        command, more = ((write_shards, [f"{folder}.out"]) if len(given) == 1 and draw.random() < 0.5 else
                         (report, ["--out", f"{folder}.html"]))
        try:
            well += ends_well(command, [*given, *more])
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"case {number}, {kind}: {error!r:.200} in {place.filename} line {place.lineno}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}.out", ignore_errors=True)
    assert not failed, "\n".join(failed)
    assert 25 < well < 225  # neither everything nor nothing is refused
