"""Students of both methods and guidance-free runs by the real commands: trained, sampled, evaluated; what does not fit
is refused."""
import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from sample_calls import PROMPT, draw, parameters, pixels
from small_runs import at_step, losses, terminate

import evaluate
import sample
import train
from data.shapes.shapes import Shapes, ShapesConfig
from files.config import ConfigError, read_yaml
from files.run_folder import RunFolder
from files.weights import load_weights
from files.whole import sha256_of
from model.device import freeze
from model.unet import UNet
from pipeline.config import read_system_config
from pipeline.loading import load_run, load_weaker
from pipeline.prompt_schedule import read_prompt
from pipeline.system import with_options
from training.experiment import load_experiment
from training.loop import Interrupted
from training.release import release
from training.seed import whole_batch
from training.stages.denoiser import Denoising, new_networks
from training.stages.pairs import PairBatch
from training.stages.student import Teacher, new_student

NAME = "00000_a-small-red-star_seed0.png"


def student_config(tiny: dict, teacher, **changes) -> dict:
    """The configuration of a student of the tiny run that takes any scale of a range."""
    return {**tiny, "name": "student", "stages": ["student"], "start_from": str(teacher),
            "denoiser": {**tiny["denoiser"], "unet": {**tiny["denoiser"]["unet"], "guidance_input": True}},
            "student": {"images": 32, "validation": 12, "guidance_scales": [1.5, 4.0], "gap": [0.5, 0.125],
                        "train": tiny["denoiser"]["train"]},
            "sampling": {"sampler": "consistency", "steps": 2, "guidance": {"scale": 3.0}}, **changes}


def shortcut_config(tiny: dict, teacher) -> dict:
    """The same by the method shortcut, with jumps of up to an eighth that follow the teacher."""
    config = student_config(tiny, teacher)
    config["denoiser"]["unet"] = {**config["denoiser"]["unet"], "jump_input": True}
    config["student"] |= {"method": "shortcut", "gap": [0.125, 0.125]}
    return {**config, "sampling": {**config["sampling"], "sampler": "ddim"}}


def write(path, config: dict) -> str:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny, tiny_run):
    folder = tmp_path_factory.mktemp("student")
    train.main([write(folder / "student.yaml", student_config(tiny, tiny_run)), f"run={folder / 'run'}"])
    return folder / "run"


@pytest.fixture(scope="module")
def shortcut_run(tmp_path_factory, tiny, tiny_run):
    folder = tmp_path_factory.mktemp("shortcut")
    train.main([write(folder / "student.yaml", shortcut_config(tiny, tiny_run)), f"run={folder / 'run'}"])
    return folder / "run"


@pytest.fixture(scope="module")
def guidance_free_run(tmp_path_factory, tiny, tiny_run):
    """A fine-tune of the tiny run by guidance-free training, with grounding, whose attention it must not disturb."""
    folder = tmp_path_factory.mktemp("gft")
    config = {**tiny, "name": "gft", "stages": ["denoiser"], "start_from": str(tiny_run)}
    config["denoiser"] = {**tiny["denoiser"], "guidance_scales": [1.0, 8.0], "grounding": {"attention": 0.3},
                          "unet": {**tiny["denoiser"]["unet"], "guidance_input": True}}
    train.main([write(folder / "gft.yaml", config), f"run={folder / 'run'}"])
    return folder / "run"


def test_a_student_is_trained_and_knows_its_teacher(student, tiny_run):
    manifest = json.loads((student / "manifest.json").read_text())
    names = ("tokenizer.json", "autoencoder.safetensors", "text_encoder.safetensors", "denoiser.safetensors")
    assert manifest["start_from"]["files"] == {name: sha256_of(tiny_run / name) for name in names}
    assert manifest["student"]["guidance_scales"] == [1.5, 4.0]
    for name in names[:3]:
        assert (student / name).read_bytes() == (tiny_run / name).read_bytes()
    assert len([key for key in losses(student) if key[0] == "student" and key[2]]) == 12


def test_it_is_sampled_as_its_config_says(student, tmp_path):
    """With its own sampler and steps, one call of the network a step for an image, and another image for another
    scale."""
    system = load_run(student, moderation=None)
    calls = []
    system.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    three = system.latents([PROMPT], [0])
    assert calls == [1, 1]
    with torch.no_grad():  # twelve steps are too few for the new input to be seen in pixels
        torch.nn.init.normal_(system.unet.guidance.linear2.weight, std=0.5)
    config = system.config.sampling
    assert not torch.equal(system.latents([PROMPT], [0], with_options(config, scale=2.0)),
                           system.latents([PROMPT], [0], with_options(config, scale=4.0)))
    assert three.isfinite().all()
    assert sample.main(["--run", str(student), "--out", str(tmp_path), PROMPT]) == 0
    stored = parameters(tmp_path / NAME)
    assert (stored["sampler"], stored["steps"], stored["guidance"]["scale"]) == ("consistency", 2, 3.0)
    assert sample.main(["--run", str(student), "--verify", str(tmp_path / NAME)]) == 0


@pytest.mark.parametrize("sampler, lengths", [
    ("ddim", {n: [1 / n] * n for n in (1, 2, 4, 8)}), ("consistency", {1: [1], 2: [1, 0.5], 4: [1, 0.75, 0.5, 0.25]}),
    ("euler_ancestral", {4: [0.0] * 4})])
def test_a_shortcut_model_is_told_how_far_each_step_goes(shortcut_run, sampler, lengths):
    """By the samplers that jump, and another length gives another image; one call a step."""
    system, seen = load_run(shortcut_run, moderation=None), []
    with torch.no_grad():  # twelve steps are too few for the new input to be seen
        torch.nn.init.normal_(system.unet.jump.linear2.weight, std=0.5)
    handle = system.unet.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(named["jump"][0].item()), with_kwargs=True)
    for steps, wanted in lengths.items():
        config = with_options(system.config.sampling, sampler, steps)
        latents = system.latents([PROMPT, PROMPT], [0, 1], config)
        assert seen == pytest.approx(wanted, abs=1e-3) and latents.isfinite().all()
        seen.clear()
        fast = system.at_speed("fast").latents([PROMPT, PROMPT], [0, 1], config)
        assert (fast - latents).abs().mean() < 0.1 * latents.std()
        seen.clear()
    handle.remove()
    x, t = torch.zeros(1, *system.latent_shape), torch.tensor([500])
    context, mask = system.encode([PROMPT])
    short, long = (system.unet(x, t, context, mask, jump=torch.tensor([jump])) for jump in (0.0, 1.0))
    assert torch.equal(short, system.unet(x, t, context, mask)) and not torch.equal(short, long)


def test_a_student_begins_as_its_teacher_to_the_bit(tiny, tiny_run, shortcut_run):
    """Whatever its two inputs say; after training it is another network."""
    system = read_system_config(shortcut_run / "config.yaml")
    teacher = Teacher(RunFolder(tiny_run), system, torch.device("cpu"))
    student = freeze(new_student(teacher, system, 0, torch.device("cpu")))
    random = torch.Generator().manual_seed(0)
    x, t, jump, beta = (torch.rand(3, *shape, generator=random) for shape in ((4, 8, 8), (), (), ()))
    t, context = (999 * t).long(), torch.randn(3, 5, system.unet.context_width, generator=random)
    assert torch.equal(teacher.unet(x, t, context), student(x, t, context, jump=jump, beta=beta))
    trained = load_run(shortcut_run, moderation=None).unet
    assert not torch.equal(teacher.unet(x, t, context), trained(x, t, context))
    assert trained.jump.linear2.weight.abs().max() > 0 and trained.guidance.linear2.weight.abs().max() > 0
    with pytest.raises(ValueError, match="jump: given to a network without jump_input; valid: None"):
        teacher.unet(x, t, context, jump=jump)


def test_a_shortcut_model_that_was_interrupted_is_the_same(tiny, tiny_run, shortcut_run, tmp_path, monkeypatch):
    arguments = [write(tmp_path / "student.yaml", shortcut_config(tiny, tiny_run)), f"run={tmp_path / 'run'}"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, 7, terminate)
        train.main(arguments)
    train.main(arguments)
    went_on, whole = (run / "denoiser.safetensors" for run in (tmp_path / "run", shortcut_run))
    assert went_on.read_bytes() == whole.read_bytes()
    assert losses(tmp_path / "run") == losses(shortcut_run)


@pytest.mark.parametrize("arguments, message", [
    (["--guidance", "7"], "guidance.scale: value 7; valid: 1.5 .. 4, what the network was trained for"),
    (["--guidance", "1"], "guidance.scale: value 1; valid: 1.5 .. 4"),
    (["--negative", "blue"], "a negative prompt; valid for a run whose guidance is folded into its denoiser: none"),
    (["--set", "method=apg"], "guidance.method: value apg; valid: cfg"),
])
def test_what_a_folded_network_cannot_follow_is_refused(student, tmp_path, arguments, message):
    with pytest.raises((ValueError, SystemExit), match=re.escape(message)):
        sample.main(["--run", str(student), "--out", str(tmp_path / "out"), PROMPT, *arguments])
    assert not (tmp_path / "out").exists()


def test_it_has_no_weaker_network(student, tiny_run):
    with pytest.raises(ValueError, match="cannot guide: guidance is folded into"):
        load_weaker(load_run(student, moderation=None), tiny_run)


@pytest.mark.slow
def test_both_are_evaluated(student, guidance_free_run, capsys):
    """Of the default scales those that the run was trained for are tried."""
    for run, scales in ((student, [1.5, 2.0, 3.0]), (guidance_free_run, [1.5, 2.0, 3.0, 5.0])):
        evaluate.main([str(run), "--count", "4", "--validation", "2"])
        [report] = (run / "report").glob("*.json")
        tried = json.loads(report.read_text())["guidance_on_validation"]
        assert [row["guidance"] for row in tried] == scales


def test_a_guidance_free_run_is_sampled_by_one_call_a_step(guidance_free_run, tmp_path):
    files = draw(guidance_free_run, tmp_path / "one", PROMPT, "--guidance", "2")
    assert parameters(files[NAME])["guidance"]["scale"] == 2.0
    system = load_run(guidance_free_run, moderation=None)
    calls = []
    system.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    system.latents([PROMPT, PROMPT], [0, 1])
    assert calls == [2, 2, 2]
    fast = draw(guidance_free_run, tmp_path / "fast", PROMPT, "--guidance", "2", "--speed", "fast")
    assert abs(pixels(fast[NAME]) - pixels(files[NAME])).mean() <= 3


def test_the_loss_of_guidance_free_training_is_the_usual_one_at_one(guidance_free_run, tiny_run):
    """For a dropped caption, and for every image at scale 1; elsewhere it is another."""
    experiment = load_experiment(guidance_free_run / "config.yaml")
    stage, device = experiment.denoiser, torch.device("cpu")
    system = load_run(guidance_free_run, moderation=None)
    denoising = Denoising(stage, system.tokenizer, 0, device)
    networks = new_networks(stage, 0, device)
    load_weights(networks.unet, guidance_free_run / "denoiser.safetensors")
    random = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(3, 4, 8, 8, generator=random) for _ in range(2))
    t, captions = torch.tensor([100, 500, 900]), ["a red star", "", "a blue square"]
    usual = denoising.losses(networks, x_0, captions, t, eps)
    assert torch.allclose(denoising.losses(networks, x_0, captions, t, eps, torch.ones(3)), usual)
    assert not torch.allclose(denoising.losses(networks, x_0, captions, t, eps, torch.full((3,), 0.25)), usual)
    beta = denoising.draw_beta(captions, 0, whole_batch(3))
    assert beta[1] == 1 and (beta[[0, 2]] < 1).all() and (beta >= 1 / 8).all()
    read = PairBatch(x_0, torch.full_like(x_0, -20.0), captions)
    denoising.loss_at(networks, read, 0, whole_batch(3))["loss"].backward()
    assert networks.unet.guidance.linear1.weight.grad is not None


@pytest.mark.parametrize("kind, schedule", [("epsilon", {"kind": "scaled_linear"}), ("sample", {"kind": "cosine"}),
                                            ("flow", {"kind": "flow", "shift": 2.0})])
def test_students_of_every_prediction_type(tiny, tiny_run, tmp_path, kind, schedule):
    """Teachers of the other kinds, trained for two steps, and their students of both methods."""
    teacher = {**tiny, "denoiser": {**tiny["denoiser"], "prediction_type": kind, "schedule": schedule,
                                    "train": {**tiny["denoiser"]["train"], "steps": 2}},
               "stages": ["denoiser"], "start_from": str(tiny_run)}
    train.main([write(tmp_path / "teacher.yaml", teacher), f"run={tmp_path / 'teacher'}"])
    for name, config_of in (("student", student_config), ("shortcut", shortcut_config)):
        config = config_of(teacher, tmp_path / "teacher")
        config["student"] = {**config["student"], "direction": "data" if kind == "flow" else "teacher"}
        train.main([write(tmp_path / f"{name}.yaml", config), f"run={tmp_path / name}"])
        assert load_run(tmp_path / name, moderation=None).latents([PROMPT], [0]).isfinite().all()


def test_a_student_of_a_guidance_free_teacher_calls_it_once_with_beta(tiny, guidance_free_run, tmp_path):
    config = student_config(tiny, guidance_free_run)
    config["student"]["train"] = {**config["student"]["train"], "steps": 1}
    train.main([write(tmp_path / "student.yaml", config), f"run={tmp_path / 'run'}"])
    teacher, student = UNet(load_run(guidance_free_run).config.unet), load_run(tmp_path / "run", moderation=None).unet
    assert teacher.state_dict().keys() == student.state_dict().keys()


@pytest.mark.parametrize("change, message", [
    ({"start_from": ""}, "start_from: none; valid for the stage student: the run folder of its teacher"),
    ({"stages": ["denoiser", "student"]}, "stages: .*valid: denoiser or student"),
    ({"student": {"gap": [0.1, 0.5]}}, "gap: .*valid: .first, last."),
    ({"student": {"method": "shortcut", "gap": [0.1, 0.1]}}, "gap: .*valid for the method shortcut: twice 1/2, 1/4"),
    ({"student": {"method": "shortcut", "gap": [0.5, 0.25]}}, "gap: .*valid for the method shortcut: twice 1/2, 1/4"),
    ({"student": {"method": "shortcut", "gap": [0.25, 0.25]}}, "jump_input: false; valid: true with student.method"),
    ({"student": {"doubled": 1.0}}, "doubled: 1.0; valid: a share of a batch above 0 and below 1"),
    ({"student": {"method": "mean_flow"}}, "method: .*valid: .*shortcut"),
    ({"student": {"guidance_scales": [0.5, 2.0]}}, "guidance_scales: .*1 <= lowest"),
    ({"student": {"guidance_scales": [1.0, 2.0]}}, "scale: value 3; valid: 1 .. 2"),
])
def test_configurations_that_do_not_fit_are_refused(tiny, tiny_run, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(tmp_path / "bad.yaml", {**student_config(tiny, tiny_run), **change}))


def test_a_range_of_scales_needs_the_input(tiny, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match="valid without denoiser.unet.guidance_input: one scale"):
        load_experiment(write(tmp_path / "bad.yaml", {**student_config(tiny, tiny_run), "denoiser": tiny["denoiser"]}))
    bad = {**tiny, "denoiser": {**tiny["denoiser"], "guidance_scales": [1.0, 5.0]}}
    with pytest.raises(ConfigError, match="valid with unet.guidance_input: true"):
        load_experiment(write(tmp_path / "gft.yaml", bad))


def test_the_input_of_a_jump_is_that_of_shortcut_models_alone(tiny, tiny_run, tmp_path):
    config = shortcut_config(tiny, tiny_run)
    load_experiment(write(tmp_path / "good.yaml", config))
    for bad in ({**config, "student": {**config["student"], "method": "consistency"}},
                {**tiny, "denoiser": {**tiny["denoiser"], "unet": config["denoiser"]["unet"]}}):
        with pytest.raises(ConfigError, match="jump_input: true; valid: false but for the stage student"):
            load_experiment(write(tmp_path / "bad.yaml", bad))


def test_another_process_than_the_teacher_has_is_refused(tiny, tiny_run, tmp_path):
    config = student_config(tiny, tiny_run)
    config["denoiser"] = {**config["denoiser"], "prediction_type": "flow"}
    with pytest.raises(ConfigError, match="denoiser.prediction_type: flow; valid: v_prediction, that of the teacher"):
        train.main([write(tmp_path / "student.yaml", config), f"run={tmp_path / 'run'}"])


def test_features_are_reused_for_as_many_steps_as_asked(tiny_run, tmp_path):
    """Three steps with reuse 2 compute the middle of the UNet at the first and the third; the image knows it."""
    system = load_run(tiny_run, moderation=None)
    calls = []
    system.unet.mid.register_forward_hook(lambda *_: calls.append(1))
    exact = system.latents([PROMPT], [0])
    assert len(calls) == 3
    reused = system.latents([PROMPT], [0], replace(system.config.sampling, reuse=2))
    assert len(calls) == 5 and not torch.equal(exact, reused)
    assert "reuse" not in parameters(draw(tiny_run, tmp_path / "each", PROMPT)[NAME])  # as in files of before
    file = draw(tiny_run, tmp_path, PROMPT, "--set", "reuse=2")[NAME]
    assert parameters(file)["reuse"] == 2
    assert sample.main(["--run", str(tiny_run), "--verify", str(file)]) == 0
    with pytest.raises((ValueError, SystemExit), match="reuse: value 0; valid: 1 .. 100"):
        draw(tiny_run, tmp_path / "bad", PROMPT, "--set", "reuse=0")


def test_a_prompt_that_changes_has_the_guidance_and_the_reuse_of_the_run(guidance_free_run):
    """Each of its contexts is bound to the guidance, and reuses the deep features of its own calls."""
    system = load_run(guidance_free_run, moderation=None)
    torch.nn.init.normal_(system.unet.guidance.linear2.weight.data, std=0.5)
    config = with_options(system.config.sampling, steps=4)
    prompt = read_prompt("a [red|blue] star", 4)
    two, four = (system.latents([prompt], [0], with_options(config, scale=scale)) for scale in (2.0, 4.0))
    assert not torch.equal(two, four)
    calls = []
    system.unet.mid.register_forward_hook(lambda *_: calls.append(1))
    reused = system.latents([prompt], [0], replace(with_options(config, scale=2.0), reuse=2))
    assert len(calls) == 2 and not torch.equal(reused, two)


def few_images(folder, count: int = 3) -> dict:
    """The data section of a few images with captions."""
    source = Shapes(ShapesConfig(size=32), "train")
    folder.mkdir()
    for number in range(count):
        Image.fromarray(source[number]["image"].permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a sks star")
    return {"source": "folder", "folder": {"root": str(folder), "size": 32}}


def test_an_adapter_learns_at_all_scales_of_a_guidance_free_run_and_not_from_a_student(
        guidance_free_run, student, shortcut_run, tiny, tmp_path, monkeypatch):
    seen = []
    losses_of = Denoising.losses

    def watched(self, networks, x_0, captions, t, eps, beta=None):
        seen.append(beta)
        return losses_of(self, networks, x_0, captions, t, eps, beta)

    monkeypatch.setattr(Denoising, "losses", watched)
    config = {"name": "few", "stages": ["lora"], "data": few_images(tmp_path / "images"), "lora": {
        "adapter": {"rank": 2}, "train": {**tiny["denoiser"]["train"], "steps": 2, "batch": 2}}}
    write(tmp_path / "few.yaml", {**config, "start_from": str(guidance_free_run)})
    train.main([str(tmp_path / "few.yaml"), f"run={tmp_path / 'run'}"])
    assert len([beta for beta in seen if beta is not None and len(beta) == 2 and (beta < 1).all()]) == 2
    adapter = tmp_path / "run" / "adapter.safetensors"
    draw(guidance_free_run, tmp_path / "out", PROMPT, "--guidance", "2", "--adapter", f"{adapter}:1")
    for other in (student, shortcut_run):
        write(tmp_path / "other.yaml", {**config, "start_from": str(other)})
        with pytest.raises(ValueError, match="is a student of few steps.*valid: its teacher"):
            train.main([str(tmp_path / "other.yaml"), f"run={tmp_path / other.parent.name}"])
    draw(student, tmp_path / "student", PROMPT, "--adapter", f"{adapter}:1", "--any-base")


def test_a_released_run_is_a_student_or_is_none(student, tiny_run, tmp_path):
    """Both leave the same files, and the stages of the configuration say whose guidance they have."""
    for run, scales, stage in ((student, (1.5, 4.0), "student"), (tiny_run, None, "denoiser")):
        out = tmp_path / stage
        release(run, out)
        assert read_yaml(out / "config.yaml")["stages"] == ["tokenizer", "autoencoder", stage]
        assert load_run(out, moderation=None).config.scales == scales
        assert json.loads((out / "manifest.json").read_text())["released"]["denoiser_steps"] == 12
