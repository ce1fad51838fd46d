"""Multi-head attention, and the keys and values of a fixed context.

Axis letters: B batch, N queries, M keys, L context tokens, h heads, d width of a head, C = h d channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Which form is faster on a CPU, measured (AMD EPYC, 2 cores, torch 2.15): the fused kernel's time over that of
# matmul, softmax, matmul, for queries x keys with heads 32 to 64 wide; above 1 the written-out form wins.
#
#                        64x64  256x24  256x77  256x256  1024x24  1024x77  1024x1024
#   float32,  forward     1.2     1.7     1.3     0.4       1.7      1.1       0.4
#   float32,  + backward  1.4     1.5     1.3     0.6       1.6      1.1       0.6
#   bfloat16, forward     1.4     1.4     1.5     1.2       1.0      1.4       0.8
#   bfloat16, + backward  4.3     3.4     2.8     2.0       1.4      2.0       0.9
#
# So the number of keys decides. Below about a thousand scores at a small batch the number of calls matters more (16x24:
# 0.6 forward in float32), so sampling uses the fused kernel there; training batches do not (16x40, batch 64, bfloat16
# with backward: 3.8). The batch must not decide, or the bits of an image would depend on its neighbours.
WRITTEN_OUT_KEYS = {  # (dtype, gradients): the largest number of keys for the written-out form
    (torch.float32, False): 77,
    (torch.float32, True): 77,
    (torch.bfloat16, False): 128,
    (torch.bfloat16, True): 256,
}
WRITTEN_OUT_SCORES = 1024  # the smallest number of scores, queries times keys, for it without gradients


def uses_fused_kernel(device: torch.device, dtype: torch.dtype, queries: int, keys: int, gradients: bool) -> bool:
    """Whether attention uses `scaled_dot_product_attention`. This is the only place that chooses its form."""
    if device.type != "cpu" or (not gradients and queries * keys < WRITTEN_OUT_SCORES):
        return True
    return keys > WRITTEN_OUT_KEYS.get((dtype, gradients), 0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1) in the form that is faster for these sizes.

    q (B, h, N, d); k, v (B, h, M, d); mask bool, broadcastable to (B, h, N, M), True = may be attended to; every
    query needs at least one True. No mask is faster than one that is True everywhere. Returns (B, h, N, d).
    """
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if uses_fused_kernel(q.device, q.dtype, q.shape[-2], k.shape[-2], gradients):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return written_out_attention(q, k, v, mask)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same attention as two matrix products and a softmax; arguments and result as for `attention`."""
    return attention_weights(q, k, mask).to(v.dtype) @ v  # (B, h, N, d)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)), (B, h, N, M): the weight of each key for each query; arguments as for `attention`."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (B, h, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    # a row of 16 fills one vector in fp32 but half of one in bf16, which takes four times as long
    narrow = scores.device.type == "cpu" and scores.dtype == torch.bfloat16 and scores.shape[-1] == 16
    return scores.softmax(dim=-1, dtype=torch.float32 if narrow else None)


def key_mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """A padding mask (B, L), True = real token, reshaped to the (B, 1, 1, L) that `attention` takes.

    Raises ValueError for another shape or type. On a CPU, where looking at the values costs no synchronisation, it
    also raises ValueError for a row without a real token, whose attention would be undefined.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != (batch, length):
        raise ValueError(
            f"mask: {mask.dtype} {tuple(mask.shape)}; valid: torch.bool {(batch, length)}, True = real token"
        )
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(mask.any(dim=1).all()):
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"mask: rows {empty} have no real token; valid: at least one True in every row")
    return mask[:, None, None, :]


def check_heads(width: int, heads: int, name: str = "width") -> None:
    """Raises ValueError unless `heads` divides `width`."""
    if heads < 1 or width % heads:
        raise ValueError(f"{name}: {width} does not divide into {heads} heads; valid: a multiple of the heads")


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the width of a head. It returns the type of its input even if the weights have another one
    (autocast).

    On queries and keys it bounds the scores whatever the size of the weights (Dehghani et al. 2023, section 2).
    """

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, N, d) -> (B, h, N, d)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class _Heads(nn.Module):
    """The parts that self- and cross-attention share: splitting into heads, QK-norm and the output projection.

    `split` and `merge` run in every layer of every sampling step, so they use views and not einops, which takes
    longer to parse its pattern than a view takes.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.out = nn.Linear(width, width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else None
        self.k_norm = HeadNorm(width // heads) if qk_norm else None

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts C) -> `parts` tensors (B, h, N, d), views of x."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x: Tensor) -> Tensor:
        """(B, h, N, d) -> (B, N, C), after the output projection."""
        return self.out(x.transpose(1, 2).flatten(2))


class SelfAttention(_Heads):
    """Every token attends to every token of its sequence; one matrix product computes queries, keys and values."""

    def __init__(self, width: int, heads: int, bias: bool = False, qk_norm: bool = False):
        super().__init__(width, heads, qk_norm)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C); mask as for `attention`. Returns (B, N, C)."""
        q, k, v = self.split(self.qkv(x), 3)  # each (B, h, N, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.merge(attention(q, k, v, mask))


class CrossAttention(_Heads):
    """Image tokens attend to a context. Keys and values of the context are arguments, so that the caller can cache
    them."""

    def __init__(self, width: int, heads: int, context_width: int, qk_norm: bool = False):
        super().__init__(width, heads, qk_norm)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)
        self.watch: Callable[[Tensor], None] | None = None  # receives the weights (B, h, N, L), see attention_maps.py

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, L, D) -> keys and values, each (B, h, L, d)."""
        k, v = self.split(self.kv(context), 2)
        return (k if self.k_norm is None else self.k_norm(k)), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C); k, v from `keys_values`; mask (B, 1, 1, L) or None. Returns (B, N, C)."""
        (q,) = self.split(self.q(x), 1)  # (B, h, N, d)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.watch is not None:
            self.watch(attention_weights(q, k, mask))
        return self.merge(attention(q, k, v, mask))


class ContextPool(nn.Module):
    """The mean of the real tokens of a context, through a matrix that starts at zero, for the time embedding.

    In this way the content of the whole prompt reaches every residual block without passing through attention
    (Ramesh et al. 2022, section 2.1; Podell et al. 2023). The mean is used instead of the end token because it is a bag
    of words from the first step on, before any layer has learned to gather them, and because it is defined for prompts
    of several chunks.
    """

    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.linear = nn.Linear(context_width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """context (B, L, D); mask bool (B, L), True = real token, None = all real. Returns (B, width)."""
        if mask is None:
            return self.linear(context.mean(dim=1))
        real = context.masked_fill(~mask[..., None], 0.0).sum(dim=1)  # (B, D)
        return self.linear(real / mask.sum(dim=1, keepdim=True))


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@dataclass(frozen=True)
class ContextCache:
    """Keys and values of one context for every cross-attention layer, in the order in which the layers run.

    A prompt does not change between the steps of a sampler, so its keys and values do not either. The caller owns
    the object and passes it to every step in place of the context. `check` refuses a cache that may differ from what
    the layers would compute. It cannot detect weights that were written through `.data`, or a fused optimizer that
    steps without the network ever entering training mode; after either the caller must make a new cache.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]  # (B, h, L, d) each
    pooled: Tensor | None  # (B, width of the time embedding)
    mask: Tensor | None  # (B, 1, 1, L)
    batch: int
    autocast: torch.dtype | None
    trainings: int
    weights: tuple[tuple[Tensor, int, int], ...]  # parameter, its address, its version

    @classmethod
    def of(cls, layers: list[CrossAttention], context: Tensor, mask: Tensor | None, trainings: int,
           pool: ContextPool | None = None) -> "ContextCache":
        """The keys and values of `context` (B, L, D), mask (B, L) or None, in every layer, and the output of `pool` for
        it.

        trainings counts how often the network that owns the layers has entered training mode.
        """
        batch, length = context.shape[:2]
        return cls(
            layers=tuple(layer.keys_values(context) for layer in layers),
            pooled=None if pool is None else pool(context, mask),
            mask=key_mask(mask, batch, length),
            batch=batch,
            autocast=_autocast_dtype(context.device),
            trainings=trainings,
            weights=tuple((p, p.data_ptr(), p._version) for p in _context_weights(layers, pool)),
        )

    def last(self, count: int) -> "ContextCache":
        """The cache of the last `count` contexts of the batch, as views."""
        return replace(self, layers=tuple((k[-count:], v[-count:]) for k, v in self.layers), batch=count,
                       pooled=None if self.pooled is None else self.pooled[-count:],
                       mask=None if self.mask is None else self.mask[-count:])

    def check(self, layers: list[CrossAttention], x: Tensor, trainings: int, pool: ContextPool | None = None) -> None:
        """Raises ValueError unless the cache fits the batch x (B, ...) and the weights are those it was made from.

        Loading, averaging, merging and most optimizers advance autograd's version of a tensor, and a replaced tensor
        has another identity or address. Fused optimizers do not advance the version, so the number of trainings is
        compared too.
        """
        if x.shape[0] != self.batch:
            raise ValueError(f"cache: made for a batch of {self.batch}, used with {x.shape[0]}; valid: equal batches")
        if _autocast_dtype(x.device) != self.autocast:
            raise ValueError(
                f"cache: made under autocast {self.autocast}, used under {_autocast_dtype(x.device)}; valid: the same"
            )
        if torch.compiler.is_compiling():  # a compiled graph cannot read addresses and versions
            return
        now = _context_weights(layers, pool)
        same = len(now) == len(self.weights) and all(
            p is q and q.data_ptr() == address and q._version == version
            for p, (q, address, version) in zip(now, self.weights, strict=True)
        )
        if not same or trainings != self.trainings:
            raise ValueError("cache: stale, the weights may have changed since; valid: a new context_cache()")


def _context_weights(layers: list[CrossAttention], pool: ContextPool | None) -> list[Tensor]:
    """The parameters on which keys, values and the pooled vector of a context depend."""
    modules = [m for m in (*(m for layer in layers for m in (layer.kv, layer.k_norm)), pool) if m is not None]
    return [p for module in modules for p in module.parameters()]
