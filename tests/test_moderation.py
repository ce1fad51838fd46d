"""The gate on every path that writes an image: a refusal leaves a row and no file, and nothing broken lets one by."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_moderation import written
from PIL import Image
from sample_calls import given_images, parameters, pixels

import sample
import train
from moderate import main as safety
from pipeline.loading import load_run
from pipeline.moderation import Moderation, Refused, conditioned_texts, image_moderator
from pipeline.prompts import parse_prompt
from safety.audit import AuditLog
from safety.gate import PromptGate
from safety.image import Concept, ImageModerator, read_concepts, write_concepts
from safety.policy import HEADS, Decision
from safety.prompt import ArtefactError
from sampling.draw import Sources
from sampling.gate import Gate
from sampling.request import Request, cross, interpolate, parse_axis

BAD, MILD = "a zorbic star", "a mildo star"


def train_evaluator(config: Path, folder: Path, *more: str, regions: str = "false") -> None:
    """Two steps of a CLIP in a run folder."""
    width = "width: 16, layers: 1, heads: 2, mlp_width: 32"
    train.main([str(config), f"run={folder}", "stages=[clip]", "clip.train.steps=2", "clip.train.batch=4",
                "clip.validation=4", "clip.tokenizer={vocab_size: 300, length: 40}",
                f"clip.model={{image: {{size: 16, patch: 8, {width}}}, text: {{vocab_size: 300, length: 40, {width}, "
                f"causal: false}}, width: 16, regions: {regions}}}", *more])


@pytest.fixture(scope="module")
def run(tiny_run, tiny_config, tmp_path_factory) -> Path:
    """A run with the made-up lexicon and a CLIP of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "moderated"
    shutil.copytree(tiny_run, folder)
    written(folder / "moderation.safetensors")
    train_evaluator(tiny_config, folder)
    return folder


def call(run: Path, out: Path, *arguments: str) -> tuple[int, list[str], list[dict]]:
    """(exit code, files, rows) of a call of sample.py."""
    code = sample.main(["--run", str(run), "--out", str(out), "--steps", "2", *arguments])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return code, sorted(path.name for path in out.iterdir() if path.suffix == ".png"), rows


def concepts(folder: Path, **settings) -> str:
    """A file of one concept that every image shows, or none."""
    path = folder / "concepts.yaml"
    write_concepts(path, [Concept("thing", "violence", ("a star",), **{"threshold": -2.0, **settings})])
    return str(path)


# ---- prompts

def test_a_refused_prompt_leaves_a_row_and_no_file(run, tmp_path, capsys):
    code, files, rows = call(run, tmp_path, "a red star", BAD, "two blue circles")
    assert code == 0 and files == ["00000_a-red-star_seed0.png", "00002_two-blue-circles_seed2.png", "grid.png"]
    rows.sort(key=lambda row: row["number"])
    assert [row["action"] for row in rows] == ["allow", "block", "allow"] and rows[1]["category"] == "hate"
    assert [row["file"] is None for row in rows] == [False, True, False]
    said = capsys.readouterr()
    assert "image 1: refused: hate" in said.err and "2 images and grid.png" in said.out and "1 refused" in said.out
    assert "zorbic" not in (tmp_path / "results.jsonl").read_text() + said.err + said.out


def test_when_all_is_refused_nothing_is_written(run, tmp_path, capsys):
    code, files, rows = call(run, tmp_path, BAD, "z0rbic")
    assert code == 5 and files == [] and [row["file"] for row in rows] == [None, None]
    assert "nothing was drawn: all of 2 refused" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["a (zorbic:0.2) star", "a [zor](bic:1.2) star", "{a star|a zorbic star}",
                                    "a star " * 60 + "zorbic", "z.o.r.b.i.c", "z\u043erbic star"])
def test_signs_chunks_and_disguises_hide_nothing(run, tmp_path, prompt):
    """Weights, alternatives, what stands behind the first context: what is conditioned on is checked."""
    code, files, rows = call(run, tmp_path, prompt)
    assert [row for row in rows if row["action"] == "block"] and not any("zorbic" in name for name in files)
    assert code == (0 if prompt.startswith("{") else 5)


def slow_reader(run: Path) -> Moderation:
    """A moderation whose network, and no listed term, blocks the word gorvax."""
    def encoder(text: str) -> dict[str, float]:
        return {**dict.fromkeys(HEADS, 0.0), "violence": float("gorvax" in text)}

    return Moderation(PromptGate.load(run / "moderation.safetensors", encoder=encoder))


@pytest.mark.parametrize("negative", ["gorvax", "(gorvax:0) stone", "[gorvax] stone", "a gor(vax:0.5)"])
@pytest.mark.parametrize("settings, blocked", [
    ({"scale": 0.0}, True), ({"scale": 0.99}, True), ({"scale": 0.5, "interval": (0.1, 3.0)}, True), ({}, False),
    ({"scale": 1.0}, False), ({"scale": 2.0, "method": "apg"}, False),
    ({"scale": 2.0, "method": "apg", "apg_parallel": -1.0}, True),
    ({"scale": 2.0, "method": "apg", "apg_momentum": -0.9}, True)])
def test_what_the_image_is_pushed_toward_gets_the_full_gate(run, settings, blocked, negative):
    """Below a scale of 1 the negative prompt is drawn: 0 draws it alone."""
    system = load_run(run)
    config = replace(system.config.sampling, guidance=replace(system.config.sampling.guidance, **settings))
    moderation = slow_reader(run)
    requests = [Request("a red star", 0, config, negative), Request("a red star", 0, config, "a blue moon")]
    gate = Gate(moderation, system, requests, Sources())
    assert gate.allowed == ([1] if blocked else [0, 1])
    system.moderation = moderation
    if blocked:
        with pytest.raises(Refused):
            system.images(["a red star"], [0], config, negative="a gorvax")


def test_every_cell_of_a_grid_is_judged_by_its_own_scale(run):
    system, first = load_run(run), Request("a red star", 0, load_run(run).config.sampling, "a gorvax")
    cells = cross(first, [parse_axis("guidance=0,0.5,1,3")])
    assert Gate(slow_reader(run), system, cells, Sources()).allowed == [2, 3]
    assert Gate(slow_reader(run), system, interpolate(replace(first, negative=""), "a gorvax", 1, 3),
                Sources()).allowed == []


def test_a_word_of_weight_0_is_read_and_so_is_what_a_weaker_network_reads(run):
    system = load_run(run)
    requests = [Request("a (gorvax:0) star", 0, system.config.sampling)]
    assert Gate(slow_reader(run), system, requests, Sources()).allowed == []
    long = "a star " * 30 + "zor bicy"  # the weaker network reads fewer tokens of it
    system.guide = load_run(run)
    system.guide.tokenizer.length = 8
    cuts = []
    moderation = Moderation(None, mode="off")
    moderation.check_prompt = lambda parts, negatives, tokenizer, toward: cuts.append(  # type: ignore
        conditioned_texts(parts, tokenizer)) or Decision("allow")
    Gate(moderation, system, [Request(long, 0, system.config.sampling, chunks=1)], Sources())
    assert len(cuts) == 2 and min(map(len, cuts[1][1:])) < min(map(len, cuts[0][1:]))


@pytest.mark.parametrize("arguments", [
    ["a red star", "--negative", "zorbic"], [BAD, "a red star", "--interpolate", "2"],
    ["a red star", BAD, "--interpolate", "2"], ["a red zor", "bic star", "--interpolate", "2"],
    [BAD, "--init", "INIT"], [BAD, "--init", "INIT", "--mask", "MASK"], [BAD, "--invert", "INIT", "--sampler", "ddim"],
    [BAD, "--frames", "1"], [BAD, "--attention"], [BAD, "--xy", "seed=1,2"], [BAD, "--exact"], [""], ["a" * 2001],
    ["!!!"]])
def test_every_path_to_an_image_asks(run, tmp_path, arguments):
    given = given_images(tmp_path)
    (tmp_path / "out").mkdir()
    code, files, rows = call(run, tmp_path / "out", *(given.get(word, word) for word in arguments))
    assert code == 5 and files == [] and {row["action"] for row in rows} == {"block"}


def test_an_image_of_a_grid_may_be_missing(run, tmp_path):
    """A grey cell stands in its place."""
    code, files, rows = call(run, tmp_path, "--xy", f"prompt=a red star|{BAD}", "seed=1,2")
    assert code == 0 and sum(row["file"] is None for row in rows) == 2 and "xy.png" in files and len(files) == 3


def test_modes(run, tmp_path, capsys, caplog):
    """blur: drawn and blurred; flag: drawn and marked; off: said once, and not checked."""
    images = {}
    for mode in ("flag", "blur", "off"):
        code, files, rows = call(run, tmp_path / mode, BAD, "--moderation", mode)
        assert code == 0 and rows[0]["action"] == {"off": "allow"}.get(mode, mode) and rows[0]["file"] == files[0]
        images[mode] = pixels(tmp_path / mode / files[0])
        stored = parameters(tmp_path / mode / files[0])
        assert stored.get("moderation") == {"off": None}.get(mode, mode)
    said = capsys.readouterr().err
    assert said.count("moderation is off: neither prompts nor images are checked") == 1
    assert (images["flag"] == images["off"]).all()
    assert np.abs(np.diff(images["blur"], axis=0)).max() < np.abs(np.diff(images["off"], axis=0)).max() / 2
    code, files, rows = call(run, tmp_path / "mild", MILD)
    assert code == 0 and rows[0]["action"] == "flag" and len(files) == 2
    for mode, name in (("blur", "00000_a-zorbic-star_seed0.png"), ("mild", "00000_a-mildo-star_seed0.png")):
        assert sample.main(["--verify", str(tmp_path / mode / name), "--run", str(run)]) == 0
    with pytest.raises(SystemExit):
        sample.main(["a star", "--moderation", "maybe"])


# ---- images

def test_an_image_that_shows_a_concept_is_not_written(run, tmp_path, capsys):
    file = concepts(tmp_path)
    code, files, rows = call(run, tmp_path / "out", "a moon", "--concepts", file, "--frames", "1", "--attention")
    assert code == 5 and files == [] and rows[0]["stage"] == "image" and rows[0]["category"] == "violence"
    assert rows[0]["checked"] == ["prompt", "image"] and "refused: violence" in capsys.readouterr().err
    soft = ["--moderation", "blur", "--frames", "1"]
    code, files, rows = call(run, tmp_path / "blur", "a moon", "--concepts", file, *soft)
    assert code == 0 and rows[0]["action"] == "blur" and files == ["00000_a-moon_seed0.png", "grid.png"]
    code, files, rows = call(run, tmp_path / "calm", "a moon", "--concepts", concepts(tmp_path, threshold=2.0))
    assert code == 0 and rows[0]["action"] == "allow" and len(files) == 2


def test_an_image_that_is_given_is_checked_too(run, tmp_path):
    given = given_images(tmp_path)
    (tmp_path / "out").mkdir()
    file = concepts(tmp_path)
    code, files, rows = call(run, tmp_path / "out", "a moon", "--init", given["INIT"], "--concepts", file)
    assert code == 5 and files == [] and rows[0]["stage"] == "image given"


def test_a_finished_evaluator_gets_regions_and_judges_by_them(run, tiny_config, tmp_path):
    """From training on the weights of whole images to thresholds and decisions; another space, other thresholds."""
    regions, out = tmp_path / "regions", tmp_path / "concepts_of_regions.yaml"
    train_evaluator(tiny_config, regions, f"start_from={run}", regions="true")
    assert (regions / "clip_tokenizer.json").read_bytes() == (run / "clip_tokenizer.json").read_bytes()
    file = concepts(tmp_path, threshold=None)
    found = {}
    for clip in (run, regions):
        assert safety(["calibrate", "--run", str(run), "--clip", str(clip), "--concepts", file, "--rate", "0.2",
                       "--out", str(out)]) == 0
        found[clip] = read_concepts(out)[0].threshold
    assert found[run] != found[regions]
    assert image_moderator(out, regions).regions and not image_moderator(out, run).regions
    code, _, rows = call(run, tmp_path / "out", "a moon", "--clip", str(regions), "--concepts", str(out))
    assert code in (0, 5) and "failed" not in rows[0]["message"] and "not calibrated" not in rows[0]["message"]


def test_concepts_in_the_run_folder_are_used_and_need_thresholds(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    concepts(copy, threshold=None)
    code, files, rows = call(copy, tmp_path / "out", "a moon")
    assert code == 5 and files == [] and "image moderation is not calibrated" in rows[0]["message"]
    assert safety(["calibrate", "--run", str(copy), "--concepts", str(copy / "concepts.yaml"), "--rate", "0.2"]) == 0
    assert read_concepts(copy / "concepts.yaml")[0].threshold is not None
    code, _, rows = call(copy, tmp_path / "again", "a moon")
    assert "not calibrated" not in rows[0]["message"]
    image = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(image)
    assert safety(["check", "--image", str(image), "--run", str(copy), "--json"]) in (0, 5)
    assert safety(["check", "--image", str(image), "--run", str(copy), "--concepts", concepts(tmp_path)]) == 5
    key, log = tmp_path / "key", tmp_path / "log"
    assert safety(["key", str(key)]) == 0
    with pytest.raises(ValueError, match="never replaced"):
        safety(["key", str(key)])
    assert safety(["check", "--image", str(image), "--run", str(copy), "--concepts", concepts(tmp_path),
                   "--log", str(log), "--key", str(key)]) == 5
    assert json.loads(log.read_text())["stage"] == "image" and "picture" not in log.read_text()
    with pytest.raises(ValueError, match="valid: with texts"):
        safety(["check", "--image", str(image), "--run", str(copy), "--negative"])
    (tmp_path / "text.png").write_text("no image")
    for wrong in ("text.png", "nowhere.png"):
        with pytest.raises((ValueError, OSError), match=wrong):
            safety(["check", "--image", str(tmp_path / wrong), "--run", str(copy)])


def test_frames_on_the_way_are_judged_as_the_images_are_and_the_given_one_is_blurred(run, tmp_path, monkeypatch,
                                                                                     capsys):
    """A judge that minds only what was drawn, not the pixels of the source around it."""
    monkeypatch.setattr("pipeline.moderation.Moderation.check_images", lambda self, images, prompts=None: [
        Decision("block" if len(images) > 1 else "allow", "violence", 1.0, 0.0, "concept x") for _ in images])
    code, files, rows = call(run, tmp_path / "out", "a moon", "--frames", "2")
    assert code == 0 and rows[0]["action"] == "allow" and files == ["00000_a-moon_seed0.png", "grid.png"]
    assert "frames of image 0: refused: violence" in capsys.readouterr().err
    given = given_images(tmp_path)
    monkeypatch.setattr("pipeline.moderation.Moderation.check_images", lambda self, images, prompts=None: [
        Decision("blur", "violence", 1.0, 0.0, "concept x") for _ in images])
    tiles = []
    monkeypatch.setattr("sampling.sheets.grid", lambda images, *rest, **more: tiles.append(images) or images)
    monkeypatch.setattr("sampling.sheets.save_sheet", lambda *rest, **_: None)
    call(run, tmp_path / "init", "a moon", "--init", given["INIT"])
    raw = torch.from_numpy(np.array(Image.open(given["INIT"]).convert("RGB"))).permute(2, 0, 1)
    assert not torch.equal(tiles[0][0], raw) and tiles[0][0].float().std() < raw.float().std()


def test_no_word_of_a_refused_prompt_is_drawn_into_a_grid(run, tmp_path, monkeypatch):
    said = []
    for name in ("grid", "axes_grid"):
        monkeypatch.setattr(f"sampling.sheets.{name}",
                            lambda images, *rest, **more: said.append((rest, more)) or images)
    monkeypatch.setattr("sampling.sheets.save_sheet", lambda *rest, **_: None)
    call(run, tmp_path / "a", BAD, "a moon")
    call(run, tmp_path / "b", "--xy", f"prompt={BAD}|a moon", "guidance=1,2", "--steps", "1")
    assert len(said) == 2 and "zorbic" not in str(said) and "refused" in str(said[0]) and "a moon" in str(said)


@pytest.mark.parametrize("embed", [lambda images: 1 / 0, lambda images: torch.full((len(images), 4), torch.nan)])
def test_a_judge_that_breaks_lets_no_image_through(run, tmp_path, monkeypatch, embed):
    thing = Concept("thing", "violence", ("x",), threshold=9.0)
    broken = ImageModerator([thing], embed, lambda texts: torch.ones(1, 4))
    monkeypatch.setattr("pipeline.moderation.image_moderator", lambda *arguments: broken)
    code, files, rows = call(run, tmp_path / "out", "a moon", "--concepts", concepts(tmp_path))
    assert code == 5 and files == [] and rows[0]["action"] == "block"


def test_latents_that_are_not_finite_are_no_image(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sampling.engine.latents_of_requests", lambda system, *rest: torch.full(
        (1, *system.latent_shape), torch.nan))
    code, files, rows = call(run, tmp_path, "a moon")
    assert code == 5 and files == [] and "the image failed: it is not finite" in rows[0]["message"]


# ---- mutations

@pytest.mark.parametrize("change", ["delete", "flip", "cut", "empty"])
def test_damaged_weights_stop_everything(run, tmp_path, change, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "moderation.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if change == "delete":
        path.unlink()
        monkeypatch.setattr("pipeline.moderation.DEFAULT", tmp_path / "moderation.safetensors")
    else:
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:500]), "empty": b""}[change])
    with pytest.raises(ArtefactError, match="moderation") as caught:
        sample.main(["--run", str(copy), "--out", str(tmp_path / "out"), "a star"])
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").glob("*.png"))
    with pytest.raises(ArtefactError):
        load_run(copy)


@pytest.mark.parametrize("mode", ["block", "blur", "flag"])
def test_a_gate_that_breaks_refuses(run, tmp_path, monkeypatch, mode):
    def explode(*_):
        raise RuntimeError

    monkeypatch.setattr(PromptGate, "_read", explode)
    code, files, rows = call(run, tmp_path, "a red star", "--moderation", mode)
    assert code == 5 and files == [] and "moderation failed (RuntimeError)" in rows[0]["message"]


def test_a_log_that_cannot_be_written_refuses(run, tmp_path):
    key, log = tmp_path / "key", tmp_path / "log"
    assert safety(["key", str(key)]) == 0
    code, _, _ = call(run, tmp_path / "a", "a red star", MILD, BAD, "--audit", str(log), str(key))
    text = log.read_text()
    assert code == 0 and len(text.splitlines()) == 2 and "zorbic" not in text
    assert safety(["verify", str(log), "--key", str(key)]) == 0
    log.unlink()
    log.mkdir()
    code, files, rows = call(run, tmp_path / "b", BAD, MILD, "--audit", str(log), str(key))
    assert code == 5 and files == [] and "the audit log failed" in rows[0]["message"]


# ---- from code

def test_the_pipeline_asks_by_itself(run):
    system = load_run(run)
    assert system.images(["a red star"], [0]).shape == (1, 3, 32, 32)
    with pytest.raises(Refused, match="image 2 of 2: refused: hate") as caught:
        system.images(["a red star", BAD], [0, 1])
    assert [decision.action for decision in caught.value.decisions] == ["allow", "block"]
    with pytest.raises(Refused):
        system.images(["a red star"], [0], negative="zorbic")
    blurred = load_run(run, moderation="blur").images([BAD], [0])
    plain = load_run(run, moderation=None).images([BAD], [0])
    assert not torch.equal(blurred, plain)
    system.moderation = Moderation(PromptGate.load(run / "moderation.safetensors"), ImageModerator(
        [Concept("x", "violence", ("x",), threshold=-2.0)], lambda images: torch.ones(len(images), 4),
        lambda texts: torch.ones(len(texts), 4)))
    with pytest.raises(Refused, match="refused: violence"):
        system.images(["a red star"], [0])


def test_the_pipeline_judges_by_the_concepts_of_its_run_folder(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    concepts(copy)
    with pytest.raises(Refused, match="refused: violence"):
        load_run(copy).images(["a red star"], [0])
    assert load_run(copy, moderation="flag").images(["a red star"], [0]).shape == (1, 3, 32, 32)


def test_decisions_are_kept_only_where_they_would_be_the_same_again(run, tmp_path):
    log = AuditLog(tmp_path / "log", bytes(32))
    moderation = Moderation(PromptGate.load(run / "moderation.safetensors", audit=log), audit=log)
    for _ in range(3):
        assert moderation.check_prompt([BAD]).action == "block"
    assert log.verify() == 3  # a line for every request
    fails = [True, False]
    gate = PromptGate.load(run / "moderation.safetensors", encoder=lambda text: 1 / 0 if fails.pop(0) else
                           dict.fromkeys(HEADS, 0.0))
    kept = Moderation(gate)
    assert [kept.check_prompt(["a red star"]).action for _ in range(3)] == ["block", "allow", "allow"]


def test_everything_that_is_conditioned_on(run):
    tokenizer = load_run(run).tokenizer
    long = parse_prompt("a (small:1.2) red star above " * 9 + "a moon", chunks=2)
    texts = conditioned_texts([long, parse_prompt("a star by *1")], tokenizer, {"*1": "a blue circle"})
    assert long.text in texts and f"{long.text} a star by *1" in texts and "a star by a blue circle" in texts
    cut = [text for text in texts if long.text.startswith(text) and text != long.text]
    assert len(cut) == 2 and "moon" not in "".join(cut) and all("(" not in text for text in texts)
    assert any(text in long.text and not long.text.startswith(text) for text in texts)  # the second chunk


def test_learned_tokens_are_read_as_what_they_were_learned_from(run):
    moderation = Moderation(PromptGate.load(run / "moderation.safetensors"), learned={"*1": "zorbic"})
    assert moderation.check_prompt(["a star by *1"]).action == "block"
    assert moderation.check_prompt(["a star by *2"]).action == "allow"
