"""LPIPS against the package of its authors, with random weights; the Laplacian pyramid against closed forms."""
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision
from torch import nn

from model.lpips import Lpips, load_lpips
from training.stages.perceptual_loss import (
    PerceptualConfig,
    downsample,
    laplacian_pyramid,
    perceptual_distance,
    pyramid_distance,
    pyramid_sum,
)


@pytest.fixture(scope="module")
def reference() -> lpips.LPIPS:
    """Random VGG16 whose activations keep their size through 13 layers, random positive heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision by names of before
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    random = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4 and name.startswith("net."):
            nn.init.kaiming_normal_(parameter, generator=random)
        else:
            parameter.data.uniform_(0, 0.1, generator=random)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory) -> dict[str, Path]:
    """The same weights as people find them."""
    folder = tmp_path_factory.mktemp("lpips")
    state = reference.state_dict()
    vgg = {f"features.{name.split('.', 2)[2]}": tensor for name, tensor in state.items() if name.startswith("net.")}
    heads = {name: tensor for name, tensor in state.items() if name.startswith("lin") and not name.startswith("lins")}
    found = {"vgg": {**vgg, "classifier.0.weight": torch.zeros(1)}, "heads": heads, "both": {**vgg, **heads},
             "package": state}
    for name, tensors in found.items():
        torch.save(tensors, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in found}


@pytest.fixture(scope="module")
def ours(files) -> Lpips:
    return load_lpips((str(files["both"]),))


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- LPIPS

@pytest.mark.parametrize("shape", [(3, 3, 64, 64), (2, 3, 48, 35), (1, 3, 16, 16)])
def test_equal_to_the_package_of_the_authors(reference, ours, shape):
    """Distances and gradients: 1e-5 relative."""
    decoded, images = random_images(*shape).requires_grad_(), random_images(*shape, seed=1)
    found, expected = ours(decoded, images), reference(decoded, images).flatten()
    assert found.shape == shape[:1] and bool((expected > 0.01).all())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value.sum(), decoded)[0] for value in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


def test_layers_are_named_as_torchvisions():
    with torch.device("meta"):
        theirs, ours = torchvision.models.vgg16().features.state_dict(), Lpips().features.state_dict()
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [(n, t.shape) for n, t in theirs.items()]


@pytest.mark.parametrize("names", [("vgg", "heads"), ("heads", "vgg"), ("package",)])
def test_every_way_the_files_come(files, ours, names):
    found = load_lpips(tuple(str(files[name]) for name in names))
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())


def test_files_that_do_not_fit_are_named(files, tmp_path):
    state = torch.load(files["both"], weights_only=True)
    state["features.2.weight"] = torch.zeros(3)
    state["features.99.weight"] = torch.zeros(1)
    del state["lin3.model.1.weight"]
    path = str(tmp_path / "wrong.pth")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"missing: heads.3.weight; unexpected: features.99.weight; misshapen: "
                                         r"features.2.weight \(3,\), not \(64, 64, 3, 3\)"):
        load_lpips((path,))
    with pytest.raises(ValueError, match="missing: heads.0.weight"):
        load_lpips((str(files["vgg"]),))
    torch.save({"a": print}, path)
    with pytest.raises(ValueError, match="holds more than tensors, which is not executed"):
        load_lpips((path,))
    with pytest.raises(ValueError, match="no weights file .*none.pth"):
        load_lpips((str(tmp_path / "none.pth"),))


def test_where_nothing_is_active_the_gradient_is_a_number(ours):
    """A root of a sum of squares has no gradient at 0, which a loss must not hand on."""
    dead = Lpips().eval().requires_grad_(False)
    dead.load_state_dict(ours.state_dict())
    dead.features[28].bias.fill_(-1e6)
    decoded, images = random_images(1, 3, 32, 32).requires_grad_(), random_images(1, 3, 32, 32, seed=1)
    distance = dead(decoded, images)
    assert 0 < distance.item() < ours(decoded, images).item()
    assert torch.isfinite(torch.autograd.grad(distance.sum(), decoded)[0]).all()
    equal = dead(decoded, decoded.detach())
    assert equal.item() == 0 and torch.isfinite(torch.autograd.grad(equal.sum(), decoded)[0]).all()


def test_images_that_cannot_be_compared_are_refused(ours):
    for shapes in (((1, 3, 32, 32), (1, 3, 32, 31)), ((1, 3, 15, 32),) * 2, ((1, 1, 32, 32),) * 2):
        with pytest.raises(ValueError, match="valid: two of one shape .* at least 16"):
            ours(*(torch.zeros(shape) for shape in shapes))


# ---- the pyramid

@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 37, 50), (1, 1, 8, 8), (1, 3, 5, 64)])
def test_the_levels_put_together_are_the_image(shape):
    images = random_images(*shape).double()
    levels = laplacian_pyramid(images)
    torch.testing.assert_close(pyramid_sum(levels), images, rtol=0, atol=1e-12)
    sizes = [min(level.shape[2:]) for level in levels]
    assert sizes == [-(-sizes[0] // 2**number) for number in range(len(sizes))]
    assert len(levels) == 5 or sizes[-1] < 8


def test_the_blur_is_the_binomial_filter():
    """scipy's correlation with the outer product of (1 4 6 4 1) / 16, the border mirrored: fp64, 1e-12."""
    image = random_images(1, 1, 13, 20).double()
    taps = np.array([1, 4, 6, 4, 1]) / 16
    expected = scipy.ndimage.correlate(image[0, 0].numpy(), np.outer(taps, taps), mode="mirror")[::2, ::2]
    np.testing.assert_allclose(downsample(image)[0, 0], expected, rtol=0, atol=1e-12)


def test_distance_of_errors_at_the_two_ends_of_the_scale():
    """A constant is all in the last level, a chequerboard all in the first: both cost their size."""
    images = random_images(2, 3, 64, 64)
    chequered = torch.ones(64, 64)
    chequered[::2, ::2] = chequered[1::2, 1::2] = -1
    for error in (torch.full((64, 64), 0.3), 0.3 * chequered):
        torch.testing.assert_close(pyramid_distance(images + error, images), torch.full((2,), 0.3), rtol=0, atol=1e-5)


def test_a_lost_shape_costs_more_than_noise_of_the_same_mean():
    """L1 cannot tell the two errors apart, the pyramid takes the disc for more than twice the noise."""
    images = torch.zeros(1, 3, 64, 64)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = ((x - 30).square() + (y - 34).square() < 10**2).float().expand(1, 3, 64, 64)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = noise * (disc.mean() / noise.abs().mean())
    assert float(pyramid_distance(disc, images)) > 2 * float(pyramid_distance(noise, images)) > 0


def test_surrounding_arithmetic_changes_nothing_in_the_pyramid():
    decoded, images = random_images(1, 3, 32, 32), random_images(1, 3, 32, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pyramid_distance(decoded, images)
    assert torch.equal(inside, pyramid_distance(decoded, images))


# ---- the choice between them

def test_the_manifest_line_says_what_is_used(files):
    cpu = torch.device("cpu")
    assert perceptual_distance(PerceptualConfig(), cpu) == (None, "off")
    assert perceptual_distance(PerceptualConfig(weight=1.0), cpu)[1].startswith("pyramid")
    chosen = PerceptualConfig(weight=1.0, kind="lpips", files=(str(files["vgg"]), str(files["heads"])))
    distance, said = perceptual_distance(chosen, cpu)
    assert isinstance(distance, Lpips) and said.startswith("lpips: VGG16 (vgg.pth sha256 ") and "heads.pth" in said
    assert str(files["vgg"].parent) not in said


@pytest.mark.parametrize("change, message", [
    ({"weight": -1.0}, "weight: -1.0"), ({"kind": "lpips"}, r"files: \[\]; valid for lpips"),
    ({"kind": "lpips", "files": ("a", "b", "c")}, "valid for lpips"), ({"files": ("a",)}, "valid for pyramid: none"),
])
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PerceptualConfig(**change)
