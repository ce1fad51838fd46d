"""Inception in the FID form: the graph of pytorch-fid and torch-fidelity, the published file's names, its logits."""
import numpy as np
import pytest
import torch
from torch import nn

from eval.features.inception import InceptionFeatures, InceptionV3, load_inception, network_input


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    """Random weights under which no layer's values vanish, and statistics that are not those of initialisation."""
    random = torch.Generator().manual_seed(0)
    network = InceptionV3().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=random) * (2 / fan) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.8, 1.2), (module.bias, -0.1, 0.1),
                                      (module.running_mean, -0.1, 0.1), (module.running_var, 0.8, 1.2)):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=random))
    return network


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> str:
    """A file as the published one: tensors under its names, without counters of batches."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return str(path)


@torch.no_grad()
def test_equal_to_pytorch_fid(network, weights, monkeypatch):
    """The network of pytorch-fid with the same weights, by its own strict loading: 1e-4 of the spread."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True))
    peer = theirs.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    x = torch.randn(2, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    expected, found = peer(x)[0][:, :, 0, 0], network.pooled(x)
    assert found.shape == (2, 2048) and expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


@torch.no_grad()
def test_equal_to_torch_fidelity(network, weights):
    """Features and unbiased logits of torch-fidelity, which writes the graph out a second time."""
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    images = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    expected, logits = peer(images)
    found = network.pooled(network_input(images.float() / 127.5 - 1))
    assert (found - expected).abs().max() <= 1e-4 * expected.std()
    assert (network.logits(found) - logits).abs().max() <= 1e-4 * logits.std()


def test_images_are_resized_as_clean_fid_does():
    """Each channel by Pillow's cubic filter in float, then (pixel - 128) / 128."""
    from PIL import Image
    for side in (64, 512):
        pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3)).astype(np.uint8)
        found = network_input(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        for channel in range(3):
            image = Image.fromarray(pixels[..., channel].astype(np.float32))
            expected = np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_allclose(found[channel], (expected - 128) / 128, rtol=0, atol=1e-3)
    aliased = network_input(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1, "bilinear")[0]
    assert aliased.std() > 1.3 * found.std()  # noise is averaged by the one and kept by the other


def test_features_say_how_they_were_made_and_take_images_in_any_grouping(weights):
    features = InceptionFeatures(weights)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    found = features(images)
    assert found.shape == (3, 2048) and found.dtype == torch.float32
    torch.testing.assert_close(features(images[2:]), found[2:], rtol=1e-4, atol=1e-5)
    assert features.logits(found).shape == (3, 1008)
    assert "InceptionV3" in features.stamp and "sha256" in features.stamp and "antialiased" in features.stamp
    assert InceptionFeatures(weights, resize="bilinear").stamp != features.stamp
    with pytest.raises(ValueError, match="1 of 3 hold NaN or infinity, the first is number 1"):
        features(images.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(ValueError, match=r"valid: floating \(B, 3, H, W\)"):
        features(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"values from 0 to 255; valid: \[-1, 1\]"):
        features(torch.linspace(0, 255, 3 * 64).view(1, 3, 8, 8))


def test_weights_that_do_not_fit_are_named(network, tmp_path):
    state = dict(network.state_dict())
    state["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(1)
    state["AuxLogits.fc.weight"] = torch.zeros(1)
    del state["fc.bias"]
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"missing fc.bias; unexpected AuxLogits.fc.weight; Mixed_7c.branch_pool.conv."
                                         r"weight is \(1,\), expected \(192, 2048, 1, 1\)"):
        load_inception(path)
    torch.save({"a": print}, path)
    with pytest.raises(ValueError, match="holds more than tensors, which is not executed"):
        load_inception(path)
    with pytest.raises(ValueError, match="no weights file .*; valid: pt_inception-2015-12-05"):
        load_inception(tmp_path / "none.pth")
