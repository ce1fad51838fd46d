"""The benchmark of training steps: both sides take the same steps with the same data, one after the other."""
import json

import pytest

from benchmarks import operators, stages, training_diffusers


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_revision_against_itself(tmp_path, stage, tiny_config, capsys):
    stages.main(stage, ["--quick", "--config", str(tiny_config), "--against", str(stages.ROOT), "--out",
                        str(tmp_path)])
    found = json.loads((tmp_path / f"{stage}_step.json").read_text())
    assert [row["call"] for row in found["rows"]] == [stages.HERE, stages.AGAINST, stages.AGAIN]
    one, two, three = found["validation"].values()
    assert one == two == three and one  # the same weights from the same images, to the bit
    assert all(row["rounds"] == 4 and 0 < row["share"] < 1 for row in found["rows"])
    assert all({"forward", "backward", "optimizer"} <= set(parts) for parts in found["split"].values())
    assert "| times as fast" in capsys.readouterr().out


def test_ratios_are_paired_and_leave_out_the_first_steps():
    seconds = {stages.HERE: [9.0] * stages.WARM + [1.0, 2.0, 3.0], stages.AGAIN: [9.0] * stages.WARM + [1.0, 2.0, 3.0],
               stages.AGAINST: [9.0] * stages.WARM + [2.0, 4.0, 6.0]}
    shares, batches = dict.fromkeys(seconds, 0.5), dict.fromkeys(seconds, 32)
    larger = stages.rows_of("x", seconds, batches | {stages.HERE: 64, stages.AGAIN: 64}, shares)
    assert [row.ratio for row in larger] == [4, 1, None] and [row.images for row in larger] == [32, 32, 8]
    rows = {row.call: row for row in stages.rows_of("x", seconds, batches, shares)}
    assert rows[stages.HERE].ratio == 2 and rows[stages.AGAIN].ratio == 1 and rows[stages.AGAINST].ratio is None
    assert rows[stages.HERE].images == 16 and rows[stages.HERE].first == 9


def test_the_wait_for_a_turn_does_not_count():
    assert stages.wait_factor({"data": 3.0, "forward": 0.5, "optimizer": 0.5}) == 4


def test_a_run_that_ends_is_said_to(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status"):
        stages.Run(stages.ROOT, "denoiser", tmp_path / "absent.yaml", [], tmp_path / "run")


@pytest.mark.slow
def test_the_step_of_diffusers(tmp_path, capsys):
    pytest.importorskip("diffusers")
    training_diffusers.main(["--quick", "--rounds", "2", "--out", str(tmp_path), "--device", "cpu"])
    found = json.loads((tmp_path / "training_diffusers.json").read_text())
    assert [row["call"] for row in found["rows"]] == ["ours, adamw", "ours, muon", "diffusers", "diffusers, tuned",
                                                      "ours, adamw (again)"]
    assert "| times as fast" in capsys.readouterr().out


def test_the_operators_of_a_step(tiny_config, capsys):
    """Their shares add up to the whole, and the stage is left as it was."""
    fit = operators.importlib.import_module("training.stages.denoiser").fit
    operators.main(["--quick", "--steps", "2", "--config", str(tiny_config)])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    shares = [float(row[4].strip(" %")) for row in rows[:-1]]
    assert abs(sum(shares) - 100) < 1 and shares[:-1] == sorted(shares[:-1], reverse=True)
    assert rows[-1][1].strip() == "all" and any("mm" in row[1] for row in rows)
    assert operators.importlib.import_module("training.stages.denoiser").fit is fit
