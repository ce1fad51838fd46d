"""What a tuned decoder makes of the same latents: docs/images/decoder.png and a table.

    python -m benchmarks.figures.decoder weights/emoji-64 runs/emoji_64_decoder --clip weights/emoji-64

The first run draws the latents of held-out captions, once, and both decode them. Samples are judged as in
`benchmarks/student.py` (captions found by the evaluator, promises kept) and by two Frechet distances to held-out
images, in the evaluator's vectors and in the features of a classifier of photographs; real images pass through both
decoders, too. It takes about five minutes of one core.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.figures.samplers import resamples
from benchmarks.personal_scores import singles
from benchmarks.student_scores import EmojiJudge, table_row
from data.emoji.emoji import Emoji
from eval.features.efficientnet import Features
from eval.features.reference import features_of, frechet_estimate
from eval.fidelity import psnr
from files.images import to_uint8, to_unit
from files.sheets import axes_grid, save_sheet
from pipeline.clip_vectors import ClipVectors
from pipeline.loading import load_run
from pipeline.system import TextToImage
from scoring.judges import split_reference, unit_batches
from training.experiment import load_experiment

BATCH, SHOWN = 32, 12


@torch.inference_mode()
def decoded(system: TextToImage, latents: Tensor) -> Tensor:
    """Images uint8 (N, 3, H, W) of latents (N, C, h, w)."""
    return torch.cat([to_uint8(system.decode(part)).cpu() for part in latents.split(BATCH)])


def sheet(systems: dict[str, TextToImage], path: Path) -> None:
    """Held-out things on white, each decoder's version of them, and of samples of their prompts."""
    base = next(iter(systems.values()))
    source = singles(load_experiment(path_of(base)).data, "test")
    assert isinstance(source, Emoji)
    chosen = [i for i in range(len(source)) if source.background(source.locate(i)[0]) == "white"]  # type: ignore
    chosen = chosen[::len(chosen) // SHOWN][:SHOWN]
    real = torch.stack([torch.as_tensor(source[i]["image"]) for i in chosen])
    captions = [source.captions(i)[0] for i in chosen]
    latents = {"real": base.encode_images(real), "sample": base.latents(captions, range(len(captions)))}
    rows = {"real": real, **{f"{what}, {name}": decoded(system, latents[what])
                             for what in latents for name, system in systems.items()}}
    images = torch.cat(list(rows.values()))
    save_sheet(axes_grid(images, captions, list(rows), 64, "the same latents, two decoders"), path)


def path_of(system: TextToImage) -> Path:
    """The configuration of the run folder that a system was read from."""
    return system.files["autoencoder"].parent / "config.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, print the table and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run that the stage decoder started from, of emoji")
    parser.add_argument("tuned", type=Path, help="the run of the stage decoder")
    parser.add_argument("--clip", type=Path, required=True, help="run folder of the evaluator")
    parser.add_argument("--count", type=int, default=256, help="captions (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="the folder of the figure (%(default)s)")
    options = parser.parse_args(arguments)
    systems = {"before": load_run(options.run, moderation=None), "tuned": load_run(options.tuned, moderation=None)}
    base = systems["before"]
    judge = EmojiJudge(load_experiment(options.run / "config.yaml"), options.count, ClipVectors.of_run(options.clip))
    photographs = Features(torch.device("cpu"))
    reference = features_of(split_reference(judge.promises.source, options.count, "").batches(), photographs)
    real = torch.stack([torch.as_tensor(image) for image in judge.prompts.images])
    captions, seeds = judge.prompts.captions, judge.prompts.seeds
    latents = {"real": torch.cat([base.encode_images(part) for part in real.split(BATCH)]),
               "samples": torch.cat([base.latents(captions[i:i + BATCH], seeds[i:i + BATCH])
                                     for i in range(0, len(captions), BATCH)])}
    sets = {"real": real, **{f"{what}, {name}": decoded(system, latents[what])
                             for what in latents for name, system in systems.items()}}
    titles = ["images", "PSNR", "distance (photographs)", *judge.measures.values(), judge.distance]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    draws = resamples(len(captions))
    for (name, images), row in zip(sets.items(), judge.rows(list(sets.values()))):
        quality = f"{float(psnr(to_unit(images), to_unit(real)).mean()):.1f}" if "real, " in name else ""
        distance = str(frechet_estimate(features_of(unit_batches(images), photographs), reference)[0])
        print(table_row(name, [quality, distance], judge, row, None, draws)[:-2], flush=True)
    sheet(systems, options.out / "decoder.png")


if __name__ == "__main__":
    main()
