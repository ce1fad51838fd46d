"""Files of adapters: every layout that is read, what is written and read again, and what does not fit."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import KINDS, networks, trained  # noqa: F401

from model.pretrained.adapters import name_of, names_of, read_adapter, tensors_of, write_adapter
from model.pretrained.card import Card, card_of, check_base, hash_of_networks, read_header

CARD = Card("0123", {"sks": "a star"}, ("a sks star",), {"method": "lora"})
QKV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."


def read(path, networks):  # noqa: F811
    return read_adapter(path, networks["unet"], networks["text_encoder"])


def changes(adapter, networks) -> dict:  # noqa: F811
    """D of every place."""
    with torch.no_grad():
        return {place: delta(place.rows(networks[place.network].get_parameter(f"{place.module}.weight")))
                for place, delta in adapter.items()}


def assert_equal(one, two, exact=True) -> None:
    assert one.keys() == two.keys()
    for place, change in one.items():
        torch.testing.assert_close(change, two[place], atol=0 if exact else 1e-6, rtol=0 if exact else 1e-5)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("kind, decompose", KINDS)
def test_what_is_written_is_read_again(networks, kind, decompose, layout, tmp_path):  # noqa: F811
    adapter = trained(networks, kind, decompose)
    if layout == "peft" and kind != "lora":
        with pytest.raises(ValueError, match=f"layout: peft, for {kind}"):
            write_adapter(tmp_path / "a.safetensors", adapter, CARD, layout)
        return
    write_adapter(tmp_path / "a.safetensors", adapter, CARD, layout)
    again, card = read(tmp_path / "a.safetensors", networks)
    assert card == CARD and set(again.places) == set(adapter.places)
    assert_equal(changes(again, networks), changes(adapter, networks), exact=layout == "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    keys = load_file(tmp_path / "a.safetensors").keys()
    stem = "lora_unet_" + QKV.replace(".", "_") + "to_q" if layout == "kohya" else f"unet.{QKV}to_q"
    assert any(key.startswith(f"{stem}.") for key in keys)
    assert any(key.startswith(("lora_te_text_model_encoder_layers_0_self_attn_q_proj.",
                               "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.")) for key in keys)


def spelt(adapter, rename) -> dict:
    """Tensors of an adapter under other names: ``rename`` gets the network, the name of a layer and "down" or "up"."""
    return {rename(place.network, name_of(place), key): tensor.clone() * (delta.factor if key == "up" else 1.0)
            for place, delta in adapter.items() for key, tensor in delta.tensors.items()}


def old_diffusers(network: str, name: str, key: str) -> str:
    """As diffusers wrote attention before it used PEFT."""
    for present, old in ((".to_q", ".processor.to_q_lora"), (".to_k", ".processor.to_k_lora"),
                         (".to_v", ".processor.to_v_lora"), (".to_out.0", ".processor.to_out_lora"),
                         (".self_attn.q_proj", ".self_attn.to_q_lora"), (".self_attn.out_proj",
                                                                         ".self_attn.to_out_lora")):
        if name.endswith(present):
            return f"{network}.{name.removesuffix(present)}{old}.{key}.weight".replace(
                "text_encoder.", "text_encoder.text_model.")
    return f"{network}.{name}.lora.{key}.weight"


LAYOUTS = {
    "old diffusers": old_diffusers,
    "linear layers of diffusers": lambda network, name, key: f"{network}.{name}.lora_linear_layer.{key}.weight",
    "PEFT alone": lambda network, name, key: f"base_model.model.{name}.lora_{'A' if key == 'down' else 'B'}.weight",
    "PEFT in training": lambda network, name, key: f"{network}.{name}.lora_{'A' if key == 'down' else 'B'}"
                                                   ".default.weight",
    "kohya without text_model": lambda network, name, key: {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network]
    + name.replace(".", "_") + f".lora_{key}.weight",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(networks, layout, tmp_path):  # noqa: F811
    adapter = trained(networks)
    save_file(spelt(adapter, LAYOUTS[layout]), tmp_path / "a.safetensors")
    assert_equal(changes(read(tmp_path / "a.safetensors", networks)[0], networks), changes(adapter, networks), False)


def test_names_of_single_files(networks, tmp_path):  # noqa: F811
    """lora_unet_input_blocks_1_1_...: some programs name the layers of the UNet as single files do."""
    adapter, single = trained(networks), {}
    for (network, name), place in names_of(networks).items():
        if network == "unet" and name != name_of(place).replace(".", "_"):
            single[place] = name
    assert "input_blocks_1_1_transformer_blocks_0_attn1_to_q" in single.values()
    tensors = {}
    for place, delta in adapter.items():
        if place.network == "unet":
            name = single.get(place, name_of(place).replace(".", "_"))
            tensors |= {f"lora_unet_{name}.lora_{key}.weight": tensor for key, tensor in delta.tensors.items()}
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(delta.alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    expected = {place: change for place, change in changes(adapter, networks).items() if place.network == "unet"}
    assert_equal(changes(read(tmp_path / "a.safetensors", networks)[0], networks), expected)


def test_alpha_that_peft_keeps_apart(networks, tmp_path):  # noqa: F811
    adapter = trained(networks)
    tensors = {key: tensor for key, tensor in tensors_of(adapter, "peft").items()}
    expected = changes(adapter, networks)
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 6, "text_encoder.lora_alpha": 3,
                                                   "unet.alpha_pattern": {"conv_in": 12}})}
    save_file(tensors, tmp_path / "a.safetensors", metadata=header)
    found = changes(read(tmp_path / "a.safetensors", networks)[0], networks)
    for place, change in found.items():
        rank = {place: delta.rank for place, delta in adapter.items()}[place]
        factor = 3 / rank if place.network == "text_encoder" else 12 / rank if place.module == "conv_in" else 6 / rank
        torch.testing.assert_close(change, factor * expected[place], atol=1e-5, rtol=1e-5)
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file({key.replace("unet.", "base_model.model."): tensor for key, tensor in tensors.items() if "unet" in key},
              folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": True}))
    for place, change in changes(read(folder / "adapter_model.safetensors", networks)[0], networks).items():
        rank = {place: delta.rank for place, delta in adapter.items()}[place]
        torch.testing.assert_close(change, 6 / rank ** 0.5 * expected[place], atol=1e-5, rtol=1e-5)


def test_half_precision_is_read_in_fp32(networks, tmp_path):  # noqa: F811
    tensors = {key: tensor.half() for key, tensor in tensors_of(trained(networks)).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert {p.dtype for p in read(tmp_path / "a.safetensors", networks)[0].parameters()} == {torch.float32}


# ---- what does not fit

STEM = "lora_unet_" + QKV.replace(".", "_") + "to_q"
WRONG = {
    "unknown": ({"lora_unet_nowhere.lora_down.weight": torch.zeros(3, 16)}, "unknown lora_unet_nowhere.lora_down"),
    "sdxl": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(3, 3)}, "unknown lora_te2_"),
    "difference": ({f"{STEM}.diff": torch.zeros(16, 16)}, rf"unknown {STEM}.diff"),
    "incomplete": ({f"{STEM}.lora_up.weight": None}, rf"{STEM}.alpha: lora without up"),
    "width": ({f"{STEM}.lora_up.weight": torch.zeros(32, 3)}, r"up \(32, 3\) make \(32, 16\); valid: \(16, 16\)"),
    "rank": ({f"{STEM}.lora_up.weight": torch.zeros(16, 5)}, r"down \(3, 16\).*; valid: factors of \(16, 16\)"),
    "kinds": ({f"{STEM}.hada_w1_a": torch.zeros(16, 3)}, "loha and lora; valid: the tensors of one kind"),
    "alpha": ({f"{STEM}.alpha": torch.zeros(2)}, r"alpha \(2,\); valid: one number"),
    "twice": ({f"unet.{QKV}to_q.lora_A.weight": torch.zeros(3, 16)}, "repeats the tensor 'down'"),
    "magnitude": ({f"{STEM}.dora_scale": torch.zeros(7, 1)}, r"magnitude \(7, 1\); valid: \(16, 1\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_tensor_must_have_its_place(networks, case, tmp_path):  # noqa: F811
    changed, message = WRONG[case]
    tensors = {**tensors_of(trained(networks)), **changed}
    path = tmp_path / "a.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    before = hash_of_networks(networks)
    with pytest.raises(ValueError, match=message) as error:
        read(path, networks)
    assert str(error.value).startswith(f"{path} does not fit these networks: ") and "\n" not in str(error.value)
    assert hash_of_networks(networks) == before


def test_an_adapter_of_another_model_names_twenty_keys_and_counts_the_others(networks, tmp_path):  # noqa: F811
    save_file({f"lora_unet_block_{i}.lora_up.weight": torch.zeros(1) for i in range(50)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="; and 30 more$") as error:
        read(tmp_path / "a.safetensors", networks)
    assert str(error.value).count("unknown") == 20


def test_files_that_are_no_adapters(networks, tmp_path):  # noqa: F811
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, networks)

    refused("a.safetensors", b"nothing", "a.safetensors is damaged or no safetensors file")
    refused("a.pt", b"nothing", "a.pt is no adapter that is read here; valid: .safetensors")
    save_file({}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors holds no tensors; valid: an adapter"):
        read(tmp_path / "b.safetensors", networks)
    with pytest.raises(FileNotFoundError, match="no adapter .*c.safetensors"):
        read(tmp_path / "c.safetensors", networks)
    for header, message in (({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in its header is damaged"),
                            ({"card": "[]"}, "its header is damaged"), ({"ss_tag_frequency": "3"}, "damaged")):
        save_file(tensors_of(trained(networks)), tmp_path / "d.safetensors", metadata=header)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "d.safetensors", networks)


# ---- cards

def test_tags_of_other_programs_are_read(tmp_path):
    header = {"ss_tag_frequency": json.dumps({"10_sks": {"a star": 4, " blue ": 2}, "reg": {"a star": 1}}),
              "modelspec.trigger_phrase": "sks"}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=header)
    card = card_of(read_header(tmp_path / "a.safetensors"), tmp_path)
    assert card.base is None and card.captions == ("a star", "blue") and card.triggers == {"sks": "sks"}
    assert card.texts == ["an image of sks", "sks", "a star", "blue"]
    assert card_of({}, tmp_path) == Card()


def test_another_base_is_refused_unless_forced(networks):  # noqa: F811
    here, path = hash_of_networks(networks), Path("a.safetensors")
    assert check_base(Card(here), here, path, False) is None
    assert "does not say which base" in str(check_base(Card(), here, path, False))
    with pytest.raises(ValueError, match="a.safetensors was trained on another base .*; valid: its own base, or --any"):
        check_base(Card("00"), here, path, False)
    assert "another base" in str(check_base(Card("00"), here, path, True))


def test_the_hash_depends_on_every_value_and_on_no_order_in_memory(networks):  # noqa: F811
    before = hash_of_networks(networks)
    weight = networks["unet"].conv_in.weight
    kept = weight.detach().clone()
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    assert hash_of_networks(networks) == before
    weight.data[0, 0, 0, 0] += 1e-3
    assert hash_of_networks(networks) != before
    weight.data = kept
    assert hash_of_networks(networks) == before
