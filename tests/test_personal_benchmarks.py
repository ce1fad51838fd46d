"""What the measurements of personalization are made of: folders to teach from, kinds told apart, ranks of a subject."""
from pathlib import Path

import numpy as np
import pytest
import torch
from emoji_packages import SIZE, icon_sets
from PIL import Image
from torch.distributions import MultivariateNormal

import benchmarks.personal_subject as subject
from benchmarks.personal_scores import TAUGHT, Kinds, chroma
from benchmarks.personal_sets import write_style, write_subject
from data.emoji.emoji import Emoji, EmojiConfig

pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def source(root) -> Emoji:
    return Emoji(EmojiConfig(root=str(root), size=SIZE, scenes=0.0), "train")


def names_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


def test_no_name_to_compare_with_is_trained_on(source, tmp_path):
    """real and tuning share no name with the others; all holds what is taught, too; no name is held out."""
    taught = sorted({item["name"] for row, item in enumerate(source.items)
                     if item["group"] == "animals & nature" and source.held_out.get(row) == ""})[:3]
    write_style(source, icon_sets("noto")[0], tmp_path, taught, 20, 5)
    found = {name: names_in(tmp_path / name) for name in ("taught", "all", "real", "tuning")}
    assert found["taught"] == set(taught) and len(found["real"]) == 20 and len(found["tuning"]) == 5
    assert found["taught"] < found["all"]
    assert not (found["all"] & found["real"] or found["all"] & found["tuning"] or found["real"] & found["tuning"])
    held = {source.items[row]["name"] for row, why in source.held_out.items() if why == "name"}
    assert held and not held & set.union(*found.values())
    texts = [(tmp_path / "taught" / f"{name}.txt").read_text().strip() for name in taught]
    assert all(text.endswith(", sks style") for text in texts)
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert set(prompts) == {(tmp_path / "real" / f"{name}.txt").read_text().strip() for name in found["real"]}
    with pytest.raises(ValueError, match="no such-name in it"):
        write_style(source, icon_sets("noto")[0], tmp_path, ["such-name"])


def test_the_subject_is_drawn_as_the_data_set_has_it(source, tmp_path):
    write_subject(source, tmp_path, "red-apple")
    assert names_in(tmp_path) == {f"red-apple-{style}" for style in ("noto", "twemoji", "openmoji", "fluent")}
    image = np.asarray(Image.open(tmp_path / "red-apple-noto.png"))
    rgba = source.rgba(source.row_of["noto/red-apple"])
    assert (image[0, 0] == 255).all() and (image[SIZE // 2, SIZE // 2] == rgba[:3, SIZE // 2, SIZE // 2]).all()


def test_kinds_are_told_apart_as_gaussians_of_one_covariance():
    """The probabilities equal Bayes' rule with the densities themselves."""
    random = torch.Generator().manual_seed(0)
    names = ["a", "b", TAUGHT]
    kinds = names * 60
    shift = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 2, 0], [0, 3, 0, 1]])
    x = torch.randn(180, 4, generator=random) * torch.tensor([1.0, 2, 0.5, 1]) + shift.repeat(60, 1)
    found = Kinds(x, kinds, ridge=0.0)
    labels = torch.arange(180) % 3
    means = torch.stack([x[labels == k].double().mean(dim=0) for k in range(3)])
    rest = x.double() - means[labels]
    density = torch.stack([MultivariateNormal(mean, rest.T @ rest / 180).log_prob(x.double()) for mean in means], dim=1)
    torch.testing.assert_close(found.chances(x), density.softmax(dim=1))
    right = np.mean([one == other for one, other in zip(found(x), kinds)])
    assert 0.8 < right < 1
    assert Kinds(x[:6], kinds[:6])(x[:6]) == kinds[:6]  # fewer than dimensions would need without the ridge


def test_chroma_of_grey_is_nothing_and_of_red_that_of_the_tables():
    """L a b of the red of sRGB: 53.24, 80.09, 67.20 (Lindbloom)."""
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0] = 120
    images[1, 0] = 255
    assert chroma(images) == pytest.approx([0, np.hypot(80.09, 67.20)], abs=0.05)


class Pixels:
    """Stands for an evaluator: its vectors are the pixels, less their mean."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        return torch.nn.functional.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)


def test_the_subject_is_found_in_what_shows_it_and_not_in_what_does_not(source, monkeypatch):
    monkeypatch.setattr(subject, "PARTNERS", ("gold-box", "navy-fox"))
    monkeypatch.setattr(subject, "NAMES", 10)
    found = subject.promises(source, "red-apple")
    assert len(found) == 5 * 5 + 5 * 4 and found[0].prompt == "a red apple on a pink background, noto style"
    assert any(" to the left of a gold box on " in promise.prompt for promise in found)
    render = subject.Renderings(source)
    pair = [["red-apple", *([promise.partner] if promise.partner else [])] for promise in found]
    shown = torch.stack([render(promise, names) for promise, names in zip(found, pair)])
    assert subject.ranks(Pixels(), render, found, shown, "red-apple", False) == [0] * len(found)
    with_partner = [i for i, promise in enumerate(found) if promise.partner]
    turned = torch.stack([render(found[i], ["red-apple", render.others(found[i].style, pair[i], 9)[3]])
                          for i in with_partner])
    assert min(subject.ranks(Pixels(), render, [found[i] for i in with_partner], turned, "red-apple", True)) > 0
