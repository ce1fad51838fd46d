"""The tables of a GPU at the size of Stable Diffusion 1.5: python -m benchmarks.gpu_tables sampling|training --out DIR

sampling   512 px, 50 guided DDIM steps, batch 1 and 8: the denoising loop and the decoder; fast (bf16, runs replayed as
           CUDA graphs), at batch 1 also exact and compiled; diffusers in bf16 from the same weights
training   the denoiser's step at 256 and 512 px from latents that were computed before: forward and backward pass under
           bf16 autocast, fused AdamW, moving average, by batch and with or without torch.compile

Weights are random: that changes no speed. Every row is written as soon as it is measured, and a row that fails says why
and is left out, so that little is lost where the time ends or the memory does not suffice. --dry uses tiny networks.
"""
import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.sampling import TINY, TOKENS, diffusers_loop, system_of, theirs_of
from benchmarks.timing import Row, Work, compare, describe_machine, format_table, machine, rms, synchronize
from diffusion.loss import diffusion_loss
from diffusion.schedule import Schedule, ScheduleConfig
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.device import freeze, place_on
from model.unet import UNet, UNetConfig
from pipeline.system import TextToImage
from training.optim import OptimConfig, build_optimizer
from training.speed import forward_flops

Case = tuple[str, Callable[[], list[Row]]]


class Table:
    """Rows and notes on failures, written to NAME.json and NAME.md whenever something is added."""

    def __init__(self, name: str, out: Path, device: str):
        self.name, self.out, self.device, self.machine = name, out, device, machine(device)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    def add(self, rows: list[Row], note: str = "") -> None:
        """Append rows and a note, and write the files."""
        self.rows += rows
        self.notes += [note] if note else []
        text = f"{describe_machine(self.machine)}.\n\n{format_table(self.rows)}\n"
        text += "".join(f"\n- {line}" for line in self.notes)
        (self.out / f"{self.name}.md").write_text(text + "\n", encoding="utf-8")
        data = {"machine": self.machine, "rows": [asdict(row) for row in self.rows], "notes": self.notes}
        (self.out / f"{self.name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def peak_of(device: str) -> str:
    """The peak memory of tensors since the last call, in words."""
    if device != "cuda":
        return "memory is only measured on a GPU"
    used = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return f"{used:.1f} GiB"


# ---- sampling

def compiled(system: TextToImage) -> TextToImage:
    """The system with its denoiser compiled; runs are still recorded whole."""
    other = copy.copy(system)
    other.unet = copy.deepcopy(system.unet)
    other.unet.compile(dynamic=False, fullgraph=True)
    if system.runs is not None:
        other.runs = type(system.runs)()
    return other


def sampling_cases(dry: bool, device: str, sampled: Table) -> Iterator[Case]:
    """The loop and the decoder at batch 1 and 8."""
    config, side, steps = (TINY, 8, 2) if dry else (UNetConfig.sd1(), 64, 50)
    rounds = 2 if dry else 5
    shape = AutoencoderConfig.sd()
    if dry:
        shape = AutoencoderConfig(latent_channels=4, channels=(16, 16), blocks=1, norm_groups=4)
    autoencoder = freeze(place_on(Autoencoder(shape), device))
    for batch in (1, 2) if dry else (1, 8):
        yield f"loop, batch {batch}", partial(loop_rows, config, side, steps, batch, rounds, device, sampled)

        def decoding(batch: int = batch) -> list[Row]:
            latents = torch.randn(batch, 4, side, side, device=device)

            def decode(dtype: torch.dtype) -> None:
                with torch.inference_mode(), torch.autocast(device, torch.bfloat16, dtype == torch.bfloat16):
                    for latent in latents.split(1):
                        autoencoder.decode(latent)

            return compare(f"decoder, batch {batch}", {"bf16": lambda: decode(torch.bfloat16),
                                                       "fp32": lambda: decode(torch.float32)},
                           "fp32", rounds, Work(batch), device)

        yield f"decoder, batch {batch}", decoding


def loop_rows(config: UNetConfig, side: int, steps: int, batch: int, rounds: int, device: str,
              sampled: Table) -> list[Row]:
    """The denoising loop of both implementations from the same weights; a way that fails is left out."""
    system = system_of(config, steps, side, device)
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(batch, 4, side, side, generator=generator).to(device)
    context = torch.randn(2 * batch, TOKENS, config.context_width, generator=generator).to(device)
    settings = system.config.sampling

    def ours(one: TextToImage) -> Callable[[], torch.Tensor]:
        return torch.inference_mode()(lambda: one.latents_from_context(context, None, batch, lambda: x_T, settings))

    def other(network: torch.nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: diffusers_loop(network, context, x_T, steps, settings.guidance.scale)

    fast = system.at_speed("fast")
    calls = {"ours, fast": ours(fast)}
    if batch == 1 or device == "cpu":
        calls["ours, exact"] = ours(system)  # in fp32 a batch of 8 takes longer than all the rest
    compiles = device == "cuda" and batch == 1  # a minute or more for each shape
    if compiles:
        calls["ours, fast, compiled"] = ours(compiled(fast))
    try:
        theirs = theirs_of(system.unet, side).bfloat16()
        calls["diffusers bf16"] = other(theirs)
        tuned = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
        tuned.fuse_qkv_projections()
        calls["diffusers bf16, channels-last"] = other(tuned)
        if compiles:
            quick = copy.deepcopy(tuned)
            quick.compile(mode="reduce-overhead", fullgraph=True)  # with CUDA graphs, as ours
            calls["diffusers bf16, compiled"] = other(quick)
    except ImportError:
        sampled.notes.append("diffusers is not installed: no rows of it")
    results: dict[str, torch.Tensor] = {}
    for name in list(calls):
        try:
            for _ in range(3):  # run, record, replay
                results[name] = calls[name]()
        except (RuntimeError, ValueError) as error:  # of one way; a broken device ends the others as well
            calls.pop(name)
            sampled.notes.append(f"batch {batch}, {name}: {' '.join(str(error).split())[:300]}")
    against = "ours, exact" if "ours, exact" in results else "ours, fast"
    reference = results[against]
    apart = ", ".join(f"{name} {rms(found, reference):.2g}" for name, found in results.items())
    sampled.notes.append(f"batch {batch}, root mean square difference to {against} in standard deviations: {apart}")
    one = torch.zeros(1, 4, side, side, device=device)
    flops = forward_flops(system.unet, lambda: system.unet(one, one[:, 0, 0, 0], context[:1]))
    dtypes = {name: torch.float32 if name == "ours, exact" else torch.bfloat16 for name in calls}
    against = "diffusers bf16" if "diffusers bf16" in calls else against
    rows = compare(f"loop, batch {batch}, {steps} steps, {8 * side} px", calls, against, rounds,
                   Work(batch, 2 * batch * steps * flops, dtypes), device)
    sampled.notes.append(f"batch {batch}: all of the loop's ways together {peak_of(device)}")
    return rows


# ---- training

def training_cases(dry: bool, device: str, made: Table) -> Iterator[Case]:
    """256 and 512 px, batches from large to small, plain and compiled."""
    sizes = ((8, (4,)),) if dry else ((32, (256, 64)), (64, (64, 16)))
    for side, batches in sizes:
        for batch in batches:
            for compile_too in (False, True) if device == "cuda" else (False,):
                name = f"training, {8 * side} px, batch {batch}{', compiled' if compile_too else ''}"
                yield name, partial(training_rows, name, TINY if dry else UNetConfig.sd1(), side, batch, compile_too,
                                    2 if dry else 6, made)


def training_rows(name: str, config: UNetConfig, side: int, batch: int, compile_too: bool, rounds: int,
                  made: Table) -> list[Row]:
    """A training step of the denoiser from given latents and a given context."""
    device = made.device
    torch.manual_seed(0)
    unet = place_on(UNet(config), device).train()
    average = [p.detach().clone() for p in unet.parameters()]
    weights = list(unet.parameters())
    optimizer = build_optimizer(unet, OptimConfig())
    schedule = Schedule(ScheduleConfig())
    x_0, eps = torch.randn(2, batch, 4, side, side, device=device)
    context, t = torch.randn(batch, TOKENS, config.context_width, device=device), torch.arange(batch, device=device)
    network: Any = torch.compile(unet, dynamic=False) if compile_too else unet

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = diffusion_loss(lambda x, times: network(x, times, context), x_0, t, eps, schedule, "epsilon").mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, weights, 0.001)

    one = torch.zeros(1, 4, side, side, device=device)
    flops = forward_flops(unet, lambda: unet(one, one[:, 0, 0, 0], context[:1]))
    work = Work(batch, 3 * batch * flops, {"ours": torch.bfloat16})
    rows = compare(name, {"ours": step}, "ours", rounds, work, device)
    made.notes.append(f"{name}: {peak_of(device)}")
    return rows


# ---- both

def main(arguments: list[str]) -> int:
    """Measure one table; returns 1 if no row of it could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("sampling", "training"))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--dry", action="store_true", help="tiny networks, on whatever there is")
    options = parser.parse_args(arguments)
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    made = Table(f"gpu_{options.table}", options.out, device)
    torch.backends.cudnn.benchmark = True  # for both sides
    cases = (sampling_cases if options.table == "sampling" else training_cases)(options.dry, device, made)
    for name, measure in cases:
        if time.monotonic() - began > options.seconds:
            made.add([], f"{name}: no time was left")
            continue
        before = time.monotonic()
        try:
            made.add(measure())
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
            made.add([], f"{name}: failed, {' '.join(str(error).split())[:300]}")
        if device == "cuda":
            torch.cuda.empty_cache()
        synchronize(torch.device(device))
        print(f"{name}: {time.monotonic() - before:.0f} s", flush=True)
    print((options.out / f"gpu_{options.table}.md").read_text(encoding="utf-8"))
    return 0 if made.rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
