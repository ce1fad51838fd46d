"""The race of docs/race.md: 15 minutes, two cores, whole scenes right on 256 unseen prompts, as a row of its table.

    python -m benchmarks.race configs/shapes.yaml --seed 0

trains a config from nothing and evaluates it by the commands that everybody uses, train.py and evaluate.py, and stops
them when the time is up. The row goes to stdout, all that they say to stderr.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.timing import processor
from files.run_folder import read_metrics
from training.experiment import Experiment, load_experiment

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 15.0
CORES = 2
PROMPTS = 256
STDERR = 2  # its descriptor: the row alone goes to stdout
GRACE = 60  # seconds that a program has to save its state once it is asked to stop
COLUMNS = ("config", "seed", "processor", "matrix units", "cores", "torch", "images seen (autoencoder + denoiser)",
           "minutes (train + evaluate)", "whole scenes right", "attributes", "kinds of shapes", "relation")
MEASURES = ("scene", "attributes", "shape", "relation")


class OverTheLimit(Exception):
    """The time was up before the score was known."""


@dataclass(frozen=True)
class Run:
    """One run of the race. ``cores`` are the numbers of the processor's cores that it may use."""

    config: Path
    seed: int
    folder: Path
    cores: Sequence[int]
    limit: float = 60 * MINUTES  # seconds
    prompts: int = PROMPTS


def race(run: Run) -> str:
    """Train and evaluate; the row. Raises ValueError for what cannot take part and for a program that fails, and
    OverTheLimit."""
    experiment = check(run)
    config = str(run.config.resolve())
    training = seconds_of(["train.py", config, f"run={run.folder.resolve()}", f"seed={run.seed}"], run, run.limit)
    evaluation = seconds_of(["evaluate.py", str(run.folder.resolve()), "--count", str(run.prompts)], run,
                            run.limit - training)
    report = json.loads((run.folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    return row_of(run, experiment, (training, evaluation), report)


def check(run: Run) -> Experiment:
    """The experiment of a run. Raises ValueError for a config or a folder that cannot take part."""
    experiment = load_experiment(run.config, [f"seed={run.seed}"])
    if experiment.data.source != "shapes":
        raise ValueError(f"data.source: {experiment.data.source}; valid: shapes, whose scenes can be read back")
    if run.folder.exists() and any(run.folder.iterdir()):
        raise ValueError(f"--run {run.folder} has files in it; valid: a new folder, since a run begins from nothing")
    return experiment


def seconds_of(arguments: Sequence[str], run: Run, limit: float) -> float:
    """Seconds that a program of the project takes on the cores of the run and without a GPU. Raises OverTheLimit after
    ``limit`` seconds, when it is asked to stop, and ValueError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(run.cores)), "CUDA_VISIBLE_DEVICES": ""}
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=STDERR) as program:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(program.pid, run.cores)  # while Python itself still loads
        try:
            status = program.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            stop(program)
            raise OverTheLimit(f"over the limit of {run.limit / 60:g} minutes: {arguments[0]} was stopped; the run is "
                               f"in {run.folder}") from None
        except BaseException:
            stop(program)
            raise
    if status:
        raise ValueError(f"{arguments[0]} ended with status {status}; what it said stands above")
    return time.perf_counter() - began


def stop(program: subprocess.Popen) -> None:
    """Ask a program to save its state and end; end it after a grace."""
    program.send_signal(signal.SIGTERM)
    try:
        program.wait(GRACE)
    except subprocess.TimeoutExpired:
        program.kill()


def row_of(run: Run, experiment: Experiment, seconds: tuple[float, float], report: dict[str, Any]) -> str:
    """The row of a finished run in Markdown, from the ``seconds`` of training and evaluation and its metrics.json."""
    name, units = processor()
    unit, isa = units[0] if units else "none known", os.environ.get("ONEDNN_MAX_CPU_ISA")
    seen = images_seen(experiment, run.folder)
    minutes = [part / 60 for part in seconds]
    scores = [score(report["score"]["all"].get(measure)) for measure in MEASURES]
    scores[0] = f"**{scores[0]}**" + ("" if report["prompts"] == PROMPTS else f" of {report['prompts']} prompts")
    cells = (run.config.name, run.seed, name, f"{unit}, limited to {isa}" if isa else unit, len(run.cores),
             metadata.version("torch"), " + ".join(f"{number:,}" for number in seen.values()),
             f"{sum(minutes):.1f} ({' + '.join(f'{part:.1f}' for part in minutes)})", *scores)
    return "| " + " | ".join(map(str, cells)) + " |"


def images_seen(experiment: Experiment, folder: Path) -> dict[str, int]:
    """Images that each stage has trained on, repeated ones counted each time."""
    steps: dict[str, int] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        steps[line["stage"]] = max(steps.get(line["stage"], 0), line["step"])
    return {"autoencoder": steps.get("autoencoder", 0) * experiment.autoencoder.train.batch,
            "denoiser": steps.get("denoiser", 0) * experiment.denoiser.train.batch}


def score(rate: dict[str, float] | None) -> str:
    """A share in percent with its 95 % interval."""
    return "" if rate is None else f"{100 * rate['value']:.1f} % ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"


def cores_of(text: str | None) -> list[int]:
    """The numbers of the cores of a run: those of ``--cores``, or the first two that this program may use. Raises
    ValueError for cores that it may not use."""
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if text is None:
        return known[:CORES]
    words = text.split(",")
    if not all(word.isdecimal() and int(word) in known for word in words) or len(set(words)) > CORES:
        raise ValueError(f"--cores {text}; valid: up to {CORES} of {', '.join(map(str, known))}, with commas")
    return [int(word) for word in words]


def main(arguments: list[str] | None = None) -> None:
    """Run the race and print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config of shapes, such as configs/shapes.yaml")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a new run folder (runs/race/CONFIG_SEED)")
    parser.add_argument("--cores", metavar="N,N", help="numbers of the cores (the first two)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the limit, for tries (%(default)g)")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="unseen prompts, for tries (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        folder = given.run or Path("runs") / "race" / f"{given.config.stem}_{given.seed}"
        run = Run(given.config, given.seed, folder, cores_of(given.cores), 60 * given.minutes, given.prompts)
        print(race(run))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except OverTheLimit as late:
        raise SystemExit(str(late)) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard") from None


if __name__ == "__main__":
    main()
