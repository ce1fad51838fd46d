"""evaluate.py as it is called: scores, page, protocol, comparison; it goes on where it was, and refuses in one line."""
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from emoji_packages import emoji_folder
from PIL import Image

import evaluate
from data.tokenizer import Tokenizer
from eval.compare import comparison_table, paired_difference
from eval.inception_score import inception_score
from eval.kernel import kid
from files.config import to_dict
from files.images import to_unit
from files.weights import save_weights
from model.clip import Clip, ClipConfig, ImageEncoderConfig
from model.text_encoder import TextEncoderConfig
from pipeline.system import TextToImage
from scoring import distances
from scoring.judges import Comparison, Judges, ReferenceImages
from scoring.samples import makers_of
from scoring.settings import Suite


def copied(tiny_run: Path, path: Path, **sizes: int) -> Path:
    """The run with larger held-out splits: what was trained does not depend on them."""
    shutil.copytree(tiny_run, path, ignore=shutil.ignore_patterns("report", "state", "cache"))
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["data"]["shapes"].update(sizes)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_run) -> Path:
    """A run evaluated in full, with a judge of random weights."""
    run = copied(tiny_run, tmp_path_factory.mktemp("runs") / "judged", validation=40, test=80)
    torch.manual_seed(0)
    config = ClipConfig(ImageEncoderConfig(16, 8, width=16, layers=1, heads=1, mlp_width=32),
                        TextEncoderConfig(300, 24, width=16, layers=1, heads=1, mlp_width=32, causal=False), width=8)
    save_weights(Clip(config), run / "clip.safetensors", {"model": json.dumps(to_dict(config))})
    (run / "clip_tokenizer.json").write_text(Tokenizer.load(run / "tokenizer.json").to_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scoring.protocol.MOST_SEARCHED", 24)
        patch.setattr("scoring.settings.SUITES", {"full": Suite(24, 20, (2.0,), (2,))})
        evaluate.main([str(run), "--suite", "full"])
    return run


class Sources(HTMLParser):
    """What a page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(folder: Path) -> str:
    """The page's text, once every image it shows is there, whole and local, and every element is closed."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    sources = Sources(text)
    assert sources.open == [] and len(sources.found) > 3
    assert not re.search(r"https?:|//\w|<script|@import|url\(", text)
    for source in sources.found:
        with Image.open(folder / source) as image:
            image.load()
    return text


def check_opening(text: str, metrics: str) -> None:
    """The page opens with prompt, sample and a mark for each promise; a value stays on one line with its interval."""
    opening = text.split("<h2>")[1]
    assert opening.startswith("Prompts, samples, and what was kept")
    figures = re.findall(r"<figure(.*?)><figcaption>(.+?)</figcaption><img src=\"images/\d+.png\" alt=\".+?\">"
                         r"<ul class=\"marks\">(.*?)</ul></figure>", opening)
    assert len(figures) == len(re.findall("<figure", opening)) == 8
    counts = json.loads(metrics)["per_prompt"]["attributes"]
    assert [[marks.count("&#10003;"), marks.count("<li")] for _, _, marks in figures] == counts
    assert all(("missed" in kind) == ("&#10007;" in marks) for kind, _, marks in figures)
    assert "td.interval{white-space:nowrap}" in text and '<table class="wide">' in text
    cells = re.findall(r"<td( class=\"interval\")?>([^<]*)</td>", text)
    assert all(kind for kind, cell in cells if re.fullmatch(r"[\d.]+ \(\d+-\d+\)", cell))
    assert sum(bool(kind) for kind, _ in cells) > 20


def test_the_full_suite_writes_figures_with_their_making(run):
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    protocol = metrics["protocol"]
    assert {"data", "prompts", "reference", "features", "clip", "sampler", "steps", "guidance", "seeds", "revision",
            "weights", "precision"} <= set(protocol)
    assert "EfficientNet-Lite0" in protocol["features"] and "antialiased" in protocol["features"]
    assert protocol["prompts"] == 24 and len(protocol["weights"]) == 4 and "test items 2" in protocol["reference"]
    names = " ".join(metrics["figures"])
    assert "continued" not in names  # far fewer images than features
    for word in ("Frechet", "KID", "precision", "recall", "density", "coverage", "CLIP score", "CMMD",
                 "caption found", "(features of 24)", "(pixels of 24)"):
        assert word in names, word
    for name, figure in metrics["figures"].items():
        value = figure["value"]
        assert value["low"] <= value["value"] <= value["high"] and figure["real"] is not None, name
    frechet = next(value for name, value in metrics["figures"].items() if name.startswith("Frechet"))
    assert frechet["value"]["value"] > 2 * frechet["real"]["value"]  # untrained samples against real images
    assert {"score", "chance", "calibration", "ceiling", "groups", "values", "per_prompt"} <= set(metrics)
    written = (run / "report" / "figures.md").read_text()
    assert all(f"| {name} |" in written for name in [*metrics["figures"], "attributes", "features", "revision"])
    assert len(metrics["per_prompt"]["attributes"]) == len(metrics["per_prompt"]["CLIP score"]) == 24


def test_the_page_opens_from_disk_with_everything_it_shows(run):
    text = check_page(run / "report")
    for heading in ("Scores on prompts", "Kinds of prompts", "Promises by what they name", "Distances, agreement",
                    "training images, which lies below", "Guidance against score", "Steps against score", "Best by",
                    "Worst by", "How these figures were made", "Training"):
        assert heading in text, heading


def test_the_quick_suite_prints_its_table_and_goes_on_where_it_was(tiny_run, tmp_path, capsys, monkeypatch):
    """A batch that is missing or cut is drawn again to the same bytes; the others are not touched."""
    run = copied(tiny_run, tmp_path / "quick", validation=12, test=12)
    monkeypatch.setattr("scoring.samples.BATCH", 4)
    arguments = [str(run), "--count", "8", "--validation", "4", "--guidance", "1", "3"]
    evaluate.main(arguments)
    printed, metrics = capsys.readouterr().out, (run / "report" / "metrics.json").read_text()
    assert "| prompts | n | attributes | scene |" in printed and "| reader: real images | 8 |" in printed
    assert "8 unseen prompts, 3 ddim steps, guidance" in printed and "wrote" in printed
    check_opening(check_page(run / "report"), metrics)
    files = sorted((run / "report" / "cache").rglob("*.npy"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert len(files) == 4
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-7])
    evaluate.main(arguments)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content and (path.stat().st_mtime_ns == time) == (path not in files[:2])
    assert (run / "report" / "metrics.json").read_text() == metrics


def test_kept_samples_say_what_drew_them(run, tmp_path):
    """And go on saying so when other code reads them."""
    found = list((run / "report" / "cache").rglob("made.json"))
    before = [path.read_bytes() for path in found]
    drawn_by = json.loads((run / "report" / "metrics.json").read_text())["protocol"]["samples_drawn_by"]
    assert found and all(json.loads(text) == [drawn_by] and "torch" in drawn_by for text in before)
    folder = found[0].parent
    assert makers_of(folder, drawn_now=False) == [drawn_by]
    found[0].write_text('["another, torch 1, machine"]')
    assert makers_of(folder, drawn_now=False) == ["another, torch 1, machine"]
    assert makers_of(folder, drawn_now=True) == ["another, torch 1, machine", drawn_by]
    found[0].write_bytes(before[0])


def test_what_is_not_finite_is_not_measured_as_a_black_image(tiny_run, tmp_path, monkeypatch):
    run = copied(tiny_run, tmp_path / "run", validation=40, test=80)
    latents = TextToImage.latents
    monkeypatch.setattr(TextToImage, "latents", lambda *rest, **more: latents(*rest, **more) * torch.nan)
    with pytest.raises(ValueError, match="the samples of run are not finite.*weights are damaged") as error:
        evaluate.main([str(run), "--count", "8", "--validation", "4", "--guidance", "2"])
    assert "\n" not in str(error.value) and not list((run / "report").rglob("*.npy"))


def test_the_pairs_that_are_drawn_are_the_nearest_of_each_search(tmp_path, monkeypatch):
    """In pixels: each sample is drawn above the training image it is nearest to in pixels."""
    draw = np.random.default_rng(0)
    train, samples = (torch.from_numpy(draw.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)) for n in (30, 12))
    samples[4] = train[17]
    sheets = {}
    monkeypatch.setattr(distances, "save_grid", lambda images, path, *rest, **more: sheets.update({path.name: images}))

    class Training:
        def __getitem__(self, index):
            return {"image": train[index], "captions": ("a",)}

    monkeypatch.setattr(distances, "source_batches", lambda source, first, last: iter([to_unit(train[first:last])]))
    held_out = torch.from_numpy(draw.integers(0, 256, (24, 3, 16, 16), dtype=np.uint8))
    features = {name: SimpleNamespace(vectors=torch.from_numpy(draw.normal(size=(n, 4))))
                for name, n in (("samples", 12), ("held_out", 24), ("training", 30))}
    sets = distances.FeatureSets(**features, reconstructed=None, reference=None)
    comparison = Comparison(Judges(None, None), ReferenceImages(list, "", ""), Training(), 30)
    drawn = SimpleNamespace(images=samples, prompts=SimpleNamespace(images=list(held_out)))
    (heading, html), figures = distances.copies_section(drawn, sets, comparison, tmp_path)
    assert torch.equal(sheets["copies_pixels.png"][0], samples[4])
    assert torch.equal(sheets["copies_pixels.png"][distances.NUM_PAIRS], train[17]) and "copies_features.png" in html
    assert {"features of 30", "pixels of 30"} == {name.split("(")[1].strip(")") for name in figures}


def test_one_scale_is_taken_and_several_need_somebody_to_choose(tiny_run, tmp_path):
    run = copied(tiny_run, tmp_path / "emoji")
    config = yaml.safe_load((run / "config.yaml").read_text())
    size = config["data"]["shapes"]["size"]
    config["data"] |= {"source": "emoji", "emoji": {"root": str(emoji_folder(tmp_path / "data", size)), "size": size,
                                                    "held_out_scenes": 20}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = [str(run), "--count", "4", "--validation", "4", "--steps", "1", "--guidance"]
    with pytest.raises(ValueError, match="--guidance with 2 scales: nothing here chooses"):
        evaluate.main([*arguments, "1", "2"])
    evaluate.main([*arguments, "1.5"])
    assert json.loads((run / "report" / "metrics.json").read_text())["protocol"]["guidance"] == 1.5


def test_the_inception_score_has_the_error_of_its_mean():
    draw = np.random.default_rng(0)
    found = [distances.inception_estimate(torch.from_numpy(draw.normal(0, 2, (400, 10)))) for _ in range(60)]
    spread = np.std([one.value for one in found])
    reach = np.mean([one.high - one.low for one in found]) / 2
    assert 1.4 * spread < reach < 3.5 * spread  # t(9) asks for 2.3
    logits = torch.from_numpy(draw.normal(0, 2, (400, 10)))
    value, deviation = inception_score(logits, 10)  # the deviation divides by 10, that of a sample by 9
    one = distances.inception_estimate(logits)
    assert one.value == value
    assert one.high - value == pytest.approx(2.262157 * deviation * (10 / 9) ** 0.5 / 10**0.5, rel=1e-6)


def test_figures_of_papers_come_with_inception_and_enough_images(monkeypatch):
    """The KID over subsets is left out where a set is smaller than a subset; its mean is near that over all pairs."""
    draw = torch.Generator().manual_seed(0)
    found = [SimpleNamespace(vectors=torch.randn(60, 8, generator=draw) + shift) for shift in (1.0, 0.0, 0.5, 0.0)]
    sets = distances.FeatureSets(*found, training=None)
    features = SimpleNamespace(logits=lambda vectors: vectors)
    assert list(distances.published_figures(sets, features)) == ["Inception score, 10 parts"]
    monkeypatch.setattr(distances, "KID_SUBSETS", 20)
    monkeypatch.setattr(distances, "KID_SUBSET_SIZE", 40)
    figure = distances.published_figures(sets, features)["KID x 1000, 20 subsets of 40"]
    for column, vectors in zip((figure.value, figure.real, figure.ceiling), found):
        expected = kid(vectors.vectors, found[3].vectors).scaled(1000)
        assert column.low < expected.value < column.high
    assert figure.value.value > figure.ceiling.value > figure.real.value


def test_other_settings_are_other_samples(run, tmp_path):
    folders = len(list((run / "report" / "cache").glob("*/")))
    evaluate.main([str(run), "--count", "24", "--validation", "20", "--guidance", "2", "--steps", "2"])
    assert len(list((run / "report" / "cache").glob("*/"))) == folders + 1  # of two steps were there for validation


def test_runs_are_compared_only_when_measured_the_same_way(run, tiny_run, tmp_path, capsys):
    other = copied(tiny_run, tmp_path / "other", validation=40, test=80)
    quick = ["--count", "8", "--validation", "4", "--guidance", "2"]
    with pytest.raises(ValueError, match="make it with: python evaluate.py .*other"):
        evaluate.main([str(run), *quick, "--compare", str(other)])
    evaluate.main([str(other), *quick])
    capsys.readouterr()
    evaluate.main([str(other), *quick, "--compare", str(other)])
    assert "(+0.0: +0.0 to +0.0)" in capsys.readouterr().out
    assert "Beside other runs" in check_page(other / "report")
    with pytest.raises(ValueError, match="was measured otherwise .*prompts: 8 there, 6 here"):
        evaluate.main([str(run), "--count", "6", *quick[2:], "--compare", str(other)])


def test_a_paired_difference_does_not_mind_hard_prompts():
    """Prompts differ far more than the runs do: the paired interval is narrow, and 0 is outside."""
    theirs = [[kept, 10] for kept in (0, 10) for _ in range(50)]
    ours = [[min(10, kept + 1), 10] for kept, _ in theirs]
    found = paired_difference(ours, theirs)
    assert found.value == pytest.approx(0.05) and 0.03 < found.low and found.high < 0.07
    with pytest.raises(ValueError, match="the same prompts in both"):
        paired_difference(ours, theirs[:-1])
    figures = {"protocol": {}, "per_prompt": {"attributes": theirs}, "figures": {}}
    table = comparison_table(figures, {"runs/b": {**figures, "per_prompt": {"attributes": ours}}})
    assert "| attributes, % | 50.0 | 55.0 (+5.0:" in table and ", apart)" in table


@pytest.mark.parametrize("arguments, line", [
    (["nowhere"], "no run folder nowhere"),
    (["RUN", "--count", "1"], "--count 1; valid: from 2 up"),
    (["RUN", "--suite", "full", "--count", "10"], "--count 10; valid: from 20 up"),
    (["RUN", "--clip", "x"], "--clip is for --suite full"),
    (["RUN", "--count", "8", "--validation", "4", "--compare", "OTHER"], "OTHER was measured otherwise"),
    *((["RUN", "--compare", f"BROKEN{number}"], "BROKEN.*cannot be used .ValueError: it has no protocol")
      for number in range(3)),
    (["RUN", "--count", "500", "--validation", "4", "--guidance", "2"], "only .* items of the split 'test'"),
    (["RUN", "--sampler", "magic"], "magic"),
    (["RUN", "--suite", "full", "--count", "24", "--validation", "20", "--guidance", "2", "--inception", "no.pth"],
     "no weights file no.pth; valid: pt_inception"),
    (["RUN", "--suite", "full", "--count", "24", "--validation", "20", "--guidance", "2", "--reference", "SMALL"],
     "images of 8x8; valid: 32x32"),
], ids=["run", "count", "few", "clip", "compare", "null", "number", "empty", "many", "sampler", "inception",
        "reference"])
def test_what_cannot_be_measured_gets_one_line(run, arguments, line, tmp_path, monkeypatch):
    monkeypatch.setattr("scoring.settings.SUITES", {"quick": Suite(24, 20, (2.0,)),
                                                    "full": Suite(24, 20, (2.0,), (2,))})
    for number in range(16):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(("null", "5", '{"protocol": null}')):
        Path(f"BROKEN{number}/report").mkdir(parents=True)
        Path(f"BROKEN{number}/report/metrics.json").write_text(text)
    Path("OTHER/report").mkdir(parents=True)
    Path("OTHER/report/metrics.json").write_text('{"protocol": {"data": "x"}}')
    arguments = [{"RUN": str(run), "SMALL": str(tmp_path)}.get(word, word) for word in arguments]
    samples = len(list((run / "report" / "cache").rglob("*.npy")))
    with pytest.raises(ValueError, match=line) as error:
        evaluate.main(arguments)
    assert "\n" not in str(error.value)
    assert len(list((run / "report" / "cache").rglob("*.npy"))) == samples  # before anything was drawn


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(tiny_run, tmp_path):
    """Batches are shared between them; bytes of samples and scores are those of one process."""
    runs = [copied(tiny_run, tmp_path / name, validation=40, test=200) for name in ("one", "two")]
    arguments = ["--count", "130", "--validation", "4", "--guidance", "2"]
    evaluate.main([str(runs[0]), *arguments])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "evaluate.py", str(runs[1]), *arguments], cwd=Path(__file__).parents[1], text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, two = ({path.relative_to(run): path.read_bytes() for path in (run / "report" / "cache").rglob("*.npy")}
                for run in runs)
    assert len(one) == 4 and one == two
    scores = [json.loads((run / "report" / "metrics.json").read_text())["score"] for run in runs]
    assert scores[0] == scores[1] and done.stdout.count("wrote") == 1


def test_emoji_are_told_from_renderings_of_other_things(tiny_run, tmp_path, capsys):
    """The same command on a run of emoji: what networks of shapes draw there is near chance, real drawings are not."""
    run = copied(tiny_run, tmp_path / "emoji")
    config = yaml.safe_load((run / "config.yaml").read_text())
    size = config["data"]["shapes"]["size"]
    root = emoji_folder(tmp_path / "data", size)
    config["data"] |= {"source": "emoji", "emoji": {"root": str(root), "size": size, "held_out_scenes": 20}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    evaluate.main([str(run), "--count", "24", "--validation", "4", "--guidance", "1", "--steps", "2"])
    found = json.loads((run / "report" / "metrics.json").read_text())
    drawn, read, guess = (found[name]["all"]["object"]["value"] for name in ("calibration", "score", "chance"))
    assert drawn > 0.9 > read and guess < 0.5 and 0 < found["guess"]["attributes"] < 0.5
    assert {"object", "style", "scene"} <= set(found["guess"])
    assert "a guess" in (run / "report" / "figures.md").read_text()
    assert len(found["per_prompt"]["attributes"]) == 24
    assert {"scene", "style", "background"} <= set(found["score"]["all"])
    assert "real images" in (run / "report" / "figures.md").read_text()
    assert "scene of two things" in capsys.readouterr().out
    check_page(run / "report")
