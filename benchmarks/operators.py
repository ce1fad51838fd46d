"""Where the milliseconds of a training step go, by operator of PyTorch, as a table in Markdown.

    python -m benchmarks.operators [--stage denoiser] [--config configs/shapes.yaml] [--steps 20] [key.path=value ...]

It is the real command with the real loop, under torch.profiler from the fourth step on. Times are those of operators
themselves, without what they call; profiling itself costs some, so compare shares and not milliseconds.
"""
import argparse
import dataclasses
import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

import train
from benchmarks.stages import settings
from benchmarks.timing import describe_machine, machine

WARM = 3  # steps before the first that is profiled
ROWS = 16


class Profiled(Exception):
    """The steps that were asked for are done."""


def table_of(events: Sequence[Any], steps: int) -> str:
    """The operators that take longest, by (key, count, self_cpu_time_total in microseconds) of the profiler."""
    whole = sum(event.self_cpu_time_total for event in events)
    lines = ["| operator | calls a step | ms a step | share |", "|---|---|---|---|"]
    ordered = sorted(events, key=lambda event: -event.self_cpu_time_total)
    for event in ordered[:ROWS]:
        lines.append(f"| {event.key.removeprefix('aten::')} | {event.count / steps:.0f} | "
                     f"{event.self_cpu_time_total / 1000 / steps:.1f} | {event.self_cpu_time_total / whole:.1%} |")
    rest = sum(event.self_cpu_time_total for event in ordered[ROWS:])
    lines += [f"| {len(ordered[ROWS:])} others | {sum(event.count for event in ordered[ROWS:]) / steps:.0f} | "
              f"{rest / 1000 / steps:.1f} | {rest / whole:.1%} |",
              f"| all | {sum(event.count for event in events) / steps:.0f} | {whole / 1000 / steps:.1f} | |"]
    return "\n".join(lines)


def profiled_events(stage: str, arguments: list[str], steps: int) -> list[Any]:
    """What the profiler has seen of so many steps of a stage of train.py."""
    module: Any = importlib.import_module(f"training.stages.{stage}")
    fit, profiler = module.fit, profile(activities=[ProfilerActivity.CPU], acc_events=True)

    def watched(task, *rest, **more):
        read, count = task.data_at, 0

        def data_at(position):
            nonlocal count
            if count == WARM:
                profiler.start()
            if count == WARM + steps:
                profiler.stop()
                raise Profiled
            count += 1
            return read(position)

        return fit(dataclasses.replace(task, data_at=data_at), *rest, **more)

    module.fit = watched
    try:
        train.main(arguments)
    except Profiled:
        return list(profiler.key_averages())
    finally:
        module.fit = fit
    raise RuntimeError(f"the stage {stage} took fewer than {WARM + steps} steps")


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("autoencoder", "denoiser"), default="denoiser", help="(%(default)s)")
    parser.add_argument("--config", default="configs/shapes.yaml", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="that are profiled (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="whether it works, not how long it takes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        short = settings(options.stage, options.steps + WARM + 1, options.quick)
        events = profiled_events(options.stage, [options.config, f"run={Path(folder) / 'run'}", *short,
                                                 *options.overrides], options.steps)
    print(f"{describe_machine(machine())}\n\n{table_of(events, options.steps)}")


if __name__ == "__main__":
    main()
