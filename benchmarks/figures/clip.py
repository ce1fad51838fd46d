"""The image of docs/clip.md: a small CLIP trained on scenes of shapes, and what it makes of pairs it has not seen.

    python -m benchmarks.figures.clip [--out docs/images] [--steps 600]

Takes about five minutes on one core and needs matplotlib.
"""

import argparse
import textwrap
import time
from pathlib import Path

import matplotlib
import torch

from data.order import Order
from data.shapes.shapes import Shapes, ShapesConfig
from data.tokenizer import Tokenizer, TokenizerConfig
from model.clip import Clip, ClipConfig, ImageEncoderConfig, contrastive_loss
from model.text_encoder import TextEncoderConfig

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SHOWN = 8


def pairs(split: str, count: int, size: int) -> tuple[torch.Tensor, list[str]]:
    """The first pairs of a split: images (B, 3, size, size) in [-1, 1] and a caption each."""
    source = Shapes(ShapesConfig(size=size), split)  # type: ignore[arg-type]
    items = [source[i] for i in range(count)]
    return torch.stack([item["image"] for item in items]).float() / 127.5 - 1, [item["caption"] for item in items]


def train_clip(images: torch.Tensor, captions: list[str], tokenizer: Tokenizer, steps: int, batch: int = 128) -> Clip:
    """A CLIP of three layers on each side after `steps` steps."""
    torch.manual_seed(0)
    text = TextEncoderConfig(vocab_size=400, length=tokenizer.length, width=96, layers=3, heads=3, mlp_width=384,
                             causal=False)
    clip = Clip(ClipConfig(ImageEncoderConfig(images.shape[-1], 8, width=96, layers=3, heads=3, mlp_width=384), text,
                           width=64))
    ids, mask = tokenizer.encode(captions)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.1)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    order = Order(len(images), seed=0)
    for step in range(steps):
        chosen = torch.as_tensor(order.indices(step, batch))
        longest = int(mask[chosen].sum(dim=1).max())
        loss = contrastive_loss(clip(images[chosen], ids[chosen, :longest], mask[chosen, :longest]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        clip.limit_scale()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, temperature {(-clip.logit_scale).exp().item():.4f}")
    return clip.eval()


def draw(logits: torch.Tensor, images: torch.Tensor, captions: list[str], path: Path) -> None:
    """Images above, captions on the left, the probability of each caption for each image between."""
    figure = plt.figure(figsize=(11, 5.2))
    left, width = 0.36, 0.63
    for column, image in enumerate(images):
        axis = figure.add_axes((left + width * (column + 0.04) / SHOWN, 0.78, 0.92 * width / SHOWN, 0.2))
        axis.imshow((image.permute(1, 2, 0) + 1) / 2)
        axis.axis("off")
    axis = figure.add_axes((left, 0.02, width, 0.74))
    shares = logits.softmax(dim=1).T  # (texts, images)
    axis.imshow(shares, cmap="Greens", vmin=0, vmax=1.3, aspect="auto")
    axis.set_xticks([])
    axis.set_yticks(range(SHOWN), [textwrap.fill(caption, 48) for caption in captions])
    for row, values in enumerate(shares.tolist()):
        for column, value in enumerate(values):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="docs/images", help="folder to write to")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    images, captions = pairs("train", 20_000, 32)
    tokenizer = Tokenizer.train(captions, TokenizerConfig(vocab_size=400, length=40))
    began = time.perf_counter()
    clip = train_clip(images, captions, tokenizer, options.steps)
    print(f"{options.steps} steps in {time.perf_counter() - began:.0f} s")
    images, captions = pairs("validation", 256, 32)
    with torch.no_grad():
        logits = clip(images, *tokenizer.encode(captions))
    found = (logits.argmax(dim=1) == torch.arange(len(logits))).float().mean()
    print(f"the right one of {len(logits)} captions: {found:.1%}, chance {1 / len(logits):.1%}")
    draw(logits[:SHOWN, :SHOWN], images[:SHOWN], captions[:SHOWN], Path(options.out) / "clip.png")


if __name__ == "__main__":
    main()
