"""The go over a lent GPU: all of it with tiny networks on a CPU, parts that fail or hang, files cut and joined."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import cut, join, main, run_part

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_dry_goes_through_all_of_it(tmp_path, tiny_config):
    """Tests (skipped without a GPU), both tables, a training that is told to stop."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry", "--minutes", "20", "--out", str(tmp_path),
                           "--config", str(tiny_config), "--overrides", "denoiser.train.steps=12"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    for part in ("tests", "sampling", "training", "train"):
        assert f"| {part} | done |" in report, report
    rows = json.loads((tmp_path / "gpu_sampling.json").read_text())["rows"]
    assert {row["call"] for row in rows} >= {"ours, fast", "ours, exact", "diffusers bf16", "fp32"}
    assert json.loads((tmp_path / "gpu_training.json").read_text())["rows"]
    assert (tmp_path / "run" / "denoiser.safetensors").exists() and not (tmp_path / "run" / "cache").is_file()


def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path, monkeypatch):
    calls = {"tests": [sys.executable, "-c", "print('broken'); raise SystemExit(3)"],
             "sampling": [sys.executable, "-c", "import time; print('hangs', flush=True); time.sleep(60)"],
             "training": [sys.executable, "-c", "print('fine')"]}
    monkeypatch.setattr("benchmarks.gpu.commands", lambda options, out: calls)
    monkeypatch.setattr("benchmarks.gpu.SHARES", {"sampling": 0.2})
    monkeypatch.setattr("benchmarks.gpu.RESERVE", 0.0)
    began = time.monotonic()
    assert main(["--dry", "--minutes", "0.6", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - began < 30
    report = (tmp_path / "report.md").read_text()
    assert "| tests | failed with 3 |" in report and "broken" in report
    assert "| sampling | stopped at its limit |" in report and "| training | done |" in report


def test_a_part_that_will_not_end_is_ended(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    outcome = run_part("x", [sys.executable, "-c", code], 1.0, tmp_path / "log", grace=1.0)
    assert outcome.status is None and outcome.seconds < 20
    assert run_part("x", ["/no/such/command"], 1.0, tmp_path / "log").status == 127


def test_large_files_are_cut_and_joined(tmp_path):
    (tmp_path / "run").mkdir()
    data = bytes(range(256)) * 10
    (tmp_path / "run" / "weights").write_bytes(data)
    (tmp_path / "small").write_bytes(b"x" * 1000)
    assert cut(tmp_path, 1000) == [tmp_path / "run" / "weights"]
    assert max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 1000
    assert join(tmp_path) == [tmp_path / "run" / "weights"] and (tmp_path / "run" / "weights").read_bytes() == data
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["weights"]
    cut(tmp_path, 1000)
    (tmp_path / "run" / "weights.001").write_bytes(b"y" * 1000)
    with pytest.raises(ValueError, match="damaged"):
        join(tmp_path)
    (tmp_path / "run" / "weights.002").unlink()
    with pytest.raises(ValueError, match="weights.002 is missing"):
        join(tmp_path)
