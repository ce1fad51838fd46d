"""From text to a file of moderation, on a made-up language; and that the repository holds no listed term in clear."""
import csv
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_moderation import BAD, CALM, write_csv, written_text

from benchmarks.moderation.holes import ordinary_prompts
from benchmarks.moderation.metrics import auc, calibration_error, interval, match_lengths, recall_at
from benchmarks.moderation.obfuscation import KINDS, obfuscate
from files.config import from_dict
from safety.gate import PromptGate
from safety.keywords import BLOCK, FLAG
from safety.policy import HEADS
from safety.prompt import DEFAULT, HeadConfig, PromptHead, load_artefact
from train import main
from training.moderation.artefact import NEVER, level_of, lexicon_terms, limits_within, reaches_limits
from training.moderation.config import ModeratorStage
from training.moderation.corpus import Corpus, ListedTerm, TextFilesError, categories_of, read_corpus, without_slurs
from training.moderation.ordinary import ordinary_rows
from training.moderation.rows import Row, group_alike, place_composites
from training.moderation.stage import (
    Network,
    batch_loss,
    label_tensors,
    ngram_bag,
    quantize,
    train_network,
    twin_places,
)
from training.moderation.variations import CARRIERS, diluted, disguise, drowned, glued, vary, with_endings

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "moderation"
SMALL = HeadConfig(char_bits=10, word_bits=10, width=4, hidden=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """What the command leaves behind."""
    config = tmp_path_factory.mktemp("config") / "moderation.yaml"
    config.write_text("name: tiny\nstages: [moderator]\n"
                      "moderator: {head: {char_bits: 10, word_bits: 10, width: 4, hidden: 8}, epochs: 6, batch: 64,\n"
                      "  twins: 8, learning_rate: 0.02, budget: {captions: 0.02}, kept: {captions: 1.0},\n"
                      "  ordinary: 0, requests: 0, short_budget: 0.02, short_flag_budget: 0.06}\n")
    out = config.parent / "run"
    main([str(config), f"moderator.data.root={folder}", f"run={out}"])
    return out


# ---- the file that training leaves

def test_it_learns_what_it_was_told_and_lets_the_rest_through(run, folder):
    gate = PromptGate.load(run / "moderation.safetensors")
    for category, words in BAD.items():
        for word in words:
            decision = gate.check(f"a {word} tree")
            assert decision.action in ("flag", "block") and decision.category == category
    assert all((limit.block > 1) == (name not in BAD) for name, limit in gate.artefact.policy.limits.items())
    assert gate.check("zorbic").category == "hate" and gate.check("zorbic").action == "block"
    assert gate.artefact.lexicon.term("quandle") == (HEADS.index("harassment"), 2, False)
    calm = [row.text for row in read_corpus([folder]).rows if row.split == "test" and row.source == "captions"]
    assert len(calm) > 40 and [gate.check(text).action for text in calm].count("block") <= 0.08 * len(calm)


def test_it_says_what_it_was_made_from_and_holds_no_word(run):
    card = json.loads((run / "moderation.json").read_text())
    assert card["rows"]["train"] > 100 and card["sha256"].startswith(load_artefact(run / "moderation.safetensors").hash)
    data = (run / "moderation.safetensors").read_bytes().lower() + (run / "moderation.json").read_bytes().lower()
    for word in ("zorbic", "quandle", *CALM, *(word for words in BAD.values() for word in words)):
        assert word.encode() not in data


def test_training_repeats_itself(folder):
    rows = [row for row in read_corpus([folder]).rows if row.split == "train"][:150]
    config = ModeratorStage(head=SMALL, epochs=1, batch=32, twins=4)
    one, two, three = (train_network(rows, config, seed, log=False) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.hidden.weight, three.hidden.weight)


def test_inference_is_the_network_that_was_trained():
    torch.manual_seed(0)
    network = Network(SMALL, dropout=0.5).eval()
    network.char.weight.data.normal_(std=0.3)
    network.word.weight.data.normal_(std=0.3)
    head = PromptHead(SMALL, quantize(network))
    for text in ("a red star", "two BLUE boats, (gorvax:1.2)", "x", "", "a star, " * 20):
        expected = network([ngram_bag(text, SMALL)])[0].detach().numpy()
        np.testing.assert_allclose(head.logits(" ".join(text.lower().replace(",", "").replace("(", "").replace(
            ":1.2)", "").split()))[0], expected, atol=0.03)  # tables in 8 bits


@pytest.mark.parametrize("names", [{"deep": ()}, {"wide": ()}, {"wide": HEADS[1:], "deep": HEADS[:1]}])
def test_a_category_may_have_linear_logits_only_or_none(folder, names):
    rows = [row for row in read_corpus([folder]).rows if row.split == "train"][:150]
    config = ModeratorStage(head=SMALL, epochs=1, batch=32, twins=4, **names)
    weights = quantize(train_network(rows, config, 0, log=False))
    for place, name in enumerate(HEADS):
        assert weights["out.weight"][place].any() == (name in config.deep)
        if name not in config.wide:
            assert not any(weights[f"{table}.table"][:, SMALL.width + place].any() for table in ("char", "word"))
    assert weights["word.table"][:, SMALL.width:].any() == bool(config.wide)
    with pytest.raises(ValueError, match="valid: each of"):
        ModeratorStage(wide=HEADS[1:], deep=HEADS[1:])


# ---- parts of training

def test_unknown_labels_have_no_gradient():
    rows = [Row("a", {"hate": 1.0}, "s", 0), Row("b", dict.fromkeys(HEADS, 0.0), "s", 1)]
    values, known = label_tensors(rows)
    logits = torch.zeros(2, len(HEADS), requires_grad=True)
    batch_loss(logits, values, known, 0, ModeratorStage()).backward()
    place = HEADS.index("hate")
    assert logits.grad[0].count_nonzero() == 1 and logits.grad[0, place] < 0 and (logits.grad[1] > 0).all()


def test_twins_are_kept_apart_by_the_margin():
    values = torch.zeros(2, len(HEADS))
    values[0, 0] = 1
    config = ModeratorStage(margin=1.0, twin_weight=2.0)
    without = batch_loss(torch.zeros(2, len(HEADS)), values, torch.ones_like(values), 0, config)
    close = batch_loss(torch.zeros(2, len(HEADS)), values, torch.ones_like(values), 1, config)
    assert close - without == pytest.approx(2.0)
    far = torch.zeros(2, len(HEADS))
    far[0, 0] = 1.5
    assert batch_loss(far, values, torch.ones_like(values), 1, config) == batch_loss(
        far, values, torch.ones_like(values), 0, config)


def test_splits_keep_twins_and_copies_together(folder):
    rows = read_corpus([folder]).rows
    assert {row.split for row in rows} == {"train", "dev", "test"}
    groups: dict[int, set[str]] = {}
    for row in rows:
        groups.setdefault(row.group, set()).add(row.split)
    assert all(len(found) == 1 for found in groups.values())
    for one, two in twin_places(rows):
        assert rows[one].group == rows[two].group and rows[one].harmful and rows[two].harmless
    copies = [Row("the old bridge at night", {}, "a", 1), Row("at night, the old bridge!", {}, "b", 2),
              Row("a quite different text", {}, "c", 3)]
    found = group_alike(copies)
    assert found[0].group == found[1].group != found[2].group


def test_names_of_categories_in_any_case_and_with_the_usual_misspellings():
    names = {"Harrasment": "harassment", "Illegal Activity": "illegal", "ILLEGAL_ACTIVITIES": "illegal",
             "Self-Harm": "self_harm", "self harm": "self_harm", " Shocking": "violence", "Sexual_Content": "sexual"}
    for name, expected in names.items():
        assert categories_of(name, "here") == [expected]
    assert categories_of("Hate, Violence", "here") == ["hate", "violence"]


def test_a_file_is_not_read_where_its_better_form_is(tmp_path, capsys):
    write_csv(tmp_path / "copro_pairs.csv", "benign,harmful,category",
              [("a calm lake", "a gorvax lake", "Violence")] * 3)
    write_csv(tmp_path / "calm.csv", "prompt", [("a tree",)])
    assert sum(row.source == "copro_pairs" for row in read_corpus([tmp_path]).rows) == 6
    write_csv(tmp_path / "copro_masked.csv", "text,label,category,group",
              [("a gorvax lake", 1, "violence", 0), ("a calm lake", 0, "violence", 0), ("a hill", 0, "violence", 1)])
    rows = read_corpus([tmp_path]).rows
    assert {row.source for row in rows} == {"copro_masked", "calm"} and "takes its place" in capsys.readouterr().out
    one, two, alone, _ = sorted(rows, key=lambda row: (row.source != "copro_masked", row.text != "a gorvax lake",
                                                       row.text != "a calm lake"))
    assert one.twin == two.twin >= 0 and alone.twin < 0 and two.labels == {"violence": 0.0} and not two.harmless


def test_texts_made_of_other_texts_stay_in_their_split(capsys):
    rows = [Row(f"sentence number {number}.", {"hate": 0.0}, "a", number) for number in range(40)]
    train = [row for row in rows if row.split == "train"]
    [test, *_] = [row for row in rows if row.split == "test"]
    made = [Row(f"{train[0].text} {train[1].text}", {"hate": 0.0}, "b", 100),
            Row(f"{train[0].text} {test.text}", {"hate": 0.0}, "b", 101),
            Row(f"{test.text} And something else.", {"hate": 0.0}, "b", 102),
            Row(f"{train[0].text} One. Two. Three.", {"hate": 0.0}, "b", 103)]
    found = {row.text: row for row in place_composites([*rows, *made]) if row.source == "b"}
    assert set(found) == {made[0].text, made[2].text, made[3].text} and "b: 1 texts left out" in capsys.readouterr().out
    assert found[made[0].text].split == "train" and found[made[2].text].split == "test"
    assert found[made[3].text].group == 103  # a quarter of it is not enough


def test_a_row_that_is_labelled_harmless_but_holds_a_slur_of_two_words_is_dropped():
    terms = [ListedTerm("quib dorfen", "racial / ethnic slurs", 2.5)]
    rows = [Row("two Quib dorfens at a fair", {"hate": 0.0}, "a", 1, topic="Hate"),
            Row("two quib dorfens", {"hate": 1.0}, "a", 2, topic="hate"),
            Row("a quib and a dorfen", {"hate": 0.0}, "a", 3, topic="hate")]
    assert without_slurs(rows, terms) == rows[1:]


def test_levels_of_listed_terms():
    """A word of the dictionary is no form of a term unless it is its plural; a slur with another meaning only flags; a
    plain word flags unless harmless text uses it."""
    slur = "racial / ethnic slurs"
    corpus = Corpus([], [ListedTerm("zorb", slur, 3), ListedTerm("quandle", slur, 3), ListedTerm("drub", slur, 3),
                         ListedTerm("vimt", "plain illegal", 2), ListedTerm("lamp", "plain violence", 2)],
                    {"zorbe", "zorbes", "zorbs", "vimt", "lamp", "drubs", "drubes", "drubing"}, set(), {"quandle"})
    calm = [Row("a lamp and a tree", dict.fromkeys(HEADS, 0.0), "calm", 0)] * 3
    terms = {term.text: (HEADS[term.category], term.level) for term in lexicon_terms(corpus, calm)}
    assert terms["zorb"] == terms["zorbs"] == ("hate", BLOCK) and "zorbes" not in terms
    assert terms["drubes"] == ("hate", BLOCK) and "drubing" not in terms and terms["drubed"] == ("hate", BLOCK)
    assert terms["quandle"] == ("hate", FLAG) and terms["vimt"] == terms["vimts"] == ("illegal", FLAG)
    assert "lamp" not in terms and "quandleing" not in terms


def test_counter_examples_are_harmless_and_kept_out_of_the_test():
    rows = ordinary_rows(3000)
    assert rows == ordinary_rows(3000) and all(row.harmless for row in rows)
    assert len({row.text for row in rows}) == len(rows) > 1500 and len({row.group for row in rows}) == len(rows)
    assert {row.split for row in rows} == {"train", "dev", "test"}
    kept = sum(ordinary_prompts().values(), [])
    assert len(kept) == len(set(kept)) >= 400 and not set(kept) & {row.text for row in rows}


def test_thresholds_keep_the_budget():
    generator = np.random.default_rng(0)
    groups = {"a": generator.random((2000, len(HEADS))) ** 3, "b": generator.random((900, len(HEADS)))}
    budget = {"a": 0.01, "b": 0.05}
    limits = limits_within(groups, budget, ("sexual", "hate"))
    shares = {name: reaches_limits(scores, limits).mean() for name, scores in groups.items()}
    assert all(shares[name] <= budget[name] for name in groups) and any(shares[n] > 0.6 * budget[n] for n in groups)
    assert [limits[i] == NEVER for i in range(len(HEADS))] == [name not in ("sexual", "hate") for name in HEADS]


def test_levels():
    assert [level_of("hate", s) for s in (1.0, 1.6, 2.0)] == [1, 2, 3]
    assert [level_of("sexual", s) for s in (1.0, 2.0, 2.4)] == [1, 2, 3] and level_of("harassment", 3) == 2


def test_variations_keep_what_is_said():
    generator = np.random.default_rng(0)
    assert all(carrier.count("{}") >= 1 for carrier in CARRIERS)
    texts = [vary("lamp", ["a tree, oil on canvas"], generator) for _ in range(200)]
    assert len(set(texts)) > 50 and sum("lamp" in text for text in texts) > 170
    assert len({disguise("window", generator) for _ in range(100)}) >= 8
    text = "a lamp on an old table"
    for change in (diluted, with_endings):
        letters = iter(change(text, generator).replace(" ", ""))
        assert all(letter in letters for letter in text.replace(" ", ""))
    assert glued(text, generator).replace(" ", "") == text.replace(" ", "")
    assert text in drowned(text, ["a red ball"], generator) and "ball" in drowned(text, ["a red ball"], generator)


@pytest.mark.parametrize("name, header, rows", [
    ("unknown header", "a,b", [("x", "y")]), ("unknown category", "text,label,category", [("x", "1", "taste")]),
    ("no number", "text,label,category", [("x", "maybe", "hate")]),
    ("severity", "text,category,severity", [("x", "y", "9")]),
    ("share", "prompt,categories,inappropriate_percentage", [("x", "hate", "101")]),
    ("harmless only", "prompt", [("x",)]),
])
def test_bad_files_are_refused_by_name(tmp_path, name, header, rows):
    write_csv(tmp_path / "bad.csv", header, rows)
    with pytest.raises(TextFilesError, match="valid"):
        read_corpus([tmp_path])


def test_bad_folders_and_settings(tmp_path):
    with pytest.raises(TextFilesError, match="no folder"):
        read_corpus([tmp_path / "none"])
    with pytest.raises(TextFilesError, match="no CSV"):
        read_corpus([tmp_path])
    with pytest.raises(ValueError, match="data.root"):
        main([str(ROOT / "configs/moderation.yaml"), f"run={tmp_path}"])
    for change in ({"epochs": 0}, {"forget": 1.0}, {"budget": {}}, {"budget": {"a": 2.0}}, {"kept": {"a": 0.0}}):
        with pytest.raises(ValueError, match="valid"):
            replace(ModeratorStage(), **change)


# ---- figures

def test_figures_against_their_definitions():
    generator = np.random.default_rng(0)
    positive, negative = generator.integers(0, 6, 40) / 5, generator.integers(0, 5, 70) / 5
    pairs = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert auc(positive, negative) == pytest.approx(pairs)
    assert recall_at(np.array([1.0, 3.0, 5.0]), np.arange(100) / 25, 0.01) == pytest.approx(1 / 3)
    assert recall_at(np.array([1.0, 3.0, 5.0]), np.arange(100) / 25, 0.30) == pytest.approx(2 / 3)
    scores = generator.random(20000)
    assert calibration_error(scores, generator.random(20000) < scores) < 0.02
    assert calibration_error(np.full(100, 0.9), np.zeros(100)) == pytest.approx(0.9)
    low, high = interval(np.mean, generator.normal(2, 1, 400))
    assert 1.8 < low < 2 < high < 2.2 and high - low == pytest.approx(4 * 0.98 / 20, rel=0.25)


def test_matched_negatives_have_the_lengths_of_the_positives():
    generator = np.random.default_rng(0)
    lengths, pool = generator.integers(80, 200, 100), generator.integers(10, 400, 3000)
    found = match_lengths(lengths, pool)
    assert len(set(found.tolist())) == len(found) == 300
    assert abs(auc(lengths.astype(float), pool[found].astype(float)) - 0.5) < 0.02
    assert abs(auc(lengths.astype(float), pool.astype(float)) - 0.5) > 0.05


def test_there_are_enough_kinds_of_disguise_and_each_does_something():
    generator = np.random.default_rng(0)
    assert len(KINDS) >= 25
    for kind in KINDS:
        changed = [obfuscate("mirkowest", kind, generator) != "mirkowest" for _ in range(5)]
        assert kind == "as it is" or any(changed), kind


# ---- no term in clear

@pytest.mark.skipif(not SHARED.is_dir(), reason="the lexicon is not here")
def test_the_repository_holds_no_listed_term():
    """Every text, the file of weights and the messages of all commits, against severe terms of one word or several."""
    with open(SHARED / "profanity_en.csv", newline="", encoding="utf-8") as file:
        listed = [line["text"].lower().strip() for line in csv.DictReader(file) if float(line["severity"]) >= 2.2]
    terms = {term for term in listed if len(term) >= 5 and term.replace(" ", "").isalpha()}
    longest = max(len(term.split()) for term in terms)
    assert len(terms) > 300 and longest > 1

    def held(text: str) -> set[str]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return {" ".join(words[at:at + size]) for size in range(1, longest + 1) for at in range(len(words))} & terms

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    texts = {"commit messages": git("log", "--format=%B")}
    for name in git("ls-files", "-co", "--exclude-standard").splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".cfg", ".json", ".toml", ".txt", ".html", ".csv", ".sh", ""):
            texts |= {name: path.read_text("utf-8", "replace")} if path.is_file() else {}
    wrong = [f"{name}: a listed term of {len(term)} letters" for name, text in texts.items() for term in held(text)]
    data = DEFAULT.read_bytes().lower()
    assert wrong + ["weights: a listed term" for term in terms if term.encode() in data] == []


REPEATED = (
    *"moon star cat dog tree river house boat lamp bread red blue garden mountain window flower bird horse cloud stone "
    "snow rain sun sea bridge castle train apple chair violin very the and".split(),
    "a moon", "a red star", "the old bridge", "two small boats", "a cup of tea", "oil painting", "highly detailed",
    "soft light", "a dog on a beach", "children flying a kite", "a family at dinner", "a bowl of fruit",
    "a castle in the fog", "4k", "masterpiece", "in the style of monet", "a man and a woman", "a black horse",
    "a doctor with a patient", "a knight with a sword", "trees in autumn", "a happy birthday", "she sells sea shells",
    "row row row your boat")


@pytest.mark.skipif(not DEFAULT.is_file(), reason="the weights are not here")
@pytest.mark.parametrize("between", [" ", ", "])
def test_repeating_what_is_harmless_changes_nothing(between):
    gate = PromptGate.load()
    assert len(REPEATED) >= 40 and {gate.check(text).action for text in REPEATED} == {"allow"}
    flagged = 0
    for text in REPEATED:
        found = [gate.check(between.join([text] * times)) for times in (2, 12, 50)]
        assert "block" not in {one.action for one in found}, text
        flagged += {one.action for one in found} != {"allow"}
        for name in HEADS:  # the nearest category depends on the length, because thresholds do
            assert [one.scores[name] for one in found] == pytest.approx([found[0].scores[name]] * 3, abs=0.02), text
    assert flagged <= 1  # said twice, a clause of four words has eight, which have the lower thresholds of short texts
    assert gate.check("(a star:1.2) (" + "a moon, " * 12 + ")").action == "allow"


@pytest.mark.skipif(not DEFAULT.is_file(), reason="the weights are not here")
def test_the_shipped_file_is_small_and_does_what_it_is_for():
    assert DEFAULT.stat().st_size <= 8_000_000
    gate = PromptGate.load()
    for text in ("a red star above two blue circles", "a bowl of fruit on a table", "a child flying a kite",
                 "a castle in fog", "an oil painting of a dancer", "a dog running on the beach"):
        assert gate.check(text).action == "allow"
    lines = sum(ordinary_prompts().values(), [])
    assert sum(gate.check(line).action == "block" for line in lines) <= 0.01 * len(lines)
    card = json.loads(DEFAULT.with_suffix(".json").read_text())
    assert card["sha256"].startswith(gate.artefact.hash)


def test_run_folders_from_when_there_was_one_further_folder_are_read():
    for before, now in (("", ()), ("more", ("more",)), (["a", "b"], ("a", "b"))):
        assert from_dict(ModeratorStage, {"data": {"root": "x", "extra": before}}).data.extra == now
