"""The service under Ray Serve: two replicas, one of them killed, another run, clients of the package `openai`."""
import asyncio
import base64
import os
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
ray = pytest.importorskip("ray")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from made_up_moderation import HARMFUL, judged_run  # noqa: E402
from ray import serve  # noqa: E402
from serving_calls import CANARY  # noqa: E402

from serving.cluster import deploy, deploy_engine, start_ray  # noqa: E402
from serving.keys import new_key  # noqa: E402
from serving.settings import EngineSettings, Limits, ServiceSettings  # noqa: E402

pytestmark = pytest.mark.slow
LIMITS = Limits(requests=10**6, queued=10**6)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def replica_pids() -> list[int]:
    """The processes of the replicas that draw."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::ServeReplica:engine:Replica"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def run_folder(tiny_run, tmp_path_factory):
    return judged_run(tiny_run, tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def service(run_folder, tmp_path_factory):
    """(address, key, folder of Ray's logs) of two replicas on the tiny run."""
    path = str(tmp_path_factory.mktemp("keys") / "keys.yaml")
    key, port = new_key(path, "alice", LIMITS), free_port()
    folder = tempfile.mkdtemp(prefix="r")  # short: the path of a socket has at most 107 letters
    start_ray(_temp_dir=folder)
    settings = ServiceSettings(lanes=2, batch=4, queue=500, timeout=120, keys=path)
    try:
        deploy(EngineSettings(str(run_folder), 4, 1), settings, "127.0.0.1", port, 2)
        yield f"http://127.0.0.1:{port}", key, folder
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def client_of(service) -> "openai.AsyncOpenAI":
    address, key, _ = service
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


async def draw_many(service, count: int, after=lambda done: None, steps: int = 20) -> set[str]:
    """Draw so many images, 24 at a time; the models that drew them. ``after`` hears how many are done."""
    done, models, room = 0, set(), asyncio.Semaphore(24)
    async with client_of(service) as client:
        async def one(seed: int) -> None:
            nonlocal done
            async with room:
                answer = await client.images.generate(prompt=f"a star {CANARY}", extra_body={
                    "seed": seed, "num_inference_steps": steps})
            assert base64.b64decode(answer.data[0].b64_json).startswith(b"\x89PNG")
            models.add(answer.data[0].settings["run"])
            done += 1
            after(done)
        await asyncio.gather(*(one(seed) for seed in range(count)))
    return models


def test_a_client_of_openai_draws(service):
    address, key, _ = service
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
    answer = client.images.generate(model="tiny", prompt="a red star", n=2, size="32x32", extra_body={"seed": 5})
    assert len(answer.data) == 2 and base64.b64decode(answer.data[0].b64_json).startswith(b"\x89PNG")
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.images.generate(prompt="a red star", response_format="url")
    assert httpx.get(answer.data[0].url).content.startswith(b"\x89PNG")
    for change, kind in (({"prompt": HARMFUL}, openai.BadRequestError),
                         ({"prompt": "a", "n": 0}, openai.BadRequestError),
                         ({"prompt": "a", "model": "dall-e-3"}, openai.NotFoundError)):
        with pytest.raises(kind):
            client.images.generate(**change)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="sk-no", max_retries=0).images.generate(prompt="a")


def test_a_killed_replica_loses_no_request(service):
    killed = []

    def kill(done: int) -> None:
        if done == 40 and not killed:
            killed.append(replica_pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    assert len(replica_pids()) == 2
    asyncio.run(draw_many(service, 200, kill))
    assert killed
    end = time.monotonic() + 60
    while len(set(replica_pids()) - set(killed)) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(set(replica_pids()) - set(killed)) == 2  # Serve has started another one


def test_another_run_replaces_the_replicas_and_drops_nothing(service, run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)

    async def run() -> set[str]:
        update = asyncio.create_task(asyncio.to_thread(deploy_engine, EngineSettings(str(other), 4, 1), 2))
        models: set[str] = set()
        while not update.done():
            models |= await draw_many(service, 24)
        await update
        return models | await draw_many(service, 24)

    assert asyncio.run(run()) == {"tiny", "other"}
    assert asyncio.run(draw_many(service, 24)) == {"other"}


def test_no_log_of_ray_tells_what_was_asked(service):
    _, key, folder = service
    asyncio.run(draw_many(service, 4))
    logs = [path for path in Path(folder).rglob("*") if path.is_file() and "logs" in path.parts]
    assert len(logs) > 5
    for path in logs:
        text = path.read_bytes()
        assert CANARY.encode() not in text and key.encode() not in text, path
