"""Costs without running: operations equal PyTorch's own counter, activations equal what a real run keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model.autoencoder import Autoencoder, AutoencoderConfig
from model.blocks import ResBlock, SpatialTransformer
from model.summary import format_table, main, networks_of, stages_of, summaries, summarize
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[1]
# what PyTorch before 2.15 leaves out of its count; counted by its own formula for the other fused kernels
COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
           lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v)}  # of shapes
AUTOENCODER = AutoencoderConfig(channels=(16, 32), latent_channels=4, blocks=1, norm_groups=8)
TEXT = TextEncoderConfig(vocab_size=99, length=10, width=24, layers=2, heads=2, mlp_width=40)
UNETS = {
    "convolution": UNetConfig(channels=(16, 32), attention=(True, False), head_width=8, context_width=24,
                              linear_projection=False, norm_groups=8, blocks=2),
    "deep": UNetConfig(channels=(16, 24, 32), attention=(False, True, True), heads=4, context_width=24, norm_groups=8,
                       blocks=1, depth=2, qk_norm=True),
}


def real_runs(unet: UNetConfig, size: int):
    """(name, network, call) with weights and numbers, at the sizes that `summaries` takes."""
    torch.manual_seed(0)
    first, text, denoiser = Autoencoder(AUTOENCODER), TextEncoder(TEXT), UNet(unet)
    images, latents = torch.randn(1, 3, size, size), torch.randn(1, 4, size // 2, size // 2)
    context, ids = torch.randn(1, 10, 24), torch.zeros(1, 10, dtype=torch.int64)
    yield "autoencoder", first, lambda: first.decode(first.moments(images).mean)
    yield "text encoder", text, lambda: text(ids)
    yield "denoiser", denoiser, lambda: denoiser(latents, torch.zeros(1), context)


def kept_bytes(network: torch.nn.Module, run) -> int:
    """Bytes of the tensors that a real run keeps for the backward pass, each memory once, weights not."""
    held, memory = [], {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}

    def pack(tensor):
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            memory[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert held and out is not None
    return sum(memory.values())


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [16, 32])
def test_operations_and_activations_equal_those_of_a_real_run(name, size):
    found = summaries(AUTOENCODER, TEXT, UNETS[name], size)
    for part, network, run in real_runs(UNETS[name], size):
        rows = found[part]
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            run()
        assert sum(row.flops for row in rows) == counter.get_total_flops(), part
        assert sum(row.activations for row in rows) == kept_bytes(network, run), part
        assert sum(row.parameters for row in rows) == sum(p.numel() for p in network.parameters()), part
        assert summarize(network, run) == rows  # the same of real tensors, and again after hooks are gone
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", UNETS)
def test_with_checkpointing_the_arguments_of_blocks_are_kept_and_nothing_inside(name):
    on = replace(UNETS[name], gradient_checkpointing=True)
    plain, forgetful = (summaries(AUTOENCODER, TEXT, config, 32)["denoiser"] for config in (UNETS[name], on))
    assert [row.flops for row in plain] == [row.flops for row in forgetful]
    network, inputs = UNet(on), {}
    for part in network.modules():
        if isinstance(part, (ResBlock, SpatialTransformer)):
            part.register_forward_pre_hook(lambda _, args: inputs.update({args[0].data_ptr(): args[0]}))
    network(torch.randn(1, 4, 16, 16), torch.zeros(1), torch.randn(1, 10, 24))
    least, found = sum(4 * x.numel() for x in inputs.values()), sum(row.activations for row in forgetful)
    assert least < found < 0.6 * sum(row.activations for row in plain)


def test_operations_of_every_stage_equal_the_counter():
    """Stage by stage: the counter knows the modules it is in. Keys and values of the prompt count where they are used,
    though they are computed before."""
    unet = UNetConfig(channels=(16, 32), attention=(False, False), mid_attention=False, norm_groups=8)
    network = UNet(unet)
    rows = {row.name: row for row in summarize(network, lambda: network(torch.zeros(1, 4, 8, 8), torch.zeros(1)))}
    with FlopCounterMode(display=False, depth=3) as counter:
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1))
    counts = counter.get_flop_counts()
    for name in stages_of(network):
        assert rows[name].flops == sum(counts.get(f"UNet.{name}", {}).values()), name
    assert rows["down.0"].flops > rows["mid"].flops > 0


def test_a_published_model_is_counted_without_its_memory():
    """803 GFLOPs for one call of SD-1.x at 512 pixels, the figure it is known for."""
    rows = summaries(*networks_of("sd1", None))["denoiser"]
    assert sum(row.parameters for row in rows) == 859_520_964
    assert round(sum(row.flops for row in rows) / 1e9) == 803


@pytest.mark.parametrize("config", [path for path in sorted((ROOT / "configs").glob("*.yaml"))
                                    if "\nautoencoder:" in path.read_text(encoding="utf-8")],
                         ids=lambda path: path.name)
def test_every_shipped_config_is_summarized(config, capsys):
    main([str(config)])
    said = capsys.readouterr().out
    assert all(f"\n{name}\n" in said for name in ("autoencoder", "text encoder", "denoiser"))
    assert said.count("total") == 3


def test_the_table_adds_up():
    rows = summaries(AUTOENCODER, TEXT, UNETS["deep"], 16)["text encoder"]
    lines = format_table(rows).splitlines()
    total = sum(p.numel() for p in TextEncoder(TEXT).parameters())
    assert lines[-1].split()[:2] == ["total", f"{total:,}"] and lines[1].split()[0] == "token_embedding"


@pytest.mark.parametrize("text, arguments, message", [
    (None, [], "no config file .*; valid: a file in configs/, or sd1, sd2"),
    ("a: [", [], "is not valid YAML"),
    ("a: 1", [], "names no size of the images; valid: --size N"),
    ("denoiser: {unet: {chanels: [3]}}", ["--size", "8"], "unknown key 'denoiser.unet.chanels'; valid keys here: att"),
    ("denoiser: {unet: [3]}", ["--size", "8"], r"denoiser.unet: expected a mapping of keys, got \[3\]"),
    ("denoiser: {unet: {channels: [33]}}", ["--size", "8"], "denoiser.unet.attention: .* valid: one entry"),
    ("a: 1", ["--size", "0"], "--size 0; valid: 1 or more"),
    ("a: 1", ["--size", "20"], r"images: \(1, 3, 20, 20\); valid: .* multiples of 8"),
    ("denoiser: {unet: {in_channels: 5}}", ["--size", "64"], "in_channels: 5; valid: 4, the channels of the latents"),
])
def test_mistakes_are_one_line(tmp_path, text, arguments, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        main([str(path), *arguments])
    assert "\n" not in str(caught.value)
