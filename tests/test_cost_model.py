"""The cost model against the published rows it was not fitted to, and its limits."""
import pytest

from benchmarks.cost_model import ROWS, Machine, compare_rows, scaling, step_seconds

MACHINE = Machine(rate=1e12, fixed=0.01, inside=400e9, outside=50e9, bytes=4)


def test_rows_that_were_not_fitted_are_met():
    rows = compare_rows()
    assert len(rows) == 13 and sum(not row.fitted for row, _ in rows) == 8
    for row, speed in rows:
        assert speed == pytest.approx(row.speed, rel=1e-6 if row.fitted else 0.08), row
    hopper = [row for row in ROWS if row.source.startswith("MLPerf")]
    assert [round(row.speed, 1) for row in hopper] == [128.4, 110.3, 48.8]


def test_a_step_has_its_parts():
    """One GPU: compute and the fixed time. Several: what does not fit behind two thirds of the compute. Slow loader."""
    assert step_seconds(MACHINE, 1, 10, 1e11, 0) == pytest.approx(3 + 0.01)
    assert step_seconds(MACHINE, 2, 10, 1e11, 10**9) == pytest.approx(3.01)  # 2/2 4 GB / 400 GB/s is hidden
    assert step_seconds(MACHINE, 16, 1, 1e9, 10**9) == pytest.approx(0.003 + 0.01 + 2 * 15 / 16 * 4 / 50 - 0.002)
    slow = Machine(1e12, 0.01, 400e9, 50e9, 4, loader=2.0)
    assert step_seconds(slow, 1, 10, 1e11, 0) == pytest.approx(5.0)


def test_more_gpus_are_never_slower_in_images_and_never_better_in_share():
    found = scaling(MACHINE, 1e11, 10**8, 256)
    assert [gpus for gpus, _, _ in found] == [2**n for n in range(9)]
    shares = [share for _, _, share in found]
    assert shares[0] == pytest.approx(1) and shares == sorted(shares, reverse=True)
