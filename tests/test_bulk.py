"""Bulk calls: rows of every kind of file, shards and lines, going on after a failure anywhere, and what is refused."""
import json
import re
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_moderation import HARMFUL, judged_run
from sample_calls import draw, parameters

import sample
from data.images.shards import Shards, ShardsConfig
from files.text import CsvTable, stream_lines
from pipeline.loading import load_run
from pipeline.moderation import Moderation
from pipeline.system import TextToImage
from sampling import bulk_folder
from sampling.bulk import Drawer, check_orders, draw_windows
from sampling.bulk_folder import BulkFolder, Progress
from sampling.bulk_rows import Orders, Row, read_rows
from sampling.engine import DrawSettings, Job, batches_of, gate_of
from sampling.request import Request

LONG = "a small red star above a blue square beside a green moon under a pink circle and a yellow triangle"


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return load_run(tiny_run)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def call(run: Path, prompts: Path, out: Path, *arguments: str) -> int:
    return sample.main(["--run", str(run), "--prompts", str(prompts), "--out", str(out), "--bulk", "--steps", "2",
                        "--shard-size", "4", *arguments])


def contents(out: Path) -> dict[str, bytes]:
    """Everything that a bulk call is for, by path: shards and results, not what it needed to get there."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.parent.name != "state"}


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ---- the file

def test_a_row_says_the_same_in_every_kind_of_file(tmp_path):
    text = write(tmp_path / "a.txt", "a red star", "", "  a {red|blue} moon, at night ")
    objects = write(tmp_path / "a.jsonl", '{"prompt": "a red star"}', "",
                    '{"prompt": "a {red|blue} moon, at night", "seed": null}')
    table = write(tmp_path / "a.csv", "prompt,seed", "a red star,", "", '"a {red|blue} moon, at night",')
    found = [Row(1, "a red star"), Row(3, "a {red|blue} moon, at night")]
    assert list(read_rows(text)) == list(read_rows(objects)) == found
    assert [replace(row, line=row.line - 1) for row in read_rows(table)] == found


def test_a_row_may_have_a_seed_a_negative_prompt_and_settings(tmp_path, system):
    objects = write(tmp_path / "a.jsonl", json.dumps({
        "prompt": "a star", "seed": 7, "negative": "blue", "settings": {
            "sampler": "euler", "steps": 4, "guidance": 2.5, "interval": [0.2, 3], "chunks": 2}}), '{"prompt": "x"}')
    table = write(tmp_path / "a.csv", "prompt,seed,negative,sampler,steps,guidance,interval,chunks",
                  "a star,7,blue,euler,4,2.5,0.2:3,2", "x,,,,,,,")
    template = Request("", 100, system.config.sampling)
    made = [[one.request for number, row, prompts in orders.rows() for one in orders.requests_of(number, row, prompts)]
            for orders in (Orders(str(objects), template, 2), Orders(str(table), template, 2))]
    assert made[0] == made[1]
    first, second, third, fourth = made[0]
    assert (first.seed, second.seed, third.seed, fourth.seed) == (7, 8, 102, 103)  # its own, else that of its number
    assert (first.config.sampler, first.config.steps, first.config.guidance.interval) == ("euler", 4, (0.2, 3.0))
    assert (first.negative, first.chunks, third.negative, third.config) == ("blue", 2, "", system.config.sampling)


@pytest.mark.parametrize("name, lines, message", [
    ("a.jsonl", ['{"prompt": "a"}', "{"], "line 2 is no JSON"),
    ("a.jsonl", ["[1]"], "line 1: [1]; valid: {"),
    ("a.jsonl", ['{"seed": 1}'], "line 1 has no prompt"),
    ("a.jsonl", ['{"prompt": 1}'], "line 1: prompt: 1; valid: a text"),
    ("a.jsonl", ['{"prompt": "a", "seed": true}'], "line 1: seed: True; valid: a whole number"),
    ("a.jsonl", ['{"prompt": "a", "seed": -1}'], "line 1: seed: value -1; valid"),
    ("a.jsonl", ['{"prompt": "a", "stepz": 1}'], "line 1: unknown key 'stepz'; valid: prompt, seed, negative"),
    ("a.jsonl", ['{"prompt": "a", "settings": {"stepz": 1}}'], "line 1: unknown setting 'stepz'; valid: steps"),
    ("a.jsonl", ['{"prompt": "a", "settings": {"steps": "many"}}'], "line 1: steps: 'many'; valid: a whole number"),
    ("a.jsonl", ['{"prompt": "a", "settings": {"steps": {}}}'], "line 1: steps: {}; valid: a whole number"),
    ("a.jsonl", ['{"prompt": "a", "settings": {"steps": 0}}'], "line 1: steps: value 0; valid: 1 .. 10000"),
    ("a.jsonl", ['{"prompt": "\\ud800"}'], "line 1: '\\ud800' is not text in Unicode"),
    ("a.jsonl", ['{"prompt": "a", "negative": "{b|c}"}'], "line 1: negative '{b|c}' has alternatives"),
    ("a.csv", ["prompt,stepz", "a,1"], "has a column 'stepz'; valid: prompt, seed, negative, steps"),
    ("a.csv", ["text", "a"], "has a column 'text'"),
    ("a.csv", ["seed", "1"], "has no column 'prompt'"),
    ("a.csv", ["prompt,seed", "a,1", "b,c,2"], "line 3: 3 values in 2 columns"),
    ("a.csv", ["prompt,seed", "a,one"], "line 2: seed: 'one'; valid: a whole number"),
    ("a.csv", ["prompt", '"a'], "line 2: unexpected end of data"),
    ("a.txt", ["a", "b {c"], "line 2: prompt 'b {c'"),
    ("a.txt", [""], "holds no prompt"),
])
def test_a_row_that_is_not_valid_is_named_before_anything_is_drawn(tiny_run, tmp_path, name, lines, message):
    path = write(tmp_path / name, *lines)
    with pytest.raises(ValueError) as caught:
        call(tiny_run, path, tmp_path / "out")
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not contents(tmp_path / "out")


def test_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\x0c\xe2\x80\xa8still\rthree\n\n\xc3\xa4")
    assert list(stream_lines(path)) == ["one", "two\x0c\u2028still", "three", "", "ä"]
    path.write_bytes(b"a\nb\xff\n")
    with pytest.raises(ValueError, match="not a text file in UTF-8: byte 0xff in line 2"):
        list(stream_lines(path))
    path.write_bytes(b'p,q\r\n1,"x\r\ny"\r\n2,z')
    assert list(CsvTable(stream_lines(path, ends=True), "a")) == list(CsvTable('p,q\r\n1,"x\r\ny"\r\n2,z', "a"))


def test_windows_do_not_depend_on_which_of_them_are_drawn(tmp_path, system):
    """Rows of several requests may reach over the end of a window; all are counted through."""
    path = write(tmp_path / "a.txt", "a", "{b|c|d}", "e", "{f|g}")
    orders = Orders(str(path), Request("", 0, system.config.sampling), 2)
    whole = dict(orders.windows(5, lambda window: True))
    assert {window: [one.request.prompt for one in held] for window, held in whole.items()} == {
        0: ["a", "a", "b", "b", "c"], 1: ["c", "d", "d", "e", "e"], 2: ["f", "f", "g", "g"]}
    assert [one.number for held in whole.values() for one in held] == list(range(14))
    assert [one.request.seed for held in whole.values() for one in held] == list(range(14))
    for wanted in ({0}, {1}, {2}, {0, 2}, set()):
        assert dict(orders.windows(5, wanted.__contains__)) == {window: whole[window] for window in wanted}


def test_a_long_file_takes_no_memory(tmp_path, system):
    path = tmp_path / "a.txt"
    with open(path, "w") as file:
        file.writelines(f"a star number {number}\n" for number in range(30_000))
    orders = Orders(str(path), Request("", 0, system.config.sampling))
    tracemalloc.start()
    assert sum(len(held) for _, held in orders.windows(100, lambda window: window % 100 == 0)) == 300
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


# ---- shards and lines

@pytest.fixture(scope="module")
def judged(tiny_run, tmp_path_factory):
    """The tiny run with a moderation that refuses a made-up word."""
    return judged_run(tiny_run, tmp_path_factory.mktemp("judged"))


def test_every_request_has_an_image_and_a_line(judged, tmp_path, capsys):
    prompts = write(tmp_path / "a.txt", "a red star", LONG, HARMFUL, "a {red|blue} moon", "a star")
    assert call(judged, prompts, tmp_path / "out", "--seed", "5") == 0
    assert "5 images in" in capsys.readouterr().out
    found = rows(tmp_path / "out")
    assert [(row["number"], row["line"], row["seed"]) for row in found] == [
        (0, 1, 5), (1, 2, 6), (2, 3, 7), (3, 4, 8), (4, 4, 9), (5, 5, 10)]
    assert [row["file"] for row in found] == [
        "shard-000000.tar/000000000.png", "shard-000000.tar/000000001.png", None, "shard-000000.tar/000000003.png",
        "shard-000001.tar/000000004.png", "shard-000001.tar/000000005.png"]
    assert found[2]["action"] == "block" and "zorbic" not in json.dumps(found)
    assert sorted(contents(tmp_path / "out")) == ["bulk.json", "results.jsonl", "shard-000000.tar", "shard-000001.tar"]
    with tarfile.open(tmp_path / "out" / "shard-000001.tar") as tar:
        assert tar.getnames() == [f"00000000{number}.{kind}" for number in (4, 5) for kind in ("png", "json", "txt")]
        assert tar.extractfile("000000004.txt").read() == b"a blue moon"
        tar.extract("000000004.png", tmp_path, filter="data")
    assert parameters(tmp_path / "000000004.png")["prompt"] == "a blue moon"
    assert sample.main(["--run", str(judged), "--verify", str(tmp_path / "000000004.png")]) in (0, 1)  # a last bit
    source = Shards(ShardsConfig(root=str(tmp_path / "out"), size=32, validation=0.0, test=0.0), "train")
    assert len(source) == 5 and {source.captions(i)[0] for i in range(5)} >= {LONG, "a blue moon"}


def test_its_images_are_those_of_a_usual_call(tiny_run, tmp_path):
    prompts = write(tmp_path / "a.txt", "a red star", "a blue moon", LONG)
    assert call(tiny_run, prompts, tmp_path / "out", "--exact", "--files", "--n", "2") == 0
    usual = draw(tiny_run, tmp_path / "usual", "--prompts", str(prompts), "--exact", "--n", "2", "--steps", "2")
    folder = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("shard-*/*")}
    assert folder == {name: path.read_bytes() for name, path in usual.items() if name != "grid.png"}
    assert [row["file"] for row in rows(tmp_path / "out")] == [
        f"shard-00000{number // 4}/{name}" for number, name in enumerate(sorted(folder))]


def test_settings_of_a_row_are_those_of_its_image(tiny_run, tmp_path):
    prompts = write(tmp_path / "a.csv", "prompt,seed,negative,steps,sampler", "a star,9,blue,3,euler", "a star,9,,,")
    assert call(tiny_run, prompts, tmp_path / "out", "--files", "--exact") == 0
    one, two = map(parameters, sorted((tmp_path / "out").glob("shard-*/*.png")))
    assert (one["seed"], one["negative"], one["steps"], one["sampler"]) == (9, "blue", 3, "euler")
    assert (two["seed"], two["negative"], two["steps"], two["sampler"]) == (9, "", 2, "ddim")


def test_no_prompt_is_padded_to_the_length_of_another(system):
    requests = [Request(text, 0, system.config.sampling) for text in ("a", LONG, "b", LONG, "[a|b]", "c")]
    job = Job(system, requests)
    gate = gate_of(job, Moderation(None, mode="off"))
    assert batches_of(job, gate, DrawSettings(batch=3)) == [[0, 1, 2], [3, 4, 5]]
    assert batches_of(job, gate, DrawSettings(batch=3, by_length=True)) == [[0, 2, 5], [1, 3], [4]]


def test_when_all_is_refused_the_exit_status_says_so(judged, tmp_path):
    prompts = write(tmp_path / "a.txt", HARMFUL)
    assert call(judged, prompts, tmp_path / "out") == 5
    assert [row["file"] for row in rows(tmp_path / "out")] == [None]


# ---- going on

class Dead(BaseException):
    """A process that ends in the middle of something."""


def drawer_of(system: TextToImage, out: Path, files: bool) -> Drawer:
    return Drawer(system, Moderation(None, mode="off"), DrawSettings(batch=2, by_length=True), BulkFolder(out, files),
                  {"run": "tiny"})


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 17])
@pytest.mark.parametrize("files", [False, True], ids=["tars", "files"])
def test_wherever_it_dies_the_next_call_leaves_the_same_bytes(system, tmp_path, monkeypatch, files, every):
    """Before and after every change of a name and every sync, also with its unfinished files left behind."""
    prompts = write(tmp_path / "a.txt", "a", LONG, "b", "c", "d")
    config = replace(system.config.sampling, steps=1)
    orders = Orders(str(prompts), Request("", 0, config))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(out: Path, dies_at: int) -> bool:
        """Whether the call came to its end before its step ``dies_at``."""
        steps = iter(range(10**6))

        def step(function):
            def counted(*arguments, **named):
                if next(steps) == dies_at:
                    raise Dead
                result = function(*arguments, **named)
                if next(steps) == dies_at:
                    raise Dead
                return result
            return counted

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "fsync"):
                patch.setattr(bulk_folder.os, name, step(getattr(bulk_folder.os, name)))
            patch.setattr(Path, "unlink", step(Path.unlink))
            try:
                drawer = drawer_of(system, out, files)
                drawer.folder.begin({"threads": 1}, lambda: check_orders(orders, system))
                assert draw_windows(drawer, orders, 2, 5) == Progress(3, (out / "results.jsonl").stat().st_size, 5, 0)
            except Dead:
                return False
            return True

    assert run(tmp_path / "whole", -1)
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if "shard" in name]) == (5 if files else 3)
    for dies_at in range(0, 1000, every):
        out = tmp_path / f"dies_{dies_at}"
        ended = run(out, dies_at)
        if not ended:
            begun = (out / "bulk.json").exists()
            (out / f".{'shard-000000.tar' if begun else 'bulk.json'}.1.part").write_bytes(b"half")  # of one killed
            (out / "state" / ".000001.jsonl.1.part").write_bytes(b"half")
            assert run(out, -1)
        found = contents(out)
        found.pop(".shard-000000.tar.1.part", None)  # stays where its shard was there already
        assert found == expected, dies_at
        if ended:
            break
    assert ended and dies_at > 60


def test_lines_behind_the_byte_that_counts_are_written_again(system, tmp_path):
    prompts = write(tmp_path / "a.txt", "a", "b", "c")
    orders = Orders(str(prompts), Request("", 0, replace(system.config.sampling, steps=1)))
    drawer = drawer_of(system, tmp_path / "out", False)
    drawer.folder.begin({}, lambda: 3)
    [(_, first), (_, second)] = orders.windows(2, lambda window: True)
    drawer.draw(1, second)  # by another process
    assert drawer.folder.progress() == Progress() and drawer.folder.is_done(1) and not drawer.folder.is_done(0)
    (tmp_path / "out" / "results.jsonl").write_text('{"number": 0, "fi')
    drawer.draw(0, first)
    assert [row["number"] for row in rows(tmp_path / "out")] == [0, 1, 2]
    assert not [*(tmp_path / "out" / "state").glob("*.jsonl")]
    (tmp_path / "out" / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="results.jsonl has 0 bytes; valid: .* it was cut by another program"):
        drawer.folder.merge()


def test_a_window_that_another_process_draws_is_left_to_it(system, tmp_path):
    folder = BulkFolder(tmp_path / "out")
    folder.begin({}, lambda: 3)
    code = ("import sys; from files.whole import claim\nfile = open(sys.argv[1], 'a'); assert claim(file, 1)\n"
            "print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(folder.state / "claims.lock")], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        with folder.claims() as wanted:
            assert [wanted(window) for window in (0, 1, 2)] == [True, False, True]
        other.kill()
        other.wait()
        with folder.claims() as wanted:
            assert wanted(1)


def test_a_full_disk_is_one_line_and_the_call_goes_on(tiny_run, small_disk, tmp_path):
    prompts = write(tmp_path / "a.txt", *(f"a star {number}" for number in range(12)))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(480_000))
    with pytest.raises(OSError) as caught:
        call(tiny_run, prompts, small_disk / "out")
    assert re.search(r"No space left.*; \d+ of 12 requests are done, the same command draws the others",
                     str(caught.value)) and "\n" not in str(caught.value)
    filler.unlink()
    assert call(tiny_run, prompts, small_disk / "out") == 0
    assert call(tiny_run, prompts, tmp_path / "undisturbed") == 0
    assert contents(small_disk / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("change, message", [
    (["--guidance", "2"], "settings.guidance.scale: 3.0 then, 2.0 now"),
    (["--batch", "2"], "batch: 64 then, 2 now"),
    (["--moderation", "off"], "moderation"),
    (["--style", "flat"], "styles"),
])
def test_a_folder_belongs_to_one_call(tiny_run, tmp_path, change, message):
    prompts = write(tmp_path / "a.txt", "a star")
    assert call(tiny_run, prompts, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="was begun with another call") as caught:
        call(tiny_run, prompts, tmp_path / "out", *change)
    assert message in str(caught.value)
    write(prompts, "a moon")
    with pytest.raises(ValueError, match="was begun with another call .prompts_sha256"):
        call(tiny_run, prompts, tmp_path / "out")
    with pytest.raises(ValueError, match="is the folder of a bulk call; valid: --out with another folder"):
        sample.main(["--run", str(tiny_run), "--out", str(tmp_path / "out"), "a star"])
    write(prompts, "a star")
    assert call(tiny_run, prompts, tmp_path / "out") == 0 and contents(tmp_path / "out") == before


def test_the_folder_of_a_usual_call_is_none_of_a_bulk_call(tiny_run, tmp_path):
    draw(tiny_run, tmp_path / "out", "a star")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds 00000_a-star_seed0.png and was not begun by --bulk; valid: a new"):
        call(tiny_run, write(tmp_path / "a.txt", "a star"), tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("flags, message", [
    (["--bulk", "--out", "x"], "--bulk without --prompts; valid: both"),
    (["--bulk", "--prompts", "x"], "--bulk without --out; valid: both"),
    (["--prompts", "x", "--files"], "--files without --bulk"),
    (["--prompts", "x", "--shard-size", "3"], "--shard-size without --bulk"),
    (["--bulk", "--prompts", "x", "--out", "x", "a star"], "--bulk with a prompt; valid: one of them"),
    (["--bulk", "--prompts", "x", "--out", "x", "--frames", "3"], "--bulk with --frames"),
    (["--bulk", "--prompts", "x", "--out", "x", "--shard-size", "0"], "--shard-size 0; valid: 1 to 100000"),
])
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample.main(flags)


def test_a_file_that_is_not_there_is_named(tiny_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        call(tiny_run, tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
