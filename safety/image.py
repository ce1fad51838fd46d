"""Checks images against written concepts by the embeddings of a CLIP, which is passed in as two functions.

score = max over concepts, and over the parts of an image that have an embedding of their own, of
        cos(part, concept) - max over allowed neighbours of cos(part, neighbour) - threshold
where a concept is the mean of the embeddings of several phrasings (Radford et al. 2021, section 3.1.4, ensembles of
prompts). Without neighbours the second term is 0. The parts are the patches of a CLIP that was trained with regions,
whose maximum finds one thing among others, or else the whole image and five crops. Concepts are edited in a YAML file
without any training. Axis letters: B images, V parts of each, C concepts, D width of an embedding.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from einops import rearrange

from files.config import ConfigError, read_yaml
from files.whole import write_text
from safety.policy import ACTIONS, CATEGORIES, Action, Decision, Mode, action_in_mode, refusal

EmbedImages = Callable[[torch.Tensor], torch.Tensor]  # (B, 3, H, W) in [-1, 1] -> (B, D), or (B, V, D) of regions
EmbedTexts = Callable[[Sequence[str]], torch.Tensor]  # texts -> (N, D)
CROP = 0.7  # side of a crop as a share of the side of the image
VIEWS = 6


@dataclass(frozen=True)
class Concept:
    """Something that images are checked for. ``threshold`` is None before calibration; then all images are refused."""

    name: str
    category: str
    phrasings: tuple[str, ...]
    allowed: tuple[tuple[str, ...], ...] = ()
    action: Action = "block"
    threshold: float | None = None

    def __post_init__(self):
        if self.category not in (*CATEGORIES, "stand_in"):
            raise ValueError(f"{self.name}: category '{self.category}'; valid: {', '.join(CATEGORIES)}, stand_in")
        if not self.phrasings or not all(isinstance(text, str) and text.strip() for text in self.phrasings):
            raise ValueError(f"{self.name}: phrasings: valid: at least one text, none of them empty")
        if not all(neighbour and all(isinstance(text, str) and text.strip() for text in neighbour)
                   for neighbour in self.allowed):
            raise ValueError(f"{self.name}: allowed: valid: lists of phrasings, none of them empty")
        if self.action not in ACTIONS[1:]:
            raise ValueError(f"{self.name}: action '{self.action}'; valid: {', '.join(ACTIONS[1:])}")


def read_concepts(path: str | Path) -> list[Concept]:
    """The concepts of a YAML file; raises ValueError naming the file, the concept, and the valid values."""
    try:
        items = read_yaml(path).get("concepts")
    except ConfigError as error:
        raise ValueError(f"concepts {path}: {error}") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"concepts {path}: valid: a list 'concepts' of mappings")
    try:
        found = [_concept(item) for item in items]
    except (ValueError, TypeError) as error:
        raise ValueError(f"concepts {path}: {error}") from None
    names = [concept.name for concept in found]
    if len(set(names)) < len(names):
        raise ValueError(f"concepts {path}: two have one name; valid: names that differ")
    return found


def _concept(item: Mapping[str, Any]) -> Concept:
    """The concept of an entry of the YAML file; raises ValueError naming what is wrong."""
    valid = {"name", "category", "phrasings", "allowed", "action", "threshold"}
    unknown, missing = set(item) - valid, {"name", "category", "phrasings"} - set(item)
    if unknown or missing:
        raise ValueError(f"{item.get('name', '?')}: unknown {sorted(unknown)}, missing {sorted(missing)}; valid: "
                         f"{', '.join(sorted(valid))}")
    if not isinstance(item["phrasings"], list) or not isinstance(item.get("allowed", []), list):
        raise ValueError(f"{item['name']}: phrasings and allowed are lists")
    threshold = item.get("threshold")
    if threshold is not None and not -2 <= float(threshold) <= 2:
        raise ValueError(f"{item['name']}: threshold {threshold}; valid: -2 to 2, a difference of cosines")
    return Concept(str(item["name"]), item["category"], tuple(item["phrasings"]),
                   tuple(tuple(one) if isinstance(one, list) else (one,) for one in item.get("allowed", [])),
                   item.get("action", "block"), None if threshold is None else float(threshold))


def write_concepts(path: str | Path, concepts: Sequence[Concept]) -> None:
    """Write concepts in the format of ``read_concepts``, whole or not at all."""
    items = [{"name": c.name, "category": c.category, "phrasings": list(c.phrasings),
              "allowed": [list(one) for one in c.allowed], "action": c.action, "threshold": c.threshold}
             for c in concepts]
    write_text(path, yaml.safe_dump({"concepts": items}, sort_keys=False, allow_unicode=True))


def views(images: torch.Tensor) -> torch.Tensor:
    """The images (B, 3, H, W), their four corners and their middle, each at full size: (B, V, 3, H, W)."""
    height, width = images.shape[-2:]
    h, w = max(1, round(height * CROP)), max(1, round(width * CROP))
    corners = [(0, 0), (0, width - w), (height - h, 0), (height - h, width - w), ((height - h) // 2, (width - w) // 2)]
    crops = [F.interpolate(images[..., y:y + h, x:x + w], (height, width), mode="bilinear", antialias=True)
             for y, x in corners]
    return torch.stack([images, *crops], dim=1)


def blur(images: torch.Tensor, cells: int = 8) -> torch.Tensor:
    """Images (B, 3, H, W) blurred to ``cells`` by ``cells`` patches of colour."""
    small = F.interpolate(images.float(), (cells, cells), mode="area")
    return F.interpolate(small, images.shape[-2:], mode="bicubic").clamp(-1, 1).to(images.dtype)


class ImageModerator:
    """Decides on images. The embeddings of the concepts are computed once, from their phrasings.

    ``regions``: ``embed_images`` returns an embedding for each region of an image and not one for the whole.
    """

    def __init__(self, concepts: Sequence[Concept], embed_images: EmbedImages, embed_texts: EmbedTexts,
                 mode: Mode = "block", regions: bool = False):
        if not concepts:
            raise ValueError("concepts: none; valid: at least one")
        self.concepts, self.embed_images, self.mode, self.regions = list(concepts), embed_images, mode, regions
        self._vectors = torch.stack([_mean_direction(embed_texts(c.phrasings)) for c in concepts])  # (C, D)
        self._allowed = [torch.stack([_mean_direction(embed_texts(one)) for one in c.allowed]) if c.allowed else None
                         for c in concepts]
        if not torch.isfinite(self._vectors).all():
            raise ValueError("concepts: the embedding of a phrasing is not finite")

    @torch.inference_mode()
    def margins(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (B, C) before subtraction of the threshold: the maximum over the parts of an image."""
        embedded = self._embed_parts(images)  # (B, V, D)
        scores = embedded @ self._vectors.T.to(embedded)  # (B, V, C)
        for place, allowed in enumerate(self._allowed):
            if allowed is not None:
                scores[..., place] = scores[..., place] - (embedded @ allowed.T.to(embedded)).amax(dim=-1)
        return scores.amax(dim=1)

    def _embed_parts(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, V, D) of the regions of images, or of the views of each; raises for any other shape."""
        if self.regions:
            embedded = self.embed_images(images)
        else:
            crops = rearrange(views(images), "b v c h w -> (b v) c h w")
            embedded = rearrange(self.embed_images(crops), "(b v) d -> b v d", v=VIEWS)
        if embedded.ndim != 3 or len(embedded) != len(images):
            raise ValueError(f"embeddings of {len(images)} images: {tuple(embedded.shape)}; valid: (B, V, D)")
        return F.normalize(embedded.float(), dim=-1)

    def calibrate(self, margins: torch.Tensor, rate: float) -> "list[Concept]":
        """The concepts with thresholds such that at most the share ``rate`` of harmless images, given by their
        ``margins`` (B, C), exceeds any of them."""
        if not 0 < rate < 1 or len(margins) < 1 / rate:
            raise ValueError(f"rate: {rate} of {len(margins)} images; valid: between 0 and 1, at least one image")
        low, high = rate / len(self.concepts), rate
        best = thresholds_of(margins, low)
        for _ in range(20):
            middle = (low + high) / 2
            found = thresholds_of(margins, middle)
            if float((margins > found).any(dim=1).float().mean()) <= rate:
                low, best = middle, found
            else:
                high = middle
        return [replace(concept, threshold=float(value)) for concept, value in zip(self.concepts, best)]

    def check(self, images: torch.Tensor) -> list[Decision]:
        """A decision for each image (B, 3, H, W) in [-1, 1], under the mode; never raises for an image.

        An image that is not finite or has only one colour has failed; it is not unsafe and is refused with that reason.
        """
        failed = [_failure(image) for image in images]
        if any(concept.threshold is None for concept in self.concepts):
            return [refusal("image moderation is not calibrated") for _ in failed]
        try:
            margins = self.margins(torch.nan_to_num(images, nan=0.0, posinf=1.0, neginf=-1.0)).cpu()
        except Exception as error:  # no error may let an image through
            return [refusal(reason or f"image moderation failed ({type(error).__name__})") for reason in failed]
        limits = torch.tensor([concept.threshold for concept in self.concepts])
        return [refusal(reason) if reason else self._decision(row, limits) for row, reason in zip(margins, failed)]

    def _decision(self, row: torch.Tensor, limits: torch.Tensor) -> Decision:
        if not torch.isfinite(row).all():
            return refusal("the score of the image is not a number")
        over = (row - limits).tolist()
        # the most severe concept above its threshold decides, and among equals the one that is farthest above
        place = max(range(len(over)), key=lambda i: (
            ACTIONS.index(self.concepts[i].action) if over[i] > 0 else -1, over[i]))
        concept, score = self.concepts[place], float(row[place])
        action = action_in_mode(concept.action, self.mode, concept.category) if over[place] > 0 else "allow"
        category = concept.category if concept.category in CATEGORIES else ""
        return Decision(action, category, score, float(limits[place]), f"concept {concept.name}",
                        scores={c.name: float(value) for c, value in zip(self.concepts, row)})


def _failure(image: torch.Tensor) -> str:
    """Why the generation of an image has failed, or an empty text."""
    if not torch.isfinite(image).all():
        return "the image failed: it is not finite"
    if float(image.float().amax() - image.float().amin()) < 1e-3:
        return "the image failed: it is of one colour"
    return ""


def _mean_direction(embeddings: torch.Tensor) -> torch.Tensor:
    """The mean (D,) of the directions of embeddings (N, D), of length 1."""
    return F.normalize(F.normalize(embeddings.float(), dim=-1).mean(dim=0), dim=0)  # (D,)


def thresholds_of(margins: torch.Tensor, rate: float) -> torch.Tensor:
    """The margins (C,) that the share ``rate`` of the images exceeds, concept by concept."""
    return torch.quantile(margins.float(), 1 - rate, dim=0, interpolation="higher")  # (C,)
