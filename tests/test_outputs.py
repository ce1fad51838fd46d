"""Nothing that is there is written over: not an input, not what an earlier call left, not another system's images."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from sample_calls import parameters

import moderate
import sample
from data.report.__main__ import main as report
from files.whole import free_path, set_aside, whole_file
from safety.image import read_concepts
from sampling.loading import SystemChoice
from sampling.results import Results, next_number
from scoring.evaluation import set_other_report_aside
from training import posthoc

PROMPT = "a red star"


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def draw(run: Path, out: Path, *arguments: str) -> tuple[list[str], list[dict]]:
    """Call sample.py; the names of new files, and the rows of results.jsonl. What was there before is still there."""
    before = contents(out) if out.exists() else {}
    assert sample.main(["--run", str(run), "--out", str(out), "--steps", "2", *arguments]) in (0, 5)
    after = contents(out)
    for name, data in before.items():
        assert after[name].startswith(data) if name == "results.jsonl" else after[name] == data, name
    rows = [json.loads(line) for line in after["results.jsonl"].decode().splitlines()]
    return sorted(after.keys() - before.keys() - {"results.jsonl"}), rows


# ---- sample.py

def test_a_second_call_goes_on_with_the_numbers_of_the_first(tiny_run, tmp_path):
    names, rows = draw(tiny_run, tmp_path, PROMPT, "--n", "2")
    assert names == ["00000_a-red-star_seed0.png", "00001_a-red-star_seed1.png", "grid.png"]
    names, rows = draw(tiny_run, tmp_path, PROMPT, "--n", "2", "--frames", "2", "--attention")
    assert [name for name in names if "grid" in name] == ["grid_00002.png"]
    assert "00002_a-red-star_seed0.png" in names and "00003_a-red-star_seed1_frames.gif" in names
    assert [(row["number"], row["file"]) for row in rows] == [
        (0, "00000_a-red-star_seed0.png"), (1, "00001_a-red-star_seed1.png"),
        (2, "00002_a-red-star_seed0.png"), (3, "00003_a-red-star_seed1.png")]
    names, _ = draw(tiny_run, tmp_path, PROMPT, "--xy", "steps=1,2")
    assert "xy.png" in names and "00005_a-red-star_seed0.png" in names
    names, _ = draw(tiny_run, tmp_path, PROMPT, "--xy", "steps=1,2")
    assert "xy_00006.png" in names


@pytest.mark.parametrize("flag", ["--init", "--invert", "--mask"])
@pytest.mark.parametrize("name", ["00000_a-red-star_seed0.png", "grid.png", "results.png"])
def test_an_image_that_is_given_is_never_written_over(tiny_run, tmp_path, flag, name):
    draw(tiny_run, tmp_path, PROMPT)
    given = tmp_path / name
    with Image.open(tmp_path / "00000_a-red-star_seed0.png") as image:
        image.copy().save(given)  # the size that is drawn, under the name of an output
    before = given.read_bytes()
    extra = ["--init", str(given)] if flag == "--mask" else []
    sampler = ["--sampler", "ddim"] if flag == "--invert" else []
    names, _ = draw(tiny_run, tmp_path, PROMPT, flag, str(given), *extra, *sampler)
    assert given.read_bytes() == before and "00001_a-red-star_seed0.png" in names


def test_refused_requests_have_numbers_of_their_own_too(tiny_run, tmp_path):
    draw(tiny_run, tmp_path, PROMPT)
    _, rows = draw(tiny_run, tmp_path, "")
    names, rows = draw(tiny_run, tmp_path, PROMPT)
    assert [row["number"] for row in rows] == [0, 1, 2] and rows[1]["file"] is None
    assert "00002_a-red-star_seed0.png" in names


def test_numbers_go_on_after_whatever_is_there(tmp_path):
    assert next_number(tmp_path / "results.jsonl") == 0
    (tmp_path / "00041_x_seed0.png").touch()
    (tmp_path / "123_x.png").touch()
    assert next_number(tmp_path / "results.jsonl") == 42
    (tmp_path / "results.jsonl").write_text('[]\n{"number": "x"}\n{"number": 99}\n{"number": 20')
    assert next_number(tmp_path / "results.jsonl") == 100
    results = Results(tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match="another call writes its images to .*; valid: --out"):
        Results(tmp_path / "results.jsonl")
    results.close()
    assert (tmp_path / "results.jsonl").read_text().endswith('{"number": 20\n')  # the next line begins on its own


def test_published_weights_have_the_whole_name_of_their_folder(tmp_path, monkeypatch):
    for path in ("m-v1.4", "m-v1.5", "deep/m.v2"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {path: SystemChoice(pretrained=path).name for path in (
        "m-v1.4", "m-v1.5/", "deep/m.v2", "m-v1.5.safetensors", "m-v1.4.ckpt", "m.x", ".", "deep/..", "m-v1.4/.")}
    assert names == {"m-v1.4": "m-v1.4", "m-v1.5/": "m-v1.5", "deep/m.v2": "m.v2", "m-v1.5.safetensors": "m-v1.5",
                     "m-v1.4.ckpt": "m-v1.4", "m.x": "m.x", ".": tmp_path.name, "deep/..": tmp_path.name,
                     "m-v1.4/.": "m-v1.4"}


# ---- files/whole.py

def test_a_new_file_never_replaces_another(tmp_path, monkeypatch):
    path = tmp_path / "a.b.png"
    for links in (True, False):  # file systems without links exist
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
        with whole_file(path, new=True) as temporary:
            temporary.write_text("one")
        with pytest.raises(FileExistsError, match="exists and is not written over"), whole_file(path, new=True) as file:
            file.write_text("two")
        assert [one.name for one in tmp_path.iterdir()] == ["a.b.png"] and path.read_text() == "one"
        path.unlink()


def test_names_that_are_free(tmp_path):
    (tmp_path / "v1.4").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "a_1.png").symlink_to("nowhere")
    assert free_path(tmp_path / "a.png").name == "a_2.png" and free_path(tmp_path / "b.png").name == "b.png"
    assert free_path(tmp_path / "v1.4").name == "v1.4_1"
    assert set_aside(tmp_path / "c") is None
    assert set_aside(tmp_path / "a.png") == tmp_path / "a_2.png" and not (tmp_path / "a.png").exists()


# ---- the other commands

def test_a_page_about_data_gets_a_name_of_its_own(tmp_path, monkeypatch, capsys):
    config = tmp_path / "data.yaml"
    config.write_text("data: {source: shapes, shapes: {size: 32, train: 8, validation: 2, test: 2}}\n")
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        report([str(config), "--limit", "4"])
    report([str(config), "--limit", "4", "--out", str(config)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data.yaml", "data_1.yaml", "data_report.html", "data_report_1.html"]
    assert config.read_text().startswith("data: ") and "data_report_1.html" in capsys.readouterr().out


def test_calibration_keeps_the_concepts_that_it_replaces(tmp_path, monkeypatch, capsys):
    text = ("# thresholds by hand\nconcepts:\n- {name: star, category: violence, phrasings: [a star], "
            "threshold: null}\n")
    (tmp_path / "concepts.yaml").write_text(text)
    monkeypatch.setattr("pipeline.moderation.calibrate_concepts", lambda concepts, *_, **__: read_concepts(concepts))
    arguments = ["calibrate", "--run", str(tmp_path), "--concepts", str(tmp_path / "concepts.yaml")]
    assert moderate.main(arguments) == moderate.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["concepts.yaml", "concepts_1.yaml", "concepts_2.yaml"]
    assert (tmp_path / "concepts_1.yaml").read_text() == text
    assert f"kept what was in concepts.yaml as {tmp_path / 'concepts_1.yaml'}" in capsys.readouterr().out


def test_another_measurement_keeps_the_report_that_is_there(tmp_path):
    folder = tmp_path / "report"
    (folder / "cache").mkdir(parents=True)
    assert set_other_report_aside(folder, {"suite": "quick"}) is None
    (folder / "metrics.json").write_text('{"protocol": {"suite": "full", "command": "a"}}')
    (folder / "index.html").touch()
    assert set_other_report_aside(folder, {"suite": "full", "command": "b"}) is None
    assert set_other_report_aside(folder, {"suite": "quick"}) == tmp_path / "report_1"
    assert [path.name for path in folder.iterdir()] == ["cache"]
    assert sorted(path.name for path in (tmp_path / "report_1").iterdir()) == ["index.html", "metrics.json"]
    (folder / "metrics.json").write_text("damaged")
    assert set_other_report_aside(folder, {}) == tmp_path / "report_2"


def test_an_average_that_is_there_is_kept_unless_it_is_the_same(tiny_run, tmp_path, capsys):
    from files.run_folder import RunFolder
    from pipeline.loading import load_run
    from pipeline.system import Networks

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    system = load_run(run, moderation=None)
    networks = Networks(system.unet, system.text_encoder)
    folder = posthoc.write_run(RunFolder.open(run), networks, 0.08)
    assert folder.name == "std_0.08" and posthoc.write_run(RunFolder.open(run), networks, 0.08) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["std_0.08"]
    before = contents(folder)
    with torch.no_grad():
        next(networks.unet.parameters()).add_(1)
    posthoc.write_run(RunFolder.open(run), networks, 0.08)
    assert contents(folder.with_name("std_0.08_1")) == before != contents(folder)
    assert posthoc.write_run(RunFolder.open(run), networks, 0.0800001).name == "std_0.0800001"
    assert f"kept an earlier average of this width as {folder}_1" in capsys.readouterr().out


def test_metadata_names_the_folder_of_the_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_run)
    assert sample.main([PROMPT, "--run", ".", "--out", str(tmp_path), "--steps", "1"]) == 0
    assert parameters(tmp_path / "00000_a-red-star_seed0.png")["run"] == tiny_run.name
