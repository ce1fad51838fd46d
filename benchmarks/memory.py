"""Memory of sampling: python -m benchmarks.memory [--samples 1000] [--quick] (Linux)

level      the resident set while one small system draws one image after another: it must not grow
peak       the most that one guided run needs beside the weights, batch 1 and 16, ours and diffusers' loop
decoder    the same of decoding large images: python -m benchmarks.decode_memory

Each way runs in a process of its own; peaks are those of the resident set during the run minus what was resident
before it (proc(5), clear_refs).
"""
import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.decode_memory import forget_peak, resident_bytes
from benchmarks.sampling import CONFIG, TINY, TOKENS, diffusers_loop, system_of, theirs_of
from benchmarks.timing import add_flags, describe_machine, machine

WAYS = ("ours", "ours, fast", "diffusers fp32")


def level(samples: int) -> list[tuple[int, float]]:
    """(images so far, resident MiB) at eleven points of a run of many samples."""
    system, found = system_of(TINY, 4, 8, "cpu"), []
    context = torch.randn(2, TOKENS, TINY.context_width)
    with torch.inference_mode():
        for k in range(samples + 1):
            system.latents_from_context(context, None, 1, lambda: torch.randn(1, 4, 8, 8), system.config.sampling)
            if k % max(1, samples // 10) == 0:
                gc.collect()
                found.append((k, resident_bytes("VmRSS") / 2**20))
    return found


def peak(way: str, batch: int, quick: bool) -> dict[str, float]:
    """MiB that a run of two steps needs beside the weights, and MiB of the weights."""
    config, side = (TINY, 8) if quick else (CONFIG, 16)
    system = system_of(config, 2, side, "cpu")
    x_T = torch.randn(batch, 4, side, side)
    context = torch.randn(2 * batch, TOKENS, config.context_width)
    weights = sum(p.nbytes for p in system.unet.parameters())
    if way == "diffusers fp32":
        theirs = theirs_of(system.unet, side)
        del system

        def run() -> None:
            diffusers_loop(theirs, context, x_T, 2, 5.0)
    else:
        one = system.at_speed("fast") if way == "ours, fast" else system
        weights = sum(p.nbytes for p in one.unet.parameters())
        del system

        @torch.inference_mode()
        def run() -> None:
            one.latents_from_context(context, None, batch, lambda: x_T, one.config.sampling)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building the networks has left free would hide what a run needs
    small = resident_bytes("VmRSS")
    forget_peak()
    run()
    return {"run": (resident_bytes("VmHWM") - small) / 2**20, "weights": weights / 2**20}


def main(arguments: list[str]) -> int:
    """Print and write the table; returns 1 if the level rises by more than 1 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--samples", type=int, default=1000, help="images of the level (%(default)s)")
    parser.add_argument("--here", nargs=2, metavar=("WAY", "BATCH"), help="one peak in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(peak(options.here[0], int(options.here[1]), options.quick)))
        return 0
    if options.quick:
        options.samples = 50
    points = level(options.samples)
    first, last = points[len(points) // 5][1], points[-1][1]
    lines = [f"{describe_machine(machine())}.", "",
             f"Level: {first:.1f} MiB after {points[len(points) // 5][0]} images, "
             f"{last:.1f} MiB after {points[-1][0]}.", "", "| batch | call | weights | beside them, at most |",
             "|---|---|---|---|"]
    rows = []
    for batch in (1, 16):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.memory", "--here", way, str(batch)]
            done = subprocess.run([*command, *(["--quick"] if options.quick else [])], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
                lines.append(f"| {batch} | {way} | did not finish: {reason} | |")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"batch": batch, "call": way, **found})
            lines.append(f"| {batch} | {way} | {found['weights']:.0f} MiB | {found['run']:.0f} MiB |")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.json").write_text(json.dumps({"level": points, "peaks": rows}) + "\n", encoding="utf-8")
    (out / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return int(last > 1.01 * first)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
