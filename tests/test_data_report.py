"""The report says what is in the data: known counts, known duplicates, known unknown tokens; and needs no network."""
import re

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import idctn
from tokenizers import Tokenizer as AnyTokenizer
from tokenizers import models, pre_tokenizers

from data.report.__main__ import main
from data.report.duplicates import distance, near_groups, near_pairs, perceptual_hash, small_version
from data.tokenizer import Tokenizer, TokenizerConfig


def smooth(seed: int, size: int = 96) -> Image.Image:
    """An image of low frequencies, as photographs are."""
    rng = np.random.default_rng(seed)
    waves = np.zeros((3, size, size))
    waves[:, :8, :8] = rng.normal(size=(3, 8, 8)) * size / (1 + np.add.outer(np.arange(8), np.arange(8)))
    pixels = idctn(waves, axes=(1, 2), norm="ortho") * 40 + 128
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


# ---- hashes

def test_the_hash_of_known_cosines():
    """One bit for each low frequency: an image made of the frequencies whose bits are set has that hash."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        bits = np.zeros(64, bool)
        bits[1 + rng.permutation(63)[:31]] = True  # 31 of 63 above the median
        waves = np.zeros((32, 32))
        waves[:8, :8] = np.where(bits, 60, -60).reshape(8, 8)
        waves[0, 0] = 128 * 32
        grey = idctn(waves, norm="ortho")
        scaled = np.clip((grey - 128) * 100 / np.abs(grey - 128).max() + 128, 0, 255).round().astype(np.uint8)
        found = perceptual_hash(Image.fromarray(scaled).convert("RGB"))
        assert bin(found ^ int.from_bytes(np.packbits(bits).tobytes(), "big")).count("1") <= 1  # the median itself
    assert perceptual_hash(Image.new("RGB", (9, 9), "red")) == perceptual_hash(Image.new("RGB", (50, 20), "blue")) == 0


def test_near_duplicates_survive_what_happens_to_images_and_others_do_not(tmp_path):
    image = smooth(0)
    image.save(tmp_path / "x.jpg", quality=60)
    changed = [Image.open(tmp_path / "x.jpg"), image.resize((64, 64), Image.Resampling.BICUBIC).resize((200, 180)),
               ImageEnhance.Brightness(image).enhance(1.04)]
    others = [smooth(seed) for seed in range(1, 40)] + [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    others.append(Image.merge("RGB", [image.convert("L").point(lambda v: v // 2)] * 2 + [image.convert("L")]))
    images = [image, *changed, *others]
    hashes = np.array([perceptual_hash(one) for one in images], dtype=np.uint64)
    small = np.stack([small_version(one) for one in images])
    pairs = near_pairs(hashes, small)
    assert near_groups(pairs, len(images)) == [[0, 1, 2, 3]]
    assert distance(hashes[:1], hashes[-1:]) < 8  # the same in grey, told apart by its colours


@pytest.mark.parametrize("most", [0, 1, 3, 5])
def test_pairs_are_those_of_comparing_all_with_all(most):
    rng = np.random.default_rng(most)
    base = rng.integers(0, 2**63, 12, dtype=np.uint64)
    hashes = np.concatenate([base ^ np.uint64(sum(1 << int(b) for b in rng.permutation(64)[:k])) for k in range(7)])
    small = np.zeros((len(hashes), 16, 16, 3), np.uint8)
    small[::5] = 200
    expected = [[i, j] for i in range(len(hashes)) for j in range(i + 1, len(hashes))
                if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= most and (i % 5 == 0) == (j % 5 == 0)]
    assert len(expected) > 0 or most == 0
    assert near_pairs(hashes, small, most).tolist() == expected


# ---- the page

@pytest.fixture
def folder(tmp_path):
    """train 12, validation 3, test 2; one image of validation and one of test repeat images of train."""
    root = tmp_path / "set"
    for split, seeds in (("train", range(12)), ("validation", (20, 3, 21)), ("test", (5, 30))):
        (root / split).mkdir(parents=True)
        for number, seed in enumerate(seeds):
            smooth(seed, 64 + 8 * (number % 2)).save(root / split / f"{number}.png")
            (root / split / f"{number}.txt").write_text(f"a quiet picture number{seed} <b>")
    (root / "train" / "bad & worse.png").write_bytes(b"no image")
    (root / "train" / "bad & worse.txt").write_text("x")
    data = (root / "train" / "11.png").read_bytes()
    (root / "train" / "11.png").write_bytes(data[: len(data) // 2])
    return root


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with ``first``."""
    row = re.search(rf"<tr><td>{first}</td>(.*?)</tr>", text)[1]
    return re.findall("<td>(.*?)</td>", row)


def test_the_report_of_a_folder(folder, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Tokenizer.train(["a quiet picture"], TokenizerConfig(vocab_size=300, length=8)).to_json())
    out = tmp_path / "page" / "report.html"
    main([str(folder), "--out", str(out), "--tokenizer", str(tokenizer)])
    text = out.read_text(encoding="utf-8")
    assert cells(text, "train") == ["12", "11", "1", "11", "11"] and cells(text, "test")[:2] == ["2", "2"]
    assert cells(text, "train and validation") == ["1", "0", "1"]
    assert cells(text, "train and test") == ["1", "0", "1"] and cells(text, "validation and test") == ["0", "0", "0"]
    assert cells(text, "64 x 64") == ["9"] and cells(text, "72 x 72") == ["7"]
    assert "2 pairs in 2 groups, of 16 images" in text
    assert "Unreadable: 2" in text and "bad &amp; worse.png: not an image" in text and "train/11.png" in text
    assert "no unknown token" in text and "16 of 16 captions are longer than the 8 tokens" in text
    assert "words of a caption; highest bar 16, median 5" in text
    assert "<b>" not in text.partition("<body>")[2] and text.count("data:image/jpeg;base64,") == 3
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", text) and "url(" not in text and "<script" not in text


def test_unknown_tokens_of_another_tokenizer_are_counted(folder, tmp_path, capsys):
    words = AnyTokenizer(models.WordLevel({"a": 0, "quiet": 1, "picture": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    main([str(folder), "--out", str(tmp_path / "r.html"), "--tokenizer", str(tmp_path / "words.json")])
    text = (tmp_path / "r.html").read_text()
    assert "32 unknown tokens of 112" in text and "&lt;b&gt; 16" in text  # 16 captions of 5 words, start and end
    assert "r.html" in capsys.readouterr().out


def test_a_drawn_source_has_a_report_too(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {source: shapes, shapes: {size: 32, train: 20, validation: 4, test: 4}}")
    main([str(path), "--out", str(tmp_path / "r.html"), "--limit", "10"])
    text = (tmp_path / "r.html").read_text()
    assert cells(text, "train")[:3] == ["20", "10", "0"] and cells(text, "32 x 32") == ["18"]


@pytest.mark.parametrize("more, message", [
    (["nowhere"], "neither a folder nor a config"), ([".", "--limit", "0"], "--limit 0"),
    ([".", "--tokenizer", "none.json"], "no file none.json"),
])
def test_bad_arguments_end_with_one_line(more, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(more)
