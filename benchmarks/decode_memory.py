"""The table of docs/pretrained.md: memory and time of decoding with Stable Diffusion's autoencoder, fp32, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.decode_memory [--size 1024] [--batch 1] [--ways plain sliced tiled]

Weights are random, which changes neither. Each way runs in its own process, one after the other. Memory is the peak
of the resident set during the decode minus the resident memory before, so weights and libraries do not count. A way
that does not fit into memory is reported as such. Seconds are processor time, so other programs hardly affect them.
Linux only.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from model.autoencoder import Autoencoder, AutoencoderConfig
from model.decode import decode_sliced, decode_tiled
from model.device import freeze, place_on

WAYS = {"plain": lambda autoencoder, latents: autoencoder.decode(latents), "sliced": decode_sliced,
        "tiled": decode_tiled}


def resident_bytes(key: str) -> int:
    """Bytes of this process that lie in memory: VmRSS now, VmHWM at most since `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Let VmHWM begin again at what is resident now (proc(5), clear_refs)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def measure(way: str, size: int, batch: int) -> dict[str, float]:
    """GiB, and seconds of the processor, of decoding `batch` images of size x size pixels in this process."""
    torch.manual_seed(0)
    autoencoder = freeze(place_on(Autoencoder(AutoencoderConfig.sd()), "cpu"))
    f = autoencoder.factor
    latents = torch.randn(batch, autoencoder.latent_channels, size // f, size // f)
    with torch.inference_mode():
        autoencoder.decode(torch.zeros(1, autoencoder.latent_channels, 8, 8))  # loads what the first call loads
        forget_peak()
        before, began = resident_bytes("VmRSS"), time.process_time()
        images = WAYS[way](autoencoder, latents)
        seconds = time.process_time() - began
    assert images.shape == (batch, 3, size, size) and bool(images.isfinite().all())
    return {"GiB": (resident_bytes("VmHWM") - before) / 2**30, "seconds": seconds}


def main() -> None:
    """Print one row a way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--here", action="store_true", help="in this process: one way, its numbers as JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.ways[0], options.size, options.batch)))
        return
    print(f"{options.batch} x {options.size} x {options.size} pixels, {torch.get_num_threads()} threads")
    for way in options.ways:
        command = [sys.executable, "-m", "benchmarks.decode_memory", "--here", "--ways", way, "--size",
                   str(options.size), "--batch", str(options.batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
            print(f"{way:<8} did not finish: {reason}", flush=True)
            continue
        row = json.loads(done.stdout)
        print(f"{way:<8} {row['GiB']:6.2f} GiB {row['seconds']:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
