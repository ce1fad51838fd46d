"""Files are whole or absent, damage is found and named, and a full disk costs nothing that was there before."""
import errno
import json
import os

import pytest
import torch
from torch import nn

from files.weights import CheckpointError, load_weights, save_weights
from files.whole import sha256_of, whole_file, write_text
from training.checkpoints import checkpoint
from training.checkpoints.checkpoint import Checkpoints


def state(value: float) -> dict:
    return {"model": {"w": torch.full((64,), value)}, "optimizer": {"state": {0: {"step": torch.tensor(value)}}}}


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """Three saves of which the newest two are kept."""
    checkpoints = Checkpoints(tmp_path / "state", keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, state(step))
    return checkpoints


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- whole files

def test_an_error_half_way_leaves_the_file_before(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError, match="half way"):
        with whole_file(path) as temporary:
            temporary.write_text("aft")
            raise RuntimeError("half way")
    assert path.read_text() == "before" and names(path.parent) == ["b.txt"]
    write_text(path, "after é")
    assert path.read_bytes() == "after é".encode() and names(path.parent) == ["b.txt"]


def test_the_rename_comes_after_the_bytes_are_on_the_disk(tmp_path, monkeypatch):
    """Were it the other way round, a power cut could leave an empty file under the final name."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_text(tmp_path / "a", "text")
    assert calls == ["fsync", "replace", "fsync"]


# ---- checkpoints

def test_newest_are_kept_and_the_newest_is_read(checkpoints):
    assert names(checkpoints.folder) == [f"step_000000{n}.{end}" for n in (20, 30) for end in ("json", "pt")]
    newest = checkpoints.latest()
    assert newest["step"] == 30 and torch.equal(newest["model"]["w"], torch.full((64,), 30.0))
    meta = json.loads((checkpoints.folder / "step_00000030.json").read_text())
    killed = checkpoints.folder / ".step_00000030.pt.123.part"
    killed.write_bytes(b"half")
    checkpoints.save(40, state(40))
    assert not killed.exists()
    assert meta == {"step": 30, "regular": True, "sha256": sha256_of(checkpoints.folder / "step_00000030.pt")}
    assert Checkpoints(checkpoints.folder / "nothing").latest() is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused_by_name(checkpoints, share, capsys):
    path = checkpoints.folder / "step_00000030.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert checkpoints.latest()["step"] == 20
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(path) in said and "refused" in said


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_one_flipped_bit_is_refused(checkpoints, share, capsys):
    path = checkpoints.folder / "step_00000030.pt"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    assert checkpoints.latest()["step"] == 20
    assert str(path) in capsys.readouterr().out


def test_a_state_without_its_hash_is_refused(checkpoints, capsys):
    """The crash between the two writes."""
    (checkpoints.folder / "step_00000030.json").unlink()
    assert checkpoints.latest()["step"] == 20
    (checkpoints.folder / "step_00000020.json").write_text("{")
    assert checkpoints.latest() is None
    assert capsys.readouterr().out.count("refused") == 3


def test_a_damaged_newest_does_not_take_the_place_of_a_good_one(checkpoints):
    checkpoints.keep = 1
    (checkpoints.folder / "step_00000030.pt").write_bytes(b"damaged")
    assert checkpoints.latest()["step"] == 20
    checkpoints.save(24, state(24))  # the run goes on from 20
    assert names(checkpoints.folder) == ["step_00000024.json", "step_00000024.pt"]


def test_a_crash_while_writing_leaves_the_state_before(checkpoints, monkeypatch):
    def crash(data, path, **options):
        path.write_bytes(b"half of a st")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(40, state(40))
    assert names(checkpoints.folder) == [f"step_000000{n}.{end}" for n in (20, 30) for end in ("json", "pt")]
    assert checkpoints.latest()["step"] == 30


def test_nothing_in_a_checkpoint_is_executed(checkpoints, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    path = checkpoints.folder / "step_00000030.pt"
    torch.save({"step": 30, "model": Evil()}, path)
    path.with_suffix(".json").write_text(json.dumps({"sha256": sha256_of(path)}))  # the hash is right
    assert checkpoints.latest()["step"] == 20
    said = capsys.readouterr().out
    assert not (tmp_path / "evil").exists() and str(path) in said and said.count("\n") == 1


# ---- a full disk

def test_full_disk_leaves_earlier_checkpoints(small_disk):
    checkpoints = Checkpoints(small_disk / "state", keep=2)
    checkpoints.save(10, state(10))
    big = {"model": {"w": torch.zeros(200_000)}}
    with pytest.raises(CheckpointError, match=r"could not write .*step_00000020\.pt: .*MB free") as caught:
        checkpoints.save(20, big)
    assert "\n" not in str(caught.value) and "earlier checkpoints are untouched" in str(caught.value)
    assert names(checkpoints.folder) == ["step_00000010.json", "step_00000010.pt"]
    assert checkpoints.latest()["step"] == 10
    with pytest.raises(CheckpointError, match="could not write .*big.safetensors: .*No space left"):
        save_weights(nn.Linear(500, 500), small_disk / "big.safetensors")
    assert names(small_disk) == ["state"]


def test_a_disk_that_fails_to_flush_leaves_earlier_checkpoints(checkpoints, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not write .*step_00000040\.pt: .*No space left"):
        checkpoints.save(40, state(40))
    with pytest.raises(CheckpointError, match="could not write .*a.safetensors: .*No space left"):
        save_weights(nn.Linear(2, 2), checkpoints.folder / "a.safetensors")
    assert names(checkpoints.folder) == [f"step_000000{n}.{end}" for n in (20, 30) for end in ("json", "pt")]
    assert checkpoints.latest()["step"] == 30


# ---- weights

def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2))


def test_weights_come_back_bit_for_bit(tmp_path):
    saved, other = network().to(memory_format=torch.channels_last), network()
    saved[1].running_mean.normal_()
    save_weights(saved, tmp_path / "a.safetensors", {"note": "x"})
    load_weights(other, tmp_path / "a.safetensors")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    save_weights(other, tmp_path / "b.safetensors", {"note": "x"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path):
    save_weights(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(4), nn.Identity(), nn.Linear(2, 2)),
                 tmp_path / "a.safetensors")
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tmp_path / "a.safetensors")
    said = str(caught.value)
    assert "\n" not in said and "a.safetensors does not fit the model" in said
    for part in ("missing 2.weight", "missing 2.bias", "unexpected 3.weight", "unexpected 3.bias",
                 "0.weight is (5, 3, 3, 3), expected (4, 3, 3, 3)", "0.bias is (5,), expected (4,)"):
        assert part in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_damaged_weights_are_refused_by_name(tmp_path, share):
    path = tmp_path / "a.safetensors"
    save_weights(network(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="a.safetensors is damaged") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no weights file .*b.safetensors"):
        load_weights(network(), tmp_path / "b.safetensors")
