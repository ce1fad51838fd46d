"""A CLIP as two functions that map images and captions to unit vectors of one space."""
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.clip_tokenizer import ClipTokenizer
from data.tokenizer import Tokenizer
from files.config import from_dict
from files.weights import CheckpointError, load_weights
from files.whole import sha256_of
from model.clip import Clip, ClipConfig
from model.device import freeze, place_on
from model.pretrained.folder import read_clip_folder
from model.text_encoder import trim_padding


class ClipVectors:
    """Maps images and captions to unit vectors of one space (B, E), in fp32; ``stamp`` identifies the network."""

    def __init__(self, clip: Clip, tokenizer: Tokenizer | ClipTokenizer, stamp: str):
        self.clip, self.tokenizer, self.stamp = freeze(clip), tokenizer, stamp
        self.width, self.regions = clip.config.width, clip.config.regions
        self.device = next(clip.parameters()).device

    @classmethod
    def of_run(cls, folder: str | Path, device: torch.device | str = "cpu") -> "ClipVectors":
        """The evaluator that the clip stage left in a run folder; raises CheckpointError if there is none."""
        weights, words = Path(folder) / "clip.safetensors", Path(folder) / "clip_tokenizer.json"
        for path in (weights, words):
            if not path.is_file():
                raise CheckpointError(f"no file {path}; train the stage clip of this run")
        try:
            with safe_open(weights, framework="pt") as file:
                config = from_dict(ClipConfig, json.loads(file.metadata()["model"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{weights} is damaged, or not of the stage clip: {error}") from None
        clip = Clip(config)
        load_weights(clip, weights)
        return cls(place_on(clip, device), Tokenizer.load(words),
                   f"CLIP of the stage clip (sha256 {sha256_of(weights)[:16]}), {config.image.size} px, cubic "
                   "antialiased")

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> "ClipVectors":
        """Read a folder of a transformers CLIPModel with its tokenizer; raises ValueError naming what does not fit."""
        clip = read_clip_folder(path)
        tokenizer = ClipTokenizer.load(Path(path), clip.config.text.length)
        files = sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("*.bin"))
        return cls(place_on(clip, device), tokenizer,
                   f"CLIP {Path(path).name} (sha256 {sha256_of(files[0])[:16]}), {clip.config.image.size} px, cubic "
                   "antialiased")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of images (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.clip.image_vectors(self.clip.resize_images(part.to(self.device).float()))
                              for part in images.split(64)])

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """Unit vectors (B, N, E) of the patches of images (B, 3, H, W) in [-1, 1], of a network with regions."""
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.clip.patch_vectors(self.clip.resize_images(part.to(self.device).float()))
                              for part in images.split(64)])

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of captions."""
        return self._vectors(self.clip.text_vectors, captions)

    @torch.no_grad()
    def parts(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of texts that name one thing, to be compared with patches, of a network with regions."""
        return self._vectors(self.clip.part_vectors, captions)

    def _vectors(self, encode: Callable[[Tensor, Tensor], Tensor], captions: Sequence[str]) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            ids, mask = trim_padding(*self.tokenizer.encode(list(captions)))
            return torch.cat([encode(i.to(self.device), m.to(self.device))
                              for i, m in zip(ids.split(256), mask.split(256))])
