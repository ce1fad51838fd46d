"""Pictures that are nearly the same: perceptual hashes, and a look at the colours of those whose hashes agree.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1):
luminance at 32 x 32, its discrete cosine transform, of the 8 x 8 lowest frequencies beside the constant one bit each,
whether it is above their median. It survives another size, compression and small changes of light; mirrored, turned or
cropped pictures have other hashes. It does not see colour, so two pictures count as nearly the same only where small
versions of both also agree. Axis letters: N pictures.
"""
import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
SMALL = 16  # side of the colour versions
_ONES = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit hash of an RGB picture; the bit of the constant is 0."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey, type=2, norm="ortho")[:8, :8].ravel()  # (64,)
    # what is 0 in exact arithmetic must not be decided by rounding: plain pictures would differ at random
    low[np.abs(low) < 1e-6] = 0
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def small_version(image: Image.Image) -> np.ndarray:
    """Colours at 16 x 16, uint8 (16, 16, 3)."""
    return np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BOX))


def distance(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Number of bits in which hashes uint64 differ, elementwise."""
    different = np.bitwise_xor(one, two)
    return _ONES[different[..., None].view(np.uint8)].sum(axis=-1)


def near_pairs(hashes: np.ndarray, small: np.ndarray, most: int = 3, colours: float = 8.0,
               limit: int = 100_000) -> np.ndarray:
    """Pairs (P, 2) of pictures, first below second, whose hashes (N,) uint64 differ in at most ``most`` bits and whose
    small versions (N, 16, 16, 3) differ by at most ``colours`` of 255 on average; at most ``limit`` pairs.

    Exact: of most + 1 parts of a hash, one is equal in every such pair (the pigeonhole principle), so only pictures
    that share a part are compared.
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
    """Groups of the ``count`` pictures that pairs connect, largest first."""
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for index in np.unique(pairs).tolist():
        groups.setdefault(int(labels[index]), []).append(index)
    return sorted(groups.values(), key=lambda group: (-len(group), group))
