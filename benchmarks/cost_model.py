"""What training costs as the number of GPUs grows: python -m benchmarks.cost_model [CONFIG] [--plot FILE.png]

    step = b 3F / rate + fixed + max(0, exchange - backward)         exchange = 2 (N - 1) / N bytes / bandwidth
    step >= b / loader

b images a GPU, F operations of a forward pass (model/summary.py; the backward pass has twice as many, and is two thirds
of the time), N GPUs that exchange gradients while the backward pass runs; what does not fit into that time is waited
for. The numbers behind it are fitted to some published rows and tried on the others. Everything but those rows is
simulated: nothing here has been run on more than one machine.
"""
import argparse
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from model.autoencoder import AutoencoderConfig
from model.summary import summaries
from model.text_encoder import TextEncoderConfig
from model.unet import UNetConfig
from training.experiment import load_experiment

PARAMETERS = 865_910_724  # of the UNet of Stable Diffusion 2
DOLLARS = 2.0  # a GPU and hour: the price that the second source calculates with


@dataclass(frozen=True)
class Row:
    """A published speed: images a second for each GPU of the UNet of SD-2 base with latents computed before."""

    source: str
    gpu: str
    gpus: int
    size: int
    batch: float  # images a GPU and step
    speed: float
    fitted: bool = False


# MLPerf Training v4.0 (June 2024), Stable Diffusion, NVIDIA's results: images to the target quality over the time
# mosaicml/diffusion, README: images/s of all GPUs at a global batch of 2,048 (550,000 steps are 1,126,400,000 images)
MLPERF = "MLPerf Training v4.0"
MOSAIC = "mosaicml/diffusion"
ROWS = [
    Row(MLPERF, "H200", 8, 512, 64, 51_200 / 49.83 / 8, fitted=True),
    Row(MLPERF, "H100", 64, 512, 16, 102_400 / 14.51 / 64, fitted=True),
    Row(MLPERF, "H100", 1024, 512, 2, 204_800 / 4.10 / 1024),
    *(Row(MOSAIC, "A100", gpus, 256, 2048 / gpus, total / gpus, fitted=gpus in (8, 128))
      for gpus, total in ((8, 1100), (16, 2180), (32, 4080), (64, 8530), (128, 11600))),
    *(Row(MOSAIC, "A100", gpus, 512, 2048 / gpus, total / gpus, fitted=gpus == 8)
      for gpus, total in ((8, 290), (16, 585), (32, 1195), (64, 2340), (128, 4590))),
]


@dataclass(frozen=True)
class Machine:
    """``rate`` operations a second that training reaches; ``fixed`` seconds a step; ``inside`` and ``outside`` bytes a
    second that a ring of GPUs moves within a node of eight and across nodes; ``loader`` images/s for each GPU."""

    rate: float
    fixed: float
    inside: float
    outside: float
    bytes: float  # of a gradient
    loader: float = float("inf")


@lru_cache(maxsize=None)
def forward_of_sd2(size: int) -> float:
    """Operations of the UNet of SD-2 for one image."""
    parts = summaries(AutoencoderConfig.sd(), TextEncoderConfig.sd2(), UNetConfig.sd2(), size)
    return float(sum(stage.flops for stage in parts["denoiser"]))


def step_seconds(machine: Machine, gpus: int, batch: float, forward: float, parameters: int = PARAMETERS) -> float:
    """Seconds of a step with ``batch`` images a GPU."""
    compute = batch * 3 * forward / machine.rate
    bandwidth = machine.inside if gpus <= 8 else machine.outside
    exchange = 2 * (gpus - 1) / gpus * parameters * machine.bytes / bandwidth
    return max(compute + machine.fixed + max(0.0, exchange - compute * 2 / 3), batch / machine.loader)


def fit_machines() -> dict[tuple[str, int], Machine]:
    """By source and size of the images, from the rows that say so.

    H100 and H200: rate and fixed time of a step from two rows; the network is the one on the data sheet, eight links of
    50 GB/s a node. A100: the rate of each size from its row of 8, the network from one row of 128: what the exchange
    would have to take for the step to be as long as it was.
    """
    one, two = (row for row in ROWS if row.source == MLPERF and row.fitted)
    flops = 3 * forward_of_sd2(512)
    seconds = one.batch / one.speed, two.batch / two.speed
    rate = flops * (one.batch - two.batch) / (seconds[0] - seconds[1])
    hopper = Machine(rate, seconds[0] - one.batch * flops / rate, 450e9, 400e9, 2)
    found = {(MLPERF, 512): hopper}
    for size in (256, 512):
        row = next(row for row in ROWS if row.source == MOSAIC and row.size == size and row.gpus == 8)
        found[MOSAIC, size] = Machine(row.speed * 3 * forward_of_sd2(size), 0.0, 300e9, 200e9, 4)
    row = next(row for row in ROWS if row.source == MOSAIC and row.gpus == 128 and row.fitted)
    compute = row.batch * 3 * forward_of_sd2(row.size) / found[MOSAIC, row.size].rate
    exchange = row.batch / row.speed - compute / 3
    outside = 2 * 127 / 128 * PARAMETERS * 4 / exchange
    return {key: replace(m, outside=outside) if key[0] == MOSAIC else m for key, m in found.items()}


def compare_rows() -> list[tuple[Row, float]]:
    """Every published row with the speed that the model predicts for it."""
    machines = fit_machines()
    return [(row, row.batch / step_seconds(machines[row.source, row.size], row.gpus, row.batch,
                                           forward_of_sd2(row.size))) for row in ROWS]


def print_rows() -> None:
    """Print the published rows, the predictions, and their errors."""
    print(f"{'source':<22}{'GPUs':>12}{'size':>6}{'batch/GPU':>11}{'images/s/GPU':>14}{'model':>8}{'error':>9}")
    for row, speed in compare_rows():
        print(f"{row.source:<22}{row.gpus:>7} {row.gpu}{row.size:>6}{row.batch:>11g}{row.speed:>14.1f}{speed:>8.1f}"
              f"{100 * (speed / row.speed - 1):>+8.1f} %{'  fitted' if row.fitted else ''}")
    for (source, size), m in fit_machines().items():
        print(f"{source}, {size} px: {m.rate / 1e12:.0f} TFLOP/s, {1000 * m.fixed:.1f} ms a step besides, network "
              f"{m.outside / 1e9:.0f} GB/s")


def scaling(machine: Machine, forward: float, parameters: int, total: int) -> list[tuple[int, float, float]]:
    """(GPUs, images/s, efficiency against one GPU) for a global batch of ``total``, from 1 GPU to one image each."""
    found = []
    for gpus in [2**n for n in range(11) if 2**n <= total]:
        step = step_seconds(machine, gpus, total / gpus, forward, parameters)
        one = step_seconds(machine, 1, total, forward, parameters)
        found.append((gpus, total / step, one / step / gpus))
    return found


def print_config(path: str) -> None:
    """Print the simulated cost of the denoiser of a config on GPUs like the fitted H100s."""
    experiment = load_experiment(path)
    parts = summaries(experiment.autoencoder.model, experiment.denoiser.text_encoder, experiment.denoiser.unet,
                      experiment.data.size)
    both = [*parts["denoiser"], *parts["text encoder"]]
    forward, parameters = float(sum(s.flops for s in both)), sum(s.parameters for s in both)
    train = experiment.denoiser.train
    machine = fit_machines()[MLPERF, 512]
    kept = sum(s.activations for s in both) * train.batch / train.accumulate / 2 / 1e9
    print(f"\n{path}: {parameters / 1e6:.0f} million parameters, {3 * forward / 1e9:,.0f} GFLOP an image, batch "
          f"{train.batch}, {train.steps:,} steps; weights, average, gradients, optimizer "
          f"{20 * parameters / 1e9:.1f} GB, activations of a piece of a batch {kept:.1f} GB in bf16, all GPUs together")
    print("simulated on GPUs like the H100s above, latents computed before:")
    for gpus, speed, efficiency in scaling(machine, forward, parameters, train.batch):
        hours = train.steps * train.batch / speed / 3600
        print(f"  {gpus:>5} GPUs {speed:>10,.0f} images/s {100 * efficiency:>6.0f} % {hours:>9,.1f} h "
              f"{gpus * hours * DOLLARS:>10,.0f} $")


def plot(path: Path) -> None:
    """Plot published rows and the model over the number of GPUs."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for number, (key, machine) in enumerate(fit_machines().items()):
        rows = [row for row in ROWS if (row.source, row.size) == key]
        label = f"{rows[-1].gpu}, {key[1]} px"
        axes.plot([r.gpus for r in rows], [r.speed for r in rows], "o", color=f"C{number}", label=f"{label}, published")
        axes.plot([r.gpus for r in rows], [r.batch / step_seconds(machine, r.gpus, r.batch, forward_of_sd2(key[1]))
                                           for r in rows], color=f"C{number}", label=f"{label}, model")
    axes.set(xscale="log", xlabel="GPUs", ylabel="images / s / GPU", ylim=(0, None))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> None:
    """Print the rows, and the cost of a config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a file in configs/, whose denoiser is simulated")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows")
    options = parser.parse_args(arguments)
    print_rows()
    if options.config:
        print_config(options.config)
    if options.plot:
        plot(options.plot)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
