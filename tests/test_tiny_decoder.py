"""The tiny decoder: its shapes, that it learns, and that an image knows it was decoded by it."""
import json
import re

import pytest
import torch
import yaml
from sample_calls import PROMPT, draw, parameters, pixels
from small_runs import metrics

import sample
import train
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.tiny_decoder import TinyDecoder, TinyDecoderConfig

NAME = "00000_a-small-red-star_seed0.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, tiny_run):
    """A student of nothing: the tiny run copied, with a tiny decoder trained into it."""
    folder = tmp_path_factory.mktemp("decoder")
    config = {**tiny, "stages": ["tiny_decoder"], "start_from": str(tiny_run), "tiny_decoder": {
        "model": {"channels": 16, "blocks": 1}, "images": 32, "validation": 12,
        "train": {**tiny["autoencoder"]["train"], "steps": 60, "validate_every": 30, "checkpoint_every": 60,
                  "optim": {"optimizer": "muon", "learning_rate": 4e-3, "warmup": 5}}}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    train.main([str(folder / "tiny.yaml"), f"run={folder / 'run'}"])
    for name in ("tokenizer.json", "text_encoder.safetensors", "denoiser.safetensors"):
        (folder / "run" / name).write_bytes((tiny_run / name).read_bytes())
    return folder / "run"


@pytest.mark.parametrize("config", [
    AutoencoderConfig.sd(), AutoencoderConfig(latent_channels=12, channels=(16,), stem=6, norm_groups=4)],
    ids=["f8", "stem 6"])
def test_it_has_the_shapes_of_the_decoder_and_few_parameters(config):
    with torch.device("meta"):
        tiny, full = TinyDecoder(TinyDecoderConfig(), config), Autoencoder(config)
        latents = torch.empty(2, config.latent_channels, 4, 4)
        assert tiny(latents).shape == full.decode(latents).shape
    if config.stem == 1:
        assert sum(p.numel() for p in tiny.parameters()) == 1_222_531  # TAESD's decoder


def test_other_latents_are_refused():
    with pytest.raises(ValueError, match=re.escape("latents: (1, 3, 4, 4); valid: (B, 4, h, w)")):
        TinyDecoder(TinyDecoderConfig(16, 1), AutoencoderConfig.sd())(torch.zeros(1, 3, 4, 4))


def test_it_learns_what_the_decoder_makes(run):
    found = [line["validation_psnr"] for line in metrics(run) if "validation_psnr" in line
             and line["stage"] == "tiny_decoder"]
    assert found[-1] > found[0] and found[-1] > 15
    assert json.loads((run / "manifest.json").read_text())["tiny_decoder"]["psnr"] == pytest.approx(found[-1], abs=1e-3)


def test_an_image_knows_which_decoder_it_was_made_by(run, tmp_path, capsys):
    full = draw(run, tmp_path / "full", PROMPT)[NAME]
    tiny = draw(run, tmp_path / "tiny", PROMPT, "--decoder", "tiny")[NAME]
    assert "decoder" not in parameters(full) and parameters(tiny)["decoder"] == "tiny"
    assert {*parameters(tiny)["weights"]} - {*parameters(full)["weights"]} == {"tiny_decoder"}
    assert (pixels(full) != pixels(tiny)).any()
    assert sample.main(["--run", str(run), "--verify", str(tiny), str(full)]) == 0
    assert capsys.readouterr().out.count(": equal, ") == 2


def test_a_run_without_one_says_how_to_train_it(tiny_run, tmp_path):
    with pytest.raises((ValueError, SystemExit), match="has no tiny decoder; train one with: python train.py"):
        sample.main(["--run", str(tiny_run), "--out", str(tmp_path), PROMPT, "--decoder", "tiny"])
