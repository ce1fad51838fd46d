"""Grids of images: every pixel is where it belongs, nothing is smoothed, the file is whole or absent."""
import numpy as np
import pytest
import torch
from PIL import Image

from files.images import to_pil, to_uint8, to_unit
from files.sheets import PAPER, grid, save_grid


def colours(count: int, size: int = 16) -> torch.Tensor:
    """Images of random pixels, (B, 3, H, W) uint8."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def cells(sheet: Image.Image, rows: int, columns: int, side: int, top: int, row_height: int) -> np.ndarray:
    """The squares of a sheet, (rows, columns, side, side, 3)."""
    pixels = np.asarray(sheet)
    return np.stack([[pixels[top + r * row_height:, 8 + c * (side + 8):][:side, :side] for c in range(columns)]
                     for r in range(rows)])


@pytest.mark.parametrize("count, columns", [(1, 8), (5, 2), (8, 8), (9, 4)])
def test_every_image_is_in_its_cell_enlarged_by_whole_pixels(count, columns):
    images = colours(count)
    sheet = grid(images, columns=columns, cell=64)
    wide, rows = min(columns, count), -(-count // columns)
    assert sheet.size == (8 + wide * 72, 8 + rows * 72)
    found = cells(sheet, rows, wide, 64, 8, 72)
    for k in range(rows * wide):
        cell = found[k // columns, k % columns]
        if k < count:
            expected = images[k].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)
            assert (cell == expected).all(), k
        else:
            assert (cell == PAPER).all(), k


def test_labels_stand_under_their_image_and_the_title_above():
    images = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    plain, labelled = grid(images, cell=64), grid(images, ["", "a red star in a very long caption"], cell=64)
    titled = grid(images, cell=64, title="step 3")
    assert labelled.width == plain.width and labelled.height > plain.height + 30  # several lines
    pixels = np.asarray(labelled)
    assert (pixels[72:, :72] == PAPER).all()  # the empty label
    assert (pixels[72:, 80:] != PAPER).any()
    assert titled.height == plain.height + 18 and (np.asarray(titled)[:26] != PAPER).any()


def test_any_unicode_can_be_a_label():
    grid(colours(3), ["日本語", "🟥⭐", "a\tb\nc"], title="é")


def test_labels_of_another_count_are_refused():
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        grid(colours(3), ["a", "b"])


def test_floats_are_rounded_not_cut():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    floats = to_unit(levels)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(floats + 0.49 / 127.5), levels)
    assert torch.equal(to_uint8(floats - 0.49 / 127.5), levels)
    assert (np.asarray(to_pil(floats)) == levels.permute(1, 2, 0).numpy()).all()
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_a_grid_is_written_whole_and_the_same_every_time(tmp_path, monkeypatch):
    path = tmp_path / "a" / "grid.png"
    save_grid(colours(2), path, ["a", "b"])
    first = path.read_bytes()
    save_grid(colours(2), path, ["a", "b"])
    assert path.read_bytes() == first
    assert np.asarray(Image.open(path)).shape == (8 + 128 + 15 + 8, 8 + 2 * 136, 3)

    def crash(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", crash)
    with pytest.raises(OSError):
        save_grid(colours(3), path)
    assert path.read_bytes() == first and [item.name for item in path.parent.iterdir()] == ["grid.png"]
