"""Reads and writes adapters in the layouts of kohya's scripts, of LyCORIS, of PEFT and of diffusers, old and new.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight     kohya: .lora_up.weight, .alpha, .dora_scale
    lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a             LyCORIS: .hada_*, .lokr_*
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight             PEFT in diffusers: .lora_B.weight, text_encoder.
    base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight PEFT alone, alpha in adapter_config.json
    unet.mid_block.attentions.0....attn1.processor.to_q_lora.down.weight   diffusers before PEFT

Every tensor of a file must find its place: one that is unknown, incomplete or of another shape is an error that names
it. Nothing is executed, because only safetensors are read.
"""
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from files.weights import LISTED
from files.whole import whole_file
from model.lora import PRODUCTS, Adapter, Delta, Kind, Networks, Place, places_of
from model.pretrained.card import Card, card_of, read_header
from model.pretrained.names import TEXT_ENCODER, UNET, their_names
from model.pretrained.single_file import unet_table
from model.pretrained.tensors import read_json, read_safetensors
from model.text_encoder import TextEncoder
from model.unet import UNet

Layout = Literal["kohya", "peft"]
PREFIXES = {"unet": ("lora_unet_", "unet."), "text_encoder": ("lora_te_text_model_", "text_encoder.text_model.")}
# how a name may begin -> the networks that it may belong to; the longest fits first
BEGINNINGS = {
    "lora_unet_": ("unet",), "unet.": ("unet",), "base_model.model.unet.": ("unet",),
    "lora_te_text_model_": ("text_encoder",), "text_encoder.text_model.": ("text_encoder",),
    "lora_te_": ("text_encoder",), "text_encoder.": ("text_encoder",),
    "base_model.model.text_model.": ("text_encoder",), "base_model.model.": ("unet", "text_encoder"),
    "": ("unet", "text_encoder"),
}
# how a name ends -> the kind of adapter, None for what all kinds have, and the name of the tensor here
ENDINGS: dict[str, tuple[Kind | None, str]] = {
    **{f".{down}": ("lora", "down") for down in ("lora_down.weight", "lora_A.weight", "lora_A.default.weight",
                                                 "lora.down.weight", "lora_linear_layer.down.weight")},
    **{f".{up}": ("lora", "up") for up in ("lora_up.weight", "lora_B.weight", "lora_B.default.weight",
                                           "lora.up.weight", "lora_linear_layer.up.weight")},
    ".lora_mid.weight": ("lora", "mid"),
    **{f".hada_{name}": ("loha", name) for name in (*PRODUCTS["loha"].needed, *PRODUCTS["loha"].optional)},
    **{f".lokr_{name}": ("lokr", name) for name in PRODUCTS["lokr"].optional},
    ".alpha": (None, "alpha"),
    ".dora_scale": (None, "magnitude"), ".lora_magnitude_vector": (None, "magnitude"),
    ".lora_magnitude_vector.weight": (None, "magnitude"), ".lora_magnitude_vector.default.weight": (None, "magnitude"),
}
OLD = (  # spellings of diffusers before PEFT -> the present ones
    (r"\.processor\.(to_[qkv])_lora\.(down|up)\.", r".\1.lora.\2."),
    (r"\.processor\.to_out_lora\.(down|up)\.", r".to_out.0.lora.\1."),
    (r"\.self_attn\.to_([qkv])_lora\.(down|up)\.", r".self_attn.\1_proj.lora.\2."),
    (r"\.self_attn\.to_out_lora\.(down|up)\.", r".self_attn.out_proj.lora.\1."),
)


def networks_of(unet: UNet, text_encoder: TextEncoder) -> dict[str, nn.Module]:
    """The networks that adapters change, by the names that places have."""
    return {"unet": unet, "text_encoder": text_encoder}


def name_of(place: Place) -> str:
    """The name of the layer at a place in diffusers and transformers."""
    table = TEXT_ENCODER if place.network == "text_encoder" else UNET
    return their_names(f"{place.module}.weight", table)[place.part].removesuffix(".weight")


def names_of(networks: Networks) -> dict[tuple[str, str], Place]:
    """Every place by network and name with underscores for dots, as kohya writes it; those of the UNet also under the
    names of single files, which some programs use."""
    found = {}
    for place in places_of(networks):
        names = [name_of(place)]
        if place.network == "unet":
            table = unet_table(networks["unet"].config)  # type: ignore[arg-type]
            single = their_names(f"{place.module}.weight", table)[place.part]
            names.append(single.removeprefix("model.diffusion_model.").removesuffix(".weight"))
        for name in names:
            found[place.network, name.replace(".", "_")] = place
    return found


# ---- reading

def read_adapter(path: str | Path, unet: UNet, text_encoder: TextEncoder) -> tuple[Adapter, Card]:
    """The adapter in a file, frozen, in fp32 and on the CPU, and what the file says about itself.

    Raises FileNotFoundError, and ValueError naming every tensor that has no place in these networks, belongs to an
    incomplete change, or is of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no adapter that is read here; valid: .safetensors, which cannot hold programs")
    header, networks = read_header(path), networks_of(unet, text_encoder)
    found, unknown = by_place(read_safetensors(path), names_of(networks))
    settings = peft_settings(header, path)
    problems, deltas = [f"unknown {key}" for key in unknown], {}
    for place, tensors in found.items():
        weight = place.rows(networks[place.network].get_parameter(f"{place.module}.weight"))
        try:
            deltas[place] = delta_of(tensors, weight, peft_alpha(settings, place, tensors))
        except ValueError as error:
            problems.append(f"{min(key for key, _, _ in tensors)}: {error}")
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(f"{path} does not fit these networks: {'; '.join(problems[:LISTED])}{more}")
    if not deltas:
        raise ValueError(f"{path} holds no tensors; valid: an adapter")
    adapter = Adapter(deltas).eval().requires_grad_(False)
    return adapter, card_of(header, path)


Piece = tuple[str, str, Tensor]  # key in the file, ending, tensor


def by_place(tensors: Mapping[str, Tensor], names: Mapping[tuple[str, str], Place]
             ) -> tuple[dict[Place, list[Piece]], list[str]]:
    """The tensors of each place, and the keys that have none."""
    found: dict[Place, list[Piece]] = {}
    unknown = []
    for key, tensor in tensors.items():
        new = key
        for pattern, replacement in OLD:
            new = re.sub(pattern, replacement, new)
        ending = max((end for end in ENDINGS if new.endswith(end)), key=len, default=None)
        place = None if ending is None else place_called(new.removesuffix(ending), names)
        if place is None or ending is None:
            unknown.append(key)
        else:
            found.setdefault(place, []).append((key, ending, tensor.float()))
    return found, unknown


def place_called(name: str, names: Mapping[tuple[str, str], Place]) -> Place | None:
    """The place of a layer under its name in a file, None if the networks have no such layer."""
    for beginning in sorted(BEGINNINGS, key=len, reverse=True):
        for network in BEGINNINGS[beginning] if name.startswith(beginning) else ():
            place = names.get((network, name.removeprefix(beginning).replace(".", "_")))
            if place is not None:
                return place
    return None


def delta_of(pieces: list[Piece], weight: Tensor, alpha: float | None) -> Delta:
    """The change that the tensors of one place make together. Raises ValueError if they do not fit each other or the
    rows ``weight``."""
    tensors: dict[str, Tensor] = {}
    for key, ending, tensor in pieces:
        name = ENDINGS[ending][1]
        if name in tensors:
            raise ValueError(f"{key} repeats the tensor '{name}' of this layer")
        tensors[name] = tensor
    kinds = sorted({kind for _, ending, _ in pieces if (kind := ENDINGS[ending][0]) is not None})
    if len(kinds) != 1:
        raise ValueError(f"{' and '.join(kinds) or 'no factors'}; valid: the tensors of one kind of adapter")
    given = tensors.pop("alpha", None)
    if given is not None and given.numel() != 1:
        raise ValueError(f"alpha {tuple(given.shape)}; valid: one number")
    magnitude = tensors.pop("magnitude", None)
    ones = (1,) * (weight.ndim - 1)
    if magnitude is not None and magnitude.shape in {(weight.shape[0],), (1, weight.shape[0], *ones[1:])}:
        square = magnitude.ndim > 1 and weight.shape[0] == weight.shape[1]  # then (1, O) is also (1, I), LyCORIS' own
        peft = any("magnitude_vector" in key for key, _, _ in pieces)
        magnitude = magnitude.reshape(-1, *ones) if peft or not square else magnitude
    delta = Delta(kinds[0], tensors, alpha if given is None else float(given), magnitude)
    delta.check(weight)
    return delta


def peft_settings(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The settings that PEFT keeps apart from the weights: in the header (diffusers), else in adapter_config.json."""
    if "lora_adapter_metadata" in header:
        try:
            return dict(json.loads(header["lora_adapter_metadata"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: lora_adapter_metadata in its header is damaged: {error}") from None
    beside = path.with_name("adapter_config.json")
    return read_json(beside) if path.name == "adapter_model.safetensors" and beside.is_file() else {}


def peft_alpha(settings: Mapping[str, Any], place: Place, pieces: list[Piece]) -> float | None:
    """alpha of one place by PEFT's settings, None if they do not say. A pattern names layers by the end of their name.
    With ``use_rslora`` the factor is alpha / sqrt(r) (Kalajdzievski 2023)."""
    own = {key.removeprefix(f"{place.network}."): value for key, value in settings.items()
           if key.startswith(f"{place.network}.") or "." not in key}
    alpha, name = own.get("lora_alpha", own.get("alpha")), name_of(place)
    for pattern, value in dict(own.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
    if alpha is None:
        return None
    down = [tensor.shape[0] for _, ending, tensor in pieces if ENDINGS[ending][1] == "down"]
    return float(alpha) * (math.sqrt(down[0]) if own.get("use_rslora") and down else 1.0)


# ---- writing

def tensors_of(adapter: Adapter, layout: Layout = "kohya") -> dict[str, Tensor]:
    """The tensors of an adapter under the names of a layout.

    Files in PEFT's layout have no alpha: a factor other than 1 is multiplied into ``lora_B``. Raises ValueError for
    LoHa, LoKr and Tucker cores there, which diffusers does not read.
    """
    found: dict[str, Tensor] = {}
    for place, delta in adapter.items():
        name, prefix = name_of(place), PREFIXES[place.network][layout == "peft"]
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in delta.tensors.items()}
        magnitude = None if delta.magnitude is None else delta.magnitude.detach().cpu().contiguous()
        if layout == "kohya":
            stem, beginning = prefix + name.replace(".", "_"), {"loha": "hada_", "lokr": "lokr_", "lora": "lora_"}
            for key, tensor in tensors.items():
                found[f"{stem}.{beginning[delta.kind]}{key}" + ".weight" * (delta.kind == "lora")] = tensor
            if delta.alpha is not None:
                found[f"{stem}.alpha"] = tensors[next(iter(tensors))].new_tensor(delta.alpha)
            if magnitude is not None:
                found[f"{stem}.dora_scale"] = magnitude
            continue
        if set(tensors) != {"down", "up"}:
            raise ValueError(f"layout: peft, for {delta.kind} ({', '.join(tensors)}); valid: kohya")
        found[f"{prefix}{name}.lora_A.weight"] = tensors["down"]
        found[f"{prefix}{name}.lora_B.weight"] = tensors["up"] * delta.factor
        if magnitude is not None:
            linear = magnitude.ndim == 2
            found[f"{prefix}{name}.lora_magnitude_vector"] = magnitude[:, 0] if linear else magnitude.transpose(0, 1)
    return {key: tensor.contiguous() for key, tensor in found.items()}


def write_adapter(path: str | Path, adapter: Adapter, card: Card, layout: Layout = "kohya") -> None:
    """Write an adapter and its card as safetensors, whole or not at all."""
    with whole_file(path) as temporary:
        save_file(tensors_of(adapter, layout), temporary, metadata=card.header())
        os.chmod(temporary, 0o644)  # the library writes 0600
