"""One replica: a system that draws batches of orders and says what happens on the way, as events.

An event is a tuple that begins with its kind; ``place`` is the number of an order in its batch, ``index`` of an image
in its order:

    ("model", Model)                                  first of all: by whom the batch is drawn
    ("step", step, steps)                             of the whole batch
    ("preview", place, index, png)                    a prediction of x_0 on the way that moderation has allowed
    ("image", place, index, Drawn)                    an image, or its refusal
    ("invalid", place, message)                       an order that this model cannot draw
    ("failed", kind)                                  the batch failed; the kind of the error, never its words
"""
import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from files.images import png_bytes
from model.allocator import keep_freed_memory
from pipeline.moderation import decision_row
from pipeline.personal import cards_of_run, judge_cards
from pipeline.styles import DEFAULT, read_styles
from sampling.draw import decode_images
from sampling.engine import DrawSettings, Job, Sample, draw_samples, gate_of, step_count
from sampling.gate import Gate
from sampling.loading import SourceFiles, load_moderation, load_system
from sampling.metadata import shared_settings
from sampling.request import Request, settings_of
from serving.orders import Model, Order, requests_of_order, size_text, source_settings, sources_of_order
from serving.settings import EngineSettings

Event = tuple[Any, ...]


@dataclass(frozen=True, repr=False)
class Drawn:
    """What became of one image: a PNG file, or None and why it was refused. settings: what it was made with, for the
    client who asked for it."""

    png: bytes | None
    seed: int
    action: str
    category: str
    message: str
    settings: dict[str, Any]


class Stopped(Exception):
    """Nobody waits for the batch any more."""


class Engine:
    """Draws one batch at a time, in a thread of its own. Raises ValueError or OSError for a run that is not there."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self._thread = ThreadPoolExecutor(1, "draw")
        self._thread.submit(self._load).result()

    def _load(self) -> None:
        """Load the system and the moderation."""
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        keep_freed_memory()
        choice = self.settings.system
        self.system = load_system(choice)
        self.moderation = load_moderation(self.settings.judge, choice)
        judge_cards(self.moderation, {**cards_of_run(choice.path), **self.system.cards})
        self.shared = {exact: shared_settings(self.system, choice, SourceFiles(), exact) for exact in (False, True)}
        factor = self.system.autoencoder.factor
        styles = read_styles(DEFAULT)
        self.model = Model(choice.name, self.system.config, factor,
                           factor * 2 ** (len(self.system.unet.config.channels) - 1), styles, self.moderation.checks)

    async def describe(self) -> Model:
        """What clients may ask of the system."""
        return self.model

    async def draw(self, orders: Sequence[Order]) -> AsyncIterator[Event]:
        """The events of a batch. Closing the iterator stops the drawing at its next step."""
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def emit(event: Event | None) -> None:
            if not stopped.is_set():
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._thread.submit(self._work, orders, emit, stopped)
        try:
            yield "model", self.model
            while (event := await events.get()) is not None:
                yield event
        finally:
            stopped.set()

    def _work(self, orders: Sequence[Order], emit: Callable[[Event | None], None], stopped: threading.Event) -> None:
        """Draw a batch; whatever is wrong becomes an event without a word of the orders."""
        try:
            self._draw(orders, emit, stopped)
        except Stopped:
            return
        except Exception as error:  # its message, or a traceback, may hold words of a prompt
            emit(("failed", type(error).__name__))
        emit(None)

    def _draw(self, orders: Sequence[Order], emit: Callable[[Event | None], None], stopped: threading.Event) -> None:
        """Draw the orders that are valid here, as one job."""
        first = orders[0]
        self.system.set_size(*(first.size or self.model.size))
        requests, places = requests_of_batch(orders, self.model, emit)
        if not requests or stopped.is_set():
            return
        job = Job(self.system, requests, sources_of_order(first))
        gate = gate_of(job, self.moderation)
        settings = DrawSettings(self.settings.batch, first.exact)
        steps, step = step_count(job, gate, settings), 0

        def after_step() -> None:
            nonlocal step
            if stopped.is_set():
                raise Stopped
            step += 1
            emit(("step", step, steps))

        def preview(numbers: Sequence[int], x_0: torch.Tensor) -> None:
            for row, number in enumerate(numbers):
                place, index = places[number]
                if wants_preview(orders[place].previews, step + 1, steps):
                    png = self._preview(job, gate, x_0[row:row + 1], requests[number])
                    emit(("preview", place, index, png))

        watched = any(order.previews for order in orders)
        for sample in draw_samples(job, gate, settings, after_step, preview if watched else None):
            place, index = places[sample.number]
            emit(("image", place, index, self._drawn(sample, orders[place])))

    def _preview(self, job: Job, gate: Gate, x_0: torch.Tensor, request: Request) -> bytes | None:
        """A prediction of x_0 (1, C, h, w) as a PNG file; None if moderation does not allow it as it is."""
        images = decode_images(self.system, x_0, job.sources, request)
        if gate.check_frames(images, request).action not in ("allow", "flag"):
            return None
        return png_bytes(images[0], None)

    def _drawn(self, sample: Sample, order: Order) -> Drawn:
        """A sample as a file, as `sample.py` would have written it."""
        row = decision_row(sample.decision, sample.stage)
        extra: dict[str, Any] = {} if row["action"] == "allow" else {"moderation": row["action"]}
        if order.size is not None and order.size != self.model.size:
            extra["size"] = size_text(order.size)
        settings = {**settings_of(sample.request), **self.shared[order.exact], **source_settings(order), **extra}
        png = None if sample.image is None else png_bytes(sample.image, settings if order.metadata else None)
        return Drawn(png, sample.request.seed, row["action"], row["category"], row["message"],
                     {} if sample.image is None else settings)


def requests_of_batch(orders: Sequence[Order], model: Model, emit: Callable[[Event], None]
                      ) -> tuple[list[Request], list[tuple[int, int]]]:
    """The requests of all orders, and the (place, index) of each; orders that are not valid here are said to be."""
    requests: list[Request] = []
    places: list[tuple[int, int]] = []
    for place, order in enumerate(orders):
        try:
            found = requests_of_order(order, model)
        except ValueError as error:
            emit(("invalid", place, str(error)))
            continue
        requests += found
        places += [(place, index) for index in range(len(found))]
    return requests, places


def wants_preview(previews: int, step: int, steps: int) -> bool:
    """Whether one of so many previews is due after this step: they are evenly spaced, none with the image itself."""
    if not previews or step >= steps:
        return False
    return step * (previews + 1) // steps > (step - 1) * (previews + 1) // steps
