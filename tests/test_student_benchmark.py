"""The benchmark of students on emoji: scores that are known for real images, and the command on tiny runs."""
import shutil
import sys

import pytest
import torch
import yaml
from emoji_packages import emoji_folder

import train
from benchmarks import student
from benchmarks.figures.samplers import rates, resamples
from benchmarks.student_scores import EmojiJudge, judge_of, table_row
from files.config import from_dict
from pipeline.loading import load_run
from training.experiment import Experiment, load_experiment
from training.release import release


class ByColours:
    """An evaluator that knows: the vector of an image is its colours on a coarse grid, that of a caption is the vector
    of the real image."""

    width, stamp = 48, "colours"

    def __init__(self):
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def texts(self, captions: list[str]) -> torch.Tensor:
        return torch.stack([self.known[caption] for caption in captions])


@pytest.fixture(scope="module")
def emoji_data(tmp_path_factory, tiny):
    """The data section of a tiny set of emoji."""
    size = tiny["data"]["shapes"]["size"]
    root = emoji_folder(tmp_path_factory.mktemp("emoji") / "data", size)
    return {"source": "emoji", "emoji": {"root": str(root), "size": size, "held_out_scenes": 40}}


def test_real_images_keep_all_promises_and_images_of_others_do_not(tiny, emoji_data):
    clip = ByColours()
    judge = EmojiJudge(from_dict(Experiment, {**tiny, "data": emoji_data}), 24, clip)
    real = torch.stack(judge.prompts.images)
    clip.known = dict(zip(judge.prompts.captions, clip(real / 127.5 - 1)))
    draws = resamples(24, 50)
    right, others, dark = judge.rows([real, real.roll(1, 0), real // 4])
    shares = {name: [float(rates(row, name, draws)[0]) for row in (right, others)] for name in judge.measures}
    assert shares["found"][0] == 100 and min(kept for kept, _ in shares.values()) > 85, shares
    assert all(shares[name][0] > shares[name][1] + 20 for name in ("attributes", "object", "found", "found_5")), shares
    value, of_others, of_dark = (float(row["distance"].split()[0]) for row in (right, others, dark))
    assert of_others == pytest.approx(value) and of_dark > 2 * value  # the order does not matter
    assert table_row("real", ["1"], judge, others, right, draws).count("|") == 2 + 1 + len(judge.measures) + 2


def test_other_data_is_refused(tiny, tmp_path):
    experiment = from_dict(Experiment, {**tiny, "data": {"source": "cifar10"}})
    with pytest.raises(ValueError, match="data.source: cifar10; valid: shapes or emoji"):
        judge_of(experiment, 4, tmp_path, None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, tiny_run, emoji_data):
    """A released folder of emoji, as published weights are, and its student."""
    folder = tmp_path_factory.mktemp("students")
    shutil.copytree(tiny_run, folder / "run", ignore=shutil.ignore_patterns("report", "state", "cache"))
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    config["data"] |= emoji_data
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    release(folder / "run", folder / "released")
    own = {**tiny, "name": "student", "stages": ["student"], "start_from": str(folder / "released"), "data": emoji_data,
           "student": {"images": 16, "validation": 4, "train": {**tiny["denoiser"]["train"], "steps": 2}},
           "sampling": {"sampler": "consistency", "steps": 2, "guidance": {"scale": 3.0}}}
    (folder / "student.yaml").write_text(yaml.safe_dump(own))
    train.main([str(folder / "student.yaml"), f"run={folder / 'student'}"])
    return folder


def test_a_released_folder_teaches(runs):
    """Its bf16 weights are what the student starts from, and its files are recorded by their hashes."""
    teacher, begun = (load_run(runs / name, moderation=None) for name in ("released", "student"))
    away = [(a - b).abs().max() for a, b in zip(teacher.unet.parameters(), begun.unet.parameters(), strict=True)]
    assert 0 < max(away) < 0.05 and all(one.dtype == torch.float32 for one in begun.unet.parameters())
    assert load_experiment(runs / "student" / "config.yaml").start_from == str(runs / "released")


def test_the_command_scores_emoji_and_keeps_what_it_drew(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(student, "CALLS", (1, 2))
    named = {"student": runs / "student", "prompts": 16, "work": tmp_path / "work", "out": tmp_path}
    monkeypatch.setattr(sys, "argv", ["student", str(runs / "released"), *(
        text for name, value in named.items() for text in (f"--{name}", str(value)))])
    student.main()
    first = capsys.readouterr().out
    assert (tmp_path / "student_emoji.png").stat().st_size > 1000 and (tmp_path / "student_emoji_scores.png").is_file()
    assert "| student, 1 consistency, w 3 | 1 |" in first and "| teacher, 3 ddim, w 3 | 6 |" in first
    [real] = [line for line in first.splitlines() if line.startswith("| real images |")]
    assert real.count("100.0") >= 3
    student.main()
    second = capsys.readouterr().out
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in (first, second)]
    assert tables[0] == tables[1] and "consistency, w 3: " in first and "consistency, w 3: " not in second
