"""The clip stage: an evaluator that is independent of the generator (Radford et al. 2021, section 2.3).

A CLIP is trained contrastively on the training split, with its own tokenizer, seed and order of the data, so that it
does not share the mistakes of the denoiser and its text encoder. It is not used in training or sampling. Axis letters:
B pairs, H W size of the images, L tokens, E width of the shared space.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.loader import Batch, Loader
from data.order import Order
from data.source import Source, image_batch
from data.tokenizer import Tokenizer, TokenizerConfig
from diffusion.noise import check_seed
from eval.clip_score import caption_ranks
from files.config import to_dict
from files.images import to_unit
from files.sheets import save_grid
from files.weights import save_weights
from files.whole import write_text
from model.clip import Clip, ClipConfig, ImageEncoderConfig, contrastive_loss, region_loss
from model.device import autocast_dtype, place_on
from model.text_encoder import TextEncoderConfig, trim_padding
from pipeline.clip_vectors import ClipVectors
from training.loop import Task, TrainConfig, fit
from training.seed import Part
from training.stages.clip_texts import (
    Substitutes,
    among_made_up_words,
    cut_to_parts,
    draw_parts,
    parts_in_captions,
    texts_in_captions,
)
from training.stages.context import StageContext
from training.stages.tokenizer import fit_tokenizer

SHOWN = 16  # pairs of a preview
PARTS = 2  # parts of each caption that are sought in the regions of images
MADE_UP = 0.25  # share of these that are also sought among words of random letters
WORDS = 10_000  # items from whose captions wrong words are taken


def small_clip() -> ClipConfig:
    """A configuration of 1.7 M parameters, enough for images of 48 pixels and captions of a few hundred words."""
    return ClipConfig(ImageEncoderConfig(size=48, patch=6, width=128, layers=4, heads=4, mlp_width=512),
                      TextEncoderConfig(1024, 40, width=128, layers=3, heads=4, mlp_width=512, causal=False), width=128)


@dataclass(frozen=True)
class ClipStage:
    """``seed`` is the evaluator's own and not that of the run, so that the same evaluator judges runs with different
    seeds. ``validation`` is the number of held-out pairs, which serve as wrong answers for each other. ``parts`` is the
    share of captions of which one part is learned instead of the whole. ``wrong_words`` adds each caption with one word
    exchanged as a wrong answer (training/stages/clip_texts.py). With ``model.regions`` the loss also asks of each image
    and each of some parts of the captions whether a region of the image shows it."""

    model: ClipConfig = field(default_factory=small_clip)
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocab_size=1024, length=40))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch=128))
    validation: int = 256
    parts: float = 0.0
    wrong_words: bool = False
    seed: int = 1

    def __post_init__(self):
        check_seed(self.seed)
        text = self.model.text
        if text.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(f"model.text.vocab_size: {text.vocab_size}; valid: from tokenizer.vocab_size = "
                             f"{self.tokenizer.vocab_size} up")
        if text.length != self.tokenizer.length:
            raise ValueError(f"model.text.length: {text.length}; valid: tokenizer.length = {self.tokenizer.length}")
        if self.model.image.channels != 3:
            raise ValueError(f"model.image.channels: {self.model.image.channels}; valid: 3")
        if self.validation < 2 or self.train.batch < 2:
            raise ValueError(f"validation: {self.validation}, train.batch: {self.train.batch}; valid: from 2 pairs up, "
                             "a pair alone has no wrong answer")
        if not 0 <= self.parts <= 1:
            raise ValueError(f"parts: {self.parts}; valid: a share from 0 to 1")
        if self.train.accumulate > 1:
            raise ValueError(f"train.accumulate: {self.train.accumulate}; valid: 1, a batch is its own set of wrong "
                             "answers and cannot be cut")


def train_clip(config: ClipStage, context: StageContext) -> None:
    """Fit the tokenizer, train, and write clip_tokenizer.json, clip.safetensors and their quality on held-out pairs.
    Raises ValueError for several processes, because each would have only its own part of the wrong answers."""
    source, validation, run = context.source, context.validation, context.run
    device, processes = context.device, context.processes
    if processes.world > 1:
        raise ValueError(f"stage clip with {processes.world} processes; valid: one, a batch has its own wrong answers")
    inherited = run.path / "clip_tokenizer.json"  # of the run that this one starts from
    tokenizer = Tokenizer.load(inherited) if inherited.is_file() else fit_tokenizer(source, config.tokenizer)
    torch.manual_seed(config.seed)  # initial weights
    model = place_on(Clip(config.model), device)
    context.begin(clip=model)
    count = min(config.validation, len(validation))
    if count < 2:
        raise ValueError(f"the validation split has {count} pairs; valid: from 2 up")
    held_out = image_batch(validation, np.arange(count))  # (V, 3, H, W)
    captions = [validation.captions(i)[0] for i in range(count)]

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = trim_padding(*tokenizer.encode(texts))  # (B, L)
        return ids.to(device), mask.to(device)

    def logits(model: Clip, images: Tensor, texts: list[str]) -> Tensor:
        return model(model.resize_images(images.to(device)), *tokens(texts))  # (B, B)

    def loss_at(model: Clip, read: Batch, position: int, part: Part) -> dict[str, Tensor]:
        model.limit_scale()  # before a step, which is after the previous one
        images = model.resize_images(to_unit(part.of_read(read.images)).to(device))
        return loss_of_pairs(config, model, images, part.of_read(read.captions), tokens, substitutes, position)

    @torch.no_grad()
    def validate(model: Clip) -> dict[str, float]:
        vectors = ClipVectors(model, tokenizer, "")
        x, y = vectors(held_out), vectors.texts(captions)
        loss = contrastive_loss(model.logit_scale.exp() * x @ y.T, texts_in_captions(captions, captions))
        return {"loss": float(loss), "recall_1": float((caption_ranks(x, y, captions) == 0).float().mean())}

    def preview(model: Clip, step: int) -> None:
        vectors = ClipVectors(model, tokenizer, "")
        pairs = min(SHOWN, count)
        nearest = (vectors(held_out[:pairs]) @ vectors.texts(captions).T).argmax(dim=1).tolist()
        save_grid(held_out[:pairs], run.path / "samples" / f"clip_{step:06d}.png", [captions[i] for i in nearest],
                  title=f"step {step}: the caption of {count} held-out ones that each image finds")

    substitutes = substitutes_of(source) if config.wrong_words else None
    order = Order(len(source), config.seed, getattr(source, "buckets", None))
    with Loader(source, order, config.train.batch, config.seed, config.train.workers) as loader:
        task = Task("clip", loader.batch_at, loss_at, validate, preview, ("loss", "min"),
                    lambda model: logits(model, held_out[:1], captions[:1]))
        average = fit(task, model, config.train, run, config.seed, processes)
    average.limit_scale()
    write_text(run.path / "clip_tokenizer.json", tokenizer.to_json())
    # written last, because its presence marks the stage as finished; it holds its configuration for use in other runs
    save_weights(average, run.weights("clip"), {"model": json.dumps(to_dict(config.model))})
    measured = validate(average)
    run.record(clip={"validation_loss": round(measured["loss"], 5), "recall_1": round(measured["recall_1"], 4),
                     "pairs": count, "seed": config.seed, "parameters": sum(p.numel() for p in model.parameters()),
                     "bf16": autocast_dtype(config.train.precision, device) is not None})


def loss_of_pairs(config: ClipStage, model: Clip, images: Tensor, captions: list[str],
                  tokens: Callable[[list[str]], tuple[Tensor, Tensor]], substitutes: Substitutes | None,
                  position: int) -> dict[str, Tensor]:
    """The loss of the images (B, 3, H, W) of one step and their captions; ``tokens`` encodes texts."""
    rng = np.random.default_rng([config.seed, position])
    texts = cut_to_parts(captions, config.parts, rng)
    texts += [substitutes.wrong(text, rng) for text in texts] if substitutes else []
    equal = texts_in_captions(captions, texts)
    if not config.model.regions:
        return {"loss": contrastive_loss(model(images, *tokens(texts)).float(), equal)}  # of (B, B) or (B, 2B)
    rng = np.random.default_rng([config.seed, position, 1])  # the draws above are those of a run without regions
    parts, among = parts_of_captions(captions, substitutes, rng)
    shown = parts_in_captions(captions, [*parts, *among])
    read = [tokens(some) for some in (parts, list(among.values())) if some]  # apart, since they are longer
    table, found = model.logits_with_regions(images, tokens(texts), read)
    whole, regions = contrastive_loss(table.float(), equal), region_loss(found.float(), shown)
    return {"loss": whole + regions, "whole": whole.detach(), "regions": regions.detach()}


def parts_of_captions(captions: list[str], substitutes: Substitutes | None,
                      rng: np.random.Generator) -> tuple[list[str], dict[str, str]]:
    """Parts of captions, and with ``substitutes`` the same with one word exchanged, each once; and some of them, each
    with the same text among made-up words."""
    parts = draw_parts(captions, PARTS, rng)
    if substitutes:
        parts += [substitutes.wrong(text, rng) for text in parts]
    parts = list(dict.fromkeys(parts))
    return parts, {text: among_made_up_words(text, rng)
                   for text, draw in zip(parts, rng.random(len(parts))) if draw < MADE_UP}


def substitutes_of(source: Source) -> Substitutes:
    """The words that can replace each other in the captions of a source."""
    return Substitutes(caption for i in range(min(len(source), WORDS)) for caption in source.captions(i))
