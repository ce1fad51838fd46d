"""Killed at any step, any number of times, by whatever means: the run that goes on is the one that was never killed."""
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import assert_same_run, metrics
from together import run

ROOT = Path(__file__).parents[1]
STEPS = {"autoencoder": 24, "denoiser": 36}
SETTINGS = [*(f"{stage}.train.steps={steps}" for stage, steps in STEPS.items()), "denoiser.cache=false",
            *(f"{stage}.train.{setting}" for stage in STEPS
              for setting in ("workers=1", "validate_every=10", "checkpoint_every=5", "snapshots.every=20"))]


def killed_five_times(world: int, config: Path, path: Path, reference: Path, settings: list[str]) -> None:
    """Run with SIGKILL at five random steps, each in a random process, to the end; it is the same as ``reference``."""
    draw = random.Random(5)
    steps = [(step, STEPS[stage]) for stage in STEPS for step in range(STEPS[stage])]
    for number, place in enumerate(sorted(draw.sample(range(len(steps)), 5))):
        victim = draw.randrange(world)
        output = f"{path}.{number}"
        codes = run(world, [str(config), f"run={path}", *settings], (victim, steps[place]), output)
        assert codes[victim] == -signal.SIGKILL, Path(f"{output}.{victim}").read_text()
        for rank in set(range(world)) - {victim}:
            said = Path(f"{output}.{rank}").read_text()
            assert codes[rank] == 1 and f"ProcessLost: process {rank} of {world} has lost another one" in said, said
            assert "the same command goes on from the last checkpoint" in said
    assert run(world, [str(config), f"run={path}", *settings], output=f"{path}.last") == [0] * world
    assert "continuing after step" in Path(f"{path}.last.0").read_text()
    assert_same_run(path, reference)
    kept = list((reference / "snapshots").rglob("*.safetensors"))
    for one in kept:  # tensor by tensor: the order of the metadata in such a file is left to chance
        before, after = load_file(one), load_file(path / one.relative_to(reference))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(kept) == 8


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_five_times_it_is_the_same_run(tiny_config, tmp_path, world):
    """With processes that read ahead, in both stages; all weights, averages and optimizer states to the bit."""
    assert run(world, [str(tiny_config), f"run={tmp_path / 'whole'}", *SETTINGS], output=str(tmp_path / "out")) == \
        [0] * world, (tmp_path / "out.0").read_text()
    killed_five_times(world, tiny_config, tmp_path / "parts", tmp_path / "whole", SETTINGS)


def workers_of(parent: int) -> list[int]:
    """The processes whose parent this is."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_ends_or_restarts_when_one_process_dies(tiny_config, tmp_path, restarts):
    """Without restarts the job ends within a minute; with one it goes on from the last checkpoint to the end."""
    settings = ["stages=[tokenizer, autoencoder]", *(f"autoencoder.train.{setting}" for setting in (
        "steps=400", "checkpoint_every=5", "validate_every=1000", "preview_every=1000"))]
    path = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
               str(restarts), str(ROOT / "train.py"), str(tiny_config), f"run={path}", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
                               env=environment)
    try:
        began = time.monotonic()
        while not ((path / "metrics.jsonl").exists() and len(metrics(path)) > 12) and process.poll() is None:
            assert time.monotonic() - began < 500
            time.sleep(0.1)
        os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
        said, _ = process.communicate(timeout=60 if restarts == 0 else 300)
    finally:
        for left in [*workers_of(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
    if restarts == 0:
        assert process.returncode != 0 and "SIGKILL" in said, said  # what the other one says depends on who is first
        assert not (path / "autoencoder.safetensors").exists()
    else:
        assert process.returncode == 0 and "continuing after step" in said, said
        assert (path / "autoencoder.safetensors").exists()
