"""Two processes of one core each against one process of two cores, on the steps of a stage, in turns.

    python -m benchmarks.processes --cores 0,1 --stage denoiser

Each run is the real command for so many steps; images a second are those it logs after the first quarter. Both see the
same images. Needs cores that nothing else uses.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.stages import ROOT, settings


def images_per_second(stage: str, config: str, steps: int, cores: list[str], processes: int, overrides: list[str],
                      quick: bool) -> float:
    """What one run of so many processes, which share the cores evenly, logs at its end."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run(
            ["taskset", "-c", ",".join(cores), sys.executable, *(launcher if processes > 1 else []), "train.py", config,
             f"run={folder}", *settings(stage, steps, quick), *overrides], cwd=ROOT, check=True,
            stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(max(1, len(cores) // processes))})
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["images_per_second"] for line in lines
                              if line["stage"] == stage and "images_per_second" in line][1:])


def main(arguments: list[str] | None = None) -> None:
    """Alternate both, print the speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", default="0,1", help="(%(default)s)")
    parser.add_argument("--stage", choices=("autoencoder", "denoiser"), default="denoiser")
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="whether it works, not how fast it is")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args(arguments)
    cores = options.cores.split(",")
    found: dict[int, list[float]] = {1: [], len(cores): []}
    for number in range(options.rounds):
        for processes in list(found)[::1 if number % 2 == 0 else -1]:
            found[processes].append(images_per_second(options.stage, options.config, options.steps, cores, processes,
                                                      options.overrides, options.quick))
            print(f"{processes} processes on cores {options.cores}: {found[processes][-1]:.1f} images/s", flush=True)
    ratios = [many / one for one, many in zip(found[1], found[len(cores)])]
    print(f"{len(cores)} processes are {statistics.median(ratios):.2f} times as fast as one ({min(ratios):.2f} to "
          f"{max(ratios):.2f} over {options.rounds} rounds)")


if __name__ == "__main__":
    main()
