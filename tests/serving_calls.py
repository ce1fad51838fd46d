"""Calls of the service in this process, for its tests: a run whose own moderation refuses the made-up word zorbic, a
client, and an engine that draws when it is told to."""
import asyncio
import base64
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from made_up_moderation import written

from serving.app import create_app
from serving.engine import Engine
from serving.service import ReplicaLost
from serving.settings import ServiceSettings

HARMFUL = "a zorbic star"
CANARY = "quibblefrost"  # a word that no log may hold
DRAW, JOBS = "/v1/images/generations", "/v1/jobs"


def judged_run(tiny_run: Path, folder: Path) -> Path:
    """A copy of the tiny run in ``folder``, with the made-up moderation."""
    run = Path(shutil.copytree(tiny_run, folder / "tiny"))
    written(run / "moderation.safetensors")
    return run


class Held:
    """An engine that draws when it is told to, and counts."""

    def __init__(self, engine: Engine):
        self.engine, self.go, self.batches, self.losses = engine, asyncio.Event(), [], 0
        self.describe = engine.describe

    async def draw(self, orders):
        self.batches.append(len(orders))
        await self.go.wait()
        if self.losses:
            self.losses -= 1
            raise ReplicaLost
        async for event in self.engine.draw(orders):
            yield event


@asynccontextmanager
async def opened(drawer, **settings):
    """(client, application) of a running service."""
    app = create_app(drawer, ServiceSettings(**{"timeout": 30, **settings}))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client, app


def ask(drawer, *bodies, path=DRAW, **settings):
    """The answers to bodies that are sent together."""
    async def run():
        async with opened(drawer, **settings) as (client, _):
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))
    return asyncio.run(run())


def png_of(answer, index=0) -> bytes:
    return base64.b64decode(answer.json()["data"][index]["b64_json"])
