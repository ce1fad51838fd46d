"""The text encoder equals transformers' CLIP text model from the same weights, and ignores padding."""

from dataclasses import replace

import pytest
import torch
from random_weights import randomize

from model.pretrained.names import text_encoder_from_transformers, text_encoder_to_transformers
from model.text_encoder import TextEncoder, TextEncoderConfig, end_token_state
from training.muon import matrices_and_others

transformers = pytest.importorskip("transformers")

CASES = {
    "clip": TextEncoderConfig(vocab_size=99, length=12, width=32, layers=3, heads=4, mlp_width=128,
                              activation="quick_gelu"),
    "openclip": TextEncoderConfig(vocab_size=99, length=12, width=48, layers=2, heads=3, mlp_width=64,
                                  activation="gelu"),
    "penultimate": TextEncoderConfig(vocab_size=99, length=12, width=30, layers=3, heads=2, mlp_width=50,
                                     activation="gelu", skip_last=1),
    "one layer": TextEncoderConfig(vocab_size=99, length=12, width=21, layers=1, heads=1, mlp_width=17,
                                   activation="quick_gelu"),
    "deep": TextEncoderConfig(vocab_size=99, length=12, width=24, layers=7, heads=8, mlp_width=30),
    "third from the end": TextEncoderConfig(vocab_size=99, length=12, width=27, layers=5, heads=3, mlp_width=108,
                                            activation="quick_gelu", skip_last=2),
}
END = 98  # the largest id


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks left at their initial weights have the same ones in every run."""
    torch.manual_seed(0)


def prompts(lengths=(12, 5, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (B, 12): random tokens, the end token, then padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, END, (len(lengths), 12), generator=generator)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        ids[row, length - 1] = END
    return ids.where(mask, 0), mask


def reference_encoder(config: TextEncoderConfig) -> torch.nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=config.length,
        hidden_act=config.activation, bos_token_id=0, eos_token_id=END,
    ))


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(ours, transformers') with the same weights."""
    config = CASES[request.param]
    theirs = randomize(reference_encoder(config)).eval()
    ours = TextEncoder(config).eval()
    ours.load_state_dict(text_encoder_from_transformers(theirs.state_dict(), config))
    return ours, theirs


def encoder(causal: bool) -> TextEncoder:
    config = TextEncoderConfig(**{**CASES["openclip"].__dict__, "causal": causal})
    return randomize(TextEncoder(config)).eval()


def earlier_state(theirs: torch.nn.Module, result, skipped: int) -> torch.Tensor:
    """What transformers gives when the last layers are left out, normalised as in SD-2.x."""
    norm = theirs.text_model.final_layer_norm if hasattr(theirs, "text_model") else theirs.final_layer_norm
    return norm(result.hidden_states[-1 - skipped])


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_states_equal_transformers(pair, masked):
    ours, theirs = pair
    ids, mask = prompts()
    result = theirs(ids, attention_mask=mask.long() if masked else None, output_hidden_states=True)
    expected = result.last_hidden_state
    if ours.config.skip_last:
        expected = earlier_state(theirs, result, ours.config.skip_last)
    context = ours(ids, mask if masked else None)
    assert (context - expected).abs().max() <= 1e-5 * expected.std()
    if not ours.config.skip_last:
        assert (end_token_state(context, mask) - result.pooler_output).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_transformers(pair, masked):
    """Of every parameter; padding is masked, and takes no part in the loss."""
    ours, theirs = pair
    ids, mask = prompts()
    weights = torch.randn(3, 12, ours.config.width, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    ours.zero_grad(), theirs.zero_grad()
    (ours(ids, mask if masked else None) * weights).sum().backward()
    result = theirs(ids, attention_mask=mask.long() if masked else None, output_hidden_states=True)
    skipped = ours.config.skip_last
    states = earlier_state(theirs, result, skipped) if skipped else result.last_hidden_state
    (states * weights).sum().backward()
    expected = text_encoder_from_transformers(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}, ours.config)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # of layers that are not run
        # a bias of keys has no gradient but rounding, hence the second term
        assert (mine - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-6 * scale, name


@pytest.mark.parametrize("causal", [False, True])
def test_states_and_gradients_equal_the_encoder_of_pytorch(causal):
    """Also where every token sees all others, which transformers' CLIP cannot do."""
    ours, mask = encoder(causal), prompts()[1]
    c = ours.config
    layer = torch.nn.TransformerEncoderLayer(c.width, c.heads, c.mlp_width, dropout=0.0, activation="gelu",
                                             batch_first=True, norm_first=True)
    theirs = torch.nn.TransformerEncoder(layer, c.layers, torch.nn.LayerNorm(c.width), enable_nested_tensor=False)
    renames = (("attention.qkv.", "self_attn.in_proj_"), ("attention.out.", "self_attn.out_proj."),
               ("norm_out.", "norm."))
    state = ours.state_dict()
    for mine, other in renames:
        state = {name.replace(mine, other): tensor for name, tensor in state.items()}
    theirs.load_state_dict({name: tensor for name, tensor in state.items() if "embedding" not in name})
    tokens = torch.randn(3, 12, c.width, generator=torch.Generator().manual_seed(2))
    leaves = [tokens.clone().requires_grad_() for _ in range(2)]
    future = torch.ones(12, 12, dtype=torch.bool).triu(1) if causal else None
    position = ours.position_embedding.weight.detach()
    states = [ours.encode_embeddings(leaves[0], mask),
              theirs(leaves[1] + position, mask=future, src_key_padding_mask=~mask)]
    for one in states:
        one[mask].square().sum().backward()
    assert (states[0] - states[1])[mask].abs().max() <= 1e-5 * states[1][mask].std()
    assert (leaves[0].grad - leaves[1].grad).abs().max() <= 1e-5 * leaves[1].grad.abs().max()


def test_weights_go_to_transformers_and_back_unchanged(pair):
    ours, theirs = pair
    original = {name.removeprefix("text_model."): tensor for name, tensor in theirs.state_dict().items()}
    exported = text_encoder_to_transformers(ours.state_dict(), ours.config)
    assert exported.keys() == original.keys() - {"embeddings.position_ids"}
    assert all(torch.equal(exported[name], original[name]) for name in exported)


def test_older_names_are_read():
    config = CASES["clip"]
    state = text_encoder_to_transformers(TextEncoder(config).state_dict(), config)
    old = {f"text_model.{name}": tensor for name, tensor in state.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    read = text_encoder_from_transformers(old, config)
    assert all(torch.equal(read[name], t) for name, t in text_encoder_from_transformers(state, config).items())


def test_weights_that_do_not_fit_are_named():
    config = CASES["clip"]
    state = text_encoder_to_transformers(TextEncoder(config).state_dict(), config)
    del state["encoder.layers.2.self_attn.k_proj.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        text_encoder_from_transformers(state, config)
    assert str(error.value) == "weights: missing: encoder.layers.2.self_attn.k_proj.bias; unexpected: extra"


@pytest.mark.parametrize("config, count", [
    (TextEncoderConfig.clip_l(), 123_060_480),
    (TextEncoderConfig.sd2(), 340_387_840),
    (TextEncoderConfig.openclip_h(), 352_984_064),
])
def test_published_sizes(config, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in TextEncoder(config).parameters()) == count


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_padded_tokens_change_no_real_token(causal):
    network, (ids, mask) = encoder(causal), prompts()
    changed = ids.where(mask, 55)
    assert torch.equal(network(ids, mask)[mask], network(changed, mask)[mask])
    assert torch.equal(network(ids)[mask], network(changed)[mask]) is causal  # without the mask only causality helps


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_prompt_is_the_short_prompt(causal):
    network, (ids, mask) = encoder(causal), prompts()
    torch.testing.assert_close(network(ids, mask)[1, :5], network(ids[1:2, :5])[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_causal_tokens_see_no_later_token():
    ids, _ = prompts()
    changed = ids.clone()
    changed[:, 7] = 42
    causal, bidirectional = ((n(ids) != n(changed)).any(dim=-1).any(dim=0) for n in (encoder(True), encoder(False)))
    assert not causal[:7].any() and causal[7:].all()
    assert bidirectional.all()


@torch.no_grad()
def test_padding_on_the_left_stays_finite():
    ids, mask = prompts()
    states = encoder(causal=True)(ids.flip(1), mask.flip(1))
    assert states.isfinite().all()


@torch.no_grad()
def test_embeddings_of_tokens_give_what_the_tokens_give():
    network, (ids, mask) = encoder(causal=True), prompts()
    assert torch.equal(network.encode_embeddings(network.token_embedding(ids), mask), network(ids, mask))


def test_gradient_checkpointing_changes_no_bit_and_saves_less():
    ids, mask = prompts()
    results, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = TextEncoder(replace(CASES["deep"], gradient_checkpointing=checkpointing))
        held = {}

        def keep(tensor):
            held[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = encoder(ids, mask)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in encoder.parameters())])
        kept.append(sum(held.values()))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_pooled_takes_the_last_real_token():
    context, mask = torch.arange(24.0).view(2, 4, 3), torch.tensor([[True, True, False, False], [True] * 4])
    assert torch.equal(end_token_state(context, mask), torch.stack([context[0, 1], context[1, 3]]))
    with pytest.raises(ValueError, match=r"mask: \(2, 3\); valid: \(2, 4\)"):
        end_token_state(context, mask[:, :3])


def encoder_with_neighbours(causal: bool, reach: int = 2) -> TextEncoder:
    """An encoder whose tokens are given their neighbours."""
    return TextEncoder(replace(CASES["openclip"], causal=causal, token_conv=reach))


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_token_conv_gives_a_token_its_neighbours_and_no_padding(causal):
    network, (ids, mask) = encoder_with_neighbours(causal).eval(), prompts()
    x = torch.randn(1, 12, 48)
    moved = x.clone()
    moved[0, 6] += 1.0
    change = (network.token_conv(moved) - network.token_conv(x))[0].norm(dim=1)  # (L,)
    near = range(6, 9) if causal else range(4, 9)
    assert [place for place in range(12) if change[place] > 1e-4] == list(near)
    assert change[7] > change[8] > 0  # what is nearer is heard better
    short = network(ids[1:2, :5], mask[1:2, :5])
    torch.testing.assert_close(network(ids, mask)[1:2, :5], short, atol=1e-5, rtol=0)
    torch.testing.assert_close(network(ids.where(mask, 7), mask)[mask], network(ids, mask)[mask], atol=0, rtol=0)


@torch.no_grad()
def test_token_conv_makes_a_word_depend_on_the_word_before_it():
    """Of "red square" and "blue square" the contexts of "square" are apart when training begins."""
    def moved(network: TextEncoder) -> float:
        one, other = (network(torch.tensor([[1, colour, 5, 2]]))[0, 2] for colour in (3, 4))
        return float((one - other).norm() / one.norm())

    config = replace(CASES["openclip"], causal=False, token_std=1.0, position_std=0.3)
    with_neighbours, without = (moved(TextEncoder(replace(config, token_conv=reach))) for reach in (2, 0))
    assert with_neighbours > 0.3 and with_neighbours > 1.5 * without


def test_token_conv_is_stepped_as_gains():
    """Muon would make a table of numbers, each of which scales one channel, orthogonal."""
    network = encoder_with_neighbours(causal=True)
    matrices, others = matrices_and_others(network)
    assert any(p is network.token_conv.gains for p in others) and len(network.token_conv.gains) == 3 * 48
    assert not network.token_conv.gains.view(3, 48)[-1].any()  # the token itself comes through beside it


def test_embeddings_start_at_their_configured_size_and_clips_otherwise():
    config = replace(CASES["clip"], vocab_size=4000, length=200)
    for settings, token, position in (({}, 0.02, 0.01), ({"token_std": 1.0, "position_std": 0.3}, 1.0, 0.3)):
        network = TextEncoder(replace(config, **settings))
        assert float(network.token_embedding.weight.detach().std()) == pytest.approx(token, rel=0.05)
        assert float(network.position_embedding.weight.detach().std()) == pytest.approx(position, rel=0.05)


def test_states_have_unit_size_at_initialisation_whatever_the_depth():
    ids, mask = prompts()
    for layers in (1, 12):
        config = TextEncoderConfig(**{**CASES["openclip"].__dict__, "layers": layers})
        states = TextEncoder(config)(ids, mask)
        assert 0.8 < states.std() < 1.2 and len(states.flatten(0, 1).unique(dim=0)) > 20  # tokens tell apart


@pytest.mark.parametrize("change, message", [
    ({"heads": 5}, "width: 48 does not divide into 5 heads"),
    ({"skip_last": 2}, "skip_last: 2; valid: 0 to layers - 1 = 1"),
    ({"activation": "relu"}, "activation: 'relu'; valid: 'quick_gelu', 'gelu'"),
    ({"length": 0}, "length: 0; valid: at least 1"),
    ({"token_std": 0.0}, "token_std: 0.0; valid: above 0"),
    ({"token_conv": 12}, "token_conv: 12; valid: 0 to length - 1 = 11"),
])
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TextEncoderConfig(**{**CASES["openclip"].__dict__, **change})


def test_wrong_inputs_are_refused():
    network, (ids, mask) = encoder(causal=True), prompts()
    with pytest.raises(ValueError, match=r"ids: \(3, 24\); valid: \(B, L\), L from 1 to 12"):
        network(torch.cat([ids, ids], dim=1))
    with pytest.raises(ValueError, match=r"mask: torch.bool \(3, 11\); valid: torch.bool \(3, 12\)"):
        network(ids, mask[:, 1:])
