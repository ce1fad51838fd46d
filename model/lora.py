"""Adapters: changes of few parameters to the weights of frozen networks, W' = W + s D.

    LoRA    D = (a / r) B A                                        Hu et al. 2022, "LoRA", equation 3
    LoHa    D = (a / r) (B1 A1) * (B2 A2), elementwise             Hyeon-Woo et al. 2022, "FedPara"; LyCORIS
    LoKr    D = (a / r) W1 x (B2 A2), Kronecker product            Edalati et al. 2022, "KronA"; LyCORIS
    DoRA    D = m (W + D') / |W + D'| - W, with any D' above       Liu et al. 2024, equation 5

LyCORIS is Yeh et al. 2024, "Navigating text-to-image customization". r is the rank, a (alpha) a constant, s the scale
at which an adapter is used. The D of several adapters are added, each computed from the weights of the base alone, so
that their order matters to the last bits only, and scale 0 is the base. Everything acts on weights and nothing on
activations: one path serves linear layers, convolutions and all kinds of D, and sampling with an adapter costs what
sampling without one does. In training this costs the gradient of the whole weight, which the form y = W x + B (A x)
would save.

Axis letters: O rows of a weight, I columns, k k its filter, r rank.
"""
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["lora", "loha", "lokr"]
Target = Literal["attention", "feed_forward", "projection", "convolution", "time"]
Networks = Mapping[str, nn.Module]  # "unet" and "text_encoder"

FUSED = {"qkv": 3, "kv": 2}  # projections that are stacked in one weight; adapters of others change each one alone
TARGETS: dict[Target, re.Pattern] = {
    "attention": re.compile(r"attention\.(qkv|q|kv|out)$"),
    "feed_forward": re.compile(r"feed_forward\.(proj|out)$|^layers\.\d+\.linear[12]$"),
    "projection": re.compile(r"\.proj_(in|out)$"),
    "convolution": re.compile(r"(^|\.)(conv\w*|shortcut)$"),
    "time": re.compile(r"\.time$|^time\.linear[12]$|^pool\.linear$"),
}


@dataclass(frozen=True)
class Place:
    """Where a change belongs: the rows of part ``part`` of ``parts`` equal ones in the weight of a module."""

    network: str
    module: str
    part: int = 0
    parts: int = 1

    def rows(self, weight: Tensor) -> Tensor:
        """The rows of this place, a view of the weight of its module."""
        return weight.chunk(self.parts)[self.part]


def places_of(networks: Networks) -> Iterator[Place]:
    """Every place that an adapter can change: linear layers and convolutions, and each part of fused projections."""
    for name, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                parts = FUSED.get(path.rpartition(".")[2], 1)
                yield from (Place(name, path, part, parts) for part in range(parts))


# ---- the three products, each a matrix (O, I k k) of the tensors of a file

Tensors = Mapping[str, Tensor]


def lora_product(t: Tensors) -> Tensor:
    """B A of down (r, I, k, k) and up (O, r, ..). With a core ``mid`` (r, r, k, k), whose outer factors are of one
    pixel: up mid down (a Tucker decomposition)."""
    up, down = t["up"].flatten(1), t["down"].flatten(1)
    return up @ down if "mid" not in t else tucker(t["mid"], up.T, down)


def loha_product(t: Tensors) -> Tensor:
    """(B1 A1) * (B2 A2) of w1_a (O, r), w1_b (r, I k k) and the same of w2; with cores t1, t2 w_a is (r, O)."""
    return half(t, "w1", "t1") * half(t, "w2", "t2")


def lokr_product(t: Tensors) -> Tensor:
    """The Kronecker product of w1 (o, i) and w2 (O / o, I / i, k, k), each of which may be a product itself."""
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    w2 = t["w2"].flatten(1) if "w2" in t else half(t, "w2", "t2")
    return torch.kron(w1, w2)


def half(t: Tensors, name: str, core: str) -> Tensor:
    """The product of the two factors of one matrix, through its core if it has one."""
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return tucker(t[core], a, b) if core in t else a @ b.flatten(1)


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """core (r, s, k, k), rows (r, O) and columns (s, I) as a matrix (O, I k k)."""
    return torch.einsum("rs...,ro,si->oi...", core, rows, columns).flatten(1)


@dataclass(frozen=True)
class Product:
    """A kind of change: the tensors that it needs and may have, which of them has the rank as its first axis, and the
    function of them."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    ranked: tuple[str, ...]
    of: Callable[[Tensors], Tensor]


PRODUCTS: dict[Kind, Product] = {
    "lora": Product(("down", "up"), ("mid",), ("down",), lora_product),
    "loha": Product(("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2"), ("w1_b",), loha_product),
    "lokr": Product((), ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"), ("w2_b", "w1_b"), lokr_product),
}


class Delta(nn.Module):
    """The change D of the rows of one place, at scale 1.

    ``tensors`` are the factors, in the shapes in which files hold them; ``alpha`` None stands for the rank, a factor of
    1. ``magnitude`` makes it a DoRA: the lengths of rows (O, 1, ..) or, in older files, of columns (1, I, ..).
    """

    def __init__(self, kind: Kind, tensors: Tensors, alpha: float | None = None, magnitude: Tensor | None = None):
        super().__init__()
        self.kind, self.alpha = kind, alpha
        self.tensors = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors.items()})
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)

    @property
    def rank(self) -> int | None:
        """The rank; None for a LoKr of two whole matrices."""
        return next((self.tensors[name].shape[0] for name in PRODUCTS[self.kind].ranked if name in self.tensors), None)

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def forward(self, weight: Tensor) -> Tensor:
        """D for the rows ``weight`` (O, I, ..) of the base, in the same shape. It is computed in fp32 also under
        autocast, because a small change would be rounded away."""
        with torch.autocast(weight.device.type, enabled=False):
            change = self.factor * PRODUCTS[self.kind].of(dict(self.tensors.items())).reshape(weight.shape)
            if self.magnitude is None:
                return change
            changed = weight + change
            # the gradient through the length is left out (Liu et al. 2024, section 4.3): less memory, as accurate
            return self.magnitude * changed / length_of(changed, self.magnitude).detach() - weight

    def check(self, weight: Tensor) -> None:
        """Raise ValueError unless the factors belong together and D has the shape of the rows ``weight``."""
        product, names = PRODUCTS[self.kind], set(self.tensors)
        if absent := [name for name in product.needed if name not in names]:
            raise ValueError(f"{self.kind} without {' and '.join(absent)}")
        if self.kind == "lokr" and not all({w} <= names or {f"{w}_a", f"{w}_b"} <= names for w in ("w1", "w2")):
            raise ValueError("lokr without w1 or w2, or one of their factors")
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        try:
            change = product.of({name: tensor.detach().to("meta") for name, tensor in self.tensors.items()})
        except (RuntimeError, IndexError):  # factors that cannot be multiplied
            raise ValueError(f"{shapes}; valid: factors of {tuple(weight.shape)}") from None
        if change.shape != weight.flatten(1).shape:
            raise ValueError(f"{shapes} make {tuple(change.shape)}; valid: {tuple(weight.flatten(1).shape)}")
        ones = (1,) * (weight.ndim - 2)
        if self.magnitude is not None and self.magnitude.shape not in {(weight.shape[0], 1, *ones),
                                                                       (1, weight.shape[1], *ones)}:
            raise ValueError(f"magnitude {tuple(self.magnitude.shape)}; valid: {(weight.shape[0], 1, *ones)}")


def length_of(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Lengths of the rows (O, 1, ..) or of the columns (1, I, ..) of a weight, whichever ``magnitude`` has."""
    by_rows = magnitude.shape[0] == weight.shape[0]
    axes = [axis for axis in range(weight.ndim) if axis != (0 if by_rows else 1)]
    return weight.square().sum(axes, keepdim=True).sqrt()


class Adapter(nn.Module):
    """The changes of many places."""

    def __init__(self, deltas: Mapping[Place, Delta]):
        super().__init__()
        self.places, self.deltas = tuple(deltas), nn.ModuleList(deltas.values())

    def items(self) -> Iterator[tuple[Place, Delta]]:
        """Places and their changes."""
        return zip(self.places, self.deltas)  # type: ignore[arg-type]

    def weights(self, network: str, base: nn.Module) -> dict[str, Tensor]:
        """The changed weights of a network by the name of the parameter, with gradients, for `functional_call`."""
        pieces: dict[str, list[Tensor]] = {}
        for place, delta in self.items():
            if place.network == network:
                name = f"{place.module}.weight"
                parts = pieces.setdefault(name, list(base.get_parameter(name).chunk(place.parts)))
                parts[place.part] = parts[place.part] + delta(parts[place.part])
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in pieces.items()}


class Stack:
    """Adapters merged into the weights of networks. ``set`` replaces those that are merged, ``remove`` takes them out:
    the weights of the base are kept and put back bit for bit, while a subtraction would leave rounding errors.

        with Stack(networks) as stack:
            stack.set([(style, 0.8), (subject, 1.0)])
    """

    def __init__(self, networks: Networks):
        self.networks = networks
        self.kept: dict[tuple[str, str], Tensor] = {}  # weights of the base, by network and name

    @torch.no_grad()
    def set(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Merge these adapters at their scales, in place of those that were merged before."""
        self.remove()
        for adapter, scale in adapters:
            for place, delta in adapter.items() if scale else ():
                weight = self.networks[place.network].get_parameter(f"{place.module}.weight")
                base = self.kept.setdefault((place.network, f"{place.module}.weight"), weight.detach().clone())
                place.rows(weight).add_(delta.to(weight.device)(place.rows(base)), alpha=scale)

    @torch.no_grad()
    def remove(self) -> None:
        """Put the weights of the base back."""
        for (network, name), base in self.kept.items():
            self.networks[network].get_parameter(name).copy_(base)
        self.kept.clear()

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


# ---- new adapters, to be trained

@dataclass(frozen=True)
class AdapterConfig:
    """An adapter that is not trained yet. ``alpha`` divided by ``rank`` is the factor of the change. ``decompose``
    makes it a DoRA. ``targets`` are the layers that it changes, in the UNet and, with ``text_encoder``, there as well.
    ``block`` is the largest number of rows and columns of the first matrix of a LoKr, 0 for the nearest to a square."""

    kind: Kind = "lora"
    decompose: bool = False
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[Target, ...] = ("attention", "feed_forward", "projection")
    text_encoder: bool = False
    block: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank}; valid: from 1 up")
        if not self.alpha > 0:
            raise ValueError(f"alpha: {self.alpha}; valid: above 0")
        if not self.targets:
            raise ValueError(f"targets: none; valid: some of {', '.join(get_args(Target))}")
        if self.block < 0:
            raise ValueError(f"block: {self.block}; valid: from 1 up, or 0 for the nearest to a square")


def new_adapter(networks: Networks, config: AdapterConfig) -> Adapter:
    """An adapter whose change is zero, for every place that the configuration targets. Draws from the global generator.
    Raises ValueError if there is no such place."""
    deltas = {}
    for place in places_of(networks):
        if place.network == "text_encoder" and not config.text_encoder:
            continue
        if any(TARGETS[target].search(place.module) for target in config.targets):
            weight = place.rows(networks[place.network].get_parameter(f"{place.module}.weight")).detach()
            deltas[place] = new_delta(weight, config)
    if not deltas:
        raise ValueError(f"targets: {', '.join(config.targets)}; valid: layers that the networks have")
    return Adapter(deltas)


def new_delta(weight: Tensor, config: AdapterConfig) -> Delta:
    """A change of the rows ``weight`` (O, I, ..) that is zero, because one of its factors is; the others are random, so
    that the gradient of that factor is not zero."""
    rows, columns, pixels = weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])
    rank = min(config.rank, rows, columns * pixels)
    alpha = config.alpha * rank / config.rank  # a smaller rank, of a small layer, keeps the factor
    new = weight.new_empty
    if config.kind == "lora":
        tensors = {"down": uniform(new(rank, *weight.shape[1:])),
                   "up": new(rows, rank, *(1,) * (weight.ndim - 2)).zero_()}
    elif config.kind == "loha":  # LyCORIS' deviations
        tensors = {"w1_a": new(rows, rank).normal_(std=0.1), "w1_b": new(rank, columns * pixels).normal_(),
                   "w2_a": new(rows, rank).zero_(), "w2_b": new(rank, columns * pixels).normal_()}
    else:
        o, i = (divisor(count, config.block) for count in (rows, columns))
        tensors = {"w1": uniform(new(o, i))}
        if 2 * rank < max(rows // o, columns // i):
            tensors |= {"w2_a": new(rows // o, rank).zero_(), "w2_b": uniform(new(rank, columns // i * pixels))}
        else:  # factors would have as many numbers as their product
            tensors["w2"] = new(rows // o, columns // i, *weight.shape[2:]).zero_()
    magnitude = length_of(weight, new(rows, 1)) if config.decompose else None
    return Delta(config.kind, tensors, alpha, magnitude)


def uniform(tensor: Tensor) -> Tensor:
    """Filled uniformly in +-1 / sqrt(columns), as PyTorch begins its linear layers."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def divisor(count: int, most: int) -> int:
    """The largest divisor of ``count`` up to ``most``, or up to its root if that is 0."""
    return max(d for d in range(1, min(count, most or math.isqrt(count)) + 1) if count % d == 0)
