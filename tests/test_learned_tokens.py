"""Words that were learned from images: their files, how a tokenizer finds them, how a system gets and loses them."""
import pickle

import pytest
import torch
from made_up_moderation import written
from safetensors.torch import load_file, save_file
from torch import nn

from data.learned_tokens import check_word, with_learned_tokens
from data.tokenizer import Tokenizer, TokenizerConfig
from model.pretrained.adapters import networks_of
from model.pretrained.card import Card, hash_of_networks
from model.pretrained.embeddings import read_embeddings, write_embeddings
from pipeline.loading import load_run
from pipeline.moderation import Moderation
from pipeline.personal import Personal, learned_words
from pipeline.prompts import chunks_of, parse_prompt

VECTORS = torch.arange(32.0).reshape(2, 16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    captions = ["a small red star above two blue circles", "a cat of a house"]
    return Tokenizer.train(captions, TokenizerConfig(300, 24))


# ---- the tokenizer

def test_learned_words_have_their_own_ids_and_others_keep_theirs(tokenizer):
    learned = with_learned_tokens(tokenizer, {"<cat>": [300, 301], "Easy": [302], "<cat>-2": [303]})
    plain = tokenizer.encode(["a small red star"])
    assert torch.equal(learned.encode(["a small red star"])[0], plain[0]) and tokenizer.bpe is not learned.bpe

    def ids(text: str) -> list[int]:
        row, mask = learned.encode([text])
        return row[0][mask[0]].tolist()[1:-1]

    def base(text: str) -> list[int]:
        return tokenizer.bpe.encode(text, add_special_tokens=False).ids

    assert ids("a <cat> of easy star") == [*base("a"), 300, 301, *base("of"), 302, *base("star")]
    assert ids("<CAT>, red") == [300, 301, *base(", red")]
    assert ids("<cat>") == [300, 301] and ids("<cat><cat>") == [300, 301] * 2
    assert ids("a <cat>-2") == [*base("a"), 303]  # the longest word
    assert ids("uneasy easygoing") == base("uneasy easygoing")  # no whole words
    assert learned.decode(learned.encode(["a <cat> of star"])[0]) == ["a <cat> of star"]
    with pytest.raises(ValueError, match="add_special_tokens: True; valid: False"):
        learned.bpe.encode("a", add_special_tokens=True)


def test_weights_chunks_and_places_know_learned_words(tokenizer):
    learned = with_learned_tokens(tokenizer, {"<cat>": [300, 301, 302]})
    chunks = chunks_of(parse_prompt("a (<cat>:1.3) star"), learned)
    assert chunks.weights[0, :6].tolist() == pytest.approx([1, 1, 1.3, 1.3, 1.3, 1])
    assert [chunks.words[place] for place in (2, 3, 4)] == ["<cat>"] * 3
    text = "star " * 20 + "<cat> star"
    rows = chunks_of(parse_prompt(text, chunks=3), learned).ids
    assert len(rows) == 2 and rows[1, 1:5].tolist()[:3] == [300, 301, 302]  # not torn between two contexts


@pytest.mark.parametrize("word", ["", " ", " a", "a\n", "x" * 101])
def test_words_that_cannot_be_found(word):
    with pytest.raises(ValueError, match="valid: a word of 1 to 100 characters"):
        check_word(word)


# ---- files

def test_every_format(tmp_path):
    write_embeddings(tmp_path / "learned_embeds.safetensors", {"<cat>": VECTORS, "<dog>": VECTORS[:1]}, Card("00"))
    save_file({"emb_params": VECTORS.half()}, tmp_path / "easy.safetensors")
    torch.save({"<cat>": VECTORS[0]}, tmp_path / "learned_embeds.bin")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(VECTORS)}, "name": "other",
                "step": 100, "sd_checkpoint": None}, tmp_path / "style.pt")
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": VECTORS})},
               tmp_path / "first.pt")
    for name, expected in (("learned_embeds.safetensors", {"<cat>": VECTORS, "<dog>": VECTORS[:1]}),
                           ("easy.safetensors", {"easy": VECTORS}), ("learned_embeds.bin", {"<cat>": VECTORS[:1]}),
                           ("style.pt", {"style": VECTORS}), ("first.pt", {"first": VECTORS})):
        found, card = read_embeddings(tmp_path / name, 16)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found), name
        assert card == (Card("00") if name == "learned_embeds.safetensors" else Card())
    assert load_file(tmp_path / "learned_embeds.safetensors")["<cat>"].shape == (2, 16)


class Evil:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_executed_and_what_does_not_fit_is_named(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"string_to_param": {"*": Evil(tmp_path / "made")}}))
    torch.save({"string_to_param": {"*": Evil(tmp_path / "made")}}, tmp_path / "evil.bin")
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or holds more than tensors, which is not executed"):
            read_embeddings(tmp_path / name, 16)
    assert not (tmp_path / "made").exists()
    save_file({"clip_g": torch.zeros(1, 1280), "clip_l": torch.zeros(1, 768)}, tmp_path / "xl.safetensors")
    torch.save({"string_to_param": {"*": "text"}}, tmp_path / "text.pt")
    torch.save([VECTORS], tmp_path / "list.pt")
    save_file({}, tmp_path / "empty.safetensors")
    save_file({"<cat>": torch.zeros(2, 2, 16)}, tmp_path / "cube.safetensors")
    for name, message in (("xl.safetensors", r"clip_. is \(1, (1280|768)\); valid: \(n, 16\), the width of the text"),
                          ("text.pt", r"\* is no tensor"), ("list.pt", "holds no table of vectors"),
                          ("empty.safetensors", "holds no vectors; valid: an embedding"),
                          ("cube.safetensors", r"<cat> is \(2, 2, 16\)")):
        with pytest.raises(ValueError, match=message):
            read_embeddings(tmp_path / name, 16)
    with pytest.raises(FileNotFoundError, match="no embedding"):
        read_embeddings(tmp_path / "none.pt", 16)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="valid: a file that ends in .safetensors, .pt, .bin"):
        read_embeddings(tmp_path / "a.txt", 16)


# ---- on a system

def test_a_system_gets_words_and_loses_them(tiny_run, tmp_path):
    system = load_run(tiny_run, moderation=None)
    networks = networks_of(system.unet, system.text_encoder)
    before, context = hash_of_networks(networks), system.encode(["a <cat> star"])[0]
    write_embeddings(tmp_path / "a.safetensors", {"<cat>": VECTORS}, Card(before))
    save_file({"emb_params": VECTORS[:1]}, tmp_path / "easy.safetensors")
    personal = Personal(system, embeddings=[tmp_path / "a.safetensors", tmp_path / "easy.safetensors"])
    assert personal.notes == [f"{tmp_path / 'easy.safetensors'} does not say which base it was trained on; it is used "
                              "on this one"]
    ids = system.tokenizer.encode(["a <cat> star, easy"])[0][0]
    assert ids[2:4].tolist() == [300, 301] and 302 in ids
    assert torch.equal(system.text_encoder.token_embedding(ids[2:4]), VECTORS)
    assert not torch.equal(system.encode(["a <cat> star"])[0], context)
    assert list(system.cards) == [str(tmp_path / "a.safetensors"), str(tmp_path / "easy.safetensors")]
    personal.remove()
    assert hash_of_networks(networks) == before and torch.equal(system.encode(["a <cat> star"])[0], context)
    assert not system.cards


def test_files_that_do_not_go_together_leave_the_system_as_it_was(tiny_run, tmp_path):
    system = load_run(tiny_run, moderation=None)
    before = hash_of_networks(networks_of(system.unet, system.text_encoder))
    for name in ("a", "b"):
        write_embeddings(tmp_path / f"{name}.safetensors", {"<cat>": VECTORS}, Card())
    write_embeddings(tmp_path / "other.safetensors", {"<dog>": VECTORS}, Card("00"))
    for names, message in ((("a", "b"), "b.safetensors: the token <cat> is in another file, too; valid: each once"),
                           (("a", "other"), "other.safetensors was trained on another base .*; valid: its own base")):
        with pytest.raises(ValueError, match=message):
            Personal(system, embeddings=[tmp_path / f"{name}.safetensors" for name in names])
        assert hash_of_networks(networks_of(system.unet, system.text_encoder)) == before
    personal = Personal(system, embeddings=[tmp_path / "other.safetensors"], any_base=True)
    assert "other.safetensors was trained on another base" in personal.notes[0]
    with pytest.raises(ValueError, match="1 scales for 0 adapters; valid: one for each"):
        personal.set_scales([1.0])


def test_what_a_word_stands_for_is_judged(tiny_run, tmp_path):
    """The made-up gate blocks zorbic: as a token, as a caption, and in a prompt that only has the word for it."""
    system = load_run(tiny_run, moderation=None)
    system.moderation = Moderation.load(weights=written(tmp_path / "gate.safetensors"))
    for card in (Card(None, {"zorbic": ""}), Card(None, {"<cat>": "a zorbic"}), Card(captions=("a star", "a zorbic"))):
        write_embeddings(tmp_path / "a.safetensors", {"<cat>": VECTORS}, card)
        with pytest.raises(ValueError, match="a.safetensors is refused for a trigger word or caption of its training"):
            Personal(system, embeddings=[tmp_path / "a.safetensors"])
        assert not system.moderation.learned
    save_file({"emb_params": VECTORS}, tmp_path / "zorbic.safetensors")  # the name of the file is a word of prompts
    with pytest.raises(ValueError, match="zorbic.safetensors is refused"):
        Personal(system, embeddings=[tmp_path / "zorbic.safetensors"])
    write_embeddings(tmp_path / "a.safetensors", {"<cat>": VECTORS}, Card(None, {"<cat>": "signo"}, ("a mild star",)))
    personal = Personal(system, embeddings=[tmp_path / "a.safetensors"])
    assert system.moderation.learned == {"<cat>": "signo"} == learned_words(personal.cards)
    personal.remove()
    assert not system.moderation.learned
    assert learned_words({"a": Card(None, {"sks": "", "x": "y"}, ("a sks star",))}) == {"sks": "a sks star", "x": "y"}
