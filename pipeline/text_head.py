"""A second head of the prompt gate: a small network on the mean state of a run's own text encoder.

Unlike n-grams it sees word order and context, but it knows only what the captions of the run taught its encoder.
training/moderation/encoder_head.py trains it. Axis letters: B batch, L tokens, D width, K categories.
"""
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from data.tokenizer import Tokenizer
from files.run_folder import RunFolder
from files.weights import CheckpointError, load_weights
from files.whole import sha256_of
from model.text_encoder import TextEncoder, trim_padding
from pipeline.config import read_system_config
from safety.policy import HEADS

FILE = "moderation_encoder.safetensors"
HIDDEN = 64  # units of the small network


class EncoderHead(nn.Module):
    """Maps a text to the probability of each category; it is trained on ``states``."""

    def __init__(self, encoder: TextEncoder, tokenizer: Tokenizer):
        super().__init__()
        self.encoder, self.tokenizer = encoder.eval().requires_grad_(False), tokenizer
        self.net = nn.Sequential(nn.Linear(encoder.config.width, HIDDEN), nn.ReLU(), nn.Dropout(0.2),
                                 nn.Linear(HIDDEN, len(HEADS)))
        self.slope = nn.Parameter(torch.ones(len(HEADS)), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(len(HEADS)), requires_grad=False)

    @torch.no_grad()
    def states(self, texts: Sequence[str], batch: int = 128) -> Tensor:
        """Mean over the states of all tokens of each text (B, D). Long texts are read in chunks, so nothing is cut
        off. The denoiser attends to every token, so all states were trained, and that of the end token no more than
        others."""
        found, size = [], max(1, self.tokenizer.length // 3)
        for start in tqdm(range(0, len(texts), batch), desc="states", disable=len(texts) <= batch, mininterval=5):
            words = [text.split() for text in texts[start:start + batch]]
            places = [range(0, max(1, len(each)), size) for each in words]
            parts = [" ".join(each[at:at + size]) for each, some in zip(words, places) for at in some]
            ids, mask = trim_padding(*self.tokenizer.encode(parts))
            kept = mask[..., None]  # (all parts, L, 1)
            sums = (self.encoder(ids, mask) * kept).sum(dim=1)  # (all parts, D)
            counts = kept.sum(dim=1)
            for total, count in zip(*(x.split([len(some) for some in places]) for x in (sums, counts))):
                found.append(total.sum(dim=0) / count.sum())
        return torch.stack(found)

    @torch.no_grad()
    def forward(self, text: str) -> dict[str, float]:
        """Probability by category of a plain text."""
        logits = self.net(self.states([text]))[0] * self.slope + self.shift
        return dict(zip(HEADS, torch.sigmoid(logits).tolist()))


class TrainedPart(nn.Module):
    """The part of a head that is kept in its file: everything but the text encoder."""

    def __init__(self, head: EncoderHead):
        super().__init__()
        self.net, self.slope, self.shift = head.net, head.slope, head.shift


def read_head(folder: str | Path) -> EncoderHead:
    """The head of a run folder; raises CheckpointError if it is missing, damaged, or belongs to another text
    encoder."""
    run = RunFolder.open(folder)
    head, path = untrained_head(folder), run.path / FILE
    if not path.is_file():
        raise CheckpointError(f"no file {path}; python -m training.moderation.encoder_head --run {folder}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if about.get("text_encoder") != sha256_of(run.weights("text_encoder")):
        raise CheckpointError(f"{path} was trained on another text encoder than that of {folder}; train it again")
    load_weights(TrainedPart(head), path)
    return head.eval()


def untrained_head(folder: str | Path) -> EncoderHead:
    """The head of a run folder before training."""
    run = RunFolder.open(folder)
    encoder = TextEncoder(read_system_config(run.path / "config.yaml").text_encoder)
    load_weights(encoder, run.weights("text_encoder"))
    return EncoderHead(encoder, Tokenizer.load(run.path / "tokenizer.json"))
