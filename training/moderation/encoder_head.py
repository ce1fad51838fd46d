"""A second head of the prompt gate: the mean state of a run's own text encoder -> a small network.

    python -m training.moderation.encoder_head --run RUN --data DIR [DIR ...]

Writes RUN/moderation_encoder.safetensors; prompts for that run are then checked by both heads, joined by noisy-or. This
head sees word order and context, unlike n-grams, but knows only what the captions of the run have taught its encoder.
docs/moderation.md has its figures on prompts of people. Axis letters: B batch, D width, K categories.
"""
import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from files.run_folder import RunFolder
from files.weights import save_weights
from files.whole import sha256_of
from pipeline.text_head import FILE, EncoderHead, TrainedPart, untrained_head
from safety.normalize import normalize
from safety.policy import HEADS
from safety.prompt import DEFAULT, Artefact, load_artefact
from training.moderation.corpus import read_corpus
from training.moderation.rows import Row
from training.moderation.stage import ModeratorStage, batch_loss, fit_platt, label_tensors, twin_places

EPOCHS, BATCH, LEARNING_RATE = 12, 256, 2e-3
EXTRA_BUDGET = 0.001  # share of harmless text of each kind that this head alone may flag


def plain_texts(rows: Sequence[Row]) -> list[str]:
    """The plain text of each row, as the gate passes it to its heads."""
    return [normalize(row.text, longest=10**6, with_readings=False).plain[:2000] for row in rows]


def fit(head: EncoderHead, rows: Sequence[Row], config: ModeratorStage, seed: int = 0,
        epochs: int = EPOCHS) -> EncoderHead:
    """The head after training on the encoder states of the rows, with the loss of the n-gram head."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    states = head.states(plain_texts(rows))
    values, known = label_tensors(rows)
    pairs = twin_places(rows)
    optimizer = torch.optim.Adam(head.net.parameters(), lr=LEARNING_RATE)
    head.net.train()
    for _ in range(epochs):
        order = random.permutation(len(rows))
        for start in range(0, len(order), BATCH):
            picked, count = order[start:start + BATCH], min(config.twins, len(pairs))
            if count:
                twins = pairs[random.integers(0, len(pairs), count)]
                picked = np.concatenate([picked, twins[:, 0], twins[:, 1]])
            loss = batch_loss(head.net(states[picked]), values[picked], known[picked], count, config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


def calibrate(head: EncoderHead, rows: Sequence[Row], artefact: Artefact, budget: float = EXTRA_BUDGET) -> EncoderHead:
    """The head with Platt's slope and shift for development rows; each shift is then lowered until at most the share
    ``budget`` of the harmless rows of each file reaches the flag threshold of a category by this head alone."""
    with torch.no_grad():
        logits = head.net(head.states(plain_texts(rows))).double()  # (B, K)
    slope, shift = fit_platt(logits, rows)
    with torch.no_grad():
        for k, name in enumerate(HEADS):
            flag = min(artefact.policy.limits[name].flag, artefact.policy.short[name].flag)
            flag = min(max(flag, 1e-6), 1 - 1e-6)
            for source in sorted({row.source for row in rows if row.harmless}):
                places = [i for i, row in enumerate(rows) if row.harmless and row.source == source]
                top = torch.quantile(logits[places, k] * slope[k] + shift[k], 1 - budget, interpolation="higher")
                shift[k] -= max(0.0, float(top) - float(torch.logit(torch.tensor(flag))) + 1e-6)
        head.slope.copy_(slope)
        head.shift.copy_(shift)
    return head


def train_encoder_head(folder: str | Path, roots: Sequence[str], weights: str | Path = DEFAULT,
                       config: ModeratorStage | None = None, left_out: Sequence[str] = ()) -> EncoderHead:
    """Train the head of a run folder on folders of text and write it there. Raises ValueError for too little text."""
    config, run = config or ModeratorStage(), RunFolder.open(folder)
    rows = [row for row in read_corpus(list(roots)).rows if row.labels and row.source not in left_out]
    parts = {split: [row for row in rows if row.split == split] for split in ("train", "dev")}
    if not parts["train"] or not parts["dev"]:
        raise ValueError(f"--data: {len(rows)} texts; valid: enough for a training and a development split")
    random = np.random.default_rng(0)
    kept = [row for row in parts["train"] if random.random() < config.kept.get(row.source, 1.0)]
    head = calibrate(fit(untrained_head(folder), kept, config), parts["dev"], load_artefact(weights))
    save_weights(TrainedPart(head), run.path / FILE, {
        "text_encoder": sha256_of(run.weights("text_encoder")),
        "rows": json.dumps({key: len(part) for key, part in parts.items()})})
    return head


def main() -> None:
    """Train the head that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder with a text encoder")
    parser.add_argument("--data", nargs="+", required=True, help="folders of text, as for the stage moderator")
    options = parser.parse_args()
    train_encoder_head(options.run, options.data)
    print(f"written to {Path(options.run) / FILE}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
