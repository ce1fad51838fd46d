"""The features of a set of images as statistics, which fit into memory and into a file that says how they were made.

Axis letters: N vectors, D width, G groups.
"""
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.features.resize import check_images
from eval.frechet import Moments, frechet_distance, frechet_of_vectors
from eval.interval import Estimate, estimate_from_error, jackknife
from files.whole import whole_file

GROUPS = 8  # of the jackknife; each of them costs one more Frechet distance
WAITING = 1024  # vectors that are added to the moments at once
KEPT = 10_000  # vectors kept of a set for the distances that need them: 51 MB at width 1280


class Extractor(Protocol):
    """Something that turns images (B, 3, H, W) in [-1, 1] into vectors (B, width); ``stamp`` says how."""

    width: int
    stamp: str

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, width)."""
        ...


class FeatureSet:
    """The moments of all vectors of a set, in G groups that take vectors in turn, and the first ``kept`` vectors.

    Memory is that of G matrices (D, D) in fp64 and of the kept vectors, however many vectors there are.
    """

    def __init__(self, width: int, kept: int = KEPT, groups: int = GROUPS):
        self.width, self.kept, self.count = width, kept, 0
        self._groups = [Moments(width) for _ in range(groups)]
        self._vectors: list[Tensor] = []
        self._waiting: list[Tensor] = []  # not yet in the groups: an update costs as much for few as for many

    @property
    def vectors(self) -> Tensor:
        """The first vectors, at most ``kept``, as (N, D) in fp32."""
        return torch.cat(self._vectors) if self._vectors else torch.zeros(0, self.width)

    @property
    def groups(self) -> list[Moments]:
        """The moments of each group: group g has the vectors whose number is g modulo G."""
        if self._waiting:
            vectors = torch.cat(self._waiting)
            first = self.count - len(vectors)
            for group, moments in enumerate(self._groups):
                moments.update(vectors[(group - first) % len(self._groups)::len(self._groups)])
            self._waiting = []
        return self._groups

    def update(self, vectors: Tensor) -> "FeatureSet":
        """Add vectors (N, D); returns itself. Raises ValueError for another width or a value that is not finite."""
        vectors = vectors.detach().float().cpu()
        if vectors.ndim != 2 or vectors.shape[1] != self.width or not torch.isfinite(vectors).all():
            raise ValueError(f"vectors: {tuple(vectors.shape)}, {int((~torch.isfinite(vectors)).sum())} values not "
                             f"finite; valid: (N, {self.width}), all finite")
        if self.count < self.kept:
            self._vectors.append(vectors[:self.kept - self.count])
        self._waiting.append(vectors)
        self.count += len(vectors)
        if sum(map(len, self._waiting)) >= WAITING:
            self.groups
        return self

    def moments(self, without: int | None = None) -> Moments:
        """The moments of all vectors, or of all but those of the group ``without``."""
        total = Moments(self.width)
        for group, moments in enumerate(self.groups):
            if group != without:
                total.merge(moments)
        return total

    def save(self, path: str | Path, stamp: dict[str, Any]) -> None:
        """Write the set as safetensors, whole or not at all, with a ``stamp`` that says how it was made."""
        tensors = {"vectors": self.vectors}
        if self.count > self.kept:  # otherwise the moments follow from the vectors
            tensors |= {"counts": torch.tensor([m.count for m in self.groups]),
                        "means": torch.stack([m.mean for m in self.groups]),
                        "scatters": torch.stack([m.scatter for m in self.groups])}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"stamp": json.dumps(stamp, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, stamp: dict[str, Any]) -> "FeatureSet":
        """Read a set. Raises ValueError for a damaged file, and for entries of ``stamp`` that differ from those of the
        file: features of another extractor, resizing or data cannot be compared."""
        try:
            with safe_open(path, framework="pt") as file:
                theirs = json.loads((file.metadata() or {})["stamp"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            vectors = tensors["vectors"]
            if vectors.ndim != 2 or "counts" in tensors and not {"means", "scatters"} <= set(tensors):
                raise ValueError(f"vectors {tuple(vectors.shape)}, {', '.join(sorted(tensors))}")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path} is no statistics file, or damaged: {reason}") from None
        wrong = [f"{key}: {theirs.get(key)!r} there, {value!r} here" for key, value in stamp.items()
                 if theirs.get(key) != value]
        if wrong:
            raise ValueError(f"{path} was made otherwise ({'; '.join(wrong)}); valid: the same for both sets")
        if "counts" not in tensors:
            return cls(vectors.shape[1], max(KEPT, len(vectors))).update(vectors)  # all that were kept
        found = cls(vectors.shape[1], len(vectors), len(tensors["counts"]))
        found._vectors, found.count = [vectors], int(tensors["counts"].sum())
        for moments, count, mean, scatter in zip(found._groups, tensors["counts"].tolist(), tensors["means"],
                                                 tensors["scatters"]):
            moments.count, moments.mean, moments.scatter = count, mean.clone(), scatter.clone()
        return found


def features_of(batches: Iterable[Tensor], extractor: Extractor, kept: int = KEPT) -> FeatureSet:
    """The statistics of images that arrive in batches (B, 3, H, W) in [-1, 1]. Raises ValueError for other images."""
    found = FeatureSet(extractor.width, kept)
    for images in batches:
        check_images(images)
        found.update(extractor(images))
    return found


def cached_features(folder: str | Path, data: str, batches: Callable[[], Iterable[Tensor]],
                    extractor: Extractor, kept: int = KEPT) -> FeatureSet:
    """The same as `features_of`, read from a file in ``folder`` where there is one, else computed and written to it.

    The file is named after the hash of ``data``, which says which images they are and how many vectors are ``kept``,
    and of the extractor's stamp, which says its weights and its resizing. A damaged file is made again.
    """
    stamp = {"data": data, "extractor": extractor.stamp}
    name = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}.safetensors"
    if path.is_file():
        try:
            return FeatureSet.load(path, stamp)
        except ValueError as error:
            print(f"warning: {error}; made again")
    found = features_of(batches(), extractor, kept)
    found.save(path, stamp)
    return found


def frechet_estimate(generated: FeatureSet, real: FeatureSet) -> tuple[Estimate, Estimate]:
    """(Frechet distance, the same without its bias of order 1/N), each with an interval for new images of both sets.

    One group of each set is left out in turn (`jackknife`). The first interval lies around a biased value and covers
    what a repetition with as many images would give. The second is for infinitely many images and only as good as the
    straight line in 1/N, which needs several times more images than features. Raises ValueError for sets of different
    widths, and for sets smaller than twice the number of groups.
    """
    if generated.width != real.width:
        raise ValueError(f"width: {generated.width} and {real.width}; valid: the same extractor for both sets")
    groups = len(generated._groups)
    if min(generated.count, real.count) < 2 * groups or groups != len(real._groups):
        raise ValueError(f"{generated.count} generated and {real.count} real images; valid: from {2 * groups} up")
    value, *left_out = [_distance(generated, real, group) for group in (None, *range(groups))]
    unbiased, error = jackknife(value, left_out)
    note = f"jackknife over {groups} groups"
    at_count = estimate_from_error(value, error, note, groups - 1)
    return (Estimate(value, max(0.0, at_count.low), at_count.high, note),
            estimate_from_error(unbiased, error, note, groups - 1))


def _distance(generated: FeatureSet, real: FeatureSet, without: int | None) -> float:
    """The Frechet distance of two sets, each without one of its groups; None leaves none out."""
    if max(generated.count, real.count) >= generated.width or not all(
            found.count == len(found.vectors) for found in (generated, real)):
        return frechet_distance(generated.moments(without), real.moments(without))
    kept = [found.vectors[torch.arange(found.count) % len(found._groups) != without] if without is not None
            else found.vectors for found in (generated, real)]
    return frechet_of_vectors(*kept)  # fewer vectors than their width: much faster, the same number
