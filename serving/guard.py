"""The outermost layer: bodies have a size, and no failure reaches a log or a client with words of a request."""
import json
import logging
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from serving.schema import error_body

log = logging.getLogger("serving")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLarge(Exception):
    """A body beyond the limit."""


class Guard:
    """ASGI middleware. A body of more than ``largest`` bytes is answered with 413 without being kept; an exception with
    500, and logged as its kind and the line it comes from."""

    def __init__(self, app: Callable, largest: int):
        self.app, self.largest = app, largest

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, started = 0, False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.largest:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            if declared_length(scope) > self.largest:
                raise TooLarge
            await self.app(scope, counted, noted)
        except Exception as error:
            large = is_too_large(error)
            if not large:
                log.error("a request failed: %s at %s", type(error).__name__, place_of(error))
            if started:
                return
            if large:
                await answer(send, 413, too_large(self.largest))
            else:
                await answer(send, 500, error_body("the service failed; the request may be sent again", "server_error",
                                                   "internal_error"))


def too_large(largest: int) -> dict[str, Any]:
    """The error of a body beyond the limit."""
    return error_body(f"the body is too large; valid: up to {largest} bytes", "invalid_request_error", "too_large")


def is_too_large(error: BaseException | None) -> bool:
    """Whether an error is, or comes from, a body beyond the limit."""
    while error is not None and not isinstance(error, TooLarge):
        error = error.__cause__ or error.__context__
    return error is not None


def declared_length(scope: Message) -> int:
    """The length that a request says it has, 0 if it says none that can be read."""
    for name, value in scope.get("headers", ()):
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def place_of(error: BaseException) -> str:
    """File and line where an error was raised, without its words."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"


async def answer(send: Send, status: int, body: dict[str, Any]) -> None:
    """Send a JSON answer."""
    data = json.dumps(body).encode()
    await send({"type": "http.response.start", "status": status,
                "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]})
    await send({"type": "http.response.body", "body": data})
