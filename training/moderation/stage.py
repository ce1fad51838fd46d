"""The moderator stage: labelled text -> one file with the prompt classifier, the hashed lexicon and the thresholds.

    python train.py configs/moderation.yaml moderator.data.root=DIR [run=DIR] [key.path=value ...]

Twins are in the same batch and are pushed apart by a margin. Unknown labels are masked. The thresholds are the lowest
that keep the blocked share of harmless development text within a budget. Axis letters: B batch, K categories, D width.
"""
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from safety.normalize import TextError, normalize
from safety.policy import HEADS
from safety.prompt import HeadConfig, PromptHead, ngram_ids
from training.moderation.artefact import assemble, write_artefact
from training.moderation.config import ModeratorStage
from training.moderation.corpus import Corpus, read_corpus
from training.moderation.ordinary import ordinary_rows
from training.moderation.requests import request_rows
from training.moderation.rows import Row
from training.moderation.variations import vary
from training.stages.context import StageContext

Bags = list[tuple[np.ndarray, np.ndarray]]  # distinct ids of character n-grams and of words, for each text


class Network(nn.Module):
    """``safety.prompt.PromptHead`` as a trainable module. ``wide`` and ``deep`` name the categories that have linear
    logits and logits of the hidden layer; a category that has both has their sum."""

    def __init__(self, config: HeadConfig, dropout: float, wide: Sequence[str] = HEADS, deep: Sequence[str] = HEADS):
        super().__init__()
        columns = config.width + len(HEADS)
        self.config = config
        self.is_wide, self.is_deep = (torch.tensor([float(name in names) for name in HEADS]) for names in (wide, deep))
        self.char = nn.EmbeddingBag(2**config.char_bits, columns, mode="sum")
        self.word = nn.EmbeddingBag(2**config.word_bits, columns, mode="sum")
        for table in (self.char, self.word):
            nn.init.normal_(table.weight, std=0.03)
            table.weight.data[:, config.width:] = 0
        self.hidden = nn.Linear(2 * config.width, config.hidden)
        self.out = nn.Linear(config.hidden, len(HEADS))
        nn.init.constant_(self.out.bias, -3.0)
        self.dropout = nn.Dropout(dropout)

    def forward(self, bags: Bags) -> torch.Tensor:
        """Logits (B, K) of texts, each with its distinct n-grams."""
        deep, wide = [], torch.zeros(())
        for place, table in enumerate((self.char, self.word)):
            counts = torch.tensor([len(bag[place]) for bag in bags])
            ids = torch.from_numpy(np.concatenate([bag[place] for bag in bags]))
            rows = table(ids, counts.cumsum(0) - counts) / counts.clamp(min=1)[:, None] ** 0.5  # (B, D + K)
            deep.append(rows[:, : self.config.width])
            wide = wide + rows[:, self.config.width:]
        hidden = self.dropout(F.relu(self.hidden(self.dropout(torch.cat(deep, 1)))))
        return F.linear(hidden, self.out_weight(), self.out.bias) + wide * self.is_wide

    def out_weight(self) -> torch.Tensor:
        """Weights (K, H) of the hidden layer: 0 for the categories that have linear logits only."""
        return self.out.weight * self.is_deep[:, None]


def ngram_bag(text: str, config: HeadConfig) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ids of the n-grams of a raw text."""
    return ngram_ids(normalize(text, longest=10**6, with_readings=False).plain[:2000], config.bits)


def varied_bag(text: str, styles: list[str], calm: list[str], config: HeadConfig,
               random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a variation of a text; of the text itself if the gate would refuse the variation unread."""
    try:
        return ngram_bag(vary(text, styles, random, calm), config)
    except TextError:
        return ngram_bag(text, config)


def drop_ngrams(grams: tuple[np.ndarray, np.ndarray], forget: float,
                random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of a text, each dropped with probability ``forget``."""
    characters, words = (ids[random.random(len(ids)) >= forget] for ids in grams)
    return characters, words


def label_tensors(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, known), each float (B, K); a label that is not known is 0."""
    values = torch.tensor([[row.labels.get(name, 0.0) for name in HEADS] for row in rows])
    known = torch.tensor([[float(name in row.labels) for name in HEADS] for row in rows])
    return values, known


def twin_places(rows: Sequence[Row]) -> np.ndarray:
    """Indices (pairs, 2) of the harmful and the harmless row of every pair of twins of which one is known to be
    harmless in all categories. Those that are so in one category only are too many and too alike: with them among the
    pairs, twins of other origin are ordered worse, and less harm of every kind is found."""
    found: dict[int, dict[bool, int]] = {}
    for place, row in enumerate(rows):
        if row.twin >= 0 and (row.harmful or row.harmless):
            found.setdefault(row.twin, {})[row.harmful] = place
    return np.array([[both[True], both[False]] for both in found.values() if len(both) == 2]).reshape(-1, 2)


def batch_loss(logits: torch.Tensor, values: torch.Tensor, known: torch.Tensor, pairs: int,
               config: ModeratorStage) -> torch.Tensor:
    """Masked cross-entropy of logits (B, K), plus a hinge loss on the last ``2 pairs`` rows: harmful, harmless twin."""
    each = F.binary_cross_entropy_with_logits(logits, values, reduction="none") * known
    loss = each.sum() / known.sum().clamp(min=1) * len(HEADS)
    if pairs:
        harmful, harmless = logits[-2 * pairs:].split(pairs)
        hinge = F.relu(config.margin - (harmful - harmless)) * values[-2 * pairs:-pairs]
        loss = loss + config.twin_weight * hinge.sum() / pairs
    return loss


def train_network(rows: list[Row], config: ModeratorStage, seed: int, log: bool = True) -> Network:
    """The network after training for ``config.epochs`` epochs on the rows and their variations."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    rows = [row for row in rows if row.labels for _ in range(int(config.kept.get(row.source, 1.0) + random.random()))]
    styles = [row.text for row in rows if row.source == "real_prompts"]
    calm = [row.text for row in rows if row.harmless and len(row.text) < 150]
    pairs = twin_places(rows)
    bags = [ngram_bag(row.text, config.head) for row in rows]
    all_rows = list(rows)
    for _ in range(config.variations):
        chosen = [row for row in rows if row.source != "captions"]
        all_rows += chosen
        bags += [varied_bag(row.text, styles, calm, config.head, random) for row in chosen]
    values, known = label_tensors(all_rows)
    network = Network(config.head, config.dropout, config.wide, config.deep)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    num_steps = config.epochs * max(1, len(all_rows) // config.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    order = np.concatenate([random.permutation(len(all_rows)) for _ in range(config.epochs + 1)])
    for step in range(num_steps):
        picked = order[step * config.batch:(step + 1) * config.batch]
        count = min(config.twins, len(pairs))
        if count:
            twins = pairs[random.integers(0, len(pairs), count)]
            picked = np.concatenate([picked, twins[:, 0], twins[:, 1]])
        logits = network([drop_ngrams(bags[i], config.forget, random) for i in picked])
        loss = batch_loss(logits, values[picked], known[picked], count, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if log and step % 100 == 0:
            print(f"moderator step {step} of {num_steps}: loss {loss.item():.4f}", flush=True)
    return network.eval()


def quantize(network: Network) -> dict[str, np.ndarray]:
    """Weights for ``PromptHead``: int8 tables with a scale for each column, and the identity as calibration."""
    weights: dict[str, np.ndarray] = {"slope": np.ones(len(HEADS), np.float32),
                                      "shift": np.zeros(len(HEADS), np.float32)}
    for name, table in (("char", network.char), ("word", network.word)):
        values = table.weight.detach().numpy()
        scale = np.maximum(np.abs(values).max(axis=0), 1e-8) / 127  # (D + K,)
        weights[f"{name}.table"] = np.round(values / scale).astype(np.int8)
        weights[f"{name}.scale"] = scale.astype(np.float32)
    rest = {"hidden.weight": network.hidden.weight, "hidden.bias": network.hidden.bias,
            "out.weight": network.out_weight(), "out.bias": network.out.bias}
    return {**weights, **{name: value.detach().numpy().copy() for name, value in rest.items()}}


def raw_logits(head: PromptHead, texts: list[str]) -> np.ndarray:
    """Logits (B, K) before calibration, computed as at inference."""
    found = [head.logits(normalize(text, longest=10**6, with_readings=False).plain[:2000])[0] for text in texts]
    return np.stack(found) if found else np.zeros((0, len(HEADS)), np.float32)


def fit_platt(logits: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and shift (K,) in fp64 for logits (B, K), fitted to the known labels of development rows (Platt 1999)."""
    values, known = label_tensors(rows)
    slope = torch.ones(len(HEADS), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(len(HEADS), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope, shift], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        z = logits * slope + shift
        loss = (F.binary_cross_entropy_with_logits(z, values.double(), reduction="none") * known).sum() / len(rows)
        loss = loss + 1e-3 * ((slope - 1).square() + shift.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return slope.detach().clamp(min=0.05), shift.detach()


def calibrate(head: PromptHead, rows: list[Row]) -> PromptHead:
    """The head with the fitted slope and shift of each category."""
    logits = torch.from_numpy(raw_logits(head, [row.text for row in rows])).double()
    slope, shift = fit_platt(logits, rows)
    return PromptHead(head.config, {**head.weights, "slope": slope.numpy().astype(np.float32),
                                    "shift": shift.numpy().astype(np.float32)})


def corpus_hash(corpus: Corpus) -> str:
    """A hash of the training data, for the card."""
    digest = hashlib.sha256()
    for row in corpus.rows:
        digest.update(f"{row.text}|{sorted(row.labels.items())}|{row.group}\n".encode("utf-8", "surrogatepass"))
    for term in corpus.terms:
        digest.update(f"{term}\n".encode())
    return digest.hexdigest()[:16]


def train_moderator(config: ModeratorStage, context: StageContext) -> None:
    """Train, calibrate and set thresholds; write moderation.safetensors and moderation.json into the run folder."""
    if context.processes.main:
        card = write_moderator(config, context.run.path, context.seed)
        context.run.record(moderator={key: card[key] for key in ("rows", "minors", "terms", "seconds")})
        print(f"moderator: written to {context.run.path}; safety/ holds the shipped one")


def write_moderator(config: ModeratorStage, out: Path, seed: int) -> dict[str, Any]:
    """Do the same for any folder ``out``; returns the card. Raises ValueError for too little text."""
    data = config.data
    if not data.root:
        raise ValueError("moderator.data.root: ''; valid: moderator.data.root=DIR, the folder of text")
    began = time.perf_counter()
    corpus = read_corpus([data.root, *data.extra])
    rows = [row for row in corpus.rows if row.source not in data.left_out and row.labels]
    rows += ordinary_rows(config.ordinary, seed) + request_rows(config.requests, seed)
    parts = {split: [row for row in rows if row.split == split] for split in ("train", "dev", "test")}
    if not parts["train"] or not parts["dev"]:
        raise ValueError(f"moderator.data.root: {len(rows)} texts; valid: enough for training and development")
    head = PromptHead(config.head, quantize(train_network(parts["train"], config, seed)))
    head = calibrate(head, parts["dev"])
    tensors, settings = assemble(head, corpus, parts, config)
    card = {"seed": seed, "data": corpus_hash(corpus), "left_out": list(data.left_out),
            "config": {name: value for name, value in asdict(config).items() if name != "data"},  # paths say nothing
            "rows": {split: len(found) for split, found in parts.items()},
            "seconds": round(time.perf_counter() - began), **settings}
    write_artefact(out, tensors, settings, card)
    return card
