"""A run folder to share: the same images from half the bytes, and a start for a new training."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_runs import at_step, terminate

import train
from files.config import ConfigError, read_yaml
from files.weights import CheckpointError
from files.whole import sha256_of
from pipeline.clip_vectors import ClipVectors
from pipeline.loading import load_run
from training import release
from training.loop import Interrupted


def test_a_released_run_draws_nearly_the_same_images(tiny_run, tmp_path, capsys):
    out = tmp_path / "weights" / "tiny"
    release.main([str(tiny_run), "--out", str(out)])
    assert "parameters" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "manifest.json", "tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors",
        "denoiser.safetensors"}
    for name in ("autoencoder", "text_encoder", "denoiser"):
        ours, theirs = load_file(out / f"{name}.safetensors"), load_file(tiny_run / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == (torch.bfloat16 if tensor.ndim > 1 else theirs[key].dtype), key
            torch.testing.assert_close(tensor.float(), theirs[key].float(), rtol=2**-8, atol=0)
    one, two = (load_run(path, moderation=None).images(["a red star"], [0]).float() for path in (tiny_run, out))
    assert (one - two).abs().mean() < 2  # of 255
    manifest, trained = (json.loads((folder / "manifest.json").read_text()) for folder in (out, tiny_run))
    assert {key: manifest[key] for key in trained} == trained  # how it was trained, not how it was released
    about = manifest["released"]
    assert about["finished"] and about["denoiser_steps"] == 12
    assert about["images_seen"] == 12 * read_yaml(tiny_run / "config.yaml")["denoiser"]["train"]["batch"]
    assert about["images_seen_before"] == 0
    assert about["files"]["denoiser.safetensors"] == sha256_of(out / "denoiser.safetensors")
    with pytest.raises(ValueError, match="exists; valid: a new folder"):
        release.main([str(tiny_run), "--out", str(out)])


def test_an_unfinished_run_gives_its_averaged_weights(tiny_run, tiny_config, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    at_step(monkeypatch, 12 + 8, terminate)
    with pytest.raises(Interrupted):
        train.main([str(tiny_config), f"run={run}"])
    with pytest.raises(ConfigError, match="training is not finished"):
        release.release(run, out)
    release.release(run, out, unfinished=True)
    about = json.loads((out / "manifest.json").read_text())["released"]
    assert (about["finished"], about["denoiser_steps"]) == (False, 9)
    average = torch.load(run / "state" / "denoiser" / "step_00000009.pt", weights_only=True)["average"]
    known = load_file(out / "denoiser.safetensors")
    assert all(torch.equal(average[f"unet.{key}"].to(tensor.dtype), tensor) for key, tensor in known.items())
    assert load_run(out, moderation=None).images(["a red star"], [0]).shape == (1, 3, 32, 32)


def test_images_that_were_seen_before_are_counted_with_them(tiny_run, tiny_config, tmp_path):
    """Over two releases that start from each other; unknown where the weights that were begun with are others now."""
    first, run, second = tmp_path / "first", tmp_path / "run", tmp_path / "second"
    release.release(tiny_run, first)
    train.main([str(tiny_config), f"run={run}", f"start_from={first}", "stages=[denoiser]", "denoiser.train.steps=3",
                "preview_prompts=[a red star, two hats]"])
    release.release(run, second)
    assert not (first / "prompts.txt").exists() and (second / "prompts.txt").read_text() == "a red star\ntwo hats\n"
    batch = read_yaml(run / "config.yaml")["denoiser"]["train"]["batch"]
    about = json.loads((second / "manifest.json").read_text())
    assert (about["released"]["images_seen"], about["released"]["images_seen_before"]) == (3 * batch, 12 * batch)
    start = {"start_from": {"run": str(second), "files": {"denoiser.safetensors": sha256_of(
        second / "denoiser.safetensors")}}}
    assert release.images_seen_before(start) == 15 * batch
    shutil.copyfile(first / "denoiser.safetensors", second / "denoiser.safetensors")
    assert release.images_seen_before(start) is None


def test_an_evaluator_is_released_as_it_judges(tiny_run, tiny_config, tmp_path):
    run, out = tmp_path / "clip", tmp_path / "out"
    width = "width: 16, layers: 1, heads: 2, mlp_width: 32"
    train.main([str(tiny_config), f"run={run}", "stages=[clip]", "clip.train.steps=2", "clip.train.batch=4",
                "clip.validation=4", "clip.tokenizer={vocab_size: 300, length: 40}",
                f"clip.model={{image: {{size: 16, patch: 8, {width}}}, "
                f"text: {{vocab_size: 300, length: 40, {width}, causal: false}}, width: 16}}"])
    release.release(tiny_run, out, clip=run)
    assert "clip" in read_yaml(out / "config.yaml")["stages"]
    ours, theirs = ClipVectors.of_run(out), ClipVectors.of_run(run)
    images, texts = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, ["a red star"]
    for released, trained in ((ours(images), theirs(images)), (ours.texts(texts), theirs.texts(texts))):
        torch.testing.assert_close(released, trained, rtol=0, atol=0.02)  # the weights are rounded to bf16


def test_what_is_missing_is_named(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("state"))
    with pytest.raises(CheckpointError, match="holds no state"):
        release.release(run, tmp_path / "out", unfinished=True)
    with pytest.raises(ConfigError, match="there is no clip_tokenizer.json yet"):
        release.release(run, tmp_path / "out", clip=run)
    assert not (tmp_path / "out").exists()
