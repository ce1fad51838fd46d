"""The prompts a run is measured on, with what they promise and the real images that they describe."""
from dataclasses import dataclass, field
from typing import Any

import torch

from data.catalog import build_source
from data.shapes.shapes import Shapes
from data.source import Source
from scoring.settings import EvaluationSettings
from training.experiment import Experiment


@dataclass(frozen=True)
class Prompts:
    """Prompts of one split, a list entry each.

    ``seeds`` are the numbers of their items in the split, which are also the seeds of their samples, and ``images`` the
    real images of these items, uint8 (3, H, W). Where they are known, ``facts`` hold what each caption promises and
    ``styles`` the style that it names; else the two lists are empty.
    """

    captions: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)


def evaluation_prompts(experiment: Experiment, settings: EvaluationSettings) -> tuple[Prompts, Prompts]:
    """(test prompts, validation prompts) that training never saw. Raises ValueError when a split has too few."""
    data = experiment.data.squares
    if data.source == "shapes":
        trained = training_captions(experiment)
        return (unseen_prompts(Shapes(data.shapes, "test"), trained, settings.num_test),
                unseen_prompts(Shapes(data.shapes, "validation"), trained, settings.num_validation))
    return (held_out_prompts(build_source(data, "test"), settings.num_test, "--count"),
            held_out_prompts(build_source(data, "validation"), settings.num_validation, "--validation"))


def unseen_prompts(source: Shapes, trained: set[str], count: int) -> Prompts:
    """One phrasing of each of the first ``count`` items that have a phrasing outside ``trained``.

    Raises ValueError when there are fewer such items.
    """
    found = Prompts()
    for index in range(len(source)):
        item = source[index]
        number = len(item["captions"])
        order = [(item["phrasing"] + shift) % number for shift in range(number)]
        phrasing = next((i for i in order if item["captions"][i] not in trained), None)
        if phrasing is not None:
            found.captions.append(item["captions"][phrasing])
            found.facts.append(item["facts"][phrasing])
            found.images.append(item["image"])
            found.seeds.append(index)
        if len(found) == count:
            return found
    raise ValueError(f"only {len(found)} items of the split '{source.split}' have a caption that training never saw; "
                     f"valid: fewer than --count {count}, or a larger data.shapes.{source.split}")


def training_captions(experiment: Experiment) -> set[str]:
    """Every caption that the denoiser may have seen."""
    source = build_source(experiment.data, "train")
    count = min(experiment.denoiser.images or len(source), len(source))
    return {caption for index in range(count) for caption in source.captions(index)}


def held_out_prompts(source: Source, count: int, flag: str) -> Prompts:
    """The first caption of each of the first ``count`` items. Raises ValueError, which names the ``flag`` that sets
    ``count``, when there are fewer items."""
    if len(source) < count:
        raise ValueError(f"the split has {len(source)} items; valid: {flag} up to that, not {count}")
    items = [source[index] for index in range(count)]
    styles = [item["style"] for item in items if item.get("style")]
    return Prompts([item["captions"][0] for item in items], list(range(count)), [item["image"] for item in items],
                   styles=styles if len(styles) == count else [])
