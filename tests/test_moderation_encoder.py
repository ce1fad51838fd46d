"""The second head of the gate, on the text encoder of a run: trained, kept, joined to the first, and failing closed."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_moderation import BAD, CALM, written, written_text
from safetensors.torch import load_file, save_file

from files.weights import CheckpointError
from moderate import main as safety
from pipeline.moderation import Moderation
from pipeline.text_head import FILE, read_head, untrained_head
from safety.policy import HEADS, noisy_or
from safety.prompt import load_artefact
from training.moderation.config import ModeratorStage
from training.moderation.corpus import read_corpus
from training.moderation.encoder_head import calibrate, fit, plain_texts, train_encoder_head

ROOT = Path(__file__).parents[1]
CONFIG = ModeratorStage(twins=8, kept={"captions": 1.0}, budget={"captions": 0.02})


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return written_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tiny_run, text, tmp_path_factory) -> Path:
    """A run with a head of its own, beside the made-up lexicon."""
    folder = tmp_path_factory.mktemp("runs") / "headed"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("state", "cache", "samples"))
    written(folder / "moderation.safetensors")
    train_encoder_head(folder, [str(text)], folder / "moderation.safetensors", CONFIG)
    return folder


def test_it_learns_words_that_its_encoder_was_never_taught(tiny_run, text):
    """Scores of texts with a bad word are above those without, on groups that were not trained on."""
    rows = [row for row in read_corpus([text]).rows if row.labels]
    parts = {split: [row for row in rows if row.split == split] for split in ("train", "test")}
    head = fit(untrained_head(tiny_run), parts["train"], CONFIG, epochs=100)
    with torch.no_grad():
        found = torch.sigmoid(head.net(head.states(plain_texts(parts["test"])))).amax(dim=1)
    bad = torch.tensor([row.harmful for row in parts["test"]])
    assert bad.sum() > 10 and (found[bad, None] > found[None, ~bad]).float().mean() > 0.8


def test_it_is_read_back_and_says_what_the_trained_one_says(run, text):
    one, two = read_head(run), read_head(run)
    found = one(f"a {CALM[0]} {BAD['violence'][0]}")
    assert found == two(f"a {CALM[0]} {BAD['violence'][0]}") and set(found) == set(HEADS)
    assert all(0 <= value <= 1 for value in found.values())


def test_nothing_of_a_long_text_is_cut_off(run):
    """A word behind hundreds of others still changes the state."""
    head = read_head(run)
    long = " ".join(CALM * 30)
    states = head.states([long, f"{long} {BAD['violence'][0]}", ""])
    assert states.shape == (3, 16) and torch.isfinite(states).all()
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_states_do_not_depend_on_the_batch(run):
    head = read_head(run)
    texts = [f"a {word} and a {other}" for word in CALM for other in CALM]
    together, apart = head.states(texts), torch.cat([head.states([text]) for text in texts])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)


def test_by_itself_it_flags_no_more_harmless_text_than_its_budget(tiny_run, text, tmp_path):
    artefact = load_artefact(written(tmp_path / "moderation.safetensors"))
    rows = [row for row in read_corpus([text]).rows if row.labels]
    head = calibrate(fit(untrained_head(tiny_run), rows, CONFIG), rows, artefact, budget=0.05)
    harmless = [row for row in rows if row.harmless and row.source == "captions"]
    limits = torch.tensor([min(artefact.policy.limits[name].flag, artefact.policy.short[name].flag) for name in HEADS])
    with torch.no_grad():
        scores = torch.sigmoid(head.net(head.states(plain_texts(harmless))) * head.slope + head.shift)
    assert ((scores >= limits).float().mean(dim=0) <= 0.05).all() and (head.slope > 0).all()


def test_the_gate_asks_both_heads_and_joins_them_by_noisy_or(run):
    moderation = Moderation.load("block", run / "moderation.safetensors", run=run)
    assert moderation.gate is not None
    text = f"a {CALM[0]} {BAD['violence'][0]}"
    heads = moderation.gate.explain(text).heads
    assert len(heads) == 2 and heads[1] == read_head(run)(text)
    assert moderation.gate.check(text).scores["violence"] == pytest.approx(
        noisy_or([head["violence"] for head in heads]))
    without = Moderation.load("block", run / "moderation.safetensors")
    assert without.gate is not None and len(without.gate.explain(text).heads) == 1


def test_the_command_line_asks_as_the_programs_that_draw_do(run, capsys):
    text = f"a {CALM[0]} {BAD['violence'][0]}"
    assert safety(["explain", text, "--run", str(run), "--json"]) == 0
    heads = json.loads(capsys.readouterr().out)["heads"]
    assert len(heads) == 2 and heads[1] == read_head(run)(text)
    assert safety(["check", "a zorbic star", "--run", str(run)]) == 5  # by the weights in the run folder
    with pytest.raises(ValueError, match="none"):
        safety(["check", "a star", "--run", str(run / "none")])


@pytest.mark.parametrize("fault, line", [
    ("flip", "is damaged|does not fit|not finite"), ("cut", "is damaged"), ("text encoder", "another text encoder")])
def test_a_head_that_does_not_fit_stops_everything(run, tmp_path, fault, line):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / FILE
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif fault == "flip":
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    else:
        path = folder / "text_encoder.safetensors"
        save_file({name: value + 1e-3 for name, value in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=line):
        Moderation.load("block", folder / "moderation.safetensors", run=folder)


def test_the_command(run, text, tmp_path):
    """What cannot be trained is said in one line."""
    command = [sys.executable, "-m", "training.moderation.encoder_head", "--run", str(run), "--data"]
    for folder, line in ((tmp_path / "none", "no folder"), (tmp_path, "no CSV file")):
        done = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error:") and line in done.stderr
        assert done.stderr.count("\n") == 1
    missing = subprocess.run([*command[:4], str(tmp_path / "no_run"), "--data", str(text)], cwd=ROOT,
                             capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
