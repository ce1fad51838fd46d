"""What a file of learned weights says about itself: the base it was trained on, its trigger words and its captions.

The header of a safetensors file holds text by name. Here it holds one JSON object under the name "card". Of other
programs' files the tags and the trigger phrase are read, because they are what a moderation can judge.
"""
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

KEY = "card"


@dataclass(frozen=True)
class Card:
    """``base`` is the hash of the networks that it was trained on (`hash_of_networks`), None if it does not say so.
    ``triggers`` maps words that call up what was learned to a description of it. ``captions`` are those of its training
    images. ``about`` is free: the method, its settings, the versions."""

    base: str | None = None
    triggers: dict[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """Everything in words that a moderation has to judge, each once. Triggers stand in a sentence, as in a prompt:
        to a classifier of sentences a made-up word alone means nothing."""
        words = [f"an image of {word}" for word in self.triggers]
        return list(dict.fromkeys(text for text in (*words, *self.triggers.values(), *self.captions) if text.strip()))

    def header(self) -> dict[str, str]:
        """The card as the header of a safetensors file. It is the only entry, because the library writes several in an
        order that changes from call to call, and the same training is to leave the same bytes."""
        return {KEY: json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)}


def read_header(path: Path) -> dict[str, str]:
    """The text in the header of a safetensors file; raises ValueError for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


def card_of(header: Mapping[str, str], path: Path) -> Card:
    """The card in a header, from our own entry or from those that kohya's and Stability's programs write. Raises
    ValueError for an entry that is damaged."""
    try:
        if KEY in header:
            data = json.loads(header[KEY])
            return Card(data.get("base"), {str(word): str(text) for word, text in data.get("triggers", {}).items()},
                        tuple(map(str, data.get("captions", ()))), dict(data.get("about", {})))
        tags = json.loads(header.get("ss_tag_frequency") or "{}")  # {folder: {tag or caption: how often}}
        captions = tuple(dict.fromkeys(str(tag).strip() for folder in tags.values() for tag in folder))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: its header is damaged: {error}") from None
    phrase = header.get("modelspec.trigger_phrase", "").strip()
    return Card(None, {phrase: phrase} if phrase else {}, captions)


@torch.no_grad()
def hash_of_networks(networks: Mapping[str, nn.Module]) -> str:
    """SHA-256 over the names, shapes and values of all weights. It is the same whatever file they came from."""
    digest = hashlib.sha256()
    for name, network in sorted(networks.items()):
        for key, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_base(card: Card, networks_hash: str, path: Path, forced: bool) -> str | None:
    """Raise ValueError if the card names another base, unless that is ``forced``. Returns a line to show if the base
    is another or is not known, else None."""
    if card.base is None:
        return f"{path} does not say which base it was trained on; it is used on this one"
    if card.base == networks_hash:
        return None
    line = f"{path} was trained on another base ({card.base[:16]}, this one is {networks_hash[:16]})"
    if not forced:
        raise ValueError(f"{line}; valid: its own base, or --any-base")
    return line
