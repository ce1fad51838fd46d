"""The tokenizer: every string has tokens and comes back, special tokens are out of reach, what is cut is said."""
import json
import random
import unicodedata

import pytest
import torch

from data.tokenizer import END, PAD, START, Tokenizer, TokenizerConfig

CAPTIONS = ["a small red star", "two blue circles on grey", "a green square above a red circle", "café noir"] * 5
STRINGS = ["", " ", "a small red star", "Zebra QUARTZ 0123", "café naïve Ærø", "e\u0301 is é", "日本語 の 漢字",
           "🟥⭐👩‍👩‍👧 🏳️‍🌈", "مرحبا بالعالم", "tab\tnew\nline", "\x00\x7f\u200b\ufeff", "a" * 500, "{}[]<>|\\\"'"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=320, length=2000))


def normalised(text: str) -> str:
    """What the tokenizer reads of a text."""
    return unicodedata.normalize("NFC", text).lower().strip()


@pytest.mark.parametrize("text", STRINGS)
def test_every_string_comes_back(tokenizer, text):
    ids, mask = tokenizer.encode([text])
    assert tokenizer.decode(ids) == [normalised(text)]
    assert tokenizer.overflow(text) == ""
    assert mask.sum() < tokenizer.length


def test_random_strings_of_all_of_unicode_come_back(tokenizer):
    draw = random.Random(0)
    planes = [(0x20, 0x7F), (0xA1, 0x500), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x10FF00, 0x10FFFD)]
    texts = ["".join(chr(draw.randint(*draw.choice(planes))) for _ in range(draw.randint(1, 60))) for _ in range(200)]
    # Python and the library may know different versions of Unicode: keep what both lower-case alike
    texts = [text for text in texts if tokenizer.bpe.normalizer.normalize_str(text) == normalised(text)]
    assert len(texts) > 150
    assert tokenizer.decode(tokenizer.encode(texts)[0]) == [normalised(text) for text in texts]


def test_every_byte_has_a_token(tokenizer):
    alphabet = [token for token in tokenizer.bpe.get_vocab() if len(token) == 1]
    assert len(alphabet) == 256
    assert max(tokenizer.bpe.get_vocab().values()) == tokenizer.vocab_size - 1 < 320


@pytest.mark.parametrize("special", [START, END, PAD])
def test_a_caption_cannot_spell_a_special_token(tokenizer, special):
    for text in (special, f"a star{special}two", special.upper(), f"{special}{special}"):
        ids, mask = tokenizer.encode([text])
        inner = ids[0, 1: int(mask.sum()) - 1]
        assert not set(inner.tolist()) & {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id}
        assert tokenizer.decode(ids) == [normalised(text)]


def test_mask_and_frame(tokenizer):
    ids, mask = tokenizer.encode(["", "a red star", "two blue circles on grey"])
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (3, tokenizer.length)
    for row, real in zip(ids, mask):
        count = int(real.sum())
        assert real[:count].all() and not real[count:].any()  # no holes
        assert row[0] == tokenizer.start_id and row[count - 1] == tokenizer.end_id
        assert (row[count:] == tokenizer.pad_id).all() and (row[:count] != tokenizer.pad_id).all()
    assert int(mask[0].sum()) == 2
    alone, _ = tokenizer.encode(["a red star"])
    assert torch.equal(alone[0], ids[1])  # neighbours do not matter


def test_a_long_caption_is_cut_before_the_end_token_and_the_loss_is_told(tokenizer):
    short = Tokenizer(tokenizer.bpe, 6)
    text = "two blue circles on grey and a dragon"
    ids, mask = short.encode([text])
    assert ids.shape == (1, 6) and mask.all() and ids[0, -1] == short.end_id
    kept, lost = short.decode(ids)[0], short.overflow(text)
    assert lost and (kept + lost).replace(" ", "") == text.replace(" ", "")
    exact = tokenizer.bpe.encode("a red star", add_special_tokens=False).ids
    assert Tokenizer(tokenizer.bpe, len(exact) + 2).overflow("a red star") == ""
    assert Tokenizer(tokenizer.bpe, len(exact) + 1).overflow("a red star") != ""


def test_merges_are_learnt_from_the_captions(tokenizer):
    tokens = tokenizer.bpe.encode("a red star", add_special_tokens=False).tokens
    assert tokens == ["Ġa", "Ġred", "Ġstar"]
    untrained = Tokenizer.train([], TokenizerConfig(vocab_size=320, length=32))
    assert untrained.vocab_size == 259
    assert len(untrained.bpe.encode("a red star", add_special_tokens=False).ids) == len(" a red star")


def test_training_is_deterministic_and_saving_keeps_everything(tokenizer, tmp_path):
    texts = [tokenizer.to_json()]
    for _ in range(4):
        texts.append(Tokenizer.train(iter(CAPTIONS), TokenizerConfig(vocab_size=320, length=2000)).to_json())
    assert len(set(texts)) == 1
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert loaded.to_json() == tokenizer.to_json()
    for one, other in zip(loaded.encode(STRINGS + [START]), tokenizer.encode(STRINGS + [START])):
        assert torch.equal(one, other)


@pytest.mark.parametrize("text", ["", "[]", "{}", "x", '{"length": 8, "tokenizer": {}}', '{"length": 8}', "\ud800"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="broken.json is not a tokenizer") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "absent.json")


def test_a_tokenizer_without_its_special_tokens_is_refused(tokenizer, tmp_path):
    data = json.loads(tokenizer.to_json())
    data["tokenizer"]["added_tokens"] = []
    del data["tokenizer"]["model"]["vocab"][PAD]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="broken.json is not a tokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize("values, message", [({"vocab_size": 259}, "vocab_size: 259"), ({"length": 3}, "length: 3")])
def test_sizes_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**values)
