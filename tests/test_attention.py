"""Attention equals its definition in every form; masks, QK-norm, and the cache of a context."""

import math

import pytest
import torch

from model import attention as module
from model.attention import ContextCache, CrossAttention, SelfAttention, attention, uses_fused_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks left at their initial weights have the same ones in every run."""
    torch.manual_seed(0)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        scores = k[b, h] @ q[b, h, n] / math.sqrt(q.shape[-1])
        kept = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[b, 0, -1]
        weights = (scores[kept] - scores[kept].max()).exp()
        out[b, h, n] = weights / weights.sum() @ v[b, h, kept]
    return out


def last_masked(batch: int, keys: int) -> torch.Tensor:
    """(B, 1, 1, M): image b may attend to all keys but the last b."""
    return torch.arange(keys)[None, None, None] < keys - torch.arange(batch)[:, None, None, None]


# (queries, keys) on both sides of each limit of the table, with and without gradients
@pytest.mark.parametrize("queries, keys", [(4, 3), (64, 24), (4, 300)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_is_its_definition(queries, keys, masked, gradients):
    q, k, v = draw(2, 2, queries, 8, seed=1), draw(2, 2, keys, 8, seed=2), draw(2, 2, keys, 8, seed=3)
    mask = last_masked(2, keys) if masked else None
    out = attention(q.requires_grad_(gradients), k, v, mask)
    torch.testing.assert_close(out.detach().double(), by_definition(q.detach(), k, v, mask), atol=2e-6, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_both_forms_agree_in_values_and_gradients(masked, dtype, tolerance):
    results = []
    for form in (torch.nn.functional.scaled_dot_product_attention, module.written_out_attention):
        q, k, v = (draw(2, 4, n, 32, seed=n, dtype=dtype).requires_grad_() for n in (64, 24, 24))
        out = form(q, k, v, last_masked(2, 24) if masked else None)
        out.backward(draw(*out.shape, seed=7, dtype=dtype))
        results.append([out, q.grad, k.grad, v.grad])
    for fused, written in zip(*results, strict=True):
        assert fused.dtype == written.dtype == dtype
        error = (fused.float() - written.float()).abs().max()
        assert error <= tolerance * fused.float().abs().max()


def test_form_is_chosen_by_device_type_length_and_gradients():
    assert uses_fused_kernel(CUDA, torch.bfloat16, 64, 64, True)
    assert not uses_fused_kernel(CPU, torch.bfloat16, 256, 256, True)
    assert uses_fused_kernel(CPU, torch.bfloat16, 256, 256, False)
    assert uses_fused_kernel(CPU, torch.float32, 256, 256, True)
    assert not uses_fused_kernel(CPU, torch.float32, 1024, 24, False)
    assert uses_fused_kernel(CPU, torch.float32, 16, 24, False)
    assert uses_fused_kernel(CPU, torch.float64, 64, 64, True)  # not in the table


def test_masked_keys_change_nothing():
    layer = CrossAttention(16, heads=2, context_width=12)
    x, context = draw(2, 40, 16), draw(2, 30, 12, seed=1)
    mask = module.key_mask(last_masked(2, 30)[:, 0, 0], 2, 30)
    changed = torch.where(mask[:, 0, 0, :, None], context, 100.0)
    with torch.no_grad():
        assert torch.equal(layer(x, *layer.keys_values(context), mask), layer(x, *layer.keys_values(changed), mask))
        assert not torch.equal(layer(x, *layer.keys_values(context)), layer(x, *layer.keys_values(changed)))


def test_self_attention_is_equivariant_to_a_permutation_of_its_tokens():
    layer, x, order = SelfAttention(16, heads=4, qk_norm=True), draw(1, 20, 16), torch.randperm(20)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_qk_norm_equals_diffusers(masked):
    """The same weights in their attention with RMSNorm on queries and keys."""
    processor = pytest.importorskip("diffusers.models.attention_processor")
    layer = CrossAttention(24, heads=3, context_width=10, qk_norm=True)
    theirs = processor.Attention(24, cross_attention_dim=10, heads=3, dim_head=8, qk_norm="rms_norm", eps=1e-6)
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            norm.weight.add_(draw(8, seed=5))
        theirs.to_q.weight.copy_(layer.q.weight), theirs.norm_q.weight.copy_(layer.q_norm.weight)
        theirs.to_k.weight.copy_(layer.kv.weight[:24]), theirs.norm_k.weight.copy_(layer.k_norm.weight)
        theirs.to_v.weight.copy_(layer.kv.weight[24:])
        theirs.to_out[0].load_state_dict(layer.out.state_dict())
    x, context = draw(2, 50, 24), draw(2, 30, 10, seed=1)
    mask = last_masked(2, 30) if masked else None
    expected = theirs(x, context, None if mask is None else mask[:, 0])
    assert (layer(x, *layer.keys_values(context), mask) - expected).abs().max() <= 1e-5 * expected.std()


def test_qk_norm_takes_the_size_of_queries_and_keys_away():
    plain, normed = SelfAttention(16, heads=2), SelfAttention(16, heads=2, qk_norm=True)
    x = draw(1, 20, 16)
    differences = []
    for layer in (normed, plain):
        with torch.no_grad():
            before = layer(x)
            layer.qkv.weight[:32] *= 50.0  # queries and keys, not values
            differences.append((layer(x) - before).abs().max())
    assert differences[0] < 1e-4 and differences[1] > 1e-2


@pytest.mark.parametrize("mask, message", [
    (torch.ones(2, 4), r"mask: torch.float32 \(2, 4\); valid: torch.bool \(2, 5\)"),
    (torch.ones(2, 4, dtype=torch.bool), r"valid: torch.bool \(2, 5\)"),
    (torch.tensor([[True] * 5, [False] * 5]), r"rows \[1\] have no real token"),
])
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        module.key_mask(mask, 2, 5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width: 10 does not divide into 4 heads"):
        SelfAttention(10, heads=4)


class TestContextCache:
    def layers(self) -> list[CrossAttention]:
        return [CrossAttention(16, heads=2, context_width=12, qk_norm=True) for _ in range(2)]

    def test_holds_what_the_layers_compute(self):
        layers, context = self.layers(), draw(3, 5, 12)
        cache = ContextCache.of(layers, context, None, 0)
        cache.check(layers, draw(3, 4, 16), 0)
        for layer, pair in zip(layers, cache.layers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, layer.keys_values(context), strict=True))

    @pytest.mark.parametrize("change", ["optimizer", "load", "in place", "replaced", "norm"])
    def test_is_refused_after_a_change_of_weights(self, change):
        layers, x = self.layers(), draw(2, 4, 16)
        cache = ContextCache.of(layers, draw(2, 5, 12), None, 0)
        weight = layers[1].kv.weight
        if change == "optimizer":
            weight.grad = torch.ones_like(weight)
            torch.optim.AdamW([weight]).step()
        elif change == "load":
            layers[1].load_state_dict(layers[1].state_dict())
        elif change == "in place":
            with torch.no_grad():
                weight.mul_(2.0)
        elif change == "replaced":
            layers[1].kv = torch.nn.Linear(12, 32, bias=False)
        else:
            with torch.no_grad():
                layers[0].k_norm.weight.add_(1.0)
        with pytest.raises(ValueError, match="cache: stale"):
            cache.check(layers, x, 0)

    def test_is_refused_by_other_layers_another_batch_and_another_precision(self):
        layers, x = self.layers(), draw(2, 4, 16)
        cache = ContextCache.of(layers, draw(2, 5, 12), None, 0)
        with pytest.raises(ValueError, match="cache: stale"):
            cache.check(self.layers(), x, 0)
        with pytest.raises(ValueError, match="made for a batch of 2, used with 3"):
            cache.check(layers, draw(3, 4, 16), 0)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast None"):
            cache.check(layers, x, 0)
