"""Emoji: every sample is compared with renderings of what its prompt promised and of other answers."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.emoji.emoji import Emoji
from data.emoji.scenes import COLOURS, MOODS
from eval.interval import Estimate, bootstrap_mean
from eval.scenes.candidates import Question, count_nearer_answers, palette_distance
from eval.scenes.score import Facts, SceneReport, Score, Table, counts_per_prompt, percent, score_table
from eval.suite import rows_table
from files.pages import markdown_table
from scoring.emoji_questions import Promises
from scoring.page import Part, checked_sections
from scoring.samples import Samples

ATTRIBUTES = ("object", "style", "count", "relation", "background", "mood")
Rows = list[tuple[Facts, Score]]  # a row for each prompt


def score_of_answers(questions: Sequence[Question], nearer: Sequence[int]) -> Score:
    """The promises kept, by attribute; ``nearer`` counts the answers of each question that are nearer to an image than
    the promised one."""
    score: Score = {name: [] for name in ("scene", *ATTRIBUTES)}
    for question, count in zip(questions, nearer, strict=True):
        score[question.attribute].append(count == 0)
    score["scene"] = [all(kept for name in ATTRIBUTES for kept in score[name])]
    return score


def score_rows(promises: Promises, samples: Samples,
               reconstructed: Sequence[torch.Tensor]) -> tuple[list[Rows], dict[str, float]]:
    """(rows of the samples, of samples of other prompts, of the real images and of these through the autoencoder; the
    share that a guess among the answers gets right, by attribute).

    Samples of other prompts are mostly of other kinds and can keep fewer promises than a guess does, so both are
    floors.
    """
    prompts = samples.prompts
    order = np.random.default_rng(0).permutation(len(prompts))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    rows: list[Rows] = [[], [], [], []]
    guesses: dict[str, list[float]] = {"attributes": [], "scene": []}
    for i, (index, caption) in enumerate(zip(tqdm(prompts.seeds, desc="scenes of emoji", unit="image"),
                                             prompts.captions)):
        questions = promises.questions(index)
        for question in questions:
            for name in ("attributes", question.attribute):
                guesses.setdefault(name, []).append(1 / question.answers)
        guesses["scene"].append(float(np.prod([1 / question.answers for question in questions])))
        facts = {"tags": promises.groups(index, caption)}
        images = [samples.images[i], samples.images[other[i]], prompts.images[i], reconstructed[i]]
        nearer = count_nearer_answers(questions, [np.asarray(image) for image in images])
        for column, counts in zip(rows, nearer, strict=True):
            column.append((facts, score_of_answers(questions, counts)))
    return rows, {name: float(np.mean(chances)) for name, chances in guesses.items()}


def emoji_part(source: Emoji, samples: Samples, reconstructed: Sequence[torch.Tensor], folder: Path) -> Part:
    """Scores of the samples, and the samples with what they kept.

    ``reconstructed`` are the real images of the prompts through the autoencoder, uint8 (3, H, W) each.
    """
    prompts, config = samples.prompts, samples.config
    rows, guess = score_rows(Promises(source), samples, reconstructed)
    report = SceneReport(*(score_table(part, measures=ATTRIBUTES) for part in rows))
    moods, real_moods = (mood_distances(source, prompts.seeds, images) for images in (samples.images, prompts.images))
    text = summary(report, len(prompts), guess["attributes"])
    table = table_with_guess(report, guess)
    marks = [[(name, kept) for name in ATTRIBUTES for kept in score[name]] for _, score in rows[0]]
    opening, rest = checked_sections(samples, marks, text, folder)
    sections = [opening, ("Promises kept, by comparison with renderings of other answers, in percent",
                          markdown_table(table))]
    if moods:
        mood_table = rows_table(("mood", "samples", "real images"), (
            (name, moods[name], real_moods[name]) for name in moods))
        sections.append(("Distance of the border to the palette of the mood, CIELAB (2.3 is just noticed)",
                         markdown_table(mood_table)))
    sections += [rest] if rest else []
    per_prompt = counts_per_prompt(rows[0], ATTRIBUTES)
    metrics = {"prompts": len(prompts), "sampler": config.sampler, "steps": config.steps,
               "guidance": config.guidance.scale, "guess": guess, **report.as_dict(),
               "moods": {name: vars(estimate) for name, estimate in moods.items()}, "per_prompt": per_prompt}
    return Part(sections, metrics, f"{table}\n{text}", [kept / made for kept, made in per_prompt["attributes"]])


def table_with_guess(report: SceneReport, guess: dict[str, float]) -> str:
    """The Markdown table of a report with one row more, before the real images: what a guess gets right."""
    lines = str(report).splitlines()
    cells = ["a guess", "", *(f"{100 * guess[name]:.1f}" if name in guess else "" for name in report.score["all"])]
    lines.insert(-2, f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mood_distances(source: Emoji, indices: Sequence[int],
                   images: Sequence[torch.Tensor] | torch.Tensor) -> dict[str, Estimate]:
    """The mean CIELAB difference between the border of images, uint8 (3, S, S), and the palette of the mood that was
    promised, for all moods and for each; empty where none was promised."""
    found: dict[str, list[float]] = {}
    for index, image in zip(indices, images, strict=True):
        row, number = source.locate(index)
        mood = source.scene(number)["mood"] if row is None else ""
        if mood:
            distance = palette_distance(np.asarray(image), [COLOURS[name] for name in MOODS[mood].colours])
            for name in ("all", mood):
                found.setdefault(name, []).append(distance)
    return {name: bootstrap_mean(values, 0) for name, values in sorted(found.items())}


def summary(report: SceneReport, count: int, guess: float) -> str:
    """The headline figures, the floors, and the reader's own accuracy in words."""
    assert report.ceiling is not None

    def headline(table: Table) -> str:
        return (f"{percent(table['all']['attributes'])} % of promises and {percent(table['all']['scene'])} % of whole "
                "prompts")

    return (f"{count} held-out prompts: the samples keep {headline(report.score)}. Samples of other prompts keep "
            f"{headline(report.chance)}, a guess {guess:.0%} of promises; real images {headline(report.calibration)}, "
            f"and these through the autoencoder {headline(report.ceiling)}.")
