"""Near-duplicate images: perceptual hashes, and a comparison of the colours of images whose hashes agree.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1).
It takes the discrete cosine transform of the luminance at 32 x 32 and has one bit for each of the 8 x 8 lowest
frequencies except the constant: whether the coefficient is above their median. It survives resizing, compression and
small changes of brightness; mirrored, rotated or cropped images have other hashes. It ignores colour, so two images
count as near-duplicates only if small versions of both also agree. Axis letters: N images, P pairs.
"""
import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
SMALL = 16  # side of the small versions, whose colours are compared
_ONES = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit hash of an RGB image; the bit of the constant is 0."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey, type=2, norm="ortho")[:8, :8].ravel()  # (64,)
    # coefficients that are 0 in exact arithmetic must not be decided by rounding: plain images would differ at random
    low[np.abs(low) < 1e-6] = 0
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def small_version(image: Image.Image) -> np.ndarray:
    """Colours at 16 x 16, uint8 (16, 16, 3)."""
    return np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BOX))


def distance(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Number of bits in which two arrays of uint64 hashes differ, elementwise."""
    different = np.bitwise_xor(one, two)
    return _ONES[different[..., None].view(np.uint8)].sum(axis=-1)


def near_pairs(hashes: np.ndarray, small: np.ndarray, most: int = 3, colours: float = 8.0,
               limit: int = 100_000) -> np.ndarray:
    """Pairs (P, 2) of images, first below second, whose hashes (N,) uint64 differ in at most ``most`` bits and whose
    small versions (N, 16, 16, 3) differ by at most ``colours`` of 255 on average; at most ``limit`` pairs.

    The search is exact: of most + 1 parts of a hash, at least one is equal in every such pair (the pigeonhole
    principle), so it suffices to compare images that share a part.
    """
    edges = np.linspace(0, BITS, most + 2).astype(int)
    found: set[tuple[int, int]] = set()
    for low, high in zip(edges, edges[1:]):
        part = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.r_[True, part[order][1:] != part[order][:-1]])
        for group in np.split(order, starts[1:]):
            for place, first in enumerate(group[:-1]):
                others = group[place + 1:]
                others = others[distance(hashes[others], hashes[first]) <= most]
                if len(others):
                    gap = np.abs(small[others].astype(np.int16) - small[first]).mean(axis=(1, 2, 3))
                    found |= {(min(int(first), int(other)), max(int(first), int(other)))
                              for other in others[gap <= colours]}
                if len(found) >= limit:
                    return np.array(sorted(found)[:limit], dtype=np.int64)
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)


def near_groups(pairs: np.ndarray, count: int) -> list[list[int]]:
    """The connected groups of ``count`` images under the pairs (P, 2), largest first, without single images."""
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for index in np.unique(pairs).tolist():
        groups.setdefault(int(labels[index]), []).append(index)
    return sorted(groups.values(), key=lambda group: (-len(group), group))
