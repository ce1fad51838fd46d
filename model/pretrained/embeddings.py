"""Reads and writes learned tokens: vectors that stand for a word in front of the text encoder (Gal et al. 2022).

    learned_embeds.safetensors, .bin   diffusers: {token: (D,) or (n, D)}
    NAME.safetensors                   AUTOMATIC1111 and ComfyUI: {"emb_params": (n, D)}, the token is the file's name
    NAME.pt                            AUTOMATIC1111: {"string_to_param": {"*": (n, D)}, ...}, likewise

Pickles are read with ``weights_only``, which executes nothing.
"""
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from files.whole import whole_file
from model.pretrained.card import Card, card_of, read_header
from model.pretrained.tensors import read_safetensors

SUFFIXES = (".safetensors", ".pt", ".bin")
OF_FILE = ("emb_params", "clip_l", "*")  # keys of vectors whose token is the name of the file


def read_embeddings(path: str | Path, width: int) -> tuple[dict[str, Tensor], Card]:
    """The vectors (n, ``width``) of each token in a file, in fp32, and what the file says about itself.

    Raises FileNotFoundError, and ValueError naming what is damaged, no vector, or of another width.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no embedding {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no embedding; valid: a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        tensors, card = read_safetensors(path), card_of(read_header(path), path)
    else:
        tensors, card = read_pickle(path), Card()
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        token = path.stem if key in OF_FILE else key
        vectors = value.detach().float()
        vectors = vectors[None] if vectors.ndim == 1 else vectors
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
            raise ValueError(f"{path}: {key} is {tuple(value.shape)}; valid: (n, {width}), the width of the text "
                             "encoder")
        if token in found:
            raise ValueError(f"{path}: {key} is a second token of the name {token}; valid: one")
        found[token] = vectors
    if not found:
        raise ValueError(f"{path} holds no vectors; valid: an embedding")
    return found, card


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The vectors of a .pt or .bin by token. Raises ValueError for a file with anything but tensors, numbers and text
    in it."""
    try:
        with torch.serialization.safe_globals([nn.ParameterDict]):  # of the first files; a container of tensors
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what it will not or cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors, which is not executed: {reason}") from None
    table: Any = data.get("string_to_param", data) if isinstance(data, Mapping) else None
    if isinstance(table, nn.ParameterDict):
        table = dict(table._parameters) or dict(table.items())
    if not isinstance(table, Mapping):
        raise ValueError(f"{path} holds no table of vectors; valid: an embedding")
    odd = [str(key) for key, value in table.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{path}: {', '.join(odd)} is no tensor; valid: vectors by token")
    return {str(key): value for key, value in table.items()}


def write_embeddings(path: str | Path, embeddings: Mapping[str, Tensor], card: Card) -> None:
    """Write vectors (n, D) by token, in the layout of diffusers, whole or not at all."""
    tensors = {token: vectors.detach().float().cpu().clone(memory_format=torch.contiguous_format)  # none share memory
               for token, vectors in embeddings.items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=card.header())
        os.chmod(temporary, 0o644)  # the library writes 0600
