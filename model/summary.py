"""The cost of a network, stage by stage, without running it: parameters, operations, activations kept for training.

    python -m model.summary configs/shapes.yaml        the networks of an experiment
    python -m model.summary sd1 --size 512             those of a published model: sd1, sd2

Nothing is allocated: tensors have shapes but no content. An operation is one multiplication or one addition.
Convolutions, matrix products and attention are counted, which are all but a few per cent. Activations are the tensors
that automatic differentiation keeps for the backward pass, in fp32; sampling keeps none of them. Axis letters: B batch,
N queries, M keys, C channels.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from files.config import from_dict, read_yaml
from model.attention import CrossAttention, SelfAttention
from model.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder
from model.blocks import ResBlock, SpatialTransformer
from model.text_encoder import Layer, TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig

T = TypeVar("T")
PRESETS = {
    "sd1": (AutoencoderConfig.sd(), TextEncoderConfig.clip_l(), UNetConfig.sd1(), 512),
    "sd2": (AutoencoderConfig.sd(), TextEncoderConfig.sd2(), UNetConfig.sd2(), 768),
}
Networks = tuple[AutoencoderConfig, TextEncoderConfig, UNetConfig, int]  # and pixels along a side


@dataclass(frozen=True)
class Stage:
    """The cost of one part of a network for one image: operations of a forward pass, and bytes kept for the backward
    pass."""

    name: str
    parameters: int
    flops: int
    activations: int


def stages_of(network: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The parts of a network in order, by name: its children, and the children of lists and of both halves of an
    autoencoder."""
    found: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        if isinstance(child, (nn.ModuleList, Encoder, Decoder)):
            found |= stages_of(child, f"{prefix}{name}.")
        else:
            found[prefix + name] = child
    return found


def summarize(network: nn.Module, run: Callable[[], Any]) -> list[Stage]:
    """The cost of every stage of `network` under `run`, which calls it once on a batch of one, and of "rest".

    "rest" holds the activations that belong to no stage, such as the skips that are concatenated between stages.
    Works on real and on fake tensors.
    """
    stages = stages_of(network)
    flops = dict.fromkeys(stages, 0)
    kept = dict.fromkeys([*stages, "rest"], 0)
    owner = {id(part): name for name, stage in stages.items() for part in stage.modules()}
    active = ["rest"]
    seen: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in network.state_dict().values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, so that no later one gets its place
            kept[active[-1]] += storage.nbytes()
        return tensor

    recomputed = getattr(network.config, "gradient_checkpointing", False)
    hooks = []
    for name, stage in stages.items():
        hooks.append(stage.register_forward_pre_hook(lambda *_, name=name: active.append(name)))
        hooks.append(stage.register_forward_hook(lambda *_: active.pop() and None))
    for part in network.modules():
        if id(part) in owner and isinstance(part, (nn.Conv2d, nn.Linear, SelfAttention, CrossAttention)):
            def count(part: nn.Module, args: tuple, out: Tensor) -> None:
                flops[owner[id(part)]] += operations(part, args, out)
            hooks.append(part.register_forward_hook(count))
        if recomputed and isinstance(part, (ResBlock, SpatialTransformer, Layer)):
            hooks.append(part.register_forward_pre_hook(lambda _, args: keep_arguments(args, keep)))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    rows = [Stage(name, sum(p.numel() for p in stage.parameters()), flops[name], kept[name])
            for name, stage in stages.items()]
    return [*rows, Stage("rest", 0, 0, kept["rest"])]


def keep_arguments(args: tuple, keep: Callable[[Tensor], Tensor]) -> None:
    """Count the arguments of a part whose activations are recomputed, because the recomputation needs them."""
    for arg in args:
        if isinstance(arg, tuple):
            keep_arguments(arg, keep)
        elif isinstance(arg, Tensor) and arg.is_floating_point():
            keep(arg)


def operations(part: nn.Module, args: tuple, out: Tensor) -> int:
    """Multiplications and additions of one layer, without those of the layers inside it."""
    if isinstance(part, (nn.Conv2d, nn.Linear)):
        return 2 * out.numel() * part.weight[0].numel()  # every output is a sum over one row of the weights
    keys = args[1].shape[-2] if isinstance(part, CrossAttention) else args[0].shape[1]  # M
    return 4 * out.numel() * keys  # q k^T and its product with v: 2 B N M C each


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside this block tensors and networks have shapes but no content; attention takes the form that it takes on a
    CPU."""
    with FakeTensorMode():
        yield


def summaries(autoencoder: AutoencoderConfig, text_encoder: TextEncoderConfig, unet: UNetConfig,
              size: int) -> dict[str, list[Stage]]:
    """The cost of the networks of a text-to-image system for one image of size x size pixels.

    The denoiser is called once, with one prompt; a sampler calls it once a step, twice with guidance. Raises
    ValueError for a size that the networks cannot have.
    """
    with without_memory():
        first, text, denoiser = Autoencoder(autoencoder), TextEncoder(text_encoder), UNet(unet)
        side = size // first.factor
        images = torch.empty(1, autoencoder.image_channels, size, size)
        latents = torch.empty(1, unet.in_channels, side, side)
        context = torch.empty(1, text_encoder.length, unet.context_width)
        ids = torch.zeros(1, text_encoder.length, dtype=torch.int64)
        if unet.in_channels != autoencoder.latent_channels:
            raise ValueError(f"in_channels: {unet.in_channels}; valid: {autoencoder.latent_channels}, the channels of "
                             "the latents")
        return {
            "autoencoder": summarize(first, lambda: first.decode(first.moments(images).mean)),
            "text encoder": summarize(text, lambda: text(ids)),
            "denoiser": summarize(denoiser, lambda: denoiser(latents, torch.zeros(1), context)),
        }


def format_table(rows: list[Stage]) -> str:
    """The stages and their sum as lines of text."""
    total = Stage("total", *(sum(getattr(row, key) for row in rows) for key in ("parameters", "flops", "activations")))
    lines = [f"  {'':<22}{'parameters':>14}{'GFLOPs':>12}{'activations':>14}"]
    for row in [*(row for row in rows if row.parameters or row.activations), total]:
        gigaflops, megabytes = row.flops / 1e9, row.activations / 1e6
        lines.append(f"  {row.name:<22}{row.parameters:>14,}{gigaflops:>12,.3f}{megabytes:>11,.1f} MB")
    return "\n".join(lines)


# ---- configurations of experiments; only the networks are read, `train.py` checks the rest

def networks_of(path: str, size: int | None) -> Networks:
    """The networks of an experiment or of a preset, and the side of their images in pixels."""
    if path in PRESETS:
        autoencoder, text_encoder, unet, trained = PRESETS[path]
        return autoencoder, text_encoder, unet, size or trained
    if not Path(path).is_file():
        raise ValueError(f"no config file {path}; valid: a file in configs/, or {', '.join(PRESETS)}")
    data = read_yaml(path)

    def at(*keys: str) -> Any:
        value: Any = data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return {} if value is None else value

    size = size or at("data", str(at("data", "source")), "size") or None
    if not isinstance(size, int):
        raise ValueError(f"{path} names no size of the images; valid: --size N")
    return (from_dict(AutoencoderConfig, at("autoencoder", "model"), "autoencoder.model"),
            from_dict(TextEncoderConfig, at("denoiser", "text_encoder"), "denoiser.text_encoder"),
            from_dict(UNetConfig, at("denoiser", "unet"), "denoiser.unet"), size)


def main(arguments: list[str]) -> None:
    """Print one table for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help=f"a file in configs/, or {', '.join(PRESETS)}")
    parser.add_argument("--size", type=int, help="pixels along a side of the images (those of the config)")
    options = parser.parse_args(arguments)
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size {options.size}; valid: 1 or more")
    autoencoder, text_encoder, unet, size = networks_of(options.config, options.size)
    print(f"one image of {size} x {size} pixels, fp32; activations are those kept for training\n")
    for name, rows in summaries(autoencoder, text_encoder, unet, size).items():
        print(f"{name}\n{format_table(rows)}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
