"""What adapters and learned words bring and what they cost, at several scales: a table in Markdown.

    python -m benchmarks.personalization RUN --adapter FILE --images FOLDER --prompts FILE --trigger sks --clip RUN

validation loss: of the base's own held-out images, with fixed noise: a rise is forgetting
drift:           1 - cosine of an own prompt's image with that of the base, same seed: what changes without being asked
own fidelity:    cosine of an own prompt and its image
hit:             share of images of "TRIGGER PROMPT" that are nearer to the mean of FOLDER than to that of the base's
                 held-out images
similarity:      cosine of these images with the mean of FOLDER, which should hold images that were not trained on
fidelity:        cosine of these images with PROMPT, without the trigger

All cosines are those of the evaluator that the stage clip left in a run folder; without --clip there is the loss alone.
FILE has one prompt a line; without it the own prompts are held-out captions of the base.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.catalog import DataConfig, build_source
from data.images.folder import FolderConfig
from data.source import Source, image_batch
from files.config import from_dict, read_yaml
from files.images import to_unit
from pipeline.clip_vectors import ClipVectors
from pipeline.config import read_data_config
from pipeline.loading import load_run
from pipeline.personal import Personal
from pipeline.system import Networks, TextToImage
from sampling.personal import EMBEDDING, in_folder, parse_adapter
from training.stages.denoiser import DenoiserStage, Denoising
from training.stages.pairs import PairBatch, latent_encoder
from training.stages.personal import few_images

BATCH = 16
COLUMNS = ("scale", "validation loss", "drift", "own fidelity", "hit", "similarity", "fidelity")


def held_out(system: TextToImage, source: Source, count: int) -> PairBatch:
    """The first ``count`` held-out images of the base as latents, with their captions."""
    places = np.arange(min(count, len(source)))
    encode = latent_encoder(system.autoencoder, system.device)
    parts = [encode(image_batch(source, places[i:i + BATCH])) for i in range(0, len(places), BATCH)]
    mean, logvar = (torch.cat(tensors) for tensors in zip(*parts))
    return PairBatch(mean, logvar, [source.captions(int(i))[0] for i in places])


def mean_vector(clip: ClipVectors, source: Source, count: int) -> Tensor:
    """The mean (E,) of the vectors of the first images of a source, of length 1."""
    places = np.arange(min(count, len(source)))
    vectors = torch.cat([clip(image_batch(source, places[i:i + BATCH])) for i in range(0, len(places), BATCH)])
    return torch.nn.functional.normalize(vectors.mean(dim=0), dim=0)


def vectors_of(system: TextToImage, clip: ClipVectors, prompts: list[str]) -> Tensor:
    """The vectors (N, E) of one sample a prompt; sample i has seed i."""
    return clip(to_unit(system.images_in_batches(prompts, range(len(prompts)), batch=BATCH)))


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """One row for each scale."""
    system = load_run(options.run, moderation=None)
    path = Path(options.run) / "config.yaml"
    own = build_source(read_data_config(path).squares, "validation")
    stage = from_dict(DenoiserStage, read_yaml(path).get("denoiser") or {}, "denoiser")
    denoising, pairs = Denoising(stage, system.tokenizer, 0, system.device), held_out(system, own, options.count)
    clip = ClipVectors.of_run(options.clip, system.device) if options.clip else None
    captions = [own.captions(i)[0] for i in range(min(options.count, len(own)))]
    prompts = Path(options.prompts).read_text(encoding="utf-8").split("\n") if options.prompts else captions
    prompts = [line.strip() for line in prompts if line.strip()][:options.count]
    shown = taught = None
    if clip is not None and options.images:
        data = DataConfig(source="folder", folder=FolderConfig(root=options.images, size=read_data_config(path).size))
        taught = mean_vector(clip, build_source(few_images(data, ["image"]), "train"), options.count)
        shown = mean_vector(clip, own, options.count)
    before = vectors_of(system, clip, captions) if clip is not None else None
    adapters = [parse_adapter(text) for text in options.adapter]
    embeddings = [in_folder(text, EMBEDDING) for text in options.embedding]
    personal = Personal(system, adapters, embeddings, options.any_base)
    rows = []
    for scale in options.scales:
        personal.set_scales([scale * own_scale for _, own_scale in adapters])
        row = {"scale": scale,
               "validation loss": denoising.validate(Networks(system.unet, system.text_encoder), pairs)["loss"]}
        if clip is not None and before is not None:
            vectors = vectors_of(system, clip, captions)
            row["drift"] = 1 - float((vectors * before).sum(dim=1).mean())
            row["own fidelity"] = float((vectors * clip.texts(captions)).sum(dim=1).mean())
            called = vectors_of(system, clip, [f"{options.trigger} {prompt}".strip() for prompt in prompts])
            row["fidelity"] = float((called * clip.texts(prompts)).sum(dim=1).mean())
            if taught is not None and shown is not None:
                row["hit"] = float((called @ taught > called @ shown).float().mean())
                row["similarity"] = float((called @ taught).mean())
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of the base")
    parser.add_argument("--adapter", nargs="+", default=[], metavar="FILE[:SCALE]")
    parser.add_argument("--embedding", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--any-base", action="store_true")
    parser.add_argument("--images", metavar="FOLDER", help="images of what was taught, others than those trained on")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line, without the trigger")
    parser.add_argument("--trigger", default="", help="the word before each prompt")
    parser.add_argument("--clip", metavar="RUN", help="run folder of the evaluator")
    parser.add_argument("--count", type=int, default=64, help="images and prompts of each kind (%(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    options = parser.parse_args(arguments)
    if not options.adapter and not options.embedding:
        parser.error("nothing to measure; valid: --adapter or --embedding")
    if not options.adapter:
        options.scales = [1.0]  # learned words have no scale
    try:
        with torch.no_grad():
            rows = measure(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    names = [name for name in COLUMNS if name in rows[0]]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(f'{row[name]:.4g}' for name in names)} |")


if __name__ == "__main__":
    main()
