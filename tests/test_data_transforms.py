"""Image files of every kind become the same uint8 RGB; crops, buckets and mirroring do what their records say."""
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from data.images.transforms import (
    Unreadable,
    bucket_sizes,
    crop_to_size,
    decode_image,
    image_size,
    may_flip,
    nearest_bucket,
    rgb_of,
)

WHITE = (255, 255, 255)
RED, BLUE = np.array([200, 30, 40], np.uint8), np.array([10, 60, 220], np.uint8)


def two_halves(height=24, width=40) -> np.ndarray:
    """Red on the left, blue on the right."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2:] = RED, BLUE
    return pixels


def saved(image: Image.Image, kind: str, **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def read(data: bytes, background=WHITE) -> np.ndarray:
    return np.asarray(decode_image(data, "x", background, 10**6)).astype(int)


def palette(image: Image.Image) -> Image.Image:
    return image.quantize(4, method=Image.Quantize.MEDIANCUT)


@pytest.mark.parametrize("kind, mode, more, near", [
    ("PNG", "RGB", {}, 0), ("PNG", "P", {}, 2), ("GIF", "P", {}, 2), ("WEBP", "RGB", {"lossless": True}, 0),
    ("WEBP", "RGB", {"quality": 95}, 12), ("JPEG", "RGB", {"quality": 95, "subsampling": 0}, 8),
    ("JPEG", "CMYK", {"quality": 95}, 12), ("PNG", "RGBA", {}, 0),
])
def test_formats_and_modes_give_the_same_image(kind, mode, more, near):
    image = Image.fromarray(two_halves())
    image = palette(image) if mode == "P" else image.convert(mode)
    found = read(saved(image, kind, **more))
    assert found.shape == (24, 40, 3)
    inner = np.r_[0:16, 24:40]  # away from the edge, where lossy formats ring
    assert np.abs(found - two_halves().astype(int))[:, inner].max() <= near


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(16, 64)
    found = read(saved(Image.fromarray(ramp), "PNG"))
    assert (found == np.round(ramp[..., None] / 257)).all() and found.max() == 255 and found.min() == 0


def test_one_bit_and_grey():
    bits = np.zeros((8, 8), bool)
    bits[:, 4:] = True
    assert (read(saved(Image.fromarray(bits), "PNG"))[..., 0] == bits * 255).all()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert (read(saved(Image.fromarray(grey), "PNG")) == grey[..., None]).all()


def test_transparency_shows_the_background():
    """Porter and Duff's over: alpha c + (1 - alpha) background."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[..., :3], pixels[:, 2:4, 3], pixels[:, 4:, 3] = (200, 100, 0), 128, 255
    found = read(saved(Image.fromarray(pixels), "PNG"), background=(0, 0, 250))
    assert (found[0, 0] == (0, 0, 250)).all() and (found[0, 5] == (200, 100, 0)).all()
    assert np.abs(found[0, 3] - (np.array([200, 100, 0]) * 128 + np.array([0, 0, 250]) * 127) / 255).max() <= 1
    index = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    index.putpalette([9, 9, 9, 50, 60, 70])
    for kind in ("PNG", "GIF"):
        assert read(saved(index, kind, transparency=0), rgb_of("#00ff00")).tolist() == [[[0, 255, 0], [50, 60, 70]]]
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert read(saved(deep, "PNG", transparency=65535), (1, 2, 3)).tolist() == [[[0, 0, 0], [1, 2, 3]]]


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "lime", "blue")]
    for kind, more in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **more)
        assert (read(data)[4, 4] == (255, 0, 0)).all(), kind


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(orientation, kind):
    """The stored image is upright after the turn that EXIF 2.32, table 4.6.4, gives for its orientation."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[:8, 16:], pixels[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    turns = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
             5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, 1), 7: pixels[::-1, ::-1].transpose(1, 0, 2),
             8: np.rot90(pixels, -1)}  # how a camera stores the upright `pixels` for each
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(turns[orientation])), kind, exif=exif, **more)
    assert image_size(data, "x", 10**6) == (16, 32)
    assert np.abs(read(data) - pixels.astype(int)).max() <= 3


def test_what_is_no_image_is_named_with_its_reason():
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    png = saved(Image.fromarray(two_halves()), "PNG")
    for data, reason in ((b"", "empty"), (b"hello there", "not an image"), (whole[:900], "truncated"),
                         (png[:60], ""), (saved(Image.new("RGB", (4, 4)), "PPM"), "not an image"),
                         (png[:45] + bytes([png[45] ^ 255]) + png[46:], "")):
        with pytest.raises(Unreadable, match=rf"^a/b.png: .*{reason}"):
            decode_image(data, "a/b.png", WHITE, 10**6)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = saved(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 200_000
    for reader in (lambda: image_size(bomb, "b.png", 80_000_000),
                   lambda: decode_image(bomb, "b.png", WHITE, 80_000_000)):
        with pytest.raises(Unreadable, match="pixels"):
            reader()
    small = saved(Image.new("RGB", (30, 20)), "PNG")
    assert image_size(small, "s.png", 600) == (20, 30)
    for reader in (lambda: image_size(small, "s.png", 599), lambda: decode_image(small, "s.png", WHITE, 599)):
        with pytest.raises(Unreadable, match="s.png: 30 x 20 pixels are more than max_pixels = 599"):
            reader()


@pytest.mark.parametrize("shape, size", [((48, 80), (16, 16)), ((90, 31), (24, 16)), ((10, 12), (32, 32))])
def test_centre_crop_equals_torchvisions_crop_and_antialiased_resize(shape, size):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (*shape, 3), np.uint8)).resize((shape[1], shape[0]))
    found, frame = crop_to_size(image, size)
    full_h, full_w, top, left, height, width = frame
    assert (full_h, full_w) == shape and abs(height / width - size[0] / size[1]) < 1e-6
    assert abs(top + height / 2 - shape[0] / 2) < 1e-6 and abs(left + width / 2 - shape[1] / 2) < 1e-6
    assert found.shape == (3, *size) and found.dtype == torch.uint8
    if all(abs(value - round(value)) < 1e-9 for value in frame):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        part = F.crop(pixels, *(round(value) for value in frame[2:]))
        expected = F.resize(part, list(size), F.InterpolationMode.BICUBIC, antialias=True)
        edge = max(2, round(2 * size[0] / frame[4]) + 1)  # nearer to it the neighbours of the crop count
        assert (expected.int() - found.int())[:, edge:-edge, edge:-edge].abs().max() <= 1


def test_the_frame_says_where_the_crop_is():
    """An image whose colour is its coordinate: the crop's mean is the frame's centre."""
    y, x = np.mgrid[:100, :200]
    image = Image.fromarray(np.stack([x, y, y], axis=2).astype(np.uint8))
    for place in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.7)):
        for flip in (False, True):
            pixels, (_, _, top, left, height, width) = crop_to_size(image, (20, 10), place, flip)
            assert (top, height, width) == (0, 100, 50) and abs(left - 150 * place[1]) < 1e-9
            assert abs(pixels[0].float().mean() - (left + width / 2 - 0.5)) < 1
            assert abs(pixels[1].float().mean() - (top + height / 2 - 0.5)) < 1
            assert (pixels[0, 0, 0] > pixels[0, 0, -1]) == flip
    pixels, frame = crop_to_size(image.resize((100, 50)), (20, 20), whole=(100, 200))
    assert frame == (100, 200, 0, 50, 100, 100)  # in pixels of the whole image


def test_a_jpeg_that_is_decoded_small_looks_like_the_whole_one():
    y, x = np.mgrid[:640, :960] / 960
    image = Image.fromarray((127 + 127 * np.stack([np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))], 2)).astype("u1"))
    data = saved(image, "JPEG", quality=95)
    small, whole = decode_image(data, "x", WHITE, 10**7, least=64), decode_image(data, "x", WHITE, 10**7)
    assert small.size == (240, 160) and whole.size == (960, 640)
    one, two = (crop_to_size(decoded, (64, 64), whole=(640, 960))[0].int() for decoded in (small, whole))
    assert (one - two).abs().max() <= 4


@pytest.mark.parametrize("size, step", [(64, 8), (256, 32), (512, 64), (1024, 64)])
def test_buckets_have_about_one_area_and_fit_the_step(size, step):
    buckets = bucket_sizes(size, step, 2.0)
    assert (size, size) in buckets and len(set(buckets)) == len(buckets) >= 5
    for height, width in buckets:
        assert height % step == 0 == width % step and (width, height) in buckets
        assert size * size * 0.8 <= height * width <= size * size
        assert max(height, width) <= 2 * min(height, width)
    sizes = np.array([[height * 3, width * 3] for height, width in buckets] + [[100, 1000], [1000, 100]])
    found = nearest_bucket(sizes, buckets)
    assert found[:-2].tolist() == list(range(len(buckets)))
    assert buckets[found[-2]][1] == max(width for _, width in buckets) == buckets[found[-1]][0]


@pytest.mark.parametrize("caption, allowed", [
    ("a red fox in the snow", True), ("copyright", True), ("brightly lit, leftover cake", True),
    ("a fox left of a tree", False), ("the RIGHT hand", False), ("a shop with a sign", False),
    ("the letter B", False), ("a horse facing a fence", False), ('a shirt that says "hi"', False), ("text", False),
])
def test_captions_that_forbid_a_mirrored_image(caption, allowed):
    assert may_flip(caption) is allowed
