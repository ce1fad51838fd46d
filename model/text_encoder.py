"""The text encoder: a pre-norm transformer over tokens that a configuration can shape like CLIP's.

Radford et al. 2021, section 2.4. Axis letters: B batch, L tokens, D width.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import SelfAttention, check_heads, key_mask
from model.blocks import call_with_checkpointing


@dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of a text encoder."""

    vocab_size: int = 49408
    length: int = 77  # tokens a prompt, padding included
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    causal: bool = True  # a token sees only those before it, as in CLIP; False: all of them
    token_std: float = 0.02  # of the token embeddings at the start; CLIP's
    position_std: float = 0.01  # of the position embeddings; CLIP's
    token_conv: int = 0  # tokens on each side that a token is given at the start, see `TokenConv`; 0: none, as CLIP
    skip_last: int = 0  # layers at the end that are not run; 1 gives the penultimate state, as in SD-2.x
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work

    def __post_init__(self) -> None:
        for name in ("vocab_size", "length", "width", "layers", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: at least 1")
        for name in ("token_std", "position_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}; valid: above 0")
        if not 0 <= self.token_conv < self.length:
            raise ValueError(f"token_conv: {self.token_conv}; valid: 0 to length - 1 = {self.length - 1}")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation: {self.activation!r}; valid: 'quick_gelu', 'gelu'")
        if not 0 <= self.skip_last < self.layers:
            raise ValueError(f"skip_last: {self.skip_last}; valid: 0 to layers - 1 = {self.layers - 1}")
        check_heads(self.width, self.heads)

    @classmethod
    def clip_l(cls) -> "TextEncoderConfig":
        """The text side of CLIP ViT-L/14, used by SD-1.x: 123,060,480 parameters."""
        return cls(activation="quick_gelu")

    @classmethod
    def openclip_h(cls) -> "TextEncoderConfig":
        """The text side of OpenCLIP ViT-H/14, read at its penultimate layer: 352,984,064 parameters."""
        return cls(width=1024, layers=24, heads=16, mlp_width=4096, skip_last=1)

    @classmethod
    def sd2(cls) -> "TextEncoderConfig":
        """The same, as SD-2.x is published for diffusers, without the layer that is not run: 340,387,840."""
        return cls(width=1024, layers=23, heads=16, mlp_width=4096)


class LayerConfig(Protocol):
    """The part of a configuration that a layer reads, which the text encoder and CLIP's image encoder share."""

    @property
    def width(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def mlp_width(self) -> int: ...

    @property
    def activation(self) -> Literal["quick_gelu", "gelu"]: ...


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and added to its input."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.quick_gelu = config.activation == "quick_gelu"
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.heads, bias=True)
        self.norm2 = nn.LayerNorm(config.width)
        self.linear1 = nn.Linear(config.width, config.mlp_width)
        self.linear2 = nn.Linear(config.mlp_width, config.width)
        self.init_weights(config)

    def init_weights(self, config: LayerConfig) -> None:
        """Initialise with the scales of CLIP's own code, which keep the size of the residual stream for any number of
        layers."""
        inner, branch = config.width**-0.5, (2 * config.layers) ** -0.5
        for linear, std in (
            (self.attention.qkv, inner),
            (self.attention.out, inner * branch),
            (self.linear1, inner * 2**-0.5),
            (self.linear2, inner * branch),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D); mask bool, broadcastable to (B, heads, L, L). Returns (B, L, D)."""
        x = x + self.attention(self.norm1(x), mask)
        h = self.linear1(self.norm2(x))  # (B, L, mlp_width)
        # x sigmoid(1.702 x) is the approximation that OpenAI's CLIP was trained with (Hendrycks and Gimpel 2016).
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        return x + self.linear2(h)


class TokenConv(nn.Module):
    """Adds to every token its neighbours, with a learned factor for each channel and distance: a depthwise convolution
    beside the identity (Canon layers, Allen-Zhu 2025; So et al. 2021, "Primer", after each projection).

    The factors start at random and fall with the root of the distance. So the state of "square" carries "red, one
    token before" when training begins, in directions that differ from those of "red" itself (as in holographic reduced
    representations, Plate 1995). Attention alone would have to learn which words belong together, and the gradient of a
    denoiser carries little information about that.
    """

    def __init__(self, width: int, reach: int, causal: bool, std: float = 0.5):
        super().__init__()
        self.before, self.after = reach, 0 if causal else reach
        distances = torch.arange(-self.before, self.after + 1)
        spread = torch.where(distances == 0, 0.0, std / distances.abs().clamp(min=1).sqrt())  # (taps,)
        # flat, because these are gains: the optimizer takes what has two axes for a matrix
        self.gains = nn.Parameter((torch.randn(len(distances), width) * spread[:, None]).flatten())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D); mask bool (B, L), True = real token. Returns (B, L, D); padding does not count as a
        neighbour."""
        real = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        gains = self.gains.view(-1, x.shape[2])  # (taps, D)
        windows = F.pad(real, (0, 0, self.before, self.after)).unfold(1, len(gains), 1)  # (B, L, D, taps)
        return x + (windows * gains.T.to(x.dtype)).sum(dim=-1)


class TextEncoder(nn.Module):
    """Maps token ids to one vector for each token, to which the UNet attends."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=config.token_std)
        nn.init.normal_(self.position_embedding.weight, std=config.position_std)
        self.token_conv = TokenConv(config.width, config.token_conv, config.causal) if config.token_conv else None

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids int (B, L), L up to `length`; mask bool (B, L), True = real token, None = all real.

        Returns the context (B, L, D), after the final LayerNorm. Raises ValueError on other shapes.
        """
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.length:
            raise ValueError(f"ids: {tuple(ids.shape)}; valid: (B, L), L from 1 to {self.config.length}")
        return self.encode_embeddings(self.token_embedding(ids), mask)

    def encode_embeddings(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `forward`, but from token embeddings (B, L, D), which need not belong to a token of the vocabulary."""
        batch, length = tokens.shape[:2]
        if self.token_conv is not None:
            tokens = self.token_conv(tokens, mask)
        x = tokens + self.position_embedding.weight[:length]  # (B, L, D)
        allowed = self.attention_mask(key_mask(mask, batch, length), length, x.device)
        for layer in self.layers[: self.config.layers - self.config.skip_last]:
            x = call_with_checkpointing(layer, x, allowed, recompute=self.config.gradient_checkpointing)
        return self.norm_out(x)

    def attention_mask(self, padding: Tensor | None, length: int, device: torch.device) -> Tensor | None:
        """Padding (B, 1, 1, L) combined with causality: bool, broadcastable to (B, heads, L, L), or None."""
        if not self.config.causal:
            return padding
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if padding is None:
            return causal
        allowed = padding & causal  # (B, 1, L, L)
        # Padding on the left leaves its own queries without a key: they see themselves, and nobody sees them.
        return allowed | (torch.eye(length, dtype=torch.bool, device=device) & ~allowed.any(dim=-1, keepdim=True))


def end_token_state(context: Tensor, mask: Tensor) -> Tensor:
    """The state (B, D) of the last real token, which is the end token: context (B, L, D), mask bool (B, L)."""
    if mask.shape != context.shape[:2]:
        raise ValueError(f"mask: {tuple(mask.shape)}; valid: {tuple(context.shape[:2])}")
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).argmax(dim=1)  # (B,)
    return context[torch.arange(len(context), device=context.device), last]  # (B, D)


def trim_padding(ids: Tensor, mask: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and mask (B, L) without the final columns in which all rows are padding: the same states for less work.

    The remaining length is a multiple of ``multiple``, or L: a softmax over 15 keys takes five times as long on a
    CPU as one over 16, which fill whole vectors.
    """
    longest = int(mask.sum(dim=1).max())
    length = min(-(-longest // multiple) * multiple, ids.shape[1])
    return ids[:, :length], mask[:, :length]
