"""What adapters, learned words and taught systems bring and what they cost, at several scales: tables in Markdown.

    python -m benchmarks.personalization RUN --adapter FILE ... --embedding FILE ... --whole RUN ... \
        --images FOLDER --more FOLDER --prompts FILE --template "{prompt}, sks style" --clip RUN

Each file is measured by itself; a run folder stands for the file that its stage left; --whole takes run folders of
dreambooth. Scale 0 is checked to be the base, weight by weight, and then not measured again.

What was taught, from one sample of each line of FILE in the template, sample i with seed i:
hit:             share that a classifier takes for what was taught rather than for one of the base's styles; made from
                 training images of the base and from the folder --more (linear discriminant analysis)
similarity:      cosine with the mean of the real images of --images, which should hold none that were trained on
fidelity:        cosine with the prompt, without the template
recall 1, 5:     share of images whose own prompt is the nearest, among the nearest five, of all prompts
chroma:          mean CIELAB chroma; 0 is grey

What it costs, from the base's own held-out captions, which do not ask for it:
validation loss: of the base's own held-out images, with fixed noise: a rise is forgetting
drift:           1 - cosine of an own prompt's image with that of the base, same seed
own fidelity, own recall 1: as above
promises, whole: of an emoji base, the promises of its own captions that are kept, and the captions all of whose are
                 (things, style, count, relation, background, mood; scoring/emoji.py)
Frechet:         distance of these images to held-out real images; compare equal numbers only

All cosines are those of the evaluator that the stage clip left in a run folder; without --clip there is the loss alone.
"""
import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.personal_scores import BATCH, Reference, distance_to, images_of, reference
from data.catalog import DataConfig, build_source
from data.emoji.emoji import Emoji
from data.images.folder import FolderConfig
from data.source import Source, image_batch
from eval.clip_score import agreement
from eval.frechet import Moments
from eval.scenes.candidates import count_nearer_answers
from eval.scenes.score import percent, score_table
from files.config import from_dict, read_yaml
from files.images import to_unit
from files.sheets import axes_grid, save_sheet
from model.pretrained.adapters import networks_of
from model.pretrained.card import hash_of_networks
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.loading import load_run
from pipeline.personal import Personal
from pipeline.system import Networks, TextToImage
from sampling.personal import EMBEDDING, in_folder, parse_adapter
from scoring.emoji import ATTRIBUTES, score_of_answers
from scoring.emoji_questions import Promises
from training.stages.denoiser import DenoiserStage, Denoising
from training.stages.pairs import PairBatch, latent_encoder
from training.stages.personal import few_images

SHOWN = 10  # columns of the sheet


class Named(NamedTuple):
    """A system to measure; ``template`` is how the prompts ask for what it was taught."""

    name: str
    scale: float | None
    system: TextToImage
    template: str


@dataclass
class Results:
    """Rows of the two tables, and rows of images for the sheet."""

    taught: list[dict[str, str]] = field(default_factory=list)
    cost: list[dict[str, str]] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)


def held_out(system: TextToImage, source: Source, count: int) -> PairBatch:
    """The first ``count`` held-out images of the base as latents, with their captions."""
    places = np.arange(min(count, len(source)))
    encode = latent_encoder(system.autoencoder, system.device)
    parts = [encode(image_batch(source, places[i:i + BATCH])) for i in range(0, len(places), BATCH)]
    mean, logvar = (torch.cat(tensors) for tensors in zip(*parts))
    return PairBatch(mean, logvar, [source.captions(int(i))[0] for i in places])


class Cost:
    """What the base loses: losses and samples for its own held-out captions."""

    def __init__(self, options: argparse.Namespace, base: TextToImage, own: Source, clip: ClipVectors | None):
        stage = from_dict(DenoiserStage, read_yaml(Path(options.run) / "config.yaml").get("denoiser") or {}, "denoiser")
        self.denoising = Denoising(stage, base.tokenizer, 0, base.device)
        self.pairs, self.clip = held_out(base, own, options.losses), clip
        self.captions = [own.captions(i)[0] for i in range(min(options.count, len(own)))]
        promises = Promises(own) if isinstance(own, Emoji) else None
        self.questions = [promises.questions(i) for i in range(len(self.captions))] if promises else []
        self.before: Tensor | None = None
        if clip is not None:
            self.real = Moments(clip.width).update(clip(to_unit(images_of(own, 1024)[0])))

    def row(self, system: TextToImage) -> dict[str, str]:
        """The row of a system; the first one is that of the base."""
        loss = self.denoising.validate(Networks(system.unet, system.text_encoder), self.pairs)["loss"]
        row = {"validation loss": f"{loss:.4f}"}
        if self.clip is not None:
            images = samples(system, self.captions)
            vectors = self.clip(to_unit(images))
            self.before = vectors if self.before is None else self.before
            found = agreement(vectors, self.clip.texts(self.captions), self.captions)
            row |= {"drift": f"{1 - float((vectors * self.before).sum(dim=1).mean()):.3f}",
                    "own fidelity": str(found.score.scaled(0.01)), "own recall 1": str(found.recall_1),
                    "Frechet": f"{distance_to(self.real, vectors):.3f}", **self.kept(images)}
        return row

    def kept(self, images: Tensor) -> dict[str, str]:
        """The promises that images uint8 (N, 3, H, W) of the captions keep; nothing for a base of other data."""
        if not self.questions:
            return {}
        answers = [count_nearer_answers(asked, [image.numpy()])[0] for asked, image in zip(self.questions, images)]
        rates = score_table([({"tags": ()}, score_of_answers(asked, found))
                             for asked, found in zip(self.questions, answers)], measures=ATTRIBUTES)["all"]
        return {"promises": percent(rates["attributes"]), "whole": percent(rates["scene"])}


def samples(system: TextToImage, prompts: Sequence[str]) -> Tensor:
    """One sample a prompt, uint8 (N, 3, H, W); sample i has seed i."""
    return system.images_in_batches(list(prompts), range(len(prompts)), batch=BATCH)


def systems(options: argparse.Namespace, base_hash: str) -> Iterator[Named]:
    """What is measured, after the base. Raises ValueError where scale 0 is not the base."""
    for text in options.adapter:
        file, own_scale = parse_adapter(text)
        system = load_run(options.run, moderation=None)
        personal = Personal(system, [(file, own_scale)], any_base=options.any_base)
        for scale in options.scales:
            personal.set_scales([scale * own_scale])
            if not scale and hash_of_networks(networks_of(system.unet, system.text_encoder)) != base_hash:
                raise ValueError(f"{text}: scale 0 is not the base")
            yield Named(name_of(file), scale, system, options.template)
    for text in options.embedding:
        system, file = load_run(options.run, moderation=None), in_folder(text, EMBEDDING)
        Personal(system, embeddings=[file], any_base=options.any_base)
        yield Named(name_of(file), None, system, options.template)
    for folder in options.whole:
        yield Named(Path(folder).name, None, load_run(folder, moderation=None), options.template)


def name_of(file: Path) -> str:
    """A file of a run folder is called after its folder."""
    return file.parent.name if (file.parent / "config.yaml").exists() else file.stem


def folder_of(root: str, size: int) -> Source:
    """All images of a folder."""
    return build_source(few_images(DataConfig(source="folder", folder=FolderConfig(root=root, size=size)), ["image"]),
                        "train")


def measure(options: argparse.Namespace) -> tuple[Results, list[str]]:
    """The rows of the base, of real images and of everything that was taught, and lines to print above them."""
    base = load_run(options.run, moderation=None)
    data = read_data_config(Path(options.run) / "config.yaml").squares
    clip = ClipVectors.of_run(options.clip, base.device) if options.clip else None
    results, lines, asked = Results(), list[str](), list[str]()
    compared: Reference | None = None
    if clip is not None and options.images:
        real = folder_of(options.images, data.size)
        compared, line = reference(clip, data, real, folder_of(options.more or options.images, data.size), options.real)
        lines.append(line)
        asked = [line.strip() for line in Path(options.prompts).read_text(encoding="utf-8").split("\n")
                 if line.strip()][:options.count]
        shown, captions, _ = images_of(real, options.real)
        kept = [i for i, caption in enumerate(captions) if caption in asked]
        if kept:
            results.taught.append({"system": "real images", "scale": "",
                                   **compared.scores(shown[kept], [captions[i] for i in kept])})
            place = {captions[i]: i for i in kept}
            if all(prompt in place for prompt in asked[:SHOWN]):
                results.images["real images"] = shown[[place[prompt] for prompt in asked[:SHOWN]]]
    cost = None if options.no_cost else Cost(options, base, build_source(data, "validation"), clip)

    def add(one: Named) -> None:
        label = {"system": one.name, "scale": "" if one.scale is None else f"{one.scale:g}"}
        if compared is not None:
            images = samples(one.system, [one.template.replace("{prompt}", prompt) for prompt in asked])
            results.taught.append({**label, **compared.scores(images, asked)})
            results.images[f"{one.name} {label['scale']}".strip()] = images[:SHOWN]
        if cost is not None and one.template == options.template:
            row = cost.row(one.system) if one.scale != 0 else dict(results.cost[0])
            results.cost.append({**row, **label})

    if compared is not None and options.template != "{prompt}":
        add(Named("base, plain prompt", None, base, "{prompt}"))
    add(Named("base", None, base, options.template))
    for one in systems(options, hash_of_networks(networks_of(base.unet, base.text_encoder))):
        if one.scale == 0:
            if cost is not None:
                results.cost.append({**results.cost[0], "system": one.name, "scale": "0"})
            continue
        add(one)
    if options.sheet and results.images:
        save_sheet(axes_grid(torch.cat([images[:SHOWN] for images in results.images.values()]), asked[:SHOWN],
                             list(results.images), 64, f"{Path(options.run).name}: {options.template}"), options.sheet)
    return results, lines


def table(rows: list[dict[str, str]]) -> str:
    """Rows as a table in Markdown."""
    names = ["system", "scale", *(name for name in rows[0] if name not in ("system", "scale"))]
    return "\n".join([f"| {' | '.join(names)} |", f"|{'---|' * len(names)}",
                      *(f"| {' | '.join(row[name] for name in names)} |" for row in rows)])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of the base")
    parser.add_argument("--adapter", nargs="+", default=[], metavar="FILE[:SCALE]")
    parser.add_argument("--embedding", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--whole", nargs="+", default=[], metavar="RUN", help="systems that dreambooth left")
    parser.add_argument("--any-base", action="store_true")
    parser.add_argument("--images", metavar="FOLDER", help="images of what was taught, others than those trained on")
    parser.add_argument("--more", metavar="FOLDER", help="further images of it, for the classifier (--images)")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line, needed with --images")
    parser.add_argument("--template", default="{prompt}", help="how prompts ask for what was taught (%(default)s)")
    parser.add_argument("--clip", metavar="RUN", help="run folder of the evaluator")
    parser.add_argument("--count", type=int, default=64, help="prompts of each kind (%(default)s)")
    parser.add_argument("--losses", type=int, default=256, help="images of the validation loss (%(default)s)")
    parser.add_argument("--real", type=int, default=2000, help="real images of each kind at most (%(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--no-cost", action="store_true", help="leave out what the base loses")
    parser.add_argument("--sheet", metavar="PNG", help="the first images of each system, one below the other")
    options = parser.parse_args(arguments)
    if not (options.adapter or options.embedding or options.whole):
        parser.error("nothing to measure; valid: --adapter, --embedding or --whole")
    if options.images and not options.prompts:
        parser.error("--images without --prompts; valid: both")
    try:
        with torch.no_grad():
            results, lines = measure(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print("\n\n".join([*lines, *(table(rows) for rows in (results.taught, results.cost) if rows)]))


if __name__ == "__main__":
    main()
