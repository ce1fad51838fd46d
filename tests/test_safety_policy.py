"""Decisions, modes, and the log of them."""
import json
import math
import os
import stat
import threading

import pytest

from safety.audit import START, AuditError, AuditLog, new_key, prompt_hash, read_key
from safety.policy import ACTIONS, HEADS, HELP, MODES, Decision, Limits, Policy, action_in_mode, noisy_or

KEY = bytes(range(32))


@pytest.fixture
def policy() -> Policy:
    limits = {name: Limits(0.4, 0.8) for name in HEADS} | {"harassment": Limits(0.5, 2.0)}
    return Policy(limits, minors=0.05)


def scores(**given: float) -> dict[str, float]:
    return {**dict.fromkeys(HEADS, 0.0), **given}


@pytest.mark.parametrize("given, action, category", [
    ({}, "allow", "sexual"), ({"violence": 0.39}, "allow", "violence"), ({"violence": 0.4}, "flag", "violence"),
    ({"violence": 0.8}, "block", "violence"), ({"harassment": 1.0}, "flag", "harassment"),
    ({"violence": 0.81, "sexual": 0.9}, "block", "sexual"),
    ({"sexual": 0.95, "hate": 0.999}, "block", "hate"),
])
def test_scores_against_thresholds(policy, given, action, category):
    decision = policy.decide([scores(**given)])
    assert (decision.action, decision.category) == (action, category)
    assert decision.reason == "score" and decision.score == pytest.approx(given.get(category, 0))


def test_the_category_is_that_farthest_above_its_threshold_in_log_odds():
    """0.999 is farther above 0.9 than 0.95 above 0.5, although the ratio of the first two is smaller."""
    limits = {name: Limits(0.5, 0.5) for name in HEADS} | {"illegal": Limits(0.9, 0.9)}
    assert Policy(limits, 0.05).decide([scores(illegal=0.999, sexual=0.95)]).category == "illegal"


def test_a_prior_moves_scores_and_thresholds_and_no_decision():
    limits = {name: Limits(0.4, 0.8) for name in HEADS}
    policy = Policy(limits, 0.05, dict.fromkeys(HEADS, 0.02))
    for given in ({"violence": 0.79}, {"violence": 0.81}, {"violence": 0.39}, {}):
        plain = policy.decide([scores(**given)])
        for prior in (0.5, 0.02, 0.001):
            moved = policy.with_prior(prior).decide([scores(**given)])
            assert (moved.action, moved.category) == (plain.action, plain.category)
            assert (moved.score >= moved.threshold) == (plain.score >= plain.threshold)
    half = policy.with_prior(0.5)
    odds = 0.81 / 0.19 * (0.5 / 0.5) / (0.02 / 0.98)
    assert half.at_prior(0.81, "violence") == pytest.approx(odds / (1 + odds))
    assert policy.with_prior(0.02).at_prior(0.81, "violence") == pytest.approx(0.81)
    with pytest.raises(ValueError, match="prior: 1"):
        policy.with_prior(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_what_is_no_probability_is_refused(policy, bad):
    for name in HEADS:
        assert policy.decide([scores(**{name: bad})]).action == "block"
        assert policy.decide([scores(), scores(**{name: bad})]).action == "block"


def test_heads_are_joined_by_noisy_or(policy):
    assert noisy_or([0.5, 0.5]) == 0.75 and noisy_or([]) == 0 and math.isnan(noisy_or([math.nan, 1.0]))
    assert policy.decide([scores(hate=0.6), scores(hate=0.6)]).score == pytest.approx(0.84)
    assert policy.decide([scores(hate=0.6), scores(hate=0.6)]).action == "block"


def test_rules_come_before_scores(policy):
    assert policy.decide([scores(sexual=0.9)], [("hate", "block")]).category == "hate"
    assert policy.decide([scores()], [("harassment", "flag")]).action == "flag"
    assert policy.decide([scores(violence=0.9)], [("harassment", "flag")]).action == "block"
    assert policy.decide([scores()], [("sexual", "")]).action == "allow"  # a signal does nothing alone


def test_the_rule_on_minors_needs_both_sides(policy):
    assert policy.decide([scores()], minor=True).action == "allow"
    assert policy.decide([scores(sexual=0.05)]).action == "allow"
    assert policy.decide([scores()], sexual_term=True).action == "allow"
    for decision in (policy.decide([scores(sexual=0.05)], minor=True),
                     policy.decide([scores()], minor=True, sexual_term=True)):
        assert (decision.action, decision.category, decision.reason) == ("block", "sexual_minors", "rule")


def test_messages_name_the_category_alone():
    assert Decision("block", "self_harm").message.endswith(HELP)
    for name in (*HEADS, "sexual_minors", ""):
        assert Decision("block", name).message.startswith("refused: ")
    assert Decision("allow").message == "allowed"


@pytest.mark.parametrize("limits", [
    lambda: Limits(math.nan, 1.0), lambda: Limits(0.0, 1.0), lambda: Limits(0.9, 0.8),
    lambda: Policy({}, 0.1), lambda: Policy({name: Limits(0.1, 0.2) for name in (*HEADS, "taste")}, 0.1),
    lambda: Policy({name: Limits(0.1, 0.2) for name in HEADS}, math.nan),
])
def test_policies_that_cannot_be(limits):
    with pytest.raises(ValueError, match="valid"):
        limits()


def test_modes_only_soften():
    table = {mode: [action_in_mode(action, mode) for action in ACTIONS] for mode in MODES}
    assert table == {"block": ["allow", "flag", "blur", "block"], "blur": ["allow", "flag", "blur", "blur"],
                     "flag": ["allow", "flag", "flag", "flag"], "off": ["allow"] * 4}
    with pytest.raises(ValueError, match="valid"):
        action_in_mode("block", "loud")  # type: ignore[arg-type]


# ---- audit

def log_of(path, **options) -> AuditLog:
    return AuditLog(path / "audit.jsonl", KEY, **options)


def test_a_line_holds_nothing_of_the_prompt(tmp_path):
    log = log_of(tmp_path)
    log.write("a very particular sentence", "prompt", Decision("block", "violence", 0.8765, 0.5, "score"))
    text = (tmp_path / "audit.jsonl").read_text()
    line = json.loads(text)
    assert not any(word in text for word in "very particular sentence".split())
    assert line["score"] == 0.88 and len(line["prompt"]) == 32 and len(line["time"]) == len("2000-01-01T00")
    assert stat.S_IMODE(os.stat(tmp_path / "audit.jsonl").st_mode) == 0o600
    assert log.verify() == 1


def test_the_hash_is_keyed_and_of_the_normalised_prompt():
    assert prompt_hash("A  Red st\u200bar", KEY) == prompt_hash("a red star", KEY) != prompt_hash("a red stair", KEY)
    assert prompt_hash("a red star", KEY) != prompt_hash("a red star", KEY[::-1])
    assert len(prompt_hash("\udc80" * 5000, KEY)) == 32


@pytest.mark.parametrize("change", [
    lambda lines: [lines[0].replace('"block"', '"allow"'), *lines[1:]], lambda lines: lines[1:],
    lambda lines: [lines[0], *lines[2:]], lambda lines: [lines[1], lines[0], *lines[2:]],
    lambda lines: [*lines, lines[-1]], lambda lines: [*lines[:-1], "{}"], lambda lines: [*lines, "no json"],
    lambda lines: [line.replace("0.5", "0.4") for line in lines],
])
def test_every_change_is_seen(tmp_path, change):
    log = log_of(tmp_path)
    for number in range(5):
        log.write(f"prompt {number}", "prompt", Decision("block", "hate", 0.5, 0.1, "score"))
    assert log.verify() == 5
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    (tmp_path / "audit.jsonl").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(AuditError, match="line"):
        log.verify()


@pytest.mark.parametrize("line", ["[" * 200_000, "5", "null", '{"chain": "x"}'])
def test_what_is_no_line_is_said(tmp_path, line):
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(AuditError, match="is no line of this log"):
        AuditLog(tmp_path / "log", bytes(32)).verify()


def test_a_chain_that_is_not_ascii_does_not_hold(tmp_path):
    log = AuditLog(tmp_path / "log", bytes(32))
    log.write("a star", "prompt", Decision("block", "hate", 1.0, 0.0, "rule"))
    line = json.loads((tmp_path / "log").read_text())
    (tmp_path / "log").write_text(json.dumps({**line, "chain": "\u00e9" * 64}) + "\n")
    with pytest.raises(AuditError, match="line 1 was changed"):
        log.verify()


def test_another_key_does_not_verify(tmp_path):
    log_of(tmp_path).write("a", "prompt", Decision("flag"))
    with pytest.raises(AuditError):
        AuditLog(tmp_path / "audit.jsonl", KEY[::-1]).verify()


def test_rotation_keeps_the_chain_and_forgets_the_oldest(tmp_path):
    log = log_of(tmp_path, largest=300, keep=3)
    for number in range(4):
        log.write(str(number), "prompt", Decision("flag"))
    assert log.verify() == 4
    for number in range(20):
        log.write(str(number), "prompt", Decision("flag"))
    assert sorted(path.name for path in tmp_path.glob("audit.jsonl*")) == [
        "audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.3", "audit.jsonl.lock"]
    assert 0 < log.verify() < 24
    (tmp_path / "audit.jsonl.2").unlink()
    with pytest.raises(AuditError, match="missing"):
        log.verify()


def test_writers_do_not_break_each_other(tmp_path):
    def write() -> None:
        for _ in range(10):
            log_of(tmp_path).write("a", "prompt", Decision("flag"))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log_of(tmp_path).verify() == 40


def test_keys(tmp_path):
    new_key(tmp_path / "key")
    assert len(read_key(tmp_path / "key")) == 32 and stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    with pytest.raises(AuditError, match="never replaced"):
        new_key(tmp_path / "key")
    os.chmod(tmp_path / "key", 0o644)
    with pytest.raises(AuditError, match="0600"):
        read_key(tmp_path / "key")
    with pytest.raises(AuditError, match="make one"):
        read_key(tmp_path / "none")
    with pytest.raises(AuditError, match="32"):
        AuditLog(tmp_path / "log", b"short")


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditError, match="audit log"):
        AuditLog(tmp_path / "file" / "audit.jsonl", KEY).write("a", "prompt", Decision("flag"))


def test_the_chain_starts_from_a_known_value(tmp_path):
    assert set(START) == {"0"} and len(START) == 64
    log_of(tmp_path).write("a", "prompt", Decision("flag"))
    first = json.loads((tmp_path / "audit.jsonl").read_text())["chain"]
    assert len(first) == 64 and first != START
