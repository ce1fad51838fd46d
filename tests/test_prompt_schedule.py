"""Prompts that change from step to step: read as the web interface reads them, drawn, checked, kept and verified."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from made_up_moderation import written
from sample_calls import draw, given_images, parameters, pixels

import sample
from diffusion.guidance import classifier_free_guidance
from diffusion.noise import PerImageNoise
from diffusion.samplers import get_sampler
from diffusion.sampling import visited_times
from files.images import png_bytes
from pipeline.loading import load_run, load_weaker
from pipeline.moderation import conditioned_texts
from pipeline.prompt_schedule import (
    PromptSchedule,
    StepContexts,
    has_later_signs,
    parse_parts,
    read_prompt,
    signs_of_others,
    text_at_step,
    unread_options,
)
from pipeline.prompts import alternatives, chunks_of, parse_prompt, split_options
from pipeline.system import TextToImage, with_options
from sampling.draw import Sources, latents_of_requests
from sampling.request import Request, request_of, settings_of

RED, BLUE = "a small red star", "two blue circles"
CHANGING = [f"[{RED}|{BLUE}]", f"[{RED}:{BLUE}:2]", f"{RED}[ above a moon:0.5]", f"{RED}[ above a moon::0.5]"]


@pytest.fixture(scope="module")
def system(tiny_run) -> TextToImage:
    return load_run(tiny_run, moderation=None)


def steps_of(text: str, steps: int) -> list[tuple[int, str]]:
    """(last step, text) of every run of equal texts, as the web interface writes a schedule."""
    texts = [text_at_step(parse_parts(text)[0], step, steps) for step in range(1, steps + 1)]
    return [(step, now) for step, now in enumerate(texts, 1) if step == steps or texts[step] != now]


# ---- the notation: these examples and their results are those of the web interface's own tests and documentation

@pytest.mark.parametrize("text, expected", [
    ("test", [(10, "test")]), ("a [b:3]", [(3, "a "), (10, "a b")]), ("a [b: 3]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]), ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]), ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]), ("a [b::0.5] c", [(5, "a b c"), (10, "a  c")]),
    ("[a|(b:1.1)]", [(step, "a" if step % 2 else "(b:1.1)") for step in range(1, 11)]),
    ("[fe|]male", [(step, "female" if step % 2 else "male") for step in range(1, 11)]),
    ("[fe|||]male", [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")]),
    ("[a:b:99]", [(10, "a")]), ("[a:b:0]", [(10, "b")]), ("[a:b:-3]", [(10, "b")]), ("[a:b:1.0]", [(10, "a")]),
    ("[a:b:1]", [(1, "a"), (10, "b")]), ("[a:b:1e9999]", [(10, "a")]), ("[a:b:0.25]", [(2, "a"), (10, "b")]),
    ("[cow|horse|[dog:cat:5]]", [(1, "cow"), (2, "horse"), (3, "dog"), (4, "cow"), (5, "horse"), (6, "cat"), (7, "cow"),
                                 (8, "horse"), (9, "cat"), (10, "cow")]),
    (r"[a\:b\|c|d]", [(step, r"a\:b\|c" if step % 2 else "d") for step in range(1, 11)]),
    ("[a:b]", [(10, "[a:b]")]), ("[a]", [(10, "[a]")]), ("(a|b) c | d", [(10, "(a|b) c | d")])])
def test_what_a_step_reads(text, expected):
    assert steps_of(text, 10) == expected


def test_the_example_of_the_web_interface():
    text = ("fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
            "[ in background:0.25] [shoddy:masterful:0.5]")
    start = "fantasy landscape with a "
    assert steps_of(text, 100) == [
        (25, start + "mountain and an oak in foreground shoddy"),
        (50, start + "lake and an oak in foreground in background shoddy"),
        (60, start + "lake and an oak in foreground in background masterful"),
        (75, start + "lake and an oak in background masterful"),
        (100, start + "lake and a christmas tree in background masterful")]


@pytest.mark.parametrize("text, message", [
    ("[a|b:0.5]", "'[a|b:0.5]' has both | and :; valid: [a|b], [a:b:0.5], or \\| and \\:"),
    ("x [12:30|noon]", "has both | and :"), ("[a|b", "'[' is not closed"), ("a|b]", "']' at letter 4 closes nothing"),
    ("[a:b:0.5", "'[' is not closed"), ("[a|" * 60 + "b" + "]" * 60, "more than 50 changing parts inside each other")])
def test_signs_that_do_not_fit_are_refused(text, message):
    with pytest.raises(ValueError) as caught:
        read_prompt(text, 10)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert read_prompt(text, 10, literal=True) == parse_prompt(text, literal=True)


def test_the_prompts_of_a_run():
    prompt = read_prompt("a (red [star:moon:0.5]:1.2)", 4, chunks=3)
    assert isinstance(prompt, PromptSchedule) and prompt.of_step == (0, 0, 1, 1)
    read = [(one.text, one.weights[-1], one.chunks) for one in prompt.prompts]
    assert read == [("a red star", 1.2, 3), ("a red moon", 1.2, 3)]
    assert prompt.whole.text == "a red star moon"
    assert read_prompt("a (red star)", 4) == parse_prompt("a (red star)")
    later = ["[a|b]", "a BREAK b", "[a:1]", "[a|b:1]"]
    assert [text for text in ("a [b]", "BREAKER", "[a:b]", *later) if has_later_signs(text)] == later


@pytest.mark.parametrize("text, expected", [
    ("{[a|b]|c} d", ["[a|b] d", "c d"]), ("[{a|b}|c]", ["[a|c]", "[b|c]"]), ("{a[|b}", ["a[|b"]), ("[a|b]", ["[a|b]"])])
def test_alternatives_leave_square_brackets_alone(text, expected):
    assert alternatives(text) == expected


def test_options_of_an_axis():
    assert split_options(r"a [b|c]|d\|e|") == ["a [b|c]", r"d\|e", ""]


def test_signs_that_have_no_effect_are_found():
    assert signs_of_others("<lora:pixel:0.8> a AND b ANDY [x:y] [z:2] <b>") == ["<lora:pixel:0.8>", "AND", "[x:y]"]
    assert unread_options("[a:b:10] [c:0.5] [d|e|f] [g:h:0] [i:0] [k::2]", 20, 2) == [
        "[a:b:10]", "[c:0.5]", "[d|e|f]", "[g:h:0]", "[k::2]"]


# ---- BREAK

def test_a_break_begins_a_chunk(system):
    words = system.tokenizer
    chunks = chunks_of(parse_prompt("a red star BREAK  two (blue BREAK moons:1.3)", chunks=4), words)
    assert chunks.texts == ("a red star", "two blue", "moons") and chunks.overflow == ""
    for row, text in zip(chunks.ids, chunks.texts):
        assert torch.equal(row, words.encode([text])[0][0])
    assert chunks.weights[1].max() == pytest.approx(1.3) and chunks.weights[0].max() == 1
    assert {word for word, place in ((word, place) for place, word in chunks.words.items()) if place > 24}


@pytest.mark.parametrize("text, counts", [
    ("a BREAK b", [1, 1]), ("BREAK a", [0, 1]), ("a BREAK", [1]), ("a BREAK BREAK b", [1, 0, 1]), ("BREAK", [0]),
    ("BREAKa break", None), ("a\nBREAK\nb", [1, 1]), ("(a)BREAK(b)", [1, 1])])
def test_empty_chunks_are_those_of_the_web_interface(system, text, counts):
    prompt = parse_prompt(text, chunks=9)
    chunks = chunks_of(prompt, system.tokenizer)
    if counts is None:
        assert prompt.breaks == () and len(chunks.ids) == 1
    else:
        assert (chunks.mask.sum(1) - 2).tolist() == counts


def test_what_stands_behind_the_last_chunk_is_lost_and_said(system):
    chunks = chunks_of(parse_prompt("a BREAK b BREAK c d", chunks=2), system.tokenizer)
    assert chunks.texts == ("a", "b") and chunks.overflow == "c d"


# ---- what the network reads

@pytest.mark.parametrize("sampler", ["ddim", "heun", "pndm", "dpm_solver_multistep", "dpm_solver_singlestep", "ddpm"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_evaluation_reads_the_prompt_of_its_time(system, sampler, scale):
    """Against a network that is given the whole prompt at every call, in place of the caches."""
    config = with_options(system.config.sampling, sampler, 5, scale)
    prompt, negative = read_prompt(f"[{RED}:{BLUE}:2]", 5), read_prompt("[moon|]", 5)
    given = system.latents([prompt], [3], config, negative)
    times = visited_times(system.schedule, config)

    def texts(t: float) -> tuple[str, str]:
        step = max(k for k, time in enumerate(times) if time >= t)
        return ("moon", "")[step % 2], (RED if step < 2 else BLUE)

    with torch.inference_mode():
        def network(x: torch.Tensor, t: float, rows: tuple[str, ...]) -> torch.Tensor:
            time = system.schedule.network_time(torch.full((len(x),), t))
            return system.unet(x, time, *system.encode(rows))
        kind = system.config.prediction_type
        denoise = classifier_free_guidance(lambda x, t: network(x, t, texts(t)[1:]),
                                           lambda x, t: network(x, t, texts(t)), config.guidance, system.schedule, kind)
        noise = PerImageNoise([3], (4, 8, 8))
        expected = get_sampler(sampler)(denoise, noise(), times, system.schedule, kind, noise, **config.options)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
    for fixed in (RED, BLUE):
        assert (given - system.latents([fixed], [3], config, negative)).abs().max() > 1e-3


def test_a_change_before_or_after_all_steps_is_the_plain_prompt_bit_for_bit(system):
    config = with_options(system.config.sampling, steps=4)
    for text, plain in ((f"[{RED}:{BLUE}:4]", RED), (f"[{RED}:{BLUE}:0]", BLUE)):
        assert torch.equal(system.latents([read_prompt(text, 4)], [1], config),
                           system.latents([parse_prompt(plain)], [1], config))


def test_neighbours_with_other_schedules_do_not_matter(system):
    config = with_options(system.config.sampling, steps=5)
    prompts = [read_prompt(text, 5) for text in (*CHANGING, RED, "a BREAK [b|c BREAK d]")]
    together = system.latents(prompts, range(6), config, "")
    for k, prompt in enumerate(prompts):
        torch.testing.assert_close(system.latents([prompt], [k], config)[0], together[k], rtol=0, atol=2e-4)


def test_contexts_are_computed_once_each(system):
    seen = []
    contexts = StepContexts.of([read_prompt("[a|b]", 9), "c"], lambda rows: seen.append(rows) or (torch.zeros(2), None))
    assert len(seen) == len(contexts.contexts) == 2 and contexts.of_step == (0, 1, 0, 1, 0, 1, 0, 1, 0)
    times = [900, 600, 300]
    assert [contexts.place(times, t) for t in (950, 900, 899, 600, 301, 300, 10)] == [0, 0, 0, 1, 1, 0, 0]


def test_images_take_what_parse_and_read_prompt_give(tiny_run):
    system = load_run(tiny_run)
    made = system.images([read_prompt(f"[{RED}|{BLUE}]", system.config.sampling.steps), parse_prompt(f"({RED}:1.2)")],
                         [1, 2], negative=parse_prompt("(green:1.2)"))
    assert made.shape == (2, 3, 32, 32)


# ---- sample.py

@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    return given_images(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize("flags", [
    [], ["--negative", "[blue|green]"], ["--init", "INIT", "--strength", "0.7"], ["--init", "INIT", "--mask", "MASK"],
    ["--sampler", "heun"], ["--guidance", "1"], ["--exact", "--n", "2"]])
def test_every_kind_of_image_is_drawn_and_verified(tiny_run, tmp_path, given, flags, capsys):
    flags = [given.get(flag, flag) for flag in flags]
    files = draw(tiny_run, tmp_path, f"[{RED}|{BLUE}] BREAK [a moon:0.5]", *flags)
    path = next(iter(files.values()))
    settings = parameters(path)
    assert settings["notation"] == 2 and settings["prompt"] == f"[{RED}|{BLUE}] BREAK [a moon:0.5]"
    assert settings_of(request_of(settings)).items() <= settings.items()
    named = [part for flag in ("--init", "--mask") if flag in flags for part in (flag, flags[flags.index(flag) + 1])]
    assert sample.main(["--run", str(tiny_run), *named, "--verify", str(path)]) == 0, capsys.readouterr().err
    plain = draw(tiny_run, tmp_path / "plain", RED, *flags)
    assert (pixels(path) != pixels(next(iter(plain.values())))).any()


def test_interpolation_inversion_and_autoguidance(tiny_run, system, tmp_path, given):
    ends = draw(tiny_run, tmp_path / "way", CHANGING[0], CHANGING[1], "--interpolate", "3")
    for name, prompt in zip([name for name in ends if name != "grid.png"][::2], CHANGING[:2]):
        alone = draw(tiny_run, tmp_path / name[:5], prompt)
        assert abs(pixels(ends[name]) - pixels(next(iter(alone.values())))).max() <= 1
    draw(tiny_run, tmp_path / "back", CHANGING[1], "--invert", given["INIT"])
    source = Sources(torch.zeros(3, 32, 32, dtype=torch.uint8), refinements=2)
    config = with_options(system.config.sampling, steps=4, scale=1.0)
    fixed, changing = (latents_of_requests(system, [Request(text, 0, config)], source) for text in (RED, CHANGING[1]))
    assert (fixed - changing).abs().max() > 0
    guided = load_run(tiny_run, moderation=None)
    guided.guide = load_weaker(guided, tiny_run / "state" / "denoiser" / "step_00000008.pt")
    made = [guided.latents([read_prompt(text, 3)], [1], guided.config.sampling) for text in (CHANGING[1], RED)]
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_older_images_are_read_as_they_were_drawn(tiny_run, system, tmp_path, capsys):
    """Files from before these signs hold the same letters as text."""
    files = draw(tiny_run, tmp_path, RED)
    shared = {key: value for key, value in parameters(files[next(iter(files))]).items() if key in ("run", "weights")}
    request = Request("[a|b] BREAK c", 4, system.config.sampling, notation=1)
    image = system.images([parse_prompt("[a|b] BREAK c", 4, breaks=False)], [4])[0]
    path = tmp_path / "old.png"
    path.write_bytes(png_bytes(image, {**settings_of(request), **shared}))
    assert "notation" not in parameters(path) and request_of(parameters(path)) == request
    assert sample.main(["--run", str(tiny_run), "--verify", str(path)]) == 0, capsys.readouterr().err


def test_attention_to_what_changes_is_refused_before_anything_is_written(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="--attention with the prompt .*which changes on the way; valid: "):
        draw(tiny_run, tmp_path / "out", "a star", "[a|b]", "--attention")
    assert not (tmp_path / "out").exists()


def test_a_line_says_what_is_read_as_text_and_what_never_happens(tiny_run, tmp_path, capsys):
    prompts = ["<lora:x:1> a star", "a star AND a moon <lora:x:1>"]
    draw(tiny_run, tmp_path / "a", *prompts, "--n", "2", "--negative", "[a:b]")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert said == ["note: read as text, not as signs: <lora:x:1>, [a:b], AND; docs/prompts.md has the signs"]
    draw(tiny_run, tmp_path / "b", "[a star:a moon:10]", "--n", "2")
    assert "note: [a star:a moon:10] changes nothing in 3 steps" in capsys.readouterr().err
    draw(tiny_run, tmp_path / "c", "a moon <lora:x:1> [a:b]", "--literal")
    draw(tiny_run, tmp_path / "d", CHANGING[1])
    assert "note" not in capsys.readouterr().err


# ---- moderation: whatever is read at any step is checked, and all of it together

def test_all_that_a_prompt_changes_to_is_checked(system):
    prompt = read_prompt("a [cow|horse[ red:2]] (hat:1.2) BREAK moon", 5, chunks=4)
    texts = conditioned_texts([prompt], system.tokenizer)
    assert {"a cow hat moon", "a horse hat moon", "a horse red hat moon", "a cow horse  red hat moon"} <= set(texts)
    assert "a cow hat" in texts and "moon" in texts  # the chunks
    assert "" not in conditioned_texts([read_prompt("[a star:1]", 5)], system.tokenizer)
    assert not any(map(str.strip, conditioned_texts([read_prompt("[ |]", 5)], system.tokenizer)))


@pytest.mark.parametrize("prompt, negative, action", [
    ("a [red|zorbic] star", "", "block"), ("a [red:zorbic:2] star", "", "block"), ("a [zorbic::1] star", "", "block"),
    ("a [zorbic:9000] star", "", "block"), ("a [red|[blue:zorbic:1]] star", "", "block"),
    ("a [zor|x]bic star", "", "block"), ("a zor[bic:1] star", "", "block"),
    ("a [red BREAK zorbic|b] star", "", "block"), ("a red star", "[blue|zorbic]", "block"),
    ("a [red|mildo] star", "", "flag"), ("a [red|blue] star", "[a:2]", "allow"),
    ("[|a red star]", "", "allow"), ("[|]", "", "block")])
def test_a_harmful_option_is_refused_whenever_it_is_read(tiny_run, tmp_path, prompt, negative, action):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("state", "cache"))
    written(run / "moderation.safetensors")
    flags = ["--negative", negative] if negative else []
    code = sample.main(["--run", str(run), "--out", str(tmp_path / "out"), "--steps", "3", prompt, *flags])
    [row] = [json.loads(line) for line in Path(tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert row["action"] == action and (code == 5) == (action == "block") == (row["file"] is None)
