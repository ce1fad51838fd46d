"""Shards of other writers: samples as webdataset groups them, img2dataset's files, and shards that are not whole."""
import io
import json
import tarfile

import pytest
from PIL import Image

from data.catalog import DataConfig, build_source
from data.images.shards import Shards, ShardsConfig
from data.images.tar_index import shard_index
from data.write_shards import main


def png(value=0, kind="PNG", size=(16, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, kind)
    return file.getvalue()


def tar(path, members, form=tarfile.USTAR_FORMAT, **more):
    """A tar of (name, bytes) or, for an entry of another kind, (name, [kind])."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, **more) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data[0], "0.png"
                file.addfile(info)


def read(root, part="train", **settings):
    return Shards(ShardsConfig(root=str(root), size=16, **{"validation": 0, "test": 0, **settings}), part)


def items(source):
    return {source.names[i]: (source.captions(i), int(source[i]["image"][0, 0, 0])) for i in range(len(source))}


def pair(key, value, text):
    return [(f"{key}.png", png(value)), (f"{key}.txt", text.encode())]


# ---- samples

LAYOUTS = {  # what webdataset makes of it is in the test below
    "plain": [*pair("0", 1, "zero"), *pair("sub.v1/a/1", 2, "one"), *pair("./2", 3, "two")],
    "two images": [("0.depth.png", png(9)), ("0.JPG", png(1, "JPEG")), ("0.txt", b"zero"), ("0.mask.png", png(8))],
    "dots": [*pair("clip_0.5", 1, "first"), *pair("clip_0.7", 2, "second"), *pair("ok", 3, "third")],
    "shared text": [("cat.v1.png", png(1)), ("cat.v2.png", png(2)), ("cat.txt", b"a cat"), *pair("dog", 3, "a dog")],
    "apart": [("0.png", png(1)), ("1.png", png(2)), ("0.txt", b"zero"), ("1.txt", b"one"), *pair("2", 3, "two")],
    "skipped": [("__meta__", b"x"), ("__notes__/0.png", png(9)), ("noending", b"x"), *pair("0", 1, "zero")],
    "endings of text": [("0.png", png(1)), ("0.TEXT", b"zero"), ("1.png", png(2)), ("1.transcript", b"one"),
                        ("2.png", png(3)), ("2.jsn", b'{"caption": "two"}')],
}
KEPT = {"plain": {"0": 1, "sub.v1/a/1": 2, "./2": 3}, "two images": {"0": 1}, "dots": {"ok": 3},
        "shared text": {"dog": 3}, "apart": {"2": 3}, "skipped": {"0": 1}, "endings of text": {"0": 1, "1": 2, "2": 3}}


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_are_those_of_webdataset(tmp_path, name):
    """Every sample that webdataset yields is an item, or is refused by its shard and name; the members agree."""
    tar(tmp_path / "a.tar", LAYOUTS[name])
    source = read(tmp_path)
    found = {key: value for key, (_, value) in items(source).items()}
    assert found.keys() == KEPT[name].keys() and all(abs(found[key] - KEPT[name][key]) < 2 for key in found)
    wds = pytest.importorskip("webdataset")
    theirs = [(sample["__key__"], {key for key in sample if not key.startswith("__")})
              for sample in wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)]
    rows = shard_index(tmp_path / "a.tar")["samples"]
    assert [key for key, _ in theirs] == [row["key"] for row in rows]
    assert source.found == len(theirs) == len(source) + len(source.refused)
    for key, members in theirs:
        listed = next((reason for place, reason in source.refused if place == f"a.tar/{key}"), None)
        if listed is None:
            assert members & {"png", "jpg"}
        else:
            assert all(member in listed for member in members if member.endswith("png"))


def test_names_that_occur_twice_are_kept_apart_or_refused(tmp_path):
    tar(tmp_path / "a.tar", [*pair("0", 1, "first"), *pair("0", 2, "second"), *pair("1", 3, "one"),
                             *pair("2", 4, "two"), *pair("1", 5, "one again")])
    tar(tmp_path / "b.tar", [*pair("1", 6, "one of b"), ("3.png", png(7)), ("3.json", b'{"id": "2", "caption": "x"}')])
    source = read(tmp_path)
    assert items(source) == {"a.tar/1": (("one",), 3), "a.tar/2": (("two",), 4), "b.tar/1": (("one of b",), 6),
                             "b.tar/3": (("x",), 7)}
    assert source.refused == [("a.tar/0", "its shard has two members 0.png, 0.txt"),
                              ("a.tar/1", "its shard holds an earlier sample of this name")]
    wds = pytest.importorskip("webdataset")
    with pytest.raises(ValueError, match="duplicate file name"):
        list(wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))


def test_split_words_are_known_or_refused(tmp_path):
    words = ["train", "Train", "training", "val", "valid", "dev", " VALIDATION", "test", "eval", None]
    tar(tmp_path / "a.tar", [(f"{n}.{ending}", data) for n, word in enumerate([*words, 7, "holdout", ["train"]])
                             for ending, data in (("png", png(n)), ("json", json.dumps(
                                 {"caption": "x", "split": word}).encode()))])
    parts = {part: {value for _, value in items(read(tmp_path, part)).values()}
             for part in ("train", "validation", "test")}
    assert parts == {"train": {0, 1, 2, 9}, "validation": {3, 4, 5, 6}, "test": {7, 8}}
    refused = dict(read(tmp_path).refused)
    assert refused.keys() == {"a.tar/10", "a.tar/11", "a.tar/12"}
    assert refused["a.tar/11"].startswith("its split is 'holdout'; valid: train, training, validation, valid, val, dev")


def test_captions_in_json(tmp_path):
    cases = [({"caption": None, "text": "t"}, "txt 0"), ({"captions": []}, "txt 1"), ({"caption": ["a"]}, "a"),
             ({"caption": "x", "id": None}, "x"), ({"caption": "", "text": ""}, "txt 4"), ({"text": "t"}, "txt 5")]
    tar(tmp_path / "a.tar", [(f"{n}.{ending}", data) for n, (about, _) in enumerate(cases) for ending, data in (
        ("png", png(n)), ("json", json.dumps(about).encode()), ("txt", f"txt {n}".encode()))])
    tar(tmp_path / "b.tar", [("a.png", png()), ("a.json", b'{"text": "only here"}'), ("b.png", png()), ("b.txt", b""),
                             ("c.png", png()), ("c.json", b'{"caption": "\\ud800"}'), ("d.png", png()),
                             ("d.json", b'{"caption": "x", "id": "\\ud800"}'), ("e.png", png()),
                             ("e.json", b"[" * 100_000), ("f.png", png()), ("f.caption", b"x")])
    source = read(tmp_path)
    found = {name: captions for name, (captions, _) in items(source).items()}
    assert found == {**{str(n): (text,) for n, (_, text) in enumerate(cases)}, "a": ("only here",)}
    reasons = dict(source.refused)
    assert reasons["b.tar/b"] == "it has no caption; its members: png, txt"
    assert reasons["b.tar/f"] == "it has no caption; its members: png, caption"
    assert "half of a character" in reasons["b.tar/c"] and "its id is not Unicode" in reasons["b.tar/d"]
    assert "captions cannot be read" in reasons["b.tar/e"]


def test_members_that_belong_to_no_sample_are_counted(tmp_path):
    tar(tmp_path / "a.tar", [*pair("0", 1, "zero"), ("1.png", [tarfile.SYMTYPE]), ("2.png", [tarfile.LNKTYPE]),
                             ("__meta__", b"x"), ("._0.png", b"x"), ("__MACOSX/._0.png", b"x"), ("LICENSE", b"x"),
                             ("sub", [tarfile.DIRTYPE])])
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    tar(tmp_path / "more" / "c.tar", pair("9", 9, "nine"))
    assert read(tmp_path).left_out == {
        "compressed tar files; unpack them to .tar": ["b.tar.gz"], "tar files in subfolders": ["more/c.tar"],
        "members that are links or no files": ["a.tar/1.png", "a.tar/2.png"],
        "members with a name that webdataset skips": ["a.tar/__meta__"],
        "hidden members": ["a.tar/._0.png", "a.tar/__MACOSX/._0.png"], "members without an ending": ["a.tar/LICENSE"]}
    assert read(tmp_path).left_out == read(tmp_path).left_out  # from the index the second time


def test_names_that_are_no_utf8_go_through_and_back(tmp_path, capsys):
    tar(tmp_path / "in" / "a.tar", [("caf\xe9.png", png(5)), ("caf\xe9.txt", b"a cafe"), *pair("\u2028x", 6, "line")],
        tarfile.GNU_FORMAT, encoding="latin-1", errors="replace")
    main([str(tmp_path / "in"), str(tmp_path / "out")])
    main([str(tmp_path / "out"), str(tmp_path / "again")])
    for name in ("in", "out", "again"):
        assert items(read(tmp_path / name))["caf\udce9"] == (("a cafe",), 5)


def test_the_image_that_fails_is_named_with_its_shard(tmp_path):
    tar(tmp_path / "a.tar", [*pair("0", 1, "zero"), ("1.png", png(2, size=(64, 64))[:60]), ("1.txt", b"one")])
    config = DataConfig(source="shards", shards=ShardsConfig(root=str(tmp_path), size=16, validation=0, test=0),
                        bad_share=0.5)
    source = build_source(config, "train", tmp_path / "list")
    assert source[1]["id"] == "0"
    assert "(in a.tar)" in json.loads((tmp_path / "list").read_text())["reason"]


# ---- shards that are not whole

def test_a_shard_that_was_cut_anywhere_is_noticed(tmp_path):
    """Every block at which a file may end, until only zeros behind the end mark are missing."""
    tar(tmp_path / "a.tar", [member for n in range(3) for member in pair(str(n), n, f"number {n}")])
    whole = (tmp_path / "a.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # the last block of the last member
    assert len(read(tmp_path)) == 3
    for cut in [*range(512, end + 512, 512), end + 511, *range(100, end, 700)]:
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="a.tar is damaged or no tar file"):
            read(tmp_path)
    for cut in (end + 512, end + 1024):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        assert len(read(tmp_path)) == 3


def test_damage_in_the_middle_and_tars_joined_end_to_end_are_noticed(tmp_path):
    tar(tmp_path / "a.tar", [member for n in range(3) for member in pair(str(n), n, f"number {n}")])
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as file:
        second = file.getmember("1.png").offset
    (tmp_path / "a.tar").write_bytes(whole[:second] + b"\xff" * 512 + whole[second + 512:])
    with pytest.raises(ValueError, match=f"the header at byte {second} is damaged"):
        read(tmp_path)
    (tmp_path / "a.tar").write_bytes(whole + whole)
    with pytest.raises(ValueError, match="something follows its end mark"):
        read(tmp_path)


@pytest.fixture
def written(tmp_path):
    """Twelve images in three shards of our writer."""
    for number in range(12):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(png(number))
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"number {number}")
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--shard-size", "4"])
    return tmp_path / "out"


def test_what_index_json_lists_must_be_there(written, tmp_path):
    assert read(written).found == 12
    third, listed = written / "shard-000002.tar", written / "index.json"
    data, about = third.read_bytes(), listed.read_text()
    third.unlink()
    with pytest.raises(ValueError, match="shard-000002.tar is missing, which index.json"):
        read(written)
    tar(third, pair("0", 1, "other"))
    with pytest.raises(ValueError, match="shard-000002.tar is not the one .* samples 1 and not 4, bytes"):
        read(written)
    third.write_bytes(data)
    tar(written / "more.tar", pair("0", 1, "other"))
    with pytest.raises(ValueError, match="index.json does not list more.tar"):
        read(written)
    (written / "more.tar").unlink()
    for text in ("{", "[]", "7", '{"shards": 5}', '{"shards": [{"name": 3}]}', "[" * 100_000, '{"else": 1}'):
        listed.write_text(text)
        with pytest.raises(ValueError, match="index.json is damaged or lists no shards"):
            read(written)
    listed.unlink()
    with pytest.raises(ValueError, match="out is not finished; valid: the command that began it"):
        read(written)
    listed.write_text(about)
    assert read(written).found == 12


def test_the_lists_of_wids_and_img2dataset(tmp_path):
    tar(tmp_path / "00000.tar", [*pair("000000000", 1, "zero"), *pair("000000001", 2, "one")])
    (tmp_path / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": [
        {"url": "http://somewhere/00000.tar", "nsamples": 3}]}))
    with pytest.raises(ValueError, match="samples 2 and not 3"):
        read(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": [{"url": "00000.tar", "nsamples": 2}]}))
    assert read(tmp_path).found == 2
    (tmp_path / "index.json").unlink()
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": 2, "failed_to_download": 3}))
    (tmp_path / "00000.parquet").write_bytes(b"x")
    assert read(tmp_path).found == 2 and not read(tmp_path).left_out
    (tmp_path / "00001_stats.json").write_text(json.dumps({"count": 5, "successes": 5}))
    with pytest.raises(ValueError, match="00001.tar is missing"):
        read(tmp_path)
    (tmp_path / "00001_stats.json").unlink()
    (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": 5}))
    with pytest.raises(ValueError, match="00000.tar is not the one .* samples 2 and not 5"):
        read(tmp_path)


def test_a_damaged_index_beside_a_tar_is_made_again(written):
    path = written / "shard-000000.tar"
    wanted, kept = shard_index(path), path.with_name(path.name + ".index")
    for change in ({"samples": [{}]}, {"samples": [{"key": "0"}]}, {"samples": 3}, {"left_out": []}, {"samples": [[]]},
                   {"samples": [{**wanted["samples"][0], "offset": "x"}]}, {"format": 1}, {"sha256": None},
                   {"samples": [{**wanted["samples"][0], "height": 2**40}]}, {"samples": [
                       {**wanted["samples"][0], "captions": [["x"]]}]}):
        kept.write_text(json.dumps({**wanted, **change}))
        assert shard_index(path) == wanted
    kept.write_bytes(b"\xff\xfe")
    assert shard_index(path) == wanted


def test_the_command_reads_bad_share(tmp_path, capsys):
    for number in range(10):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.png").write_bytes(png(number, size=(64, 64))[:60 if number < 2 else None])
        (tmp_path / "in" / f"{number}.txt").write_text("x")
    for share, good in ((0.1, False), (0.2, True)):
        (tmp_path / "c.yaml").write_text(f"data: {{source: folder, bad_share: {share}, folder: {{root: "
                                         f"{tmp_path / 'in'}, size: 16}}}}")
        if good:
            main([str(tmp_path / "c.yaml"), str(tmp_path / str(share))])
            assert "8 images in 1 shards" in capsys.readouterr().out and read(tmp_path / str(share)).found == 8
        else:
            with pytest.raises(SystemExit, match="2 of 10 images cannot be read, more than bad_share = 0.1"):
                main([str(tmp_path / "c.yaml"), str(tmp_path / str(share))])
