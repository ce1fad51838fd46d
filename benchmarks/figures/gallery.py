"""A gallery of samples of an emoji run, none of them picked: ten groups of ten prompts, each beside the real image.

    python -m benchmarks.figures.gallery weights/emoji-64 [--root runs/data/emoji64] [--out docs/results/emoji-64]

writes gallery.html and its images. Prompts are the first ten of each group in the order of a hash of their items, and
sample i has seed i, so nobody chooses. Six groups are of training images, by their Unicode group; then come names whose
style was held out, names that training never saw, and scenes of the test split that count and that relate.

How good a sample is, a person says in verdicts.yaml of that folder: {weights: SHA-256 of the denoiser, verdicts:
[good, wrong, ...]}, one of good, acceptable and wrong for each sample in order. The page shows the verdicts and counts
them by group; those of other weights are refused.
"""
import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from data.emoji.emoji import Emoji, EmojiConfig
from files.config import from_dict, read_yaml
from files.images import to_uint8
from files.pages import escape, image_figures, page, table
from files.whole import sha256_of, unit_hash, write_text
from pipeline.config import read_data_config
from pipeline.loading import load_run
from pipeline.system import TextToImage

GROUPS = ("smileys & emotion", "people & body", "animals & nature", "food & drink", "travel & places", "objects")
HELD_OUT, UNSEEN, COUNT, RELATION = ("a style that was held out", "a name that training never saw", "scenes that count",
                                     "scenes that relate")
EACH = 10
BATCH = 20
ATTRIBUTION = ("The real images are Noto Emoji (Google, Apache-2.0), Twitter Emoji (Twitter, CC BY 4.0), OpenMoji "
               "(https://openmoji.org, CC BY-SA 4.0), Fluent Emoji and Fluent Emoji Flat (Microsoft, MIT), resized and "
               "composed on backgrounds, some tinted; samples may be adaptations. The page is under CC BY-SA 4.0.")
VERDICTS = ("good", "acceptable", "wrong")


@dataclass(frozen=True)
class Verdicts:
    """What a person says of the samples of some weights."""

    weights: str
    verdicts: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if unknown := sorted({verdict for verdict in self.verdicts if verdict not in VERDICTS}):
            raise ValueError(f"verdicts: {', '.join(unknown)}; valid: {', '.join(VERDICTS)}")


def first_by_hash(source: Emoji, indices: Sequence[int]) -> list[int]:
    """The first of some items in the order of a hash of what they show."""
    return sorted(indices, key=lambda index: unit_hash("gallery", source.captions(index)[0]))[:EACH]


def chosen(config: EmojiConfig) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """The (prompt, real image (3, H, W)) of each group that has any."""
    train, test = Emoji(config, "train"), Emoji(config, "test")
    singles: dict[str, list[int]] = {group: [] for group in GROUPS}
    for index in range(len(train)):
        row, variant = train.locate(index)
        if row is not None and variant == 0 and train.items[row]["group"] in singles:
            singles[train.items[row]["group"]].append(index)
    groups = {group: (train, indices) for group, indices in singles.items()}
    others: dict[str, list[int]] = {HELD_OUT: [], UNSEEN: [], COUNT: [], RELATION: []}
    for index in range(len(test)):
        row, number = test.locate(index)
        if row is not None:
            others[HELD_OUT if test.held_out[row] == "pair" else UNSEEN].append(index)
        elif (kind := test.scene(number)["kind"]) in ("count", "relation"):
            others[COUNT if kind == "count" else RELATION].append(index)
    groups |= {name: (test, indices) for name, indices in others.items()}
    return {name: [(source.captions(index)[0], source[index]["image"]) for index in first_by_hash(source, indices)]
            for name, (source, indices) in groups.items() if indices}


def draw(system: TextToImage, prompts: Sequence[str]) -> torch.Tensor:
    """A sample of each prompt, uint8 (B, 3, H, W); sample i has seed i."""
    parts = []
    for start in tqdm(range(0, len(prompts), BATCH), unit="batch"):
        some = prompts[start:start + BATCH]
        with torch.inference_mode():
            parts.append(to_uint8(system.decode(system.latents(some, range(start, start + len(some))))).cpu())
    return torch.cat(parts)


def verdicts_of(path: Path, weights: str, count: int) -> tuple[str, ...]:
    """The verdicts of a file, empty texts without one. Raises ValueError for those of other weights or numbers."""
    if not path.exists():
        return ("",) * count
    found = from_dict(Verdicts, read_yaml(path))
    if found.weights != weights or len(found.verdicts) != count:
        raise ValueError(f"{path}: {len(found.verdicts)} verdicts on the weights {found.weights[:12]}; valid: {count} "
                         f"on {weights[:12]}, or no such file")
    return found.verdicts


def sections_of(groups: dict[str, list[tuple[str, torch.Tensor]]], samples: torch.Tensor, verdicts: Sequence[str],
                out: Path) -> list[tuple[str, str]]:
    """The sections of the page: a table of the verdicts, and each group with the real image on the right."""
    sections, rows, start = [], [], 0
    for name, items in groups.items():
        part = range(start, start + len(items))
        pairs = torch.stack([torch.cat([samples[i], real], dim=2) for i, (_, real) in zip(part, items)])
        captions = [" · ".join(filter(None, (prompt, str(i), verdicts[i]))) for i, (prompt, _) in zip(part, items)]
        sections.append((name, image_figures(pairs, captions, out / f"gallery_{start:03d}")))
        rows.append([name, *(sum(verdicts[i] == kind for i in part) for kind in VERDICTS)])
        start += len(items)
    if any(verdicts):
        rows.append(["all", *(sum(row[column] for row in rows) for column in range(1, 4))])  # type: ignore[misc]
        sections.insert(0, ("What a person says", table(["prompts", *VERDICTS], rows)))
    return sections


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the gallery and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of emoji")
    parser.add_argument("--root", help="the folder of emoji (that of the run)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/emoji-64"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    config = read_data_config(options.run / "config.yaml").emoji
    if options.root:
        config = EmojiConfig(**{**vars(config), "root": options.root})
    groups, system = chosen(config), load_run(options.run)
    prompts = [prompt for items in groups.values() for prompt, _ in items]
    weights = sha256_of(options.run / "denoiser.safetensors")
    verdicts = verdicts_of(options.out / "verdicts.yaml", weights, len(prompts))
    sections = sections_of(groups, draw(system, prompts), verdicts, options.out)
    sampling = system.config.sampling
    note = (f"Left: sample i with seed i; right: the real image. {sampling.sampler}, {sampling.steps} steps, guidance "
            f"{sampling.guidance.scale:g}; weights {weights[:12]}. Made by: python -m benchmarks.figures.gallery "
            f"{options.run}. {ATTRIBUTION}")
    sections.insert(0, ("How", f'<p class="quiet">{escape(note)}</p>'))
    write_text(options.out / "gallery.html", page(f"{options.run.name}: {len(prompts)} samples, not picked", sections))
    print(f"wrote {options.out / 'gallery.html'}")


if __name__ == "__main__":
    main()
