"""The same bytes again: exact arithmetic, metadata, and images that are drawn again and compared."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from sample_calls import PROMPT, draw, given_images, parameters, pixels

import sample
from pipeline.loading import load_run
from pipeline.system import TextToImage
from sampling.request import request_of, settings_of


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return load_run(tiny_run)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    return given_images(tmp_path_factory.mktemp("given"))


def test_exact_bytes_do_not_depend_on_the_batch(tiny_run, tmp_path, system, monkeypatch):
    """64 images at batch 1, 7 and 64. The network is called with one image and its unconditional twin."""
    prompts = [f"{count} {colour} {kind}" for count in ("a", "two") for colour in ("red", "blue", "green", "pink")
               for kind in ("star", "moon", "circle", "square")]
    sizes, forward = set(), type(system.unet).forward
    monkeypatch.setattr(type(system.unet), "forward", lambda self, x, *rest, **named: sizes.add(len(x)) or forward(
        self, x, *rest, **named))
    made = []
    for batch in ("1", "7", "64"):
        files = draw(tiny_run, tmp_path / batch, *prompts, "--n", "2", "--steps", "2", "--batch", batch, "--exact")
        made.append({name: path.read_bytes() for name, path in files.items()})
    assert len(made[0]) == 65 and made[0] == made[1] == made[2] and sizes == {2}
    name = "00041_two-blue-star_seed41.png"
    alone = draw(tiny_run, tmp_path / "alone", "two blue star", "--seed", "41", "--steps", "2", "--exact")
    assert alone["00000_two-blue-star_seed41.png"].read_bytes() == made[0][name]  # nor on the place
    assert parameters(tmp_path / "7" / name)["exact"] == {"threads": torch.get_num_threads()}


def test_no_metadata_leaves_nothing(tiny_run, tmp_path):
    files = draw(tiny_run, tmp_path, PROMPT, "--no-metadata", "--frames", "2", "--attention")
    for name, path in files.items():
        if name.endswith(".png"):
            data, kinds = path.read_bytes()[8:], []
            while data:
                length, kind = int.from_bytes(data[:4], "big"), data[4:8]
                kinds.append(kind)
                data = data[12 + length:]
            assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}, name
        assert b"red star" not in path.read_bytes()
    assert sample.main(["--run", str(tiny_run), "--verify", str(files["00000_a-small-red-star_seed0.png"])]) == 1


KINDS = {
    "plain": [PROMPT, "--negative", "[blue]", "--sampler", "ddpm"],
    "exact": [PROMPT, "a moon", "--exact", "--seed", "3"],
    "image to image": [PROMPT, "--init", "INIT", "--strength", "0.7"],
    "inpainting": [PROMPT, "--init", "INIT", "--mask", "MASK"],
    "inversion": [PROMPT, "--invert", "INIT"],
    "interpolation": [PROMPT, "a moon", "--interpolate", "2", "--batch", "1"],
    "large": ["(a star:1.2) (" + "a moon, " * 12 + ")", "--size", "48x32", "--chunks", "3", "--tiled"],
    "literal": ["a (star", "--literal"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_verified(tiny_run, tmp_path, given, kind, capsys):
    flags = [given.get(flag, flag) for flag in KINDS[kind]]
    if kind == "large":
        flags = [flag for flag in flags if flag != "--init"]
    files = draw(tiny_run, tmp_path, *flags)
    paths = [str(path) for name, path in files.items() if name != "grid.png"]
    named = [part for flag in ("--init", "--mask", "--invert") if flag in flags
             for part in (flag, flags[flags.index(flag) + 1])]
    capsys.readouterr()
    assert sample.main(["--run", str(tiny_run), *named, "--verify", *paths]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: equal, {Path(path).stat().st_size} bytes" for path in paths]
    settings = parameters(Path(paths[-1]))
    request = request_of(settings)
    assert settings_of(request).items() <= settings.items()
    if named:
        assert sample.main(["--run", str(tiny_run), "--verify", paths[0]]) == 1
        assert "was made from the image 'INIT.png'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def image(tiny_run, tmp_path_factory) -> Path:
    return draw(tiny_run, tmp_path_factory.mktemp("one"), PROMPT)["00000_a-small-red-star_seed0.png"]


def verify(tiny_run, path: Path, capsys, *flags: str) -> tuple[int, str]:
    """(exit code, what was said)."""
    capsys.readouterr()
    code = sample.main(["--run", str(tiny_run), *flags, "--verify", str(path)])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) + len(said.err.splitlines()) == 1
    return code, said.out + said.err


def rewritten(image: Path, path: Path, settings: dict | None = None, change=lambda pixels: None) -> Path:
    """The image with other settings or pixels, as a sound PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", json.dumps(settings or parameters(image), ensure_ascii=False, sort_keys=True))
    values = pixels(image).astype(np.uint8)
    change(values)
    Image.fromarray(values).save(path, pnginfo=info)
    return path


def test_a_changed_byte_is_found(tiny_run, tmp_path, image, capsys):
    data = image.read_bytes()
    for place in (*range(0, len(data), 97), len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "changed.png").write_bytes(changed)
        code, said = verify(tiny_run, tmp_path / "changed.png", capsys)
        assert code == 1 and "changed.png" in said, place
    (tmp_path / "longer.png").write_bytes(data + b"\0")
    assert verify(tiny_run, tmp_path / "longer.png", capsys)[0] == 1
    assert verify(tiny_run, image, capsys)[0] == 0


def test_a_changed_pixel_or_setting_is_found(tiny_run, tmp_path, image, capsys):
    def one_level(values):
        values[3, 4, 1] ^= 1

    assert verify(tiny_run, rewritten(image, tmp_path / "same.png"), capsys)[0] == 0
    code, said = verify(tiny_run, rewritten(image, tmp_path / "a.png", change=one_level), capsys)
    assert code == 1 and "not equal, 1 of 3072 values differ, by up to 1 of 255" in said
    settings = parameters(image)
    code, said = verify(tiny_run, rewritten(image, tmp_path / "b.png", {**settings, "seed": 1}), capsys)
    assert code == 1 and "values differ" in said
    changed = {**settings, "options": {**settings["options"], "eta": 0}}
    code, said = verify(tiny_run, rewritten(image, tmp_path / "c.png", changed), capsys)
    assert code == 1 and "the pixels are but not the file" in said  # 0 in place of 0.0


@pytest.mark.parametrize("flags", [
    [], ["--sampler", "heun"], ["--sampler", "euler_ancestral"], ["--set", "eta=0.5"],
    ["--sampler", "unipc", "--set", "order=3"]])
def test_images_of_older_versions_are_verified(tiny_run, tmp_path, capsys, flags):
    """They hold three options for every sampler; a change of one is found as one of any other setting."""
    made = draw(tiny_run, tmp_path, PROMPT, *flags)["00000_a-small-red-star_seed0.png"]
    settings = parameters(made)
    chosen = dict(text.split("=") for text in flags if "=" in text)
    del settings["options"]
    settings |= {"eta": float(chosen.get("eta", 0.0)), "order": int(chosen.get("order", 2)), "clean_end": True}
    code, said = verify(tiny_run, rewritten(made, tmp_path / "older.png", settings), capsys)
    assert code == 0 and ": equal, " in said
    code, said = verify(tiny_run, rewritten(made, tmp_path / "seed.png", {**settings, "seed": 1}), capsys)
    assert code == 1 and "values differ" in said
    code, said = verify(tiny_run, rewritten(made, tmp_path / "int.png", {**settings, "clean_end": 1}), capsys)
    assert code == 1
    del settings["order"]
    code, said = verify(tiny_run, rewritten(made, tmp_path / "part.png", settings), capsys)
    assert code == 1 and "missing key 'order'" in said


def test_images_of_versions_with_fewer_options_are_verified(tiny_run, tmp_path, capsys):
    made = draw(tiny_run, tmp_path, PROMPT, "--sampler", "unipc")["00000_a-small-red-star_seed0.png"]
    settings = parameters(made)
    assert len(settings["options"]) > 1
    settings["options"] = {"order": 2}
    assert verify(tiny_run, rewritten(made, tmp_path / "fewer.png", settings), capsys)[0] == 0
    assert verify(tiny_run, rewritten(made, tmp_path / "seed.png", {**settings, "seed": 1}), capsys)[0] == 1


@pytest.mark.parametrize("change, message", [
    ({"options": {"eta": 0.5, "order": 2}}, "options.order: the sampler ddim has no such option"),
    ({"options": {"eta": "much"}}, "options.eta: value 'much'; valid: 0 .. 1"),
    ({"weights": {"denoiser": "0" * 16}}, "was made with other weights than those in"),
    ({"steps": "many"}, "steps: got 'many'; valid: a whole number"), ({"steps": None}, "steps"),
    ({"seed": -1}, "seed: value -1"),
    ({"size": 3}, "size"), ({"size": "33"}, "33x33; valid: multiples of"), ({"exact": {"threads": 0}}, "threads"),
    ({"chunks": 10**9}, "chunks: value 1000000000"), ({"refinements": 10**9}, "refinements"), ({"colour": 1}, "colour"),
    ({"init": "a"}, "init"), ({"prompt": "a (b"}, "is not closed"), ({"toward": {"prompt": "a"}}, "toward"),
    ({"pretrained": "sd"}, None)])
def test_settings_that_cannot_be_drawn_are_one_line(tiny_run, tmp_path, image, capsys, change, message):
    path = rewritten(image, tmp_path / "a.png", {**parameters(image), **change})
    code, said = verify(tiny_run, path, capsys)
    assert code == 1 and (message is None or "error: " in said and message in said)


def test_what_cannot_be_verified_says_why(tiny_run, tmp_path, image, capsys, given):
    run = tmp_path / "other"
    shutil.copytree(tiny_run, run)
    weights = bytearray((run / "denoiser.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "denoiser.safetensors").write_bytes(weights)
    code, said = verify(run, image, capsys)
    assert code == 1 and "was made with other weights" in said and "denoiser has the hash" in said
    for path, message in ((given["INIT"], "holds no settings"), (given["TEXT"], "is damaged or no image"),
                          (tmp_path / "none.png", "no image")):
        code, said = verify(tiny_run, Path(path), capsys)
        assert code == 1 and said.startswith("error: ") and message in said
    code, said = verify(tiny_run, image, capsys, "--init", given["INIT"])
    assert code == 1 and "was not made with --init" in said
    edited = draw(tiny_run, tmp_path / "out", PROMPT, "--init", given["INIT"])["00000_a-small-red-star_seed0.png"]
    code, said = verify(tiny_run, edited, capsys, "--init", given["MASK"])
    assert code == 1 and "was made from another image" in said
    assert sample.main(["--run", str(tiny_run), "--verify", given["TEXT"], str(image)]) == 1  # the good one too
    assert "equal" in capsys.readouterr().out
