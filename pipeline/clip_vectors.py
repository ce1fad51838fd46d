"""A CLIP as two functions: images and captions as unit vectors of one space."""
import json
from collections.abc import Sequence
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
from model.device import frozen, placed
from model.pretrained.folder import read_clip_folder
from model.text_encoder import trimmed


class ClipVectors:
    """Pictures and captions as unit vectors of one space (B, E), in fp32; ``stamp`` says by which network."""

    def __init__(self, clip: Clip, tokenizer: Tokenizer | ClipTokenizer, stamp: str):
        self.clip, self.tokenizer, self.stamp = frozen(clip), tokenizer, stamp
        self.width = clip.config.width
        self.device = next(clip.parameters()).device

    @classmethod
    def of_run(cls, folder: str | Path, device: torch.device | str = "cpu") -> "ClipVectors":
        """The evaluator that the clip stage has left in a run folder; raises CheckpointError when it has not."""
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
        return cls(placed(clip, device), Tokenizer.load(words),
                   f"CLIP of the stage clip (sha256 {sha256_of(weights)[:16]}), {config.image.size} px, cubic "
                   "antialiased")

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> "ClipVectors":
        """A folder of transformers' CLIPModel with its tokenizer; raises ValueError naming what does not fit."""
        clip = read_clip_folder(path)
        tokenizer = ClipTokenizer.load(Path(path), clip.config.text.length)
        files = sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("*.bin"))
        return cls(placed(clip, device), tokenizer,
                   f"CLIP {Path(path).name} (sha256 {sha256_of(files[0])[:16]}), {clip.config.image.size} px, cubic "
                   "antialiased")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, E)."""
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.clip.image_vectors(self.clip.resized(part.to(self.device).float()))
                              for part in images.split(64)])

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, E)."""
        with torch.autocast(self.device.type, enabled=False):
            ids, mask = trimmed(*self.tokenizer.encode(list(captions)))
            return torch.cat([self.clip.text_vectors(i.to(self.device), m.to(self.device))
                              for i, m in zip(ids.split(256), mask.split(256))])
