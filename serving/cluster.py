"""The service under Ray Serve: replicas that draw, and one entrance with the queue. Two applications, so that another
run replaces the replicas one after the other while the entrance and what waits in it stay:

    engine    N replicas of `serving/engine.py`, reached by a handle only
    api       the HTTP application of `serving/app.py`

Choosing a replica, health checks, restarts and rolling updates are Ray Serve's. ``engine`` and ``api`` build the
applications of configs/serve.yaml. Ray is imported where it is used: it takes a second, and --page does without it.
"""
import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI

from files.config import from_dict, to_dict
from files.run_folder import RunFolder
from pipeline.loading import FILES
from serving.app import create_app
from serving.engine import Engine, Event
from serving.keys import Keys
from serving.orders import Model, Order
from serving.page import mount_page
from serving.service import Drawer, ReplicaLost
from serving.settings import EngineSettings, ServiceSettings

ENGINE, API = "engine", "api"
QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # an access log would hold the names of jobs and images
GRACE = 60  # seconds that a replica which is replaced has to finish its batch
HERE = {"num_cpus": 0}  # on one machine there is nothing to count: `threads` says what a replica takes
# Ray's workers have the niceness 15 unless told otherwise: beside other work they would starve; and a machine that is
# busy takes longer to start a process than Serve waits by itself
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
       "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30"}


def application(drawer: Drawer, settings: ServiceSettings) -> FastAPI:
    """The HTTP application, with the page if it is wanted."""
    app = create_app(drawer, settings)
    return mount_page(app) if settings.page else app


class Replicas:
    """The replicas of the application "engine", as one who draws."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def describe(self) -> Model:
        """What the replica that answers draws with. Waits for replicas that are not there yet."""
        from ray import serve
        while self._handle is None:
            try:
                self._handle = await asyncio.to_thread(serve.get_app_handle, ENGINE)
            except Exception:  # both applications of a file are started together
                await asyncio.sleep(0.5)
        return await self._handle.describe.remote()

    async def draw(self, orders: Sequence[Order]) -> AsyncIterator[Event]:
        """The events of a batch. Raises ReplicaLost when the replica ends before the batch does."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, TaskCancelledError
        lost = (ActorDiedError, ActorUnavailableError, RayActorError, TaskCancelledError)
        events = self._handle.draw.options(stream=True).remote(orders)
        whole = False
        try:
            async for event in events:
                yield event
            whole = True
        except lost:
            raise ReplicaLost from None
        finally:
            if not whole:
                with contextlib.suppress(Exception):
                    events.cancel()


class Replica(Engine):
    """An engine whose settings are plain data, as Serve hands them over."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(from_dict(EngineSettings, settings))


def engine(settings: dict[str, Any]) -> Any:
    """The application of the replicas. How many there are, and on what, is said by configs/serve.yaml or by the
    command. Raises ConfigError for settings that are not valid."""
    return replicas_of(settings)


def replicas_of(settings: dict[str, Any], **options: Any) -> Any:
    """As ``engine``, with options of the deployment."""
    from ray import serve
    from_dict(EngineSettings, settings)
    return serve.deployment(Replica, name="Replica", max_ongoing_requests=1, graceful_shutdown_timeout_s=GRACE,
                            logging_config=QUIET, **options).bind(settings)


def api(settings: dict[str, Any]) -> Any:
    """The application of the entrance. Raises ConfigError for settings that are not valid."""
    return entrance_of(settings)


def entrance_of(settings: dict[str, Any], **options: Any) -> Any:
    """As ``api``, with options of the deployment."""
    from ray import serve
    parsed = from_dict(ServiceSettings, settings)

    def build() -> FastAPI:
        return application(Replicas(), parsed)

    return serve.deployment(serve.ingress(build)(), name="Entrance", max_ongoing_requests=10_000,
                            graceful_shutdown_timeout_s=GRACE, logging_config=QUIET, **options).bind()


def start_ray(**options: Any) -> None:
    """A Ray of this machine alone, small and silent: no dashboard, no statistics to anybody."""
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    import ray
    if not ray.is_initialized():
        ray.init(num_cpus=1, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False,
                 configure_logging=False, **options)


def deploy(engine_settings: EngineSettings, settings: ServiceSettings, host: str, port: int, replicas: int) -> None:
    """Start both applications on a Ray that runs, and wait until they answer."""
    from ray import serve
    serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly", logging_config=QUIET)
    deploy_engine(engine_settings, replicas)
    serve.run(entrance_of(to_dict(settings), ray_actor_options=HERE), name=API, route_prefix="/")


def deploy_engine(settings: EngineSettings, replicas: int) -> None:
    """Start the replicas, or replace them one after the other by those of other settings."""
    from ray import serve
    app = replicas_of(to_dict(settings), num_replicas=replicas, ray_actor_options=HERE)
    serve.run(app, name=ENGINE, route_prefix=None)


def serve_replicas(engine_settings: EngineSettings, settings: ServiceSettings, host: str, port: int,
                   replicas: int) -> None:
    """Serve on this machine until the keyboard or a signal stops it."""
    import ray
    from ray import serve
    run = RunFolder.open(engine_settings.system.path)  # what is wrong with it is said in one line here
    run.require(*FILES)
    Keys(settings.keys)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    done = threading.Event()
    start_ray()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
            signal.signal(number, lambda *_: done.set())
        deploy(engine_settings, settings, host, port, replicas)
        print(f"{host}:{port}: /v1/images/generations, {replicas} replicas"
              f"{', the page at /' if settings.page else ''}", flush=True)
        done.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
