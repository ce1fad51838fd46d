"""Converts published weights to ours and back: the names and shapes of diffusers and transformers beside those used
here.

Each network has one table from our names to theirs. It is used in both directions, and every tensor must be
accounted for. The files around the weights are read in `folder.py`, the older single files in `single_file.py`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.autoencoder import SD_LATENT_STD, Autoencoder, AutoencoderConfig
from model.clip import Clip, ClipConfig
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

TRANSFORMER_BLOCK: Renames = (  # alike in folders and in single files
    (r"\.blocks\.", ".transformer_blocks."),
    (r"\.self_attention\.qkv\.", ".attn1.to_q|k|v."),
    (r"\.self_attention\.out\.", ".attn1.to_out.0."),
    (r"\.cross_attention\.q\.", ".attn2.to_q."),
    (r"\.cross_attention\.kv\.", ".attn2.to_k|v."),
    (r"\.cross_attention\.out\.", ".attn2.to_out.0."),
    (r"\.feed_forward\.proj\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
)

UNET: Renames = RESBLOCK + (
    (r"^time\.linear(\d)\.", r"time_embedding.linear_\1."),
    (r"^mid\.", "mid_block."),
    (r"\.transformers\.", ".attentions."),
) + TRANSFORMER_BLOCK

AUTOENCODER: Renames = (
    (r"\.mid\.resblock1\.", ".mid_block.resblocks.0."),
    (r"\.mid\.resblock2\.", ".mid_block.resblocks.1."),
    (r"\.mid\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attention\.attention\.qkv\.", ".mid_block.attentions.0.to_q|k|v."),
    (r"\.mid\.attention\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^(post_)?quant\.", r"\1quant_conv."),
) + RESBLOCK

TRANSFORMER: Renames = (
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"\.attention\.qkv\.", ".self_attn.q|k|v_proj."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
)

TEXT_ENCODER: Renames = (
    (r"^(token|position)_embedding\.", r"embeddings.\1_embedding."),
    (r"^norm_out\.", "final_layer_norm."),
    (r"^layers\.", "encoder.layers."),
) + TRANSFORMER

CLIP: Renames = (
    (r"^text\.(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
    (r"^text\.norm_out\.", "text_model.final_layer_norm."),
    (r"^text\.layers\.", "text_model.encoder.layers."),
    (r"^image\.(class|patch|position)_embedding", r"vision_model.embeddings.\1_embedding"),
    (r"^image\.norm_in\.", "vision_model.pre_layrnorm."),  # their spelling
    (r"^image\.norm_out\.", "vision_model.post_layernorm."),
    (r"^image\.layers\.", "vision_model.encoder.layers."),
    (r"^image_projection\.", "visual_projection."),
) + TRANSFORMER

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
    return from_theirs(state, UNet, config, UNET)


def unet_to_diffusers(state: Mapping[str, Tensor], config: UNetConfig) -> State:
    """The inverse of `unet_from_diffusers`, bit for bit."""
    return to_theirs(state, UNet, config, UNET)


def autoencoder_from_diffusers(state: Mapping[str, Tensor], config: AutoencoderConfig,
                               latent_std: float = SD_LATENT_STD, latent_mean: float = 0.0) -> State:
    """Weights of a diffusers `AutoencoderKL` -> those of `Autoencoder(config)`.

    latent_std is 1 / scaling_factor of the published configuration, latent_mean its shift_factor. Raises ValueError
    naming every tensor that is missing, unexpected or of another shape.
    """
    state = {rename(name, OLD_AUTOENCODER): tensor for name, tensor in state.items()}
    ours = from_theirs(state, Autoencoder, config, AUTOENCODER)
    return with_latent_scale(ours, config, latent_std, latent_mean)


def with_latent_scale(state: State, config: AutoencoderConfig, std: float, mean: float = 0.0) -> State:
    """`state` of an autoencoder with the same latent mean and std in every channel."""
    return {**state, "latent_mean": torch.full((config.latent_channels,), mean),
            "latent_std": torch.full((config.latent_channels,), std)}


def with_one_scale(state: Mapping[str, Tensor]) -> State:
    """`state` of an autoencoder with mean 0 and one std, which is all that the Stable Diffusion pipeline of diffusers
    reads.

    Any other mean and std are moved into the 1x1 convolutions beside them, and mean 0 and std 1 remain. Latents of
    unit scale and images stay the same up to rounding; raw latents become those of unit scale, so the limits of their
    log variance, [-30, 20], move by 2 log std.
    """
    mean, std = state["latent_mean"].double(), state["latent_std"].double()  # (C,)
    if bool((mean == 0).all()) and bool((std == std[0]).all()):
        return dict(state)
    quant, bias, post_quant, post_bias = (state[name].double() for name in (
        "quant.weight", "quant.bias", "post_quant.weight", "post_quant.bias"))
    channels, one = len(std), torch.ones_like(std)
    new = {
        # unit = (raw - mean) / std; the rows below are the log variances, which lose 2 log std
        "quant.weight": quant / torch.cat([std, one])[:, None, None, None],  # (2C, 2C, 1, 1), by rows
        "quant.bias": torch.cat([(bias[:channels] - mean) / std, bias[channels:] - 2 * std.log()]),  # (2C,)
        # raw = std unit + mean
        "post_quant.weight": post_quant * std[:, None, None],  # (C, C, 1, 1), by columns
        "post_quant.bias": post_bias + post_quant[:, :, 0, 0] @ mean,  # (C,)
        "latent_mean": torch.zeros_like(mean), "latent_std": one,
    }
    return {**state, **{name: tensor.to(state[name].dtype) for name, tensor in new.items()}}


def autoencoder_to_diffusers(state: Mapping[str, Tensor], config: AutoencoderConfig) -> State:
    """The inverse of `autoencoder_from_diffusers`, bit for bit if the latents have mean 0 and one std.

    Otherwise it is the inverse for the weights of `with_one_scale`. Its latent_std is 1 / scaling_factor of their
    configuration. Raises ValueError for a space-to-depth stem.
    """
    if config.stem != 1:
        raise ValueError(f"stem: {config.stem}; valid for diffusers: 1")
    weights = {name: tensor for name, tensor in with_one_scale(state).items()
               if name not in ("latent_mean", "latent_std")}
    return to_theirs(weights, Autoencoder, config, AUTOENCODER)


def text_encoder_from_transformers(state: Mapping[str, Tensor], config: TextEncoderConfig) -> State:
    """Weights of a transformers `CLIPTextModel` -> those of `TextEncoder(config)`.

    Raises ValueError naming every tensor that is missing, unexpected or of another shape.
    """
    state = {rename(name, OLD_TEXT_ENCODER): tensor for name, tensor in state.items()
             if not name.endswith("embeddings.position_ids")}  # 0, 1, 2, ... in older files
    return from_theirs(state, TextEncoder, config, TEXT_ENCODER)


def text_encoder_to_transformers(state: Mapping[str, Tensor], config: TextEncoderConfig) -> State:
    """The inverse of `text_encoder_from_transformers`, bit for bit."""
    return to_theirs(state, TextEncoder, config, TEXT_ENCODER)


def clip_from_transformers(state: Mapping[str, Tensor], config: ClipConfig) -> State:
    """Weights of a transformers `CLIPModel` -> those of `Clip(config)`.

    Raises ValueError naming every tensor that is missing, unexpected or of another shape.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    return from_theirs(state, Clip, config, CLIP)


def clip_to_transformers(state: Mapping[str, Tensor], config: ClipConfig) -> State:
    """The inverse of `clip_from_transformers`, bit for bit."""
    return to_theirs(state, Clip, config, CLIP)


def parameter_shapes(network: type[nn.Module], config: object) -> dict[str, torch.Size]:
    """Name and shape of every parameter of a network, without allocating one."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in network(config).named_parameters()}


def rename(name: str, renames: Renames) -> str:
    """`name` after every rule was applied in turn."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def their_names(name: str, renames: Renames) -> list[str]:
    """Names of their tensors that, stacked along the first axis, are our tensor: one, or the parts of a fused
    projection."""
    name = rename(name, renames)
    letters = re.search(r"\w(\|\w)+", name)  # "to_q|k|v.weight" -> to_q.weight, to_k.weight, to_v.weight
    if letters is None:
        return [name]
    return [name.replace(letters[0], letter) for letter in letters[0].split("|")]


def from_theirs(state: Mapping[str, Tensor], network: type[nn.Module], config: object, renames: Renames) -> State:
    """Weights under their names -> those of `network(config)`, by a table from our names to theirs.

    Raises ValueError naming every tensor that is missing, unexpected or of another shape.
    """
    ours: State = {}
    missing, misshapen, used = [], [], set()
    for name, shape in parameter_shapes(network, config).items():
        names = their_names(name, renames)
        used.update(names)
        expected = torch.Size((shape[0] // len(names), *shape[1:])) if shape else shape
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


def to_theirs(state: Mapping[str, Tensor], network: type[nn.Module], config: object, renames: Renames) -> State:
    """The inverse of `from_theirs`, bit for bit; raises the same."""
    expected = parameter_shapes(network, config)
    _raise_unless_empty(
        missing=[name for name in expected if name not in state],
        unexpected=[name for name in state if name not in expected],
        misshapen=[f"{name} {tuple(state[name].shape)}, not {tuple(shape)}" for name, shape in expected.items()
                   if name in state and state[name].shape != shape],
    )
    theirs: State = {}
    for name in expected:
        names = their_names(name, renames)
        parts = state[name].chunk(len(names)) if len(names) > 1 else (state[name],)
        theirs.update(zip(names, parts, strict=True))
    return theirs


def _raise_unless_empty(**problems: list[str]) -> None:
    if any(problems.values()):
        raise ValueError("weights: " + "; ".join(f"{kind}: {', '.join(x)}" for kind, x in problems.items() if x))
