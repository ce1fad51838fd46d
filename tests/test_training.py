"""The whole command: what a run leaves, that it can be stopped anywhere without a trace, and that it learns."""
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import assert_same_run, at_step, metrics, terminate

import train
from data.source import image_batch
from data.tokenizer import Tokenizer
from files.config import ConfigError, apply_overrides, from_dict
from files.run_folder import RunFolder
from files.weights import save_weights
from files.whole import sha256_of
from model.autoencoder import Autoencoder
from training.experiment import USUAL, Experiment
from training.loop import Interrupted
from training.stages.autoencoder import AutoencoderStage, psnr, reconstruction_loss
from training.stages.context import StageContext
from training.stages.denoiser import train_denoiser

ROOT = Path(__file__).parents[1]


# ---- the whole command

def test_a_run_leaves_what_sampling_and_a_reader_need(tiny_run, tiny):
    for name in ("config.yaml", "tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors",
                 "denoiser.safetensors", "samples/autoencoder_000012.png", "samples/denoiser_000012.png"):
        assert (tiny_run / name).stat().st_size > 0, name
    assert not list(tiny_run.rglob("*.part"))
    lines = metrics(tiny_run)
    for stage in ("autoencoder", "denoiser"):
        logged = [line for line in lines if line["stage"] == stage and "loss" in line]
        assert [line["step"] for line in logged] == list(range(1, 13))
        assert all(math.isfinite(line[key]) for line in logged
                   for key in ("loss", "learning_rate", "gradient_norm", "images_per_second", "seconds"))
        checked = [line["step"] for line in lines if line["stage"] == stage and "loss" not in line]
        assert checked == [6, 12]


def test_manifest_says_what_ran(tiny_run, tiny):
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    assert manifest["seed"] == 3 and manifest["data"]["source"] == "shapes" and manifest["data"]["train"] == 64
    assert manifest["versions"]["torch"] and manifest["versions"]["python"] == sys.version.split()[0]
    assert {"revision", "device", "threads", "command", "begun"} <= manifest.keys()
    assert manifest["tokenizer"]["vocab_size"] <= 300 and manifest["tokenizer"]["length"] == 24
    last = {line["stage"]: line for line in metrics(tiny_run) if line["step"] == 12 and "loss" not in line}
    tolerance = 0.02  # the record is in fp32, the log may be in bf16
    assert manifest["autoencoder"]["psnr"] == pytest.approx(last["autoencoder"]["validation_psnr"], rel=tolerance)
    assert manifest["denoiser"]["validation_loss"] == pytest.approx(last["denoiser"]["validation_loss"], rel=tolerance)
    assert manifest["denoiser"]["images"] == 32 and manifest["autoencoder"]["images"] == 12
    assert len(manifest["autoencoder"]["latent_std"]) == 4 and min(manifest["autoencoder"]["latent_std"]) > 0


def test_finished_stages_are_skipped(tiny_run, tiny_config, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    train.main([str(tiny_config), f"run={run}"])
    said = capsys.readouterr().out
    assert [f"{stage}: finished before, skipped" in said for stage in USUAL] == [True] * 3
    (run / "denoiser.safetensors").unlink()  # one stage is missing: that one only is done, from its last state
    train.main([str(tiny_config), f"run={run}"])
    said = capsys.readouterr().out
    assert said.count("skipped") == 2 and "continuing after step 12" in said
    assert before.keys() == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}.keys()
    assert_same_run(run, tiny_run)


def test_another_configuration_is_refused(tiny_run, tiny_config):
    before = (tiny_run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        train.main([str(tiny_config), f"run={tiny_run}", "denoiser.train.batch=4", "seed=4"])
    said = str(caught.value)
    assert "\n" not in said and "seed: 3 then, 4 now" in said and "denoiser.train.batch: 8 then, 4 now" in said
    assert (tiny_run / "config.yaml").read_bytes() == before


def test_settings_of_stages_that_a_run_lacks_do_not_matter(tiny_run, tiny_config, capsys):
    """The defaults of such a stage may have changed since the run began; those that other stages read still count."""
    before = (tiny_run / "config.yaml").read_bytes()
    train.main([str(tiny_config), f"run={tiny_run}", "moderator.epochs=9", "student.train.steps=7"])
    assert capsys.readouterr().out.count("finished before, skipped") == 3
    assert (tiny_run / "config.yaml").read_bytes() == before
    with pytest.raises(ConfigError, match="autoencoder.l2"):
        train.main([str(tiny_config), f"run={tiny_run}", "stages=[denoiser]", "autoencoder.l2=3.5"])


def test_a_run_starts_from_the_weights_of_another(tiny_run, tiny_config, tmp_path, monkeypatch, capsys):
    first: dict[str, torch.Tensor] = {}

    def at_start(networks, *arguments):
        first.update({name: value.clone() for name, value in networks.state_dict().items()})
        raise Interrupted("seen")

    monkeypatch.setattr("training.stages.denoiser.fit", lambda task, networks, *rest: at_start(networks))
    arguments = [str(tiny_config), f"run={tmp_path / 'run'}", f"start_from={tiny_run}", "stages=[denoiser]", "seed=4"]
    with pytest.raises(Interrupted):
        train.main(arguments)
    for prefix, name in (("unet.", "denoiser"), ("text_encoder.", "text_encoder")):
        known = load_file(tiny_run / f"{name}.safetensors")
        assert known and all(torch.equal(first[prefix + key], value) for key, value in known.items())
    for name in ("tokenizer.json", "autoencoder.safetensors"):  # not trained here
        assert (tmp_path / "run" / name).read_bytes() == (tiny_run / name).read_bytes()
    start = json.loads((tmp_path / "run" / "manifest.json").read_text())["start_from"]
    assert start["run"] == str(tiny_run)
    assert start["files"] == {name: sha256_of(tiny_run / name) for name in (
        "tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors", "denoiser.safetensors")}
    with pytest.raises(ConfigError, match="no run folder"):
        train.main([str(tiny_config), f"run={tmp_path / 'b'}", f"start_from={tmp_path / 'nowhere'}"])
    with pytest.raises(ValueError, match="does not fit"):
        train.main([*arguments[:1], f"run={tmp_path / 'c'}", *arguments[2:], "denoiser.unet.channels=[32, 32]"])


def test_a_stage_may_be_added_to_a_finished_run(tiny_run, tiny_config, tmp_path, capsys):
    """The evaluator is trained later, with settings of its own; what was there before stays as it is."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    width = "width: 16, layers: 1, heads: 2, mlp_width: 32"
    small = ["clip.train.steps=2", "clip.train.batch=4", "clip.validation=4",
             "clip.tokenizer={vocab_size: 300, length: 40}",
             f"clip.model={{image: {{size: 16, patch: 8, {width}}}, "
             f"text: {{vocab_size: 300, length: 40, {width}, causal: false}}, width: 16}}"]
    train.main([str(tiny_config), f"run={run}", "stages=[clip]", *small])
    assert (run / "clip.safetensors").is_file() and (run / "clip_tokenizer.json").is_file()
    for name in ("tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors", "denoiser.safetensors"):
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes(), name
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["stages"] == ["tokenizer", "autoencoder", "clip", "denoiser"]
    assert config["clip"]["train"]["steps"] == 2
    capsys.readouterr()
    train.main([str(tiny_config), f"run={run}", "stages=[clip]", *small])
    assert "clip: finished before, skipped" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="clip.train.steps: 2 then, 3 now"):
        train.main([str(tiny_config), f"run={run}", "stages=[clip]", *small, "clip.train.steps=3"])
    assert [line["stage"] for line in metrics(run)].count("clip") > 0


@pytest.mark.parametrize("arguments, message", [
    (["configs/nothing.yaml"], "no config file configs/nothing.yaml"),
    (["CONFIG", "run="], "run= is empty"),
    (["CONFIG", "denoiser.train.stepz=3"], "unknown key 'denoiser.train.stepz'; valid keys here"),
    (["CONFIG", "data.shapes.validation=0", "run=RUN"], "its validation split is empty"),
    (["CONFIG", "data.shapes.train=0", "run=RUN"], "its train split is empty"),
    (["CONFIG", "stages=[denoiser]", "run=RUN"], "there is no tokenizer.json yet"),
])
def test_mistakes_end_in_one_line(tiny_config, tmp_path, monkeypatch, arguments, message):
    names = {"CONFIG": str(tiny_config), "run=RUN": f"run={tmp_path / 'run'}"}
    monkeypatch.setattr(sys, "argv", ["train.py", *(names.get(text, text) for text in arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    assert caught.value.code.startswith("error: ") and message in caught.value.code


# ---- stopping and going on

@pytest.mark.parametrize("steps", [(5, 18), (11, 12), (23,)], ids=["in both stages", "around a stage", "at the end"])
def test_stopped_and_continued_is_the_same_as_never_stopped(tiny_run, tiny_config, tmp_path, monkeypatch, steps):
    """SIGTERM at steps counted over both stages of 12; each start counts on from where it goes on."""
    run, done = tmp_path / "run", 0
    for step in steps:
        at_step(monkeypatch, step - done, terminate)
        with pytest.raises(Interrupted, match=rf"stopped after step {step % 12 + 1}; the same command continues it"):
            train.main([str(tiny_config), f"run={run}"])
        done = step + 1
    monkeypatch.undo()
    train.main([str(tiny_config), f"run={run}"])
    assert_same_run(run, tiny_run)


def test_a_crash_costs_the_steps_since_the_last_checkpoint(tiny_run, tiny_config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def crash():
        raise RuntimeError("power cut")

    at_step(monkeypatch, 12 + 10, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.main([str(tiny_config), f"run={run}"])
    monkeypatch.undo()
    newest = max((run / "state" / "denoiser").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])  # and the newest state is damaged, too
    capsys.readouterr()
    train.main([str(tiny_config), f"run={run}"])
    said = capsys.readouterr().out
    assert f"{newest} is refused" in said and "continuing after step 4" in said
    assert_same_run(run, tiny_run)


def test_sigterm_to_the_command(tiny_config, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), str(tiny_config), f"run={run}", "autoencoder.train.steps=100000",
               "autoencoder.train.log_every=1", "autoencoder.train.checkpoint_every=100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        began = time.monotonic()
        while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    stopped = re.search(r"stopped: autoencoder stopped after step (\d+); the same command continues it\n$", said)
    assert stopped and process.returncode == 1 and "Traceback" not in said
    assert (run / "state" / "autoencoder" / f"step_{int(stopped[1]):08d}.pt").is_file()
    assert not (run / "autoencoder.safetensors").exists()


# ---- losses

@pytest.mark.parametrize("offset", [0.01, 0.1, 1.0])
def test_psnr_closed_form(offset):
    """A constant error d of a signal with peak-to-peak 2: 20 log10(2 / d)."""
    images = torch.full((3, 3, 8, 8), -0.5)
    found = psnr(images + offset, images)
    assert found.shape == (3,)
    torch.testing.assert_close(found, torch.full((3,), 20 * math.log10(2 / offset)), rtol=0, atol=1e-3)
    white = torch.ones(1, 3, 4, 4)
    assert psnr(white + 5, white) > 100  # clipped as a file would be
    error = torch.zeros(1, 3, 4, 4)
    error[0, 0, 0, 0] = 0.48  # one value of 48: mean square 0.48^2 / 48
    assert float(psnr(error, torch.zeros_like(error))) == pytest.approx(10 * math.log10(4 * 48 / 0.48**2), abs=1e-4)


def test_reconstruction_loss_terms():
    images = torch.zeros(2, 3, 4, 4)
    step = torch.zeros_like(images)
    step[..., 2:] = 0.5  # one vertical edge, half of the image off by 0.5
    for l1, l2, edge, expected in ((1, 0, 0, 0.25), (0, 1, 0, 0.125), (2, 3, 0, 0.875), (1, 0, 2, 0.25 + 1 / 3)):
        config = AutoencoderStage(l1=l1, l2=l2, edge=edge)
        assert float(reconstruction_loss(step, images, config)) == pytest.approx(expected)


# ---- it learns

COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
           "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255)}


class Colours:
    """Eight images of one colour each, and its name."""

    def __len__(self):
        return len(COLOURS)

    def captions(self, index):
        return (f"all {list(COLOURS)[index]}",)

    def __getitem__(self, index):
        colour = torch.tensor(list(COLOURS.values())[index], dtype=torch.uint8)
        return {"image": colour[:, None, None].expand(3, 16, 16), "caption": self.captions(index)[0],
                "captions": self.captions(index), "id": str(index)}


def test_eight_pairs_are_learnt_by_heart(tmp_path, tiny):
    """The real stage, no mocks. An untrained network predicts 0 and has loss 1, the variance of a latent; at high noise
    only the caption tells the images apart, so the loss falls below 0.2 only if text, UNet and loop work together."""
    experiment = from_dict(Experiment, apply_overrides(tiny, [
        "denoiser.images=8", "denoiser.caption_dropout=0", "denoiser.prediction_type=sample",
        "denoiser.unet.channels=[32]", "denoiser.unet.attention=[true]", "denoiser.unet.context_width=64",
        "denoiser.text_encoder.width=64", "denoiser.text_encoder.heads=2", "denoiser.text_encoder.mlp_width=128",
        "denoiser.train.precision=fp32", "denoiser.train.steps=80", "denoiser.train.log_every=1",
        "denoiser.train.optim.learning_rate=3e-3", "denoiser.train.validate_every=1000"]))
    run, source = RunFolder(tmp_path), Colours()
    torch.manual_seed(0)
    autoencoder = Autoencoder(experiment.autoencoder.model).eval()
    with torch.no_grad():  # latents without noise, which is all that could not be learnt
        autoencoder.quant.weight[4:], autoencoder.quant.bias[4:] = 0.0, -20.0
    autoencoder.measure([image_batch(source, np.arange(8))])
    save_weights(autoencoder, run.weights("autoencoder"))
    tokenizer = Tokenizer.train([source.captions(i)[0] for i in range(8)], experiment.tokenizer)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    train_denoiser(experiment.denoiser, StageContext(run, source, source, data_key={"source": "colours"},
                                                     system=experiment.system))
    found = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert found[0] == pytest.approx(1.0, abs=0.2)
    assert sum(found[-10:]) / 10 < 0.2
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["denoiser"]["validation_loss"] < 0.25
