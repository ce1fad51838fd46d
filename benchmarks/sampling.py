"""Sampling against diffusers from the same weights, in one process: python -m benchmarks.sampling [--quick]

UNets of 19 and 28 million parameters on latents of 4x16x16 with 77 tokens, 50 guided DDIM steps, batch 1 and 16. The
same weights, noise, context and times on both sides; the final latents must be equal before anything is timed. Both
sides start from a context and end at latents, so text encoder, autoencoder and moderation are not in it.

default    what the shortest snippet of either gives, in fp32
fast       `--speed fast` of ours against the default of diffusers in fp32, and against diffusers tuned: bf16,
           `fuse_qkv_projections` and the better of its memory formats
compiled   with --compile: both UNets by `torch.compile`, in bf16; what that takes is in the column of the first call
"""
import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Row, Work, add_flags, compare, require_equal, rms, save
from diffusion.guidance import GuidanceConfig
from diffusion.sampling import SamplingConfig
from diffusion.schedule import ScheduleConfig
from model.allocator import keep_freed_memory
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.device import freeze, place_on
from model.pretrained.config import unet_json
from model.pretrained.names import unet_to_diffusers
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig
from pipeline.config import SystemConfig
from pipeline.system import TextToImage
from training.speed import forward_flops

SIZES = {"19 M": 1, "28 M": 2}  # residual blocks a level
CONFIG = UNetConfig(channels=(64, 128, 192, 256), attention=(True, True, True, False), head_width=32, context_width=256)
TINY = UNetConfig(channels=(32, 64), attention=(True, True), blocks=1, head_width=32, context_width=32)
TOKENS, GUIDANCE = 77, 5.0
EXACT, LOSSY = 1e-3, 0.2  # the largest difference of final latents in standard deviations


def system_of(config: UNetConfig, steps: int, side: int, device: str) -> TextToImage:
    """A system whose denoiser has random weights and no layer at zero, and an autoencoder that is not used."""
    torch.manual_seed(0)
    unet = UNet(config)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    words = TextEncoderConfig(vocab_size=4, length=4, width=config.context_width, layers=1, heads=1, mlp_width=8)
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=4, channels=(8,), blocks=1, norm_groups=4,
                                                mid_attention=False))
    text = TextEncoder(words)
    sampling = SamplingConfig(steps=steps, guidance=GuidanceConfig(scale=GUIDANCE))
    for module in (unet, text, autoencoder):
        freeze(place_on(module, device))
    about = SystemConfig(config, words, autoencoder.config, ScheduleConfig(), "epsilon", sampling, (4, side, side))
    return TextToImage(about, None, text, unet, autoencoder)  # type: ignore[arg-type]


def theirs_of(ours: UNet, side: int) -> nn.Module:
    """diffusers' UNet with the weights of ours, in its own memory format."""
    from diffusers import UNet2DConditionModel
    theirs = UNet2DConditionModel.from_config(unet_json(ours.config, (side, side)))
    theirs.load_state_dict(unet_to_diffusers(ours.state_dict(), ours.config))
    return theirs.eval().requires_grad_(False).to(ours.conv_in.weight.device)


@torch.no_grad()
def diffusers_loop(unet: nn.Module, context: Tensor, x_T: Tensor, steps: int, scale: float) -> Tensor:
    """x_0 from the denoising loop of the pipeline of diffusers, without guidance options that it does not use."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(steps, device=x_T.device)
    dtype = next(unet.parameters()).dtype
    latents, context = x_T.to(dtype), context.to(dtype)
    for t in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        noise = unet(doubled, t, encoder_hidden_states=context, return_dict=False)[0]
        uncond, cond = noise.chunk(2)
        latents = scheduler.step(uncond + scale * (cond - uncond), t, latents, return_dict=False)[0]
    return latents.float()


def calls_of(system: TextToImage, context: Tensor, x_T: Tensor, compile_too: bool) -> dict[str, Callable[[], Tensor]]:
    """All ways to compute the same latents, by name."""
    config, count = system.config.sampling, len(x_T)
    theirs = theirs_of(system.unet, x_T.shape[-1])
    tuned = copy.deepcopy(theirs).bfloat16()
    tuned.fuse_qkv_projections()
    last = copy.deepcopy(tuned).to(memory_format=torch.channels_last)
    fast = system.at_speed("fast")

    def ours(one: TextToImage) -> Callable[[], Tensor]:
        return torch.inference_mode()(lambda: one.latents_from_context(context, None, count, lambda: x_T, config))

    def other(unet: nn.Module) -> Callable[[], Tensor]:
        return lambda: diffusers_loop(unet, context, x_T, config.steps, config.guidance.scale)

    calls = {"ours": ours(system), "ours, fast": ours(fast), "diffusers fp32": other(theirs),
             "diffusers bf16": other(tuned), "diffusers bf16, channels-last": other(last)}
    if compile_too:
        compiled = copy.copy(fast)
        compiled.unet = copy.deepcopy(fast.unet)
        compiled.unet.compile(dynamic=False)
        calls["ours, fast, compiled"] = ours(compiled)
        last_compiled = copy.deepcopy(last)
        last_compiled.compile(dynamic=False)
        calls["diffusers bf16, compiled"] = other(last_compiled)
    return calls


def measure(name: str, config: UNetConfig, batch: int, steps: int, side: int, options: argparse.Namespace
            ) -> tuple[list[Row], dict[str, Any]]:
    """Rows of one UNet and batch, against diffusers in fp32 and in its best bf16; how far the results are apart."""
    system = system_of(config, steps, side, options.device)
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(batch, 4, side, side, generator=generator).to(options.device)
    context = torch.randn(2 * batch, TOKENS, config.context_width, generator=generator).to(options.device)
    short = copy.copy(system)
    short.config = replace(system.config, sampling=replace(system.config.sampling, steps=min(steps, 10)))
    found = {call: run() for call, run in calls_of(short, context, x_T, False).items()}
    reference = found["diffusers fp32"]
    apart = {call: rms(latents, reference) for call, latents in found.items()}
    require_equal(f"{name}, batch {batch}", found["ours"], reference, EXACT)
    if apart["ours, fast"] > max(LOSSY, 1.1 * apart["diffusers bf16"]):
        raise ValueError(f"{name}, batch {batch}: fast is off by {apart['ours, fast']:.2g}")
    calls = calls_of(system, context, x_T, options.compile)
    with torch.no_grad():
        one = torch.zeros(1, 4, side, side, device=options.device)
        flops = forward_flops(system.unet, lambda: system.unet(one, one[:, 0, 0, 0], context[:1]))
    dtypes = {call: torch.bfloat16 for call in calls if call not in ("ours", "diffusers fp32")}
    case = f"{name}, batch {batch}, {steps} steps"
    rows = compare(case, calls, "diffusers fp32", options.rounds,
                   Work(batch, 2 * batch * steps * flops, dtypes), options.device)
    return rows, apart


def against_tuned(rows: list[Row]) -> str:
    """The fastest of ours, fast or compiled, against the best that diffusers reaches with bf16, by medians of one
    run."""
    medians = {row.call: row.median for row in rows}
    best = min((name for name in medians if name.startswith("diffusers bf16")), key=medians.__getitem__)
    ours = min((name for name in medians if name.startswith("ours, fast")), key=medians.__getitem__)
    return f"{ours} against {best}: {medians[best] / medians[ours]:.2f} times as fast"


def main(arguments: list[str]) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images at a time (1 16)")
    parser.add_argument("--unet", nargs="+", choices=SIZES, default=list(SIZES), help="parameters (both)")
    parser.add_argument("--compile", action="store_true", help="also compiled, which takes minutes")
    options = parser.parse_args(arguments)
    cases = [(name, replace(CONFIG, blocks=SIZES[name]), batch, options.steps, 16)
             for name in options.unet for batch in options.batch]
    if options.quick:
        options.rounds, cases = 2, [("tiny", TINY, batch, 4, 8) for batch in (1, 2)]
    keep_freed_memory()  # as `sample.py` does; both sides gain by it
    rows, apart, tuned = [], {}, {}
    for case in cases:
        found, differences = measure(*case, options)
        rows += found
        apart[found[0].case] = {name: f"{value:.2g}" for name, value in differences.items()}
        tuned[found[0].case] = against_tuned(found)
        print(tuned[found[0].case], file=sys.stderr, flush=True)
    print(save("sampling", rows, options.out, " ".join(["python -m benchmarks.sampling", *arguments]), options.device,
               tuned=tuned, apart=apart))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
