"""One request of a client as the engine understands it, and its requests for images."""
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange

from diffusion.sampling import check_sampling
from diffusion.schedule import Schedule
from files.images import MAX_PIXELS, BadImage, decode_upright, open_header, rgb_on_background
from pipeline.config import SystemConfig
from pipeline.palette import HEX, THEMES
from pipeline.styles import Style, parse_style
from sampling.draw import Sources
from sampling.plan import Plan, read_prompts, requests_of_plan
from sampling.request import Request
from sampling.styling import ChosenStyles, style_request, styled_plan
from serving.settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP")  # of given images
NAMES = {"style": "style", "n": "n", "xy": "xy", "steps": "num_inference_steps", "guidance": "guidance_scale",
         "negative": "negative_prompt", "init": "image", "size": "size"}  # flags of sample.py by the names of the API


@dataclass(frozen=True)
class Model:
    """What a replica says of the system that it draws with. multiple: what sides of images are multiples of. checks:
    what its moderation looks at."""

    name: str
    config: SystemConfig
    factor: int
    multiple: int
    styles: dict[str, Style]
    checks: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image of the size that the system was trained at."""
        return self.config.latent_shape[1] * self.factor, self.config.latent_shape[2] * self.factor


@dataclass(frozen=True, repr=False)
class Order:
    """One request. It has no text form: neither a log nor a traceback can show a prompt or an image by printing it.

    styles: "NAME" or "NAME:STRENGTH". size: (height, width), None for that of training. image, mask: files as bytes,
    to start from and of what is painted. axes: of an X/Y grid. previews: how many predictions of x_0 on the way.
    """

    prompt: str
    negative: str = ""
    count: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    styles: tuple[str, ...] = ()
    palette: str = ""
    palette_weight: float | None = None
    palette_only: bool = False
    size: tuple[int, int] | None = None
    strength: float | None = None
    image: bytes | None = None
    mask: bytes | None = None
    axes: tuple[str, ...] = ()
    exact: bool = False
    metadata: bool = True
    previews: int = 0

    @property
    def kind(self) -> tuple | None:
        """What orders share that are drawn together; None for one that is drawn alone."""
        if self.image is not None or self.axes:
            return None
        return (self.negative, self.steps, self.guidance, self.sampler, self.styles, self.palette, self.palette_weight,
                self.palette_only, self.size, self.exact)


def requests_of_order(order: Order, model: Model) -> list[Request]:
    """The images that an order asks for. Raises ValueError with what is valid, in the words of the API."""
    try:
        check_palette(order.palette)
        chosen = ChosenStyles(tuple(parse_style(name, model.styles) for name in order.styles))
        plan = Plan(prompts=() if not order.prompt and order.axes else (order.prompt,), negative=order.negative,
                    count=order.count, seed=order.seed, sampler=order.sampler, steps=order.steps,
                    guidance=order.guidance, palette=order.palette, palette_weight=order.palette_weight,
                    palette_only=order.palette_only, strength=order.strength, starts=order.image is not None,
                    painted=order.mask is not None, axes=order.axes)
        plan = styled_plan(plan, chosen)
        return [style_request(request, chosen)
                for request in requests_of_plan(plan, read_prompts(plan), model.config.sampling)]
    except ValueError as error:
        raise ValueError(in_words_of_the_api(str(error))) from None


def in_words_of_the_api(message: str) -> str:
    """A message about flags of the command line, about names of the API."""
    message = message.replace(" (all of them: --styles)", "")
    return re.sub(r"--([a-z][a-z-]*)", lambda match: NAMES.get(match[1], match[1].replace("-", "_")), message)


def check_palette(text: str) -> None:
    """Raises ValueError for a palette that is neither colours nor a theme: a client may not name a file."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text and text.strip().lower() not in THEMES and not (parts and all(map(HEX.fullmatch, parts))):
        raise ValueError(f"palette: valid: colours such as \"#1b3a4b,#f2c14e:0.5\" or a theme ({', '.join(THEMES)})")


def check_order(order: Order, model: Model, limits: Limits) -> int:
    """The number of images of an order that the model can draw within the limits. Raises ValueError with what is
    valid."""
    height, width = order.size or model.size
    if height % model.multiple or width % model.multiple or height * width > limits.pixels:
        raise ValueError(f"size: {width}x{height}; valid: WIDTHxHEIGHT, multiples of {model.multiple}, together up to "
                         f"{limits.pixels} pixels")
    if order.count > limits.images:
        raise ValueError(f"n: {order.count}; valid: 1 to {limits.images}")
    requests = requests_of_order(order, model)
    if len(requests) > limits.images:
        raise ValueError(f"the request asks for {len(requests)} images; valid: up to {limits.images}")
    schedule = Schedule(model.config.schedule)
    for request in {request.kind: request for request in requests}.values():
        if request.config.steps > limits.steps:
            raise ValueError(f"num_inference_steps: {request.config.steps}; valid: 1 to {limits.steps}")
        check_sampling(schedule, model.config.prediction_type, request.config, request.strength)
    for request in requests:
        for text in request.texts:
            request.read(text)
    if order.image is not None:
        sources = sources_of_order(order)
        for what, found in (("image", sources.image), ("mask", sources.paint)):
            if found is not None and tuple(found.shape[-2:]) != (height, width):
                raise ValueError(f"{what}: {found.shape[-1]}x{found.shape[-2]} pixels; valid: {width}x{height}, the "
                                 "size that is drawn")
    return len(requests)


def sources_of_order(order: Order) -> Sources:
    """The images that an order starts from. Raises ValueError for bytes that are none."""
    paint = None
    if order.mask is not None:
        grey = read_bytes(order.mask, "mask").float().mean(dim=0)
        paint = grey >= 128
    return Sources(None if order.image is None else read_bytes(order.image, "image"), paint)


def read_bytes(data: bytes, what: str) -> torch.Tensor:
    """An image file as uint8 (3, H, W). Raises ValueError."""
    try:
        image = rgb_on_background(decode_upright(open_header(io.BytesIO(data), MAX_PIXELS // 8, FORMATS)))
    except BadImage as error:
        raise ValueError(f"{what}: {error}; valid: a whole {', '.join(FORMATS)} file") from None
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


def source_settings(order: Order) -> dict[str, Any]:
    """The metadata of what an order starts from, as `sample.py` writes it."""
    given = {"init": order.image, "mask": order.mask}
    return {name: {"file": f"{name}.png", "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in given.items() if data is not None}


def size_text(size: Sequence[int]) -> str:
    """(height, width) as sample.py reads it."""
    return f"{size[0]}x{size[1]}"
