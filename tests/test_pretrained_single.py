"""Single files of Stable Diffusion: the names are those that diffusers' own converters read, and nothing is lost."""

import pickle
from pathlib import Path

import pytest
import torch
from clip_vocabulary import write_vocabulary
from random_weights import randomize
from safetensors.torch import save_file

from model.autoencoder import SD_LATENT_STD, Autoencoder, AutoencoderConfig
from model.pretrained.config import autoencoder_json, unet_json
from model.pretrained.names import (
    autoencoder_to_diffusers,
    text_encoder_to_transformers,
    to_theirs,
    unet_to_diffusers,
    with_latent_scale,
)
from model.pretrained.single_file import OPENCLIP_TABLE, autoencoder_table, read_single_file, unet_table
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig
from pipeline.loading import load_pretrained
from pipeline.system import with_options

converters = pytest.importorskip("diffusers.loaders.single_file_utils")

VAE = AutoencoderConfig(channels=(32, 64, 64), blocks=1)
UNETS = {
    "1.x": UNetConfig(channels=(32, 64, 96), attention=(True, True, False), heads=8, context_width=64,
                      linear_projection=False),
    "2.x": UNetConfig(channels=(64, 128), attention=(True, False), blocks=1, depth=2, context_width=128),
}
TEXTS = {
    "1.x": TextEncoderConfig(vocab_size=700, length=16, width=64, layers=2, heads=1, mlp_width=96,
                             activation="quick_gelu"),
    "2.x": TextEncoderConfig(vocab_size=700, length=16, width=128, layers=2, heads=2, mlp_width=96),
}


def networks(kind: str) -> dict[str, torch.nn.Module]:
    parts = {"unet": UNet(UNETS[kind]), "autoencoder": Autoencoder(VAE), "text_encoder": TextEncoder(TEXTS[kind])}
    return {name: randomize(part, seed).eval() for seed, (name, part) in enumerate(parts.items())}


def single_state(parts: dict[str, torch.nn.Module], kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a single file that holds these networks, and what else such files hold."""
    vae = {name: tensor for name, tensor in parts["autoencoder"].state_dict().items() if "latent_" not in name}
    state = to_theirs(vae, Autoencoder, VAE, autoencoder_table(VAE))
    state = {name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
             for name, tensor in state.items()}
    state |= to_theirs(parts["unet"].state_dict(), UNet, UNETS[kind], unet_table(UNETS[kind]))
    text, shape = parts["text_encoder"].state_dict(), TEXTS[kind]
    if kind == "1.x":
        text = text_encoder_to_transformers(text, shape)
        prefix = "cond_stage_model.transformer.text_model."
        state |= {prefix + name: tensor for name, tensor in text.items()}
        state[prefix + "embeddings.position_ids"] = torch.arange(16)[None]
    else:
        text = to_theirs(text, TextEncoder, shape, OPENCLIP_TABLE)
        last = {name.replace("resblocks.1.", "resblocks.2."): torch.ones_like(tensor)
                for name, tensor in text.items() if "resblocks.1." in name}
        state |= {**text, **last, "cond_stage_model.model.text_projection": torch.zeros(128, 128),
                  "cond_stage_model.model.logit_scale": torch.zeros(())}
    state |= {name: torch.zeros(1000) for name in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
                                                   "posterior_mean_coef1", "log_one_minus_alphas_cumprod")}
    state["model_ema.decay"] = torch.zeros(())
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="module", params=UNETS)
def case(request, tmp_path_factory):
    """(kind, networks, the tensors of their single file, the file)."""
    parts, folder = networks(request.param), tmp_path_factory.mktemp("single")
    state = single_state(parts, request.param)
    save_file(state, folder / "model.safetensors")
    write_vocabulary(folder / "tokenizer")
    return request.param, parts, state, folder / "model.safetensors"


def prediction(kind: str) -> str | None:
    return "v_prediction" if kind == "2.x" else None


def assert_same(given: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert given.config == expected.config
    one, two = given.state_dict(), expected.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two if "latent_" not in name)


def test_networks_come_back_bit_for_bit(case):
    kind, parts, _, path = case
    read = read_single_file(path, prediction(kind))
    for name in parts:
        assert_same(getattr(read, name), parts[name])
    assert torch.equal(read.autoencoder.latent_std, torch.full((4,), SD_LATENT_STD))
    assert read.scheduler["prediction_type"] == {"1.x": "epsilon", "2.x": "v_prediction"}[kind]
    assert read.latent_size == {"1.x": (64, 64), "2.x": (96, 96)}[kind]


def test_the_converters_of_diffusers_read_the_same_tensors_under_the_same_names(case):
    """An implementation of the layout that is not ours."""
    kind, parts, state, _ = case
    unet = parts["unet"]
    config = unet_json(unet.config, (64, 64))
    found = converters.convert_ldm_unet_checkpoint(dict(state), config={**config, "class_embed_type": None})
    expected = unet_to_diffusers(unet.state_dict(), unet.config)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    vae = parts["autoencoder"]
    found = converters.convert_ldm_vae_checkpoint(dict(state), config=autoencoder_json(VAE, SD_LATENT_STD, 512))
    expected = autoencoder_to_diffusers(with_latent_scale(vae.state_dict(), VAE, SD_LATENT_STD), VAE)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    text = parts["text_encoder"]
    expected = text_encoder_to_transformers(text.state_dict(), text.config)
    if kind == "1.x":
        found = converters.convert_ldm_clip_checkpoint(dict(state))
    else:
        found = converters.convert_open_clip_checkpoint(text, dict(state))
    found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_of_torch_holds_the_same(case, tmp_path):
    kind, parts, state, _ = case
    torch.save({"state_dict": state, "global_step": 470000, "epoch": 3}, tmp_path / "model.ckpt")
    read = read_single_file(tmp_path / "model.ckpt", prediction(kind))
    for name in parts:
        assert_same(getattr(read, name), parts[name])


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_checkpoint_with_code_is_not_executed(tmp_path):
    path = tmp_path / "model.ckpt"
    for write in (lambda: torch.save({"state_dict": {}, "callbacks": Evil()}, path),
                  lambda: path.write_bytes(pickle.dumps(Evil(), protocol=2)), lambda: path.write_bytes(b"nothing")):
        write()
        with pytest.raises(ValueError, match="ckpt is damaged, or holds more than tensors, which is not") as caught:
            load_pretrained(path)
        assert "\n" not in str(caught.value)


def test_images_are_drawn_and_the_same_from_a_folder_written_from_it(case, tmp_path):
    kind, _, _, path = case
    system = load_pretrained(path, prediction_type=prediction(kind))
    sampling = system.config.sampling
    assert (sampling.sampler, sampling.spacing, sampling.offset, sampling.options) == (
        "pndm", "leading", 1, {"clean_end": False, "extrapolate": "prediction"})
    system.save_pretrained(tmp_path / "folder")
    again = load_pretrained(tmp_path / "folder")
    assert again.config == system.config and system.files == {"single file": path}
    images = []
    for drawer in (system, again):
        drawer.set_size(32, 32)
        images.append(drawer.images(["a red star"], [0], with_options(sampling, steps=3)))
    assert torch.equal(*images) and images[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("change, message", [
    ({"first_stage_model.decoder.conv_out.bias": None}, "missing: first_stage_model.decoder.conv_out.bias"),
    ({"model.diffusion_model.out.2.bias": torch.zeros(5)}, r"misshapen: model.diffusion_model.out.2.bias \(5,\), not"),
    ({"control_model.x": torch.zeros(1), "y": torch.zeros(1)}, "unexpected: control_model.x, y"),
    ({"model.diffusion_model.extra": torch.zeros(1)}, "unexpected: model.diffusion_model.extra"),
    ({"cond_stage_model.transformer.text_model.final_layer_norm.bias": None}, "missing: .*final_layer_norm.bias"),
    ({"conditioner.embedders.0.x": torch.zeros(1)}, r"conditioner.\* is not supported \(SDXL\); valid: Stable Diff"),
    ({"model.diffusion_model.label_emb.0.0.bias": torch.zeros(1)}, "label_emb.* is not supported"),
    ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "unet: in_channels 9 is not supp"),
    ({"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": None}, "is no Stable Diffusion .* it lacks"),
    ({"first_stage_model.encoder.conv_in.weight": None}, "no Stable Diffusion 1.x or 2.x: it lacks 'first_stage"),
    ({"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": None}, "it lacks 'cond_stage"),
])
def test_what_does_not_fit_is_named(tmp_path, change, message):
    state = single_state(networks("1.x"), "1.x")
    for name, tensor in change.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        read_single_file(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


def test_what_a_file_does_not_say_must_be_said(case, tmp_path):
    kind, _, state, path = case
    if kind == "2.x":
        with pytest.raises(ValueError, match="does not say what a 2.x model predicts; valid: prediction type v_pred"):
            load_pretrained(path)
    else:
        save_file(state, tmp_path / "alone.safetensors")
        with pytest.raises(FileNotFoundError, match="tokenizer holds no tokenizer; valid: vocab.json and merges.txt"):
            load_pretrained(tmp_path / "alone.safetensors")
        load_pretrained(tmp_path / "alone.safetensors", tokenizer=Path(path).parent / "tokenizer")
        with pytest.raises(ValueError, match="prediction_type 'x' is not supported"):
            load_pretrained(path, prediction_type="x")
