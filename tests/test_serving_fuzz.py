"""Random bodies at the service: the right status, no traceback, nothing in the logs."""
import asyncio
import json
import random

import pytest

for library in ("fastapi", "httpx", "prometheus_client", "limits", "cachetools"):
    pytest.importorskip(library)

from made_up_moderation import judged_run  # noqa: E402
from serving_calls import DRAW, opened  # noqa: E402

from serving.engine import Engine  # noqa: E402
from serving.schema import ImageRequest  # noqa: E402
from serving.settings import EngineSettings, Limits  # noqa: E402


@pytest.fixture(scope="module")
def engine(tiny_run, tmp_path_factory) -> Engine:
    return Engine(EngineSettings(run=str(judged_run(tiny_run, tmp_path_factory.mktemp("judged"))), threads=1))


def random_bodies(count: int, seed: int = 0):
    """Bodies from nearly right to noise."""
    draw = random.Random(seed)
    good = {"prompt": "a star", "n": 1, "size": "32x32", "seed": 1, "num_inference_steps": 1}
    values = [None, True, -1, 0, 1, 2, 1e308, 10**30, "", "a", "\0", "\ud800", "64x64", "../..", [], {}, ["noto"],
              {"a": 1}, "💥" * 50, "%s%n", "{a|b", "[a:b:", "((((", "a\u202eb", "#fff:2", "NaN"]
    for _ in range(count):
        kind = draw.random()
        if kind < 0.2:
            yield bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        elif kind < 0.3:
            yield json.dumps(draw.choice(values)).encode()
        else:
            body = {key: draw.choice(values) if draw.random() < 0.3 else value for key, value in good.items()}
            for key in draw.sample(sorted(ImageRequest.model_fields), 2) + ["x"] * (draw.random() < 0.2):
                body[key] = draw.choice(values)
            text = json.dumps(body).encode()
            yield text[:draw.randrange(len(text))] if kind > 0.9 else text


async def send_random(client, count: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for body in random_bodies(count):
        answer = await client.post(DRAW, content=body, headers={"content-type": "application/json"})
        found[answer.status_code] = found.get(answer.status_code, 0) + 1
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and "Traceback" not in answer.text, body
    return found


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_bodies_get_the_right_status_and_leave_nothing_in_the_logs(engine, caplog, count):
    async def run():
        async with opened(engine, limits=Limits(requests=10**6, steps=4, pixels=64 * 64, images=2)) as (client, app):
            found = await send_random(client, count)
            assert (await client.post(DRAW, json={"prompt": "a star"})).status_code == 200
            assert not app.state.service.jobs and app.state.service.images.bytes == 0
            return found
    found = asyncio.run(run())
    assert set(found) <= {200, 400, 404} and found[400] > count / 2
    assert "failed" not in caplog.text
