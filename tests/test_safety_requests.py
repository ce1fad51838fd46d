"""Plain requests of a few words: their thresholds, text to learn them from, and a list that training does not see."""
import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.moderation.holes import PLAIN_REQUESTS
from files.config import read_yaml
from safety.policy import HEADS, SHORT, Limits, Policy, log_odds
from training.moderation.artefact import NEVER, fit_limits
from training.moderation.config import ModeratorStage
from training.moderation.requests import patterns, request_rows
from training.moderation.rows import Row

CALM = dict.fromkeys(HEADS, 0.0)


def policy() -> Policy:
    long, short = ({name: Limits(flag, block) for name in HEADS} for flag, block in ((0.8, 0.95), (0.3, 0.6)))
    return Policy(long, 0.9, short=short)


def test_short_texts_have_limits_of_their_own():
    scores = [CALM | {"illegal": 0.7}]
    actions = {words: policy().decide(scores, words=words).action for words in (1, SHORT, SHORT + 1, 100)}
    assert actions == {1: "block", SHORT: "block", SHORT + 1: "allow", 100: "allow"}
    decision = policy().decide([CALM | {"hate": 0.4}], words=3)
    assert (decision.action, decision.category, decision.threshold) == ("flag", "hate", 0.3)
    assert policy().decide([CALM | {"hate": 0.2}], words=3).threshold == 0.3  # of the nearest limit
    assert policy().with_prior(0.01).decide(scores, words=2).action == "block"
    alike = Policy({name: Limits(0.8, 0.95) for name in HEADS}, 0.9)
    assert alike.decide(scores, words=2).action == "allow"
    with pytest.raises(ValueError, match="short: missing"):
        Policy({name: Limits(0.8, 0.95) for name in HEADS}, 0.9, short={"hate": Limits(0.5, 0.6)})


class Scored:
    """A judge of texts that begin with their score in one category."""

    def scores(self, rows):
        found = np.zeros((len(rows), len(HEADS)))
        found[:, HEADS.index("hate")] = [float(row.text.split()[0]) for row in rows]
        return found

    @staticmethod
    def is_short(row):
        return len(row.text.split()) <= SHORT


def test_limits_of_short_and_of_long_texts_keep_their_own_budgets():
    draw = np.random.default_rng(0)
    rows = [Row(f"{score:.6f} star", CALM, ("captions", "other")[i % 2], i)
            for i, score in enumerate(draw.uniform(0.6, 0.7, 1000))]
    rows += [Row(f"{score:.6f}" + " star" * SHORT, CALM, "captions", 2000 + i)
             for i, score in enumerate(draw.uniform(0, 0.8, 1000))]
    rows += [Row("0.999 star", CALM | {"hate": 1.0}, "captions", 5000)]  # harmful text decides nothing
    config = ModeratorStage(budget={"captions": 0.02}, short_budget=0.05, short_flag_budget=0.15, flag_budget=3.0)
    long, short = fit_limits(Scored(), rows, config, {"hate"})
    for limits, places, budget in ((short, slice(0, 1000), 0.05), (long, slice(1000, 2000), 0.02)):
        scores = Scored().scores(rows[places])[:, HEADS.index("hate")]
        assert 0.8 * budget <= (scores >= limits["hate"].block).mean() <= budget
        assert 0.8 * 3 * budget <= (scores >= limits["hate"].flag).mean() <= 3 * budget
        assert limits["sexual"].block == NEVER
    higher, unchanged = fit_limits(Scored(), rows, replace(config, reserve=0.5), {"hate"})
    assert log_odds(higher["hate"].block) == pytest.approx(log_odds(long["hate"].block) + 0.5)
    assert higher["hate"].flag == long["hate"].flag and higher["sexual"].block == NEVER and unchanged == short
    same, other = fit_limits(Scored(), rows[1000:2000], config, {"hate"})
    assert same == other == long  # without any short text


def test_requests_are_twins_that_share_all_but_one_phrase():
    rows = request_rows(2000)
    assert rows == request_rows(2000) != request_rows(2000, seed=1)
    assert len({row.text for row in rows}) == len(rows) > 2500
    for row in rows:
        assert row.text == " ".join(row.text.split()) and "{" not in row.text and "|" not in row.text
        assert row.harmless or row.labels == {row.topic: 1.0}
    for topic in patterns()["patterns"]:
        harmful = [row for row in rows if row.topic == topic and row.harmful]
        assert len(harmful) > 150 and {row.split for row in harmful} == {"train", "dev", "test"}
    words = {label: {word for row in rows if row.harmful == label for word in row.text.split()[:2]}
             for label in (True, False)}
    assert {"how", "show", "draw", "i", "why", "explain", "photo", "picture"} <= words[True] & words[False]
    groups: dict[int, set[str]] = {}
    for row in rows:
        groups.setdefault(row.group, set()).add(row.split)
    assert all(len(found) == 1 for found in groups.values())


def test_nothing_of_the_written_list_is_trained_on():
    """No request of the list, with or without its first words, is a text of training."""
    written = read_yaml(PLAIN_REQUESTS)
    assert set(written) == {"sexual", "violence", "hate", "self_harm", "illegal", "harmless"}
    assert len(written["harmless"]) >= 60 and sum(map(len, written.values())) >= 120
    fillers = {text.strip() for some in patterns()["patterns"].values() for kind in some
               for text in kind["harmful"] + kind["harmless"]}
    for texts in written.values():
        for text in texts:
            kept = re.sub(r"^(how to|how do i|show me|draw|best way to|tips to|a|an|close up of) ", "", text)
            kept = re.sub(r" (online|at home|in a kitchen)$", "", kept)
            assert not {kept, text, f"a {kept}", f"an {kept}"} & fillers, text
    trained = {row.text for row in request_rows(5000)}
    assert not trained & {text for texts in written.values() for text in texts}
