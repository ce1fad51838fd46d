"""What a person does on the page, without a browser: forms to orders, and what is said on the way."""
import asyncio
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for library in ("fastapi", "httpx", "prometheus_client", "limits", "cachetools"):
    pytest.importorskip(library)

from made_up_moderation import HARMFUL, judged_run  # noqa: E402

from serving.engine import Engine  # noqa: E402
from serving.keys import Account, Keys  # noqa: E402
from serving.service import Service  # noqa: E402
from serving.settings import EngineSettings, ServiceSettings  # noqa: E402
from serving.visit import STARTS, Form, Visit  # noqa: E402

FORM = Form(prompt="a red star", negative="", style=[], style_strength=1.0, palette="none", count=2, seed=3, steps=3,
            guidance=3.0, sampler="default", width=32, height=32, palette_only=False, exact=False, metadata=True,
            start=STARTS[0], image=None, strength=0.6, painted=None, across_name="steps", across_values="1,2",
            down_name="none", down_values="")


@pytest.fixture(scope="module")
def engine(tiny_run, tmp_path_factory) -> Engine:
    return Engine(EngineSettings(run=str(judged_run(tiny_run, tmp_path_factory.mktemp("judged"))), threads=1))


def drawn(engine, folder, *forms, seen=()):
    """What the page has shown for each form, one after the other in one visit."""
    async def run():
        service = Service(engine, ServiceSettings())
        await service.start()
        visit, known, shown = Visit(service, Keys(), folder), list(seen), []
        for form in forms:
            shown.append([state async for state in visit.draw(form, Account("local"), known)])
            known = shown[-1][-1].seen
        assert not service.jobs and not service.finished and service.images.bytes == 0
        await service.stop()
        return shown
    return asyncio.run(run())


def painted(size: int = 48) -> dict:
    layer = np.zeros((size, size, 4), dtype=np.uint8)
    layer[:, : size // 2, 3] = 255
    return {"background": Image.new("RGBA", (size, size), "red"), "layers": [Image.fromarray(layer)], "composite": None}


def test_a_visit_draws_and_keeps_what_it_has_seen(engine, tmp_path):
    first, second = drawn(engine, tmp_path, FORM, replace(FORM, count=1, seed=9))
    assert first[-1].text == "2 images." and [text for _, text in first[-1].images] == ["seed 3", "seed 4"]
    assert first[-1].settings["seed"] == 3 and first[-1].made == 2 and any(state.job for state in first)
    assert [text for _, text, _ in second[-1].seen] == ["seed 3", "seed 4", "seed 9"]
    with Image.open(second[-1].images[0][0]) as image:
        assert "parameters" in image.text and image.size == (32, 32)


def test_styles_have_the_strength_of_the_form(engine, tmp_path):
    styled = replace(FORM, style=["noto", "flat"], count=1)
    full, half = drawn(engine, tmp_path, styled, replace(styled, style_strength=0.5))
    assert full[-1].settings["prompt"] == "a red star, noto style, flat style" and "mixed" not in full[-1].settings
    assert half[-1].settings["prompt"] == "a red star" and half[-1].settings["mixed"] == [
        {"prompt": f"a red star, {name} style", "weight": 0.5} for name in ("noto", "flat")]


def test_files_for_the_browser_go_when_they_are_old(engine, tmp_path):
    [shown] = drawn(engine, tmp_path, FORM)
    visit = Visit(Service(engine, ServiceSettings(keep=100)), Keys(), tmp_path)
    paths = [Path(path) for path, _ in shown[-1].images]
    os.utime(paths[0], (0, 0))
    visit.sweep()
    assert [path.exists() for path in paths] == [False, True]
    [again] = drawn(engine, tmp_path, replace(FORM, count=1), seen=shown[-1].seen)
    assert [path for path, _, _ in again[-1].seen] == [str(paths[1]), again[-1].images[0][0]]


def test_it_starts_from_an_image_and_paints_on_one(engine, tmp_path):
    image = Image.new("RGB", (100, 60), "blue")
    given = replace(FORM, start=STARTS[1], image=image, count=1)
    order = replace(FORM, start=STARTS[2], painted=painted()).order()
    with Image.open(io.BytesIO(order.mask)) as mask:
        values = np.asarray(mask)
    assert values.shape == (32, 32) and (values[:, :15] == 255).all() and (values[:, 17:] == 0).all()
    one, two = drawn(engine, tmp_path, given, replace(FORM, start=STARTS[2], painted=painted(), count=1))
    assert one[-1].settings["strength"] == 0.6 and "init" in one[-1].settings
    with Image.open(two[-1].images[0][0]) as result:
        assert (np.asarray(result)[:, 18:] == (255, 0, 0)).all()  # untouched where nothing was painted


def test_a_grid_has_a_sheet(engine, tmp_path):
    form = replace(FORM, start=STARTS[3], down_name="guidance", down_values="1,3")
    [shown] = drawn(engine, tmp_path, form)
    texts = [text for _, text in shown[-1].images]
    assert texts == [*(f"steps {steps}, guidance {scale}" for scale in (1, 3) for steps in (1, 2)), "the grid"]
    prompts = replace(form, prompt="", across_name="prompt", across_values="a star|a moon", down_name="none")
    [shown] = drawn(engine, tmp_path, prompts)
    assert len(shown[-1].images) == 3, shown[-1].text


@pytest.mark.parametrize("change, text", [
    ({"prompt": ""}, "prompt: String should have at least 1"),
    ({"start": STARTS[1]}, "no image; valid"),
    ({"start": STARTS[2]}, "no image; valid"),
    ({"start": STARTS[2], "painted": {"background": Image.new("RGB", (9, 9)), "layers": []}}, "nothing is painted"),
    ({"start": STARTS[3], "across_name": "none"}, "a grid of nothing"),
    ({"start": STARTS[3], "across_values": "a,b"}, "valid: a whole number"),
    ({"width": 33}, "multiples of 8"), ({"steps": 999}, "valid: 1 to 150"), ({"palette": "x"}, "colours such as"),
])
def test_what_cannot_be_drawn_is_said(engine, tmp_path, change, text):
    [shown] = drawn(engine, tmp_path, replace(FORM, **change))
    assert len(shown) == 1 and shown[0].text.startswith("This cannot be drawn. ") and text in shown[0].text


def test_a_refusal_is_said_in_plain_words(engine, tmp_path):
    [shown] = drawn(engine, tmp_path, replace(FORM, prompt=HARMFUL))
    assert shown[-1].text.startswith("Nothing was drawn. Refused: ") and not shown[-1].images


def test_a_cancelled_drawing_says_so(engine, tmp_path):
    async def run():
        service = Service(engine, ServiceSettings())
        await service.start()
        visit, texts = Visit(service, Keys(), tmp_path), []
        async for state in visit.draw(replace(FORM, steps=150, count=16, exact=True), Account("local"), []):
            texts.append(state.text)
            if state.text.startswith("Drawing"):
                visit.cancel(state.job, Account("another"))
                visit.cancel(state.job, Account("local"))
        await service.stop()
        return texts
    assert asyncio.run(run())[-1] == "Cancelled."
