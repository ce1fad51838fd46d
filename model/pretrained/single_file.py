"""Reads single files of Stable Diffusion 1.x and 2.x, in the layout of the code that they were trained with.

    model.diffusion_model.*            the UNet, blocks counted through all levels
    first_stage_model.*                the autoencoder, its attention as 1x1 convolutions
    cond_stage_model.transformer.*     1.x: the text encoder of CLIP, as in transformers
    cond_stage_model.model.*           2.x: that of OpenCLIP, with one matrix for queries, keys and values

Rombach et al. 2022. The file holds no configuration. Shapes determine most of it; the rest (heads, groups of the
norms, activation) is as published for 1.x or 2.x, whichever text encoder is found.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from model.autoencoder import SD_LATENT_STD, Autoencoder, AutoencoderConfig
from model.pretrained.folder import Published, check_parts
from model.pretrained.names import (
    TRANSFORMER_BLOCK,
    Renames,
    State,
    from_theirs,
    rename,
    text_encoder_from_transformers,
    with_latent_scale,
)
from model.pretrained.tensors import metadata_of, network_from_state, read_tensors
from model.text_encoder import TextEncoder, TextEncoderConfig
from model.unet import UNet, UNetConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
HEAD_WIDTH = 64  # of the text encoders, and of the UNet of 2.x; that of 1.x has 8 heads at every level

# What a file may hold beside the three networks: the other average of the weights, the noise schedule as tables,
# training state, the part of OpenCLIP that is not used, and two marks that programs leave: the model predicts v
# (v_pred), its last time is pure noise (ztsnr).
UNUSED = re.compile(
    r"(v_pred|ztsnr|\w*alphas_cumprod(_prev)?|betas|posterior_\w+|lvlb_weights|logvar|scale_factor|global_step)$"
    r"|model_ema\.|first_stage_model\.loss\.|cond_stage_model\.(logit_scale|text_projection)$"
)

# The noise schedule of both, as the scheduler of a diffusers folder would say it.
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
             "timestep_spacing": "leading"}
# Of a model whose last time is pure noise: Lin et al. 2023, section 3.
ZERO_SNR = {**SCHEDULER, "_class_name": "DDIMScheduler", "clip_sample": False, "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing"}
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def read_single_file(path: str | Path, prediction_type: str | None = None) -> Published:
    """The system in a single file (.safetensors; .ckpt if it holds nothing but tensors).

    prediction_type: the target that the UNet predicts, in place of what the file says: its metadata in
    `modelspec.prediction_type`, or a tensor named v_pred. Without either 1.x predicts "epsilon"; for 2.x there are both
    kinds, "v_prediction" at 768 pixels and "epsilon" at 512. Raises ValueError for 2.x that does not say it, for
    another layout, for a damaged file, and naming every tensor that is missing, unexpected or of another shape.
    """
    path = Path(path)
    metadata, state = metadata_of(path), read_tensors(path)
    try:
        return from_single_state(state, path, prediction_type or recorded_prediction(state, metadata))
    except KeyError as error:
        raise ValueError(f"{path} is no Stable Diffusion 1.x or 2.x: it lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def recorded_prediction(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """What the file says that its UNet predicts; None if it does not say. Raises ValueError for what is not known."""
    said = metadata.get("modelspec.prediction_type")
    if said is not None and said not in PREDICTIONS:
        raise ValueError(f"modelspec.prediction_type {said!r} is not supported; valid: {', '.join(PREDICTIONS)}, or "
                         "--prediction in its place")
    return PREDICTIONS[said] if said is not None else "v_prediction" if "v_pred" in state else None


def from_single_state(state: State, path: Path, prediction_type: str | None) -> Published:
    """The system of the tensors of a single file."""
    for prefix in ("conditioner.", f"{UNET}label_emb."):
        if any(name.startswith(prefix) for name in state):
            raise ValueError(f"{prefix}* is not supported (SDXL); valid: Stable Diffusion 1.x or 2.x")
    second = any(name.startswith(OPENCLIP) for name in state)
    if second and prediction_type is None:
        raise ValueError("the file does not say what a 2.x model predicts; valid: prediction type v_prediction (768 "
                         "pixels) or epsilon (512)")
    prediction_type = prediction_type or "epsilon"
    if "ztsnr" in state and prediction_type == "epsilon":
        raise ValueError("the file is marked ztsnr, and the noise says nothing of an image in pure noise; valid: "
                         "prediction type v_prediction")
    check_all_known(state, OPENCLIP if second else CLIP)
    scheduler = ZERO_SNR if "ztsnr" in state else SCHEDULER

    unet_shape = unet_config(state, second)
    vae_shape = autoencoder_config(state)
    unet = from_theirs(tensors_with_prefix(state, UNET), UNet, unet_shape, unet_table(unet_shape))
    vae = from_theirs(squeeze_attention(tensors_with_prefix(state, VAE)), Autoencoder, vae_shape,
                      autoencoder_table(vae_shape))
    text_encoder = read_openclip(state) if second else read_clip(state)
    check_parts(unet_shape, vae_shape, text_encoder.config)
    side = 96 if second and prediction_type == "v_prediction" else 64
    return Published(
        unet=network_from_state(UNet, unet_shape, unet),
        autoencoder=network_from_state(Autoencoder, vae_shape, with_latent_scale(vae, vae_shape, SD_LATENT_STD)),
        text_encoder=text_encoder, scheduler={**scheduler, "prediction_type": prediction_type},
        tokenizer=None, latent_size=(side, side), files={"single file": (path,)},
    )


def tensors_with_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin with `prefix`, under their full names."""
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix) and not UNUSED.match(name)}


def check_all_known(state: Mapping[str, Tensor], text: str) -> None:
    """Raises ValueError naming every tensor that belongs to none of the three networks and is not known as unused."""
    extra = [name for name in state if not name.startswith((UNET, VAE, text)) and not UNUSED.match(name)]
    if extra:
        raise ValueError(f"weights: unexpected: {', '.join(extra)}")


def count_in_names(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers match the group of `pattern` in the names: the number of blocks, layers or levels."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


# ---- UNet

def unet_config(state: Mapping[str, Tensor], second: bool) -> UNetConfig:
    """The configuration of the UNet, derived from the shapes of its tensors."""
    channels: list[int] = []
    attention: list[bool] = []
    blocks, index, new_level = 0, 1, True
    while True:
        here = f"{UNET}input_blocks.{index}.0"
        if f"{here}.op.weight" in state:
            new_level = True
        elif f"{here}.out_layers.3.weight" in state:
            if new_level:
                channels.append(state[f"{here}.out_layers.3.weight"].shape[0])
                attention.append(f"{UNET}input_blocks.{index}.1.norm.weight" in state)
            blocks += len(channels) == 1
            new_level = False
        else:
            break
        index += 1
    if not channels:
        raise KeyError(f"{UNET}input_blocks.1.0.out_layers.3.weight")
    middle = f"{UNET}middle_block.1."
    projection = state[f"{middle}proj_in.weight"]
    return UNetConfig(
        in_channels=state[f"{UNET}input_blocks.0.0.weight"].shape[1],
        out_channels=state[f"{UNET}out.2.weight"].shape[0],
        channels=tuple(channels), blocks=blocks, attention=tuple(attention),
        depth=count_in_names(state, re.escape(middle) + r"transformer_blocks\.(\d+)\."),
        heads=None if second else 8, head_width=HEAD_WIDTH,
        context_width=state[f"{middle}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        linear_projection=projection.ndim == 2,
    )


def unet_table(config: UNetConfig) -> Renames:
    """The table from our names to theirs, which number residual blocks and changes of resolution through all levels."""
    table = [(r"^conv_in\.", "input_blocks.0.0."), (r"^time\.linear1\.", "time_embed.0."),
             (r"^time\.linear2\.", "time_embed.2."), (r"^norm_out\.", "out.0."), (r"^conv_out\.", "out.2."),
             (r"^mid\.resblocks\.0\.", "middle_block.0."), (r"^mid\.transformers\.0\.", "middle_block.1."),
             (r"^mid\.resblocks\.1\.", "middle_block.2.")]
    n = 1
    for level in range(len(config.channels)):
        for block in range(config.blocks):
            table += [(rf"^down\.{level}\.resblocks\.{block}\.", f"input_blocks.{n}.0."),
                      (rf"^down\.{level}\.transformers\.{block}\.", f"input_blocks.{n}.1.")]
            n += 1
        table.append((rf"^down\.{level}\.resample\.conv\.", f"input_blocks.{n}.0.op."))
        n += 1
    n = 0
    for place, attends in enumerate(reversed(config.attention)):
        for block in range(config.blocks + 1):
            table += [(rf"^up\.{place}\.resblocks\.{block}\.", f"output_blocks.{n}.0."),
                      (rf"^up\.{place}\.transformers\.{block}\.", f"output_blocks.{n}.1.")]
            n += 1
        table.append((rf"^up\.{place}\.resample\.", f"output_blocks.{n - 1}.{2 if attends else 1}."))
    return (*table, *UNET_LAYERS, (r"^", UNET))


BLOCK = r"((?:input|output)_blocks\.\d+\.0|middle_block\.[02])"
UNET_LAYERS: Renames = (
    (rf"^{BLOCK}\.norm1\.", r"\1.in_layers.0."),
    (rf"^{BLOCK}\.conv1\.", r"\1.in_layers.2."),
    (rf"^{BLOCK}\.time\.", r"\1.emb_layers.1."),
    (rf"^{BLOCK}\.norm2\.", r"\1.out_layers.0."),
    (rf"^{BLOCK}\.conv2\.", r"\1.out_layers.3."),
    (rf"^{BLOCK}\.shortcut\.", r"\1.skip_connection."),
) + TRANSFORMER_BLOCK


# ---- autoencoder

def autoencoder_config(state: Mapping[str, Tensor]) -> AutoencoderConfig:
    """The configuration of the autoencoder, derived from the shapes of its tensors."""
    encoder = f"{VAE}encoder."
    levels = count_in_names(state, re.escape(encoder) + r"down\.(\d+)\.block\.")
    return AutoencoderConfig(
        image_channels=state[f"{encoder}conv_in.weight"].shape[1],
        latent_channels=state[f"{VAE}post_quant_conv.weight"].shape[0],
        channels=tuple(state[f"{encoder}down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)),
        blocks=count_in_names(state, re.escape(encoder) + r"down\.0\.block\.(\d+)\."),
        mid_attention=f"{encoder}mid.attn_1.norm.weight" in state,
    )


def autoencoder_table(config: AutoencoderConfig) -> Renames:
    """The table from our names to theirs; their decoder counts levels from the finest, ours in the order of
    execution."""
    last = len(config.channels) - 1
    up = tuple((rf"^decoder\.up\.{place}\.", f"decoder.up:{last - place}.") for place in range(last + 1))
    return (
        *up,
        (r"\bup:", "up."),
        (r"\.resblocks\.", ".block."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"^(encoder\.down\.\d+)\.resample\.", r"\1.downsample."),
        (r"^(decoder\.up\.\d+)\.resample\.", r"\1.upsample."),
        (r"\.mid\.resblock(\d)\.", r".mid.block_\1."),
        (r"\.mid\.attention\.norm\.", ".mid.attn_1.norm."),
        (r"\.mid\.attention\.attention\.qkv\.", ".mid.attn_1.q|k|v."),
        (r"\.mid\.attention\.attention\.out\.", ".mid.attn_1.proj_out."),
        (r"^(post_)?quant\.", r"\1quant_conv."),
        (r"^", VAE),
    )


def squeeze_attention(state: Mapping[str, Tensor]) -> State:
    """The tensors with the 1x1 convolutions (C, C, 1, 1) of the attention as matrices (C, C)."""
    return {name: tensor[:, :, 0, 0] if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) and tensor.ndim == 4
            else tensor for name, tensor in state.items()}


# ---- text encoders

def read_clip(state: Mapping[str, Tensor]) -> TextEncoder:
    """The text encoder of 1.x."""
    mine = {rename(name, ((rf"^{re.escape(CLIP)}(text_model\.)?", ""),)): tensor
            for name, tensor in tensors_with_prefix(state, CLIP).items()}
    if "embeddings.token_embedding.weight" not in mine:
        raise KeyError(f"{CLIP}text_model.embeddings.token_embedding.weight")
    tokens = mine["embeddings.token_embedding.weight"]
    config = TextEncoderConfig(
        vocab_size=tokens.shape[0], length=mine["embeddings.position_embedding.weight"].shape[0],
        width=tokens.shape[1], layers=count_in_names(mine, r"encoder\.layers\.(\d+)\."),
        heads=max(1, tokens.shape[1] // HEAD_WIDTH), mlp_width=mine["encoder.layers.0.mlp.fc1.weight"].shape[0],
        activation="quick_gelu",
    )
    return network_from_state(TextEncoder, config, text_encoder_from_transformers(mine, config))


OPENCLIP_TABLE: Renames = (
    (r"^position_embedding\.weight", "positional_embedding"),
    (r"^norm_out\.", "ln_final."),
    (r"^layers\.", "transformer.resblocks."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attention\.qkv\.", ".attn.in_proj_"),  # in_proj_weight, in_proj_bias
    (r"\.attention\.out\.", ".attn.out_proj."),
    (r"\.linear1\.", ".mlp.c_fc."),
    (r"\.linear2\.", ".mlp.c_proj."),
    (r"^", OPENCLIP),
)


def read_openclip(state: Mapping[str, Tensor]) -> TextEncoder:
    """The text encoder of 2.x without its last layer, because the UNet was trained on the states before it."""
    mine = tensors_with_prefix(state, OPENCLIP)
    layers = count_in_names(mine, re.escape(OPENCLIP) + r"transformer\.resblocks\.(\d+)\.") - 1
    unused = (f"{OPENCLIP}transformer.resblocks.{layers}.", f"{OPENCLIP}text_projection", f"{OPENCLIP}logit_scale",
              f"{OPENCLIP}attn_mask")
    tokens = mine[f"{OPENCLIP}token_embedding.weight"]
    config = TextEncoderConfig(
        vocab_size=tokens.shape[0], length=mine[f"{OPENCLIP}positional_embedding"].shape[0], width=tokens.shape[1],
        layers=layers, heads=max(1, tokens.shape[1] // HEAD_WIDTH), activation="gelu",
        mlp_width=mine[f"{OPENCLIP}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
    )
    used = {name: tensor for name, tensor in mine.items() if not name.startswith(unused)}
    return network_from_state(TextEncoder, config, from_theirs(used, TextEncoder, config, OPENCLIP_TABLE))
