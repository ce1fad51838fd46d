"""The gate fails closed: whatever is broken on purpose here, nothing gets through; and its command line."""
import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_moderation import CONFIG, head_weights, written
from safetensors.numpy import load_file, save_file

from moderate import main
from safety.audit import AuditLog
from safety.gate import PromptGate
from safety.normalize import LONGEST, latin_words, normalize
from safety.parts import PART_MARGIN, WINDOW, parts_of, windows
from safety.policy import HEADS, MODES, Limits, Policy, log_odds
from safety.prompt import FORMAT, ArtefactError, PromptHead, content_hash, load_artefact, ngram_ids


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return written(tmp_path_factory.mktemp("weights") / "moderation.safetensors")


@pytest.fixture
def gate(weights) -> PromptGate:
    return PromptGate.load(weights)


def test_what_it_is_for(gate):
    assert gate.check("a red star").action == "allow"
    assert gate.check("a zorbic star").action == "block" and gate.check("a mildo star").action == "flag"
    assert gate.check("a smallperson").action == "allow" and gate.check("a signo star").action == "allow"
    assert gate.check("a signo smallperson").category == "sexual_minors"
    assert gate.check("a red star").model_hash == gate.artefact.hash != ""


def test_negative_prompts_get_the_hard_rules_only(gate, weights, tmp_path):
    harsh = PromptGate.load(written(tmp_path / "harsh.safetensors", out_bias=9.0))
    assert harsh.check("a red star").action == "block" and harsh.check("a red star", negative=True).action == "allow"
    assert harsh.check("zorbic", negative=True).action == "block" and harsh.check("", negative=True).action == "allow"


@pytest.mark.parametrize("text", ["", "   ", "\n", "a" * (LONGEST + 1), "e" + "\u0301" * 100_000, None, 7, b"a", ["a"],
                                  "\u200b\u200b", "!!! ???", "\U0001f600", "\u0301" * 50])
@pytest.mark.parametrize("mode", ["block", "blur", "flag"])
def test_what_cannot_be_read_is_refused_in_every_mode(weights, text, mode):
    decision = PromptGate.load(weights, mode=mode).check(text)
    assert decision.action == "block" and "prompt" in decision.reason


@pytest.mark.parametrize("text", ["a" * LONGEST, "red " * 500, "\ud800 red star", "red\udfffstar", "\x00 red",
                                  "a red \u202e star", "e" + "\u0301" * 1900, "\ufdfa" * 100, "(" * 1000 + "red",
                                  "a*" * 900])
def test_odd_text_ends_in_a_decision(gate, text):
    assert gate.check(text).action in ("allow", "flag", "block")
    assert not gate.check(text).reason.startswith("moderation failed")


def test_random_bytes_never_break_it_nor_take_long(gate):
    generator = random.Random(0)
    began = time.process_time()  # that of this process: others may keep the processor busy
    for _ in range(10_000):
        data = generator.randbytes(generator.randrange(60) if generator.random() < 0.95 else generator.randrange(2000))
        for encoding in ("latin-1", "utf-8"):
            decision = gate.check(data.decode(encoding, "surrogateescape"))
            assert not decision.reason.startswith("moderation failed"), data
    assert time.process_time() - began < 300  # ten times what it takes


def test_another_language_is_flagged(gate):
    for text in ("\u043a\u0440\u0430\u0441\u043d\u0430\u044f \u0437\u0432\u0435\u0437\u0434\u0430 red",
                 "\u7ea2\u8272\u7684\u661f"):
        assert gate.check(text).action == "flag" and "English" in gate.check(text).reason
    assert gate.check("une \u00e9toile tr\u00e8s rouge").action == "allow"  # Latin letters are not told apart


def test_a_tail_in_another_script_hides_nothing(weights, tmp_path):
    harsh = PromptGate.load(written(tmp_path / "harsh.safetensors", out_bias=9.0))
    tail = " \u043a\u0440\u0430\u0441\u043d\u0430\u044f" * 20
    assert harsh.check("a red star" + tail).action == "block"
    assert PromptGate.load(weights).check("a signo smallperson" + tail).category == "sexual_minors"


@pytest.mark.parametrize("text", ["<lora:{}:1>", "a({})star", "a\u200b{}\u200bstar", "a'{}'star", r"a\({}\)star",
                                  "<lora:red {} star:0.7>"])
def test_what_a_tokenizer_reads_is_read(gate, text):
    """Listed terms of every level, and what the network is given: not only what a reader would see."""
    for word, action in (("zorbic", "block"), ("mildo", "flag")):
        assert gate.check(text.format(word)).action == action, word
    head = gate.artefact.head
    alone, hidden = head.scores("a mildo star"), gate.explain("a({})star".format("mildo")).heads[0]
    assert all(hidden[name] >= alone[name] for name in HEADS)


def test_long_texts_are_read_in_parts_that_overlap():
    words = [f"w{number}" for number in range(500)]
    parts = [words[first:end] for first, end in windows(words)]
    assert parts[0] == words and all(len(" ".join(part)) <= WINDOW for part in parts[1:])
    assert {word for part in parts[1:] for word in part} == set(words)
    runs = parts[1:]  # what is cut in one is whole in another
    assert all(one[len(one) // 2 + 1] in other for one, other in zip(runs, runs[1:]))
    assert windows("a red star".split()) == [(0, 3)]
    plain, spans = parts_of(normalize("x" * 2000))
    assert all(len(" ".join(plain.split()[first:end])) <= WINDOW for first, end in spans[1:]) and len(spans) > 8


def test_clauses_are_parts():
    text = "one two three four, five six\nseven eight nine ten. 'eleven twelve thirteen fourteen!' red"
    assert parts_of(normalize(text))[1] == [(0, 15), (0, 4), (6, 10), (10, 14)]
    assert parts_of(normalize("one two three four five."))[1] == [(0, 5)]


def test_scores_of_parts_are_those_of_their_texts(gate):
    head, words = gate.artefact.head, [f"w{number % 37} star" for number in range(60)]
    plain = " ".join(words)
    spans = [(0, 120), (0, 1), (5, 9), (7, 120), (118, 120)]
    each = [head.logits(" ".join(plain.split()[first:end]))[0] for first, end in spans]
    np.testing.assert_allclose(head.logits(plain, spans), each, atol=1e-5)
    best = head.highest_scores(plain, spans)
    for name in HEADS:
        whole, *some = (log_odds(head.scores(" ".join(plain.split()[first:end]))[name]) for first, end in spans)
        assert log_odds(best[name]) == pytest.approx(max([whole, *(one - PART_MARGIN for one in some)]), abs=1e-4)


def test_a_sentence_is_not_drowned(weights):
    """The score of a text is that of its worst part, however much stands around it; and what is no Latin word is left
    out in one reading."""
    gate, text = PromptGate.load(weights), "a mixed up sentence of letters"
    alone = gate.artefact.head.scores(latin_words(text))
    for around in ("\u043a\u0440\u0430\u0441\u043d\u0430\u044f " * 40 + text,):
        assert all(gate.explain(around).heads[0][name] >= alone[name] for name in HEADS)
    letters = gate.check(" ".join("a red star above a blue circle on a white wall".replace(" ", "")))
    assert letters.action == "flag" and "single letters" in letters.reason


@pytest.mark.parametrize("text", [
    "signo smallperson", "signo s m a l l p e r s o n", "signo sm4llperson", "signo smalllperson", "s1gno smallperson",
    "signo 15 year old", "2 15 year old signo", "signo, fifteen-year-old", "signo, aged 12", "signo (age nine)",
    "signo 7yo", "signo 16 yrs old", "s.i.g.n.o small-person"])
def test_what_is_never_made_is_found_in_disguise_and_blocked_in_every_mode(weights, text):
    for mode in ("block", "blur", "flag"):
        decision = PromptGate.load(weights, mode=mode).check(text)
        assert (decision.action, decision.category) == ("block", "sexual_minors")
    assert PromptGate.load(weights, mode="off").check(text).action == "allow"


@pytest.mark.parametrize("text, minor", [
    ("2 0 year old", False), ("a 3 5 years old one", False), ("1 5 year old", True), ("2 5 year old dogs", True),
    ("20 year old", False), ("9 year old", True), ("aged 1 2", True), ("0 year old", True)])
def test_digits_that_stand_apart_are_one_age_unless_several_are_meant(gate, text, minor):
    assert gate.explain(text).minor == minor


def test_a_prior_changes_scores_and_no_decision(weights):
    texts = ("a red star", "zorbic", "a mildo star")
    plain = [PromptGate.load(weights).check(text) for text in texts]
    moved = [PromptGate.load(weights, prior=0.3).check(text) for text in texts]
    assert [one.action for one in plain] == [one.action for one in moved]
    with pytest.raises(ValueError, match="prior"):
        PromptGate.load(weights, prior=1.5)


def test_checking_a_text_needs_no_torch(weights):
    code = (f"import sys, moderate; moderate.main(['check', 'a red star', '--weights', {str(weights)!r}]);"
            "sys.exit(any(name in sys.modules for name in ('torch', 'yaml', 'scipy')))")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


@pytest.mark.parametrize("text", ["signo 18 years old", "signo, aged 40", "signo, forty-five years old", "smallperson",
                                  "a 12 year old tree"])
def test_a_minor_alone_and_a_hint_alone_are_let_through(gate, text):
    assert gate.check(text).action == "allow"


def test_check_all_takes_the_worst(gate):
    assert gate.check_all(["a red star", "mildo", "zorbic"]).action == "block"
    assert gate.check_all(["a red star"]).action == "allow" and gate.check_all([]).action == "block"
    assert gate.check_all([], negative=True).action == "allow"


# ---- modes

def test_modes(weights):
    actions = {mode: [PromptGate.load(weights, mode=mode).check(text).action for text in ("zorbic", "mildo", "a star")]
               for mode in MODES}
    assert actions == {"block": ["block", "flag", "allow"], "blur": ["blur", "flag", "allow"],
                       "flag": ["flag", "flag", "allow"], "off": ["allow"] * 3}
    with pytest.raises(ValueError, match="valid"):
        PromptGate.load(weights, mode="quiet")


def test_off_is_said_and_logged(weights, tmp_path, caplog):
    log = AuditLog(tmp_path / "log", bytes(32))
    gate = PromptGate.load(weights, mode="off", audit=log)
    assert "moderation is off" in caplog.text
    assert gate.check("a red star").action == "allow" and log.verify() == 1


def test_the_log_has_what_was_done(weights, tmp_path):
    for mode, action in (("block", "block"), ("blur", "blur"), ("flag", "flag"), ("off", "allow")):
        PromptGate.load(weights, mode=mode, audit=AuditLog(tmp_path / mode, bytes(32))).check("zorbic")
        assert json.loads((tmp_path / mode).read_text())["action"] == action


# ---- mutations

class Broken:
    """Stands in for a part and fails in one way."""

    def __init__(self, kind: str):
        self.kind = kind

    def scores(self, plain: str) -> dict[str, float]:
        if self.kind == "raises":
            raise RuntimeError("secret text")
        if self.kind == "memory":
            raise MemoryError
        if self.kind == "empty":
            return {}
        value = {"nan": math.nan, "inf": math.inf, "negative": -1.0, "large": 2.0}[self.kind]
        return dict.fromkeys(HEADS, value)


@pytest.mark.parametrize("kind", ["raises", "memory", "nan", "inf", "negative", "large"])
def test_a_broken_head_refuses(gate, kind, caplog):
    gate.artefact = replace(gate.artefact, head=Broken(kind))
    decision = gate.check("a red star")
    assert decision.action == "block" and "secret" not in decision.reason + caplog.text


@pytest.mark.parametrize("part", ["lexicon", "minors", "policy"])
def test_any_other_broken_part_refuses(gate, part):
    gate.artefact = replace(gate.artefact, **{part: None})
    assert gate.check("a red star").action == "block"


@pytest.mark.parametrize("encoder", [
    lambda text: {}, lambda text: dict.fromkeys(HEADS, math.nan), lambda text: None, lambda text: 1 / 0,
    lambda text: dict.fromkeys(HEADS, "high"), lambda text: time.sleep(30),
], ids=["empty", "nan", "none", "raises", "words", "hangs"])
def test_an_encoder_that_fails_or_hangs_refuses(weights, encoder):
    began = time.perf_counter()
    assert PromptGate.load(weights, encoder=encoder, timeout=0.3).check("a red star").action == "block"
    assert time.perf_counter() - began < 20


def test_an_encoder_adds_to_the_score(weights):
    sure = PromptGate.load(weights, encoder=lambda text: {**dict.fromkeys(HEADS, 0.0), "violence": 0.999})
    calm = PromptGate.load(weights, encoder=lambda text: dict.fromkeys(HEADS, 0.0))
    assert sure.check("a red star").category == "violence" and calm.check("a red star").action == "allow"


def test_a_log_that_fails_refuses(weights, tmp_path):
    (tmp_path / "file").write_text("")
    gate = PromptGate.load(weights, audit=AuditLog(tmp_path / "file" / "log", bytes(32)))
    assert gate.check("a mildo star").action == "block"


# ---- the file

def test_a_missing_file(tmp_path):
    with pytest.raises(ArtefactError, match="no moderation weights"):
        PromptGate.load(tmp_path / "none.safetensors")


def test_every_flipped_byte_is_seen(weights, tmp_path):
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = random.Random(0)
    places = [0, 9, header - 1, header, len(data) - 1, *(generator.randrange(header, len(data)) for _ in range(40)),
              *(generator.randrange(8, header) for _ in range(40))]
    path, before = tmp_path / "flipped.safetensors", load_artefact(weights)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
        try:
            after = load_artefact(path)
        except ArtefactError:
            continue
        assert after.hash == before.hash and place < header, f"byte {place}"  # white space of the header


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_file_cut_short(weights, tmp_path, size):
    path = tmp_path / "short.safetensors"
    path.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ArtefactError):
        load_artefact(path)


@pytest.mark.parametrize("name, change", [("head.out.bias", np.nan), ("head.hidden.weight", np.inf)])
def test_weights_that_are_no_numbers(weights, tmp_path, name, change):
    tensors = load_file(weights)
    tensors[name] = np.full_like(tensors[name], change)
    settings = json.dumps(load_artefact(weights).card)
    path = tmp_path / "nan.safetensors"
    save_file(tensors, path, {"format": FORMAT, "settings": settings, "sha256": content_hash(tensors, settings)})
    with pytest.raises(ArtefactError, match="finite"):
        load_artefact(path)


@pytest.mark.parametrize("metadata", [{}, {"format": "1"}, {"format": FORMAT, "settings": "{}"}])
def test_another_format(weights, tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    tensors = load_file(weights)
    save_file(tensors, path, {**metadata, "sha256": content_hash(tensors, metadata.get("settings", ""))})
    with pytest.raises(ArtefactError):
        load_artefact(path)


# ---- the network

def test_ngrams_are_those_of_a_plain_loop():
    ids, words = ngram_ids("red star 42", (30, 30))
    expected = sum(len(word) + 2 - size + 1 for word in ("red", "star", "42") for size in range(2, 6)
                   if len(word) + 2 >= size)
    assert len(ids) == expected and len(words) == 3 + 2
    for piece in ("red", "star", "42"):
        assert set(ngram_ids(piece, (30, 30))[0]) <= set(ids)
    assert len(set(ngram_ids("abc", (30, 30))[0]) - set(ngram_ids("abd", (30, 30))[0])) > 3
    assert [len(part) for part in ngram_ids("", (8, 8))] == [0, 0]


def test_a_word_that_is_repeated_says_no_more_than_one_that_is_said_once(gate):
    """Repeated words have further n-grams only in the pair that joins their copies."""
    head, text = gate.artefact.head, "a moon on a hill"
    twice = head.logits(f"{text} {text}")
    for times in (3, 12, 50):
        np.testing.assert_allclose(head.logits(" ".join([text] * times)), twice, atol=1e-6)
        ids = ngram_ids(" ".join([text] * times), CONFIG.bits)
        assert all(map(np.array_equal, ids, ngram_ids(f"{text} {text}", CONFIG.bits)))
        assert all((np.diff(part) > 0).all() for part in ids)
    parts = [(0, 5), (0, 10), (3, 40), (7, 7), (45, 250)]
    found = head.logits(" ".join([text] * 50), parts)
    np.testing.assert_allclose(found[[0, 1, 2, 4]], [head.logits(text)[0], *[twice[0]] * 3], atol=1e-6)
    assert np.isfinite(found[3]).all()


def test_head_is_its_formula():
    weights = head_weights(3)
    head = PromptHead(CONFIG, weights)
    deep, wide = [], 0
    for name, ids in zip(("char", "word"), ngram_ids("red star", CONFIG.bits)):
        rows = weights[f"{name}.table"].astype(np.float64)[ids] * weights[f"{name}.scale"]
        rows = rows.sum(0) / np.sqrt(len(ids))
        deep, wide = [*deep, rows[:4]], wide + rows[4:]
    hidden = np.maximum(weights["hidden.weight"] @ np.concatenate(deep) + weights["hidden.bias"], 0)
    z = weights["out.weight"] @ hidden + weights["out.bias"] + wide
    np.testing.assert_allclose(list(head.scores("red star").values()), 1 / (1 + np.exp(-z)), rtol=1e-5)


def test_policy_of_the_file(weights):
    policy = load_artefact(weights).policy
    assert isinstance(policy, Policy) and policy.limits["hate"] == Limits(0.95, 0.99) and policy.minors == 0.9


# ---- command line

def test_check_prints_decisions_and_exits_by_action(weights, capsys, tmp_path):
    base = ["check", "--weights", str(weights)]
    assert [main([*base, text]) for text in ("a star", "mildo", "zorbic", "")] == [0, 3, 5, 5]
    assert main([*base, "--mode", "blur", "zorbic"]) == 4
    capsys.readouterr()
    (tmp_path / "texts").write_text("a star\na zorbic star\n")
    assert main([*base, "--file", str(tmp_path / "texts"), "--json"]) == 5
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["action"] for line in lines] == ["allow", "block"] and lines[1]["category"] == "hate"
    assert "zorbic" not in text and set(lines[0]["scores"]) == set(HEADS)


def test_explain_shows_what_check_does_not(weights, capsys):
    assert main(["explain", "--weights", str(weights), "a z0rbic star"]) == 0
    assert "zorbic" in capsys.readouterr().out
    assert main(["explain", "--weights", str(weights), "--json", "a z0rbic star"]) == 0
    assert json.loads(capsys.readouterr().out)["matches"][0]["span"] == "zorbic"


def test_key_log_and_verify(weights, tmp_path, capsys):
    key, log = str(tmp_path / "key"), str(tmp_path / "log")
    assert main(["key", key]) == 0
    assert main(["check", "--weights", str(weights), "zorbic", "--log", log, "--key", key]) == 5
    assert main(["verify", log, "--key", key]) == 0 and "1 lines" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["check"], ["check", "--file", "none.txt"], ["check", "a", "--weights", "none"],
                                       ["check", "a", "--log", "x"], ["verify", "none", "--key", "none"],
                                       ["check", "--image", "none.safetensors"]])
def test_mistakes_are_errors_of_one_line(arguments):
    with pytest.raises((ValueError, OSError)):
        main(arguments)
