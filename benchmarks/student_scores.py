"""What the samples of `benchmarks/student.py` are scored by: scenes read back, renderings of answers, an evaluator.

Axis letters: N prompts, R resamples.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.figures.samplers import interval, promises_kept, prompts_of, rates
from data.emoji.emoji import Emoji
from eval.clip_score import caption_ranks
from eval.features.efficientnet import Features
from eval.features.reference import Extractor, features_of, frechet_estimate
from eval.scenes.candidates import count_nearer_answers
from pipeline.clip_vectors import ClipVectors
from scoring.emoji import ATTRIBUTES, score_of_answers
from scoring.emoji_questions import Promises
from scoring.held_out import Prompts, held_out_prompts
from scoring.judges import split_reference, unit_batches
from training.experiment import Experiment

# for each key of `measures` a list of [kept, made], promises of each prompt; "distance" is a text
Row = dict[str, Any]


class Judge(Protocol):
    """Scores samples of its prompts. ``measures`` are columns of the table by their keys in a row, the first of which
    is the one that settings are compared by; ``shown`` are the prompts of the sheet of images, or none for those that
    are scored; ``distance`` is the title of that column, "" if there is none."""

    prompts: Prompts
    measures: dict[str, str]
    shown: list[str]
    distance: str

    def rows(self, sets: Sequence[torch.Tensor]) -> list[Row]:
        """Scores of sets of samples, uint8 (N, 3, H, W) each."""
        ...


class SceneJudge:
    """Shapes: attributes and whole scenes right, of prompts that training never saw."""

    distance = ""

    def __init__(self, experiment: Experiment, count: int, work: Path):
        self.prompts = prompts_of(experiment, count, work)
        self.measures, self.shown = {"attributes": "attributes", "scene": "whole scenes"}, []

    def rows(self, sets: Sequence[torch.Tensor]) -> list[Row]:
        """Promises kept and made of each set, uint8 (N, 3, H, W)."""
        return [promises_kept(images, self.prompts) for images in sets]


class EmojiJudge:
    """Emoji: promises kept, told from renderings of other answers as `evaluate.py` does; with an evaluator ``clip``
    also whether it finds the caption of a sample among those of all prompts; and the Frechet distance to the held-out
    images of other prompts, in the evaluator's vectors or without one in those of a classifier of photographs."""

    def __init__(self, experiment: Experiment, count: int, clip: ClipVectors | None):
        source = Emoji(experiment.data.emoji, "test")
        self.promises, self.clip = Promises(source), clip
        self.prompts, self.shown = held_out_prompts(source, count, "--prompts"), list(experiment.preview_prompts[:8])
        self.features: Extractor = clip or Features(torch.device("cpu"))
        self.reference = features_of(split_reference(source, count, "").batches(), self.features)
        self.distance = f"Frechet distance{' x 1000' if clip else ''} ({self.features.stamp.split()[0]})"
        kept = {"attributes": "attributes", "object": "objects", "style": "styles"}
        number = len(set(self.prompts.captions))
        found = {"found": f"caption found among {number}", "found_5": "caption among the first 5"} if clip else {}
        self.measures = found | kept

    def rows(self, sets: Sequence[torch.Tensor]) -> list[Row]:
        """Scores of each set, uint8 (N, 3, H, W)."""
        found: list[Row] = [{"attributes": [], "object": [], "style": []} for _ in sets]
        for number, index in enumerate(self.prompts.seeds):
            questions = self.promises.questions(index)
            nearer = count_nearer_answers(questions, [np.asarray(images[number]) for images in sets])
            for row, counts in zip(found, nearer, strict=True):
                score = score_of_answers(questions, counts)
                for key in row:
                    kept = [one for name in (ATTRIBUTES if key == "attributes" else (key,)) for one in score[name]]
                    row[key].append([sum(kept), len(kept)])
        return [row | self.compared(images) for row, images in zip(found, sets)]

    def compared(self, images: torch.Tensor) -> Row:
        """The distance of samples uint8 (N, 3, H, W), and captions found if there is an evaluator."""
        found = features_of(unit_batches(images), self.features)
        distance = frechet_estimate(found, self.reference)[0]
        if self.clip is None:
            return {"distance": str(distance)}
        captions = self.prompts.captions
        ranks = caption_ranks(found.vectors, self.clip.texts(captions).cpu(), captions)
        return {"distance": str(distance.scaled(1000)), **{
            key: [[int(rank), 1] for rank in ranks < k] for key, k in (("found", 1), ("found_5", 5))}}


def judge_of(experiment: Experiment, count: int, work: Path, clip: str | None) -> Judge:
    """What samples of a run of shapes or emoji are scored by. Raises ValueError for other data."""
    source = experiment.data.source
    if source == "shapes":
        return SceneJudge(experiment, count, work)
    if source != "emoji":
        raise ValueError(f"data.source: {source}; valid: shapes or emoji, whose images can be scored by what they show")
    return EmojiJudge(experiment, count, ClipVectors.of_run(clip) if clip else None)


def table_row(label: str, before: list[str], judge: Judge, row: Row, base: Row | None, draws: np.ndarray) -> str:
    """A row of the table: the label, what is known of how it was drawn, every measure, the distance if there is one,
    and the difference of the first measure to ``base`` over the same prompts."""
    first = next(iter(judge.measures))
    cells = [label, *before, *(interval(rates(row, name, draws)) for name in judge.measures)]
    cells += [row["distance"]] if judge.distance else []
    cells.append("" if base is None else interval(rates(row, first, draws) - rates(base, first, draws), "+"))
    return "| " + " | ".join(cells) + " |"
