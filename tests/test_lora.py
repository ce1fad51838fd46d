"""Adapters as changes of weights: each product against its formula, zero at the start, merged and taken out."""
import pytest
import torch
from torch import nn
from torch.func import functional_call

from model.lora import PRODUCTS, Adapter, AdapterConfig, Delta, Place, Stack, new_adapter, places_of
from model.packed import Conv2d
from model.pretrained.card import hash_of_networks
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig

KINDS = [("lora", False), ("lora", True), ("loha", False), ("lokr", False), ("lokr", True)]
ALL = ("attention", "feed_forward", "projection", "convolution", "time")


@pytest.fixture(scope="module", params=[True, False], ids=["linear", "pointwise"])
def networks(request) -> dict[str, nn.Module]:
    """A small UNet, whose projections are linear layers or convolutions of one pixel, and a small text encoder."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=(16, 32), blocks=1, attention=(True, False), head_width=8, context_width=16,
                           norm_groups=4, linear_projection=request.param))
    text = TextEncoder(TextEncoderConfig(vocab_size=50, length=8, width=16, layers=1, heads=2, mlp_width=32))
    for network in (unet, text):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
        network.eval().requires_grad_(False)
    return {"unet": unet, "text_encoder": text}


def trained(networks: dict[str, nn.Module], kind: str = "lora", decompose: bool = False, seed: int = 0, **settings):
    """An adapter whose change is not zero."""
    torch.manual_seed(seed)
    adapter = new_adapter(networks, AdapterConfig(kind, decompose, 3, 2.0, ALL, True, **settings))
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return adapter.requires_grad_(False)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randint(0, 50, (2, 8))


def output(networks: dict[str, nn.Module], x, t, ids) -> torch.Tensor:
    with torch.no_grad():
        return networks["unet"](x, t, networks["text_encoder"](ids))


def test_every_layer_is_a_place_and_fused_projections_are_several(networks):
    places = list(places_of(networks))
    unet = networks["unet"]
    assert Place("unet", "conv_in") in places and Place("text_encoder", "layers.0.linear2") in places
    assert [place.part for place in places if place.module.endswith("blocks.0.self_attention.qkv")][:3] == [0, 1, 2]
    assert [place.part for place in places if place.module.endswith("blocks.0.cross_attention.kv")][:2] == [0, 1]
    layers = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for network in networks.values()
                 for module in network.modules())
    fused = sum(name.endswith((".qkv", ".kv")) for network in networks.values() for name, _ in network.named_modules())
    assert len({(place.network, place.module) for place in places}) == layers and fused > 3
    assert {p.module for p in places if p.network == "unet"} >= {  # convolutions of every class
        name for name, module in unet.named_modules() if isinstance(module, (Conv2d, nn.Conv2d))}
    adapter = new_adapter(networks, AdapterConfig(targets=ALL, text_encoder=True))
    assert list(adapter.places) == places  # every layer belongs to a target


@pytest.mark.parametrize("kind, decompose", KINDS)
def test_a_new_adapter_changes_nothing_and_has_gradients(networks, kind, decompose):
    torch.manual_seed(1)
    adapter = new_adapter(networks, AdapterConfig(kind, decompose, rank=3, targets=ALL, text_encoder=True))
    weights = adapter.weights("unet", networks["unet"])
    for name, weight in weights.items():
        base = networks["unet"].get_parameter(name)
        torch.testing.assert_close(weight, base, atol=1e-6 if decompose else 0, rtol=0)
    x, t, ids = inputs()
    context = functional_call(networks["text_encoder"], adapter.weights("text_encoder", networks["text_encoder"]), ids)
    functional_call(networks["unet"], weights, (x, t, context)).square().mean().backward()
    for place, delta in adapter.items():
        assert any(bool(p.grad is not None and p.grad.abs().max() > 0) for p in delta.parameters()), place
    assert all(p.grad is None for network in networks.values() for p in network.parameters())


@pytest.mark.parametrize("kind, decompose", KINDS)
def test_merged_is_what_training_computed_and_scale_is_linear(networks, kind, decompose):
    adapter = trained(networks, kind, decompose)
    x, t, ids = inputs()
    with torch.no_grad():
        context = functional_call(networks["text_encoder"],
                                  adapter.weights("text_encoder", networks["text_encoder"]), ids)
        expected = functional_call(networks["unet"], adapter.weights("unet", networks["unet"]), (x, t, context))
    before = {name: p.clone() for name, p in networks["unet"].named_parameters()}
    with Stack(networks) as stack:
        stack.set([(adapter, 1.0)])
        torch.testing.assert_close(output(networks, x, t, ids), expected, atol=1e-5, rtol=1e-5)
        whole = {name: p - before[name] for name, p in networks["unet"].named_parameters()}
        stack.set([(adapter, 0.5)])
        for name, parameter in networks["unet"].named_parameters():
            torch.testing.assert_close(parameter - before[name], 0.5 * whole[name], atol=1e-6, rtol=1e-4)


def test_several_are_added_and_taken_out_bit_for_bit(networks):
    first, second = trained(networks), trained(networks, "lokr", True, seed=1)
    x, t, ids = inputs()
    before, bits = output(networks, x, t, ids), hash_of_networks(networks)
    weight = networks["unet"].conv_in.weight
    base = weight.clone()
    stack = Stack(networks)
    changes = []
    for adapters in ([(first, 0.7)], [(second, -0.4)], [(first, 0.7), (second, -0.4)]):
        stack.set(adapters)
        changes.append(weight - base)
        assert hash_of_networks(networks) != bits and not torch.equal(output(networks, x, t, ids), before)
    torch.testing.assert_close(changes[2], changes[0] + changes[1], atol=1e-6, rtol=1e-5)
    stack.set([(first, 0.0)])
    assert hash_of_networks(networks) == bits  # scale 0 is the base
    stack.set([(first, 1.0)])
    stack.remove()
    assert hash_of_networks(networks) == bits and torch.equal(output(networks, x, t, ids), before)
    assert not stack.kept


def test_an_error_inside_a_block_takes_adapters_out(networks):
    bits = hash_of_networks(networks)
    with pytest.raises(RuntimeError), Stack(networks) as stack:
        stack.set([(trained(networks), 1.0)])
        raise RuntimeError
    assert hash_of_networks(networks) == bits


def test_products_equal_their_formulas():
    torch.manual_seed(0)
    r, o, i, k = 2, 6, 4, 3
    down, up, mid = torch.randn(r, i, k, k), torch.randn(o, r, 1, 1), torch.randn(r, r, k, k)
    expected = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    torch.testing.assert_close(PRODUCTS["lora"].of({"up": up, "down": down}), expected.flatten(1))
    narrow = torch.randn(r, i, 1, 1)
    expected = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, narrow[:, :, 0, 0])
    torch.testing.assert_close(PRODUCTS["lora"].of({"up": up, "down": narrow, "mid": mid}), expected.flatten(1))
    a, b = torch.randn(2, o, r), torch.randn(2, r, i * k * k)
    torch.testing.assert_close(
        PRODUCTS["loha"].of({"w1_a": a[0], "w1_b": b[0], "w2_a": a[1], "w2_b": b[1]}), (a[0] @ b[0]) * (a[1] @ b[1]))
    w1, w2 = torch.randn(3, 2), torch.randn(2, 2, k, k)
    blocks = torch.cat([torch.cat([w1[p, q] * w2 for q in range(2)], dim=1) for p in range(3)])  # (6, 4, k, k)
    torch.testing.assert_close(PRODUCTS["lokr"].of({"w1": w1, "w2": w2}), blocks.flatten(1))


def test_magnitudes_are_the_lengths_of_rows_or_of_columns():
    torch.manual_seed(0)
    weight, down, up = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    for magnitude in (torch.rand(6, 1) + 0.5, torch.rand(1, 4) + 0.5):
        delta = Delta("lora", {"down": down, "up": up}, 1.0, magnitude)
        changed = weight + delta(weight)
        axis = 1 if magnitude.shape[0] == 6 else 0
        torch.testing.assert_close(changed.norm(dim=axis, keepdim=True), magnitude)
        direction = weight + 0.5 * up @ down
        torch.testing.assert_close(nn.functional.cosine_similarity(changed, direction, dim=axis),
                                   torch.ones(6 if axis else 4))


def test_changes_are_not_rounded_under_autocast(networks):
    adapter = trained(networks)
    plain = adapter.weights("unet", networks["unet"])["conv_in.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter.weights("unet", networks["unet"])["conv_in.weight"], plain)


def test_settings_that_are_not_valid():
    for settings, message in (({"rank": 0}, "rank: 0; valid: from 1 up"), ({"alpha": 0}, "alpha: 0; valid: above 0"),
                              ({"targets": ()}, "targets: none; valid: some of attention"),
                              ({"block": -1}, "block: -1; valid")):
        with pytest.raises(ValueError, match=message):
            AdapterConfig(**settings)
    networks = {"unet": nn.Sequential(nn.Linear(2, 2))}
    with pytest.raises(ValueError, match="targets: attention; valid: layers that the networks have"):
        new_adapter(networks, AdapterConfig(targets=("attention",)))
    with pytest.raises(ValueError, match="lora without up"):
        Delta("lora", {"down": torch.zeros(2, 4)}).check(torch.zeros(6, 4))
    with pytest.raises(ValueError, match=r"up \(5, 2\) make \(5, 4\); valid: \(6, 4\)"):
        Delta("lora", {"down": torch.zeros(2, 4), "up": torch.zeros(5, 2)}).check(torch.zeros(6, 4))


def test_an_adapter_of_small_layers_has_their_rank(networks):
    adapter: Adapter = new_adapter(networks, AdapterConfig(rank=100, alpha=50, targets=ALL))
    assert {delta.rank for _, delta in adapter.items()} <= set(range(1, 101)) and adapter.deltas[0].factor == 0.5
