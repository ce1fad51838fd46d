"""The UNet's input for guidance, and deep features that are used again."""
from dataclasses import replace

import pytest
import torch
from random_weights import randomize

from diffusion.guidance import GuidanceConfig
from diffusion.guidance_free import beta_of_uniform, check_folded, check_scales, guidance_free
from model.unet import DeepFeatures, UNet, UNetConfig

CONFIG = UNetConfig(channels=(16, 32), attention=(True, True), head_width=8, context_width=12, norm_groups=8)


def inputs(batch: int = 2):
    random = torch.Generator().manual_seed(0)
    return (torch.randn(batch, 4, 8, 8, generator=random), torch.tensor([17, 500])[:batch],
            torch.randn(batch, 6, 12, generator=random))


def test_a_network_begins_as_the_one_without_the_input():
    """Same weights elsewhere, same bits, at every beta; and after a change of the last layer beta matters."""
    plain = randomize(UNet(CONFIG)).eval()
    folded = UNet(replace(CONFIG, guidance_input=True)).eval()
    missing = folded.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing.missing_keys} == {"guidance"} and not missing.unexpected_keys
    x, t, context = inputs()
    for beta in (None, torch.tensor([0.2, 1.0])):
        assert torch.equal(folded(x, t, context, beta=beta), plain(x, t, context))
    torch.nn.init.normal_(folded.guidance.linear2.weight)
    there = folded(x, t, context, beta=torch.tensor([0.2, 0.5]))
    assert (there - plain(x, t, context)).abs().amax((1, 2, 3)).min() > 1e-3
    one = folded(x, t, context, beta=torch.ones(2))
    assert torch.equal(one, folded(x, t, context))  # without a beta it is not guided
    biases = folded.time_biases(t[:1], torch.tensor([0.2]))
    alone = folded(x[:1], t[:1], context[:1], beta=torch.tensor([0.2]))
    assert torch.equal(folded(x[:1], t[:1], context[:1], time_biases=biases), alone)


def test_a_network_without_the_input_refuses_beta():
    x, t, context = inputs()
    with pytest.raises(ValueError, match="beta: given to a network without guidance_input"):
        UNet(CONFIG)(x, t, context, beta=torch.ones(2))


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, channels=(16,), attention=(True,), blocks=1),
                                    replace(CONFIG, attention=(False, True), depth=2)],
                         ids=["two levels", "one level", "no attention on top"])
@torch.no_grad()
def test_deep_features_are_used_again(config):
    """A full call that keeps them has the same bits as one that does not. With kept ones, the same input gives the same
    output, and another input changes it through the last block alone."""
    unet = randomize(UNet(config)).eval()
    x, t, context = inputs()
    deep = DeepFeatures()
    whole = unet(x, t, context)
    assert torch.equal(unet(x, t, context, deep=deep), whole) and deep.features is not None
    torch.testing.assert_close(unet(x, t, context, deep=deep), whole)
    biases = [bias for bias in unet.time_biases(t)]
    torch.testing.assert_close(unet(x, t, context, time_biases=biases, deep=deep), whole)
    other = x + 0.1
    close, exact = unet(other, t, context, deep=deep), unet(other, t, context)
    assert not torch.equal(close, whole) and not torch.equal(close, exact)
    for module in (*unet.down, unet.mid, *unet.up[:-1]):
        module.forward = None  # no block before the last level is computed
    assert torch.equal(unet(other, t, context, deep=deep), close)


def test_guidance_free_training_has_its_minimum_at_the_guided_prediction():
    """beta eps_s + (1 - beta) eps_u is the conditional prediction if eps_s is the guided one; no gradient in eps_u."""
    random = torch.Generator().manual_seed(0)
    uncond, cond = (torch.randn(3, 2, 4, 4, generator=random) for _ in range(2))
    beta = torch.tensor([1.0, 0.5, 0.125])
    guided = uncond + (cond - uncond) / beta[:, None, None, None]
    weight = torch.ones((), requires_grad=True)
    found = guidance_free(lambda x, t: guided, lambda x, t: weight * uncond, beta)(uncond, beta)
    torch.testing.assert_close(found, cond)
    assert not found.requires_grad


def test_beta_covers_its_range():
    u = torch.linspace(0, 1, 11)
    scales = 1 / beta_of_uniform(u, (1.0, 5.0))
    assert torch.isclose(scales[0], torch.tensor(5.0)) and scales[-1] == 1.0 and (scales.diff() < 0).all()
    assert (beta_of_uniform(u, (3.0, 3.0)) == 1 / 3).all()


@pytest.mark.parametrize("scales", [(0.5, 2.0), (3.0, 2.0), (1.0, float("inf"))])
def test_scales_that_are_none_are_refused(scales):
    with pytest.raises(ValueError, match="guidance_scales: .*valid"):
        check_scales(scales)


@pytest.mark.parametrize("config, message", [
    (GuidanceConfig(6.0), "scale: value 6; valid: 2 .. 5"), (GuidanceConfig(1.0), "scale: value 1; valid: 2 .. 5"),
    (GuidanceConfig(3.0, method="apg"), "method: value apg; valid: cfg"),
    (GuidanceConfig(3.0, rescale=0.7), "rescale: value 0.7; valid: 0"),
    (GuidanceConfig(3.0, interval=(1.0, 2.0)), "interval: .*valid: None")])
def test_guidance_that_a_folded_network_cannot_follow_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_folded(config, (2.0, 5.0))
    check_folded(GuidanceConfig(3.0, interval=(1.0, 2.0)), (1.0, 5.0))
