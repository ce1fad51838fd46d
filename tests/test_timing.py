"""The timing that benchmarks share: turns, ratios and their intervals, equality before speed, what is written."""
import json

import pytest
import torch

from benchmarks.timing import (
    AGAIN,
    Work,
    compare,
    describe_machine,
    difference,
    machine,
    ratio_of,
    require_equal,
    rms,
    save,
    time_in_turns,
)


def test_calls_take_turns_and_the_first_goes_twice():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds, firsts = time_in_turns(calls, rounds=4, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    assert set(firsts) == set("abc")
    rounds = ["".join(order[6:][3 * k:3 * k + 3]) for k in range(4)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 2
    rows = compare("case", calls, against="b", rounds=3)
    assert [row.call for row in rows] == ["a", "b", "c", "a" + AGAIN]
    assert [row.ratio is None for row in rows] == [False, True, False, False]


def test_short_calls_are_repeated_within_a_round():
    count = []
    time_in_turns({"a": lambda: count.append(0)}, rounds=2, least=1e-3)
    assert len(count) > 100


def test_the_ratio_is_paired_and_its_interval_holds_it():
    """A machine that becomes ten times as slow half way changes no ratio of calls of one round."""
    slow = [1, 1, 1, 1, 10, 10, 10, 10]
    assert ratio_of([2 * s for s in slow], slow) == (2.0, 2.0, 2.0)
    median, low, high = ratio_of([float(k) for k in range(1, 10)], [1.0] * 9)
    assert (median, low, high) == (5.0, 2.0, 8.0)  # 96.1 % for the second of nine
    assert ratio_of([3.0, 1.0], [1.0, 1.0]) == (2.0, 1.0, 3.0)


def test_what_differs_is_not_compared():
    one = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert require_equal("case", one, one, 0.0) == 0.0
    assert difference(one + 0.5 * one.std(), one) == pytest.approx(0.5, rel=1e-5)
    assert rms(one + 0.5 * one.std(), one) == pytest.approx(0.5, rel=1e-5)
    for other in (one + 1, torch.full((100,), float("nan"))):
        with pytest.raises(ValueError, match="the results differ"):
            require_equal("case", other, one, 1e-3)


def test_machine_and_rows_are_written(tmp_path):
    found = machine()
    assert found["processor"]
    assert found["gflops_float32"] > 0 and torch.__version__.startswith(found["versions"]["torch"])
    rows = compare("batch 1", {"ours": lambda: None, "theirs": lambda: None}, "theirs", 3, Work(images=1, flops=1e3))
    text = save("x", rows, tmp_path, "python -m x", equality="1e-6")
    assert describe_machine(found).split(";")[0] in text and "| batch 1 | ours |" in text and "equality: 1e-6" in text
    data = json.loads((tmp_path / "x.json").read_text())
    assert len(data["rows"]) == 3 and data["equality"] == "1e-6" and data["rows"][0]["share"] > 0
