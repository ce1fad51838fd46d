"""The denoiser: a UNet whose feature maps attend to the prompt; a configuration can shape it like SD-1.x or SD-2.x.

Rombach et al. 2022, section 3.3. Axis letters: B batch, C channels, H height, W width, L tokens, D context width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import ContextCache, ContextPool, CrossAttention, key_mask
from model.blocks import (
    Downsample,
    Positions,
    ResBlock,
    ScalarMLP,
    SpatialTransformer,
    TimeMLP,
    TransformerConfig,
    Upsample,
    call_with_checkpointing,
    check_groups,
    zero_init,
)
from model.norm import GroupNorm

EPS = 1e-5  # of every GroupNorm outside the transformers
Pairs = Iterator[tuple[Tensor, Tensor]]  # keys and values (B, heads, L, d) of the context, one pair a layer, in order
Time = Tensor | Iterator[Tensor]  # (B, 4 channels[0]), or what it adds in every residual block, (B or 1, c_out) each


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet; `channels` and `attention` have one entry for each level, the finest first."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2  # residual blocks of a level in the downward path; one more in the upward path
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels attend to the context
    mid_attention: bool = True
    depth: int = 1  # transformer blocks of a transformer
    head_width: int = 64
    heads: int | None = None  # if given, the number of heads at every level, whatever their width
    context_width: int = 768
    linear_projection: bool = True  # shape of the weights around a transformer: Linear, or 1x1 convolution as in SD-1.x
    norm_groups: int = 32
    qk_norm: bool = False
    positions: int = 0  # learned positions after conv_in, for latents of this side only; 0: none, any size
    pooled_context: bool = False  # the mean of the context is added to the time embedding, as in SDXL
    guidance_input: bool = False  # the time embedding also reads beta = 1 / guidance scale, for guidance folded in
    jump_input: bool = False  # the time embedding also reads how far the step goes, for a shortcut model
    dropout: float = 0.0
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "blocks", "depth", "head_width", "context_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: at least 1")
        if self.positions < 0:
            raise ValueError(f"positions: {self.positions}; valid: the side of the latent, or 0 for none")
        if not self.channels or len(self.attention) != len(self.channels):
            raise ValueError(f"attention: {self.attention}; valid: one entry for each of channels {self.channels}")
        if self.channels[0] % 2:
            raise ValueError(f"channels: {self.channels}; valid: an even first count, half sines and half cosines")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: {self.dropout}; valid: 0 <= dropout < 1")
        check_groups(self.channels, self.norm_groups)
        for level, width in enumerate(self.channels):
            if self.attends(level):
                self.heads_at(level)

    def attends(self, level: int) -> bool:
        """Whether there is a transformer on the channels of this level (those of the last level are also the
        middle's)."""
        return self.attention[level] or (level == len(self.channels) - 1 and self.mid_attention)

    def heads_at(self, level: int) -> int:
        """The number of heads of the transformers of a level. Raises ValueError if it does not divide the channels."""
        width = self.channels[level]
        if self.heads is not None:
            if self.heads < 1 or width % self.heads:
                raise ValueError(f"heads: {self.heads} does not divide {width} of channels {self.channels}")
            return self.heads
        if width % self.head_width:
            raise ValueError(f"head_width: {self.head_width} does not divide {width} of channels {self.channels}")
        return width // self.head_width

    @classmethod
    def sd1(cls) -> "UNetConfig":
        """Stable Diffusion 1.x: 859,520,964 parameters."""
        return cls(heads=8, context_width=768, linear_projection=False)

    @classmethod
    def sd2(cls) -> "UNetConfig":
        """Stable Diffusion 2.x: 865,910,724 parameters."""
        return cls(head_width=64, context_width=1024, linear_projection=True)


class DeepFeatures:
    """What the last block of a UNet received from all blocks before it, in the last full call of `UNet.forward`.

    It changes slowly from step to step, so that some calls may reuse it and compute the last block alone (Ma et al.
    2024, "DeepCache", arXiv 2312.00858; their shallowest branch). That is an approximation.
    """

    def __init__(self) -> None:
        self.features: Tensor | None = None


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer if the level attends."""

    def __init__(self, config: UNetConfig, level: int, widths: list[tuple[int, int]], transformers: int,
                 resample: nn.Module | None = None):
        super().__init__()
        c = config
        self.depth = c.depth
        self.gradient_checkpointing = c.gradient_checkpointing
        self.resblocks = nn.ModuleList(
            ResBlock(c_in, c_out, c.norm_groups, EPS, 4 * c.channels[0], c.dropout) for c_in, c_out in widths
        )
        self.transformers = nn.ModuleList(
            SpatialTransformer(c.channels[level], TransformerConfig(
                c.heads_at(level), c.depth, c.context_width, c.norm_groups, c.linear_projection, c.qk_norm, c.dropout))
            for _ in range(transformers)
        )
        self.resample = resample

    def block(self, index: int, x: Tensor, time: Time, pairs: Pairs, mask: Tensor | None) -> Tensor:
        """Residual block `index` and the transformer after it, (B, c_in, H, W) -> (B, c_out, H, W)."""
        at = (time, None) if isinstance(time, Tensor) else (None, next(time))
        x = call_with_checkpointing(self.resblocks[index], x, *at, recompute=self.gradient_checkpointing)
        if index < len(self.transformers):
            keys_values = tuple(islice(pairs, self.depth))
            x = call_with_checkpointing(self.transformers[index], x, keys_values, mask,
                                        recompute=self.gradient_checkpointing)
        return x


class DownLevel(Level):
    """A level of the downward path, which also keeps every result for the upward path."""

    def forward(self, x: Tensor, skips: list[Tensor], time: Time, pairs: Pairs, mask: Tensor | None) -> Tensor:
        """x (B, c_in, H, W); appends to `skips`. Returns (B, c_out, H/2, W/2), or (B, c_out, H, W) at the last
        level."""
        for index in range(len(self.resblocks)):
            x = self.block(index, x, time, pairs, mask)
            skips.append(x)
        if self.resample is not None:
            x = self.resample(x)
            skips.append(x)
        return x


class MidLevel(Level):
    """A residual block, a transformer and a second residual block at the coarsest resolution."""

    def forward(self, x: Tensor, time: Time, pairs: Pairs, mask: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        for index in range(len(self.resblocks)):
            x = self.block(index, x, time, pairs, mask)
        return x


class UpLevel(Level):
    """A level of the upward path, in which every block first concatenates one result of the downward path."""

    def forward(self, x: Tensor, skips: list[Tensor], time: Time, pairs: Pairs, mask: Tensor | None,
                kept: "DeepFeatures | None" = None) -> Tensor:
        """x (B, c_in, H, W); pops from `skips`. Returns (B, c_out, 2H, 2W), or (B, c_out, H, W) at the finest level.
        `kept`, at the finest level, is given what its last block receives from below."""
        last = len(self.resblocks) - 1
        for index in range(last):
            x = self.joined(index, x, skips, time, pairs, mask)
        if kept is not None:
            kept.features = x
        x = self.joined(last, x, skips, time, pairs, mask)
        return x if self.resample is None else self.resample(x)

    def joined(self, index: int, x: Tensor, skips: list[Tensor], time: Time, pairs: Pairs,
               mask: Tensor | None) -> Tensor:
        """Block `index` on x joined with the last of `skips`, (B, c_in, H, W) -> (B, c_out, H, W)."""
        return self.block(index, torch.cat([x, skips.pop()], dim=1), time, pairs, mask)


class UNet(nn.Module):
    """Predicts the noise (or x_0, or v) in a latent from the latent, the timestep and the prompt."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.trainings = 0  # how often training mode was entered
        channels, blocks, last = config.channels, config.blocks, len(config.channels) - 1

        self.time = TimeMLP(channels[0], 4 * channels[0])
        self.pool = ContextPool(config.context_width, 4 * channels[0]) if config.pooled_context else None
        self.guidance = ScalarMLP(channels[0], 4 * channels[0]) if config.guidance_input else None
        self.jump = ScalarMLP(channels[0], 4 * channels[0]) if config.jump_input else None
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.positions = Positions(config.positions, channels[0]) if config.positions else None
        self.down = nn.ModuleList()
        skips = [channels[0]]  # widths of the maps that the upward path concatenates
        for level, c in enumerate(channels):
            widths = [(skips[-1], c)] + [(c, c)] * (blocks - 1)
            skips += [c] * (blocks + (level < last))
            transformers = blocks if config.attention[level] else 0
            self.down.append(DownLevel(config, level, widths, transformers, Downsample(c) if level < last else None))

        c = channels[-1]
        self.mid = MidLevel(config, last, [(c, c), (c, c)], int(config.mid_attention))

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            widths = []
            for _ in range(blocks + 1):
                widths.append((c + skips.pop(), width))
                c = width
            transformers = blocks + 1 if config.attention[level] else 0
            self.up.append(UpLevel(config, level, widths, transformers, Upsample(c) if level else None))
        self.norm_out = GroupNorm(config.norm_groups, c, eps=EPS)
        self.conv_out = zero_init(nn.Conv2d(c, config.out_channels, 3, padding=1))

    def cross_attentions(self) -> list[CrossAttention]:
        """The layers that attend to the context, in the order in which they run."""
        levels = [*self.down, self.mid, *self.up]
        transformers = [transformer for level in levels for transformer in level.transformers]
        return [block.cross_attention for transformer in transformers for block in transformer.blocks]

    def train(self, mode: bool = True) -> "UNet":
        """As in every module, but entering training mode makes earlier caches of contexts stale."""
        self.trainings += mode
        return super().train(mode)

    def context_cache(self, context: Tensor, mask: Tensor | None = None) -> ContextCache:
        """Everything that the UNet computes from the prompt alone, to be passed as `cache` at every sampling step.

        context (B, L, context_width); mask bool (B, L), True = real token, or None. Raises ValueError for other
        shapes and in training mode.
        """
        if self.training:
            raise ValueError("cache: the network is in training mode; valid: after eval()")
        self.check_context(context)
        return ContextCache.of(self.cross_attentions(), context, mask, self.trainings, self.pool)

    def time_biases(self, t: Tensor, beta: Tensor | None = None, jump: Tensor | None = None) -> list[Tensor]:
        """The vectors that each time t (S,) adds in the residual blocks, (S, c_out) for each block; `forward` takes one
        row of each. beta and jump (S,) as in `forward`.

        They depend on nothing else, so a sampler computes those of all its steps at once. Raises ValueError for a
        network whose time embedding also reads the prompt.
        """
        if self.pool is not None:
            raise ValueError("time_biases: the time embedding of this network reads the prompt; valid: a UNet with "
                             "pooled_context: false")
        dtype = self.conv_in.weight.dtype
        time = self.time(t, dtype, *self.vectors_beside(t, beta, jump, dtype))  # (S, 4 channels[0])
        return [block.time(time) for level in (*self.down, self.mid, *self.up) for block in level.resblocks
                if block.time is not None]

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
                cache: ContextCache | None = None, time_biases: Sequence[Tensor] | None = None,
                beta: Tensor | None = None, deep: DeepFeatures | None = None, jump: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), t (B,) int or float, and either the prompt or its cache.

        context (B, L, context_width) with mask bool (B, L), True = real token, None = all real; or cache, from
        `context_cache`. Both give the same bits. time_biases: one row of what the method of that name returns,
        (B or 1, c_out) each, used in place of t, beta and jump. beta (B,): one over the guidance scale, for a network
        with `guidance_input`, which takes 1 if there is none. jump (B,): the length of the step as a share of all
        times, for a network with `jump_input`, which takes 0 if there is none. deep: features to reuse; empty ones are
        computed and kept.
        Returns (B, out_channels, H, W). Raises ValueError for other shapes, for a cache together with a context or in
        training mode, and for a cache that is older than the weights may be.
        """
        self.check_input(x, t)
        pairs, mask, pooled = self.context_parts(x, context, mask, cache)

        if time_biases is not None and self.pool is not None:
            raise ValueError("time_biases: given to a network whose time embedding reads the prompt; valid: None")
        time: Time = iter(time_biases) if time_biases is not None else self.time(
            t, x.dtype, pooled, *self.vectors_beside(t, beta, jump, x.dtype))
        x = self.conv_in(x)  # (B, channels[0], H, W)
        if self.positions is not None:
            x = self.positions(x)
        if deep is not None and deep.features is not None:
            x = self.shallow(x, deep.features, time, pairs, mask)
        else:
            x = self.whole(x, time, pairs, mask, deep)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, out_channels, H, W)

    def whole(self, x: Tensor, time: Time, pairs: Pairs, mask: Tensor | None, deep: DeepFeatures | None) -> Tensor:
        """All levels down and up again, (B, channels[0], H, W) -> the same shape; `deep` keeps what can be reused."""
        skips = [x]
        for down in self.down:
            x = down(x, skips, time, pairs, mask)
        x = self.mid(x, time, pairs, mask)
        for level, up in enumerate(self.up, start=1):
            x = up(x, skips, time, pairs, mask, deep if level == len(self.up) else None)
        return x

    def shallow(self, x: Tensor, features: Tensor, time: Time, pairs: Pairs, mask: Tensor | None) -> Tensor:
        """The last block alone, on `features` kept from another call."""
        up = self.up[-1]
        assert isinstance(up, UpLevel)
        of_block = iter(list(pairs)[-up.depth:]) if len(up.transformers) == len(up.resblocks) else iter(())
        biases = time if isinstance(time, Tensor) else iter(list(time)[-1:])
        return up.joined(len(up.resblocks) - 1, features, [x], biases, of_block, mask)

    def vectors_beside(self, t: Tensor, beta: Tensor | None, jump: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        """What beta (B,), 1 if it is None, and jump (B,), 0 if it is None, add to the time embedding, (B, 4
        channels[0]) each; none for a network without these inputs. Raises ValueError for one that it does not read."""
        found = []
        for name, given, read, default in (("beta", beta, self.guidance, 1.0), ("jump", jump, self.jump, 0.0)):
            if read is not None:
                found.append(read(torch.full_like(t, default, dtype=torch.float32) if given is None else given, dtype))
            elif given is not None:
                wanted = "guidance_input" if name == "beta" else "jump_input"
                raise ValueError(f"{name}: given to a network without {wanted}; valid: None")
        return found

    def check_input(self, x: Tensor, t: Tensor) -> None:
        """Raises ValueError unless x is (B, in_channels, H, W) with sizes that halve at every level, and t is (B,)."""
        multiple = 2 ** (len(self.config.channels) - 1)
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"x: {tuple(x.shape)}; valid: (B, {self.config.in_channels}, H, W), H and W multiples of {multiple}"
            )
        side = self.config.positions
        if side and x.shape[2:] != (side, side):
            raise ValueError(f"x: {tuple(x.shape)}; valid: (B, {self.config.in_channels}, {side}, {side}), the network "
                             "has learned positions for this size only")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: {tuple(t.shape)}; valid: {tuple(x.shape[:1])}, one timestep an image")

    def check_context(self, context: Tensor | None, batch: int | None = None) -> None:
        """Raises ValueError unless the context is (batch, L, context_width); any batch if `batch` is None."""
        width = self.config.context_width
        if context is None:
            raise ValueError(f"context: None; valid: (B, L, {width}) or a cache, this network attends to a prompt")
        if context.ndim != 3 or context.shape[2] != width or batch not in (None, context.shape[0]):
            raise ValueError(f"context: {tuple(context.shape)}; valid: ({'B' if batch is None else batch}, L, {width})")

    def context_parts(self, x: Tensor, context: Tensor | None, mask: Tensor | None,
                      cache: ContextCache | None) -> tuple[Pairs, Tensor | None, Tensor | None]:
        """Keys and values for every cross-attention in turn, their mask (B, 1, 1, L) or None, and the vector of the
        prompt for the time embedding, (B, 4 channels[0]) or None."""
        layers = self.cross_attentions()
        if cache is not None:
            if context is not None or mask is not None:
                raise ValueError("cache: given beside a context or a mask; valid: one or the other")
            if self.training:
                raise ValueError("cache: the network is in training mode; valid: after eval()")
            cache.check(layers, x, self.trainings, self.pool)
            return iter(cache.layers), cache.mask, cache.pooled
        if not layers and self.pool is None:
            return iter(()), None, None
        self.check_context(context, x.shape[0])
        assert context is not None
        pairs = [layer.keys_values(context) for layer in layers]
        pooled = None if self.pool is None else self.pool(context, mask)
        return iter(pairs), key_mask(mask, *context.shape[:2]), pooled
