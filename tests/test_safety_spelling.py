"""Unknown words as the known ones that were meant, against a search over all forms; and the gate that reads so."""
import json
import math
import random
import zlib

import numpy as np
import pytest
from made_up_moderation import CONFIG, head_weights
from safetensors.numpy import save_file

from safety.gate import PromptGate
from safety.keywords import Lexicon, WordFilter
from safety.normalize import normalize
from safety.parts import judged_texts, number_of_words
from safety.policy import HEADS
from safety.prompt import FORMAT, PromptHead, content_hash, load_artefact, ngram_ids, tensors_of
from safety.spelling import ENDING, LONGEST_WORD, SHORTEST_EDIT, UNIT, Spelling, zeros_after

COUNTS = {"lantern": 50, "window": 40, "the": 900, "boat": 300, "walked": 30, "red": 200, "bird": 60, "house": 80,
          "on": 500, "a": 900, "houses": 9, "rare": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def costs_by_search(word: str, spelling: Spelling) -> dict[tuple[str, ...], int]:
    """The cost of every reading of a word, from all of its forms."""
    known = {text: math.inf for text in COUNTS if text in spelling}
    for code, cost in zip(spelling.codes.tolist(), spelling.costs.tolist()):
        known |= {text: cost for text in known if zlib.crc32(text.encode()) == code}
    size = len(word)
    forms = {word[:i] + word[i + 1:] for i in range(size)}
    forms |= {word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in range(size - 1)}
    for one in LETTERS:
        forms |= {word[:i] + one + word[i + 1:] for i in range(size)}
        forms |= {word[:i] + one + word[i:] for i in range(size + 1)}
    found = {(form,): known[form] + round(math.log(54 * size + 25) / UNIT) for form in forms
             if form in known and size >= SHORTEST_EDIT}
    for count in range(1, min(ENDING + 1, size)):
        if word[:-count] in known:
            cost = known[word[:-count]] + round(math.log(26) / UNIT * count)
            found[word[:-count],] = min(cost, found.get((word[:-count],), cost))
    return found | {(word[:i], word[i:]): known[word[:i]] + known[word[i:]] for i in range(1, size)
                    if word[:i] in known and word[i:] in known}


def test_the_reading_is_the_cheapest_of_all_forms():
    draw, spelling, changed = random.Random(0), Spelling.build(COUNTS), 0
    for _ in range(1500):
        word = draw.choice(list(COUNTS))
        for _ in range(draw.choice((1, 1, 2))):
            at, one = draw.randrange(len(word) + 1), draw.choice(LETTERS)
            word = draw.choice((word[:at] + word[at + 1:], word[:at] + one + word[at:], word[:at] + one + word[at + 1:],
                                word + one, word + draw.choice(list(COUNTS))))
        if not 3 <= len(word) <= LONGEST_WORD or word in spelling:
            continue
        costs = costs_by_search(word, spelling)
        found = spelling.respelled([word, "winmdow"], lambda _: False)
        assert found["winmdow"] == ("window",)
        assert (costs[found[word]] == min(costs.values())) if costs else word not in found, word
        changed += bool(costs)
    assert changed > 500


def test_words_that_are_known_or_in_the_dictionary_stay():
    spelling = Spelling.build(COUNTS, least=3)
    assert "rare" not in spelling and "red" in spelling and len(spelling.codes) == len(COUNTS) - 1
    words = ["red", "brid", "briq", "r3d", "re", "x" * (LONGEST_WORD + 1), "zzzzzz"]
    assert spelling.respelled(words, lambda word: word == "briq") == {"brid": ("bird",)}
    assert spelling.respelled(["redhouse", "housexq", "brid"], lambda _: False) == {
        "redhouse": ("red", "house"), "housexq": ("house",), "brid": ("bird",)}
    assert Spelling.build({}).respelled(["brid"], lambda _: False) == {}


def test_steps_over_zero_bytes_are_those_of_the_code():
    draw = random.Random(1)
    for count in range(LONGEST_WORD + 1):
        text = bytes(draw.randrange(256) for _ in range(5))
        state = np.array([zlib.crc32(text) ^ 0xFFFFFFFF], np.uint32)
        assert zeros_after(state, np.array(count))[0] ^ 0xFFFFFFFF == zlib.crc32(text + b"\0" * count)


@pytest.mark.parametrize("codes, costs", [([2, 1], [1, 1]), ([1], [1, 2])])
def test_codes_that_do_not_fit_are_refused(codes, costs):
    with pytest.raises(ValueError, match="valid"):
        Spelling(np.array(codes, np.uint32), np.array(costs, np.uint8))


def test_clauses_follow_the_words_that_are_split():
    spelling = Spelling.build(COUNTS)
    read = normalize("a redbird on the house, the boat on the redhouse, a boat")
    plain, other = judged_texts(read, spelling, lambda word: False)
    words = other[0].split()
    assert words == "a red bird on the house the boat on the red house a boat".split()
    assert {" ".join(words[first:end]) for first, end in other[1]} == {
        other[0], "a red bird on the house", "the boat on the red house"}
    assert judged_texts(normalize("the red boat"), spelling, lambda word: False) == [("the red boat", [(0, 3)])]


def test_words_are_counted_as_they_were_meant():
    """Else a text with its words glued in pairs has the thresholds of texts of half as many words."""
    spelling, text = Spelling.build(COUNTS), "redbird thehouse boat"
    assert number_of_words(judged_texts(normalize(text), spelling, lambda word: False)) == 5
    assert number_of_words(judged_texts(normalize(text), Spelling.build({}), lambda word: False)) == 3
    assert number_of_words(judged_texts(normalize(""), spelling, lambda word: False)) == 0


def test_the_gate_judges_what_was_meant(tmp_path):
    """A network that knows one word only: the word with a wrong letter, with a letter behind it, and glued to another
    one has the score of the word, and a file without known words reads the text as it is."""
    weights = head_weights() | {"out.bias": np.full(len(HEADS), -9, np.float32)}
    head = PromptHead(CONFIG, {name: np.zeros_like(value) if name.endswith(("table", "hidden.weight")) else value
                               for name, value in weights.items()})
    weights = head.weights | {"word.scale": np.ones(CONFIG.width + len(HEADS), np.float32)}
    weights["word.table"][ngram_ids("lantern", CONFIG.bits)[1], CONFIG.width] = 60
    settings = json.dumps({"head": {"char_bits": 8, "word_bits": 8, "width": 4, "hidden": 6}, "minors": 0.9,
                           "limits": {name: {"flag": 0.9, "block": 0.95} for name in HEADS}})
    actions = {}
    for kind, spelling in (("known", Spelling.build(COUNTS)), ("none", Spelling.build({}))):
        words = WordFilter.build(["the"], 2**10)
        lexicon = Lexicon.build([], words, 2**10)
        tensors = tensors_of(PromptHead(CONFIG, weights), lexicon, lexicon, spelling)
        if kind == "none":
            tensors = {name: value for name, value in tensors.items() if not name.startswith("spelling")}
        save_file(tensors, tmp_path / f"{kind}.safetensors",
                  {"format": FORMAT, "settings": settings, "sha256": content_hash(tensors, settings)})
        gate = PromptGate(load_artefact(tmp_path / f"{kind}.safetensors"))
        actions[kind] = [gate.check(text).action for text in ("lantern", "lanturn", "lanternq", "redlantern", "boat")]
    assert actions == {"known": ["block"] * 4 + ["allow"], "none": ["block"] + ["allow"] * 4}
