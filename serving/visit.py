"""What a person does on the page: a form to an order, and how it goes, in plain words. Nothing here knows Gradio."""
import asyncio
import io
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from files.images import read_image
from files.sheets import axes_grid
from sampling.request import parse_axis, value_text
from serving.guard import place_of
from serving.keys import Account, Keys
from serving.orders import Order
from serving.schema import ImageRequest, faults_text
from serving.service import OVER, Busy, Job, Service

log = logging.getLogger("serving")
STARTS = ("words", "an image", "a painted image", "words, as a grid")
PREVIEWS = 6
Seen = list[tuple[str, str, dict[str, Any]]]  # file, caption and settings of each image of a visit


@dataclass(repr=False)
class Form:
    """The fields of the page."""

    prompt: str
    negative: str
    style: list[str]
    style_strength: float
    palette: str
    count: int
    seed: int
    steps: int
    guidance: float
    sampler: str
    width: int
    height: int
    palette_only: bool
    exact: bool
    metadata: bool
    start: str
    image: Image.Image | None
    strength: float
    painted: dict[str, Any] | None
    across_name: str
    across_values: str
    down_name: str
    down_values: str

    def order(self) -> Order:
        """The order that the form stands for. Raises ValueError with what is valid."""
        axes = tuple(f"{name}={values.strip()}" for name, values in
                     ((self.across_name, self.across_values), (self.down_name, self.down_values))
                     if self.start == STARTS[3] and name != "none")
        if self.start == STARTS[3] and not axes:
            raise ValueError("a grid of nothing; valid: at least one parameter with values such as 5,10,20")
        of_axis = any(axis.startswith("prompt=") for axis in axes)
        try:
            order = ImageRequest(
                prompt=self.prompt.strip() or "-" * of_axis, negative_prompt=self.negative.strip(),
                style=[name if self.style_strength == 1 else f"{name}:{self.style_strength:g}"
                       for name in self.style or []], palette="" if self.palette in (None, "none") else self.palette,
                n=1 if axes else int(self.count or 0),
                seed=None if self.seed is None or self.seed < 0 else int(self.seed),
                num_inference_steps=int(self.steps or 0), guidance_scale=float(self.guidance or 0),
                sampler=None if self.sampler == "default" else self.sampler, size=f"{self.width}x{self.height}",
                palette_only=self.palette_only, exact=self.exact, metadata=self.metadata, previews=PREVIEWS).order()
        except ValidationError as error:
            raise ValueError(faults_text(error.errors())[0]) from None  # type: ignore[arg-type]
        if self.start == STARTS[1]:
            if self.image is None:
                raise ValueError("no image; valid: one to start from, uploaded or sent from below")
            return replace(order, image=self.file_of(self.image), strength=float(self.strength))
        if self.start == STARTS[2]:
            return replace(order, **self.painting())
        return replace(order, axes=axes, prompt="" if of_axis and not self.prompt.strip() else order.prompt)

    def painting(self) -> dict[str, Any]:
        """The image and the mask of the editor. Raises ValueError."""
        background = (self.painted or {}).get("background")
        if background is None:
            raise ValueError("no image; valid: one to paint on, uploaded or sent from below")
        layers = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in (self.painted or {}).get("layers", [])]
        if not any(layer.any() for layer in layers):
            raise ValueError("nothing is painted; valid: brush strokes over what is to be drawn anew")
        mask = Image.fromarray((np.any(layers, axis=0) * 255).astype(np.uint8))
        return {"image": self.file_of(background.convert("RGB")), "mask": self.file_of(mask)}

    def file_of(self, image: Image.Image) -> bytes:
        """An image as a PNG file of the size that is drawn, its middle where the shape is another."""
        data = io.BytesIO()
        ImageOps.fit(image, (self.width, self.height)).save(data, "PNG")
        return data.getvalue()


@dataclass(repr=False)
class Shown:
    """What the page shows at a moment; ``seen`` is the visit so far."""

    job: str
    seen: Seen
    text: str
    images: list[tuple[Any, str]]
    settings: dict[str, Any] | None = None

    @property
    def made(self) -> int:
        """How many of the images are at the end of ``seen``; previews are not."""
        return 0 if self.job else len(self.images)


class Visit:
    """Draws what forms ask for; files that the browser loads are written to ``folder``."""

    def __init__(self, service: Service, keys: Keys, folder: Path):
        self.service, self.keys, self.folder = service, keys, folder
        service.chores.append(self.sweep)

    def sweep(self) -> None:
        """Delete files that are older than a result may become."""
        oldest = time.time() - self.service.settings.keep
        for path in self.folder.glob("*.png"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    async def draw(self, form: Form, account: Account, seen: Seen) -> AsyncIterator[Shown]:
        """Everything that is to be shown on the way, the images last."""
        seen = [row for row in seen if Path(row[0]).exists()]
        if wait := self.keys.wait(account):
            yield Shown("", seen, f"Not now: too many requests. Try again in {wait} seconds.", [])
            return
        try:
            order = form.order()
            job = self.service.submit(order, account)
        except Busy as error:
            yield Shown("", seen, f"Not now: {error.message}. Try again in {error.retry_after} seconds.", [])
            return
        except ValueError as error:
            yield Shown("", seen, f"This cannot be drawn. {error}", [])
            return
        try:
            while not job.over.is_set():
                yield Shown(job.id, seen, self.progress(job), previews_of(job))
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(job.changed.wait(), 1.0)
            yield self.result(job, order, seen)
        except Exception as error:  # Gradio would print its words
            log.error("the page failed: %s at %s", type(error).__name__, place_of(error))
            yield Shown("", seen, "Something failed. Try again.", [])
        finally:
            self.service.cancel(job)  # of a page that was closed; what is over stays as it is
            self.service.forget(job)

    def cancel(self, name: str, account: Account) -> None:
        """Give up what the page draws."""
        job = self.service.find(name, account)
        if job is not None and job.status not in OVER:
            self.service.cancel(job)

    def progress(self, job: Job) -> str:
        """How far a job is."""
        if job.status == "queued":
            return f"Waiting: number {self.service.place(job)} in the queue."
        return f"Drawing: step {job.step} of {job.steps}." if job.steps else "Drawing."

    def result(self, job: Job, order: Order, seen: Seen) -> Shown:
        """The images of a job, and what is said about those that are missing."""
        if job.status not in ("done", "refused"):
            return Shown("", seen, "Cancelled." if job.status == "cancelled" else f"Not drawn: {job.message}.", [])
        made: Seen = []
        said: dict[str, None] = {}
        for _, (name, drawn) in sorted(job.results.items()):
            png = self.service.images.take(name) if name else None
            if drawn.action != "allow":
                said[drawn.message[:1].upper() + drawn.message[1:]] = None
            if png is not None:
                made.append((self.save(png), caption_of(drawn.settings, order), drawn.settings))
        words = [f"{len(made)} image{'s' * (len(made) != 1)}." if made else "Nothing was drawn."]
        if order.axes and len(made) == job.count:
            made.append((self.save(self.sheet(made, order)), "the grid", made[0][2]))
        return Shown("", [*seen, *made], " ".join([*words, *said]), [(path, text) for path, text, _ in made],
                     made[0][2] if made else None)

    def save(self, png: bytes) -> str:
        """The path of a file that the browser may load."""
        path = self.folder / f"{secrets.token_urlsafe(24)}.png"  # a name that nobody else can guess
        path.write_bytes(png)
        return str(path)

    def sheet(self, made: Seen, order: Order) -> bytes:
        """The images of an X/Y grid on one labelled sheet, as a PNG file."""
        axes = [parse_axis(text) for text in order.axes]
        rows = list(axes[1].labels) if len(axes) == 2 else [""]
        images = torch.stack([read_image(path) for path, _, _ in made])
        data = io.BytesIO()
        axes_grid(images, list(axes[0].labels), rows).save(data, "PNG")
        return data.getvalue()


def caption_of(settings: dict[str, Any], order: Order) -> str:
    """The text under an image: its seed, or where it stands in a grid."""
    names = [axis.partition("=")[0] for axis in order.axes]
    values = {**settings, **settings.get("options", {}), **settings.get("guidance", {}),
              "guidance": settings.get("guidance", {}).get("scale")}
    return ", ".join(f"{name} {value_text(values.get(name))}" for name in names) or f"seed {settings['seed']}"


def previews_of(job: Job) -> list[tuple[Any, str]]:
    """Predictions on the way, as images."""
    return [(Image.open(io.BytesIO(png)), f"step {job.step} of {job.steps}") for _, png in sorted(job.previews.items())]
