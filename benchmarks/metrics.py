"""The figures of docs/evaluation.md: what catches what, the known traps, and what measuring costs.

    python -m benchmarks.metrics [--out docs/images] [--pool 800] [--part 200]
    python -m benchmarks.metrics --cost 10000

Scenes of shapes, 64 pixels, EfficientNet-Lite0. The first form takes about 60 seconds of one core and needs matplotlib;
the second streams images through features and distances and prints time and peak memory.
"""

import argparse
import io
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.shapes.shapes import Shapes, ShapesConfig
from eval.features.efficientnet import SIZE, Features
from eval.features.reference import FeatureSet, features_of, frechet_estimate
from eval.interval import Estimate
from eval.kernel import kid
from eval.memorization import memorization, nearest, pixel_vectors
from eval.prdc import prdc
from eval.suite import rows_table

BATCH = 64


def parts(source: Shapes, first: int, last: int) -> Iterator[Tensor]:
    """Images of items ``first`` .. ``last`` - 1, (B, 3, 64, 64) in [-1, 1]."""
    for start in range(first, last, BATCH):
        images = torch.stack([source[i]["image"] for i in range(start, min(start + BATCH, last))])
        yield images.float() / 127.5 - 1


def blur(images: Tensor, sigma: float = 1.0) -> Tensor:
    """Images blurred by a Gaussian of ``sigma`` pixels."""
    x = torch.arange(-4, 5, dtype=torch.float32)
    row = torch.softmax(-x.square() / (2 * sigma**2), dim=0).view(1, 1, 1, -1).expand(3, 1, 1, 9)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, row, groups=3), row.transpose(2, 3), groups=3)


def add_noise(images: Tensor, levels: float = 12.0) -> Tensor:
    """Images with normal noise of ``levels`` of 255."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise * levels / 127.5).clamp(-1, 1)


def compress_jpeg(images: Tensor, quality: int) -> Tensor:
    """Images written as JPEG and read back."""
    found = []
    for image in ((images + 1) * 127.5).round().to(torch.uint8):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
        found.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(found).float() / 127.5 - 1


def enlarge_bilinearly(images: Tensor) -> Tensor:
    """Images resized to the extractor's size by a bilinear filter instead of its own cubic one."""
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False)


def feature_set(vectors: Tensor) -> FeatureSet:
    """The statistics of vectors (N, D)."""
    return FeatureSet(vectors.shape[1]).update(vectors)


def what_catches_what(features: Features, pool: Tensor, source: Shapes, count: int) -> str:
    """Markdown: real images, the same spoilt in known ways, modes left out, copies of training images.

    pool: vectors of items 0 .. M - 1; the first M/2 are reference and training, of the others ``count`` are spoilt and
    the rest is held out.
    """
    half = len(pool) // 2
    training, rest = (torch.cat(list(parts(source, first, first + half))) for first in (0, half))
    images, held_out = rest[:count], rest[count:]
    black = [i for i in range(half, 20 * half) if source.scene(i)["background"] == "black"][:count]
    dark = torch.stack([source[i]["image"] for i in black]).float() / 127.5 - 1
    sets = {"real images": images, "blur, 1 pixel": blur(images), "noise, 12 levels": add_noise(images),
            "JPEG, quality 75": compress_jpeg(images, 75), "JPEG, quality 30": compress_jpeg(images, 30),
            "enlarged bilinearly": enlarge_bilinearly(images), "black backgrounds only": dark,
            "training images": training[:count], "the same with noise, 2 levels": add_noise(training[:count], 2.0)}
    rows = []
    for name, spoilt in sets.items():
        vectors = features(spoilt)
        shares = prdc(vectors, pool[:half])
        cells = [kid(vectors, pool[:half]).scaled(1000), shares.precision, shares.recall, shares.coverage,
                 near_copies(vectors, pool[:half], pool[half + count:])]
        small = spoilt.shape == images.shape
        cells += [near_copies(*map(pixel_vectors, (spoilt, training, held_out))) if small else ""]
        rows.append((name, *cells))
        print(*rows[-1], sep=" | ", flush=True)
    return rows_table(("samples", "KID x 1000", "precision", "recall", "coverage", "near copies, features",
                       "near copies, pixels"), rows)


def near_copies(samples: Tensor, training: Tensor, held_out: Tensor) -> Estimate:
    """Share of samples nearer to training than all but 5 % of held-out images, from vectors (N, D) of each."""
    return memorization(nearest(samples, [training]), nearest(held_out, [training])).near


def by_count(pool: Tensor) -> list[tuple[int, tuple]]:
    """(N, (Frechet, continued, KID x 1000)) of N real images against N others."""
    found, half, count = [], len(pool) // 2, 50
    while count <= half:
        one, two = pool[:count], pool[half:half + count]
        found.append((count, (*frechet_estimate(feature_set(one), feature_set(two)), kid(one, two).scaled(1000))))
        print(count, *found[-1][1], flush=True)
        count *= 2
    return found


def draw(counts: list[tuple[int, tuple]], path: Path) -> None:
    """The three figures against the number of images; all of them should be 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    names = ("Frechet distance", "Frechet distance, continued to infinitely many", "KID x 1000")
    for name, colour, column in zip(names, ("#d0342c", "#3457d5", "#2a8a4a"), range(3)):
        values = [estimates[column] for _, estimates in counts]
        centre = [value.value for value in values]
        reach = [[value.value - value.low for value in values], [value.high - value.value for value in values]]
        axes.errorbar([count for count, _ in counts], centre, yerr=reach, marker="o", label=name, color=colour,
                      capsize=3)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([count for count, _ in counts], [str(count) for count, _ in counts])
    axes.minorticks_off()
    axes.set(xlabel="images in each of two sets of real images", ylabel="distance, should be 0")
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def cost(features: Features, count: int) -> None:
    """Time and peak memory of ``count`` images through features, and of the distances between their halves."""
    source = Shapes(ShapesConfig(size=64, train=count), "train")
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    found = features_of(parts(source, 0, count), features)
    middle = resource.getrusage(resource.RUSAGE_SELF)
    half = feature_set(found.vectors[:len(found.vectors) // 2])
    other = feature_set(found.vectors[len(found.vectors) // 2:])
    print(*frechet_estimate(half, other), kid(half.vectors, other.vectors), prdc(half.vectors, other.vectors))
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{count} images: features {middle.ru_utime - before.ru_utime:.0f} s, distances "
          f"{after.ru_utime - middle.ru_utime:.0f} s of processor, {time.perf_counter() - began:.0f} s by the clock, "
          f"peak memory {before.ru_maxrss / 1024:.0f} MiB before, {middle.ru_maxrss / 1024:.0f} after the features, "
          f"{after.ru_maxrss / 1024:.0f} MiB after the distances")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/images", help="folder to write to")
    parser.add_argument("--pool", type=int, default=800, help="real images")
    parser.add_argument("--part", type=int, default=200, help="images that are spoilt")
    parser.add_argument("--cost", type=int, metavar="N", help="only time and memory of N images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    features = Features()
    if options.cost:
        return cost(features, options.cost)
    source = Shapes(ShapesConfig(size=64, train=10 * options.pool), "train")
    pool = torch.cat([features(images) for images in parts(source, 0, options.pool)])
    draw(by_count(pool), Path(options.out) / "evaluation.png")
    print(what_catches_what(features, pool, source, options.part))


if __name__ == "__main__":
    main()
