"""One reader of image files: what a user brings is read as it looks, or refused in one line, by every command alike."""
import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin
from sample_calls import draw, pixels

import moderate
import sample
from data.images.transforms import Unreadable, decode_image, image_size
from eval.image_folder import image_file_batches, image_files
from files.images import MAX_PIXELS, open_image, parameters_of, png_bytes, read_image, read_mask
from sampling.loading import SourceFiles, SystemChoice, read_sources

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size in grey, whose rows are all black and compress well."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    packer = zlib.compressobj()
    row = b"\0" * (width // 8 + 1 + (width % 8 > 0))
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def with_text(size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", json.dumps({"prompt": "x" * size}), zip=True)
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def colours(path: Path) -> list:
    return read_image(path).permute(1, 2, 0).tolist()


# ---- what is read

@pytest.mark.parametrize("mode, name, expected", [
    ("L", "a.png", [200, 200, 200]), ("LA", "a.png", [227, 227, 227]),
    ("RGB", "a.bmp", [200, 100, 50]), ("RGBA", "a.png", [227, 177, 152]), ("RGB", "a.tif", [200, 100, 50]),
    ("RGBA", "a.tif", [227, 177, 152]), ("CMYK", "a.tif", [200, 100, 50]), ("RGB", "a.ppm", [200, 100, 50]),
    ("RGB", "a.webp", [200, 100, 50]), ("P", "a.gif", [200, 100, 50]), ("RGB", "a.jfif", [200, 100, 50])])
def test_kinds_of_pixels(tmp_path, mode, name, expected):
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
    if mode in ("L", "LA"):
        image = Image.new("LA", (4, 4), (200, 128))
    image.convert(mode).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert np.abs(np.array(colours(tmp_path / name)) - expected).max() <= 2


def test_sixteen_bits_are_scaled(tmp_path):
    deep = np.array([[0, 257 * 7, 257 * 128, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert [pixel[0] for pixel in colours(tmp_path / name)[0]] == [0, 7, 128, 255]
    Image.fromarray(deep).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png")[0].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_every_reader_turns_images_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / f"a.{kind.lower()}", kind, exif=exif)
    path = tmp_path / f"a.{kind.lower()}"
    expected = (40, 20) if orientation in (6, 8) else (20, 40)
    assert tuple(read_image(path).shape[1:]) == tuple(read_mask(path)[0].shape) == expected
    assert tuple(next(image_file_batches(image_files(tmp_path))).shape[2:]) == expected
    if kind != "TIFF":
        assert image_size(path.read_bytes(), "a", MAX_PIXELS) == expected


# ---- limits

def test_the_limit_is_that_of_the_configuration_and_not_that_of_pillow(tmp_path):
    data = png_header(20_000, 10_000)  # 200 million pixels; Pillow's own limit is 178,956,970
    path = tmp_path / "large.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="large.png: 20000 x 10000 pixels are more than max_pixels = 80000000"):
        open_image(path)
    with pytest.raises(ValueError, match="1 of 1 have more than max_pixels = 80000000 pixels .first: large.png"):
        image_files(tmp_path)
    with pytest.raises(Unreadable, match="20000 x 10000 pixels are more than max_pixels = 199999999"):
        image_size(data, "large.png", 199_999_999)
    assert image_size(data, "large.png", 200_000_000) == (10_000, 20_000)
    assert open_image(path, 200_000_000).size == (20_000, 10_000)


def test_a_description_of_any_usual_length_is_no_reason_to_refuse(tmp_path):
    path = tmp_path / "told.png"
    path.write_bytes(with_text(3_000_000))  # Pillow's own limit is a million
    assert len(parameters_of(path)["prompt"]) == 3_000_000 and read_image(path).shape == (3, 32, 32)
    assert decode_image(path.read_bytes(), "told.png", (0, 0, 0), 10_000).size == (32, 32)
    path.write_bytes(with_text(70_000_000))
    with pytest.raises(ValueError, match="told.png is damaged or no image: .*too large") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_commands_take_the_limit_of_the_run(tiny_run, tmp_path, kind):
    run = tmp_path / "run"
    run.mkdir()
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    config["data"] = {"source": kind, kind: {"root": "x", "size": 32, "max_pixels": 1000}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    for files in (SourceFiles(init=str(tmp_path / "a.png")), SourceFiles(mask=str(tmp_path / "a.png"))):
        assert read_sources(files) and read_sources(files, SystemChoice(pretrained=str(run)))
        with pytest.raises(ValueError, match="a.png: 32 x 32 pixels are more than max_pixels = 1000"):
            read_sources(files, SystemChoice(str(run)))


# ---- masks

def holes(kind: str) -> Image.Image:
    """A mask of 4 x 2 pixels whose right half is to be painted."""
    dark = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    dark.paste((0, 0, 0, 0), (2, 0, 4, 2))
    if kind == "transparent":
        return dark
    if kind == "LA":
        return dark.convert("LA")
    if kind == "palette":
        image = Image.new("P", (4, 2), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(1, (2, 0, 4, 2))
        image.info["transparency"] = 1
        return image
    values = {"zero_one": 1, "full": 255, "half": 128}[kind]
    image = Image.new("L", (4, 2), 0)
    image.paste(values, (2, 0, 4, 2))
    return image.convert("1") if kind == "full" else image


@pytest.mark.parametrize("kind", ["transparent", "LA", "palette", "zero_one", "full", "half"])
def test_a_mask_is_read_as_it_looks(tmp_path, kind):
    path = tmp_path / "mask.png"
    image = holes(kind)
    image.save(path, **({"transparency": 1} if kind == "palette" else {}))
    paint, note = read_mask(path)
    assert paint.tolist() == [[False, False, True, True]] * 2
    assert note == (f"the mask {path} holds nothing but 0 and 1; it is painted where it is 1"
                    if kind == "zero_one" else "")


@pytest.mark.parametrize("image, start, count", [
    (Image.new("L", (4, 2), 0), "nothing is painted: the mask", 0),
    (Image.new("L", (4, 2), 127), "nothing is painted: the mask", 0),
    (Image.new("RGB", (4, 2), (90, 0, 0)), "nothing is painted: the mask", 0),
    (Image.fromarray(np.full((2, 4), 30_000, np.uint16)), "nothing is painted: the mask", 0),
    (Image.new("RGBA", (4, 2), (255, 255, 255, 0)), "all is painted: the mask", 8),
    (Image.new("L", (4, 2), 255), "", 8)])
def test_what_a_mask_does_not_do_is_said(tmp_path, image, start, count):
    image.save(tmp_path / "mask.png")
    paint, note = read_mask(tmp_path / "mask.png")
    assert int(paint.sum()) == count and note.startswith(start) and "\n" not in note and bool(note) == bool(start)


def test_a_command_that_paints_nothing_says_so_once(tiny_run, tmp_path, capsys):
    Image.fromarray(NOISE).save(tmp_path / "init.png")
    for name, value in (("dark", 0), ("one", 1)):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, 16:] = value
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    capsys.readouterr()
    files = draw(tiny_run, tmp_path / "a", "a moon", "--init", str(tmp_path / "init.png"), "--mask",
                 str(tmp_path / "dark.png"), "--n", "2")
    said = capsys.readouterr().err
    assert said.count("note: nothing is painted") == 1
    assert (pixels(files["00000_a-moon_seed0.png"]) == NOISE).all()
    files = draw(tiny_run, tmp_path / "b", "a moon", "--init", str(tmp_path / "init.png"), "--mask",
                 str(tmp_path / "one.png"))
    made = pixels(files["00000_a-moon_seed0.png"])
    assert (made[:, :16] == NOISE[:, :16]).all() and (made[:, 16:] != NOISE[:, 16:]).mean() > 0.9
    assert "note: the mask" in capsys.readouterr().err


# ---- what is refused, by every command

def bad_files(folder: Path) -> dict[str, Path]:
    """Files that are no images, by a word of the message."""
    png = png_bytes(torch.from_numpy(NOISE).permute(2, 0, 1), None)
    made = {"cut.png": png[:700], "empty.png": b"", "text.png": b"hello", "header.png": png[:33],
            "crc.png": png[:45] + bytes([png[45] ^ 255]) + png[46:], "large.png": png_header(12_000, 12_000),
            "page.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"}
    for name, data in made.items():
        (folder / name).write_bytes(data)
    Image.fromarray(np.zeros((32, 32), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((32, 32), 2**20, np.int32)).save(folder / "wide.tif")
    return {path.name: path for path in sorted(folder.iterdir())}


def test_what_cannot_be_read_is_one_line_everywhere(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "bad").mkdir()
    files = bad_files(tmp_path / "bad")
    Image.fromarray(NOISE).save(tmp_path / "init.png")
    monkeypatch.setattr("pipeline.moderation.image_moderator", lambda *_: SimpleNamespace(check=list))
    for name, path in files.items():
        for flags in (["--init", str(path)], ["--invert", str(path)],
                      ["--init", str(tmp_path / "init.png"), "--mask", str(path)]):
            with pytest.raises(ValueError) as caught:
                sample.main(["a moon", "--run", str(tiny_run), "--out", str(tmp_path / "out"), *flags])
            assert name in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=name):
            moderate.main(["check", "--image", str(path), "--run", str(tiny_run)])
    with pytest.raises(ValueError) as caught:
        image_files(tmp_path / "bad")
    assert "\n" not in str(caught.value) and "cannot be read" in str(caught.value)
    assert not (tmp_path / "out").exists()
