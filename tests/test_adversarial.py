"""The patch discriminator, its losses and adaptive weight, and that a stage with it resumes bit for bit."""
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from files.config import ConfigError
from model.discriminator import DiscriminatorConfig, PatchDiscriminator
from training import loop
from training.loop import Interrupted
from training.optim import learning_rate
from training.stages import autoencoder
from training.stages.adversarial_loss import AdversarialConfig, Adversary, adaptive_weight, discriminator_loss

CPU = torch.device("cpu")


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- the network

def published(layers: int, c: int) -> nn.Sequential:
    """The discriminator of pix2pix with 3 layers or 1, written out; `NLayerDiscriminator` of VQGAN is the same."""
    def normed(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, kernel_size=4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(c_out),
                nn.LeakyReLU(0.2, True)]

    first = [nn.Conv2d(3, c, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
    inner = {1: normed(c, 2 * c, 1),
             3: [*normed(c, 2 * c, 2), *normed(2 * c, 4 * c, 2), *normed(4 * c, 8 * c, 1)],
             5: [*normed(c, 2 * c, 2), *normed(2 * c, 4 * c, 2), *normed(4 * c, 8 * c, 2), *normed(8 * c, 8 * c, 2),
                 *normed(8 * c, 8 * c, 1)]}[layers]
    return nn.Sequential(*first, *inner, nn.Conv2d(c * {1: 2, 3: 8, 5: 8}[layers], 1, kernel_size=4, padding=1))


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_equal_to_the_published_network(layers):
    """Names, shapes and numbers, those of batch normalisation in training too: 1e-6."""
    ours, theirs = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=layers)), published(layers, 8)
    theirs.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in ours.state_dict().items()})
    images = random_images(2, 3, 96, 104)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(images), theirs.train(mode)(images), rtol=0, atol=1e-6)


def test_published_size_and_initialisation():
    """Of the 70 x 70 discriminator for one image: 2,768,705 of pix2pix less 3 x 64 x 16 for its second image."""
    discriminator = PatchDiscriminator(DiscriminatorConfig())
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    for module in discriminator.layers:
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05) and abs(module.weight.mean()) < 1e-3
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01) and not module.bias.any()


@pytest.mark.parametrize("layers, patch", [(1, 16), (2, 34), (3, 70)])
def test_each_verdict_sees_a_patch(layers, patch):
    """The pixels that one verdict depends on."""
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=4, layers=layers)).eval()
    images = random_images(1, 3, 128, 128).requires_grad_()
    verdict = discriminator(images)
    middle = verdict.shape[2] // 2
    seen = torch.autograd.grad(verdict[0, 0, middle, middle], images)[0].abs().sum(dim=(0, 1)) > 0
    assert [int(seen.any(dim=side).sum()) for side in (0, 1)] == [patch, patch]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image(layers):
    config = DiscriminatorConfig(channels=4, layers=layers)
    discriminator = PatchDiscriminator(config).eval()
    assert discriminator(random_images(1, 3, config.smallest, config.smallest)).shape == (1, 1, 1, 1)
    for shape in ((1, 3, config.smallest - 1, 64), (1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=rf"valid: \(B, 3, H, W\), H and W at least {config.smallest}"):
            discriminator(random_images(*shape))


# ---- the losses

def test_losses_by_hand():
    real, decoded = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    hinge = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert discriminator_loss(real, decoded, "hinge").item() == pytest.approx(hinge)
    logits, truth = torch.cat([real, decoded]), torch.tensor([1.0, 1, 1, 0, 0, 0])
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(discriminator_loss(real, decoded, "vanilla"), entropy)


def test_adaptive_weight_is_the_ratio_of_the_gradients():
    """Of a decoder that is one convolution, whose gradients are known without autograd: 1e-4 relative."""
    last, features = random_images(3, 5, 1, 1).requires_grad_(), random_images(2, 5, 8, 8, seed=1)
    decoded, target = F.conv2d(features, last), random_images(2, 3, 8, 8, seed=2)
    weights = random_images(2, 3, 8, 8, seed=3)
    found = adaptive_weight((decoded - target).square().mean(), 1e-3 * (weights * decoded).sum(), last)
    reconstruction = torch.einsum("bchw,bfhw->cf", 2 * (decoded - target) / decoded.numel(), features)
    generator = 1e-3 * torch.einsum("bchw,bfhw->cf", weights, features)
    torch.testing.assert_close(found, (reconstruction.norm() / generator.norm()).detach(), rtol=1e-4, atol=0)
    assert not found.requires_grad
    faint = adaptive_weight((decoded - target).square().sum(), 1e-9 * (weights * decoded).sum(), last)
    assert faint.item() == 1e4


# ---- both sides of a step

def a_step(weight: float, step: int = 7) -> tuple[Adversary, nn.Conv2d, dict, torch.Tensor]:
    """One step with a decoder that is one convolution: adversary, decoder, terms and reconstruction loss."""
    torch.manual_seed(0)
    decoder = nn.Conv2d(4, 3, 3, padding=1)
    config = AdversarialConfig(weight=weight, start=7, model=DiscriminatorConfig(channels=4, layers=1))
    adversary = Adversary(config, CPU)
    images, decoded = random_images(4, 3, 16, 16), decoder(random_images(4, 4, 16, 16, seed=1))
    reconstruction = (decoded - images).square().mean()
    return adversary, decoder, adversary.terms(images, decoded, reconstruction, decoder.weight, step), reconstruction


def test_the_generator_is_pulled_as_hard_as_the_reconstruction_pulls():
    """At the last layer and times ``weight``; nothing of it reaches the discriminator."""
    adversary, decoder, terms, reconstruction = a_step(weight=0.5)
    pull = [torch.autograd.grad(loss, decoder.weight, retain_graph=True)[0]
            for loss in (terms["adversarial"], reconstruction)]
    torch.testing.assert_close(pull[0].norm(), 0.5 * pull[1].norm(), rtol=1e-3, atol=0)
    (terms["adversarial"] + reconstruction).backward()
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())


def test_a_step_moves_the_discriminator_only_from_the_start_on():
    torch.manual_seed(0)
    nn.Conv2d(4, 3, 3)
    before = PatchDiscriminator(DiscriminatorConfig(channels=4, layers=1)).state_dict()
    early, _, terms, _ = a_step(weight=0.5, step=6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in early.discriminator.state_dict().items())
    assert [terms[name].item() for name in ("adversarial", "discriminator", "adaptive_weight")] == [0, 0, 0]
    moved, decoder, terms, _ = a_step(weight=0.5)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in moved.discriminator.named_parameters()
                   if name.endswith("weight"))
    assert decoder.weight.grad is None and terms["discriminator"].item() > 0


def test_in_bf16_the_discriminator_judges_with_what_it_has_just_learnt():
    """Autocast keeps bf16 copies of weights as long as it lasts; those of before the step would be stale."""
    adversary, _, _, _ = a_step(weight=0.5)
    adversary.optimizer.param_groups[0]["lr"] = 0.1
    images, decoded = random_images(4, 3, 16, 16), random_images(4, 3, 16, 16, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversary.learn(images, decoded)
        adversary.discriminator.requires_grad_(True)  # frozen weights would not be copied
        inside = -adversary.discriminator(decoded).float().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inside.item() == pytest.approx(adversary.generator_loss(decoded).item(), abs=1e-3)


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_it_learns_to_tell_sharp_from_soft(kind):
    adversary = Adversary(AdversarialConfig(weight=1.0, loss=kind, learning_rate=2e-3,
                                            model=DiscriminatorConfig(channels=8, layers=1)), CPU)
    for step in range(60):
        sharp = random_images(8, 3, 16, 16, seed=step)
        adversary.learn(sharp, F.avg_pool2d(sharp, 3, 1, 1))
    unseen = random_images(8, 3, 16, 16, seed=1000)
    verdicts = [-adversary.generator_loss(images).item() for images in (unseen, F.avg_pool2d(unseen, 3, 1, 1))]
    assert verdicts[0] > 0.5 and verdicts[1] < -0.5


@pytest.mark.parametrize("change, message", [
    ({"weight": -1.0}, "weight: -1.0"), ({"start": -1}, "start: -1"), ({"learning_rate": 0.0}, "learning_rate: 0.0"),
    ({"betas": (0.5, 1.0)}, "betas: "),
])
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**change)
    with pytest.raises(ValueError, match="layers: 0"):
        DiscriminatorConfig(layers=0)


# ---- the stage

SETTINGS = ["stages=[autoencoder]", "autoencoder.perceptual.weight=0.5", "autoencoder.adversarial.start=4",
            "autoencoder.adversarial.model.channels=4", "autoencoder.adversarial.model.layers=2",
            "autoencoder.train.steps=9", "autoencoder.train.preview_every=100"]
ON = [*SETTINGS, "autoencoder.adversarial.weight=0.8"]


def state(run: Path) -> dict:
    return torch.load(max((run / "state" / "autoencoder").glob("*.pt")), weights_only=True)


def assert_equal(one, two, path: str = "") -> int:
    """Nested dictionaries and lists hold the same bits; how many values were compared."""
    if isinstance(one, (dict, list, tuple)):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        assert len(one) == len(two)
        return sum(assert_equal(one[key], two[key], f"{path}/{key}") for key in keys)
    assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, path
    return 1


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("adversarial") / "whole"
    train.main([str(tiny_config), f"run={run}", *ON])
    return run


@pytest.mark.parametrize("stop", [1, 6], ids=["before the start", "after it"])
def test_stopped_and_continued_is_the_same_as_never_stopped(whole, tiny_config, tmp_path, monkeypatch, stop):
    """Weights, averages, both optimizers, the discriminator and every logged figure."""
    count = iter(range(100))

    def rate(*arguments):
        if next(count) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*arguments)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", rate)
        with pytest.raises(Interrupted, match=f"stopped after step {stop + 1}"):
            train.main([str(tiny_config), f"run={run}", *ON])
    train.main([str(tiny_config), f"run={run}", *ON])
    assert (run / "autoencoder.safetensors").read_bytes() == (whole / "autoencoder.safetensors").read_bytes()
    assert state(whole)["adversary"].keys() == {"discriminator", "optimizer"}
    assert assert_equal(state(run), state(whole)) > 100
    clock = ("seconds", "images_per_second", "seconds_left", "split", "share_of_peak", "memory")
    found, expected = ([{k: v for k, v in line.items() if k not in clock} for line in metrics(r)] for r in (run, whole))
    assert found == expected


def test_what_is_logged_and_recorded(whole):
    lines = [line for line in metrics(whole) if "loss" in line]
    assert [line["discriminator"] > 0 for line in lines] == [step >= 4 for step in range(9)]
    for line in lines:
        total = line["reconstruction"] + 0.5 * line["perceptual"] + 1e-6 * line["kl"] + line["adversarial"]
        assert line["loss"] == pytest.approx(total, abs=5e-6)
    recorded = json.loads((whole / "manifest.json").read_text())["autoencoder"]
    assert recorded["perceptual"].startswith("pyramid")
    assert recorded["adversarial"] == "hinge, weight 0.8 times the adaptive one, from step 4, 2 layers"


def test_off_costs_nothing_and_a_late_start_changes_nothing(whole, tiny_config, tmp_path, monkeypatch):
    late = tmp_path / "late"
    train.main([str(tiny_config), f"run={late}", *ON, "autoencoder.adversarial.start=100"])

    def never(*arguments):
        raise AssertionError("a discriminator was built")

    monkeypatch.setattr(autoencoder, "Adversary", never)
    off = tmp_path / "off"
    train.main([str(tiny_config), f"run={off}", *SETTINGS])
    weights = [(run / "autoencoder.safetensors").read_bytes() for run in (off, late, whole)]
    assert weights[0] == weights[1] != weights[2]
    assert "adversary" not in state(off) and "adversary" in state(late)
    assert json.loads((off / "manifest.json").read_text())["autoencoder"]["adversarial"] == "off"
    assert not {"discriminator", "adversarial"} & metrics(off)[0].keys()


def test_images_too_small_to_be_judged_stop_the_run_before_it_begins(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="autoencoder.adversarial.model.layers: 4; valid: fewer, the images of 32"):
        train.main([str(tiny_config), f"run={tmp_path}", *ON, "autoencoder.adversarial.model.layers=4"])
