"""The weights that come with the repository: small, whole, and used where no run is named."""
import hashlib
import json

import pytest
from safetensors import safe_open

import sample
from pipeline.loading import load_run
from sampling import limits, loading
from sampling.loading import SystemChoice

SHIPPED = limits.SHIPPED


def test_they_are_small_and_what_their_manifest_says():
    files = json.loads((SHIPPED / "manifest.json").read_text())["released"]["files"]
    assert {f"{name}.safetensors" for name in ("denoiser", "text_encoder", "autoencoder")} <= set(files)
    for name, digest in files.items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 40 * 2**20  # 40 MiB
    parameters = 0
    for path in SHIPPED.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            parameters += sum(file.get_tensor(name).numel() for name in file.keys())
    assert parameters <= 20e6
    assert "CC BY-SA" in (SHIPPED / "README.md").read_text() or "CC-BY-SA" in (SHIPPED / "README.md").read_text()


def test_they_draw_where_no_run_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SystemChoice().path == SHIPPED and SystemChoice().default_output.parts[:2] == ("runs", "emoji-64")
    assert sample.main(["a red apple, noto style", "--steps", "2"]) == 0
    assert len(list((tmp_path / "runs" / "emoji-64" / "samples" / "out").glob("00000_*.png"))) == 1


def test_a_run_of_ones_own_goes_first(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(tiny_run)
    assert SystemChoice().path.name == "shapes"
    assert SystemChoice(run="runs/other").path.name == "other"
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "nowhere")
    (tmp_path / "runs" / "shapes").unlink()
    with pytest.raises(ValueError, match="no run folder runs/shapes"):
        load_run(SystemChoice().path)
