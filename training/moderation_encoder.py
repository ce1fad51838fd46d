"""A second head of the prompt gate: the mean state of a run's own text encoder -> a small network.

    python -m training.moderation_encoder --run RUN --data DIR [DIR ...]

Leaves RUN/moderation_encoder.safetensors; prompts for that run are then checked by both heads, joined by noisy-or. It
sees word order and context that n-grams do not, and nothing that the captions of the run did not teach its encoder:
what that is worth on text of people is in docs/moderation.md. Axis letters: B batch, D width, K categories.
"""
import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model.text_encoder import TextEncoder
from safety.normalize import normalize
from safety.policy import HEADS
from safety.prompt import DEFAULT, Artefact, load_artefact
from training.checkpoint import CheckpointError, file_hash, load_weights, save_weights
from training.clip import trimmed
from training.experiment import load_experiment
from training.moderation_text import Row, read_corpus
from training.moderator import ModeratorStage, batch_loss, labels, platt, twin_places
from training.run import RunFolder

FILE = "moderation_encoder.safetensors"
HIDDEN, EPOCHS, BATCH, LEARNING_RATE = 64, 12, 256, 2e-3
EXTRA_BUDGET = 0.001  # share of harmless text of each kind that this head alone may lift over a threshold


class EncoderHead(nn.Module):
    """Call with a text for the probability of each category; ``states`` are what it is trained on."""

    def __init__(self, encoder: TextEncoder, tokenizer: Tokenizer):
        super().__init__()
        self.encoder, self.tokenizer = encoder.eval().requires_grad_(False), tokenizer
        self.net = nn.Sequential(nn.Linear(encoder.config.width, HIDDEN), nn.ReLU(), nn.Dropout(0.2),
                                 nn.Linear(HIDDEN, len(HEADS)))
        self.slope = nn.Parameter(torch.ones(len(HEADS)), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(len(HEADS)), requires_grad=False)

    @classmethod
    def of_run(cls, folder: str | Path) -> "EncoderHead":
        """The head of a run folder; raises CheckpointError when it is missing, damaged, or of another text encoder."""
        run = RunFolder.open(folder)
        head, path = cls.untrained(folder), run.path / FILE
        if not path.is_file():
            raise CheckpointError(f"no file {path}; python -m training.moderation_encoder --run {folder}")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        if about.get("text_encoder") != file_hash(run.weights("text_encoder")):
            raise CheckpointError(f"{path} was trained on another text encoder than that of {folder}; train it again")
        load_weights(Trained(head), path)
        return head.eval()

    @classmethod
    def untrained(cls, folder: str | Path) -> "EncoderHead":
        """The head of a run folder before training."""
        run = RunFolder.open(folder)
        encoder = TextEncoder(load_experiment(str(run.path / "config.yaml")).denoiser.text_encoder)
        load_weights(encoder, run.weights("text_encoder"))
        return cls(encoder, Tokenizer.load(run.path / "tokenizer.json"))

    @torch.no_grad()
    def states(self, texts: Sequence[str], batch: int = 128) -> Tensor:
        """Mean over the states of all tokens of each text (B, D), read in chunks: nothing is cut off. The denoiser
        reads every token, so all of them were taught, and the state of the end token no more than others."""
        found, size = [], max(1, self.tokenizer.length // 3)
        for start in tqdm(range(0, len(texts), batch), desc="states", disable=len(texts) <= batch, mininterval=5):
            words = [text.split() for text in texts[start:start + batch]]
            places = [range(0, max(1, len(each)), size) for each in words]
            parts = [" ".join(each[at:at + size]) for each, some in zip(words, places) for at in some]
            ids, mask = trimmed(*self.tokenizer.encode(parts))
            kept = mask[..., None]  # (all parts, L, 1)
            sums = (self.encoder(ids, mask) * kept).sum(dim=1)  # (all parts, D)
            counts = kept.sum(dim=1)
            for total, count in zip(*(x.split([len(some) for some in places]) for x in (sums, counts))):
                found.append(total.sum(dim=0) / count.sum())
        return torch.stack(found)

    @torch.no_grad()
    def forward(self, text: str) -> dict[str, float]:
        """plain text -> probability by category."""
        logits = self.net(self.states([text]))[0] * self.slope + self.shift
        return dict(zip(HEADS, torch.sigmoid(logits).tolist()))


class Trained(nn.Module):
    """What of a head is kept in its file: all but the text encoder."""

    def __init__(self, head: EncoderHead):
        super().__init__()
        self.net, self.slope, self.shift = head.net, head.slope, head.shift


def plain(rows: Sequence[Row]) -> list[str]:
    """The readings that the gate gives to its heads."""
    return [normalize(row.text, longest=10**6).plain[:2000] for row in rows]


def fitted(head: EncoderHead, rows: Sequence[Row], config: ModeratorStage, seed: int = 0,
           epochs: int = EPOCHS) -> EncoderHead:
    """Train the small network on the states of rows, with the loss of the n-gram head."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    states = head.states(plain(rows))
    values, known = labels(rows)
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


def calibrated(head: EncoderHead, rows: Sequence[Row], artefact: Artefact, budget: float = EXTRA_BUDGET) -> EncoderHead:
    """Platt's slope and shift on development rows; then each shift is lowered until at most ``budget`` of the harmless
    ones of each file reach the flag threshold of a category by this head alone."""
    with torch.no_grad():
        logits = head.net(head.states(plain(rows))).double()  # (B, K)
    slope, shift = platt(logits, rows)
    with torch.no_grad():
        for k, name in enumerate(HEADS):
            flag = min(max(artefact.policy.limits[name].flag, 1e-6), 1 - 1e-6)
            for source in sorted({row.source for row in rows if row.harmless}):
                places = [i for i, row in enumerate(rows) if row.harmless and row.source == source]
                top = torch.quantile(logits[places, k] * slope[k] + shift[k], 1 - budget, interpolation="higher")
                shift[k] -= max(0.0, float(top) - float(torch.logit(torch.tensor(flag))) + 1e-6)
        head.slope.copy_(slope)
        head.shift.copy_(shift)
    return head


def train_encoder_head(folder: str | Path, roots: Sequence[str], weights: str | Path = DEFAULT,
                       config: ModeratorStage | None = None, left_out: Sequence[str] = ()) -> EncoderHead:
    """Train the head of a run folder on folders of text and write it there; raises ValueError for too little text."""
    config, run = config or ModeratorStage(), RunFolder.open(folder)
    rows = [row for row in read_corpus(list(roots)).rows if row.labels and row.source not in left_out]
    parts = {split: [row for row in rows if row.split == split] for split in ("train", "dev")}
    if not parts["train"] or not parts["dev"]:
        raise ValueError(f"--data: {len(rows)} texts; valid: enough for a training and a development split")
    random = np.random.default_rng(0)
    kept = [row for row in parts["train"] if random.random() < config.kept.get(row.source, 1.0)]
    head = calibrated(fitted(EncoderHead.untrained(folder), kept, config), parts["dev"], load_artefact(weights))
    save_weights(Trained(head), run.path / FILE, {"text_encoder": file_hash(run.weights("text_encoder")),
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
