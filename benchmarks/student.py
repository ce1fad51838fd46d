"""A teacher, its student and the lossy options beside each other: calls, time, scores and images.

    python -m benchmarks.student runs/shapes --student runs/shapes_student [--folded runs/shapes_gft] [--tiny RUN]
    python -m benchmarks.student weights/emoji-64 --student runs/emoji_64_student --clip runs/emoji_64_clip

draws prompts of the test split that training never saw, the same prompts from the same first noise for every row,
scores the images (`benchmarks/student_scores.py`: scenes read back, or renderings of answers and an evaluator) and
prints a table: calls of the network an image, milliseconds of processor time an image with decoding, scores with 95 %
intervals, and the difference to the teacher at its default prompt by prompt. It writes, for shapes and for emoji,

    student_scores.png    the first score against calls of the network     student_emoji_scores.png
    student_images.png    eight prompts, a row a setting                   student_emoji.png

Samples are kept in --work as soon as a row is drawn, so that the command may be stopped and repeated. bf16 autocast
where the machine has it. 128 prompts of shapes take about 5 minutes of one core with AVX512-BF16; needs matplotlib.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures.samplers import SHOWN, Point, draw_timed, hash_of, plt, rates, resamples
from benchmarks.student_scores import Judge, Row, judge_of, table_row
from diffusion.guidance import GuidanceConfig
from diffusion.sampling import SamplingConfig
from files.config import to_dict
from files.sheets import axes_grid
from model.device import autocast_dtype
from pipeline.loading import load_run, use_tiny_decoder
from pipeline.system import TextToImage, with_options
from scoring.evaluation import reconstructions
from training.experiment import load_experiment

CALLS = (1, 2, 4, 8)
SCALES = (1.5, 2.0, 3.0, 5.0)
STUDENTS = ("student", "rival")


@dataclass(frozen=True)
class Setting:
    """One row: which system draws with which settings; `group` is its curve in the figure, `shown`: its images are
    printed."""

    group: str
    system: str
    config: SamplingConfig
    shown: bool = False

    @property
    def label(self) -> str:
        """The row in words."""
        config = self.config
        extra = "".join([f", reuse {config.reuse}" if config.reuse > 1 else "",
                         f", interval {config.guidance.interval}" if config.guidance.interval else ""])
        return f"{self.group}, {config.steps} {config.sampler}, w {config.guidance.scale:g}{extra}"


def settings_of(systems: dict[str, TextToImage], lossy: bool) -> list[Setting]:
    """All rows that the given systems can draw; the first is the teacher at its default. ``lossy``: with the options
    that leave work out."""
    base = systems["teacher"].config.sampling
    steps = sorted({1, 2, 4, 5, 6 if lossy else base.steps // 2})
    found = [Setting("teacher", "teacher", base, True)]
    found += [Setting("teacher", "teacher", with_options(base, steps=n), n in (1, 2, 4)) for n in steps]
    if lossy:
        found += [Setting("teacher, 5 steps", "teacher", with_options(base, steps=5, scale=scale)) for scale in SCALES]
        found += [Setting("teacher, reuse", "teacher", replace(base, reuse=n)) for n in (2, 3, 5)]
        found += [Setting("teacher, interval", "teacher", replace(base, guidance=GuidanceConfig(
            base.guidance.scale, interval=span))) for span in ((0.5, 1e9), (1.5, 1e9))]
    else:
        found += [Setting("teacher, half the steps", "teacher", with_options(base, steps=base.steps // 2, scale=scale))
                  for scale in SCALES[1:] if scale != base.guidance.scale]
    for name in [name for name in STUDENTS if name in systems]:
        own = systems[name].config.sampling
        found += [Setting(name, name, with_options(own, steps=n), True) for n in CALLS]
        low, high = systems[name].config.scales or (1.0, 1.0)
        found += [Setting(name, name, with_options(own, steps=4, scale=scale))
                  for scale in sorted({low, 2.0, high}) if low <= scale <= high and low < high]
        other = "ddim" if own.sampler == "consistency" else "consistency"
        found += [Setting(f"{name} by {other}", name, with_options(own, other, n)) for n in CALLS[1:]]
    if "folded" in systems:
        found += [Setting("guidance-free", "folded", with_options(systems["folded"].config.sampling, steps=10,
                                                                  scale=scale), scale == base.guidance.scale)
                  for scale in SCALES]
    if "teacher, tiny decoder" in systems:
        found.append(Setting("teacher, tiny decoder", "teacher, tiny decoder", base))
    if "student, tiny decoder" in systems:
        own = systems["student"].config.sampling
        found += [Setting("student, tiny decoder", "student, tiny decoder", with_options(own, steps=n)) for n in (2, 4)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Drawn:
    """Samples of all prompts uint8 (N, 3, H, W), how many calls an image and seconds of processor time for all they
    took, and the images of the sheet."""

    images: torch.Tensor
    calls: float
    seconds: float
    sheet: torch.Tensor


def drawn(setting: Setting, system: TextToImage, judge: Judge, work: Path, dtype: torch.dtype | None) -> Drawn:
    """The samples of a row, read from ``work`` if they were drawn before."""
    about = json.dumps([to_dict(setting.config), hash_of(system), judge.prompts.captions, judge.shown, str(dtype)],
                       sort_keys=True)
    file = work / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.npz"
    if not file.is_file():
        cost, images = draw_timed(system, None, Point(setting.group, setting.config), judge.prompts, dtype)
        sheet = images[:SHOWN]
        if judge.shown:
            with torch.autocast(system.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                sheet = system.images(judge.shown, range(len(judge.shown)), setting.config)
        part = file.with_suffix(".part.npz")
        np.savez(part, images=images.numpy(), sheet=sheet.numpy(), calls=cost["evaluations"], seconds=cost["seconds"])
        part.replace(file)
        print(f"{setting.label}: {cost['seconds']:.0f} s", flush=True)
    with np.load(file) as data:
        return Drawn(torch.from_numpy(data["images"]), float(data["calls"]), float(data["seconds"]),
                     torch.from_numpy(data["sheet"]))


def table(found: dict[Setting, Drawn], rows: list[Row], real: dict[str, Row], judge: Judge, draws: np.ndarray) -> str:
    """Every row in Markdown, with its difference to the first over the same prompts, and below the real images."""
    titles, number = list(judge.measures.values()), len(judge.prompts)
    distance = [judge.distance] if judge.distance else []
    header = ["setting", "calls an image", "ms an image", *titles, *distance, f"{titles[0]}, less the teacher's"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += [table_row(setting.label, [f"{made.calls:g}", f"{1000 * made.seconds / number:.0f}"], judge, row, rows[0],
                        draws) for (setting, made), row in zip(found.items(), rows)]
    return "\n".join(lines + [table_row(name, ["", ""], judge, row, None, draws) for name, row in real.items()])


def draw_scores(found: dict[Setting, Drawn], rows: list[Row], judge: Judge, draws: np.ndarray, path: Path) -> None:
    """The first measure against calls, a curve a group."""
    first, title = next(iter(judge.measures.items()))
    figure, axis = plt.subplots(figsize=(7, 4))
    scale = next(iter(found)).config.guidance.scale
    for number, group in enumerate(("teacher", "student", "student by ddim", "guidance-free", "rival",
                                    "student by consistency")):
        points = sorted((made.calls, *rates(row, first, draws)[:1], setting.config.guidance.scale)
                        for (setting, made), row in zip(found.items(), rows) if setting.group == group)
        if group in STUDENTS:
            points = [point for point in points if point[2] == scale]
        if points:
            axis.plot(*zip(*[point[:2] for point in points]), marker="osD^vx"[number], markersize=5, label=group,
                      linestyle="" if group == "guidance-free" else "-")
    axis.set(xscale="log", xlabel="calls of the network an image", ylabel=f"{title}, %")
    ticks = [1, 2, 4, 8, 12, 20, 40][:6 if max(made.calls for made in found.values()) <= 20 else 7]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"wrote {path}")


def draw_images(shown: dict[str, torch.Tensor], judge: Judge, path: Path) -> None:
    """A row a setting, a column a prompt."""
    images = torch.cat(list(shown.values()))
    captions = (judge.shown or judge.prompts.captions)[:len(next(iter(shown.values())))]
    sheet = axes_grid(images, captions, list(shown), cell=96, title="the same prompts from the same first noise")
    sheet.quantize(96).save(path, optimize=True)
    print(f"wrote {path}")


def load_systems(options: argparse.Namespace) -> dict[str, TextToImage]:
    """The systems that the rows name."""
    named = {"teacher": options.run, "student": options.student, "rival": options.rival, "folded": options.folded}
    systems = {name: load_run(path, moderation=None) for name, path in named.items() if path}
    for name in ("teacher", "student") if options.tiny else ():
        if name in systems:
            system = load_run(named[name], moderation=None)
            use_tiny_decoder(system, options.tiny)
            systems[f"{name}, tiny decoder"] = system
    return systems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the teacher, a run folder")
    parser.add_argument("--student", help="run folder of its student")
    parser.add_argument("--rival", help="run folder of another student, of which the same rows are printed")
    parser.add_argument("--folded", help="run folder of a guidance-free fine-tune of the teacher")
    parser.add_argument("--tiny", help="run folder with a tiny decoder of the same latents")
    parser.add_argument("--clip", help="run folder with a stage clip, an evaluator of emoji: captions found, "
                        "and the Frechet distance in its vectors")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--work", help="where samples are kept (report/student of the student)")
    parser.add_argument("--out", default="docs/images", help="where the figures go (%(default)s)")
    options = parser.parse_args()
    work, out = Path(options.work or Path(options.student or options.run) / "report" / "student"), Path(options.out)
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    experiment = load_experiment(Path(options.run) / "config.yaml")
    try:
        judge = judge_of(experiment, options.prompts, work, options.clip)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    systems = load_systems(options)
    dtype = autocast_dtype("auto", systems["teacher"].device)
    draws = resamples(len(judge.prompts))
    lossy = experiment.data.source == "shapes"
    found = {setting: drawn(setting, systems[setting.system], judge, work, dtype)
             for setting in settings_of(systems, lossy)}
    images, real = [made.images for made in found.values()], {}
    if not lossy:
        real = {"real images": torch.stack(judge.prompts.images), "real images through the autoencoder": torch.stack(
            reconstructions(systems["teacher"], judge.prompts.images))}
    rows = judge.rows([*images, *real.values()])
    text = table(found, rows[:len(found)], dict(zip(real, rows[len(found):])), judge, draws)
    print(f"\n{len(judge.prompts)} unseen prompts\n{text}\n")
    name = "" if experiment.data.source == "shapes" else f"_{experiment.data.source}"
    draw_scores(found, rows, judge, draws, out / f"student{name}_scores.png")
    draw_images({setting.label: made.sheet for setting, made in found.items() if setting.shown}, judge,
                out / f"student{name or '_images'}.png")


if __name__ == "__main__":
    main()
