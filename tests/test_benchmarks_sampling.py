"""The benchmarks of sampling run with tiny networks: equality is checked before speed, and tables are written."""
import json

import pytest
import torch

from benchmarks import memory, sampling


@pytest.mark.slow
def test_sampling_against_diffusers(tmp_path, capsys):
    pytest.importorskip("diffusers")
    assert sampling.main(["--quick", "--out", str(tmp_path), "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "sampling.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"tiny, batch 1, 4 steps", "tiny, batch 2, 4 steps"}
    assert {row["call"] for row in rows} >= {"ours", "ours, fast", "ours (again)", "diffusers fp32", "diffusers bf16"}
    assert "times as fast" in capsys.readouterr().out


def test_other_latents_are_not_timed(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sampling, "diffusers_loop", lambda unet, context, x_T, steps, scale: torch.ones_like(x_T) * x_T)
    with pytest.raises(ValueError, match="tiny, batch 1: the results differ"):
        sampling.main(["--quick", "--out", str(tmp_path), "--device", "cpu"])


@pytest.mark.slow
def test_memory_is_level(tmp_path):
    points = memory.level(60)
    assert points[-1][0] == 60 and points[-1][1] <= 1.02 * points[2][1]
    found = memory.peak("ours, fast", 1, quick=True)
    assert found["run"] >= 0 and found["weights"] > 0
