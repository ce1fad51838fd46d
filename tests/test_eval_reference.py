"""Statistics of a set: the Frechet distance of pytorch-fid and torch-fidelity, its interval, files and their stamps."""
import numpy as np
import pytest
import torch
from PIL import Image

from eval.features.reference import KEPT, FeatureSet, _distance, cached_features, features_of, frechet_estimate
from eval.frechet import Moments, frechet_distance, frechet_of_vectors
from eval.image_folder import hash_of_files, image_file_batches, image_files
from eval.interval import bootstrap_mean, bootstrap_share, estimate_from_error, jackknife
from scoring.judges import folder_reference


class Colours:
    """An extractor of four numbers an image."""

    width, stamp = 4, "mean colour and spread, 8 px"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.flatten(1).std(dim=1, keepdim=True)], dim=1)


def draw(count: int, width: int = 24, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) @ mixing + shift


def gathered(vectors: torch.Tensor, batch: int = 33, **options) -> FeatureSet:
    found = FeatureSet(vectors.shape[1], **options)
    for part in vectors.split(batch):
        found.update(part)
    return found


# ---- Frechet distance

@pytest.mark.parametrize("count, width", [(300, 48), (60, 96)])
def test_frechet_is_that_of_the_reference_implementations(count, width):
    """More and fewer vectors than their width: 1e-3 relative, from the same features."""
    fid = pytest.importorskip("pytorch_fid.fid_score")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = (draw(count, width, seed, shift).clamp(min=0) for seed, shift in ((0, 0.0), (1, 0.2)))
    found = frechet_distance(gathered(x).moments(), gathered(y).moments())
    theirs = fidelity.fid_statistics_to_metric(fidelity.fid_features_to_statistics(x.double()),
                                               fidelity.fid_features_to_statistics(y.double()), False)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    arrays = [v.double().numpy() for v in (x, y)]
    statistics = [part for v in arrays for part in (v.mean(0), np.cov(v, rowvar=False))]
    assert found == pytest.approx(float(fid.calculate_frechet_distance(*statistics)), rel=1e-3)


@pytest.mark.parametrize("count", [16, 64, 500])
def test_a_set_and_itself_are_nothing_apart(count):
    """N < D and N > D."""
    x = gathered(draw(count, 64))
    at_count, _ = frechet_estimate(x, gathered(draw(count, 64), batch=7))
    assert at_count.value < 1e-3 and at_count.low == 0.0


@pytest.mark.parametrize("count", [40, 200])
def test_vectors_and_moments_give_the_same_distance(count, monkeypatch):
    """The shortcut for fewer vectors than their width against the general way, whole and with a group left out."""
    x, y = gathered(draw(count, 64)), gathered(draw(count - 3, 64, seed=1, shift=0.3))
    expected = [frechet_distance(x.moments(g), y.moments(g)) for g in (None, 0, 5)]
    assert [_distance(x, y, g) for g in (None, 0, 5)] == pytest.approx(expected, rel=1e-9)
    assert frechet_of_vectors(x.vectors, y.vectors) == pytest.approx(expected[0], rel=1e-9)
    with pytest.raises(ValueError, match=r"vectors: \(1, 64\)"):
        frechet_of_vectors(x.vectors[:1], y.vectors)


def test_groups_together_are_the_whole_whatever_the_batches():
    x = draw(101)
    whole = Moments(24).update(x)
    for batch in (1, 7, 101):
        found = gathered(x, batch, kept=40)
        torch.testing.assert_close(found.moments().covariance, whole.covariance, rtol=1e-10, atol=1e-14)
        assert torch.equal(found.vectors, x[:40]) and found.count == 101
        expected = Moments(24).update(x[[i for i in range(101) if i % 8 != 3]])
        torch.testing.assert_close(found.moments(without=3).covariance, expected.covariance, rtol=1e-10, atol=1e-14)


def test_the_bias_of_few_images_is_taken_out_and_the_interval_is_that_of_repetitions():
    """Gaussians with a known distance of 8 * 0.5^2 = 2: at 100 vectors the plain value is too large by its bias, the
    other is right on average, and its 95 % interval holds the truth in most of 60 repetitions."""
    plain, unbiased, held = [], [], 0
    for i in range(60):
        x, y = (torch.randn(100, 8, generator=torch.Generator().manual_seed(2 * i + j)) + 0.5 * j for j in (0, 1))
        one, two = frechet_estimate(gathered(x), gathered(y))
        plain.append(one.value)
        unbiased.append(two.value)
        held += two.low <= 2.0 <= two.high
    error = np.std(unbiased) / 60**0.5
    assert np.mean(plain) > 2.0 + 5 * error
    assert abs(np.mean(unbiased) - 2.0) < 3 * error
    assert 52 <= held <= 60


# ---- intervals

def test_intervals_of_what_is_known():
    found = estimate_from_error(1.0, 0.5)
    assert (found.low, found.high) == pytest.approx((0.02, 1.98), abs=1e-3)
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_mean(values)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 3.92 == pytest.approx(values.std() / 20, rel=0.1)
    # of a mean, the jackknife has no bias to take out and the textbook's error
    left_out = [np.delete(values[:50], i).mean() for i in range(50)]
    value, error = jackknife(values[:50].mean(), left_out)
    assert value == pytest.approx(values[:50].mean()) and error == pytest.approx(values[:50].std(ddof=1) / 50**0.5)
    for hits, low, high in (([0] * 100, 0, 0.0362), ([1] * 100, 0.9638, 1)):  # Clopper and Pearson's tables
        found = bootstrap_share(hits)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert bootstrap_share([0, 1] * 50) == bootstrap_mean([0, 1] * 50)
    with pytest.raises(ValueError, match="3 of which 1 are not finite"):
        bootstrap_mean([1.0, float("nan"), 2.0])
    with pytest.raises(ValueError, match="left_out: 1 groups"):
        jackknife(1.0, [1.0])


# ---- the cache

def test_a_reference_is_read_back_and_made_again_when_it_is_damaged(tmp_path, capsys):
    calls = []

    def batches() -> list[torch.Tensor]:
        calls.append(1)
        return list((torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1).split(16))

    first = cached_features(tmp_path, "data 1", batches, Colours())
    again = cached_features(tmp_path, "data 1", batches, Colours())
    assert len(calls) == 1 and torch.equal(first.vectors, again.vectors) and again.count == 40
    assert frechet_estimate(first, again)[0].value < 1e-9
    cached_features(tmp_path, "data 2", batches, Colours())
    other = Colours()
    other.stamp = "mean colour and spread, 16 px"
    cached_features(tmp_path, "data 1", batches, other)
    assert len(calls) == 3  # other data and another resize are other files
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-5])
    cached_features(tmp_path, "data 1", batches, Colours())
    assert len(calls) == 4 and "damaged" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * 3


@pytest.mark.parametrize("kept", [100, 30])
def test_a_file_holds_the_whole_set(tmp_path, kept, monkeypatch):
    """All vectors kept, or moments of more than are kept; taken in one by one, or many at once."""
    monkeypatch.setattr("eval.features.reference.WAITING", 20)
    first = gathered(draw(77), 9, kept=kept)
    first.save(tmp_path / "a.safetensors", {})
    again = FeatureSet.load(tmp_path / "a.safetensors", {})
    assert again.count == 77 and torch.equal(again.vectors, draw(77)[:kept])
    for group in (None, 5):
        torch.testing.assert_close(again.moments(group).covariance, first.moments(group).covariance, rtol=1e-9,
                                   atol=1e-12)


def test_a_set_of_more_than_is_kept_by_default_is_read_back_whole(tmp_path):
    """Copies are looked for among every vector, in the second run as in the first."""
    count = KEPT + 50
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, again = (cached_features(tmp_path, "data", lambda: images.split(2048), Colours(), kept=count)
                    for _ in range(2))
    assert len(first.vectors) == count and torch.equal(first.vectors, again.vectors)


def test_a_reference_of_another_extractor_is_refused(tmp_path):
    gathered(draw(20)).save(tmp_path / "a.safetensors", {"extractor": "InceptionV3", "data": "x"})
    with pytest.raises(ValueError, match="was made otherwise \\(extractor: 'InceptionV3' there, 'other' here\\)"):
        FeatureSet.load(tmp_path / "a.safetensors", {"extractor": "other"})
    assert FeatureSet.load(tmp_path / "a.safetensors", {"extractor": "InceptionV3"}).count == 20
    (tmp_path / "b.safetensors").write_text("no")
    with pytest.raises(ValueError, match="b.safetensors is no statistics file, or damaged"):
        FeatureSet.load(tmp_path / "b.safetensors", {})
    with pytest.raises(ValueError, match="width: 24 and 4; valid: the same extractor"):
        frechet_estimate(gathered(draw(20)), gathered(draw(20, 4)))
    with pytest.raises(ValueError, match="15 generated and 20 real images; valid: from 16 up"):
        frechet_estimate(gathered(draw(15)), gathered(draw(20)))


# ---- images that cannot be measured

def write(path, mode: str = "RGB", size: tuple[int, int] = (8, 8), colour=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_a_folder_of_images_is_read_in_order(tmp_path):
    for number in range(5):
        write(tmp_path / "in" / f"{number}.png", colour=(51 * number, 0, 255))
    write(tmp_path / "in" / "opaque.png", "RGBA", colour=(1, 2, 3, 255))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    files = image_files(tmp_path)
    images = torch.cat(list(image_file_batches(files, batch=4)))
    assert images.shape == (6, 3, 8, 8)
    torch.testing.assert_close(images[:5, 0, 0, 0], torch.linspace(-1, 0.6, 5))
    assert features_of(image_file_batches(files), Colours()).count == 6
    before = hash_of_files(files)
    write(files[0], colour=(9, 9, 9))
    assert hash_of_files(files) != before


def test_what_a_folder_of_real_images_leaves_out_is_named(tmp_path, monkeypatch, capsys):
    """Files of other kinds by their ending, and the images after the most that are compared with."""
    monkeypatch.setattr("scoring.judges.REFERENCE", 16)
    for number in range(18):
        write(tmp_path / f"{number:02d}.png")
    for name in ("notes.txt", "a.HEIC", "b.heic", "LICENSE"):
        (tmp_path / name).write_text("no image")
    reference = folder_reference(str(tmp_path), torch.Size([8, 8]), 10_000)
    assert reference.about == f"16 images of {tmp_path.name}"
    assert capsys.readouterr().err == (
        f"left out of --reference {tmp_path}: 2 files that end in .heic (a.HEIC, ...); 2 images after the first 16 "
        "(16.png, ...); 1 files that end in .txt (notes.txt); 1 files without an ending (LICENSE)\n")


@pytest.mark.parametrize("fault, line", [
    (lambda d: write(d / "b.png", size=(16, 8)), "1 of 3 are not 8x8 as the first (first: b.png)"),
    (lambda d: write(d / "b.png", "L"), "1 of 3 are not RGB but grey (first: b.png)"),
    (lambda d: write(d / "b.png", "RGBA", colour=(0, 0, 0, 100)), "1 of 3 are transparent (first: b.png)"),
    (lambda d: (d / "b.png").write_bytes(b"\x89PNG broken"), "1 of 3 cannot be read (first: b.png)"),
    (lambda d: [path.unlink() for path in d.iterdir()], "no images; valid: a folder of .png"),
], ids=["mixed", "grey", "transparent", "damaged", "empty"])
def test_images_that_cannot_be_compared_get_one_line(tmp_path, fault, line):
    write(tmp_path / "a.png")
    write(tmp_path / "c.png")
    fault(tmp_path)
    with pytest.raises(ValueError) as error:
        image_files(tmp_path)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_images_that_are_not_numbers_get_one_line():
    images = torch.zeros(4, 3, 8, 8)
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 4 hold NaN or infinity, the first is number 2"):
        features_of([images], Colours())
