"""What breaks from outside: disks, files, other programs. One clear line, and nothing lost that was there before."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import at_step, metrics, small_fit, terminate
from together import ended, start

import train
from files.config import ConfigError
from files.run_folder import RunFolder
from files.weights import CheckpointError
from training.checkpoints import checkpoint
from training.checkpoints.checkpoint import Best, Checkpoints
from training.logger import Logger, cut_half_line
from training.loop import Interrupted
from training.optim import OptimConfig

ROOT = Path(__file__).parents[1]


# ---- checkpoints that are damaged

@pytest.fixture(scope="module")
def two_states(tmp_path_factory) -> Path:
    """States after steps 4 and 8 of a fit."""
    path = tmp_path_factory.mktemp("two") / "run"
    with pytest.raises(Interrupted):
        small_fit(path, at={7: terminate})
    return path / "state" / "small"


def refused(folder: Path, capsys) -> int:
    """The step of the state that is used, once the newest is refused by name in one line."""
    state = Checkpoints(folder).latest()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(folder / "step_00000008.pt") in said and "is refused" in said
    assert "using the one before" in said
    return state["step"]


@pytest.fixture
def newest(two_states):
    """The newest state, put back as it was afterwards."""
    path = two_states / "step_00000008.pt"
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


@pytest.mark.parametrize("tenth", range(10))
def test_a_state_cut_at_every_tenth_is_refused(newest, tenth, capsys):
    data = newest.read_bytes()
    newest.write_bytes(data[:len(data) * tenth // 10])
    assert refused(newest.parent, capsys) == 4


@pytest.mark.parametrize("tenth", range(10))
def test_one_flipped_byte_is_refused(newest, tenth, capsys):
    data = bytearray(newest.read_bytes())
    data[len(data) * tenth // 10 + 7] ^= 0xFF
    newest.write_bytes(data)
    assert refused(newest.parent, capsys) == 4


def test_after_damage_the_run_is_the_same(tmp_path, two_states, newest):
    newest.write_bytes(newest.read_bytes()[:999])
    whole, _ = small_fit(tmp_path / "whole")
    parts, _ = small_fit(two_states.parents[1])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


# ---- a full disk

def test_a_disk_that_is_full_while_training_loses_nothing(small_disk, tmp_path):
    """One state fits, a second does not: one line, the first is used; with room again it is the same run."""
    settings = {"steps": 12, "optim": OptimConfig(learning_rate=0.01, warmup=2)}
    filler = small_disk / "filler"

    def fill():
        free = os.statvfs(small_disk)
        filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 4096))

    with pytest.raises(CheckpointError, match="could not write .*No space|could not write .*MB free") as caught:
        small_fit(small_disk / "run", at={6: fill}, **settings)
    assert "\n" not in str(caught.value) and "untouched" in str(caught.value)
    assert [path.name for path in (small_disk / "run" / "state" / "small").glob("step*.pt")] == ["step_00000004.pt"]
    filler.unlink()
    parts, _ = small_fit(small_disk / "run", **settings)
    whole, _ = small_fit(tmp_path / "whole", **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert all(json.loads(line) for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines())


def test_a_line_that_could_not_be_written_whole_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    cut_half_line(path)
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    path.write_text('{"a"')
    cut_half_line(path)
    assert path.read_text() == ""


def test_a_log_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch):
    with Logger(tmp_path / "metrics.jsonl", "small", 0, 10, 1) as log:
        monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        with pytest.raises(CheckpointError, match="could not write .*metrics.jsonl: No space .*MB free"):
            log.write({"step": 1})


# ---- the power is cut

@pytest.mark.parametrize("call", ["save", "replace", "fsync"])
def test_killed_while_it_writes_a_state_it_goes_on_from_the_one_before(tmp_path, call):
    """SIGKILL inside the write of the second state: while the bytes are written, before they are flushed, before the
    rename."""
    path = tmp_path / "run"
    assert ended(start(1, [str(path), call], function=killed_in_the_second_write)) == [-signal.SIGKILL]
    names = {file.name for file in (path / "state" / "small").iterdir() if not file.name.startswith(".")}
    assert {"step_00000004.pt", "step_00000004.json"} <= names and "step_00000008.json" not in names
    parts, _ = small_fit(path)
    whole, _ = small_fit(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert not list((path / "state" / "small").glob(".*"))


def killed_in_the_second_write(path: str, call: str) -> None:
    """Run a small fit that ends in SIGKILL."""
    module = torch if call == "save" else os
    original = getattr(module, call)

    def kill(*arguments, **options):
        if any("step_00000008.pt" in str(a) for a in arguments) or (
                call == "fsync" and "step_00000008.pt" in os.readlink(f"/proc/self/fd/{arguments[0]}")):
            if call == "save":
                Path(arguments[1]).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, call, kill)
    assert checkpoint.torch is torch
    small_fit(Path(path))


# ---- the best

def test_the_best_is_kept_apart_from_the_newest(tmp_path, capsys):
    model = torch.nn.Linear(1, 1)
    best = Best(tmp_path / "best.safetensors", "loss", "min")
    offers = [(1, 3.0, True), (2, 2.0, True), (3, 2.5, False), (4, float("nan"), False), (5, 1.0, True)]
    for step, value, kept in offers:
        torch.nn.init.constant_(model.weight, step)
        assert best.offer(model, step, {"loss": value}) is kept
    again = Best(best.path, "loss", "min")  # after a restart
    assert again.value == 1.0 and not again.offer(model, 6, {"loss": 1.0}) and again.offer(model, 6, {"loss": 0.5})
    assert Best(tmp_path / "other.safetensors", "psnr", "max").offer(model, 1, {"psnr": -5.0})
    best.path.write_bytes(b"damaged")
    assert Best(best.path, "loss", "min").value is None
    assert "best.safetensors is damaged" in capsys.readouterr().out


def test_a_regular_state_outlives_those_of_interruptions(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, regular in ((10, True), (20, True), (21, False), (22, False), (23, False)):
        checkpoints.save(step, {}, regular=regular)
    assert [path.name for path in checkpoints.files()] == ["step_00000023.pt", "step_00000022.pt", "step_00000020.pt"]
    assert checkpoints.latest()["step"] == 23 and checkpoints.latest(regular=True)["step"] == 20


def test_a_checkpoint_says_what_it_is_of(tiny_run):
    for stage in ("autoencoder", "denoiser"):
        about = json.loads((tiny_run / "state" / stage / "step_00000012.json").read_text())
        assert about["config"]["seed"] == 3 and about["config"][stage]["train"]["steps"] == 12
        manifest = about["manifest"]
        assert {"revision", "versions", "device", "command", "seed", "data", "processes"} <= manifest.keys()
        assert len(manifest["data_sha256"]) == 64


# ---- other programs

def test_two_programs_do_not_train_into_one_folder(tiny_config, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with run.lock():
        with pytest.raises(ConfigError) as caught:
            with RunFolder(tmp_path / "run").lock():
                pass
    said = str(caught.value)
    assert "\n" not in said and f"process {os.getpid()} on " in said and "is being trained by another program" in said
    with RunFolder(tmp_path / "run").lock():
        pass  # free again


def test_the_lock_ends_with_the_process_however_that_ends(tiny_config, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), str(tiny_config), f"run={run}", "autoencoder.train.steps=100000",
               "autoencoder.train.log_every=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        began = time.monotonic()
        while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() - began < 200:
            time.sleep(0.1)
        with pytest.raises(ConfigError, match=f"is being trained by another program .process {process.pid} on "):
            train.main([str(tiny_config), f"run={run}", "autoencoder.train.steps=100000",
                        "autoencoder.train.log_every=1"])
    finally:
        process.kill()
        process.wait()
    with RunFolder(run).lock():
        pass


# ---- what is said of a step

def test_a_logged_step_has_its_cost(tiny_run):
    lines = [line for line in metrics(tiny_run) if "loss" in line]
    for line in lines:
        assert set(line["split"]) == {"data", "forward", "backward", "optimizer", "average"}
        assert all(value >= 0 for value in line["split"].values()) and line["split"]["backward"] > 0
        assert 0 < line["share_of_peak"] < 1.5 and line["memory"] > 1e7 and line["seconds_left"] >= 0
    assert lines[-1]["seconds_left"] == 0
    checked = [line for line in metrics(tiny_run) if "validation_loss" in line]
    assert all(f"validation_loss_{number}_of_5" in checked[-1] for number in range(1, 6))


def test_an_interrupted_validation_is_repeated_to_the_digit(tiny_run, tiny_config, tmp_path, monkeypatch):
    """The same noise and the same times whenever it is measured."""
    at_step(monkeypatch, 12 + 7, terminate)
    with pytest.raises(Interrupted):
        train.main([str(tiny_config), f"run={tmp_path / 'run'}"])
    monkeypatch.undo()
    train.main([str(tiny_config), f"run={tmp_path / 'run'}"])
    one, two = ([line for line in metrics(path) if "validation_loss" in line] for path in (tiny_run, tmp_path / "run"))
    assert one == two
