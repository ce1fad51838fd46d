"""A run goes on with the data that it began with, or by permission with other data, which the manifest then tells."""
import copy
import json
import os
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from small_runs import at_step, terminate

import train
from data.catalog import DataConfig, data_identity
from data.emoji.emoji import EmojiConfig
from data.images.folder import FolderConfig
from data.images.shards import ShardsConfig
from data.images.torchvision_sets import CocoConfig
from data.shapes import shapes
from data.shapes.shapes import ShapesConfig
from data.write_shards import main as write_shards
from files.config import ConfigError
from files.run_folder import RunFolder
from training.experiment import load_experiment
from training.loop import Interrupted
from training.same_data import data_change


def image_folder(root, count=40):
    root.mkdir()
    for number in range(count):
        Image.new("RGB", (32, 32), (6 * number, 0, 0)).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"number {number} of a test")
    return root


def content(source, **settings):
    return data_identity(DataConfig(source=source, **{source: settings[source]}))[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny):
    """The tiny system on a folder, all of it but the folder."""
    data = copy.deepcopy(tiny)
    data["denoiser"]["images"] = None
    data["autoencoder"]["train"]["steps"] = 4
    for stage in ("autoencoder", "denoiser"):
        data[stage]["train"] |= {"validate_every": 100, "preview_every": 100}
    path = tmp_path_factory.mktemp("config") / "folder.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def command(config, root, run, *more):
    data = "data={source: folder, folder: {root: %s, size: 32, validation: 0.2}}" % root
    train.main([str(config), f"run={run}", data, *more])


@pytest.fixture(scope="module")
def stopped_once(config, tmp_path_factory):
    """A run on a folder that was stopped inside the denoiser: (folder, run)."""
    base = tmp_path_factory.mktemp("stopped")
    root = image_folder(base / "images")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 9, terminate)
        with pytest.raises(Interrupted):
            command(config, root, base / "run")
    return root, base / "run"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """Copies of both, which keep all times; the folder is moved under its old name for the test."""
    root, run = stopped_once
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(root, tmp_path / "kept", copy_function=shutil.copy2)
    yield root, tmp_path / "run"
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "kept", root, copy_function=shutil.copy2)


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def change_caption(root):
    (root / "07.txt").write_text("quite another text")


def remove_images(root):
    for number in range(5):
        (root / f"{number:02d}.png").unlink()


def change_pixels(root):
    Image.new("RGB", (32, 32), "blue").save(root / "11.png")


def add_image(root):
    shutil.copy(root / "11.png", root / "more.png")
    (root / "more.txt").write_text("one more")


def add_table(root):
    (root / "captions.csv").write_text("file,caption\n00.png,from a table\n")


@pytest.mark.parametrize("change", [
    change_caption, remove_images, *(pytest.param(change, marks=pytest.mark.slow)
                                     for change in (change_pixels, add_image, add_table))])
def test_a_run_does_not_go_on_with_other_data_unless_it_is_told(stopped, config, change, capsys):
    root, run = stopped
    before = manifest(run)
    change(root)
    with pytest.raises(ConfigError, match="the data is not what this run began with .content [0-9a-f]{12} then, "
                                          "[0-9a-f]{12} now; .*--changed-data"):
        command(config, root, run)
    assert manifest(run) == before
    command(config, root, run, "--changed-data")
    after = manifest(run)
    assert "goes on in the stage denoiser" in capsys.readouterr().out
    assert [entry["stage"] for entry in after["data_changes"]] == ["denoiser"]
    assert after["data_changes"][0]["from"] == before["data_fingerprint"] != after["data_fingerprint"]
    assert after["data_changes"][0]["to"] == after["data_fingerprint"] and (run / "denoiser.safetensors").exists()
    assert data_change(load_experiment(run / "config.yaml").data, RunFolder(run)) == ""


def test_times_alone_are_no_change_and_a_finished_run_keeps_what_it_knows(stopped, config, capsys):
    root, run = stopped
    for path in root.glob("*.png"):
        os.utime(path)
    before = manifest(run)
    command(config, root, run)
    assert manifest(run)["data_fingerprint"]["content"] == before["data_fingerprint"]["content"]
    before = manifest(run)
    change_caption(root)
    capsys.readouterr()
    command(config, root, run)  # nothing is left to train
    assert "nothing is left to train on it" in capsys.readouterr().out
    after = manifest(run)
    assert {key: after[key] for key in ("data", "data_sha256", "data_fingerprint")} == {
        key: before[key] for key in ("data", "data_sha256", "data_fingerprint")} and "data_changes" not in after


def test_a_run_of_an_earlier_version_goes_on_and_is_given_a_fingerprint(stopped, config, capsys):
    root, run = stopped
    known = manifest(run)
    del known["data_fingerprint"]
    (run / "manifest.json").write_text(json.dumps(known))
    command(config, root, run)
    assert "has no fingerprint of the data yet; it is recorded from now on\n" in capsys.readouterr().out
    assert len(manifest(run)["data_fingerprint"]["content"]) == 64 and (run / "denoiser.safetensors").exists()
    known = manifest(run)
    del known["data_fingerprint"]
    (run / "manifest.json").write_text(json.dumps(known))
    capsys.readouterr()
    command(config, root, run)  # a finished one: nobody knows that it was this data
    assert "fingerprint" not in capsys.readouterr().out and "data_fingerprint" not in manifest(run)


@pytest.mark.slow
def test_check_says_it(stopped, config, capsys):
    root, run = stopped
    change_caption(root)
    with pytest.raises(SystemExit):
        command(config, root, run, "--check")
    assert "data: NOT what this run began with (content" in capsys.readouterr().out


# ---- fingerprints

def test_a_folder_and_shards(tmp_path):
    root = image_folder(tmp_path / "images", 9)
    first = content("folder", folder=FolderConfig(root=str(root)))
    moved = shutil.copytree(root, tmp_path / "moved", copy_function=shutil.copyfile)
    second = content("folder", folder=FolderConfig(root=str(moved)))
    assert second.content == first.content and second.files != first.files and second.matches(first)
    (moved / "03.txt").write_text("another")
    third = content("folder", folder=FolderConfig(root=str(moved)))
    assert third.content != first.content and third.files != second.files and not third.matches(first)
    write_shards([str(root), str(tmp_path / "shards"), "--shard-size", "4"])
    one = content("shards", shards=ShardsConfig(root=str(tmp_path / "shards")))
    (tmp_path / "shards" / "index.json").unlink()
    (tmp_path / "shards" / ".plan.json").unlink()
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    assert not one.matches(content("shards", shards=ShardsConfig(root=str(tmp_path / "shards"))))


def test_sets_whose_images_are_not_hashed(tmp_path):
    for part, numbers in (("train2017", range(4)), ("val2017", range(4, 8))):
        (tmp_path / part).mkdir()
        for number in numbers:
            Image.new("RGB", (16, 16)).save(tmp_path / part / f"{number}.jpg")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"captions_{part}.json").write_text(json.dumps({
            "images": [{"id": n, "file_name": f"{n}.jpg", "height": 16, "width": 16} for n in numbers],
            "annotations": [{"image_id": n, "caption": f"number {n}"} for n in numbers]}))
    coco = CocoConfig(root=str(tmp_path))
    first = content("coco_captions", coco_captions=coco)
    assert first == content("coco_captions", coco_captions=coco)
    (tmp_path / "val2017" / "5.jpg").unlink()
    assert not first.matches(content("coco_captions", coco_captions=coco))


def test_drawn_images_and_built_ones(root, tmp_path, monkeypatch):
    settings = ShapesConfig(size=16, train=40, validation=4, test=4)
    first = content("shapes", shapes=settings)
    assert first == content("shapes", shapes=settings) and first.files == "" and len(first.content) == 64
    drawn = shapes.render

    def darker(*arguments, **more):
        return drawn(*arguments, **more) // 2

    monkeypatch.setattr(shapes, "render", darker)
    assert not first.matches(content("shapes", shapes=settings))
    copied = shutil.copytree(root, tmp_path / "emoji")
    emoji = EmojiConfig(root=str(copied), size=np.load(root / "images.npy", mmap_mode="r").shape[-1])
    one = content("emoji", emoji=emoji)
    assert one.matches(content("emoji", emoji=EmojiConfig(root=str(root), size=emoji.size)))
    array = np.load(copied / "images.npy", mmap_mode="r+")
    array[0, :, :2] ^= 255  # which no size tells, and the manifest of the folder does not either
    array.flush()
    assert not one.matches(content("emoji", emoji=emoji))
