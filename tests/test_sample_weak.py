"""Autoguidance from the command line: an earlier state or a smaller network takes the place of the empty prompt."""
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from sample_calls import PROMPT, draw, parameters, pixels

import sample
from diffusion.noise import PerImageNoise
from files.weights import save_weights
from model.unet import UNet
from pipeline.loading import load_run, load_weaker
from pipeline.system import with_options
from training.experiment import load_experiment

EARLIER = Path("state", "denoiser", "step_00000008.pt")


def other_run(tiny_run: Path, folder: Path, **denoiser) -> Path:
    """The tiny run with another denoiser section and, where its network is another, with new weights for it."""
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("state", "cache", "samples"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in denoiser.items():
        config["denoiser"][key] = {**config["denoiser"][key], **value} if isinstance(value, dict) else value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if "unet" in denoiser:
        torch.manual_seed(1)
        unet = UNet(load_experiment(folder / "config.yaml").denoiser.unet)
        with torch.no_grad():
            for parameter in unet.parameters():  # the last layers begin at zero
                parameter.add_(0.05 * torch.randn(parameter.shape))
        save_weights(unet, folder / "denoiser.safetensors")
    return folder


@pytest.fixture(scope="module")
def smaller(tiny_run, tmp_path_factory) -> Path:
    return other_run(tiny_run, tmp_path_factory.mktemp("weak") / "smaller", unet={"channels": [16, 16]})


@pytest.fixture(scope="module", params=["earlier", "smaller"])
def weak_path(request, tiny_run, smaller) -> Path:
    return tiny_run / EARLIER if request.param == "earlier" else smaller


def test_it_is_the_published_formula(tiny_run, weak_path):
    """One step from pure noise, where x_0 of v-prediction is -v: the prompt on both sides, one evaluation of each."""
    system = load_run(tiny_run)
    system.guide = load_weaker(system, weak_path)
    prompts, seeds, seen = [PROMPT, "a moon"], [3, 4], []
    for part in (system, system.guide):
        part.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    given = system.latents(prompts, seeds, with_options(system.config.sampling, steps=1, scale=2.5), "never read")
    assert seen == [2, 2]
    with torch.inference_mode():
        x_T, t = PerImageNoise(seeds, (4, 8, 8))(), torch.full((2,), 999)
        weak, main = (part.unet(x_T, t, *part.encode(prompts)) for part in (system.guide, system))
    assert (weak - main).abs().max() > 1e-4
    torch.testing.assert_close(given, -(weak + 2.5 * (main - weak)), rtol=0, atol=1e-5)


def test_guidance_one_needs_no_weak_network(tiny_run, smaller):
    system = load_run(tiny_run)
    config = with_options(system.config.sampling, scale=1.0)
    plain = system.latents([PROMPT], [0], config)
    system.guide = load_weaker(system, smaller)
    system.guide.unet.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    assert torch.equal(system.latents([PROMPT], [0], config), plain)


def test_the_command_draws_and_verifies(tiny_run, weak_path, smaller, tmp_path, capsys):
    flags = ["--guidance", "3", "--weak", str(weak_path)]
    name = "00000_a-small-red-star_seed0.png"
    guided = draw(tiny_run, tmp_path / "a", PROMPT, *flags)[name]
    plain = draw(tiny_run, tmp_path / "b", PROMPT, "--guidance", "3")[name]
    assert (pixels(guided) != pixels(plain)).any()
    assert parameters(guided)["weak"]["name"] == weak_path.name and "weak" not in parameters(plain)
    run = ["--run", str(tiny_run)]
    capsys.readouterr()
    assert sample.main([*run, "--weak", str(weak_path), "--verify", str(guided)]) == 0
    assert ": equal, " in capsys.readouterr().out
    other = tiny_run / "state" / "denoiser" / "step_00000012.pt"
    for weak, path, message in (
            ([], guided, f"was made with the weaker network '{weak_path.name}'; valid: --weak PATH"),
            (["--weak", str(other)], guided, f"was made with other weights than those in {other}"),
            (["--weak", str(smaller)], plain, "was not made with --weak")):
        assert sample.main([*run, *weak, "--verify", str(path)]) == 1
        assert message in capsys.readouterr().err


def test_it_goes_with_editing_attention_and_grids(tiny_run, smaller, tmp_path):
    first = draw(tiny_run, tmp_path / "a", PROMPT)["00000_a-small-red-star_seed0.png"]
    files = draw(tiny_run, tmp_path / "b", PROMPT, "--weak", str(smaller), "--init", str(first), "--attention",
                 "--xy", "guidance=1,3", "strength=0.67,1")
    assert sum(name.endswith("_attention.png") for name in files) == 4


@pytest.mark.parametrize("change, message", [
    ({"schedule": {"zero_terminal_snr": False}}, "denoiser.schedule is ScheduleConfig(kind='cosine'"),
    ({"prediction_type": "sample"}, "denoiser.prediction_type is sample; valid: v_prediction"),
    (None, "has another autoencoder; valid: a run on the same latents")])
def test_another_process_is_refused(tiny_run, tmp_path, change, message):
    folder = other_run(tiny_run, tmp_path / "other", **change or {})
    if change is None:
        data = bytearray((folder / "autoencoder.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "autoencoder.safetensors").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load_weaker(load_run(tiny_run), folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flags, message", [
    (["--weak", "NOWHERE"], "no run folder or checkpoint"), (["--weak", "TEXT"], "is damaged or no state of this run"),
    (["--weak", "CUT"], "is damaged or no state of this run"), (["--weak", "OTHER"], "is damaged or no state of this"),
    (["--weak", "TEXT", "--negative", "b"], "--weak with --negative; valid: one of them"),
    (["--weak", "TEXT", "--interpolate", "3"], "--weak with --interpolate"),
    (["--weak", "TEXT", "--invert", "TEXT"], "--weak with --invert"),
    (["--weak", "TEXT", "--xy", "negative=b|c"], "--xy negative with --weak")])
def test_mistakes_are_one_line(tiny_run, tmp_path, flags, message):
    (tmp_path / "TEXT").write_text("no checkpoint")
    (tmp_path / "CUT").write_bytes((tiny_run / EARLIER).read_bytes()[:-2000])
    torch.save({"average": {"unet.x": torch.zeros(1)}}, tmp_path / "OTHER")
    flags = [str(tmp_path / word) if word.isupper() else word for word in flags]
    if "--xy" in flags:
        flags[1] = str(tiny_run / EARLIER)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)) as caught:
        sample.main(["--run", str(tiny_run), "--out", str(tmp_path / "out"), PROMPT, *flags])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
