"""Adapters and learned tokens against diffusers, PEFT and their own formats, on a small random pipeline."""
from copy import deepcopy

import pytest
import torch
from random_weights import randomize
from safetensors.torch import load_file, save_file

from model.lora import AdapterConfig, Stack, new_adapter
from model.pretrained.adapters import networks_of, read_adapter, write_adapter
from model.pretrained.card import Card
from model.pretrained.embeddings import write_embeddings
from model.pretrained.names import unet_from_diffusers
from pipeline.loading import load_pretrained
from pipeline.personal import Personal

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
from test_pretrained import KINDS, PROMPTS, difference, ours, published, theirs  # noqa: E402

pytestmark = pytest.mark.slow
LEVEL = 0.02  # of 255, as for pipelines without adapters; 1 is asked for
ALL = ("attention", "feed_forward", "projection", "convolution", "time")
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
        "conv_shortcut", "conv_in", "conv_out", "time_emb_proj", "linear_1", "linear_2", "downsamplers.0.conv",
        "upsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours read from its folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = published(folder, request.param)
    return pipeline, load_pretrained(folder / "pipeline")


def with_adapter(system, path, scale=1.0):
    """Images of ours with the adapter in a file."""
    networks = networks_of(system.unet, system.text_encoder)
    adapter, _ = read_adapter(path, system.unet, system.text_encoder)
    with Stack(networks) as stack:
        stack.set([(adapter, scale)])
        return ours(system)


def with_parts(pipeline, **parts):
    """The pipeline with other networks."""
    return diffusers.StableDiffusionPipeline(**{**pipeline.components, **parts}, requires_safety_checker=False)


def trained(system, decompose=False, text=True):
    torch.manual_seed(1)
    adapter = new_adapter(networks_of(system.unet, system.text_encoder),
                          AdapterConfig("lora", decompose, 4, 3.0, ALL, text))
    for parameter in adapter.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return adapter


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_lora_of_ours_in_diffusers(pair, layout, tmp_path):
    pipeline, system = pair
    plain = theirs(pipeline, 16, 16)
    write_adapter(tmp_path / "a.safetensors", trained(system), Card(), layout)
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="ours")
    try:
        for scale in (1.0, 0.4):
            pipeline.set_adapters("ours", scale)
            images = theirs(pipeline, 16, 16)
            assert abs(images - plain).max() > 20
            assert difference(with_adapter(system, tmp_path / "a.safetensors", scale), images) < LEVEL
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_of_diffusers_in_ours(pair, layout, tmp_path):
    """Made by PEFT on every kind of layer, saved by diffusers; and its tensors under kohya's names."""
    pipeline, system = pair
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    unet = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=UNET, **settings), deepcopy(pipeline.unet))
    text = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TEXT, **settings),
                                        deepcopy(pipeline.text_encoder))
    for name, parameter in [*unet.named_parameters(), *text.named_parameters()]:
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    images = theirs(with_parts(pipeline, unet=unet, text_encoder=text), 16, 16)
    assert abs(images - theirs(pipeline, 16, 16)).max() > 20
    pipeline.save_lora_weights(
        tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(unet),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict())
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if layout == "kohya":
        tensors = {}
        for key, tensor in load_file(path).items():
            network, _, name = key.partition(".")
            name = name.removeprefix("text_model.")
            prefix = "lora_unet_" if network == "unet" else "lora_te_text_model_"
            stem, _, end = name.rpartition(".lora_")
            tensors[f"{prefix}{stem.replace('.', '_')}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = tensor
            tensors[f"{prefix}{stem.replace('.', '_')}.alpha"] = torch.tensor(6.0)
        path = tmp_path / "kohya.safetensors"
        save_file(tensors, path)
    assert difference(with_adapter(system, path), images) < LEVEL


def test_a_dora_of_diffusers_in_ours_and_back(pair, tmp_path):
    """On the UNet alone: the names under which diffusers hands magnitudes of text encoders on are refused by recent
    versions of transformers."""
    pipeline, system = pair
    torch.manual_seed(3)
    layers = [layer for layer in UNET if "conv" not in layer]
    unet = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=layers, r=4, lora_alpha=4, use_dora=True,
                                                        init_lora_weights=False), deepcopy(pipeline.unet))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data + 0.1 * torch.rand(parameter.shape)
    images = theirs(with_parts(pipeline, unet=unet), 16, 16)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(unet))
    assert any("magnitude" in key for key in load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert difference(with_adapter(system, tmp_path / "pytorch_lora_weights.safetensors"), images) < LEVEL
    adapter = trained(system, decompose=True, text=False)
    write_adapter(tmp_path / "a.safetensors", adapter, Card(), "peft")
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="ours")
    try:
        assert difference(with_adapter(system, tmp_path / "a.safetensors"), theirs(pipeline, 16, 16)) < LEVEL
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
@pytest.mark.parametrize("effective", [False, True])
def test_products_of_peft(pair, kind, effective, tmp_path):
    """LoHa and LoKr of PEFT on a UNet, convolutions with and without a core, against its own output."""
    _, system = pair
    torch.manual_seed(4)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=system.config.unet.heads or [32 // 16, 64 // 16],
        use_linear_projection=system.config.unet.linear_projection)
    randomize(unet)
    state = unet_from_diffusers(unet.state_dict(), system.config.unet)
    kept = {name: tensor.clone() for name, tensor in system.unet.state_dict().items()}
    config = getattr(peft, f"{kind}Config")(r=3, alpha=2, target_modules=UNET, init_weights=False,
                                            use_effective_conv2d=effective)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 7, 32)
    try:
        system.unet.load_state_dict(state)
        with torch.no_grad():
            plain = system.unet(x, t, context)
            model = peft.get_peft_model(unet, config)
            for name, parameter in model.named_parameters():
                if "hada_" in name or "lokr_" in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape)
            expected = model(x, t, context).sample
            model.save_pretrained(tmp_path)
            adapter, _ = read_adapter(tmp_path / "adapter_model.safetensors", system.unet, system.text_encoder)
            with Stack(networks_of(system.unet, system.text_encoder)) as stack:
                stack.set([(adapter, 1.0)])
                found = system.unet(x, t, context)
    finally:
        system.unet.load_state_dict(kept)
    assert (expected - plain).abs().max() > 0.1 * plain.std()
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.std()), rtol=1e-4)


def test_learned_tokens_in_diffusers(pair, tmp_path, monkeypatch):
    """Two vectors for one word, as diffusers reads the file that is written here."""
    pipeline, system = pair
    torch.manual_seed(5)
    write_embeddings(tmp_path / "cat.safetensors", {"<cat>": torch.randn(2, 32)}, Card())
    prompts = ["a <cat> above two blue circles", PROMPTS[1]]
    monkeypatch.setitem(theirs.__globals__, "PROMPTS", prompts)
    plain = ours(system)
    personal = Personal(system, embeddings=[tmp_path / "cat.safetensors"])
    try:
        images = ours(system)
    finally:
        personal.remove()
    assert (ours(system) == plain).all() and abs(images - plain).max() > 5
    pipeline.load_textual_inversion(tmp_path / "cat.safetensors")
    try:
        assert difference(images, theirs(pipeline, 16, 16)) < LEVEL
    finally:
        pipeline.unload_textual_inversion()
