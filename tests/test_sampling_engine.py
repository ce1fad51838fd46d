"""The engine as a library: requests to samples, without a command line and without files."""
import pytest
import torch

from files.images import to_uint8
from pipeline.loading import load_run
from pipeline.moderation import Moderation
from pipeline.system import TextToImage
from safety.policy import Decision
from sampling.draw import Sources
from sampling.engine import DrawSettings, Job, batches_of, draw_samples, gate_of, step_count
from sampling.request import Request, with_settings


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return load_run(tiny_run)


@pytest.fixture
def moderation(tiny_run, monkeypatch) -> Moderation:
    """One that refuses the word zorbic."""
    found = Moderation.of_run(tiny_run, "block")
    monkeypatch.setattr(found, "check_prompt", lambda prompts, *_: Decision(
        "block" if any("zorbic" in prompt.text for prompt in prompts) else "allow", "hate"))
    return found


def requests(system: TextToImage, *prompts: str) -> list[Request]:
    return [Request(prompt, seed, system.config.sampling) for seed, prompt in enumerate(prompts)]


def test_samples_are_the_images_of_the_system(system, moderation, capsys):
    job = Job(system, requests(system, "a star", "a moon", "a star"))
    samples = list(draw_samples(job, gate_of(job, moderation)))
    latents = system.latents(["a star", "a moon", "a star"], [0, 1, 2])
    assert [sample.number for sample in samples] == [0, 1, 2]
    assert torch.equal(torch.stack([sample.image for sample in samples]), to_uint8(system.decode(latents)))
    assert all(sample.decision.action == "allow" and sample.frames is None for sample in samples)
    assert capsys.readouterr() == ("", "")  # a library says nothing


def test_refused_requests_come_first_and_cost_no_steps(system, moderation):
    job = Job(system, requests(system, "a star", "a zorbic star", "a moon"))
    gate, settings, steps = gate_of(job, moderation), DrawSettings(batch=1), []
    samples = list(draw_samples(job, gate, settings, lambda: steps.append(1)))
    assert [(sample.number, sample.image is None, sample.stage) for sample in samples] == [
        (1, True, "prompt"), (0, False, "prompt"), (2, False, "prompt")]  # the first of equal decisions
    assert batches_of(job, gate, settings) == [[0], [2]] and len(steps) == step_count(job, gate, settings) == 2 * 3


def test_samples_are_yielded_when_they_are_known(system, moderation):
    steps: list[int] = []
    job = Job(system, requests(system, "a star", "a moon"))
    first = next(draw_samples(job, gate_of(job, moderation), DrawSettings(batch=1), lambda: steps.append(1)))
    assert first.number == 0 and len(steps) == 3


def test_frames_and_attention_come_with_the_sample(system, moderation):
    threads = torch.get_num_threads()
    job = Job(system, requests(system, "a star", "a moon"))
    settings = DrawSettings(exact=True, frames=2, attention=True)
    for sample in draw_samples(job, gate_of(job, moderation), settings):
        assert torch.get_num_threads() == threads
        assert sample.frames.images.shape == (2, 3, 32, 32) and sample.frames.labels == ["2 of 3", "3 of 3"]
        assert torch.equal(sample.frames.images[-1], sample.image)
        assert sample.attention.shape == (24, 8, 8)
    assert not torch.backends.cudnn.deterministic


def test_a_job_that_cannot_be_drawn_is_refused_at_once(system):
    for steps, sources, options, message in (
            (5000, Sources(), [], "n: value 5000"),
            (3, Sources(torch.zeros(3, 8, 8, dtype=torch.uint8)), [], "8x8 pixels"),
            (3, Sources(torch.zeros(3, 32, 32, dtype=torch.uint8), refinements=1), ["eta=0.5"],
             "ddim with eta 0.5 cannot be inverted; valid: ddim with eta 0")):
        config = with_settings(system.config.sampling, options)
        [request] = requests(system, "a star")
        with pytest.raises(ValueError, match=message):
            Job(system, [Request(request.prompt, 0, type(config)("ddim", steps, options=config.options))], sources)


def test_predictions_on_the_way_can_be_looked_at_and_change_nothing(system, moderation):
    job = Job(system, requests(system, "a star", "a moon"))
    seen = []

    def preview(numbers, x_0):
        seen.append((list(numbers), tuple(x_0.shape), x_0.clone()))

    watched = list(draw_samples(job, gate_of(job, moderation), preview=preview))
    plain = list(draw_samples(job, gate_of(job, moderation)))
    assert all(torch.equal(a.image, b.image) and a.frames is None for a, b in zip(watched, plain, strict=True))
    assert [(numbers, shape) for numbers, shape, _ in seen] == [([0, 1], (2, *system.latent_shape))] * 2  # of 3 steps
    assert not torch.equal(seen[0][2], seen[1][2])
