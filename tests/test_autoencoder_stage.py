"""What the autoencoder stage measures, draws and puts on record."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

import train
from data.catalog import build_source
from data.source import image_batch
from eval.features.efficientnet import Features
from eval.frechet import Moments, frechet_distance
from files.config import from_dict
from files.weights import load_weights
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.lpips import Lpips
from training.experiment import load_experiment
from training.seed import generator
from training.stages import autoencoder
from training.stages.autoencoder import AutoencoderLoss, AutoencoderStage, reconstruction_loss, save_comparison
from training.stages.perceptual_loss import PerceptualConfig

SETTINGS = ["stages=[autoencoder]", "autoencoder.train.steps=4", "autoencoder.train.validate_every=4"]


@pytest.fixture(scope="module")
def stage(tiny_config, tmp_path_factory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A run with every measurement on; its held-out images, and their reconstructions by the weights it left."""
    run = tmp_path_factory.mktemp("stage") / "run"
    settings = [*SETTINGS, "autoencoder.features=efficientnet_lite0"]
    train.main([str(tiny_config), f"run={run}", *settings])
    experiment = load_experiment(tiny_config, settings)
    model = Autoencoder(experiment.autoencoder.model).eval()
    load_weights(model, run / "autoencoder.safetensors")
    images = image_batch(build_source(experiment.data, "validation"), np.arange(12))
    with torch.no_grad():
        return run, images, model.decode_raw(model.moments(images).mean)


def recorded(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())["autoencoder"]


def test_the_record_is_what_the_weights_give(stage):
    """PSNR and SSIM from their formulas and scikit-image, the distance from whole arrays of features."""
    run, images, decoded = stage
    found = recorded(run)
    clipped = decoded.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (clipped - images).square().mean(dim=(1, 2, 3)))
    assert found["psnr"] == pytest.approx(float(psnr.mean()), abs=2e-3)
    ssim = [structural_similarity(one.double().numpy(), two.double().numpy(), data_range=2, channel_axis=0, sigma=1.5,
                                  gaussian_weights=True, use_sample_covariance=False)
            for one, two in zip(clipped, images)]
    assert found["ssim"] == pytest.approx(np.mean(ssim), abs=2e-4)
    features = Features()
    expected = frechet_distance(*(Moments(1280).update(features(x)) for x in (images, decoded)))
    assert found["frechet"] == pytest.approx(expected, rel=1e-3) and expected > 1
    assert found["features"] == features.stamp and found["images"] == 12
    assert found["perceptual"] == "off" and found["adversarial"] == "off"
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["validation_ssim"] == pytest.approx(found["ssim"], abs=0.02)  # that one may be in bf16


def test_without_features_the_distance_is_left_out_and_said_so(tiny_run):
    assert recorded(tiny_run)["frechet"] is None and recorded(tiny_run)["features"] == "none"


def test_one_image_has_no_distance(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="1 image has no covariance; valid: from 2 up, or features: none"):
        train.main([str(tiny_config), f"run={tmp_path / 'run'}", *SETTINGS, "autoencoder.validation=1",
                    "autoencoder.features=efficientnet_lite0"])


# ---- the image

@pytest.mark.parametrize("others, second", [("first", [0, 1, 2, 3, 4, 5, 6, 7]), ("middle", [9, 8, 7, 6, 5, 4, 3, 2])])
def test_the_worst_come_first_with_their_psnr_below(monkeypatch, others, second):
    """12 images, each further off than the one before it."""
    images = torch.zeros(12, 3, 16, 16) + 0.01 * torch.arange(12)[:, None, None, None]
    errors = 0.02 * torch.arange(1, 13)
    drawn = {}
    monkeypatch.setattr(autoencoder, "save_grid", lambda images, path, labels, columns, title: drawn.update(
        images=images, labels=labels, columns=columns, title=title))
    decoded = images + errors[:, None, None, None]
    save_comparison(images, decoded, Path("x.png"), others)
    worst = [11, 10, 9, 8, 7, 6, 5, 4]
    assert torch.equal(drawn["images"], torch.cat([images[worst], decoded[worst], images[second], decoded[second]]))
    labels = [[f"{20 * np.log10(2 / float(errors[i])):.1f} dB" for i in picked] for picked in (worst, second)]
    assert drawn["labels"] == [""] * 8 + labels[0] + [""] * 8 + labels[1]
    assert drawn["columns"] == 8 and f"the worst of 12, then the {others}" in drawn["title"]


def test_every_run_ends_with_the_image(stage, tmp_path):
    run, images, decoded = stage
    with Image.open(run / "samples" / "autoencoder_worst.png") as found:
        save_comparison(images, decoded, tmp_path / "expected.png", "middle")
        with Image.open(tmp_path / "expected.png") as expected:
            assert found.size == expected.size
            difference = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
            assert (difference > 2).mean() < 0.001  # the same arithmetic to the last digit is not asked for
    for few in (2, 5):
        save_comparison(images[:few], decoded[:few], tmp_path / "few.png", "first")


# ---- the perceptual term in the stage

@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> tuple[Path, Path]:
    """Files of random weights, VGG16 and heads apart."""
    torch.manual_seed(0)
    state = Lpips().state_dict()
    folder = tmp_path_factory.mktemp("vgg")
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("features")}, folder / "vgg16.pth")
    torch.save({re.sub(r"heads\.(\d)\.", r"lin\1.model.1.", name): tensor.abs() for name, tensor in state.items()
                if name.startswith("heads")}, folder / "heads.pth")
    return folder / "vgg16.pth", folder / "heads.pth"


def test_lpips_in_the_stage(tiny_config, tmp_path, vgg):
    run = tmp_path / "run"
    train.main([str(tiny_config), f"run={run}", *SETTINGS, "autoencoder.perceptual.kind=lpips",
                "autoencoder.perceptual.weight=2.0", f"autoencoder.perceptual.files=[{vgg[0]}, {vgg[1]}]"])
    said = recorded(run)["perceptual"]
    assert re.fullmatch(r"lpips: VGG16 \(vgg16.pth sha256 \w{16}, heads.pth sha256 \w{16}\)", said)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            assert line["perceptual"] > 0
            total = line["reconstruction"] + 2 * line["perceptual"] + 1e-6 * line["kl"]
            assert line["loss"] == pytest.approx(total, abs=5e-6)


def test_a_file_that_is_not_there_stops_the_stage_before_its_first_step(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="no weights file none.pth"):
        train.main([str(tiny_config), f"run={tmp_path / 'run'}", *SETTINGS, "autoencoder.perceptual.kind=lpips",
                    "autoencoder.perceptual.weight=1.0", "autoencoder.perceptual.files=[none.pth]"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_loss_is_the_sum_of_its_terms(tiny):
    """And its gradient that of the sum, by hand: the perceptual term is switched on by its weight alone."""
    config = AutoencoderStage(perceptual=PerceptualConfig(weight=3.0), l1=1.0, l2=0.5, kl=1e-3)
    torch.manual_seed(0)
    model = Autoencoder(from_dict(AutoencoderConfig, tiny["autoencoder"]["model"]))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def distance(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return (decoded - images).abs().amax(dim=(1, 2, 3))

    found = AutoencoderLoss(config, distance)(model, images, generator(0, "a", 0), 0)
    posterior = model.moments(images)
    noise = torch.randn(posterior.mean.shape, generator=generator(0, "a", 0))
    decoded = model.decode_raw(posterior.sample(noise))
    expected = (reconstruction_loss(decoded, images, config) + 3 * distance(decoded, images).mean()
                + 1e-3 * posterior.kl().mean())
    torch.testing.assert_close(found["loss"], expected)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (found["loss"], expected)]
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)
    assert not any(term.requires_grad for name, term in found.items() if name != "loss")
    assert AutoencoderLoss(config)(model, images, generator(0, "a", 0), 0).keys() == {"loss", "reconstruction", "kl"}
