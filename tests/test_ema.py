"""Averages: their widths, what they weigh, and that one of any width can be made afterwards."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import small_fit
from torch import nn

import train
from files.run_folder import RunFolder
from files.weights import CheckpointError
from pipeline.loading import load_run
from training import posthoc
from training.ema import PowerEma, gamma_from_std
from training.posthoc import profile_products, snapshot_weights, weighted_sum
from training.snapshots import Snapshot, SnapshotConfig, snapshots_in


def test_the_average_is_the_hand_sum_of_all_weights(tmp_path):
    """fp32 lerps against one fp64 sum: 1e-5 of the largest weight."""
    average, history = small_fit(tmp_path, steps=12, ema_std=0.1)
    gamma, t = gamma_from_std(0.1), np.arange(13) / 12
    weight = np.diff(t ** (gamma + 1))  # the integral of s^gamma over each step
    assert weight.sum() == pytest.approx(1)
    for number, parameter in enumerate(average.parameters()):
        expected = sum(w * step[number].double() for w, step in zip(weight, history))
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-5)
        assert not parameter.requires_grad and (parameter - history[-1][number]).abs().max() > 1e-4


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2])
def test_the_average_has_the_width_that_was_asked_for(std):
    gamma = gamma_from_std(std)
    # the published solution: Karras et al. 2023, algorithm 2
    assert gamma == pytest.approx(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max(), rel=1e-6)
    s = (np.arange(200_000) + 0.5) / 200_000
    density = s**gamma / (s**gamma).sum()
    mean = (density * s).sum()
    assert math.sqrt((density * (s - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)


def test_the_average_takes_buffers_as_they_are():
    model = nn.BatchNorm1d(3)
    ema = PowerEma(model, 0.05)
    model(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)) + 5)
    ema.update(model, 1)
    assert torch.equal(ema.average.running_mean, model.running_mean) and ema.average.num_batches_tracked == 1
    assert not ema.average.training and torch.equal(ema.average.weight, model.weight)


# ---- averages made afterwards

def test_products_of_profiles_are_integrals():
    """Against sums over a fine grid."""
    steps, gammas = np.array([40.0, 100.0, 100.0]), np.array([3.0, 6.9, 16.9])
    s = (np.arange(200_000) + 0.5) * 100 / 200_000
    profiles = np.where(s <= steps[:, None], (gammas[:, None] + 1) * (s / steps[:, None]) ** gammas[:, None]
                        / steps[:, None], 0)
    expected = profiles @ profiles.T * 100 / 200_000
    np.testing.assert_allclose(profile_products(steps, gammas, steps, gammas), expected, rtol=1e-4)


def test_a_kept_average_is_found_again():
    snapshots = [Snapshot(Path(), step, std) for step in (50, 100) for std in (0.05, 0.1)]
    weights, left = snapshot_weights(snapshots, 0.1, 100)
    np.testing.assert_allclose(weights, [0, 0, 0, 1], atol=1e-6)
    assert left < 1e-4


def flat(tensors: dict) -> torch.Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("std", [0.07, 0.15])
def test_averages_made_afterwards_are_those_that_were_tracked(tmp_path, std):
    """A width that was not kept, against a run that tracked it: closer by far than the kept ones are, and the closer
    the more snapshots there are."""
    seldom = {"log_every": 1000, "checkpoint_every": 1000, "steps": 120}
    tracked, _ = small_fit(tmp_path / "tracked", ema_std=std, **seldom)
    wanted = flat(dict(tracked.named_parameters()))
    errors = []
    for every in (60, 10):
        folder = tmp_path / str(every)
        small_fit(folder, snapshots=SnapshotConfig(every=every, stds=(0.05, 0.1)), **seldom)
        snapshots = snapshots_in(RunFolder(folder).snapshots("small"))
        expected = [(step, width) for step in range(every, 121, every) for width in (0.05, 0.1)]
        assert [(s.step, s.std) for s in snapshots] == expected
        weights, left = snapshot_weights(snapshots, std, 120)
        assert weights.sum() == pytest.approx(1)
        found = weighted_sum(snapshots, weights)
        errors.append(float((flat(found) - wanted).norm()))
        away = min(float((flat(load_file(s.path)) - wanted).norm()) for s in snapshots[-2:])
        assert left < 0.5
    assert errors[1] < 0.2 * away and errors[1] <= errors[0]


def test_snapshots_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="stds: .*valid: at least two widths"):
        SnapshotConfig(stds=(0.1,))
    with pytest.raises(ValueError, match="every: -1"):
        SnapshotConfig(every=-1)
    path = tmp_path / "step_00000010_std_0.1.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="std_0.1.safetensors is damaged or no snapshot"):
        snapshots_in(tmp_path)


def test_the_command_writes_a_run_and_draws_the_losses(tmp_path, tiny_config, capsys):
    run = tmp_path / "run"
    train.main([str(tiny_config), f"run={run}", "denoiser.train.snapshots.every=4"])
    capsys.readouterr()
    posthoc.main([str(run), "--std", "0.05", "0.12", "--plot", str(tmp_path / "plot.png")])
    said = capsys.readouterr().out
    assert said.count("validation loss") == 10 and (tmp_path / "plot.png").stat().st_size > 1000
    manifest = json.loads((run / "manifest.json").read_text())
    [kept] = [line for line in said.splitlines() if line.startswith("std 0.05:")]
    assert float(kept.split()[4].rstrip(",")) == pytest.approx(manifest["denoiser"]["validation_loss"], abs=2e-4)
    one, two = (load_file(path / "denoiser.safetensors") for path in (run, run / "posthoc" / "std_0.05"))
    for name in one:  # the width of the run itself: the same weights
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
    assert load_run(run / "posthoc" / "std_0.12").images(["a red star"], [0]).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="nothing to do; valid: --std"):
        posthoc.main([str(run)])
    shutil.rmtree(run / "snapshots")
    with pytest.raises(ValueError, match="no snapshots in .*; train with denoiser.train.snapshots.every above 0"):
        posthoc.main([str(run), "--std", "0.1"])
