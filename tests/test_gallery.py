"""The gallery of an emoji run: prompts that nobody chooses, and verdicts that belong to some weights."""
import pytest
import torch
import yaml
from emoji_packages import emoji_folder

from benchmarks.figures import gallery
from data.emoji.emoji import EmojiConfig


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    root = emoji_folder(tmp_path_factory.mktemp("emoji") / "data", 32)
    return gallery.chosen(EmojiConfig(root=str(root), size=32))


def test_every_group_shows_what_it_says(groups):
    names = [*gallery.GROUPS, gallery.HELD_OUT, gallery.UNSEEN, gallery.COUNT, gallery.RELATION]
    assert list(groups) == [name for name in names if name in groups] and {"objects", gallery.HELD_OUT} <= set(groups)
    assert all(len(items) <= gallery.EACH for items in groups.values()) and len(groups["objects"]) == gallery.EACH
    assert len(groups[gallery.COUNT]) == gallery.EACH and all(" and " in prompt or any(
        word in prompt for word in ("two ", "three ")) for prompt, _ in groups[gallery.COUNT])
    assert all(any(word in prompt for word in ("above", "below", "left of", "right of", "from left to right"))
               for prompt, _ in groups[gallery.RELATION])
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for items in groups.values()
               for _, image in items)


def test_verdicts_are_counted_and_belong_to_the_weights_they_were_given_for(groups, tmp_path):
    count = sum(map(len, groups.values()))
    samples = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    assert gallery.verdicts_of(tmp_path / "verdicts.yaml", "abc", count) == ("",) * count
    assert gallery.sections_of(groups, samples, ("",) * count, tmp_path)[0][0] == next(iter(groups))
    said = ["good"] * (count - 2) + ["wrong", "acceptable"]
    (tmp_path / "verdicts.yaml").write_text(yaml.safe_dump({"weights": "abc", "verdicts": said}))
    found = gallery.verdicts_of(tmp_path / "verdicts.yaml", "abc", count)
    heading, html = gallery.sections_of(groups, samples, found, tmp_path)[0]
    assert heading == "What a person says" and f"<td>all</td><td>{count - 2}</td><td>1</td><td>1</td>" in html
    for weights, number in (("abd", count), ("abc", count + 1)):
        with pytest.raises(ValueError, match=f"valid: {number} on"):
            gallery.verdicts_of(tmp_path / "verdicts.yaml", weights, number)
    (tmp_path / "verdicts.yaml").write_text(yaml.safe_dump({"weights": "abc", "verdicts": ["fine"]}))
    with pytest.raises(ValueError, match="fine; valid: good, acceptable, wrong"):
        gallery.verdicts_of(tmp_path / "verdicts.yaml", "abc", 1)
