"""A teacher, its student and the lossy options beside each other: calls, time, scores and images.

    python -m benchmarks.student runs/shapes --student runs/shapes_student [--folded runs/shapes_gft] [--tiny RUN]

draws prompts of the test split that training never saw, the same prompts from the same first noise for every row, reads
the images back into scenes and prints a table: calls of the network an image, seconds of processor time an image with
decoding, attributes and whole scenes right with 95 % intervals, and the difference to the teacher at its default prompt
by prompt. It writes

    student_scores.png    attributes right against calls of the network
    student_images.png    eight prompts, a row a setting

Every row is kept in --work as soon as it is drawn, so that the command may be stopped and repeated. bf16 autocast where
the machine has it. 128 prompts take about 5 minutes of one core with AVX512-BF16; needs matplotlib.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures.samplers import Point, draw_point, hash_of, interval, plt, prompts_of, rates, resamples
from diffusion.guidance import GuidanceConfig
from diffusion.sampling import SamplingConfig
from files.config import to_dict
from files.sheets import axes_grid
from model.device import autocast_dtype
from pipeline.loading import load_run, use_tiny_decoder
from pipeline.system import TextToImage, with_options
from scoring.held_out import Prompts
from training.experiment import load_experiment

CALLS = (1, 2, 4, 8)
SCALES = (1.5, 2.0, 3.0, 5.0)


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


def settings_of(systems: dict[str, TextToImage]) -> list[Setting]:
    """All rows that the given systems can draw; the first is the teacher at its default."""
    base = systems["teacher"].config.sampling
    found = [Setting("teacher", "teacher", base, True)]
    found += [Setting("teacher", "teacher", with_options(base, steps=n), n in (1, 2, 4)) for n in (1, 2, 4, 5, 6)]
    found += [Setting("teacher, 5 steps", "teacher", with_options(base, steps=5, scale=scale)) for scale in SCALES]
    found += [Setting("teacher, reuse", "teacher", replace(base, reuse=n)) for n in (2, 3, 5)]
    found += [Setting("teacher, interval", "teacher", replace(base, guidance=GuidanceConfig(
        base.guidance.scale, interval=span))) for span in ((0.5, 1e9), (1.5, 1e9))]
    if "student" in systems:
        own = systems["student"].config.sampling
        found += [Setting("student", "student", with_options(own, steps=n), True) for n in CALLS]
        low, high = systems["student"].config.scales or (1.0, 1.0)
        found += [Setting("student", "student", with_options(own, steps=4, scale=scale))
                  for scale in sorted({low, 2.0, high}) if low <= scale <= high and low < high]
        found += [Setting("student by ddim", "student", with_options(own, "ddim", n)) for n in CALLS[1:]]
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


def measured(setting: Setting, system: TextToImage, prompts: Prompts, work: Path,
             dtype: torch.dtype | None) -> tuple[dict[str, Any], np.ndarray]:
    """Scores and first images of a row, read from ``work`` if they were drawn before."""
    about = json.dumps([to_dict(setting.config), hash_of(system), prompts.captions, str(dtype)], sort_keys=True)
    file = work / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.npz"
    if not file.is_file():
        row, images = draw_point(system, None, Point(setting.group, setting.config), prompts, dtype)
        part = file.with_suffix(".part.npz")
        np.savez(part, row=json.dumps(row), images=images.numpy())
        part.replace(file)
        share = rates(row, "attributes", np.ones((1, len(prompts))))[0]
        print(f"{setting.label}: attributes {share:.1f} %, {row['seconds']:.0f} s", flush=True)
    with np.load(file) as data:
        return json.loads(str(data["row"])), data["images"]


def table(rows: dict[Setting, dict[str, Any]], draws: np.ndarray) -> str:
    """Every row in Markdown, with its difference to the first over the same prompts."""
    lines = ["| setting | calls an image | ms an image | attributes | whole scenes | attributes, less the teacher's |",
             "|---" * 6 + "|"]
    base = rates(next(iter(rows.values())), "attributes", draws)
    for setting, row in rows.items():
        values = rates(row, "attributes", draws)
        lines.append(f"| {setting.label} | {row['evaluations']:g} | {1000 * row['seconds'] / len(row['scene']):.0f} | "
                     f"{interval(values)} | {interval(rates(row, 'scene', draws))} | {interval(values - base, '+')} |")
    return "\n".join(lines)


def draw_scores(rows: dict[Setting, dict[str, Any]], draws: np.ndarray, path: Path) -> None:
    """Attributes right against calls, a curve a group."""
    figure, axis = plt.subplots(figsize=(7, 4))
    scale = next(iter(rows)).config.guidance.scale
    for number, group in enumerate(("teacher", "student", "student by ddim", "guidance-free")):
        points = sorted((row["evaluations"], *rates(row, "attributes", draws)[:1], setting.config.guidance.scale)
                        for setting, row in rows.items() if setting.group == group)
        if group == "student":
            points = [point for point in points if point[2] == scale]
        if points:
            axis.plot(*zip(*[point[:2] for point in points]), marker="osD^"[number], markersize=5, label=group,
                      linestyle="" if group == "guidance-free" else "-")
    axis.set(xscale="log", xlabel="calls of the network an image", ylabel="attributes right, %")
    axis.set_xticks([1, 2, 4, 8, 12, 20], ["1", "2", "4", "8", "12", "20"])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"wrote {path}")


def draw_images(shown: dict[str, np.ndarray], prompts: Prompts, path: Path) -> None:
    """A row a setting, a column a prompt."""
    images = torch.from_numpy(np.concatenate(list(shown.values())))
    sheet = axes_grid(images, prompts.captions[:len(next(iter(shown.values())))], list(shown), cell=96,
                      title="the same prompts from the same first noise")
    sheet.quantize(96).save(path, optimize=True)
    print(f"wrote {path}")


def load_systems(options: argparse.Namespace) -> dict[str, TextToImage]:
    """The systems that the rows name."""
    named = {"teacher": options.run, "student": options.student, "folded": options.folded}
    systems = {name: load_run(path, moderation=None) for name, path in named.items() if path}
    for name in ("teacher", "student") if options.tiny else ():
        if name in systems:
            system = load_run(named[name], moderation=None)
            use_tiny_decoder(system, options.tiny)
            systems[f"{name}, tiny decoder"] = system
    return systems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder of shapes, the teacher")
    parser.add_argument("--student", help="run folder of its student")
    parser.add_argument("--folded", help="run folder of a guidance-free fine-tune of the teacher")
    parser.add_argument("--tiny", help="run folder with a tiny decoder of the same latents")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--work", help="where rows are kept (RUN/report/student)")
    parser.add_argument("--out", default="docs/images", help="where the figures go (%(default)s)")
    options = parser.parse_args()
    systems = load_systems(options)
    work, out = Path(options.work or Path(options.run) / "report" / "student"), Path(options.out)
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    dtype = autocast_dtype("auto", systems["teacher"].device)
    prompts = prompts_of(load_experiment(Path(options.run) / "config.yaml"), options.prompts, work)
    draws = resamples(len(prompts))
    found = {setting: measured(setting, systems[setting.system], prompts, work, dtype)
             for setting in settings_of(systems)}
    rows = {setting: row for setting, (row, _) in found.items()}
    print(f"\n{len(prompts)} unseen prompts\n{table(rows, draws)}\n")
    draw_scores(rows, draws, out / "student_scores.png")
    draw_images({setting.label: images for setting, (_, images) in found.items() if setting.shown}, prompts,
                out / "student_images.png")


if __name__ == "__main__":
    main()
