"""The linear classifier: at the optimum of its loss, right where classes are apart, honest where they are not."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from eval.features.probe import fit_probe
from scoring.distances import styles_by
from scoring.held_out import Prompts


def classes(count: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    random = torch.Generator().manual_seed(seed)
    names = [("flat", "noto", "twemoji")[i % 3] for i in range(count)]
    centres = apart * torch.eye(3, 10)
    return 5 + centres[torch.arange(count) % 3] + torch.randn(count, 10, generator=random), names


def test_it_is_at_the_optimum():
    """The gradient of the loss written out a second time is 0."""
    x, names = classes(60, 1.0)
    probe = fit_probe(x, names, decay=0.1)
    z = (x.double() - probe.mean) / probe.std
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    target = torch.tensor([probe.classes.index(name) for name in names])
    (F.cross_entropy(z @ weight + bias, target) + 0.05 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-5 and bias.grad.abs().max() < 1e-5


def test_what_is_apart_is_told_apart_and_what_is_not_is_at_chance():
    probe = fit_probe(*classes(300, 6.0))
    assert probe.accuracy(*classes(150, 6.0, seed=1)).value > 0.97 and probe.classes == ("flat", "noto", "twemoji")
    chance = fit_probe(*classes(300, 0.0)).accuracy(*classes(300, 0.0, seed=2))
    assert chance.low < 1 / 3 < chance.high


def test_a_rare_class_is_not_forgotten():
    x, names = classes(600, 2.0)
    kept = [i for i, name in enumerate(names) if name != "noto" or i < 60]
    probe = fit_probe(x[kept], [names[i] for i in kept])
    y, wanted = classes(300, 2.0, seed=2)
    assert probe.accuracy(y[1::3], wanted[1::3]).value > 0.6  # every second of three is noto


def test_what_cannot_be_fitted_is_refused():
    x, names = classes(9, 1.0)
    with pytest.raises(ValueError, match="9 of 1 classes"):
        fit_probe(x, ["one"] * 9)
    with pytest.raises(ValueError, match="a finite vector a label"):
        fit_probe(x, names[:4])
    with pytest.raises(ValueError, match="a finite vector a label"):
        fit_probe(x / 0, names)


def test_the_style_of_samples_is_a_share_beside_those_of_real_images_and_of_chance():
    """Samples of which a third have another style than their prompt names; real images all have their own."""
    training, names = classes(300, 9.0)
    real, asked = classes(150, 9.0, seed=1)
    samples = real.clone()
    samples[:50] = real.roll(1, dims=0)[:50]  # the style before it
    comparison = SimpleNamespace(training=[{"style": name} for name in names])
    found = styles_by(", by X", [samples, real, real], training, comparison, Prompts(captions=asked, styles=asked))
    [(name, figure)] = found.items()
    assert name == "style that the prompt names, of 3, by X"
    assert figure.value.value == pytest.approx(100 / 150, abs=0.02) and figure.real.value > 0.98
    assert figure.chance.value < 0.6  # under the prompts of others
    assert styles_by("", [samples], training, comparison, Prompts(captions=asked[:1], styles=asked[:1])) == {}
