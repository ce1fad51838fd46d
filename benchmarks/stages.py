"""Training steps of two revisions in turns, shared by `python -m benchmarks.training` and `.autoencoder`."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import Row, add_flags, quartiles, ratio_of, save
from training.experiment import load_experiment

ROOT = Path(__file__).parents[1]
WARM = 3  # steps before the first that is timed
HERE, AGAIN, AGAINST = "this code", "this code (again)", "against"


class Run:
    """A training run in its own process that takes one step at a time (`benchmarks/steps.py`)."""

    def __init__(self, checkout: Path, stage: str, config: Path, overrides: list[str], folder: Path):
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "steps.py"), stage, str(config), f"run={folder}", *overrides],
            cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True)
        self.answer()  # it stands before its first step

    def answer(self) -> dict[str, Any]:
        """The next answer of the process. Raises RuntimeError if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the run {self.process.args} ended with status {self.process.wait()}; run it by hand "
                               "to see why")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """Take one step; returns its seconds or, after the last step, the metrics of the run."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def timed_steps(runs: dict[str, Run], steps: int) -> tuple[dict[str, list[float]], dict[str, list[dict]]]:
    """(seconds of each step by name, what was logged by name) of runs of so many steps, in turns of changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    metrics: dict[str, list[dict]] = {}
    names = list(runs)
    for number in range(steps):
        for name in names if number % 2 == 0 else names[::-1]:
            answer = runs[name].step()
            if "metrics" in answer:
                metrics[name] = answer["metrics"]
            else:
                seconds[name].append(answer["seconds"])
    return seconds, metrics


def settings(stage: str, steps: int, quick: bool) -> list[str]:
    """Overrides for a short run of one stage that logs and validates at its end, after the least work before it."""
    found = [f"stages=[{'tokenizer, autoencoder' + (', denoiser' if stage == 'denoiser' else '')}]",
             "data.shapes.train=2048", "data.shapes.validation=256"]
    for name in ("autoencoder", "denoiser"):
        count = steps if name == stage else 2
        found += [f"{name}.train.{key}={value}" for key, value in {
            "steps": count, "optim.warmup": max(1, count // 10), "validate_every": 10**6, "preview_every": 10**6,
            "checkpoint_every": 10**6, "log_every": max(1, count // 4)}.items()]
    found += ["denoiser.images=2048", "denoiser.validation=256"]
    if quick:
        found += ["autoencoder.train.batch=4", "denoiser.train.batch=4", "data.shapes.train=64", "denoiser.images=64",
                  "data.shapes.validation=16", "denoiser.validation=16", "autoencoder.validation=16"]
    return found


def rows_of(stage: str, seconds: dict[str, list[float]], batches: dict[str, int],
            shares: dict[str, float]) -> list[Row]:
    """A row for each run; the ratio of this code is against the other revision, that of its second run against its
    first. Ratios are those of images a second, since a run may have another batch.

    ``shares`` of the peak are those that the runs have logged themselves.
    """
    rows = []
    warm = {name: values[WARM:] for name, values in seconds.items()}
    an_image = {name: [value / batches[name] for value in values] for name, values in warm.items()}
    for name, values in warm.items():
        base = {AGAIN: HERE, HERE: AGAINST}.get(name)
        ratio = ratio_of(an_image[base], an_image[name]) if base in an_image else (None, None, None)
        (low, high), median = quartiles(values), sorted(values)[len(values) // 2]
        rows.append(Row(f"{stage} step", name, median, low, high, len(values), *ratio, images=batches[name] / median,
                        share=shares[name], first=seconds[name][0]))
    return rows


def wait_factor(split: dict[str, float]) -> float:
    """How many times as long a step took because it waited for its turn, which the run counts as reading data."""
    return sum(split.values()) / max(1e-9, sum(split.values()) - split["data"])


def batch_of(stage: str, config: str, overrides: list[str]) -> int:
    """The images of a step of a stage."""
    experiment = load_experiment(config, overrides)
    return (experiment.autoencoder if stage == "autoencoder" else experiment.denoiser).train.batch


def main(stage: str, arguments: list[str] | None = None, description: str | None = None) -> None:
    """The command line of a stage."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, rounds=40)
    parser.add_argument("--config", default="configs/shapes.yaml", help="(%(default)s)")
    parser.add_argument("--against", type=Path, help="a checkout of the revision to compare with")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for this code only")
    options = parser.parse_args(arguments)
    steps = (4 if options.quick else options.rounds) + WARM + 1
    shared = settings(stage, steps, options.quick)
    batches = {name: batch_of(stage, options.config, [*shared, *own])
               for name, own in ((HERE, options.overrides), (AGAIN, options.overrides), (AGAINST, []))}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Run] = {}
        try:
            for name, checkout in ((HERE, ROOT), (AGAINST, options.against), (AGAIN, ROOT)):
                if checkout is not None:
                    own = options.overrides if checkout is ROOT else []
                    runs[name] = Run(checkout.resolve(), stage, Path(options.config).resolve(), [*shared, *own],
                                     Path(folder) / name.replace(" ", "_"))
            seconds, metrics = timed_steps(runs, steps)
        finally:
            for run in runs.values():
                run.close()
    logged = {name: next(line for line in reversed(lines) if "share_of_peak" in line)
              for name, lines in metrics.items()}
    split = {name: {part: f"{1000 * value:.1f} ms" for part, value in line["split"].items() if part != "data"}
             for name, line in logged.items()}
    shares = {name: line["share_of_peak"] * wait_factor(line["split"]) for name, line in logged.items()}
    losses = {name: {key: round(value, 5) for line in lines for key, value in line.items()
                     if key.startswith("validation_")} for name, lines in metrics.items()}
    command = " ".join(["python -m benchmarks." + {"denoiser": "training"}.get(stage, stage),
                        *(sys.argv[1:] if arguments is None else arguments)])
    print(save(f"{stage}_step", rows_of(stage, seconds, batches, shares), options.out, command, options.device,
               split=split, validation=losses))
