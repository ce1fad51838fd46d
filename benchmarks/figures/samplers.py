"""Which sampler, how many steps, which guidance: images and scores of a trained run of shapes.

    python -m benchmarks.figures.samplers runs/shapes --weak runs/shapes_weak [--guidance 5] [--out docs/images]

draws prompts of the test split that training never saw, the same prompts from the same first noise for every point,
reads the images back into scenes and writes

    sampler_scores.png    score against network calls, a curve a sampler
    sampler_images.png    eight prompts, a row a sampler
    guidance_scores.png   score against guidance scale, a curve a variant
    guidance_images.png   the same eight prompts, a row a variant

and a table of every point with bootstrap intervals over prompts, also of its difference to the point named by
`Study.reference`, prompt by prompt. Every point is kept in --work as soon as it is drawn, so the command may be stopped
and repeated, and with --minutes it begins no point after that time. 128 prompts take about 25 minutes of one core with
AVX512-BF16, and needs matplotlib. --weak is for autoguidance: a run folder or a state of the same run, as
`sample.py --weak`.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from data.shapes.render import vocabulary
from data.shapes.shapes import Shapes
from diffusion.guidance import GuidanceConfig
from diffusion.samplers import Value
from diffusion.sampling import SamplingConfig
from eval.scenes.score import ATTRIBUTES, read_scenes, score_scene
from files.config import to_dict
from files.sheets import axes_grid
from files.whole import sha256_of, write_text
from model.device import autocast_dtype
from pipeline.loading import load_run, load_weaker
from pipeline.system import TextToImage
from scoring.held_out import Prompts, training_captions, unseen_prompts
from training.experiment import Experiment, load_experiment

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SHOWN = 8  # images of a row
BATCH = 32
MEASURES = {"attributes": "attributes right", "scene": "whole scenes right"}


@dataclass(frozen=True)
class Point:
    """One setting that is sampled and scored. `weak`: guided by the weaker network; `turn`: the order in which points
    are sampled."""

    curve: str
    config: SamplingConfig
    weak: bool = False
    turn: int = field(default=0, compare=False)


@dataclass
class Study:
    """Points, the x axis, and the point with which the others are compared; `shown`: the points whose images are
    printed."""

    name: str
    axis: str
    reference: Point
    shown: dict[str, Point] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)


def sampler_study(scale: float) -> Study:
    """Every sampler that does something of its own on this schedule, over steps. `euler` is `ddim` and
    `euler_ancestral` is `ddpm` (tests/test_samplers.py); the flow samplers need a flow."""
    guidance = GuidanceConfig(scale=scale)
    kinds: dict[str, tuple[str, dict[str, Value]]] = {
        "ddim": ("ddim", {}), "dpm_solver_multistep, order 2": ("dpm_solver_multistep", {"order": 2}),
        "ddpm": ("ddpm", {}), "heun": ("heun", {}), "unipc, order 2": ("unipc", {"order": 2}),
        "dpm_solver_sde, order 2": ("dpm_solver_sde", {"order": 2}),
        "dpm_solver_singlestep, order 2": ("dpm_solver_singlestep", {"order": 2}), "pndm": ("pndm", {}),
        "dpm_solver_multistep, order 3": ("dpm_solver_multistep", {"order": 3}), "lcm": ("lcm", {}),
    }
    study = Study("sampler", "sampler calls of the network an image", Point("ddim", SamplingConfig(
        "ddim", 25, guidance=guidance)))
    for n, turn in ((10, 0), (4, 0), (6, 2), (25, 4), (15, 5), (50, 6)):
        for name, (sampler, options) in kinds.items():
            if n == 50 and name not in ("ddim", "ddpm", "dpm_solver_sde, order 2"):
                continue
            if name == "lcm" and n in (15, 6):
                continue
            steps = (n + 1) // 2 if name == "heun" else n  # heun calls twice a step
            point = Point(name, SamplingConfig(sampler, steps, options=options, guidance=guidance), turn=turn)
            study.points.append(point)
            if n == 10:
                study.shown[f"{name}, {steps} steps"] = point
    return study


def guidance_study(steps: int, weak: bool) -> Study:
    """The variants of guidance over scales, with DDIM."""
    variants: dict[str, dict[str, Any]] = {
        "cfg": {}, "interval 1 < sigma / alpha <= 15": {"interval": (1.0, 15.0)}, "rescale 0.7": {"rescale": 0.7},
        "apg, norm 10": {"method": "apg", "apg_norm": 10.0}, "cfg_zero_star": {"method": "cfg_zero_star"},
        "threshold 0.995 at 3": {"threshold": 0.995, "threshold_limit": 3.0},
    }
    if weak:
        variants["autoguidance"] = {}

    def point(name: str, scale: float, turn: int = 0) -> Point:
        return Point(name, SamplingConfig("ddim", steps, guidance=GuidanceConfig(scale, **variants[name])),
                     name == "autoguidance", turn)

    study = Study("guidance", "guidance scale", point("cfg", 5.0))
    study.points = [Point("no guidance", SamplingConfig("ddim", steps, guidance=GuidanceConfig(1.0)), turn=1)]
    study.points += [point(name, scale, turn) for scale, turn in ((5.0, 1), (8.0, 1), (3.0, 3), (1.5, 4), (12.0, 4))
                     for name in variants]
    study.shown = {"no guidance": study.points[0], **{f"{name}, w = 8": point(name, 8.0) for name in variants}}
    return study


def prompts_of(experiment: Experiment, count: int, work: Path) -> Prompts:
    """The first prompts of the test split that do not occur in training. They are stored, because finding them takes
    long."""
    source, data = Shapes(experiment.data.shapes, "test"), to_dict(experiment.data)
    about = json.dumps([data, experiment.denoiser.images, count], sort_keys=True)
    file = work / f"prompts_{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    if not file.is_file():
        found = unseen_prompts(source, training_captions(experiment), count)
        write_text(file, json.dumps([found.seeds, found.captions]))
        return found
    seeds, captions = json.loads(file.read_text(encoding="utf-8"))
    items = [source[index] for index in seeds]
    facts = [item["facts"][item["captions"].index(caption)] for item, caption in zip(items, captions)]
    return Prompts(captions=captions, seeds=seeds, images=[item["image"] for item in items], facts=facts)


def key_of(point: Point, weights: str, prompts: Prompts, dtype: torch.dtype | None) -> str:
    """The name under which a point is stored: a hash of the settings without defaults, and of the weights."""
    base, settings = to_dict(SamplingConfig()), to_dict(point.config)
    settings["guidance"] = {k: v for k, v in settings["guidance"].items() if v != base["guidance"][k]}
    about = [{k: v for k, v in settings.items() if v != base[k]}, weights, prompts.captions, str(dtype)]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def hash_of(*systems: TextToImage | None) -> str:
    """One hash of all weights."""
    return ",".join(sha256_of(path)[:16] for system in systems if system for path in system.files.values())


@contextmanager
def count_evaluations(*systems: TextToImage | None) -> Iterator[list[int]]:
    """Count in a list with one entry the images that the networks of these systems process inside this block."""
    seen = [0]
    hooks = [system.unet.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(0, seen[0] + len(inputs[0])))
             for system in systems if system is not None]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def draw_timed(system: TextToImage, guide: TextToImage | None, point: Point, prompts: Prompts,
               dtype: torch.dtype | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Calls of the networks an image and seconds of processor time for all samples, and these, uint8 (N, 3, H, W)."""
    system.guide = guide if point.weak else None
    began = time.process_time()
    with count_evaluations(system, guide) as seen, torch.autocast(
            system.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        images = system.images_in_batches(prompts.captions, prompts.seeds, point.config, batch=BATCH)
    return {"evaluations": seen[0] / len(images), "seconds": time.process_time() - began}, images


def promises_kept(images: torch.Tensor, prompts: Prompts) -> dict[str, Any]:
    """Promises kept and made of each prompt by its sample, read back into a scene, for each measure."""
    scores = [score_scene(scene, facts) for scene, facts in zip(read_scenes(images, vocabulary()), prompts.facts)]
    return {measure: [[sum(sum(score[name]) for name in names), sum(len(score[name]) for name in names)]
                      for score in scores]
            for measure, names in (("attributes", ATTRIBUTES), ("scene", ("scene",)))}


def draw_point(system: TextToImage, guide: TextToImage | None, point: Point, prompts: Prompts,
               dtype: torch.dtype | None) -> tuple[dict[str, Any], torch.Tensor]:
    """The stored result of a point: promises kept and made, prompt by prompt, and the first samples uint8."""
    row, images = draw_timed(system, guide, point, prompts, dtype)
    return {**row, **promises_kept(images, prompts)}, images[:SHOWN]


def rates(row: dict[str, Any], measure: str, draws: np.ndarray) -> np.ndarray:
    """The share of promises kept: as measured, then in every resample of the prompts (1 + R,), in percent."""
    load_or_draw, made = np.asarray(row[measure], dtype=float).T
    return 100 * (draws @ load_or_draw) / (draws @ made)


def resamples(count: int, number: int = 2000) -> np.ndarray:
    """How often each prompt is used: once, then in bootstrap draws (1 + number, count)."""
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=number)
    return np.concatenate([np.ones((1, count)), draws])


def interval(values: np.ndarray, sign: str = "") -> str:
    """The value and its 95 % percentile interval."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def table(study: Study, rows: dict[Point, dict[str, Any]], draws: np.ndarray) -> str:
    """Every point in Markdown, with its difference to the reference over the same prompts."""
    lines = ["| setting | steps | w | evaluations an image | attributes | whole scenes | attributes against "
             f"{study.reference.curve} |", "|---" * 7 + "|"]
    base = rows.get(study.reference)
    order = {name: i for i, name in enumerate(dict.fromkeys(point.curve for point in study.points))}
    for point, row in sorted(rows.items(), key=lambda item: (order[item[0].curve], item[0].config.steps,
                                                             item[0].config.guidance.scale)):
        values = rates(row, "attributes", draws)
        away = "" if base is None else interval(values - rates(base, "attributes", draws), "+")
        lines.append(f"| {point.curve} | {point.config.steps} | {point.config.guidance.scale:g} | "
                     f"{row['evaluations']:g} | {interval(values)} | {interval(rates(row, 'scene', draws))} | {away} |")
    return "\n".join(lines)


def place(point: Point, row: dict[str, Any], study: Study) -> float:
    """The position of a point on the x axis: calls of the network (two evaluations each under guidance), or its
    scale."""
    return row["evaluations"] / 2 if study.name == "sampler" else point.config.guidance.scale


def draw_scores(study: Study, rows: dict[Point, dict[str, Any]], draws: np.ndarray, title: str, path: Path) -> None:
    """One panel a measure, one curve a sampler or variant, with intervals at the reference's curve."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(11, 4))
    for axis, (measure, label) in zip(axes, MEASURES.items()):
        for number, curve in enumerate(dict.fromkeys(point.curve for point in study.points)):
            found = sorted((place(point, row, study), rates(row, measure, draws))
                           for point, row in rows.items() if point.curve == curve for _ in [0])
            if not found:
                continue
            x, values = [spot for spot, _ in found], np.stack([value for _, value in found])
            axis.plot(x, values[:, 0], marker="osD"[number // 5], markersize=4, linewidth=1.2, label=curve,
                      color=f"C{number % 10}", linestyle=("-", "--")[number // 5 % 2])
            if curve == study.reference.curve:
                axis.fill_between(x, *np.percentile(values[:, 1:], [2.5, 97.5], axis=1), alpha=0.15)
        axis.set(xlabel=study.axis, ylabel=f"{label}, %", xscale="log")
        ticks = sorted({round(place(point, row, study), 1) for point, row in rows.items()})
        ticks = [tick for i, tick in enumerate(ticks) if i == 0 or tick / ticks[i - 1] > 1.12]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        if study.name == "sampler":
            top = axis.secondary_xaxis("top", functions=(lambda x: 2 * x, lambda x: x / 2))
            top.set_xticks([2 * tick for tick in ticks], [f"{2 * tick:g}" for tick in ticks], fontsize=7)
            top.minorticks_off()
            top.set_xlabel("network evaluations an image, under guidance", fontsize=8)
    axes[0].legend(fontsize=6.5)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"wrote {path}")


def draw_images(study: Study, images: dict[Point, np.ndarray], prompts: Prompts, title: str, path: Path) -> None:
    """A row a sampler or variant, a column a prompt."""
    shown = {name: images[point] for name, point in study.shown.items() if point in images}
    if not shown:
        return
    images = torch.from_numpy(np.concatenate(list(shown.values())))
    sheet = axes_grid(images, prompts.captions[:SHOWN], list(shown), cell=96, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(96).save(path, optimize=True)
    print(f"wrote {path}")


def load_or_draw(point: Point, system: TextToImage, guide: TextToImage | None, prompts: Prompts, work: Path,
                 dtype: torch.dtype | None, until: float) -> tuple[dict[str, Any], np.ndarray] | None:
    """Scores and first samples of a point, read from ``work`` if it has been sampled before; None if no time is
    left."""
    weights = hash_of(system, guide if point.weak else None)
    file = work / f"{key_of(point, weights, prompts, dtype)}.npz"
    if not file.is_file():
        if time.monotonic() > until:
            return None
        row, images = draw_point(system, guide, point, prompts, dtype)
        part = file.with_suffix(".part.npz")
        np.savez(part, row=json.dumps(row), images=images.numpy())
        part.replace(file)
        share = rates(row, "attributes", np.ones((1, len(prompts.captions))))[0]
        print(f"{point.curve}, {point.config.steps} steps, w = {point.config.guidance.scale:g}: attributes "
              f"{share:.1f} %, {row['seconds']:.0f} s", flush=True)
    with np.load(file) as data:
        return json.loads(str(data["row"])), data["images"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder of shapes")
    parser.add_argument("--weak", help="run folder or state of a weaker network, for autoguidance")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--guidance", type=float, default=5.0, help="scale of the sampler figure (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps of the guidance figure (%(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no point after so many minutes")
    parser.add_argument("--work", help="where points are kept (RUN/report/sampler_figures)")
    parser.add_argument("--out", default="docs/images", help="where the figures go (%(default)s)")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    system = load_run(options.run, moderation=None)
    guide = load_weaker(system, options.weak) if options.weak else None
    work, out = Path(options.work or Path(options.run) / "report" / "sampler_figures"), Path(options.out)
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    dtype = autocast_dtype(options.precision, system.device)
    prompts = prompts_of(load_experiment(Path(options.run) / "config.yaml"), options.prompts, work)
    draws = resamples(len(prompts.captions))
    studies = (sampler_study(options.guidance), guidance_study(options.steps, guide is not None))
    found = {}
    for point in sorted([point for study in studies for point in study.points], key=lambda point: point.turn):
        if (result := load_or_draw(point, system, guide, prompts, work, dtype, until)) is not None:
            found[point] = result
    for study, fixed in zip(studies, (f"guidance {options.guidance:g}", f"ddim, {options.steps} steps")):
        rows = {point: found[point][0] for point in study.points if point in found}
        images = {point: found[point][1] for point in study.points if point in found}
        about = f"{len(prompts.captions)} unseen prompts, {fixed}"
        print(f"\n{about}; {sum(row['seconds'] for row in rows.values()) / 60:.1f} core minutes of sampling\n"
              f"{table(study, rows, draws)}\n")
        draw_scores(study, rows, draws, f"{about}; shaded: 95 % interval of {study.reference.curve}",
                    out / f"{study.name}_scores.png")
        draw_images(study, images, prompts, about, out / f"{study.name}_images.png")


if __name__ == "__main__":
    main()
