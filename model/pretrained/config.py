"""Converts the config.json of published networks to our configurations and back.

Published configurations have more switches than the networks here. Every switch must have the value at which these
networks equal the published ones; another value is refused by name. An absent key has the default of the published
class.
"""

from collections.abc import Mapping
from typing import Any

import torch

from model.autoencoder import AutoencoderConfig
from model.clip import PIXEL_MEAN, PIXEL_STD, ClipConfig, ImageEncoderConfig
from model.text_encoder import TextEncoderConfig
from model.unet import UNetConfig

Json = Mapping[str, Any]

# Keys of UNet2DConditionModel that must have one of these values.
UNET_FIXED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"), "addition_embed_type": (None,), "attention_type": ("default",),
    "center_input_sample": (False,), "class_embed_type": (None,), "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "cross_attention_norm": (None,), "downsample_padding": (1,),
    "dual_cross_attention": (False,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,), "freq_shift": (0,), "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "norm_eps": (1e-5,),
    "num_class_embeds": (None,), "only_cross_attention": (False,), "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,), "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,), "time_embedding_type": ("positional",), "timestep_post_act": (None,),
}
UNET_READ = ("attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "dropout",
             "in_channels", "layers_per_block", "norm_num_groups", "num_attention_heads", "out_channels", "sample_size",
             "transformer_layers_per_block", "up_block_types", "use_linear_projection")
# of parts that are off, or of half precision only
UNET_IDLE = ("addition_embed_type_num_heads", "addition_time_embed_dim", "upcast_attention")

# The same for AutoencoderKL.
AUTOENCODER_FIXED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,), "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
AUTOENCODER_READ = ("block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
                    "mid_block_add_attention", "norm_num_groups", "out_channels", "scaling_factor", "shift_factor",
                    "up_block_types")
AUTOENCODER_IDLE = ("force_upcast", "sample_size")

MOST_LAYERS = 1000
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def check_keys(config: Json, where: str, fixed: dict[str, tuple], known: tuple[str, ...]) -> None:
    """Raises ValueError for a key of `fixed` with another value, and for an unknown key that switches something on."""
    for key, value in config.items():
        if key in fixed and value not in fixed[key]:
            raise ValueError(f"{where}: {key} {value!r} is not supported; valid: {' or '.join(map(repr, fixed[key]))}")
        if key not in fixed and key not in known and not key.startswith("_") and value not in (None, False):
            raise ValueError(f"{where}: {key} {value!r} is not supported; valid: without this key")


def layer_count(value: Any, key: str, where: str) -> int:
    """A number of layers or blocks; raises ValueError for one that no published network has, before it is built."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_LAYERS:
        raise ValueError(f"{where}: {key} {value!r} is not supported; valid: 1 .. {MOST_LAYERS}")
    return value


def one_value(config: Json, key: str, default: Any, where: str) -> Any:
    """The value of a key that may be a list with one entry for each level; raises ValueError if the levels differ."""
    value = config.get(key, default)
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"{where}: {key} {value!r} is not supported; valid: the same at every level")
        return value[0]
    return value


def unet_config(config: Json, where: str = "unet") -> UNetConfig:
    """Our configuration for that of a diffusers `UNet2DConditionModel`; raises ValueError naming what is not
    supported."""
    check_keys(config, where, UNET_FIXED, UNET_READ + UNET_IDLE)
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    down = list(config.get("down_block_types", [DOWN[1]] * 3 + [DOWN[0]]))
    up = list(config.get("up_block_types", [UP[0]] + [UP[1]] * 3))
    for name, types, valid in (("down_block_types", down, DOWN), ("up_block_types", up, UP)):
        if len(types) != len(channels) or not set(types) <= set(valid):
            raise ValueError(f"{where}: {name} {types} is not supported; valid: {len(channels)} of {', '.join(valid)}")
    attention = tuple(name == DOWN[1] for name in down)
    if [name == UP[1] for name in reversed(up)] != list(attention):
        raise ValueError(f"{where}: up_block_types {up} is not supported; valid: the attention of {down}, reversed")
    return UNetConfig(
        in_channels=config.get("in_channels", 4), out_channels=config.get("out_channels", 4), channels=channels,
        blocks=layer_count(one_value(config, "layers_per_block", 2, where), "layers_per_block", where),
        attention=attention,
        depth=layer_count(one_value(config, "transformer_layers_per_block", 1, where), "transformer_layers_per_block",
                          where),
        context_width=one_value(config, "cross_attention_dim", 1280, where),
        linear_projection=config.get("use_linear_projection", False),
        norm_groups=config.get("norm_num_groups", 32), dropout=config.get("dropout", 0.0),
        **unet_heads(config, channels, attention, where),
    )


def unet_heads(config: Json, channels: tuple[int, ...], attention: tuple[bool, ...], where: str) -> dict[str, Any]:
    """`heads` if their number is equal at every level, else `head_width`; raises ValueError if neither is constant.

    The key that diffusers calls `attention_head_dim` holds the number of heads.
    """
    key = "num_attention_heads" if config.get("num_attention_heads") is not None else "attention_head_dim"
    value = config.get(key, 8)
    counts = list(value) if isinstance(value, (list, tuple)) else [value] * len(channels)
    if len(counts) != len(channels):
        raise ValueError(f"{where}: {key} {value!r} is not supported; valid: a number for each of channels {channels}")
    used = [(c, n) for c, n, attends in zip(channels, counts, (*attention[:-1], True)) if attends]
    if len({n for _, n in used}) == 1:
        return {"heads": used[0][1]}
    if any(c % n for c, n in used) or len({c // n for c, n in used}) != 1:
        raise ValueError(f"{where}: {key} {value!r} is not supported; valid: as many heads at every level, or heads of "
                         f"one width (channels {channels})")
    return {"head_width": used[0][0] // used[0][1]}


def unet_json(config: UNetConfig, sample_size: tuple[int, int]) -> dict[str, Any]:
    """The inverse of `unet_config`; sample_size is (h, w) of the latents. Raises ValueError for settings diffusers
    lacks."""
    if config.qk_norm or not config.mid_attention or config.positions or config.pooled_context:
        raise ValueError(f"qk_norm {config.qk_norm}, mid_attention {config.mid_attention}, positions "
                         f"{config.positions}, pooled_context {config.pooled_context}; valid for diffusers: False, "
                         "True, 0, False")
    heads: int | list[int] = config.heads or [max(1, c // config.head_width) for c in config.channels]
    return {
        "_class_name": "UNet2DConditionModel", **{key: values[0] for key, values in UNET_FIXED.items()},
        "attention_head_dim": heads, "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context_width, "down_block_types": [DOWN[a] for a in config.attention],
        "dropout": config.dropout, "in_channels": config.in_channels, "layers_per_block": config.blocks,
        "norm_num_groups": config.norm_groups, "out_channels": config.out_channels,
        "sample_size": sample_size[0] if sample_size[0] == sample_size[1] else list(sample_size),
        "transformer_layers_per_block": config.depth, "up_block_types": [UP[a] for a in reversed(config.attention)],
        "use_linear_projection": config.linear_projection,
    }


def autoencoder_config(config: Json, where: str = "vae") -> AutoencoderConfig:
    """Our configuration for that of a diffusers `AutoencoderKL`; raises ValueError naming what is not supported."""
    check_keys(config, where, AUTOENCODER_FIXED, AUTOENCODER_READ + AUTOENCODER_IDLE)
    channels = tuple(config.get("block_out_channels", (64,)))
    for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = list(config.get(key, [name]))
        if types != [name] * len(channels):
            raise ValueError(f"{where}: {key} {types} is not supported; valid: {name} for each of channels {channels}")
    if config.get("in_channels", 3) != config.get("out_channels", 3):
        raise ValueError(f"{where}: out_channels {config.get('out_channels', 3)} is not supported; valid: in_channels "
                         f"{config.get('in_channels', 3)}")
    return AutoencoderConfig(
        image_channels=config.get("in_channels", 3), latent_channels=config.get("latent_channels", 4),
        channels=channels, blocks=layer_count(config.get("layers_per_block", 1), "layers_per_block", where),
        mid_attention=config.get("mid_block_add_attention", True), norm_groups=config.get("norm_num_groups", 32),
    )


def latent_scale_of(config: Json, where: str = "vae") -> tuple[float, float]:
    """(latent_mean, latent_std) of a diffusers `AutoencoderKL`: unit = (raw - shift_factor) scaling_factor."""
    factor = config.get("scaling_factor", 0.18215)
    if not isinstance(factor, (int, float)) or factor <= 0:
        raise ValueError(f"{where}: scaling_factor {factor!r} is not supported; valid: a number above 0")
    return config.get("shift_factor") or 0.0, 1.0 / factor


def scaling_factor(std: float) -> float:
    """1 / std with the fewest digits that give the same std in fp32: 0.18215 as it was published."""
    short = float(f"{1 / std:.6g}")
    return short if torch.tensor(1 / short) == torch.tensor(std) else 1 / std


def autoencoder_json(config: AutoencoderConfig, std: float, size: int) -> dict[str, Any]:
    """The inverse of `autoencoder_config` and, for latents of mean 0, of `latent_scale_of`; size of images in pixels.

    No shift_factor is written, because the Stable Diffusion pipeline of diffusers ignores it.
    """
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels, "in_channels": config.image_channels,
        "latent_channels": config.latent_channels, "layers_per_block": config.blocks,
        "mid_block_add_attention": config.mid_attention, "norm_num_groups": config.norm_groups,
        "out_channels": config.image_channels, "sample_size": size, "scaling_factor": scaling_factor(std),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder_config(config: Json, where: str = "text_encoder") -> TextEncoderConfig:
    """Our configuration for that of a transformers `CLIPTextModel`; raises ValueError naming what is not supported."""
    kinds = ("clip_text_model", "clip")
    if config.get("model_type", kinds[0]) not in kinds:
        raise ValueError(f"{where}: model_type {config['model_type']!r} is not supported; valid: {kinds[0]!r}")
    if "CLIPTextModelWithProjection" in (config.get("architectures") or ()):
        raise ValueError(f"{where}: architectures {config['architectures']} is not supported; valid: ['CLIPTextModel']")
    check_transformer(config, where)
    return TextEncoderConfig(
        vocab_size=config.get("vocab_size", 49408), length=config.get("max_position_embeddings", 77),
        width=config.get("hidden_size", 512),
        layers=layer_count(config.get("num_hidden_layers", 12), "num_hidden_layers", where),
        heads=config.get("num_attention_heads", 8), mlp_width=config.get("intermediate_size", 2048),
        activation=config.get("hidden_act", "quick_gelu"),
    )


def check_transformer(config: Json, where: str) -> None:
    """Raises ValueError for switches of CLIP's transformers that are not supported."""
    fixed = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,), "use_attention_mask": (False,)}
    check_keys({key: config[key] for key in fixed if key in config}, where, fixed, ())


def text_encoder_json(config: TextEncoderConfig, start_id: int, end_id: int, pad_id: int) -> dict[str, Any]:
    """The inverse of `text_encoder_config`; raises ValueError for settings that a `CLIPTextModel` lacks."""
    if not config.causal or config.skip_last or config.token_conv:
        raise ValueError(f"causal {config.causal}, skip_last {config.skip_last}, token_conv {config.token_conv}; valid "
                         "for transformers: True, 0, 0")
    return {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "bos_token_id": start_id,
        "eos_token_id": end_id, "pad_token_id": pad_id, "hidden_act": config.activation, "hidden_size": config.width,
        "intermediate_size": config.mlp_width, "layer_norm_eps": 1e-5, "max_position_embeddings": config.length,
        "num_attention_heads": config.heads, "num_hidden_layers": config.layers, "projection_dim": config.width,
        "vocab_size": config.vocab_size,
    }


def clip_config(config: Json, pixels: Json, where: str = "clip") -> ClipConfig:
    """Our configuration for those of a transformers `CLIPModel` and of its `CLIPImageProcessor`."""
    if config.get("model_type") != "clip":
        raise ValueError(f"{where}: model_type {config.get('model_type')!r} is not supported; valid: 'clip'")
    image = config.get("vision_config") or {}
    check_transformer(image, f"{where}: vision_config")
    return ClipConfig(
        image=ImageEncoderConfig(
            size=image.get("image_size", 224), patch=image.get("patch_size", 32),
            channels=image.get("num_channels", 3), width=image.get("hidden_size", 768),
            layers=layer_count(image.get("num_hidden_layers", 12), "num_hidden_layers", f"{where}: vision_config"),
            heads=image.get("num_attention_heads", 12),
            mlp_width=image.get("intermediate_size", 3072), activation=image.get("hidden_act", "quick_gelu"),
            mean=tuple(pixels.get("image_mean", PIXEL_MEAN)), std=tuple(pixels.get("image_std", PIXEL_STD)),
        ),
        text=text_encoder_config(config.get("text_config") or {}, f"{where}: text_config"),
        width=config.get("projection_dim", 512),
    )
