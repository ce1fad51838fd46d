"""Published folders: the images of diffusers' own pipeline, read from its folder and from ours; what does not fit."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_vocabulary import write_vocabulary
from random_weights import randomize
from safetensors.torch import load_file, save_file

import sample
from diffusion.noise import PerImageNoise
from model.autoencoder import AutoencoderConfig
from model.pretrained.config import autoencoder_config, text_encoder_config, unet_config, unet_json
from model.pretrained.folder import read_clip_folder, read_diffusers_folder
from model.pretrained.names import unet_from_diffusers
from model.pretrained.tensors import kind_of
from model.text_encoder import TextEncoderConfig
from model.unet import UNetConfig
from pipeline.loading import load_pretrained, load_run
from pipeline.system import TextToImage, with_options

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a small red star above two blue circles", "the astronaut's horse, 4k!! " * 20]
LEVEL = 0.02  # of 255: images differ by rounding alone; a last step to x_0 makes 1 and an unscaled latent more
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS = {  # in the manner of the two generations
    "sd1": {"unet": {"attention_head_dim": 4, "cross_attention_dim": 32, "use_linear_projection": False},
            "text": {"hidden_act": "quick_gelu"}, "pad": "<|endoftext|>", "prediction": "epsilon", "shift": None},
    "sd2": {"unet": {"attention_head_dim": [2, 4], "cross_attention_dim": 32, "use_linear_projection": True},
            "text": {"hidden_act": "gelu"}, "pad": "!", "prediction": "v_prediction", "shift": None},
}


def published(folder: Path, kind: str) -> "diffusers.StableDiffusionPipeline":
    """A random pipeline, small in every direction, saved by diffusers to folder / "pipeline"."""
    settings = KINDS[kind]
    torch.manual_seed(0)  # biases are drawn at construction
    write_vocabulary(folder / "words", settings["pad"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words")
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, **settings["text"]))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, **settings["unet"])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, shift_factor=settings["shift"])
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False,
                                        prediction_type=settings["prediction"], **STABLE)
    pipeline = diffusers.StableDiffusionPipeline(
        randomize(vae), randomize(text), tokenizer, randomize(unet), scheduler, None, None,
        requires_safety_checker=False)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(folder, diffusers' pipeline, ours read from the folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = published(folder, request.param)
    return folder / "pipeline", pipeline, load_pretrained(folder / "pipeline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in the manner of SD-1.x; copy it before changing it."""
    parent = tmp_path_factory.mktemp("published")
    published(parent, "sd1")
    return parent / "pipeline"


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The same, to be changed."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def theirs(pipeline, height: int, width: int) -> np.ndarray:
    """Images (B, H, W, 3) in 0 .. 255 that diffusers draws from our first noise: 10 steps with guidance 5."""
    pipeline.set_progress_bar_config(disable=True)
    noise = PerImageNoise([1, 2], (4, height // 2, width // 2))()
    return 255 * pipeline(PROMPTS, negative_prompt=["an oil painting"] * 2, num_inference_steps=10, guidance_scale=5.0,
                          latents=noise, height=height, width=width, output_type="np").images


def ours(system: TextToImage) -> np.ndarray:
    """The same, ours, before they are rounded; the files hold them rounded."""
    config = with_options(system.config.sampling, steps=10, scale=5.0)
    with torch.inference_mode():
        images = system.decode(system.latents(PROMPTS, [1, 2], config, "an oil painting"))
    exact = (images.clamp(-1, 1) + 1) * 127.5
    assert torch.equal(system.images(PROMPTS, [1, 2], config, "an oil painting"), exact.round().to(torch.uint8))
    return exact.permute(0, 2, 3, 1).numpy()


def difference(given: np.ndarray, expected: np.ndarray) -> float:
    assert given.shape == expected.shape
    assert expected.std() > 20 and np.abs(expected[0] - expected[1]).mean() > 5  # images, and different ones
    return np.abs(given - expected).max()


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return one.config == two.config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- images

def test_images_equal_those_of_diffusers(pair):
    _, pipeline, system = pair
    assert system.latent_shape == (4, 8, 8) and system.schedule.config.kind == "scaled_linear"
    sampling = system.config.sampling
    assert (sampling.sampler, sampling.spacing, sampling.offset, sampling.options) == (
        "ddim", "leading", 1, {"clean_end": False})
    assert difference(ours(system), theirs(pipeline, 16, 16)) < LEVEL


def test_another_size_and_another_scheduler(pair, tmp_path):
    """PNDM as SD-1.x was published with; a schedule that ends in pure noise for v-prediction."""
    folder, pipeline, _ = pair
    if pipeline.scheduler.config.prediction_type == "epsilon":
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, **STABLE)
    else:
        scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
                                            prediction_type="v_prediction", **STABLE)
    shutil.copytree(folder, tmp_path / "copy")
    scheduler.save_pretrained(tmp_path / "copy" / "scheduler")
    other = diffusers.StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler},
                                              requires_safety_checker=False)
    system = load_pretrained(tmp_path / "copy")
    system.set_size(24, 40)
    assert difference(ours(system), theirs(other, 24, 40)) < LEVEL
    for size in ((22, 40), (0, 40)):
        with pytest.raises(ValueError, match=rf"size: {size[0]}x40; valid: multiples of 4"):
            system.set_size(*size)


def test_images_are_the_same_after_a_round_trip_through_our_writer(pair, tmp_path):
    folder, pipeline, system = pair
    system.save_pretrained(tmp_path / "written")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "written")
    assert difference(theirs(again, 16, 16), theirs(pipeline, 16, 16)) < LEVEL
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        one, two = (load_file(path / f"{name}.safetensors") for path in (folder, tmp_path / "written"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert json.loads((tmp_path / "written" / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    read = load_pretrained(tmp_path / "written")
    assert read.config == system.config
    assert all(same(getattr(read, part), getattr(system, part)) for part in ("unet", "autoencoder", "text_encoder"))
    with pytest.raises(FileExistsError, match="written exists; valid: a new folder"):
        system.save_pretrained(tmp_path / "written")
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_padding_is_read_like_text(pair):
    """No mask: what is written behind the end token changes the context, as it does in the published pipelines."""
    _, pipeline, system = pair
    context, mask = system.encode(["a star"])
    ids = pipeline.tokenizer(["a star"], padding="max_length", return_tensors="pt").input_ids
    assert mask is None and context.shape == (1, 77, 32)
    with torch.no_grad():
        torch.testing.assert_close(context, pipeline.text_encoder(ids)[0], atol=1e-5, rtol=0)


def test_latents_are_scaled_and_shifted_as_published(copy):
    path = copy / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.5, "shift_factor": 0.25}))
    vae, network = diffusers.AutoencoderKL.from_pretrained(copy / "vae"), read_diffusers_folder(copy).autoencoder
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network.encode(images).mean, (vae.encode(images).latent_dist.mean - 0.25) * 0.5)
        latents = torch.randn(1, 4, 4, 4)
        torch.testing.assert_close(network.decode(latents), vae.decode(latents / 0.5 + 0.25).sample)


def test_large_images_and_tiles(folder):
    """One at a time is what a batch of one gives; tiles are an approximation, chosen by hand."""
    system = load_pretrained(folder)
    latents = torch.randn(2, 4, 130, 136)
    with torch.inference_mode():
        images = system.decode(latents)
        assert torch.equal(images[1:], system.autoencoder.decode(latents[1:]))
        system.tiled = True
        assert 0 < (system.decode(latents) - images).abs().mean() < 0.5 * images.std()


# ---- files

def test_shards_and_pickles_hold_the_same(folder, tmp_path):
    expected = read_diffusers_folder(folder)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(read_diffusers_folder(tmp_path / "shards").files["unet"]) > 2
    shutil.copytree(folder, tmp_path / "bin")
    for path in (tmp_path / "bin").glob("*/*.safetensors"):
        name = "pytorch_model.bin" if path.parent.name == "text_encoder" else f"{path.stem}.fp16.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    for name in ("shards", "bin"):
        read = read_diffusers_folder(tmp_path / name)
        for part in ("unet", "autoencoder", "text_encoder"):
            assert same(getattr(read, part), getattr(expected, part))
    next((tmp_path / "shards" / "unet").glob("*-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="00002.* is missing, diffusion_pytorch_model.safetensors.index.json"):
        read_diffusers_folder(tmp_path / "shards")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_pickles_are_not_executed(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.with_suffix(".bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="bin is damaged, or holds more than tensors, which is not executed"):
        read_diffusers_folder(copy)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "callback": Evil()}, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match="bin is damaged, or holds more than tensors, which is not executed"):
        read_diffusers_folder(copy)


def test_half_precision_is_read_as_fp32(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(half, path)
    unet = read_diffusers_folder(copy).unet
    expected = unet_from_diffusers({name: tensor.float() for name, tensor in half.items()}, unet.config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


def test_tensors_that_do_not_fit_stop_the_load_and_are_named(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["conv_out.bias"]
    save_file({**state, "extra": torch.zeros(1), "conv_in.bias": torch.zeros(31)}, path)
    with pytest.raises(ValueError) as caught:
        load_pretrained(copy)
    assert str(caught.value).endswith("diffusion_pytorch_model.safetensors: weights: missing: conv_out.bias; "
                                      "unexpected: extra; misshapen: conv_in.bias (31,), not (32,)")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="safetensors is damaged or no safetensors file"):
        load_pretrained(copy)


@pytest.mark.parametrize("part, change, message", [
    ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time' is not supported; valid: None"),
    ("unet", {"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported; valid: None"),
    ("unet", {"num_class_embeds": 10}, "num_class_embeds 10 is not supported; valid: None"),
    ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 is not supported"),
    ("unet", {"act_fn": "gelu"}, "act_fn 'gelu' is not supported; valid: 'silu' or 'swish'"),
    ("unet", {"mid_block_type": None}, "mid_block_type None is not supported"),
    ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types .* is not supported; valid"),
    ("unet", {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "up_block_types .* valid: the attention of"),
    ("unet", {"attention_head_dim": [4, 3]}, r"attention_head_dim \[4, 3\] is not supported; valid: as many heads"),
    ("unet", {"layers_per_block": [1, 2]}, r"layers_per_block \[1, 2\] is not supported; valid: the same at every"),
    ("unet", {"in_channels": 9}, "in_channels 9 is not supported; valid: 4, the channels of the latents"),
    ("unet", {"cross_attention_dim": 64}, "cross_attention_dim 64 is not supported; valid: 32, the width of the text"),
    ("unet", {"new_switch": "on"}, "new_switch 'on' is not supported; valid: without this key"),
    ("unet", {"norm_num_groups": None}, "unet.config.json has a value of a wrong type"),
    ("unet", {"norm_num_groups": 5}, "unet.config.json: norm_groups: 5 does not divide"),
    ("vae", {"down_block_types": ["DownBlock2D"] * 2}, "down_block_types .* valid: DownEncoderBlock2D for each"),
    ("vae", {"latents_mean": [0.0] * 4}, "latents_mean .* is not supported; valid: None"),
    ("vae", {"use_quant_conv": False}, "use_quant_conv False is not supported; valid: True"),
    ("vae", {"scaling_factor": 0}, "scaling_factor 0 is not supported; valid: a number above 0"),
    ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not supported; valid: 1 .. 1000"),
    ("text_encoder", {"vocab_size": 644.5}, "config.json: its network.vocab_size: got 644.5; valid: a whole numb"),
    ("text_encoder", {"model_type": "t5"}, "model_type 't5' is not supported; valid: 'clip_text_model'"),
    ("text_encoder", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ("text_encoder", {"architectures": ["CLIPTextModelWithProjection"]}, "architectures .* is not supported"),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name 'FlowMatch.* is not supported"),
    ("scheduler", {"trained_betas": [0.1]}, r"trained_betas \[0.1\] is not supported; valid: None"),
    ("", {"_class_name": "StableDiffusionXLPipeline"}, "_class_name 'StableDiffusionXLPipeline' is not supported"),
])
def test_what_is_not_supported_is_refused_in_one_line(copy, part, change, message):
    path = copy / part / {"scheduler": "scheduler_config.json", "": "model_index.json"}.get(part, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["unet", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
                                  "scheduler/scheduler_config.json", "tokenizer"])
def test_what_is_missing_is_named(copy, name):
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.split("/")[0]):
        load_pretrained(copy)


def test_kinds(folder, tmp_path):
    assert kind_of(folder) == "diffusers"
    assert kind_of(folder / "unet" / "diffusion_pytorch_model.safetensors") == "single file"
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere; valid: a diffusers folder"):
        kind_of(tmp_path / "nowhere")
    for path in (tmp_path, folder / "model_index.json"):
        with pytest.raises(ValueError, match="is no checkpoint; valid: a diffusers folder"):
            kind_of(path)


def test_a_system_trained_here_has_no_counterpart(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="its own tokenizer and masks padding; valid for diffusers"):
        load_run(tiny_run).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- CLIP

@torch.no_grad()
def test_a_clip_folder_gives_the_vectors_of_transformers(tmp_path):
    config = transformers.CLIPConfig(
        vision_config={"hidden_size": 24, "intermediate_size": 40, "image_size": 16, "num_hidden_layers": 2,
                       "num_attention_heads": 3, "patch_size": 8},
        text_config={"hidden_size": 32, "intermediate_size": 40, "vocab_size": 99, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "eos_token_id": 98, "bos_token_id": 0}, projection_dim=20)
    model = randomize(transformers.CLIPModel(config)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    assert kind_of(tmp_path) == "clip"
    clip = read_clip_folder(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = torch.tensor([[0, 5, 98, 0], [0, 7, 9, 98]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    expected = model(ids, (images / 2 + 0.5 - 0.4) / 0.2, mask.long()).logits_per_image
    torch.testing.assert_close(clip(images, ids, mask), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="is a CLIP model, it draws no images"):
        load_pretrained(tmp_path)


# ---- published configurations

def test_published_configurations_are_our_presets():
    """The keys that the files of SD-1.5 and SD-2.1 give, the rest at its default."""
    levels = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    common = {"block_out_channels": [320, 640, 1280, 1280], "down_block_types": levels[0], "up_block_types": levels[1],
              "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-05, "sample_size": 64, "act_fn": "silu"}
    assert unet_config({**common, "attention_head_dim": 8, "cross_attention_dim": 768}) == UNetConfig.sd1()
    second = unet_config({**common, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
                          "use_linear_projection": True, "upcast_attention": True, "dual_cross_attention": False})
    assert second == UNetConfig.sd2()
    for config in (UNetConfig.sd1(), UNetConfig.sd2()):
        assert unet_config(unet_json(config, (64, 64))) == config
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
           "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    assert autoencoder_config(vae) == AutoencoderConfig.sd()
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    assert text_encoder_config({**text, "torch_dtype": "float32"}) == TextEncoderConfig.clip_l()
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    assert text_encoder_config({**text, "hidden_act": "gelu"}) == TextEncoderConfig.sd2()


# ---- the command line

def test_sample_draws_from_a_published_folder(folder, tmp_path, capsys):
    arguments = ["a red star", "--pretrained", str(folder), "--steps", "3", "--guidance", "2", "--out"]
    sample.main([*arguments, str(tmp_path / "a")])
    sample.main([*arguments, str(tmp_path / "b"), "--size", "24x40", "--tiled", "--seed", "3"])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "00000_a-red-star_seed0.png", "grid.png", "results.jsonl"]
    files = [str(tmp_path / "a" / "00000_a-red-star_seed0.png"), str(tmp_path / "b" / "00000_a-red-star_seed3.png")]
    assert sample.main(["--pretrained", str(folder), "--verify", *files]) == 0
    assert sample.main(["--verify", *files]) == 1
    assert "was made with the checkpoint 'pipeline'; valid: --pretrained PATH" in capsys.readouterr().err
    from PIL import Image
    with Image.open(tmp_path / "b" / "00000_a-red-star_seed3.png") as image:
        assert image.size == (40, 24)
        given = json.loads(image.text["parameters"])
    assert given["pretrained"] == "pipeline" and (given["size"], given["tiled"]) == ("24x40", True)
    assert given["weights"].keys() == {"unet", "vae", "text_encoder"} and given["sampler"] == "ddim"


@pytest.mark.parametrize("arguments, message", [
    (["--size", "17"], "size: 17x17; valid: multiples of 4"),
    (["--size", "big"], "--size big; valid: N, or HxW, in pixels"),
    (["--steps", "1001"], "valid: 1 .. 1000"),
    (["--tokenizer", "NOWHERE"], "NOWHERE holds no tokenizer; valid: vocab.json and merges.txt"),
])
def test_mistakes_on_the_command_line(folder, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError)) as caught:
        sample.main(["a", "--pretrained", str(folder), "--out", str(tmp_path / "out"), *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
