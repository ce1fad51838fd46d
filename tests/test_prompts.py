"""Prompts: signs mean what is written, weights and chunks reach the network, and without them nothing changes."""
import math

import pytest
import torch
from clip_vocabulary import write_vocabulary

from data.clip_tokenizer import ClipTokenizer
from data.tokenizer import Tokenizer, TokenizerConfig
from diffusion.sampling import SamplingConfig
from model.attention import attention
from model.autoencoder import Autoencoder, AutoencoderConfig
from model.device import freeze
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig
from pipeline.config import SystemConfig
from pipeline.prompts import (
    Prompt,
    alternatives,
    chunks_of,
    join_chunks,
    mix_contexts,
    pad_contexts,
    parse_prompt,
    split_tokens,
    weighted_context,
)
from pipeline.system import TextToImage

LENGTH = 9  # tokens of a context: seven of the prompt
WORDS = "a small red star above two blue circles and the astronaut's horse"


def weight_of(prompt: Prompt, word: str) -> float:
    """The weight of a word that stands in the prompt once, the same on all its letters."""
    start = prompt.text.index(word)
    [weight] = set(prompt.weights[start:start + len(word)])
    return weight


# ---- weights

@pytest.mark.parametrize("text, words, weights", [
    ("a red star", "a red star", {"a": 1, "red": 1}),
    ("a (red:1.3) star", "a red star", {"red": 1.3, "star": 1}),
    ("a (red star)", "a red star", {"a ": 1, "red star": 1.1}),
    ("a ((red)) [star]", "a red star", {"red": 1.21, "star": 1 / 1.1, " ": 1}),
    ("(a (red:2) star:0.5)", "a red star", {"a ": 0.5, "red": 1.0, " star": 0.5}),
    ("(red: .5 ) star", "red star", {"red": 0.5}),
    ("(red:0)", "red", {"red": 0}),
    (r"a \(red\) \[star\] \{b\|c\} 12\:30 \\", r"a (red) [star] {b|c} 12:30 \ ".strip(), {"(red)": 1}),
    ("(a red: star)", "a red: star", {"red: star": 1.1}),
    ("12:30, a | b", "12:30, a | b", {"12:30": 1}),
    (r"C:\new", r"C:\new", {"C": 1}),
    ("", "", {}),
])
def test_signs_become_weights(text, words, weights):
    prompt = parse_prompt(text)
    assert prompt.text == words and len(prompt.weights) == len(words)
    assert {word: weight_of(prompt, word) if word.strip() else 1 for word in weights} == pytest.approx(weights)
    assert prompt.weighted == any(weight != 1 for weight in weights.values())
    assert parse_prompt(text, literal=True) == Prompt(text, (1.0,) * len(text))


@pytest.mark.parametrize("text, message", [
    ("a (star", "'(' is not closed; valid: (word), (word:1.3), [word], or \\("),
    ("a [star", "'[' is not closed"), ("smile :)", "')' at letter 8 closes nothing; valid: \\)"),
    ("a ]", "']' at letter 3 closes nothing"), ("[red:1.3)", "')' at letter 9 closes nothing"),
    ("(red]", "']' at letter 5 closes nothing"), ("(at 12:30)", "weight 30; valid: 0 to 10, or \\:"),
    ("(red:-1)", "weight -1; valid"), ("(" * 60 + "red" + ")" * 60, "valid: 0 to 10"),
])
def test_signs_that_do_not_fit_are_refused(text, message):
    with pytest.raises(ValueError) as caught:
        parse_prompt(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- alternatives

@pytest.mark.parametrize("text, expected", [
    ("a star", ["a star"]), ("", [""]), ("a | b", ["a | b"]),
    ("a {red|blue} {star|moon}", ["a red star", "a red moon", "a blue star", "a blue moon"]),
    ("a {red|{dark|light} blue}", ["a red", "a dark blue", "a light blue"]),
    ("a{| small} star", ["a star", "a small star"]), ("{one}", ["one"]),
    (r"\{a\|b\} {(c:1.2)|\(d}", [r"\{a\|b\} (c:1.2)", r"\{a\|b\} \(d"]),
])
def test_alternatives_are_all_combinations(text, expected):
    assert alternatives(text) == expected


@pytest.mark.parametrize("text, message", [
    ("{a|b", "'{' is not closed"), ("a}", "'}' at letter 2 closes nothing"), ("{a|b}" * 40, "more than 100000")])
def test_alternatives_that_do_not_fit_are_refused(text, message):
    with pytest.raises(ValueError, match="valid") as caught:
        alternatives(text)
    assert message in str(caught.value)


# ---- chunks

@pytest.fixture(scope="module", params=["own", "clip"])
def tokenizer(request, tmp_path_factory):
    """A tokenizer of each kind, reading few tokens."""
    if request.param == "own":
        return Tokenizer.train([WORDS] * 3, TokenizerConfig(vocab_size=400, length=LENGTH))
    return ClipTokenizer.load(write_vocabulary(tmp_path_factory.mktemp("words")), LENGTH)


@pytest.mark.parametrize("text", ["", "a red star", "two blue circles", "a small red star above two", WORDS,
                                  "日本語 🟥 naïve"])
def test_one_chunk_is_what_the_tokenizer_gives(tokenizer, text):
    """Also cut: the last chunk that is permitted is filled to the end."""
    chunks = chunks_of(parse_prompt(text), tokenizer)
    ids, mask = tokenizer.encode([text])
    assert torch.equal(chunks.ids, ids) and torch.equal(chunks.mask[:, :2], mask[:, :2])
    assert chunks.mask.sum() == len(tokenizer.bpe.encode(text, add_special_tokens=False).ids[:LENGTH - 2]) + 2
    assert (chunks.overflow == "") == (tokenizer.overflow(text) == "")


def test_chunks_hold_every_token_once_and_tear_no_word(tokenizer):
    chunks = chunks_of(parse_prompt(WORDS, chunks=9), tokenizer)
    ids = tokenizer.bpe.encode(WORDS, add_special_tokens=False).ids
    rows = [row[shown].tolist() for row, shown in zip(chunks.ids, chunks.mask)]
    assert len(rows) > 1 and chunks.overflow == "" and sum((row[1:-1] for row in rows), []) == ids
    assert all(row[0] == tokenizer.start_id and row[-1] == tokenizer.end_id for row in rows)
    assert (chunks.ids[~chunks.mask] == tokenizer.pad_id).all()
    parts = [word for row in rows for word in tokenizer.decode(torch.tensor([row]))[0].split()]
    assert set(parts) <= {*WORDS.split(), "astronaut", "'s"}


def test_what_does_not_fit_is_said(tokenizer):
    chunks = chunks_of(parse_prompt(WORDS + " and a Dragon", chunks=2), tokenizer)
    assert len(chunks.ids) == 2 and chunks.overflow.endswith("a Dragon")  # as it was written
    assert chunks_of(parse_prompt("a star", chunks=2), tokenizer).overflow == ""


def test_split():
    words = [0, 0, 1, 2, 2, 2, 3]
    assert split_tokens(words, 4, 9) == [(0, 3), (3, 7)]  # word 2 would be torn
    assert split_tokens(words, 4, 1) == [(0, 4)]  # a cut, as the tokenizer cuts
    assert split_tokens(words, 2, 9) == [(0, 2), (2, 3), (3, 5), (5, 7)]  # word 2 is longer than a chunk
    assert split_tokens([], 4, 9) == [(0, 0)] and split_tokens(words, 7, 9) == [(0, 7)]


def test_weights_do_not_change_ids_and_sit_on_their_tokens(tokenizer):
    plain = chunks_of(parse_prompt("a red star above", chunks=2), tokenizer)
    weighted = chunks_of(parse_prompt("a (red:1.5) [star] above", chunks=2), tokenizer)
    assert torch.equal(plain.ids, weighted.ids) and (plain.weights == 1).all()
    by_word = {word: weighted.weights.flatten()[place].item() for place, word in weighted.words.items()}
    assert by_word == pytest.approx({"a": 1, "red": 1.5, "star": 1 / 1.1, "above": 1})


# ---- contexts

def test_weighting_multiplies_and_keeps_the_size():
    context = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1, 1.5, 1, 0.5, 1], [1, 1, 1, 1, 1]])
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    result = weighted_context(context, weights, mask)
    assert torch.equal(result[1], context[1])  # no weight, no change
    ratio = (result[0] / context[0]).mean(dim=1)
    torch.testing.assert_close(result[0], context[0] * ratio[:, None])  # each vector scaled
    torch.testing.assert_close(ratio / ratio[0], weights[0])  # by its weight
    torch.testing.assert_close(result[0][:4].square().sum(), context[0][:4].square().sum())
    far = weighted_context(context - context.mean(), weights)  # where restoring the mean would divide by zero
    assert torch.isfinite(far).all() and (far[0, 1] * (context - context.mean())[0, 1] > 0).all()


def test_joined_hides_the_filling():
    context, mask = torch.arange(24.0).reshape(3, 2, 4), torch.tensor([[True, True], [True, False], [True, True]])
    rows, seen = join_chunks(context, mask, [2, 1])
    assert rows.shape == (2, 4, 4) and seen.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert torch.equal(rows[0], context[:2].flatten(0, 1)) and torch.equal(rows[1, :2], context[2])
    rows, seen = join_chunks(context, None, [2, 1])
    assert seen.tolist() == [[True] * 4, [True, True, False, False]]
    assert join_chunks(context[:2], None, [1, 1]) == (pytest.approx(context[:2]), None)
    assert join_chunks(context.repeat(2, 1, 1)[:4], None, [2, 2])[1] is None


def test_the_way_between_two_prompts_begins_and_ends_at_them():
    """Attention to the repeated context is attention to the context, whatever its length."""
    random = torch.Generator().manual_seed(0)
    a, b, q = (torch.randn(n, 6, generator=random) for n in (4, 6, 3))

    def read(context):
        return attention(q[None, None], context[None, None], context[None, None])

    for weight, end in ((0.0, a), (1.0, b)):
        context = mix_contexts(a, b, weight)
        assert len(context) == math.lcm(4, 6)
        torch.testing.assert_close(read(context), read(end))
    torch.testing.assert_close(mix_contexts(a, a + 2, 0.25), a + 0.5)  # linear
    steps = torch.stack([read(mix_contexts(a, b, k / 8)) for k in range(9)]).diff(dim=0).flatten(1).norm(dim=1)
    assert steps.max() < 3 * steps.mean()  # and without a jump
    assert len(mix_contexts(torch.randn(31, 2), torch.randn(37, 2), 0.5, longest=100)) == 100


def test_padded():
    rows, mask = pad_contexts([torch.ones(2, 3), 2 * torch.ones(4, 3)])
    assert rows.shape == (2, 4, 3) and mask.tolist() == [[True, True, False, False], [True] * 4]
    assert pad_contexts([torch.ones(2, 3)] * 2)[1] is None


# ---- with a text encoder: one trained here and one shaped like CLIP, whose padding is read

@pytest.fixture(scope="module")
def system(tokenizer) -> TextToImage:
    torch.manual_seed(0)
    text = TextEncoderConfig(vocab_size=1000, length=LENGTH, width=16, layers=2, heads=2, mlp_width=32,
                             causal=isinstance(tokenizer, ClipTokenizer))
    unet = UNetConfig(channels=(16, 16), blocks=1, attention=(True, True), head_width=8, context_width=16,
                      norm_groups=4)
    networks = [TextEncoder(text), UNet(unet), Autoencoder(AutoencoderConfig(channels=(8, 8), blocks=1, norm_groups=4))]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
            freeze(network)
    config = SystemConfig(unet, text, sampling=SamplingConfig(steps=2), latent_shape=(4, 4, 4))
    return TextToImage(config, tokenizer, *networks, masked=not isinstance(tokenizer, ClipTokenizer))


@torch.inference_mode()
def test_without_signs_it_is_the_plain_path_bit_for_bit(system):
    texts = ["a red star", "two blue circles above"]
    plain, mask = system.encode(texts)
    context, seen = system.encode([parse_prompt(text, chunks=4) for text in texts])
    assert torch.equal(context, plain) and (seen is None and mask is None or torch.equal(seen, mask))
    context, _ = system.encode([parse_prompt(texts[0]), parse_prompt("two ((blue)) circles above")])
    assert torch.equal(context[0], plain[0]) and not torch.equal(context[1], plain[1])
    long = [parse_prompt(WORDS)]  # one chunk: cut as the plain path cuts
    assert torch.equal(system.encode(long)[0], system.encode([WORDS])[0])


@torch.inference_mode()
def test_chunks_are_encoded_each_for_itself_and_joined(system):
    prompt = parse_prompt(WORDS, chunks=9)
    chunks = chunks_of(prompt, system.tokenizer)
    context, _ = system.encode([prompt])
    assert context.shape == (1, len(chunks.ids) * LENGTH, 16)
    for row, part in enumerate(context[0].split(LENGTH)):
        alone = system.text_encoder(chunks.ids[row:row + 1], chunks.mask[row:row + 1] if system.masked else None)
        torch.testing.assert_close(part, alone[0])


def test_a_long_neighbour_changes_nothing(system):
    """Neither a longer prompt in the batch nor a longer negative one: what is filled up is not seen."""
    short, long = parse_prompt("a red star", chunks=9), parse_prompt(WORDS, chunks=9)
    alone = system.latents([short], [1])
    together = system.latents([short, long], [1, 2])
    torch.testing.assert_close(together[0], alone[0], rtol=0, atol=1e-4)
    assert (system.latents([long], [1]) - alone).abs().max() > 1e-2
    with torch.inference_mode():
        x_t, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
        plain = system.unet(x_t, t, *system.encode([short]))
        context, mask = system.encode([long, short])
        assert mask is not None and not mask[1, LENGTH:].any()
        torch.testing.assert_close(system.unet(x_t, t, context[1:], mask[1:]), plain, rtol=0, atol=1e-5)


def test_weights_and_the_end_of_a_long_prompt_matter(system):
    latents = [system.latents([parse_prompt(text, chunks=9)], [1], negative=parse_prompt("a (circle:2)"))
               for text in ("a red star", "a (red:1.6) star", "a [[[[red]]]] star", WORDS, WORDS + " far away")]
    for k, a in enumerate(latents):
        for b in latents[:k]:
            assert (a - b).abs().max() > 1e-3
