"""The stage decoder: the objective, what stays as it was, that it learns to decode noisy latents, and mistakes."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from sample_calls import PROMPT, draw, pixels
from small_runs import metrics

import train
from data.source import stack_images
from files.images import to_unit
from pipeline.loading import load_run
from training import release
from training.experiment import load_experiment
from training.seed import generator, whole_batch
from training.stages.autoencoder import DecodedLoss
from training.stages.decoder import DecoderStage, Decoding

FILES = ("tokenizer.json", "text_encoder.safetensors", "denoiser.safetensors")


def config_of(tiny, tiny_run, steps: int = 60) -> dict:
    return {**tiny, "stages": ["decoder"], "start_from": str(tiny_run), "decoder": {
        "noise": 1.0, "validation": 12, "train": {
            **tiny["autoencoder"]["train"], "steps": steps, "validate_every": 30, "preview_every": steps,
            "checkpoint_every": 20, "optim": {"optimizer": "muon", "learning_rate": 2e-3, "warmup": 5}}}}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny, tiny_run):
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "decoder.yaml").write_text(yaml.safe_dump(config_of(tiny, tiny_run)))
    train.main([str(folder / "decoder.yaml"), f"run={folder / 'run'}"])
    return folder / "run"


def test_the_encoder_and_the_denoiser_stay_as_they_were(tuned, tiny_run):
    for name in FILES:
        assert (tuned / name).read_bytes() == (tiny_run / name).read_bytes()
    before, after = (load_file(run / "autoencoder.safetensors") for run in (tiny_run, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(name.startswith("decoder.") for name in changed)


def test_noisy_latents_are_decoded_better_than_before(tuned):
    record = json.loads((tuned / "manifest.json").read_text())["decoder"]
    assert record["psnr_noisy"] > record["psnr_noisy_before"] + 0.2
    found = [line["validation_psnr_noisy"] for line in metrics(tuned) if "validation_psnr_noisy" in line]
    assert found[-1] == pytest.approx(record["psnr_noisy"], abs=1e-3)
    assert (tuned / "samples" / "decoder_000060.png").exists()


def test_the_system_draws_with_the_new_decoder(tuned, tiny_run, tmp_path):
    name = f"00000_{PROMPT.replace(' ', '-')}_seed0.png"
    old, new = (draw(run, tmp_path / label, PROMPT)[name] for run, label in ((tiny_run, "old"), (tuned, "new")))
    assert (pixels(old) != pixels(new)).any()


def test_the_objective_is_that_of_noisy_latents(tiny_run):
    """Against the same draws made here: sigma is the absolute value of a normal number, one for each image."""
    system = load_run(tiny_run, moderation=None)
    model = system.autoencoder
    config = DecoderStage(noise=0.7, l1=0.5, l2=2.0)
    images = to_unit(stack_images([{"image": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)}] * 3)) \
        + 0.1 * torch.randn(3, 3, 32, 32)
    decoder = model.decoder.requires_grad_(True)
    found = Decoding(config, model, DecodedLoss(config)).terms(decoder, images, generator(0, "a", 0), 0, whole_batch(3))
    random = generator(0, "a", 0)
    with torch.no_grad():
        posterior = model.encode(images)
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * torch.randn(posterior.mean.shape, generator=random)
        sigma = 0.7 * torch.randn(3, 1, 1, 1, generator=random).abs()
        decoded = model.decode(latents + sigma * torch.randn(latents.shape, generator=random))
    expected = 0.5 * F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images)
    torch.testing.assert_close(found["loss"].detach(), expected, atol=1e-5, rtol=1e-5)
    found["loss"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())


def test_a_run_that_was_stopped_goes_on_to_the_bit(tiny, tiny_run, tuned, tmp_path):
    config = tmp_path / "decoder.yaml"
    config.write_text(yaml.safe_dump(config_of(tiny, tiny_run)))
    shutil.copytree(tuned, tmp_path / "run")
    for state in (tmp_path / "run" / "state" / "decoder").glob("*60*"):
        shutil.rmtree(state) if state.is_dir() else state.unlink()
    (tmp_path / "run" / "autoencoder.safetensors").unlink()
    train.main([str(config), f"run={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "autoencoder.safetensors").read_bytes() == (
        tuned / "autoencoder.safetensors").read_bytes()


def test_a_release_takes_the_tuned_decoder(tuned, tiny_run, tmp_path):
    """Also of a folder that was released before; its training and what it has seen stay as they were said."""
    release.release(tiny_run, tmp_path / "first")
    release.release(tmp_path / "first", tmp_path / "second", decoder=tuned)
    first, second = (load_file(tmp_path / name / "autoencoder.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith("decoder."))
    assert not torch.equal(first["decoder.conv_out.weight"], second["decoder.conv_out.weight"])
    before, after = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("first", "second"))
    changed = {name for name in before["released"]["files"]
               if before["released"]["files"][name] != after["released"]["files"][name]}
    assert changed == {"autoencoder.safetensors"} and after["decoder"]["noise"] == 1.0
    assert {**before["released"], "files": 0} == {**after["released"], "files": 0}
    config = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert config["stages"] == ["tokenizer", "autoencoder", "denoiser"] and config["decoder"]["noise"] == 1.0
    load_experiment(tmp_path / "second" / "config.yaml")
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    tensors = load_file(other / "autoencoder.safetensors")
    save_file({**tensors, "latent_mean": tensors["latent_mean"] + 1}, other / "autoencoder.safetensors")
    with pytest.raises(ValueError, match="latent_mean is not that of .*; valid: a run of the stage decoder"):
        release.release(tiny_run, tmp_path / "third", decoder=other)


@pytest.mark.parametrize("change, message", [
    ({"start_from": ""}, "valid with decoder: in a run of its own, with start_from"),
    ({"stages": ["decoder", "denoiser"]}, "valid with decoder: in a run of its own"),
    ({"decoder": {"noise": -1.0}}, "noise: -1.0; valid: from 0 up"),
    ({"decoder": {"l1": 0.0, "l2": 0.0}}, "valid: at least one above 0"),
    ({"decoder": {"adversarial": {"weight": 0.5, "model": {"layers": 5}}}}, "decoder.adversarial.model.layers: 5"),
    ({"autoencoder": {"model": {"latent_channels": 3}}}, "which is the base, or nothing"),
])
def test_mistakes_are_one_line(tiny, tiny_run, tmp_path, change, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config_of(tiny, tiny_run), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)


def test_a_student_is_no_base(tiny, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "student")
    content = yaml.safe_load((tmp_path / "student" / "config.yaml").read_text())
    (tmp_path / "student" / "config.yaml").write_text(yaml.safe_dump({**content, "stages": ["student"]}))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(tiny, tmp_path / "student")))
    with pytest.raises((ValueError, SystemExit), match="is a student; valid for the stage decoder: its teacher"):
        train.main([str(path), f"run={tmp_path / 'run'}"])
