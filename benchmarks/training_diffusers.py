"""A training step of our UNet and of diffusers' from the same weights, in turns.

    python -m benchmarks.training_diffusers --case "28 M" --batch 32

From cached latents and contexts: noise, forward and backward under bf16 autocast (or fp32), clipping, optimizer,
average. Predictions must be equal in fp32 before anything is timed. Ours trains as its stages do, diffusers as its
example script, both with AdamW; "tuned" is diffusers in channels-last order with fused AdamW. The row with Muon is our
optimizer, which diffusers does not have. One process: what it keeps of freed memory helps both sides.
"""
import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.sampling import CONFIG, TINY, theirs_of
from benchmarks.timing import Work, add_flags, compare, require_equal, save
from model.allocator import keep_freed_memory
from model.device import place_on
from model.unet import UNet, UNetConfig
from training.ema import PowerEma
from training.optim import OptimConfig, build_optimizer
from training.speed import forward_flops

TOKENS = 77
SHAPES = UNetConfig(in_channels=12, out_channels=12, channels=(128,), blocks=1, attention=(True,), head_width=32,
                    context_width=128, norm_groups=16)
CASES = {"shapes": (SHAPES, 8), "28 M": (CONFIG, 16), "tiny": (TINY, 8)}  # UNet, side of the latents


def step_of(unet: nn.Module, call: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer,
            average: Callable[[], None], batch: tuple[torch.Tensor, ...], precision: str) -> Callable[[], None]:
    """One training step of ``call``, which predicts noise (B, C, H, W) with the weights of ``unet``."""
    x_0, eps, context = batch
    times = torch.arange(len(x_0), device=x_0.device) * 999 // len(x_0)

    def step() -> None:
        x_t = 0.8 * x_0 + 0.6 * eps
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.mse_loss(call(x_t, times, context).float(), eps)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average()

    return step


def calls_of(config: UNetConfig, side: int, batch: int, precision: str, device: str) -> dict[str, Callable[[], None]]:
    """Every kind of step, by name, after the predictions of both networks were compared."""
    from diffusers.training_utils import EMAModel

    draw = torch.Generator().manual_seed(1)
    data = tuple(torch.randn(*shape, generator=draw).to(device) for shape in (
        (batch, config.in_channels, side, side), (batch, config.in_channels, side, side),
        (batch, TOKENS, config.context_width)))

    def weights() -> UNet:
        torch.manual_seed(0)
        unet = UNet(config)
        for p in unet.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
        return place_on(unet, device)

    calls: dict[str, Callable[[], None]] = {}
    for optimizer in ("adamw", "muon"):
        ours = weights().train()
        ema = PowerEma(ours, 0.05)
        calls[f"ours, {optimizer}"] = step_of(
            ours, ours, build_optimizer(ours, OptimConfig(optimizer=optimizer)),
            lambda ours=ours, ema=ema: ema.update(ours, 10), data, precision)  # type: ignore[misc]
    for name, tuned in (("diffusers", False), ("diffusers, tuned", True)):
        theirs = theirs_of(weights(), side).train().requires_grad_(True)
        if tuned:
            theirs = theirs.to(memory_format=torch.channels_last)
        mean = EMAModel(theirs.parameters())

        def call(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor, theirs: nn.Module = theirs) -> torch.Tensor:
            return theirs(x, t, encoder_hidden_states=c).sample

        with torch.no_grad():
            times = torch.zeros(batch, device=device)
            require_equal(name, weights()(data[0], times, data[2]), call(data[0], times, data[2]), 1e-3)
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, fused=tuned or None)
        calls[name] = step_of(theirs, call, optimizer,
                              lambda mean=mean, theirs=theirs: mean.step(theirs.parameters()),  # type: ignore[misc]
                              data, precision)
    return calls


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--case", choices=list(CASES), default="28 M")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args(arguments)
    case, batch = ("tiny", 2) if options.quick else (options.case, options.batch)
    keep_freed_memory()
    config, side = CASES[case]
    calls = calls_of(config, side, batch, options.precision, options.device)
    with torch.no_grad():
        unet = place_on(UNet(config), options.device)
        one = torch.zeros(1, config.in_channels, side, side, device=options.device)
        context = torch.zeros(1, TOKENS, config.context_width, device=options.device)
        flops = forward_flops(unet, lambda: unet(one, one[:, 0, 0, 0], context))
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    rows = compare(f"{case}, batch {batch}, {options.precision}", calls, "diffusers", options.rounds,
                   Work(batch, 3 * batch * flops, dict.fromkeys(calls, dtype)), options.device)
    command = " ".join(["python -m benchmarks.training_diffusers", *(sys.argv[1:] if arguments is None else arguments)])
    print(save("training_diffusers", rows, options.out, command, options.device))


if __name__ == "__main__":
    main()
