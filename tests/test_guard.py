"""Bad steps: skipped, then the run goes back, then it stops; each on record, and the same if interrupted."""
import math

import pytest
import torch
from small_runs import explode, metrics, poison, small_fit, terminate

from training.guard import KNOWN, Guard, GuardConfig
from training.loop import Interrupted, TrainingError


def events(run) -> list[tuple]:
    return [(line["step"], line["event"]) for line in metrics(run) if "event" in line]


def positions(count: int, *bad: int, action=poison) -> tuple[list, dict]:
    """Where in the data each step was, filled while a fit runs, and what to give it as ``at``."""
    seen: list[int] = []
    at = {}
    for position in range(count):
        at[position] = action if position in bad else lambda position=position: seen.append(position)
    return seen, at


def test_one_bad_batch_costs_its_step(tmp_path):
    _, history = small_fit(tmp_path / "bad", at={6: poison})
    assert all(torch.equal(a, b) for a, b in zip(history[5], history[6]))  # nothing was learnt from it
    assert all(bool(torch.isfinite(p).all()) for p in history[-1])
    assert not torch.equal(history[6][0], history[7][0])
    assert events(tmp_path / "bad") == [(7, "skip")]
    lines = metrics(tmp_path / "bad")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    [line] = [line for line in lines if line.get("gradient_norm", 0) is None]
    assert line["step"] == 7  # not NaN, which JSON does not have


def test_a_row_of_bad_batches_is_left_behind(tmp_path):
    """The third of positions 6, 7, 8 is one too many: back to the checkpoint after step 4, and on with position 9."""
    guard = GuardConfig(skip=2)
    seen, at = positions(40, 6, 7, 8)
    small_fit(tmp_path, at=at, guard=guard)
    assert seen == [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14, 15, 16]
    assert events(tmp_path) == [(7, "skip"), (8, "skip"), (9, "roll back")]
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [*range(1, 7), *range(5, 13)]


@pytest.mark.parametrize("stops", [(2,), (5,), (6,), (7, 9), (9, 10), (4, 5, 6, 7, 11)])
def test_interrupted_it_goes_back_to_the_same_place(tmp_path, stops):
    """SIGTERM saves a state of its own: it must not become what is gone back to, nor push that out."""
    settings = {"guard": GuardConfig(skip=2), "keep": 1}
    bad = {position: poison for position in (6, 7, 8)}
    whole, _ = small_fit(tmp_path / "whole", at=bad, **settings)
    for stop in stops:
        def action(stop=stop):
            terminate()
        # a bad position that is also a stop stays bad: the signal comes with the step before
        at = {**bad, **({stop: action} if stop not in bad else {stop - 1: action} if stop - 1 not in bad else {})}
        try:
            small_fit(tmp_path / "parts", at=at, **settings)
        except Interrupted:
            pass
    parts, _ = small_fit(tmp_path / "parts", at=bad, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_interrupted_between_two_bad_batches(tmp_path, monkeypatch):
    """The count of bad steps in a row is part of the state."""
    settings = {"guard": GuardConfig(skip=2), "keep": 1}
    whole, _ = small_fit(tmp_path / "whole", at={position: poison for position in (6, 7, 8)}, **settings)
    judge = Guard.judge

    def judged(self, norm):
        if self.bad == 1:
            terminate()
        return judge(self, norm)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "judge", judged)
        with pytest.raises(Interrupted, match="after step 8"):
            small_fit(tmp_path / "parts", at={position: poison for position in (6, 7, 8)}, **settings)
    parts, _ = small_fit(tmp_path / "parts", at={position: poison for position in (6, 7, 8)}, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_it_stops_when_going_back_does_not_help(tmp_path):
    guard = GuardConfig(skip=1, rollbacks=2)
    bad = {position: poison for position in range(6, 40)}
    with pytest.raises(TrainingError) as caught:
        small_fit(tmp_path, at=bad, guard=guard)
    said = str(caught.value)
    assert "\n" not in said and said.startswith("small: the gradient is not finite at step 5, after 1 that were "
                                                "skipped and 2 times back")
    assert str(tmp_path / "state" / "small") in said
    # 6, 7 | back to 4: 8, 9 | back to 4: 10, 11 | stop
    assert [what for _, what in events(tmp_path)] == ["skip", "roll back", "skip", "roll back", "skip", "stop"]
    assert [path.name for path in (tmp_path / "state" / "small").glob("*.pt")] == ["step_00000004.pt"]
    resumed, _ = small_fit(tmp_path)  # the cause is gone
    whole, _ = small_fit(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_it_stops_when_there_is_nothing_to_go_back_to(tmp_path):
    with pytest.raises(TrainingError, match="not finite at step 2, after 0 that were skipped and 0 times back"):
        small_fit(tmp_path, at={2: poison}, guard=GuardConfig(skip=0))


def test_later_troubles_are_counted_from_the_later_checkpoint(tmp_path):
    guard = GuardConfig(skip=0, rollbacks=1)
    small_fit(tmp_path, steps=16, at={position: poison for position in (5, 11, 17)}, guard=guard)
    # step 5 -> 4 (data 6 on); step 9 has position 11 -> 8 (data 12 on); step 13 has position 17 -> 12
    assert events(tmp_path) == [(6, "roll back"), (10, "roll back"), (14, "roll back")]


def test_a_spike_is_skipped_once_it_is_known_what_is_usual(tmp_path):
    early, late = 20, KNOWN + 10
    seen, at = positions(80, early, late, action=explode)
    small_fit(tmp_path / "on", steps=70, at=at, guard=GuardConfig(spike=20))
    assert events(tmp_path / "on") == [(late + 1, "skip")]
    [reason] = [line["reason"] for line in metrics(tmp_path / "on") if "event" in line]
    assert "times the usual" in reason and f"at step {late}" in reason
    small_fit(tmp_path / "off", steps=70, at=at, guard=GuardConfig(spike=0))
    assert events(tmp_path / "off") == []


def test_what_is_usual_is_the_geometric_mean(tmp_path):
    """Of all norms up to 100, then of about the last hundred: a window of exponential weights."""
    guard = Guard(GuardConfig(spike=10))
    for number in range(100):
        assert guard.judge(2.0 if number % 2 else 8.0) == "good"
    assert math.exp(guard.usual) == pytest.approx(4.0)
    assert guard.judge(39.0) == "good" and guard.judge(float("inf")) == "skip"
    for _ in range(1000):
        guard.judge(1.0)
    assert math.exp(guard.usual) == pytest.approx(1.0, rel=1e-3)
    assert guard.judge(11.0) == "skip" and guard.judge(9.0) == "good"
    other = Guard(guard.config)
    other.load_state_dict(guard.state_dict())
    assert vars(other) == vars(guard)


@pytest.mark.parametrize("settings, message", [({"spike": 0.5}, "spike: 0.5; valid: above 1, or 0"),
                                               ({"skip": -1}, "skip: -1"), ({"rollbacks": -1}, "rollbacks: -1")])
def test_guards_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**settings)
