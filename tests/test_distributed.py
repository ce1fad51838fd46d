"""Several processes train what one would, save what any number of them can read, and end together."""
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import metrics
from together import run

STEPS = 20
OVERRIDES = ["autoencoder.train.steps=20", "denoiser.train.steps=20", "autoencoder.train.precision=fp32",
             "denoiser.train.precision=fp32", "autoencoder.train.checkpoint_every=10",
             "denoiser.train.checkpoint_every=10", "denoiser.train.validate_every=10",
             "denoiser.train.preview_every=20", "autoencoder.train.preview_every=20"]


def overrides(parallel: str = "ddp", optimizer: str = "adamw", **more) -> list[str]:
    settings = {"parallel": parallel, "optim.optimizer": optimizer, **more}
    return [*OVERRIDES, *(f"{stage}.train.{key}={value}" for stage in ("autoencoder", "denoiser")
                          for key, value in settings.items())]


def step_losses(path: Path, stage: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(path) if "loss" in line and line["stage"] == stage}


@pytest.fixture(scope="module")
def alone(tiny_config, tmp_path_factory) -> dict[str, Path]:
    """One process, with each optimizer."""
    found = {}
    for optimizer in ("adamw", "muon"):
        path = tmp_path_factory.mktemp("alone") / "run"
        assert run(1, [str(tiny_config), f"run={path}", *overrides(optimizer=optimizer)]) == [0]
        found[optimizer] = path
    return found


@pytest.mark.parametrize("stage, world, parallel, optimizer, more", [
    ("autoencoder", 2, "ddp", "muon", {"accumulate": 3, "workers": 1}), ("autoencoder", 2, "fsdp", "adamw", {}),
    ("denoiser", 2, "ddp", "adamw", {"accumulate": 2}), ("denoiser", 2, "fsdp", "muon", {"accumulate": 2}),
    ("denoiser", 4, "hybrid", "adamw", {"shards": 2}), ("denoiser", 1, "fsdp", "adamw", {})])
def test_they_train_what_one_would(alone, tiny_config, tmp_path, stage, world, parallel, optimizer, more):
    """fp32: every loss of 20 steps within 1e-6 of that of one process, relative; averaged weights within 1e-5. Muon
    iterates in bf16, which makes more of another order of the same sum: 1e-4 and 1e-3."""
    tolerance = 1e-6 if optimizer == "adamw" else 1e-4
    path, reference = tmp_path / "run", alone[optimizer]
    path.mkdir()
    before = ["tokenizer.json", *(["autoencoder.safetensors"] if stage == "denoiser" else [])]
    for name in before:  # the stage before is the same: its rounding would be seen in the latents
        shutil.copy(reference / name, path / name)
    stages = "[tokenizer, autoencoder, denoiser]" if stage == "denoiser" else "[tokenizer, autoencoder]"
    codes = run(world, [str(tiny_config), f"run={path}", f"stages={stages}", *overrides(parallel, optimizer, **more)],
                output=str(tmp_path / "out"))
    assert codes == [0] * world, "".join((tmp_path / f"out.{rank}").read_text() for rank in range(world))
    found, expected = step_losses(path, stage), step_losses(reference, stage)
    assert found.keys() == expected.keys() and len(found) == STEPS
    assert max(abs(found[step] / expected[step] - 1) for step in expected) < tolerance
    for name in ("autoencoder",) if stage == "autoencoder" else ("text_encoder", "denoiser"):
        one, two = (load_file(where / f"{name}.safetensors") for where in (reference, path))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=10 * tolerance)
    assert json.loads((path / "manifest.json").read_text())["processes"] == world
    assert {file.suffix for file in (path / "state" / stage).iterdir() if file.suffix != ".json"} == {
        ".safetensors", ".pt" if parallel == "ddp" else ".dcp"}
    silent = [(tmp_path / f"out.{rank}").read_text() for rank in range(1, world)]
    assert silent == [""] * (world - 1)  # one of them speaks


# ---- what they save

def fsdp_run(path: Path, world: int, config: Path, kill: int | None, tmp_path: Path) -> str:
    """A sharded autoencoder stage, of which the last process is killed at a step; what the main process said."""
    settings = ["stages=[tokenizer, autoencoder]", *overrides("fsdp"), "autoencoder.train.checkpoint_every=4"]
    output = str(tmp_path / f"{world}.{kill}")
    codes = run(world, [str(config), f"run={path}", *settings], (world - 1, (kill, STEPS)) if kill else None, output)
    said = Path(f"{output}.0").read_text()
    assert codes[-1] == (-signal.SIGKILL if kill else 0) and (kill or codes == [0] * world), said
    return said


def test_slices_of_two_load_into_one_and_back(alone, tiny_config, tmp_path):
    """Two processes to step 6, one to step 11, two to the end; on the way the newest state is damaged."""
    path, reference = tmp_path / "run", alone["adamw"]
    path.mkdir()
    shutil.copy(reference / "tokenizer.json", path / "tokenizer.json")
    fsdp_run(path, 2, tiny_config, 6, tmp_path)
    assert sorted(p.name for p in (path / "state" / "autoencoder" / "step_00000004.dcp").iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "complete.json"]
    assert "continuing after step 4" in fsdp_run(path, 1, tiny_config, 11, tmp_path)
    newest = path / "state" / "autoencoder" / "step_00000008.dcp" / "__0_0.distcp"
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 1
    newest.write_bytes(data)
    said = fsdp_run(path, 2, tiny_config, None, tmp_path)
    assert "step_00000008.dcp is refused (the bytes of __0_0.distcp do not match" in said
    assert "continuing after step 4" in said
    found, expected = step_losses(path, "autoencoder"), step_losses(reference, "autoencoder")
    assert max(abs(found[step] / expected[step] - 1) for step in expected) < 1e-6
    one, two = (load_file(where / "autoencoder.safetensors") for where in (reference, path))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)
    about = json.loads((path / "state" / "autoencoder" / "step_00000020.dcp" / "complete.json").read_text())
    assert about["config"]["autoencoder"]["train"]["parallel"] == "fsdp" and about["manifest"]["processes"] == 2


@pytest.mark.parametrize("settings, message", [
    (["autoencoder.train.batch=9"], "batch: 9 for "),
    (["autoencoder.train.parallel=hybrid", "autoencoder.train.shards=3"], "shards: 3 for 2 processes; valid: a div"),
    (["autoencoder.adversarial.weight=0.1", "autoencoder.adversarial.model.layers=1"],
     "adversarial.weight: 0.1 with 2 processes")])
def test_what_they_cannot_share_is_refused_by_all(tiny_config, tmp_path, settings, message):
    codes = run(2, [str(tiny_config), f"run={tmp_path / 'run'}", *settings], output=str(tmp_path / "out"))
    said = [(tmp_path / f"out.{rank}").read_text() for rank in range(2)]
    assert codes == [1, 1] and all(f"ValueError: {message}" in text for text in said), said
