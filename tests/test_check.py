"""What is said before a run: for and against it, with nothing written."""
import re

import pytest
import torch

import train
from files.run_folder import RunFolder
from training import check
from training.loop import TrainConfig

FAST = ["autoencoder.train.optim.learning_rate=3e-3", "denoiser.train.optim.learning_rate=3e-3",
        "denoiser.train.precision=fp32", "autoencoder.train.precision=fp32"]


def test_a_good_run_is_called_good_and_nothing_is_written(tiny_config, tmp_path, capsys):
    train.main([str(tiny_config), "--check", f"run={tmp_path / 'run'}", *FAST])
    said = capsys.readouterr().out
    assert said.endswith("nothing speaks against this run\n") and not (tmp_path / "run").exists()
    for what in (r"sizes: images 32 x 32, latents 4 x 8 x 8: all parts fit", "data: 64 images for training, 12 ",
                 r"captions: \d+\.\d % of \d+ are longer than tokenizer.length = 24 and lose their end, as '",
                 r"autoencoder: 0.0 million parameters; 4 steps of 8 took \S+ s each, \S+ images/s, \d+ % of the",
                 r"denoiser: encoding 32 images before the first step takes about", r"denoiser: .* GB a checkpoint",
                 r"together: about [\w .]+ on this machine"):
        assert re.search(what, said), what
    assert len(re.findall(r"on 8 pairs alone the loss goes from .*: they are learnt", said)) == 2
    assert "not checked" not in said


def test_what_it_does_not_check_is_named(tiny_config, tmp_path, capsys):
    train.main([str(tiny_config), "--check", f"run={tmp_path / 'run'}", "stages=[tokenizer, clip]", *FAST])
    assert "clip: not checked\n" in capsys.readouterr().out


def test_latents_of_another_scale_speak_against_it(tiny_run, tiny_config, capsys):
    tiny = train.load_experiment(tiny_config)
    model = check.Autoencoder(tiny.autoencoder.model)
    check.load_weights(model, RunFolder(tiny_run).weights("autoencoder"))
    source = check.build_source(tiny.data, "train")
    assert check.check_latents(model, source, torch.device("cpu"), trained=True)
    model.latent_std *= 3
    assert not check.check_latents(model, source, torch.device("cpu"), trained=True)
    said = capsys.readouterr().out
    assert "about 0 and 1, as they should be" in said and "NOT about 0 and 1" in said


@pytest.mark.parametrize("losses, good, verdict", [
    ([1.0] * 10 + [0.1] * 10, True, "they are learnt"), ([1.0] * 200, False, "NOT learnt"),
    ([1.0] * 20, True, "too few steps to judge"), ([float("nan")] * 200, False, "NOT learnt")])
def test_verdicts(losses, good, verdict, capsys):
    assert check.report_overfit("denoiser", losses) is good
    assert verdict in capsys.readouterr().out


def test_it_stops_as_soon_as_the_proof_is_there():
    model = torch.nn.Linear(1, 1)
    seconds, losses = check.run_steps(model, lambda step: (model(torch.ones(1, 1)) * 0).sum() + 0.9**step,
                                      TrainConfig(), 300, 0.5)
    assert 15 <= len(losses) == len(seconds) < 20
