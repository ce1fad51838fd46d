"""Reading text in several ways, and finding listed terms in it; the lexicon is made up."""
import random
import time
import unicodedata
import zlib

import numpy as np
import pytest

from safety.disguises import neighbours
from safety.keywords import (
    BLOCK,
    FLAG,
    SIGNAL,
    Lexicon,
    Term,
    WordFilter,
    masked_forms,
    misspelt_codes,
    misspelt_forms,
)
from safety.lookalikes import LOOKALIKES
from safety.normalize import LONGEST, MOST_DISGUISED, TextError, fold, normalize, with_spaces_for_signs

WORDS = ["a", "red", "star", "photo", "of", "the", "little", "balloon", "letter", "flumquater", "zorbicide", "crossing",
         "pushing", "committee", "gravel", "over"]
TERMS = [Term("zorbic", 0, BLOCK), Term("flumquat", 1, BLOCK), Term("gravelnax", 2, BLOCK), Term("blib", 2, BLOCK),
         Term("mildo", 4, FLAG), Term("signo", 0, SIGNAL), Term("grumple snatch", 0, BLOCK)]


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.build(TERMS, WordFilter.build(WORDS, 2**12), 2**16)


def found(lexicon: Lexicon, text: str) -> set[tuple[int, int]]:
    return {(match.category, match.level) for match in lexicon.matches(normalize(text, lexicon.is_word))}


# ---- normalisation, step by step

@pytest.mark.parametrize("text, expected, notes", [
    ("A RED Star", "a red star", ()),
    ("r\u00ade\u200bd", "red", ("invisible",)),
    ("\u202ered", "red", ("direction", "invisible")),
    ("\uff32\uff25\uff24", "red", ()),                                   # full width
    ("\U0001d5cb\U0001d5be\U0001d5bd", "red", ()),                       # mathematical letters
    ("r\u0301e\u0327\u0308d\u20dd", "red", ()),                          # marks, also enclosing ones
    ("r\u0435d", "red", ("lookalike",)),                                 # one Cyrillic letter in a Latin word
    ("\u0440\u0435\u0434\u0430\u043a\u0442", "\u0440\u0435\u0434\u0430\u043a\u0442", ()),  # a Russian word stays
    ("(red:1.3) [star] {a|b}", "red star a|b", ()),
    ("red <lora:some_style:0.8> star", "red some_style star", ()),
    ("stra\u00dfe", "strasse", ()),
    ("caf\u00e9", "cafe", ()),
    ("re\udc80d", "re\udc80d", ()),
])
def test_folding(text, expected, notes):
    assert fold(text) == (expected, notes)


def test_folding_is_stable():
    for text in ("R\u0435D (star:1.2)", "\uff32\u0301ed", "plain words"):
        once = fold(text)[0]
        assert fold(once)[0] == once


def test_lookalikes_are_letters_that_nothing_else_folds():
    seen: set[str] = set()
    for letter, likes in LOOKALIKES.items():
        assert len(letter) == 1 and "a" <= letter <= "z" and not seen & set(likes)
        seen |= set(likes)
        for like in likes:
            plain = "".join(c for c in unicodedata.normalize("NFKD", like).casefold() if not unicodedata.combining(c))
            assert not plain.isascii(), f"U+{ord(like):04X} is {plain} without the table"


@pytest.mark.parametrize("text", [None, 3, b"red", ["red"], "a" * (LONGEST + 1), "e" + "\u0301" * 100_000])
def test_what_is_no_text_or_too_long_is_refused(text):
    with pytest.raises(TextError):
        normalize(text)


def test_expansion_is_capped():
    with pytest.raises(TextError, match="written out"):  # to cut the text would be to read less than the model does
        fold("\ufdfa" * 112 + " zorbic")  # a ligature of 18 letters
    assert len(fold("\ufdfa" * 100)[0]) == 1800


# ---- terms

@pytest.mark.parametrize("text", [
    "zorbic", "a photo of zorbic", "ZORBIC!", "z0rb1c", "z.o.r.b.i.c", "z o r b i c", "z-o-r-b-i-c", "zoorbiiic",
    "zzzorbic", "grumple sn@tch", "gr*mple snatch", "g r u m p l e s n a t c h", "grrumplle snaatch", "grumplesnatch",
    "z*rbic", "zo**ic", "zor#ic", "z\u200borbic", "z\u043erbic", "z\u0301orbic", "\uff5a\uff4f\uff52\uff42\uff49\uff43",
    "\u24e9\u24de\u24e1\u24d1\u24d8\u24d2", "(zor)bic", "(zorbic:1.4)", "[zorbic|star]", "zor bic", "zo rbic", "cibroz",
    "superzorbical", "star,zorbic,red", "z_o_r_b_i_c", "zorb!c", "zor\u0431ic", "zorbics", "\U0001f1ff\U0001f1f4rbic",
    "grump|e snatch", "z.o.r|zorbic", "g r u m p l e 5natch", "gr*mple s.n.a.t.c.h",
    "gruuumple s n a t c h", "elpmurg hctans",
    "." * 64 + "z0rbic", "a-red-star-" * 6 + "z0rbic", "red,z0rb1c", "red/z0rb!c",
    "<lora:zorbic:1>", "<lora:my_z0rbic:1>", "@letter zorbic", "zorbic@", "red;z.o.r.b.i.c",
    "z\u1d0fr\u0299\u026a\u1d04", "zo\u2028rbic", "{zorbic}", "z'orbic", "zorbic's",
])
def test_a_term_is_found_in_disguise(lexicon, text):
    assert (0, BLOCK) in found(lexicon, text)


@pytest.mark.parametrize("word", [
    "zrbic", "orbic", "zorbi", "zorbiic", "zorbaic", "azorbic", "zorbicx", "zorpic", "qorbic", "zorbik", "zrobic",
    "zorbci", "grvelnax", "gravelnxa"])
def test_one_wrong_letter_of_a_term_of_six_letters_is_read(lexicon, word):
    assert {level for _, level in found(lexicon, f"a photo of {word}")} == {BLOCK}


@pytest.mark.parametrize("word", ["zrbi", "zobricc", "mirdo", "blab", "zorbide", "zorbicide", "gravel", "zobic"])
def test_two_wrong_letters_short_terms_and_words_of_the_dictionary_are_not(word):
    words = WordFilter.build([*WORDS, "zorbide", "zobic"], 2**12)
    assert found(Lexicon.build(TERMS, words, 2**16), f"a photo of {word}") == set()


def test_codes_of_misspelt_forms_are_theirs():
    for word in ("a", "zo", "zorbic", "abcdefghijk"):
        assert misspelt_codes(word.encode()) == [zlib.crc32(form.encode()) for form in misspelt_forms(word)]


def test_keys_are_looked_up_in_their_order(lexicon):
    with pytest.raises(ValueError, match="sorted"):
        Lexicon(lexicon.keys[::-1].copy(), lexicon.categories, lexicon.levels, lexicon.inside, lexicon.bitmap,
                lexicon.words)


@pytest.mark.parametrize("text", [
    "a red star", "flumquater crossing", "zorbicide", "little balloon letter", "over gravel", "committee pushing",
    "a.b.c.d", "3d 4k 8k f/1.8 35mm", "star*red", "grumple", "snatch", "zor", "bic", "b l i", "bl",
    "", "   ", "\U0001f600", "\udc80", "!!!", "*" * 50, "a " * 500, "red|blue", "1998", "2024 2025", "||||",
    "l1ttle ball00n", "l.i.t.t.l.e",
])
def test_harmless_text_is_not(lexicon, text):
    assert found(lexicon, text) == set()


@pytest.mark.parametrize("text, expected", [
    ("a(red)star", "a red star"), ("a\u200bred\u200bstar", "a red star"), ("a'red'star", "a red star"),
    (r"a\(red\)star", "a red star"), ("(red:1.3) star", " red  star"), ("a red star", None), ("a star's edge", None)])
def test_words_as_a_tokenizer_parts_them(text, expected):
    assert with_spaces_for_signs(text) == expected


def test_a_short_term_counts_alone_only(lexicon):
    assert found(lexicon, "blib") == {(2, BLOCK)} and found(lexicon, "oblibate") == set()


def test_terms_of_several_words_and_lower_levels(lexicon):
    assert found(lexicon, "the grumple-snatch") == {(0, BLOCK)}
    assert found(lexicon, "mildo") == {(4, FLAG)} and found(lexicon, "signo") == {(0, SIGNAL)}
    assert found(lexicon, "m1ldo") == set()  # bold readings find blocking terms only


def test_nothing_in_the_lexicon_can_be_read(lexicon):
    data = b"".join(getattr(lexicon, name).tobytes() for name in ("keys", "categories", "levels", "bitmap"))
    assert not any(term.text.encode() in data for term in TERMS)


def test_masked_forms():
    assert set(masked_forms("blib")) == {"b*ib", "bl*b", "b**b"}
    assert set(masked_forms("bli")) == set()


def test_word_filter_has_its_words_and_few_others():
    random.seed(0)
    words = {"".join(random.choices("abcdefghij", k=8)) for _ in range(5000)}
    others = {"".join(random.choices("klmnopqrst", k=8)) for _ in range(5000)}
    kept = WordFilter.build(words, 2**14)  # 26 bits a word
    assert all(word in kept for word in words)
    assert sum(word in kept for word in others) / len(others) < 0.005


def test_word_filter_refuses_what_it_cannot_index():
    with pytest.raises(ValueError, match="power of two"):
        WordFilter(np.zeros(1000, np.uint8))


# ---- hostile text

def test_random_text_is_read_and_work_grows_linearly(lexicon):
    generator = random.Random(1)
    for _ in range(2000):
        data = bytes(generator.randrange(256) for _ in range(generator.randrange(80)))
        for text in (data.decode("utf-8", "surrogateescape"), (data + data).decode("utf-16-le", "surrogatepass")):
            lexicon.matches(normalize(text, lexicon.is_word))


@pytest.mark.parametrize("piece", ["z.", "flumq", "zorbi", "e\u0301\u0301", "a b ", ":1", "(a:1.2) ", "1!",
                                   "\u0591\u05b0", "x" * 40 + " "])
def test_the_number_of_readings_is_linear(lexicon, piece):
    half, whole = (normalize((piece * LONGEST)[:size]) for size in (LONGEST // 2, LONGEST))
    assert len(whole.readings) <= 2 * len(half.readings) + 50
    assert sum(len(reading.text) for reading in whole.readings) < 40 * LONGEST
    lexicon.matches(whole)


def test_a_wall_of_disguised_words_is_refused(lexicon):
    """Each has many readings. Words of the dictionary with double letters are none, however many there are."""
    for piece in ("a*b ", "aab ", "qu-ik "):
        few = normalize(piece * MOST_DISGUISED)
        assert len(few.readings) < 60 * MOST_DISGUISED and len(lexicon.matches(few)) == 0
        with pytest.raises(TextError, match=f"{MOST_DISGUISED + 1} words .*valid: up to {MOST_DISGUISED}"):
            normalize(piece * (MOST_DISGUISED + 1))
    assert normalize("green tree " * 150, {"green", "tree"}.__contains__).plain.count("green") == 150


def test_nothing_takes_seconds(lexicon):
    """A bound that only quadratic work or worse would break, a hundred times above what it takes."""
    began = time.perf_counter()
    for piece in ("a*b ", "zorbi", "\u0591\u05b0", "a.b"):
        lexicon.matches(normalize((piece * MOST_DISGUISED)[:LONGEST], lexicon.is_word))
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b"], list("abcdefg")])
def test_neighbours_are_those_of_a_plain_loop(words):
    expected = [["".join(words[i:i + size]) for i in range(len(words) - size + 1)] for size in (2, 3, 4)]
    assert list(neighbours(words, lambda a, b: a + b)) == expected
