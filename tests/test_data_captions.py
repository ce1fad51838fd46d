"""Captions as people bring them: nothing of a table or a text file is cut, swallowed or passed over without a word."""
import json

import pytest
from PIL import Image

import moderate
from data.images.folder import Folder, FolderConfig
from data.images.folder_files import left_out_line
from files.text import CsvTable, lines_of, read_lines
from moderate import options_of, texts_of
from sampling.plan import Plan, read_prompts
from training.moderation.corpus import read_file

ODD = "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"  # str.splitlines ends a line at each


def images(root, *names):
    for number, name in enumerate(names or ("0.png", "1.png", "2.png", "3.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(root / name)


def read(root, part="train", **settings):
    return Folder(FolderConfig(root=str(root), size=16, validation=0, test=0, **settings), part)


def captions(source):
    return {source.names[i]: list(source.captions(i)) for i in range(len(source))}


# ---- text files

def test_only_cr_and_lf_end_a_line(tmp_path):
    text = "".join(f"a{odd}b" for odd in ODD)
    for end in ("\n", "\r", "\r\n"):
        assert lines_of(f"{text}{end}{end}second{end}") == [text, "", "second"] == lines_of(f"{text}{end}{end}second")
    assert lines_of("") == [] and lines_of("\n") == [""] and lines_of("x") == ["x"]
    (tmp_path / "mark.txt").write_bytes("\ufeffa red star\r\n".encode())
    assert read_lines(tmp_path / "mark.txt") == ["a red star"]
    for data, message in ((b"a\nb\xe9c\n", "0xe9 in line 2"), ("a".encode("utf-16"), "0xff in line 1"),
                          (b"a\r\xe9", "0xe9 in line 2")):
        (tmp_path / "other.txt").write_bytes(data)
        with pytest.raises(ValueError, match=f"other.txt is not a text file in UTF-8: byte {message}"):
            read_lines(tmp_path / "other.txt")


@pytest.mark.parametrize("odd", ODD)
def test_a_caption_stays_whole_in_every_kind_of_file(tmp_path, odd):
    images(tmp_path)
    text = f"a red fox{odd}in deep snow"
    (tmp_path / "0.txt").write_bytes(text.encode())
    (tmp_path / "captions.csv").write_bytes(f"file,caption\n1.png,{text}\n".encode())
    assert captions(read(tmp_path)) == dict.fromkeys(("0.png", "1.png"), ["a red fox in deep snow"])
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "2.png", "caption": text}, ensure_ascii=False))
    assert captions(read(tmp_path))["2.png"] == ["a red fox in deep snow"]


def test_text_files_with_a_capital_ending_are_read_and_others_are_named(tmp_path):
    images(tmp_path)
    (tmp_path / "0.TXT").write_text("capitals")
    (tmp_path / "1.TXT").write_text("one of two")
    (tmp_path / "1.txt").write_text("the other")
    (tmp_path / "2.png.txt").write_text("another habit")
    (tmp_path / "3.caption").write_text("another ending")
    source = read(tmp_path)
    assert captions(source) == {"0.png": ["capitals"], "1.png": ["the other"]}
    assert source.left_out == {"text files without an image of their name": ["2.png.txt"],
                               "text files beside another of their name": ["1.TXT"],
                               "files that end in .caption": ["3.caption"]}


# ---- the other commands that read text

def test_prompts_and_texts_to_moderate_are_read_alike(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffa red star\r\na red fox\u2028in\x85deep\x0csnow\ra blue moon\n".encode())
    wanted = ["a red star", "a red fox\u2028in\x85deep\x0csnow", "a blue moon"]
    assert read_prompts(Plan(file=str(path))) == wanted
    assert texts_of(options_of(["check", "--file", str(path)])) == wanted
    path.write_bytes(b"a red star\ncaf\xe9\n")
    with pytest.raises(ValueError, match="texts.txt is not a text file in UTF-8: byte 0xe9 in line 2"):
        read_prompts(Plan(file=str(path)))
    with pytest.raises(ValueError, match="0xe9 in line 2"):
        moderate.main(["check", "--file", str(path)])


def test_the_text_that_moderation_learns_from_is_read_strictly(tmp_path):
    def rows(text):
        (tmp_path / "own.csv").write_text(text, encoding="utf-8-sig")
        found = []
        read_file(tmp_path / "own.csv", found, [])
        return [row.text for row in found]

    assert rows("prompt,category\na fox\u2028in snow,\n\"a, b\",\n") == ["a fox\u2028in snow", "a, b"]
    for text, message in (("a, b,\n", "line 2: 3 values in 2 columns"), ("x\n", "line 2: 1 values in 2"),
                          ("\"x,\ny,\n", "line 2: unexpected end")):
        with pytest.raises(ValueError, match=message):
            rows(f"prompt,category\n{text}")


# ---- tables

@pytest.mark.parametrize("rows, kept, refused", [
    ("0.png,a red star\n1.png,a red star, at night\n2.png,1girl, solo\n3.png,\"one, two\"\n",
     {"0.png": ["a red star"], "3.png": ["one, two"]}, {3: "3 values in 2 columns", 4: "3 values in 2 columns"}),
    ("0.png\n1.png,b\n\n2.png,c\n3.png,\"a\r\nb\"\n", {"1.png": ["b"], "2.png": ["c"], "3.png": ["a b"]},
     {2: "1 values in 2 columns"}),
    ("0.png,\"say \"\"hi\"\"\"\n1.png,a 5\" nail\n2.png,\n", {"0.png": ["say \"hi\""], "1.png": ["a 5\" nail"]},
     {4: "not empty"}),
])
def test_rows_of_a_csv_are_whole_or_refused_with_their_number(tmp_path, rows, kept, refused):
    images(tmp_path)
    (tmp_path / "captions.csv").write_text(f"file,caption\n{rows}", encoding="utf-8-sig", newline="")
    source = read(tmp_path)
    assert captions(source) == kept
    found = {name: reason for name, reason in source.refused if "line" in name}
    assert len(found) == len(refused)
    for line, message in refused.items():
        assert message in found[f"captions.csv line {line}"]


def test_a_column_of_weights_takes_no_part_of_a_caption(tmp_path):
    images(tmp_path)
    (tmp_path / "captions.csv").write_text("file,caption,weight\n0.png,x,\n1.png,a star, at night\n2.png,y,2\n")
    source = read(tmp_path)
    assert captions(source) == {"0.png": ["x"], "2.png": ["y"]}
    assert source.refused[0] == ("captions.csv line 3", "its weight is ' at night'; valid: a number, and text that has "
                                 "commas in quotation marks")


@pytest.mark.parametrize("text, message", [
    ("file,caption\n0.png,\"a red star\n1.png,b\n2.png,c\n", "line 2: unexpected end"),
    ("file,caption\n0.png,a\n1.png,\"b\n2.png,\"c\"\n", "line 3"), ("file,caption\n0.png,\"a\" b\n", "line 2"),
    ("file;caption\n0.png;a\n", "columns .'file;caption'"), ("0.png,a\n", "columns .'0.png', 'a'"), ("", "columns"),
    ("file,caption,caption\n0.png,a,b\n", "two columns 'caption'"), ("file,text\n0.png,\udce9\n", "0xe9 in line 2"),
])
def test_a_csv_whose_rows_cannot_be_told_apart_is_refused(tmp_path, text, message):
    images(tmp_path)
    (tmp_path / "captions.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_rows_without_an_image_are_named_and_names_are_compared_in_one_form(tmp_path):
    images(tmp_path, "0.png", "sub/1.png", "2.png")
    (tmp_path / "captions.csv").write_text("file,caption\n./0.png,a\nsub//1.png,b\nsub/../2.png,c\n4.png,gone\n"
                                           "/abs/0.png,elsewhere\n2.PNG,capitals\n")
    source = read(tmp_path)
    assert captions(source) == {"0.png": ["a"], "sub/1.png": ["b"], "2.png": ["c"]} and not source.refused
    assert source.left_out == {"rows of tables that name no image here": [
        "captions.csv line 5: 4.png", "captions.csv line 6: /abs/0.png", "captions.csv line 7: 2.PNG"]}
    assert left_out_line("X", source.left_out) == ("left out of X: 3 rows of tables that name no image here "
                                                   "(captions.csv line 5: 4.png, ...)")


def test_wrong_lines_of_json_are_refused_with_their_number(tmp_path):
    images(tmp_path, *(f"{n}.png" for n in range(9)))
    lines = ['{"file": "0.png", "caption": "a", "caption": "b"}', '{"file": "1.png", "caption": "a", "weight": null}',
             '{"file": "2.png", "caption": "a", "weight": "x"}',
             '{"file": "3.png", "caption": ["a", "b"], "weight": 2}',
             "[" * 100_000, '{"file": "4.png", "caption": "a", "weight": [1]}', '{"file": "", "caption": "a"}',
             '{"file": "5.png", "caption": "a", "weight": 1' + "0" * 400 + '}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = read(tmp_path)
    assert captions(source) == {"1.png": ["a"]}
    assert [name for name, _ in source.refused[:7]] == [f"captions.jsonl line {n}" for n in (1, 3, 4, 5, 6, 7, 8)]
    assert "given twice" in source.refused[0][1] and "several captions" in source.refused[2][1]


# ---- the imagefolder layout

@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_layout_of_imagefolder(tmp_path, kind):
    """A table in the folder of each split, with names relative to it."""
    for split in ("train", "validation", "test"):
        images(tmp_path / split, "0.png", "deep/1.png")
        rows = [("0.png", f"zero of {split}"), ("deep/1.png", f"one, of {split}")]
        text = "".join(json.dumps({"file_name": name, "text": text, "label": 3}) + "\n" for name, text in rows)
        if kind == "csv":
            text = "file_name,label,text\n" + "".join(f"{name},3,\"{text}\"\n" for name, text in rows)
        (tmp_path / split / f"metadata.{kind}").write_text(text)
    for split in ("train", "validation", "test"):
        source = read(tmp_path, split, split="folders")
        assert captions(source) == {f"{split}/0.png": [f"zero of {split}"], f"{split}/deep/1.png": [f"one, of {split}"]}
        assert not source.refused and not source.left_out


def test_the_nearest_table_decides_and_what_it_hides_is_named(tmp_path):
    images(tmp_path, "a/0.png", "a/1.png", "b/2.png", "3.png")
    (tmp_path / "captions.csv").write_text("file,caption\na/0.png,far\na/1.png,only here\nb/2.png,beside a text\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "hidden by captions.csv"}')
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "near"}')
    (tmp_path / "b" / "metadata.csv").write_text("file_name,label\n2.png,7\n")
    (tmp_path / "b" / "2.txt").write_text("hidden by the table")
    source = read(tmp_path, fallback="none")
    assert captions(source) == {"3.png": ["hidden by captions.csv"], "a/0.png": ["near"], "a/1.png": ["none"],
                                "b/2.png": ["hidden by the table"]}
    assert source.left_out == {"tables beside one that is read": ["captions.csv"],
                               "tables without a column caption or text": ["b/metadata.csv"]}
    (tmp_path / "metadata.jsonl").unlink()
    source = read(tmp_path, fallback="none")
    assert captions(source) == {"3.png": ["none"], "a/0.png": ["near"], "a/1.png": ["only here"],
                                "b/2.png": ["beside a text"]}
    assert source.left_out == {"images of whose tables only the nearest is read": ["a/0.png"],
                               "tables without a column caption or text": ["b/metadata.csv"],
                               "text files of images that a table names": ["b/2.txt"]}


def test_a_csv_table_gives_the_line_where_a_row_begins():
    table = CsvTable("a, b\n1,\"x\ny\"\n\n2,z\n", "t.csv")
    assert table.columns == ["a", "b"]
    assert list(table) == [(2, {"a": "1", "b": "x\ny"}, ""), (5, {"a": "2", "b": "z"}, "")]
