"""Calls of the service in this process, for its tests: a client, and an engine that draws when it is told to."""
import asyncio
import base64
from contextlib import asynccontextmanager

import httpx

from serving.app import create_app
from serving.engine import Engine
from serving.service import ReplicaLost
from serving.settings import ServiceSettings

CANARY = "quibblefrost"  # a word that no log may hold
DRAW, JOBS = "/v1/images/generations", "/v1/jobs"


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
