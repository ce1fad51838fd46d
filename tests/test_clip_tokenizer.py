"""The ids from a checkpoint's vocabulary equal those of transformers' CLIPTokenizer, special tokens included."""

import json
import random
from pathlib import Path

import pytest
import torch
from clip_vocabulary import write_vocabulary

from data.clip_tokenizer import END, START, ClipTokenizer

transformers = pytest.importorskip("transformers")

FIXED = [
    "", " ", "\t\n", "a", "A Small RED star", "don't they'll we've I'm he'd it's IT'S 'tis rock'n'roll",
    "12 345 ６７ ² ½", "café cafe\u0301 ﬁ ǅ İstanbul straße ΣΑΣ", "日本語 漢字 한국어 ไทย", "مرحبا بالعالم",
    "🟥⭐👩‍👩‍👧🏳️‍🌈 ok", "a  b\t\tc\r\nd\u00a0e\u3000f", "\x00\x01\x7f\u200b\ufeff\u2028x",
    "!!! ?!... --- $%& {[()]}", "a" * 500, "word " * 200, "x!" * 60, "<|startoftext|>", "a <|endoftext|> b",
    "<|ENDOFTEXT|> B", "</w> <w> a</w>b", "#version: 0.2", "e\u0301\u0323 \u0340", "_under_score_ snake_case",
]


def varied(count: int) -> list[str]:
    """Strings of all of Unicode, mixed with words, contractions, repeated spaces and control characters."""
    draw = random.Random(0)
    planes = [(0x20, 0x7E), (0xA1, 0x24F), (0x300, 0x36F), (0x370, 0x6FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF),
              (0x00, 0x1F), (0x10000, 0x10FFFD)]
    pieces = [" ", "  ", "'s", "'ll", "N'T", "star", "Red", "42", "!", "\u200d", "\n", "<|endoftext|>", "</w>"]
    texts = list(FIXED)
    while len(texts) < count:
        length = draw.choice([1, 5, 20, 60, 150])
        texts.append("".join(draw.choice(pieces) if draw.random() < 0.4 else chr(draw.randint(*draw.choice(planes)))
                             for _ in range(length)))
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("clip"))


def theirs(folder: Path, texts: list[str]) -> torch.Tensor:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def test_a_thousand_strings_have_the_ids_of_transformers(folder):
    texts = varied(1000)
    ours = ClipTokenizer.load(folder)
    ids, mask = ours.encode(texts)
    assert torch.equal(ids, theirs(folder, texts))
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (1000, 77)
    assert len(ids.unique()) > 300 and 100 < int(mask.all(dim=1).sum()) < 900  # short and long ones


@pytest.mark.parametrize("last", [True, False])
def test_the_padding_token_of_the_checkpoint_is_used(tmp_path, last):
    """SD-2.x pads with "!", which a prompt then cannot spell any other way."""
    write_vocabulary(tmp_path, pad="!", last=last)
    texts = ["a star", "stop!", "a!b !! c", ""]
    ours = ClipTokenizer.load(tmp_path)
    ids, mask = ours.encode(texts)
    assert torch.equal(ids, theirs(tmp_path, texts))
    assert ours.pad_id != ours.end_id and (ids[0, int(mask[0].sum()):] == ours.pad_id).all()


def test_special_tokens_with_flags_are_matched_as_they_say(tmp_path):
    write_vocabulary(tmp_path)
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {"eos_token": {**token, "content": END}, "bos_token": {**token, "content": START}, "pad_token": END,
              "unk_token": END, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["a <|endoftext|> b", "<|ENDOFTEXT|> B", "<|StartOfText|>x", "plain"]
    assert torch.equal(ClipTokenizer.load(tmp_path).encode(texts)[0], theirs(tmp_path, texts))


def test_what_transformers_saves_is_read_and_what_we_save_it_reads(folder, tmp_path):
    ours = ClipTokenizer.load(folder)
    expected = ours.encode(FIXED)[0]
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    assert torch.equal(ClipTokenizer.load(tmp_path / "theirs").encode(FIXED)[0], expected)
    ours.save(tmp_path / "ours")
    assert torch.equal(ClipTokenizer.load(tmp_path / "ours").encode(FIXED)[0], expected)
    assert torch.equal(theirs(tmp_path / "ours", FIXED), expected)


def test_mask_and_frame(folder):
    tokenizer = ClipTokenizer.load(folder)
    ids, mask = tokenizer.encode(["", "a red star", "word " * 100])
    assert mask.sum(dim=1).tolist() == [2, 5, 77]
    for row, real in zip(ids, mask):
        count = int(real.sum())
        assert real[:count].all() and row[0] == tokenizer.start_id and row[count - 1] == tokenizer.end_id
        assert tokenizer.end_id not in row[1:count - 1] and (row[count:] == tokenizer.pad_id).all()
    assert tokenizer.vocab_size == len(json.loads((folder / "vocab.json").read_text())) and tokenizer.length == 77


def test_what_is_cut_is_told(folder):
    short = ClipTokenizer.load(folder, length=6)
    ids, mask = short.encode(["a small red star above two circles"])
    assert mask.all() and ids[0, -1] == short.end_id
    assert short.overflow("a small red star above two circles") == "above two circles"
    assert short.overflow("a small red star") == "" and short.overflow("") == ""
    assert short.decode(ids) == ["a small red star"]


def test_what_is_no_tokenizer_is_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer; valid: vocab.json and merges.txt"):
        ClipTokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    for text in ("{", "[]", '{"a": "b"}', '{"a": 0}'):
        (tmp_path / "vocab.json").write_text(text)
        with pytest.raises(ValueError) as caught:
            ClipTokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    with pytest.raises(ValueError, match="lacks its special tokens: <PAD>"):
        ClipTokenizer(vocabulary, [], pad="<PAD>")
    with pytest.raises(ValueError, match="length: 2; valid: 3 tokens or more"):
        ClipTokenizer(vocabulary, [], length=2)
