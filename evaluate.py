"""Measure a run and write its page: python evaluate.py runs/shapes [--suite full] [--compare runs/other ...]

For shapes, the guidance scale is chosen on validation prompts. Prompts that training never saw are then sampled, and
every sample is read back into its scene and scored. The full suite adds the measures that need features of images:
distances to real images, the CLIP score where there is a CLIP, copies of training images, and sweeps over guidance and
steps. Samples are kept, so that the same command continues where it was stopped. Several processes share the sampling:
torchrun --nproc-per-node 8 evaluate.py RUN
"""
import argparse
import sys
from pathlib import Path
from typing import Any

from scoring.evaluation import evaluate_run
from scoring.settings import SUITES, EvaluationSettings
from training.distributed import ProcessLost, leave, process_group


def parse(arguments: list[str]) -> EvaluationSettings:
    """The settings on a command line. Raises ValueError for settings that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, such as runs/shapes")
    parser.add_argument("--suite", choices=list(SUITES), default="quick",
                        help="quick: scenes read back; full: also distances, CLIP score, copies, sweeps (%(default)s)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="runs that were measured the same way")
    parser.add_argument("--count", type=int, help="number of test prompts (quick 256, full 1000)")
    parser.add_argument("--validation", type=int, help="number of validation prompts a setting (quick 64, full 128)")
    parser.add_argument("--guidance", type=float, nargs="+", metavar="W", help="guidance scales to choose from")
    parser.add_argument("--steps", type=int, dest="num_steps", metavar="T", help="number of sampler steps")
    parser.add_argument("--sampler", help="name of the sampler")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                        help="arithmetic of sampling (%(default)s)")
    parser.add_argument("--inception", metavar="FILE", help="weights of InceptionV3, for the FID that papers report")
    parser.add_argument("--clip", metavar="DIR", help="run folder with a stage clip, or a folder of transformers' CLIP")
    parser.add_argument("--reference", metavar="DIR",
                        help="folder of real images to compare with (the rest of the test split)")
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return EvaluationSettings(**(given | lists))


def main(arguments: list[str]) -> None:
    """Evaluate a run, print its tables and say where the page is."""
    settings = parse(arguments)
    with process_group() as processes:
        text = evaluate_run(settings, processes)
        if processes.main:
            print(f"{text}\nwrote {settings.run / 'report' / 'index.html'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        leave()
    except (ValueError, OSError, ProcessLost) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard; the same command continues where it was") from None
