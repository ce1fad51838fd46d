"""Train the stages of a config in order: python train.py configs/shapes.yaml [run=DIR] [key.path=value ...]

A finished stage is skipped, an interrupted one continues. Ctrl-C or SIGTERM saves the state first. With several
processes: torchrun --nproc-per-node 8 train.py CONFIG
"""
import argparse
import contextlib
import sys
from pathlib import Path

from files.config import from_dict, to_dict
from files.run_folder import RunFolder
from model.allocator import keep_freed_memory
from model.device import default_device
from training.check import check
from training.distributed import ProcessLost, leave, process_group
from training.experiment import ALONE, STAGES, Experiment, load_experiment
from training.loop import Interrupted, TrainingError
from training.run_stages import run_stages


def main(arguments: list[str]) -> None:
    """Parse the command line and run the stages that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file in configs/, or the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value",
                        help="any key of the config; run=DIR names the run folder (runs/NAME)")
    parser.add_argument("--changed-data", action="store_true",
                        help="go on although the data is not what the run began with; manifest.json notes it")
    parser.add_argument("--check", action="store_true", help="report what speaks for and against the run; no training")
    keep_freed_memory()
    # flags, none of which has a value, go first, because argparse needs the overrides in one piece
    options = parser.parse_args(sorted(arguments, key=lambda text: not text.startswith("-")))
    folders = [text.partition("=")[2] for text in options.overrides if text.startswith("run=")]
    overrides = [text for text in options.overrides if not text.startswith("run=")]
    if "" in folders:
        raise ValueError("run= is empty; valid: run=DIR, the run folder to write")
    experiment = load_experiment(options.config, overrides)
    path = Path(folders[-1] if folders else Path("runs") / experiment.name)
    if options.check:
        if not check(experiment, path, default_device()):
            raise SystemExit(1)
        return
    if experiment.start_from:
        RunFolder.open(experiment.start_from)  # before a folder is made for a run that cannot begin
    with process_group() as processes, contextlib.ExitStack() as stack:
        with processes.main_first():
            run = RunFolder.create(path, to_dict(experiment), lambda data: to_dict(from_dict(Experiment, data)),
                                   processes.main, tuple(STAGES), ALONE)
            stack.enter_context(run.lock())
        run_stages(experiment, run, processes, options.changed_data)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        leave()
    except (ValueError, OSError, TrainingError, ProcessLost) as error:
        raise SystemExit(f"error: {error}") from None
    except (Interrupted, KeyboardInterrupt) as error:
        raise SystemExit(f"stopped: {error or 'by the keyboard, before the first checkpoint'}") from None
