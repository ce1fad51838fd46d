"""The textual_inversion stage: new words for what a few images show (Gal et al. 2022, "An image is worth one word").

Only the vectors of the new words are trained, in front of the text encoder; no weight of the base changes. A word may
have several vectors, and there may be several words. Leaves embedding.safetensors.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from data.learned_tokens import check_word
from model.pretrained.card import Card
from model.pretrained.embeddings import write_embeddings
from pipeline.personal import extend_vocabulary
from training.loop import TrainConfig
from training.stages.context import StageContext
from training.stages.denoiser import Predicts
from training.stages.personal import (
    Applied,
    Base,
    Few,
    Functions,
    Method,
    PersonalStage,
    check_captions,
    few_steps,
    judge_captions,
    load_base,
    teach,
)


@dataclass(frozen=True)
class TokenConfig:
    """A new word. ``init`` is a known word or phrase whose mean vector it begins with, so that training starts in the
    neighbourhood of its meaning; "" begins with the mean of the vocabulary."""

    token: str
    vectors: int = 1
    init: str = ""

    def __post_init__(self) -> None:
        check_word(self.token)
        if not 1 <= self.vectors <= 64:
            raise ValueError(f"vectors: {self.vectors}; valid: 1 to 64")


@dataclass(frozen=True)
class TextualInversionStage(PersonalStage):
    """``tokens`` are the new words, which the captions have to contain."""

    tokens: tuple[TokenConfig, ...] = ()
    train: TrainConfig = field(default_factory=lambda: few_steps(600, 5e-3, decay=0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [token.token.lower() for token in self.tokens]
        if len(set(names)) < len(names):
            raise ValueError(f"tokens: {', '.join(names)}; valid: different words")


class Vectors(nn.Module):
    """The vectors (n, D) of each new word, in order."""

    def __init__(self, vectors: list[Tensor]):
        super().__init__()
        self.words = nn.ParameterList(nn.Parameter(tensor) for tensor in vectors)

    def rows(self) -> Tensor:
        """All vectors, one below the other."""
        return torch.cat(list(self.words))


class ByVectors(Method[Vectors]):
    """Rows of the table of token embeddings are trained; the text encoder is called with the changed table."""

    def __init__(self, base: Base, vectors: Vectors):
        self.base, self.model = base, vectors
        self.known = base.system.text_encoder.token_embedding.num_embeddings - len(vectors.rows())

    def networks(self, model: Vectors) -> Predicts:
        """The UNet, and the text encoder with the new rows."""
        encoder = self.base.system.text_encoder
        table = torch.cat([encoder.token_embedding.weight[:self.known], model.rows()])

        def encode(ids: Tensor, mask: Tensor | None) -> Tensor:
            return functional_call(encoder, {"token_embedding.weight": table}, (ids, mask))

        return Functions(self.base.system.unet, encode)

    @contextmanager
    def applied(self, model: Vectors) -> Applied:
        """The base with the new rows; nobody else reads them."""
        with torch.no_grad():
            self.base.system.text_encoder.token_embedding.weight[self.known:] = model.rows()
        yield self.base.system


def first_vectors(token: TokenConfig, base: Base) -> Tensor:
    """The vectors (n, D) that a new word begins with: a mean, and for all but the first a little noise, because equal
    vectors would stay equal."""
    system = base.system
    table = system.text_encoder.token_embedding.weight.detach()
    ids = system.tokenizer.bpe.encode(token.init, add_special_tokens=False).ids if token.init else []
    if token.init and not ids:
        raise ValueError(f"init: {token.init!r}; valid: a word or phrase of the vocabulary")
    known = table[ids] if ids else table[:system.tokenizer.vocab_size]
    vectors = known.mean(dim=0).repeat(token.vectors, 1)  # (n, D)
    vectors[1:] += 0.1 * table.std() * torch.randn(vectors[1:].shape).to(vectors)
    return vectors


def train_textual_inversion(config: TextualInversionStage, context: StageContext) -> None:
    """Train the vectors of new words and write embedding.safetensors."""
    if not config.tokens:
        raise ValueError("textual_inversion.tokens: none; valid: at least one, as in "
                         "textual_inversion.tokens=[{token: <cat>, init: cat}]")
    base = load_base(config, context)
    few = Few(config, base, context)
    for token in config.tokens:
        check_captions(few.captions, token.token, "textual_inversion.tokens")
    card = Card(base.hash, {token.token: token.init for token in config.tokens}, tuple(few.captions), {
        "method": "textual inversion", "base": base.name, "images": len(few), "steps": config.train.steps})
    judge_captions("textual_inversion", config, card, context)
    torch.manual_seed(context.seed)
    vectors = Vectors([first_vectors(token, base) for token in config.tokens])
    extend_vocabulary(base.system, {token.token: rows.detach() for token, rows in zip(config.tokens, vectors.words)})
    average = teach("textual_inversion", config, base, few, ByVectors(base, vectors.to(context.device)), context)
    if context.processes.main:
        path = context.run.path / "embedding.safetensors"
        write_embeddings(path, {token.token: rows for token, rows in zip(config.tokens, average.words)}, card)
        print(f"textual_inversion: {path.stat().st_size / 1e3:.1f} kB; sample with: python sample.py {base.flags} "
              f"--embedding {path} \"a drawing of {config.tokens[0].token}\"")
