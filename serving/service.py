"""Jobs, the queue they wait in, and the batches they are drawn in.

    submit -> waiting (bounded) -> a batch of one kind -> engine, ``lanes`` at a time -> images in the store -> fetched

Whoever draws is asked through two functions, ``describe`` and ``draw`` of `serving/engine.py`: an engine in this
process, or replicas elsewhere.
"""
import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cachetools import TTLCache

from serving.engine import Drawn, Event
from serving.keys import Account
from serving.metrics import Metrics
from serving.orders import Model, Order, check_order
from serving.settings import ServiceSettings
from serving.store import ImageStore, StoreFull

log = logging.getLogger("serving")
ATTEMPTS = 4  # of a batch whose replica was lost: an order that ends every replica must not end them all
TICK = 0.5  # seconds between two looks at what is late or old
OVER = ("done", "refused", "invalid", "failed", "cancelled", "late")


class ReplicaLost(Exception):
    """The replica that drew a batch is gone; another one may draw it."""


class Busy(Exception):
    """A request that is not accepted now. status: 429 for too many of one key, 503 for too many of all."""

    def __init__(self, status: int, reason: str, message: str, seconds: float):
        super().__init__(message)
        self.status, self.reason, self.message, self.retry_after = status, reason, message, max(1, math.ceil(seconds))


class Drawer(Protocol):
    """Who draws."""

    async def describe(self) -> Model: ...

    def draw(self, orders: Sequence[Order]) -> AsyncIterator[Event]: ...


@dataclass(repr=False, eq=False)
class Job:
    """One request on its way. results: by the index of the image, its identity in the store or None, and ``Drawn``
    without the file. form: in which the result is to be answered. fetched: the result was."""

    id: str
    owner: str
    order: Order | None
    count: int
    created: float
    status: str = "queued"
    step: int = 0
    steps: int = 0
    previews: dict[int, bytes] = field(default_factory=dict)
    results: dict[int, tuple[str | None, Drawn]] = field(default_factory=dict)
    message: str = ""
    form: str = "b64_json"
    fetched: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def complete(self) -> bool:
        """Whether all of its images were drawn or refused."""
        return len(self.results) == self.count

    def note(self) -> None:
        """Wake those who watch the job."""
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self, status: str, message: str = "") -> None:
        """The job is over; its prompt is forgotten."""
        if self.status not in OVER:
            self.status, self.message, self.order, self.previews = status, message, None, {}
            self.over.set()
            self.note()


class Service:
    """The queue of one entrance. Start it inside the event loop that its requests come from."""

    def __init__(self, drawer: Drawer, settings: ServiceSettings):
        self.drawer, self.settings, self.metrics = drawer, settings, Metrics()
        self.images = ImageStore(settings.keep, settings.store)
        self.jobs: dict[str, Job] = {}
        self.finished: TTLCache[str, Job] = TTLCache(1e9, settings.keep)
        self.waiting: deque[Job] = deque()
        self.model: Model | None = None
        self.drawing = 0
        self.closed = False
        self.chores: list[Callable[[], object]] = []  # what others want to be called for every few seconds
        self._seconds = 0.5  # that an image takes, a running mean
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    # ---- life

    async def start(self) -> None:
        """Ask who draws for the model, and begin to draw."""
        self.model = await self.drawer.describe()
        for work in (self._dispatch(), self._tick()):
            self._keep(asyncio.create_task(work))

    async def stop(self, seconds: float = 30.0) -> None:
        """Accept nothing more, finish what was accepted for so many seconds, and end."""
        self.closed = True
        end = time.monotonic() + seconds
        while (self.waiting or self.drawing) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, task: asyncio.Task) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- jobs

    def submit(self, order: Order, account: Account) -> Job:
        """Accept an order. Raises ValueError for one that cannot be drawn, and Busy where there is no room for it."""
        assert self.model is not None
        count = check_order(order, self.model, account.limits)
        waiting = sum(job.count for job in self.waiting)
        if self.closed:
            raise self._busy(503, "closing", "the service is closing", 5)
        mine = sum(job.count for job in self.jobs.values() if job.owner == account.name)
        if mine + count > account.limits.queued:
            raise self._busy(429, "queued", f"{mine} images of this key are not drawn yet; valid: up to "
                             f"{account.limits.queued}", self.seconds_until(waiting))
        if waiting + count > self.settings.queue:
            raise self._busy(503, "queue", f"the queue is full: {waiting} images wait; valid: up to "
                             f"{self.settings.queue}", self.seconds_until(waiting))
        job = Job(secrets.token_urlsafe(18), account.name, order, count, time.monotonic())
        self.jobs[job.id] = job
        self.waiting.append(job)
        self.metrics.waiting.set(waiting + count)
        self._wake.set()
        return job

    def _busy(self, status: int, reason: str, message: str, seconds: float) -> Busy:
        self.metrics.turned_away.labels(reason).inc()
        return Busy(status, reason, message, seconds)

    def seconds_until(self, images: int) -> float:
        """How long so many images take."""
        return images * self._seconds / self.settings.lanes

    def find(self, name: str, account: Account) -> Job | None:
        """A job of this account; None for one of another, as if it did not exist."""
        job = self.jobs.get(name) or self.finished.get(name)
        return job if job is not None and job.owner == account.name else None

    def place(self, job: Job) -> int:
        """How many jobs are in front of one that waits, and itself: 1 is the next; 0 for one that does not wait."""
        return self.waiting.index(job) + 1 if job in self.waiting else 0

    def cancel(self, job: Job) -> None:
        """Give a job up, waiting or drawn."""
        self._end(job, "cancelled", "cancelled by its owner")

    def forget(self, job: Job) -> None:
        """Keep nothing of a job that was answered, but images that are to be fetched."""
        self.finished.pop(job.id, None)

    def _end(self, job: Job, status: str, message: str = "") -> None:
        """A job is over, whatever became of it; it is kept until its time is over."""
        if job.status in OVER:
            return
        if job in self.waiting:
            self.waiting.remove(job)
        for name, _ in job.results.values() if status in ("cancelled", "late", "failed") else ():
            if name is not None:
                self.images.take(name)
        job.end(status, message)
        self.jobs.pop(job.id, None)
        self.finished[job.id] = job
        self.metrics.jobs.labels(status).inc()
        self.metrics.waiting.set(sum(job.count for job in self.waiting))

    # ---- drawing

    async def _dispatch(self) -> None:
        """Start batches while there are lanes."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.waiting and self.drawing < self.settings.lanes:
                batch = self._next_batch()
                self.drawing += 1
                self.metrics.drawing.set(self.drawing)
                self._keep(asyncio.create_task(self._draw(batch)))

    def _next_batch(self) -> list[Job]:
        """The job that waits longest, and others of its kind while the batch has room."""
        first = self.waiting.popleft()
        batch, room = [first], self.settings.batch - first.count
        kind = first.order.kind if first.order else None
        for job in list(self.waiting) if kind is not None else ():
            if job.count <= room and job.order is not None and job.order.kind == kind:
                batch.append(job)
                self.waiting.remove(job)
                room -= job.count
        for job in batch:
            job.status = "running"
            self.metrics.wait.observe(time.monotonic() - job.created)
            job.note()
        self.metrics.batch.observe(sum(job.count for job in batch))
        self.metrics.waiting.set(sum(job.count for job in self.waiting))
        return batch

    async def _draw(self, batch: list[Job]) -> None:
        """Draw a batch; again by another replica where one was lost. Drawing twice gives the same images."""
        start, failure = time.monotonic(), "failed"
        try:
            for attempt in range(ATTEMPTS):
                try:
                    failure = await self._follow_while_wanted(batch)
                    break
                except ReplicaLost:
                    self.metrics.repeated.inc()
                    log.warning("a replica was lost; its batch is drawn again")
                    await asyncio.sleep(0.2 * 2**attempt)
        except Exception as error:  # its words may be those of a request
            log.error("a batch failed: %s", type(error).__name__)
        finally:
            seconds = time.monotonic() - start
            self.metrics.draw.observe(seconds)
            self._seconds += 0.2 * (seconds / max(1, sum(job.count for job in batch)) - self._seconds)
            self.drawing -= 1
            self.metrics.drawing.set(self.drawing)
            for job in batch:
                self._close(job, failure)
            self._wake.set()

    async def _follow_while_wanted(self, batch: list[Job]) -> str:
        """As ``_follow``, but only as long as somebody waits for the batch, even if a replica says nothing."""
        following: asyncio.Future[str] = asyncio.ensure_future(self._follow(batch))
        over: asyncio.Future[Any] = asyncio.gather(*(job.over.wait() for job in batch))
        try:
            await asyncio.wait([following, over], return_when=asyncio.FIRST_COMPLETED)
            if not following.done() and all(job.complete for job in batch):
                await asyncio.wait({following}, timeout=5)  # the end of the events
            return following.result() if following.done() else ""
        finally:
            following.cancel()
            over.cancel()
            await asyncio.gather(following, over, return_exceptions=True)

    async def _follow(self, batch: list[Job]) -> str:
        """Follow the events of a batch; what failed, "" for nothing."""
        jobs = [job for job in batch if job.order is not None]
        failure = ""
        if not jobs:
            return failure
        drawing: Any = self.drawer.draw([job.order for job in jobs if job.order is not None])
        async with contextlib.aclosing(drawing) as events:
            async for kind, *values in events:
                if kind == "failed":
                    failure = values[0]
                    log.error("a batch failed: %s", failure)
                else:
                    self._take(jobs, kind, values)
        return failure

    def _take(self, jobs: list[Job], kind: str, values: list) -> None:
        """Note one event of a batch."""
        if kind == "model":
            self.model = values[0]
            return
        if kind == "step":
            for job in jobs:
                job.step, job.steps = values
                job.note()
            return
        job = jobs[values[0]]
        if job.status in OVER:
            return
        if kind == "preview" and values[2] is not None:
            job.previews[values[1]] = values[2]
        elif kind == "invalid":
            self._end(job, "invalid", values[1])
        elif kind == "image" and values[1] not in job.results:
            self._add(job, values[1], values[2])
        job.note()

    def _add(self, job: Job, index: int, drawn: Drawn) -> None:
        """Keep an image, or its refusal."""
        self.metrics.images.labels(drawn.action).inc()
        name = None
        if drawn.png is None:
            self.metrics.refused.labels(drawn.category or "none").inc()
        else:
            try:
                name = self.images.add(drawn.png)
            except StoreFull:
                self._end(job, "failed", "there is no room for the image: too many wait to be fetched")
                return
        self.metrics.stored.set(self.images.bytes)
        job.results[index] = name, Drawn(None, drawn.seed, drawn.action, drawn.category, drawn.message, drawn.settings)
        if job.complete:
            self._close(job, "")

    def _close(self, job: Job, failure: str) -> None:
        """End a job with what it has."""
        if job.complete:
            drawn = any(name is not None for name, _ in job.results.values())
            self._end(job, "done" if drawn else "refused")
        else:
            self._end(job, "failed", "the images could not be drawn" if failure else "the drawing was interrupted")

    # ---- time

    async def _tick(self) -> None:
        """Give up what is late, let go of what is old, and look whether the model has changed."""
        ticks = 0
        while True:
            await asyncio.sleep(TICK)
            now, ticks = time.monotonic(), ticks + 1
            for job in list(self.jobs.values()):
                if now - job.created > self.settings.timeout:
                    self._end(job, "late", f"not drawn within {self.settings.timeout:g} seconds")
            self.images.expire()
            self.finished.expire()
            self.metrics.stored.set(self.images.bytes)
            for chore in self.chores if ticks % 10 == 0 else ():
                chore()
            if ticks % 10 == 0 and not self.drawing:
                with contextlib.suppress(Exception):  # the next batch says it, too
                    self.model = await asyncio.wait_for(self.drawer.describe(), 5)
