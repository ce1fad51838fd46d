"""Adapters and learned tokens on a system: put on, scaled, and taken off without a trace.

    personal = Personal(system, adapters=[("style.safetensors", 0.8)], embeddings=["cat.safetensors"])
    system.images(["a <cat> in the style"], seeds=[0])
    personal.remove()                                       # every bit of the base is as it was

Their trigger words and training captions are judged by the moderation, and prompts that contain a learned word are
judged with its description in place of it, too.
"""
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from data.learned_tokens import check_word, with_learned_tokens
from model.device import freeze, place_on
from model.lora import Stack
from model.pretrained.adapters import networks_of, read_adapter
from model.pretrained.card import KEY, Card, card_of, check_base, hash_of_networks
from model.pretrained.embeddings import read_embeddings
from pipeline.moderation import Moderation, reason_text
from pipeline.system import TextToImage

CARD = "dreambooth.json"  # of a run folder whose weights learned from a few images


class Personal:
    """What was put on a system. ``notes`` are lines for people: files whose base is unknown, or another by force.

    Raises FileNotFoundError or ValueError naming what does not fit; the system is then unchanged. ``any_base`` accepts
    files that were trained on another base.
    """

    def __init__(self, system: TextToImage, adapters: Sequence[tuple[str | Path, float]] = (),
                 embeddings: Sequence[str | Path] = (), any_base: bool = False):
        self.system, self.any_base, self.notes = system, any_base, list[str]()
        self.cards: dict[str, Card] = {}
        self._base = system.tokenizer, system.text_encoder.token_embedding
        self.adapters = []
        for path, scale in adapters:
            adapter, card = read_adapter(path, system.unet, system.text_encoder)
            self._accept(Path(path), card)
            self.adapters.append((place_on(adapter, system.device), scale))
        tokens: dict[str, Tensor] = {}
        for path in embeddings:
            found, card = read_embeddings(path, system.text_encoder.config.width)
            described = {**dict.fromkeys(found, ""), **card.triggers}
            self._accept(Path(path), Card(card.base, described, card.captions, card.about))
            for token, vectors in found.items():
                if check_word(token).lower() in {word.lower() for word in tokens}:
                    raise ValueError(f"{path}: the token {token} is in another file, too; valid: each once")
                tokens[token] = vectors
        if system.moderation is not None:
            judge_cards(system.moderation, self.cards)
        self.stack = Stack(networks_of(system.unet, system.text_encoder))
        self.stack.set(self.adapters)
        if tokens:
            extend_vocabulary(system, tokens)
        system.cards = self.cards

    @cached_property
    def base(self) -> str:
        """The hash of the networks before anything was put on them."""
        return hash_of_networks(networks_of(self.system.unet, self.system.text_encoder))

    def _accept(self, path: Path, card: Card) -> None:
        note = check_base(card, self.base if card.base else "", path, self.any_base)
        self.notes += [note] if note else []
        self.cards[str(path)] = card

    def set_scales(self, scales: Sequence[float]) -> None:
        """Use the adapters at these scales, one for each. Raises ValueError for another number of them."""
        if len(scales) != len(self.adapters):
            raise ValueError(f"{len(scales)} scales for {len(self.adapters)} adapters; valid: one for each")
        self.adapters = [(adapter, scale) for (adapter, _), scale in zip(self.adapters, scales)]
        self.stack.set(self.adapters)

    def remove(self) -> None:
        """Take adapters and tokens off: weights, vocabulary and moderation are those of the base again."""
        self.stack.remove()
        self.system.cards = {}
        self.system.tokenizer, self.system.text_encoder.token_embedding = self._base
        if self.system.moderation is not None:
            for word in learned_words(self.cards):
                self.system.moderation.learned.pop(word, None)


def extend_vocabulary(system: TextToImage, tokens: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Give a system words with vectors (n, D) of their own, as new rows of its table of token embeddings; returns the
    rows of each. Tokenizer and table are replaced, and those that the system had are not changed."""
    table = system.text_encoder.token_embedding
    ids, count = {}, table.num_embeddings
    for token, vectors in tokens.items():
        ids[token] = list(range(count, count + len(vectors)))
        count += len(vectors)
    rows = torch.cat([table.weight.detach(), *(vectors.to(table.weight) for vectors in tokens.values())])
    system.text_encoder.token_embedding = freeze(nn.Embedding.from_pretrained(rows))
    system.tokenizer = with_learned_tokens(system.tokenizer, ids)
    return ids


# ---- moderation

def learned_words(cards: Mapping[str, Card]) -> dict[str, str]:
    """The trigger words and tokens of files, with what they stand for: their description, else the captions they were
    learned from."""
    return {word: meaning or ", ".join(card.captions) for card in cards.values()
            for word, meaning in card.triggers.items() if meaning or card.captions}


def judge_cards(moderation: Moderation, cards: Mapping[str, Card]) -> None:
    """Let a moderation judge the trigger words, descriptions and training captions of files, and remember what their
    words stand for. Raises ValueError naming a file that is refused."""
    for path, card in cards.items():
        for text in card.texts:
            decision = moderation.check_prompt([text])
            if decision.action == "block":
                raise ValueError(f"{path} is refused for a trigger word or caption of its training: {decision.message}"
                                 f"{reason_text(decision)}")
    moderation.learned.update(learned_words(cards))


def cards_of_run(folder: str | Path) -> dict[str, Card]:
    """The card of a run folder whose weights learned from a few images, by its path; none of others."""
    path = Path(folder) / CARD
    return {str(path): card_of({KEY: path.read_text(encoding="utf-8")}, path)} if path.is_file() else {}
