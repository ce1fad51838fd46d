"""Published weights as ours, and back: the names and shapes of diffusers and transformers beside those used here.

One table a network, from our names to theirs. It is read in both directions, and every tensor must be accounted for.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.autoencoder import SD_LATENT_STD, Autoencoder, AutoencoderConfig
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig

State = dict[str, Tensor]
Renames = tuple[tuple[str, str], ...]  # regular expression over our name -> theirs; `q|k` stacks q above k

RESBLOCK: Renames = (
    (r"\.resblocks\.", ".resnets."),
    (r"(resnets\.\d+)\.time\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
    (r"\bdown\.(\d+)\.resample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.resample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bdown\.", "down_blocks."),
    (r"\bup\.", "up_blocks."),
    (r"\bnorm_out\.", "conv_norm_out."),
)

UNET: Renames = RESBLOCK + (
    (r"^time\.linear(\d)\.", r"time_embedding.linear_\1."),
    (r"^mid\.", "mid_block."),
    (r"\.transformers\.", ".attentions."),
    (r"\.blocks\.", ".transformer_blocks."),
    (r"\.self_attention\.qkv\.", ".attn1.to_q|k|v."),
    (r"\.self_attention\.out\.", ".attn1.to_out.0."),
    (r"\.cross_attention\.q\.", ".attn2.to_q."),
    (r"\.cross_attention\.kv\.", ".attn2.to_k|v."),
    (r"\.cross_attention\.out\.", ".attn2.to_out.0."),
    (r"\.feed_forward\.proj\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
)

AUTOENCODER: Renames = (
    (r"\.mid\.resblock1\.", ".mid_block.resblocks.0."),
    (r"\.mid\.resblock2\.", ".mid_block.resblocks.1."),
    (r"\.mid\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attention\.attention\.qkv\.", ".mid_block.attentions.0.to_q|k|v."),
    (r"\.mid\.attention\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^(post_)?quant\.", r"\1quant_conv."),
) + RESBLOCK

TEXT_ENCODER: Renames = (
    (r"^(token|position)_embedding\.", r"embeddings.\1_embedding."),
    (r"^norm_out\.", "final_layer_norm."),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"\.attention\.qkv\.", ".self_attn.q|k|v_proj."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
)

# Spellings of older files -> the present one.
OLD_AUTOENCODER: Renames = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)
OLD_TEXT_ENCODER: Renames = ((r"^text_model\.", ""),)


def unet_from_diffusers(state: Mapping[str, Tensor], config: UNetConfig) -> State:
    """Weights of a diffusers `UNet2DConditionModel` -> those of `UNet(config)`.

    Raises ValueError naming every tensor that is missing, unexpected or of another shape.
    """
    return _from_theirs(state, _shapes(UNet, config), UNET)


def unet_to_diffusers(state: Mapping[str, Tensor], config: UNetConfig) -> State:
    """The inverse of `unet_from_diffusers`, bit for bit."""
    return _to_theirs(state, _shapes(UNet, config), UNET)


def autoencoder_from_diffusers(state: Mapping[str, Tensor], config: AutoencoderConfig,
                               latent_std: float = SD_LATENT_STD) -> State:
    """Weights of a diffusers `AutoencoderKL` -> those of `Autoencoder(config)`.

    latent_std is 1 / scaling_factor of the published configuration; the latent mean is 0. Raises ValueError naming
    every tensor that is missing, unexpected or of another shape.
    """
    state = {_rename(name, OLD_AUTOENCODER): tensor for name, tensor in state.items()}
    ours = _from_theirs(state, _shapes(Autoencoder, config), AUTOENCODER)
    ours["latent_mean"] = torch.zeros(config.latent_channels)
    ours["latent_std"] = torch.full((config.latent_channels,), latent_std)
    return ours


def autoencoder_to_diffusers(state: Mapping[str, Tensor], config: AutoencoderConfig) -> State:
    """The inverse of `autoencoder_from_diffusers`, bit for bit, for weights whose latent scale is one number.

    That number goes into the `scaling_factor` of their configuration. Raises ValueError when the latent mean is not 0,
    when the scale differs between channels, or when the autoencoder has a space-to-depth stem.
    """
    if config.stem != 1:
        raise ValueError(f"stem: {config.stem}; valid for diffusers: 1")
    mean, std = state["latent_mean"], state["latent_std"]
    if bool(mean.any()) or bool((std != std[0]).any()):
        raise ValueError(
            f"latent_mean {mean.tolist()}, latent_std {std.tolist()}; valid for diffusers: mean 0 and one std"
        )
    weights = {name: tensor for name, tensor in state.items() if name not in ("latent_mean", "latent_std")}
    return _to_theirs(weights, _shapes(Autoencoder, config), AUTOENCODER)


def text_encoder_from_transformers(state: Mapping[str, Tensor], config: TextEncoderConfig) -> State:
    """Weights of a transformers `CLIPTextModel` -> those of `TextEncoder(config)`.

    Raises ValueError naming every tensor that is missing, unexpected or of another shape.
    """
    state = {_rename(name, OLD_TEXT_ENCODER): tensor for name, tensor in state.items()}
    state.pop("embeddings.position_ids", None)  # 0, 1, 2, ... in older files
    return _from_theirs(state, _shapes(TextEncoder, config), TEXT_ENCODER)


def text_encoder_to_transformers(state: Mapping[str, Tensor], config: TextEncoderConfig) -> State:
    """The inverse of `text_encoder_from_transformers`, bit for bit."""
    return _to_theirs(state, _shapes(TextEncoder, config), TEXT_ENCODER)


def _shapes(network: type[nn.Module], config: object) -> dict[str, torch.Size]:
    """Name and shape of every parameter, without allocating one."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in network(config).named_parameters()}


def _rename(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _their_names(name: str, renames: Renames) -> list[str]:
    """The tensors of theirs that, stacked along the first axis, are ours: one, or the parts of a fused projection."""
    name = _rename(name, renames)
    letters = re.search(r"\w(\|\w)+", name)  # "to_q|k|v.weight" -> to_q.weight, to_k.weight, to_v.weight
    if letters is None:
        return [name]
    return [name.replace(letters[0], letter) for letter in letters[0].split("|")]


def _from_theirs(state: Mapping[str, Tensor], shapes: dict[str, torch.Size], renames: Renames) -> State:
    ours: State = {}
    missing, misshapen, used = [], [], set()
    for name, shape in shapes.items():
        names = _their_names(name, renames)
        used.update(names)
        expected = torch.Size((shape[0] // len(names), *shape[1:]))
        absent = [n for n in names if n not in state]
        wrong = [f"{n} {tuple(state[n].shape)}, not {tuple(expected)}" for n in names
                 if n in state and state[n].shape != expected]
        if absent or wrong:
            missing += absent
            misshapen += wrong
        else:
            ours[name] = torch.cat([state[n] for n in names]) if len(names) > 1 else state[names[0]]
    unexpected = [name for name in state if name not in used]
    _raise_unless_empty(missing=missing, unexpected=unexpected, misshapen=misshapen)
    return ours


def _to_theirs(state: Mapping[str, Tensor], shapes: dict[str, torch.Size], renames: Renames) -> State:
    _raise_unless_empty(
        missing=[name for name in shapes if name not in state],
        unexpected=[name for name in state if name not in shapes],
        misshapen=[f"{name} {tuple(state[name].shape)}, not {tuple(shape)}" for name, shape in shapes.items()
                   if name in state and state[name].shape != shape],
    )
    theirs: State = {}
    for name in shapes:
        names = _their_names(name, renames)
        theirs.update(zip(names, state[name].chunk(len(names)), strict=True))
    return theirs


def _raise_unless_empty(**problems: list[str]) -> None:
    if any(problems.values()):
        raise ValueError("weights: " + "; ".join(f"{kind}: {', '.join(x)}" for kind, x in problems.items() if x))
