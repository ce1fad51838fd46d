"""Figures move the right way: what spoils images, drops modes or copies is caught by the figure that is meant for it.

Scenes of shapes and the packaged features. Wrong captions: tests/test_eval_clip_score.py and _clip_stage.py.
"""
import pytest
import torch

from benchmarks.metrics import add_noise, blur, compress_jpeg, feature_set, parts
from data.shapes.shapes import Shapes, ShapesConfig
from eval.features.efficientnet import Features
from eval.features.reference import frechet_estimate
from eval.kernel import kid
from eval.memorization import memorization, nearest, pixel_vectors
from eval.prdc import prdc

COUNT = 40


@pytest.fixture(scope="module")
def sets() -> dict[str, torch.Tensor]:
    """Features of real images, of others, and of the same spoilt."""
    features, source = Features(), Shapes(ShapesConfig(size=48, train=400), "train")
    reference, real = (torch.cat(list(parts(source, first, first + COUNT))) for first in (0, COUNT))
    dark = [i for i in range(100, 400) if source.scene(i)["background"] == "black"][:COUNT]
    images = {"reference": reference, "real": real, "blur": blur(real), "noise": add_noise(real),
              "JPEG": compress_jpeg(real, 30),
              "dark": torch.stack([source[i]["image"] for i in dark]).float() / 127.5 - 1,
              "copies": reference[:10]}
    return {name: features(images) for name, images in images.items()}


@pytest.mark.parametrize("spoilt", ["blur", "noise", "JPEG"])
def test_spoilt_images_are_farther_in_both_distances(sets, spoilt):
    """The intervals of the spoilt and of the real ones do not touch."""
    real, worse = (kid(sets[name], sets["reference"]) for name in ("real", spoilt))
    assert real.low < 0 < real.high and worse.low > real.high
    real, worse = (frechet_estimate(feature_set(sets[name]), feature_set(sets["reference"]))[0]
                   for name in ("real", spoilt))
    assert worse.low > real.high


def test_dropped_modes_are_caught_by_coverage_and_not_by_precision(sets):
    """Black backgrounds alone: each sample is a real image, most kinds of images are missing."""
    real, dark = (prdc(sets[name], sets["reference"]) for name in ("real", "dark"))
    assert dark.coverage.high < real.coverage.low
    assert dark.precision.high >= real.precision.low


def test_a_memorizing_sampler_is_caught_by_near_copies_and_praised_by_the_rest(sets):
    """Nothing but the search for copies says that training images are no samples."""
    held_out = nearest(sets["real"], [sets["reference"]])
    copies = memorization(nearest(sets["copies"], [sets["reference"]]), held_out)
    assert copies.near.value == 1.0 and copies.nearer.value == 1.0
    assert prdc(sets["copies"], sets["reference"]).precision.value == 1.0
    assert kid(sets["copies"], sets["reference"]).low < kid(sets["blur"], sets["reference"]).low


def test_copies_with_noise_are_caught_in_pixels():
    """Noise of two levels of 255 moves features farther than to another image; it hardly moves pixels."""
    source = Shapes(ShapesConfig(size=48, train=80), "train")
    reference, real = (torch.cat(list(parts(source, first, first + COUNT))) for first in (0, COUNT))
    training, held_out, copies = map(pixel_vectors, (reference, real, add_noise(reference, 2.0)))
    ours, theirs = (nearest(x, [training]) for x in (copies, held_out))
    assert memorization(ours, theirs).near.value == 1.0 and ours.distance.median() < 3 < theirs.distance.median()
