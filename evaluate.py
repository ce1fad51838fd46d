"""Measure a run and write its page: python evaluate.py runs/shapes [--suite full] [--compare runs/other ...]

On shapes, guidance is chosen on validation prompts; then prompts that training never saw are sampled and every picture
is read back into its scene and scored. The full suite adds what needs features of pictures: distances to real ones,
CLIP score where there is a CLIP, copies of training pictures, guidance and steps against both. Samples are kept:
started again it goes on where it was. Several processes share the sampling: torchrun --nproc-per-node 8 evaluate.py RUN
"""
import argparse
import hashlib
import html
import json
import sys
from pathlib import Path
from typing import Any

import torch

from data.catalog import build_source, data_key
from data.emoji.emoji import Emoji
from data.shapes.shapes import Shapes
from eval.compare import check_protocols, comparison, read_figures
from eval.interval import Estimate
from eval.plots import draw_curves
from eval.scenes.score import Rate
from eval.suite import COLUMNS, rows_table
from files.pages import image_figures, markdown_table, page
from files.run_folder import RunFolder, environment, read_metrics
from files.whole import write_text
from pipeline.loading import load_run
from pipeline.system import TextToImage, with_options
from scoring.distances import TRAINING, Judges, Real, full_sections, judges_of, real_pictures
from scoring.emoji import emoji_sections
from scoring.held_out import Prompts, captions_of_training, held_out_prompts, unseen_prompts
from scoring.samples import Drawn, Sampler, at_scales, at_steps
from scoring.shapes import SHOWN, Section, best_guidance, percent, reconstructions, scene_sections
from training.distributed import Processes, ProcessLost, leave, process_group
from training.experiment import Experiment, load_experiment

# (test prompts, validation prompts, guidance scales, numbers of steps) of each suite
SUITES: dict[str, tuple[int, int, list[float], list[int]]] = {
    "quick": (256, 64, [1.5, 3.0, 5.0], []), "full": (1000, 128, [1.0, 1.5, 3.0, 5.0, 7.5], [5, 10, 25, 50])}
REAL = 16  # real pictures shown
EXTREME = 8  # pictures shown of the best and of the worst


def prompts_of(experiment: Experiment, options: argparse.Namespace) -> tuple[Prompts, Prompts]:
    """(test, validation) prompts that training never saw."""
    data = experiment.data.squares
    if data.source == "shapes":
        trained = captions_of_training(experiment)
        return (unseen_prompts(Shapes(data.shapes, "test"), trained, options.count),
                unseen_prompts(Shapes(data.shapes, "validation"), trained, options.validation))
    return (held_out_prompts(build_source(data, "test"), options.count),
            held_out_prompts(build_source(data, "validation"), options.validation))


def draw(system: TextToImage, options: argparse.Namespace, sampler: Sampler, test: Prompts,
         validation: Prompts) -> tuple[Drawn, list[dict[str, float]]]:
    """All samples, and the scores that guidance was chosen by. Every process calls it."""
    base = with_options(system.config.sampling, options.sampler, options.steps)
    choosing = bool(validation.facts)
    guidance = at_scales(sampler, validation, options.guidance, base) if choosing or options.suite == "full" else []
    given = options.guidance[0] if len(options.guidance) == 1 else base.guidance.scale
    scale, sweep = best_guidance(guidance, validation) if choosing else (given, [])
    config = with_options(base, scale=scale)
    images = sampler(test, config, f"test, guidance {scale:g}")
    return Drawn(test, config, images, validation, guidance,
                 at_steps(sampler, validation, options.sweep_steps, config)), sweep


def judged_by(experiment: Experiment, device: torch.device, run: RunFolder, options: argparse.Namespace,
              test: Prompts) -> tuple[Judges, Real]:
    """What the full suite compares with, before anything is sampled: what is wrong with it is said at once."""
    source = build_source(experiment.data.squares, "test")
    about = f"{hash_of_data(experiment)} {hash_of_pictures(test)}"  # settings, and what came of them
    real = real_pictures(source, test.seeds[-1] + 1, about, options.reference, test.drawn[0].shape[1:])
    return judges_of(options.inception, options.clip, run.path, device), real


def hash_of_data(experiment: Experiment) -> str:
    """Of all that the pictures of the source depend on."""
    return hashlib.sha256(json.dumps(data_key(experiment.data), sort_keys=True).encode()).hexdigest()[:16]


def hash_of_pictures(prompts: Prompts) -> str:
    """Of the real pictures of prompts: it changes with the code that draws them, too."""
    digest = hashlib.sha256()
    for picture in prompts.drawn:
        digest.update(picture.numpy().tobytes())
    return digest.hexdigest()[:16]


def searched(experiment: Experiment) -> int:
    """How many training pictures copies are looked for among: all that the denoiser has seen, up to TRAINING."""
    count = len(build_source(experiment.data, "train"))
    return min(experiment.denoiser.images or count, count, TRAINING)


def measure(system: TextToImage, experiment: Experiment, run: RunFolder, options: argparse.Namespace, drawn: Drawn,
            sweep: list[dict[str, float]], protocol: dict[str, Any], full: tuple[Judges, Real] | None) -> list[Section]:
    """Score the samples, write metrics.json; returns the sections of the page."""
    folder, data = run.path / "report", experiment.data
    sections: list[Section] = []
    metrics: dict[str, Any] = {}
    ranking = None
    known = bool(drawn.prompts.facts) or data.source == "emoji"
    ceiling = reconstructions(system, drawn.prompts.drawn) if known or full else []
    if drawn.prompts.facts:
        sections, metrics, ranking = scene_sections(drawn, ceiling, sweep, folder)
    elif data.source == "emoji":
        sections, metrics, ranking = emoji_sections(Emoji(data.emoji, "test"), drawn, ceiling, folder)
    else:
        sections = [("Pictures of held-out prompts",
                     image_figures(drawn.images[:SHOWN], drawn.prompts.captions, folder / "pictures"))]
    sections.append(("The real pictures of the first of these prompts", image_figures(
        torch.stack(drawn.prompts.drawn[:REAL]), drawn.prompts.captions, folder / "real")))
    if full is not None:
        training = build_source(experiment.data.squares, "train")
        more, figures, scores = full_sections(drawn, ceiling, *full, training, protocol["copies_searched"], folder)
        sections, metrics, ranking = sections + more, metrics | figures, ranking or scores
        if scores is not None:
            metrics.setdefault("per_prompt", {})["CLIP score"] = [[score, 100] for score in scores]
    if ranking is not None:
        sections += extremes(drawn, ranking, folder)
    metrics = {"protocol": protocol, **metrics}
    if options.compare:
        table = comparison(metrics, {str(name): read_figures(name) for name in options.compare})
        print(table)
        sections.insert(0, ("Beside other runs, 95 % intervals", markdown_table(table)))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    sections.append(("How these figures were made", markdown_table(rows_table(("what", "value"), protocol.items()))))
    write_text(folder / "figures.md", "\n\n".join(tables_of(metrics)) + "\n")
    return sections


def tables_of(metrics: dict[str, Any]) -> list[str]:
    """The figures as Markdown: scenes, then distances and agreement, then how they were made."""
    rows = {"score": "samples", "chance": "of other prompts", "calibration": "drawn pictures",
            "ceiling": "through the autoencoder"}
    guess = metrics.get("guess", {})
    scenes = [rows_table(("measure, %", *rows.values(), *(["a guess"] if guess else [])), (
        (name, *(percent(Rate(**metrics[row]["all"][name])) for row in rows),
         *([f"{100 * guess[name]:.1f}" if name in guess else ""] if guess else []))
        for name in metrics["score"]["all"]))] if "score" in metrics else []
    figures = [rows_table(COLUMNS, (
        (name, *("" if cell is None else Estimate(**cell) for cell in figure.values()))
        for name, figure in metrics["figures"].items()))] if "figures" in metrics else []
    return [*scenes, *figures, rows_table(("protocol", "value"), metrics["protocol"].items())]


def comparable(experiment: Experiment, options: argparse.Namespace, test: Prompts,
               full: tuple[Judges, Real] | None) -> dict[str, Any]:
    """What must be the same for figures to be compared; known before anything is sampled."""
    found: dict[str, Any] = {
        "suite": options.suite, "data": hash_of_data(experiment), "prompts": len(test),
        "prompts_sha256": hashlib.sha256("\n".join(test.captions).encode()).hexdigest()[:16],
        "pictures_sha256": hash_of_pictures(test), "seeds": "the number of the item in its split"}
    if full is not None:
        judges, real = full
        found |= {"reference": f"{real.about} (of {real.data})", "features": judges.features.stamp,
                  "clip": judges.clip.stamp if judges.clip else None, "copies_searched": searched(experiment),
                  "neighbours": "3 for precision, recall, density, coverage"}
    return found


def protocol_of(options: argparse.Namespace, drawn: Drawn, sampler: Sampler) -> dict[str, Any]:
    """Everything else that a figure depends on."""
    config, here = drawn.config, environment()
    return {"sampler": config.sampler, "steps": config.steps,
            "guidance": config.guidance.scale, "validation": len(drawn.validation), "precision": options.precision,
            "picture": "x".join(map(str, drawn.images.shape[2:])), "weights": sampler.weights,
            "samples_drawn_by": "; ".join(sampler.made) or "not written down", "revision": here["revision"],
            "device": here["device"], "torch": here["versions"]["torch"], "command": here["command"]}


def extremes(drawn: Drawn, ranking: list[float], folder: Path) -> list[Section]:
    """The samples with the most and with the least of what their prompts promised."""
    order = sorted(range(len(ranking)), key=ranking.__getitem__)
    found = []
    for name, chosen in (("Best", order[::-1][:EXTREME]), ("Worst", order[:EXTREME])):
        labels = [f"{ranking[i]:.2f}: {drawn.prompts.captions[i]}" for i in chosen]
        found.append((f"{name} by score", image_figures(drawn.images[chosen], labels, folder / name.lower())))
    return found


def training_section(run: RunFolder) -> Section:
    """Curves, and what the run wrote down about itself."""
    known = json.loads(run.manifest.read_text(encoding="utf-8")) if run.manifest.is_file() else {}
    drawn = draw_curves(read_metrics(run.metrics), run.path / "report" / "curves.png")
    content = '<p class="curves"><img src="curves.png" alt="loss and validation curves"></p>' if drawn else (
        '<p class="quiet">No curves: install matplotlib, pip install -e ".[plots]"</p>')
    return "Training", content + f"<pre>{html.escape(json.dumps(known, indent=1)[:4000])}</pre>"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what is not given comes from the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder, such as runs/shapes")
    parser.add_argument("--suite", choices=list(SUITES), default="quick",
                        help="quick: scenes of shapes; full: also distances, CLIP score, copies, sweeps (%(default)s)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="runs measured the same way before")
    parser.add_argument("--count", type=int, help="test prompts (quick 256, full 1000)")
    parser.add_argument("--validation", type=int, help="validation prompts a setting (quick 64, full 128)")
    parser.add_argument("--guidance", type=float, nargs="+", metavar="W", help="scales to choose from")
    parser.add_argument("--steps", type=int, help="sampler steps")
    parser.add_argument("--sampler", help="sampler")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of sampling (%(default)s)")
    parser.add_argument("--inception", metavar="FILE", help="weights of InceptionV3, for the FID that papers report")
    parser.add_argument("--clip", metavar="DIR", help="run folder with a stage clip, or a folder of transformers' CLIP")
    parser.add_argument("--reference", metavar="DIR", help="pictures to compare with (the rest of the test split)")
    options = parser.parse_args(arguments)
    count, validation, scales, options.sweep_steps = SUITES[options.suite]
    for name, value in (("count", count), ("validation", validation), ("guidance", scales)):
        if getattr(options, name) is None:
            setattr(options, name, value)
    least = 20 if options.suite == "full" else 2  # memorization needs 20 held-out pictures
    for name in ("count", "validation"):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} {getattr(options, name)}; valid: from {least} up")
    options.chosen = scales is not options.guidance  # on the command line
    for name in ("inception", "clip", "reference"):
        if getattr(options, name) and options.suite != "full":
            raise ValueError(f"--{name} is for --suite full; valid: both together")
    return options


def run_evaluation(options: argparse.Namespace, processes: Processes) -> None:
    """Sample in every process, measure and write report/index.html in the main one."""
    run = RunFolder.open(Path(options.run))
    for other in options.compare:
        read_figures(other)  # now, and not after an hour
    system = load_run(run.path, processes.device(), moderation=None)  # captions of the data set
    experiment = load_experiment(run.path / "config.yaml")
    sampler = Sampler(system, run.path / "report" / "cache", options.precision, processes)
    test, validation = prompts_of(experiment, options)
    if not validation.facts and options.chosen and options.suite == "quick" and len(options.guidance) > 1:
        raise ValueError(f"--guidance with {len(options.guidance)} scales: nothing here chooses among them; valid: one "
                         "scale, or --suite full, which shows them all")
    full = None
    if options.suite == "full" and processes.main:
        full = judged_by(experiment, system.device, run, options, test)
    known = comparable(experiment, options, test, full) if processes.main else {}
    for other in options.compare if processes.main else []:
        check_protocols(known, read_figures(other)["protocol"], other)  # now, and not when half is written
    drawn, sweep = draw(system, options, sampler, test, validation)
    if processes.main:
        protocol = known | protocol_of(options, drawn, sampler)
        sections = [*measure(system, experiment, run, options, drawn, sweep, protocol, full), training_section(run)]
        write_text(run.path / "report" / "index.html", page(f"Run {run.path.name}", sections))
        print(f"wrote {run.path / 'report' / 'index.html'}")


def main(arguments: list[str]) -> None:
    """Evaluate and write report/index.html."""
    options = parse(arguments)
    with process_group() as processes:
        run_evaluation(options, processes)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        leave()
    except (ValueError, OSError, ProcessLost) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard; the same command goes on where it was") from None
