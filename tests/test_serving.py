"""The service in one process, with a real engine on a tiny system: answers, errors, queue, jobs, keys, privacy."""
import asyncio
import io
import json
import logging

import pytest
from PIL import Image

for library in ("fastapi", "httpx", "prometheus_client", "limits", "cachetools"):
    pytest.importorskip(library)

import yaml  # noqa: E402
from made_up_moderation import HARMFUL, judged_run  # noqa: E402
from serving_calls import CANARY, DRAW, JOBS, Held, ask, opened, png_of  # noqa: E402

from sampling.loading import SourceFiles, SystemChoice  # noqa: E402
from sampling.verify import verify  # noqa: E402
from serving.app import create_app  # noqa: E402
from serving.engine import Engine, wants_preview  # noqa: E402
from serving.keys import new_key  # noqa: E402
from serving.orders import Order  # noqa: E402
from serving.schema import ImageRequest  # noqa: E402
from serving.settings import EngineSettings, Limits, ServiceSettings  # noqa: E402
from serving.store import ImageStore, StoreFull  # noqa: E402


@pytest.fixture(scope="module")
def run_folder(tiny_run, tmp_path_factory):
    return judged_run(tiny_run, tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def engine(run_folder) -> Engine:
    return Engine(EngineSettings(run=str(run_folder), threads=1))


# ---- images

def test_an_image_is_that_of_sample_and_can_be_verified(engine, run_folder, tmp_path):
    [answer] = ask(engine, {"prompt": "a red star", "seed": 7, "n": 2, "exact": True})
    assert answer.status_code == 200 and [found["seed"] for found in answer.json()["data"]] == [7, 8]
    path = tmp_path / "a.png"
    path.write_bytes(png_of(answer, 1))
    equal, line = verify(str(path), SystemChoice(run=str(run_folder)), SourceFiles())
    assert equal, line
    assert answer.headers["cache-control"] == "no-store"


def test_requests_that_are_drawn_together_have_the_bytes_of_one_alone_under_exact(engine):
    held = Held(engine)
    held.go.set()
    bodies = [{"prompt": f"a star {k}", "seed": k, "exact": True} for k in range(4)]
    alone = [png_of(ask(engine, body)[0]) for body in bodies]
    together = ask(held, {"prompt": "first", "seed": 9}, *bodies)
    assert [png_of(answer) for answer in together[1:]] == alone and max(held.batches) > 1


def test_only_compatible_requests_are_drawn_together():
    body = {"prompt": "a star", "seed": 1}
    kinds = {ImageRequest(**body, **more).order().kind for more in (
        {}, {"num_inference_steps": 5}, {"guidance_scale": 2.0}, {"negative_prompt": "blue"}, {"style": "noto"},
        {"palette": "ocean"}, {"size": "64x64"}, {"exact": True}, {"sampler": "heun"})}
    assert len(kinds) == 9
    same = [ImageRequest(prompt=text, seed=k, n=k, metadata=False, previews=k).order().kind
            for k, text in ((1, "a"), (2, "b"))]
    assert same[0] == same[1]
    assert Order("a", image=b"x").kind is None and Order("a", axes=("steps=1,2",)).kind is None


def test_settings_reach_the_image(engine):
    full = {"prompt": "a star", "seed": 3, "negative_prompt": "blue", "num_inference_steps": 2, "guidance_scale": 2.5,
            "sampler": "heun", "style": ["noto"], "palette": "ocean", "palette_weight": 0.5, "size": "64x32",
            "model": None, "user": "someone"}
    [answer] = ask(engine, full)
    [found] = answer.json()["data"]
    settings = found["settings"]
    assert settings["prompt"] == "a star, noto style" and settings["steps"] == 2 and settings["sampler"] == "heun"
    assert settings["negative"] == "blue" and settings["size"] == "32x64" and "#03045e" in settings["palette"]
    with Image.open(io.BytesIO(png_of(answer))) as image:
        assert image.size == (64, 32) and json.loads(image.text["parameters"])["seed"] == 3
    [answer] = ask(engine, {"prompt": "a star", "metadata": False})
    with Image.open(io.BytesIO(png_of(answer))) as image:
        assert not image.text


def test_an_image_by_its_address_can_be_fetched_once(engine):
    async def run():
        async with opened(engine) as (client, app):
            answer = await client.post(DRAW, json={"prompt": "a star", "response_format": "url"})
            url = answer.json()["data"][0]["url"]
            first, second = await client.get(url), await client.get(url)
            return first, second, app.state.service
    first, second, service = asyncio.run(run())
    assert first.status_code == 200 and first.content.startswith(b"\x89PNG") and second.status_code == 404
    assert service.images.bytes == 0 and not service.jobs and not service.finished


def test_the_store_forgets_in_time_and_never_pushes_out():
    now = [0.0]
    store = ImageStore(10, 1, lambda: now[0])
    name = store.add(b"x" * 2**19)
    other = store.add(b"y" * 2**19)
    with pytest.raises(StoreFull):
        store.add(b"z")
    assert store.take(name) is not None and store.take(name) is None
    now[0] = 11
    assert store.take(other) is None
    store.expire()
    assert store.bytes == 0 and store.add(b"z")


# ---- errors

@pytest.mark.parametrize("body, param, valid", [
    ({}, "prompt", "Field required"),
    ({"prompt": ""}, "prompt", "at least 1"),
    ({"prompt": "a" * 5000}, "prompt", "at most 4000"),
    ({"prompt": 3}, "prompt", "valid string"),
    ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    ({"prompt": "a", "n": 99}, None, "valid: 1 to 16"),
    ({"prompt": "a", "size": "big"}, "size", "valid: WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "33x32"}, None, "multiples of 8"),
    ({"prompt": "a", "size": "99999x99999"}, None, "together up to"),
    ({"prompt": "a", "num_inference_steps": 1000}, None, "valid: 1 to 150"),
    ({"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
    ({"prompt": "a", "sampler": "none"}, None, "ddim"),
    ({"prompt": "a", "style": "nosuch"}, None, "style nosuch; valid: "),
    ({"prompt": "a", "palette": "/etc/passwd"}, None, "colours such as"),
    ({"prompt": "a", "palette": "setup.cfg"}, None, "colours such as"),
    ({"prompt": "a", "response_format": "gif"}, "response_format", "'b64_json' or 'url'"),
    ({"prompt": "a", "quality": "hd"}, None, "unknown key: valid: prompt, model"),
    ({"prompt": "{a|b|c|d|e|f|g|h|i|j|k|l|m|n|o|p|q}"}, None, "asks for 17 images"),
    ([], None, "a JSON object"), ("a", None, "a JSON object"), (None, None, "a JSON object"),
])
def test_what_is_wrong_is_said_with_what_is_valid(engine, body, param, valid):
    [answer] = ask(engine, body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error" and error["param"] == param
    assert valid in error["message"] and "--" not in error["message"]


def test_paths_methods_models_and_bodies_that_are_not_there(engine):
    async def run():
        async with opened(engine, body=1) as (client, _):
            big = b'{"prompt": "' + b"a" * 2**20 + b'"}'

            async def pieces():
                for _ in range(20):
                    yield b"a" * 2**17

            answers = [await client.get("/nothing"), await client.get(JOBS),
                       await client.post(DRAW, json={"prompt": "a", "model": "dall-e-3"}),
                       await client.post(DRAW, content=big), await client.post(DRAW, content=pieces()),
                       await client.post(DRAW, content=b"{"), await client.post(DRAW, content=b"\xff\xfe"),
                       await client.get(JOBS + "/none"), await client.get("/v1/images/none")]
            assert [answer.status_code for answer in answers] == [404, 405, 404, 413, 413, 400, 400, 404, 404]
            assert all(answer.json()["error"]["message"] for answer in answers)
            assert "valid: tiny" in answers[2].json()["error"]["message"]
    asyncio.run(run())


def test_a_refused_prompt_is_answered_with_its_category(engine, caplog):
    harmful = {"prompt": f"{HARMFUL} {CANARY}"}
    [answer] = ask(engine, harmful)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "content_policy_violation", error
    assert error["category"] == "hate" and error["message"].startswith("refused: ") and CANARY not in error["message"]
    [answer] = ask(engine, {"prompt": f"{{a red star|{HARMFUL} {CANARY}}}"})
    body = answer.json()
    assert answer.status_code == 200 and len(body["data"]) == 1 and body["refused"][0]["index"] == 1
    assert CANARY not in caplog.text


# ---- keys and limits

def test_keys_have_limits_of_their_own(engine, tmp_path):
    path = str(tmp_path / "keys.yaml")
    keys = {name: new_key(path, name, Limits(requests=3, images=2)) for name in ("alice", "bob")}
    text = (tmp_path / "keys.yaml").read_text()
    assert all(key not in text for key in keys.values()) and (tmp_path / "keys.yaml").stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="same name"):
        new_key(path, "alice")

    async def run():
        async with opened(engine, keys=path) as (client, _):
            async def status(body, key, route=DRAW):
                answer = await client.post(route, json=body, headers={"Authorization": f"Bearer {key}"} if key else {})
                return answer.status_code, answer
            good = {"prompt": "a star"}
            assert (await status(good, None))[0] == 401 and (await status(good, "sk-wrong"))[0] == 401
            assert (await status({**good, "n": 3}, keys["alice"]))[0] == 400  # counts as one of three
            job = (await status(good, keys["alice"], JOBS))[1].json()["id"]
            assert (await status(good, keys["alice"]))[0] == 200
            code, answer = await status(good, keys["alice"])
            assert code == 429 and 1 <= int(answer.headers["retry-after"]) <= 61
            assert (await status(good, keys["bob"]))[0] == 200
            for method in ("GET", "DELETE"):  # a job of another is as none
                other = {"Authorization": f"Bearer {keys['bob']}"}
                answer = await client.request(method, f"{JOBS}/{job}", headers=other)
                assert answer.status_code == 404
            for route, code in (("/health", 200), ("/metrics", 401), ("/v1/models", 401)):
                assert (await client.get(route)).status_code == code
    asyncio.run(run())


def test_a_file_of_keys_that_is_none_is_refused(engine, tmp_path):
    path = tmp_path / "keys.yaml"
    for content, message in (({"keys": []}, "no key"), ({"keys": [{"name": "a"}]}, "without sha256"),
                             ({"keys": [{"name": "a", "sha256": "x"}]}, "hexadecimal"), ({"key": 1}, "unknown key")):
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=message):
            create_app(engine, ServiceSettings(keys=str(path)))


# ---- the queue

def test_a_full_queue_answers_at_once_and_recovers(engine):
    async def run():
        held = Held(engine)
        async with opened(held, queue=3, batch=1) as (client, app):
            body = {"prompt": "a star"}
            waiting = [asyncio.create_task(client.post(DRAW, json=body))]
            while not held.batches:  # sent together, the fourth could come before the first is taken and find no room
                await asyncio.sleep(0.01)
            waiting += [asyncio.create_task(client.post(DRAW, json=body)) for _ in range(3)]
            while len(app.state.service.waiting) < 3:
                await asyncio.sleep(0.01)
            full = await client.post(DRAW, json=body)  # without room it is answered while nothing is drawn
            assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
            assert full.json()["error"]["message"] == "the queue is full: 3 images wait; valid: up to 3"
            held.go.set()
            assert [(await answer).status_code for answer in waiting] == [200] * 4
            assert (await client.post(DRAW, json=body)).status_code == 200
            said = (await client.get("/metrics")).text
            assert 'turned_away_total{reason="queue"} 1.0' in said and "waiting_images 0.0" in said
    asyncio.run(run())


def test_one_key_cannot_fill_the_queue(engine):
    async def run():
        held = Held(engine)
        async with opened(held, limits=Limits(queued=2)) as (client, _):
            for code in (202, 202, 429):
                answer = await client.post(JOBS, json={"prompt": "a star"})
                assert answer.status_code == code
            assert "retry-after" in answer.headers
            held.go.set()
    asyncio.run(run())


def test_a_job_says_its_place_its_progress_and_its_result_once(engine):
    async def run():
        held = Held(engine)
        async with opened(held, batch=1) as (client, app):
            first, second, third = [
                (await client.post(JOBS, json={"prompt": "a star", "seed": k, "previews": 2})).json() for k in range(3)]
            while not held.batches:
                await asyncio.sleep(0.01)
            assert [(await client.get(f"{JOBS}/{job['id']}")).json().get("place") for job in (first, second, third)] \
                == [None, 1, 2]
            gone = (await client.delete(f"{JOBS}/{second['id']}")).json()
            assert gone["status"] == "cancelled"
            assert (await client.get(f"{JOBS}/{third['id']}")).json()["place"] == 1
            seen = []
            app.state.service._take = lambda jobs, kind, values, take=app.state.service._take: (
                take(jobs, kind, values), seen.append((kind, len(jobs[0].previews))))
            held.go.set()
            while (state := (await client.get(f"{JOBS}/{third['id']}")).json())["status"] != "done":
                await asyncio.sleep(0.01)
            assert len(state["result"]["data"]) == 1 and ("preview", 1) in seen and ("step", 1) in seen
            assert "result" not in (await client.get(f"{JOBS}/{third['id']}")).json()
            assert (await client.get(f"{JOBS}/{second['id']}")).json()["status"] == "cancelled"
    asyncio.run(run())


def test_a_job_that_is_drawn_stops_when_it_is_cancelled(engine):
    async def run():
        async with opened(engine) as (client, app):
            body = {"prompt": "a star", "num_inference_steps": 150, "n": 8, "exact": True}
            job = (await client.post(JOBS, json=body)).json()["id"]
            while (await client.get(f"{JOBS}/{job}")).json()["status"] != "running":
                await asyncio.sleep(0.01)
            await client.delete(f"{JOBS}/{job}")
            answer = await client.post(DRAW, json={"prompt": "a star"})  # drawn when the other has stopped
            assert answer.status_code == 200 and app.state.service.images.bytes == 0
    asyncio.run(run())


def test_what_is_late_is_given_up(engine):
    async def run():
        async with opened(Held(engine), timeout=0.2) as (client, app):
            answer = await client.post(DRAW, json={"prompt": "a star"})
            assert answer.status_code == 503 and "not drawn within 0.2 seconds" in answer.text
            assert "retry-after" in answer.headers and not app.state.service.jobs
    asyncio.run(run())


def test_a_batch_whose_replica_was_lost_is_drawn_again(engine):
    async def run(losses):
        held = Held(engine)
        held.losses = losses
        held.go.set()
        async with opened(held) as (client, _):
            return (await client.post(DRAW, json={"prompt": "a star"})).status_code, len(held.batches)
    assert asyncio.run(run(2)) == (200, 3)
    status, tries = asyncio.run(run(99))
    assert status == 500 and tries == 4


# ---- privacy

class Broken:
    """Fails with words of the prompt."""

    def __init__(self, engine):
        self.describe = engine.describe

    async def draw(self, orders):
        yield "model", await self.describe()
        raise RuntimeError(f"{orders[0].prompt} in an error")


def test_no_log_metric_or_answer_tells_what_was_asked(engine, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, "httpx")  # the client
    path = str(tmp_path / "keys.yaml")
    key = new_key(path, "alice")
    texts = []

    async def run(drawer):
        async with opened(drawer, keys=path) as (client, app):
            headers = {"Authorization": f"Bearer {key}"}
            for body in ({"prompt": CANARY}, {"prompt": "a", "negative_prompt": CANARY}, {"prompt": CANARY, "n": 0},
                         {CANARY: 1}, {"prompt": "a", "style": CANARY}):
                await client.post(DRAW, json=body, headers=headers)
            await client.get(f"/{CANARY}", headers=headers)
            texts.append((await client.get("/metrics", headers=headers)).text)
            app.state.service.submit = lambda *_: (_ for _ in ()).throw(KeyError(CANARY))
            answer = await client.post(DRAW, json={"prompt": CANARY}, headers=headers)
            assert answer.status_code == 500 and "Traceback" not in answer.text and CANARY not in answer.text

    asyncio.run(run(engine))
    asyncio.run(run(Broken(engine)))
    said = capfd.readouterr()
    for text in (caplog.text, said.out, said.err, *texts):
        assert CANARY not in text and key not in text
    assert "a request failed: KeyError at" in caplog.text and "a batch failed: RuntimeError" in caplog.text
    assert CANARY not in repr(Order(CANARY)) and CANARY not in str(Order(CANARY))


def test_previews_are_spread_over_the_steps():
    assert [step for step in range(1, 21) if wants_preview(3, step, 20)] == [5, 10, 15]
    assert [step for step in range(1, 4) if wants_preview(6, step, 3)] == [1, 2]
    assert not wants_preview(0, 3, 10)
