"""The emoji source and its scenes: splits, compositing, and images that show what their captions say."""

import io
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emoji_packages import SHAPES, SIZE, items_of
from PIL import Image
from scipy import ndimage

from data.emoji import build as emoji_build
from data.emoji.build import PACKAGES, render
from data.emoji.emoji import SPLITS, STYLES, Emoji, EmojiConfig, assign_splits, rows_with_tones
from data.emoji.phrasings import named_spans
from data.emoji.scenes import COLOURS, MOODS, canvas, contrasting_colours, in_mood, over, resize, scene_image

resvg_py = pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def config(root):
    return EmojiConfig(root=str(root), size=SIZE, tones=2, held_out_scenes=30, scenes=0.4)


@pytest.fixture(scope="module")
def sources(config):
    return {split: Emoji(config, split) for split in SPLITS}


def test_a_damaged_folder_is_refused(root, tmp_path):
    def copy(name: str) -> Path:
        there = tmp_path / name
        there.mkdir()
        for file in root.iterdir():
            os.link(file, there / file.name)
        return there

    def refused(folder: Path, size: int = SIZE) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            Emoji(EmojiConfig(root=str(folder), size=size))
        assert "python -m data.emoji --out" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "holds no emoji data set" in refused(tmp_path / "nothing")
    assert f"size: 64, but {root} holds images of {SIZE} pixels" in refused(root, 64)
    for name, content in (("images.npy", (root / "images.npy").read_bytes()[:-5000]), ("images.npy", b""),
                          ("items.jsonl", (root / "items.jsonl").read_bytes()[:-300]), ("manifest.json", b"{")):
        folder = copy(f"damaged-{name}-{len(content)}")
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        assert "damaged" in refused(folder)


def same(a: dict, b: dict) -> bool:
    rest_a, rest_b = ({key: value for key, value in item.items() if key != "image"} for item in (a, b))
    return torch.equal(a["image"], b["image"]) and rest_a == rest_b


def test_items_are_a_function_of_the_index(config, sources):
    for split, source in sources.items():
        source[0]  # maps the array
        again = pickle.loads(pickle.dumps(source))  # what a worker process gets
        assert len(pickle.dumps(source)) < 2_000_000  # not the array
        for index in range(0, len(source), 7):
            item = source[index]
            assert item["image"].shape == (3, SIZE, SIZE) and item["image"].dtype == torch.uint8
            assert item["captions"] == source.captions(index) and item["caption"] == item["captions"][0]
            assert len(set(item["captions"])) >= 4
            assert same(item, again[index])
        assert same(source[-1], source[len(source) - 1])
        with pytest.raises(IndexError):
            source[len(source)]
    train = sources["train"]
    ids = [train[index]["id"] for index in range(len(train))]
    assert len(set(ids)) == len(ids)
    other = Emoji(replace(config, seed=1), "train")
    assert [item for item in map(other.locate, range(50))] == [item for item in map(train.locate, range(50))]
    scenes = [index for index in range(len(train)) if train.locate(index)[0] is None]
    assert len(scenes) / len(train) == pytest.approx(0.4, abs=0.01)
    assert sum(train.locate(index)[0] is None for index in range(100)) in (39, 40, 41)  # evenly spread
    assert sum(train[index]["scene"] == other[index]["scene"] for index in scenes) < len(scenes) / 20


def test_variants_of_an_emoji_differ_in_the_background_and_bring_more_scenes(config, sources):
    many = Emoji(replace(config, variants=3, backgrounds=0.5), "train")
    assert len(many) == pytest.approx(3 * len(sources["train"]), abs=2)
    assert len(Emoji(replace(config, variants=3), "validation")) == len(sources["validation"])
    found: dict[int, list[str]] = {}
    for index in range(len(many)):
        row, variant = many.locate(index)
        if row is not None:
            assert variant == len(found.setdefault(row, []))
            found[row].append(many.background(row, variant))
            image = many[index]["image"]
            colour = torch.tensor(COLOURS[found[row][-1]], dtype=torch.uint8)
            assert torch.equal(image[:, 0, 0], colour) and found[row][-1] in (many.captions(index)[0] + " white")
    assert set(map(len, found.values())) == {3} and found.keys() == set(sources["train"].rows)
    assert len({tuple(colours) for colours in found.values()}) > 10  # drawn anew, not repeated
    scenes = [many.locate(index)[1] for index in range(len(many)) if many.locate(index)[0] is None]
    assert scenes == list(range(len(scenes)))


def test_places_say_where_the_words_of_a_caption_are_drawn(sources):
    source = sources["train"]
    for index in range(len(source)):
        scene = source[index]["scene"]
        for number, caption in enumerate(source.captions(index)):
            places = source.places(index, caption)
            if scene is None:
                assert places or number == 4  # tags name nothing
                assert all(place[2:] == (0.5, 0.5, 0.5) for place in places)
                continue
            assert [place[2:] for place in places] == [(*thing["centre"], thing["size"] / 2)
                                                       for thing in scene["objects"]]
            for (begin, end, *_), thing in zip(places, scene["objects"]):
                label = source.items[source.row_of[thing["id"]]]["label"]
                assert caption[begin:end].startswith(label[:3]) and (not begin or caption[begin - 1] == " ")


def test_nouns_are_found_whole():
    caption = "a cat face above a cat and a cat below a dog"
    assert named_spans(caption, ["cat", "cat face", "dog", "og"]) == [(19, 22), (2, 10), (41, 44), None]


def test_splits_are_disjoint_and_keep_their_promise(sources):
    pairs = {split: {(source.items[row]["name"], source.items[row]["style"]) for row in source.rows}
             for split, source in sources.items()}
    assert len(set().union(*pairs.values())) == sum(len(found) for found in pairs.values())
    test = sources["test"]
    held = {"pair": set(), "name": set()}
    for row in test.rows:
        held[test.held_out[row]].add(test.items[row]["name"])
    trained = {name for name, _ in pairs["train"]}
    assert held["pair"] and held["name"]
    assert held["pair"] <= trained  # known from other styles
    assert not held["name"] & trained and not held["name"] & {name for name, _ in pairs["validation"]}
    for scene in (test.scene(number) for number in range(30)):
        first, *others = [(thing["name"], thing["style"]) for thing in scene["objects"]]
        assert first in pairs["test"] and all(other in pairs["train"] or other == first for other in others)
    for split in ("train", "validation"):
        source = sources[split]
        for scene in (source.scene(number) for number in range(source._scenes)):
            assert all((thing["name"], thing["style"]) in pairs["train"] for thing in scene["objects"])


def test_split_shares_and_families():
    """On many names the shares are those that are stated; tones and mirrored drawings go with their name."""
    items = [{"name": f"thing-{k}{end}", "base": f"thing-{k}", "style": style} for k in range(1500)
             for end in ("", "-dark-skin-tone", "-facing-right") for style in STYLES]
    places = assign_splits(items)
    share = {place: places.count(place) / len(places) for place in set(places)}
    assert share["test", "name"] == pytest.approx(0.02, abs=0.008)
    assert share["test", "pair"] == pytest.approx(0.05 * 0.98, abs=0.006)
    assert share["validation", ""] == pytest.approx(0.02 * 0.98, abs=0.005)
    of_pair: dict = {}
    for item, place in zip(items, places):
        of_pair.setdefault((item["base"], item["style"]), set()).add(place)
    assert all(len(found) == 1 for found in of_pair.values())
    # A name that one style alone draws cannot be held out as a pair.
    assert ("test", "pair") not in assign_splits([item for item in items if item["style"] == "noto"])


def test_tones_are_kept_alike_in_all_styles(root):
    items = items_of(root)
    for count in (0, 1, 2, 25):
        kept = [items[row] for row in rows_with_tones(items, count)]
        toned = {style: {item["name"] for item in kept if item["tone"] and item["style"] == style} for style in STYLES}
        assert all(len(names) == min(count, 3) for names in toned.values())
        assert len({frozenset(names) for names in toned.values()}) == 1
        assert len([item for item in kept if not item["tone"]]) == len([item for item in items if not item["tone"]])


def test_backgrounds_of_single_emoji_are_the_ones_named(config):
    source = Emoji(replace(config, backgrounds=0.5, scenes=0), "train")
    named = 0
    for item in (source[index] for index in range(len(source))):
        found = re.search(r" on an? ([a-z ]+) background, ", item["caption"])
        colour = found.group(1) if found else "white"
        named += found is not None
        assert item["scene"] is None and tuple(item["image"][:, 0, 0].tolist()) == COLOURS[colour]
        assert (f"{colour} background" in item["captions"][1]) == (colour != "white")
    assert named / len(source) == pytest.approx(0.5, abs=0.08)


def test_share_of_scenes_and_configuration_errors(config):
    assert len(Emoji(replace(config, scenes=0.0), "test")) == len(Emoji(replace(config, scenes=0.0), "test").rows)
    only = Emoji(replace(config, scenes=1.0), "train")
    assert all(only.locate(index)[0] is None for index in range(len(only))) and len(only) > 0
    for field, value in (("styles", ("noto", "ascii")), ("styles", ()), ("styles", ("noto", "noto")), ("scenes", 1.5),
                         ("backgrounds", -0.1), ("size", 0), ("tones", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"^{field}: .*valid: "):
            replace(config, **{field: value})
    with pytest.raises(ValueError, match="split: 'dev'; valid: train, validation, test"):
        Emoji(config, "dev")  # type: ignore[arg-type]
    one = Emoji(replace(config, styles=("flat",)), "train")
    assert {one[index]["style"] for index in range(0, len(one), 5)} == {"flat"}


# ---- scenes

def alone(source: Emoji, scene: dict, k: int) -> np.ndarray:
    """Where object k of a scene is in the image: (S, S) bool, the pixels that differ from the empty background."""
    one = {**scene, "objects": [scene["objects"][k]]}
    image = scene_image(one, lambda name: source.rgba(source.row_of[name]), SIZE)
    return (image != canvas(scene["background"], SIZE)).any(axis=0)


def test_relations_hold_in_the_pixels(sources):
    train, seen = sources["train"], set()
    for number in range(train._scenes):
        scene = train.scene(number)
        masks = [alone(train, scene, k) for k in range(len(scene["objects"]))]
        assert sum(mask.astype(int) for mask in masks).max() <= 1  # things do not overlap
        boxes = [np.argwhere(mask) for mask in masks]
        centres = [((box.min(axis=0) + box.max(axis=0) + 1) / 2)[::-1] / SIZE for box in boxes]  # (x, y)
        for thing, centre in zip(scene["objects"], centres):
            assert np.abs(centre - thing["centre"]).max() < 0.05
        for subject, kind, target in scene["relations"]:
            seen.add((len(masks), kind))
            x, y = centres[subject] - centres[target]
            along, across = {"above": (-y, x), "below": (y, x), "left of": (-x, y), "right of": (x, y)}[kind]
            assert along > 0.3 and abs(across) < 0.15
    assert seen == {(count, kind) for count in (2, 3) for kind in ("above", "below", "left of", "right of")}


def test_counts_hold_in_the_pixels_and_in_the_caption(sources):
    train, seen = sources["train"], set()
    for number in range(train._scenes):
        scene = train.scene(number)
        if scene["kind"] != "count":
            continue
        image = scene_image(scene, lambda name: train.rgba(train.row_of[name]), SIZE)
        _, blobs = ndimage.label((np.abs(image.astype(int) - canvas(scene["background"], SIZE)) > 8).any(axis=0))
        words = {2: "two", 3: "three"}[blobs]
        assert len(scene["objects"]) == blobs and len({thing["id"] for thing in scene["objects"]}) == 1
        thing = scene["objects"][0]["name"].split("-")
        assert re.search(rf"\b{words} {thing[0]} {thing[1][0]}", train._scene_captions(scene)[0])
        seen.add(blobs)
    assert seen == {2, 3}


def test_scene_images_are_made_of_their_parts(sources):
    """Where nothing stands the background shows; a mood tints the things and keeps the background's named colour."""
    train, moods = sources["train"], set()
    for number in range(60):
        scene = train.scene(number)
        image = scene_image(scene, lambda name: train.rgba(train.row_of[name]), SIZE)
        empty = ~np.any([alone(train, scene, k) for k in range(len(scene["objects"]))], axis=0)
        assert (image[:, empty] == canvas(scene["background"], SIZE)[:, empty]).all()
        assert json.loads(json.dumps(scene)) == scene
        if scene["mood"]:
            assert set(scene["background"]["colours"]) <= set(MOODS[scene["mood"]].colours)
            plain = scene_image({**scene, "mood": ""}, lambda name: train.rgba(train.row_of[name]), SIZE)
            change = (image.astype(float) - plain)[:, ~empty].mean(axis=1)
            assert {"gloomy": change.sum() < 0, "fiery": change[0] > change[2], "cheerful": change.sum() != 0,
                    "calm": change.sum() != 0}[scene["mood"]]
        moods.add(scene["mood"])
    assert moods == {"", *MOODS}


def test_light_stays_within_alpha():
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (16, 16)).astype(np.float32)
    alpha[0] = 0
    colours = (rng.random((3, 16, 16)) * alpha).astype(np.float32)
    for mood in MOODS:
        out = in_mood(colours, alpha / 255, mood)
        assert (out >= 0).all() and (out <= alpha + 1e-3).all() and (out[:, 0] == 0).all()


def test_backgrounds_stand_out_from_things():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mean = rng.uniform(0, 255, 3)
        chosen = contrasting_colours(rng, list(COLOURS), [mean], 2)
        assert np.linalg.norm(np.subtract(*(COLOURS[name] for name in chosen))) >= 90
        assert all(np.linalg.norm(np.array(COLOURS[name]) - mean) >= 90 for name in chosen)
    # None is far enough: the farther one is taken.
    assert contrasting_colours(rng, ["red", "dark red"], [COLOURS["red"]], 1) == ["dark red"]


# ---- compositing

def test_over_is_the_alpha_blend_of_the_renderer():
    """The renderer's own blend onto an opaque background, an independent implementation; at most one level apart."""
    body = '<circle cx="16" cy="16" r="13" fill="#20c040" fill-opacity="0.4"/><rect width="9" height="30" fill="#f08"/>'
    document = emoji_build.svg({"body": body}, {"width": 32, "height": 32})
    png = resvg_py.svg_to_bytes(svg_string=document, width=SIZE, height=SIZE, background="rgb(50, 98, 206)")
    blended = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB")).transpose(2, 0, 1)
    ours = over(render(document, SIZE), canvas({"kind": "plain", "colours": ["blue"]}, SIZE))
    assert COLOURS["blue"] == (50, 98, 206)
    assert np.abs(ours.astype(int) - blended.astype(int)).max() <= 1


def test_over_by_hand():
    image = np.array([100, 50, 0, 128], dtype=np.uint8).reshape(4, 1, 1)  # straight colour 199, 100, 0 at half alpha
    below = np.array([10, 200, 255], dtype=np.uint8).reshape(3, 1, 1)
    by_hand = [100 + 10 * 127 / 255, 50 + 200 * 127 / 255, 255 * 127 / 255]
    assert over(image, below).ravel().tolist() == [round(value) for value in by_hand]
    assert over(np.zeros((4, 1, 1), np.uint8), below).ravel().tolist() == [10, 200, 255]


def test_resizing_brings_in_no_colour_of_what_is_transparent():
    disc = render(emoji_build.svg({"body": SHAPES["noto"].format("#ff0000")}, {"width": 32, "height": 32}), 64)
    for side in (20, 27, 90):
        small = resize(disc, side)
        assert small.shape == (4, side, side)
        assert (small[0] == small[3]).all() and (small[1:3] == 0).all()  # still pure red, times alpha
        assert small[3].mean() / disc[3].mean() == pytest.approx(1, abs=0.01)  # and as much of the square


def test_module_lists_agree():
    assert STYLES == tuple(package.style for package in PACKAGES if package.style)
    assert all(set(mood.colours) <= set(COLOURS) for mood in MOODS.values())
