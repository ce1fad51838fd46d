"""The HTTP interface: one FastAPI application, under uvicorn in one process or as the entrance of Ray Serve.

    POST   /v1/images/generations    OpenAI's: waits for the images
    POST   /v1/jobs                  the same body: answers at once with an identity
    GET    /v1/jobs/ID               place in the queue, progress, previews, and the result once
    DELETE /v1/jobs/ID               gives it up
    GET    /v1/images/ID             a PNG file, once
    GET    /v1/models  /health  /metrics
"""
import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from serving.guard import Guard, is_too_large, too_large
from serving.keys import Account, Keys
from serving.schema import ImageRequest, error_body, faults_text
from serving.service import Busy, Drawer, Job, Service
from serving.settings import ServiceSettings
from serving.store import MIB

router = APIRouter()
PRIVATE = {"Cache-Control": "no-store"}
POLL = 0.5  # seconds between two looks whether a client is still there


class Fault(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None):
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


def create_app(drawer: Drawer, settings: ServiceSettings) -> FastAPI:
    """The application. The service begins when the application does, in its event loop."""
    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await app.state.service.start()
        yield
        await app.state.service.stop()

    app = FastAPI(title="Images from text", docs_url=None, redoc_url=None, lifespan=life)
    app.state.service = Service(drawer, settings)
    app.state.keys = Keys(settings.keys, settings.limits)
    app.include_router(router)
    app.add_middleware(Guard, largest=settings.body * MIB)
    for kind, handler in ((Fault, on_fault), (RequestValidationError, on_invalid), (HTTPException, on_http)):
        app.add_exception_handler(kind, handler)
    return app


# ---- errors

def answered(request: Request, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """A JSON answer, counted by the route, never by the path that was asked for."""
    route = getattr(request.scope.get("route"), "path", "none")
    request.app.state.service.metrics.answers.labels(route, str(status)).inc()
    return JSONResponse(body, status, {**PRIVATE, **(headers or {})})


async def on_fault(request: Request, fault: Exception) -> Response:
    """An error of a route."""
    assert isinstance(fault, Fault)
    return answered(request, fault.status, fault.body, fault.headers)


async def on_invalid(request: Request, error: Exception) -> Response:
    """A body or a path that does not fit the schema."""
    assert isinstance(error, RequestValidationError)
    message, param = faults_text(list(error.errors()))
    return answered(request, 400, error_body(message, "invalid_request_error", "invalid_value", param))


async def on_http(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    if is_too_large(error):
        return answered(request, 413, too_large(request.app.state.service.settings.body * MIB))
    if error.status_code == 404:
        message = f"no such path; valid: {', '.join(sorted({route.path for route in router.routes}))}"  # type: ignore
        return answered(request, 404, error_body(message, "invalid_request_error", "not_found"))
    message = "this path has other methods" if error.status_code == 405 else "the request cannot be read"
    return answered(request, error.status_code, error_body(message, "invalid_request_error", "invalid_request"),
                    dict(error.headers or {}))


def busy(error: Busy) -> Fault:
    """An answer that says when to come back."""
    kind, code = (("rate_limit_error", "rate_limit_exceeded") if error.status == 429 else
                  ("server_error", "overloaded"))
    return Fault(error.status, error_body(error.message, kind, code), {"Retry-After": str(error.retry_after)})


# ---- who asks

def account_of(request: Request) -> Account:
    """The holder of the key of a request. Raises Fault."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    account = request.app.state.keys.find(key.strip() if scheme.lower() == "bearer" else None)
    if account is None:
        raise Fault(401, error_body("no valid key; valid: the header \"Authorization: Bearer KEY\"",
                                    "authentication_error", "invalid_api_key"), {"WWW-Authenticate": "Bearer"})
    return account


def service_of(request: Request) -> Service:
    return request.app.state.service


Asks = Annotated[Account, Depends(account_of)]
Serves = Annotated[Service, Depends(service_of)]


def accept(service: Service, keys: Keys, account: Account, body: ImageRequest) -> Job:
    """A job for a body. Raises Fault."""
    if wait := keys.wait(account):
        service.metrics.turned_away.labels("rate").inc()
        raise busy(Busy(429, "rate", f"too many requests; valid: {account.limits.requests} a minute", wait))
    if body.model is not None and service.model is not None and body.model != service.model.name:
        raise Fault(404, error_body(f"model: valid: {service.model.name}", "invalid_request_error", "model_not_found",
                                    "model"))
    try:
        return service.submit(body.order(), account)
    except Busy as error:
        raise busy(error) from None
    except ValueError as error:
        raise Fault(400, error_body(str(error), "invalid_request_error", "invalid_value")) from None


# ---- images

@router.post("/v1/images/generations")
async def generate(request: Request, body: ImageRequest, account: Asks, service: Serves) -> Response:
    """Draw, and answer with the images."""
    job = accept(service, request.app.state.keys, account, body)
    try:
        while not job.over.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(job.over.wait(), POLL)
            if not job.over.is_set() and await request.is_disconnected():
                break
        if job.status in ("done", "refused"):
            status = 200 if job.status == "done" else 400
            return answered(request, status, result_of(service, job, body.response_format, str(request.base_url)))
    finally:
        service.cancel(job)  # of a client that has gone; what is over stays as it is
        service.forget(job)
    raise fault_of(service, job)


def fault_of(service: Service, job: Job) -> Fault:
    """The error of a job that has no images."""
    if job.status == "late":
        return busy(Busy(503, "late", job.message, service.seconds_until(sum(job.count for job in service.waiting))))
    if job.status == "invalid":  # for the model that drew, which is not the one that it was checked for
        return Fault(400, error_body(job.message, "invalid_request_error", "invalid_value"))
    if job.status == "cancelled":
        return Fault(409, error_body(job.message, "invalid_request_error", "cancelled"))
    return Fault(500, error_body(job.message, "server_error", "failed"))


def result_of(service: Service, job: Job, form: str, base: str) -> dict[str, Any]:
    """The images of a job in OpenAI's shape, or its refusal. Files leave the store with the form b64_json."""
    data: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for index, (name, drawn) in sorted(job.results.items()):
        if name is None:
            refused.append({"index": index, "category": drawn.category, "message": drawn.message})
            continue
        found: dict[str, Any] = {"seed": drawn.seed, "settings": drawn.settings}
        if drawn.action != "allow":
            found["moderation"] = {"action": drawn.action, "category": drawn.category, "message": drawn.message}
        if form == "url":
            found["url"] = f"{base}v1/images/{name}"
        elif (png := service.images.take(name)) is not None:
            found["b64_json"] = base64.b64encode(png).decode()
        data.append(found)
    if job.status == "refused":
        first = refused[0]
        return error_body(first["message"], "invalid_request_error", "content_policy_violation", "prompt",
                          category=first["category"])
    return {"created": int(time.time()), "data": data, **({"refused": refused} if refused else {})}


@router.get("/v1/images/{name}")
async def image(request: Request, name: str, service: Serves) -> Response:
    """A PNG file, once. Its name is 192 random bits, which only the one who asked for it was told."""
    png = service.images.take(name)
    if png is None:
        raise Fault(404, error_body("no such image: images can be fetched once, within "
                                    f"{service.settings.keep:g} seconds", "invalid_request_error", "not_found"))
    service.metrics.answers.labels("/v1/images/{name}", "200").inc()
    return Response(png, media_type="image/png", headers=PRIVATE)


# ---- jobs

@router.post("/v1/jobs")
async def create_job(request: Request, body: ImageRequest, account: Asks, service: Serves) -> Response:
    """Accept a request and answer at once."""
    job = accept(service, request.app.state.keys, account, body)
    job.form = body.response_format
    return answered(request, 202, state_of(service, job))


def state_of(service: Service, job: Job) -> dict[str, Any]:
    """What is known of a job."""
    state: dict[str, Any] = {"id": job.id, "object": "job", "status": job.status, "images": job.count}
    if job.status == "queued":
        state["place"] = service.place(job)
        state["seconds"] = round(service.seconds_until(sum(other.count for other in service.waiting)), 1)
    if job.status == "running":
        state |= {"step": job.step, "steps": job.steps, "progress": round(job.step / job.steps, 3) if job.steps else 0,
                  "previews": {index: base64.b64encode(png).decode() for index, png in sorted(job.previews.items())}}
    if job.message:
        state["message"] = job.message
    return state


def my_job(name: str, account: Asks, service: Serves) -> Job:
    """The job of a path, if it is one of the account that asks. Raises Fault."""
    job = service.find(name, account)
    if job is None:
        raise Fault(404, error_body("no such job of this key", "invalid_request_error", "not_found"))
    return job


Mine = Annotated[Job, Depends(my_job)]


@router.get("/v1/jobs/{name}")
async def read_job(request: Request, job: Mine, service: Serves) -> Response:
    """How far a job is; its images with the first answer after it is done, and then no more."""
    state = state_of(service, job)
    if job.status in ("done", "refused") and not job.fetched:
        state["result"] = result_of(service, job, job.form, str(request.base_url))
        job.fetched, job.results = True, {}
    return answered(request, 200, state)


@router.delete("/v1/jobs/{name}")
async def cancel_job(request: Request, job: Mine, service: Serves) -> Response:
    """Give a job up."""
    service.cancel(job)
    return answered(request, 200, state_of(service, job))


# ---- the service itself

@router.get("/v1/models")
async def models(request: Request, account: Asks, service: Serves) -> Response:
    """The one model that draws, and what it takes."""
    model = service.model
    assert model is not None
    height, width = model.size
    sampling = model.config.sampling
    return answered(request, 200, {"object": "list", "data": [{
        "id": model.name, "object": "model", "created": 0, "owned_by": "local", "size": f"{width}x{height}",
        "size_multiple": model.multiple, "num_inference_steps": sampling.steps, "sampler": sampling.sampler,
        "guidance_scale": sampling.guidance.scale, "styles": list(model.styles), "checked": list(model.checks)}]})


@router.get("/health")
async def health(request: Request, service: Serves) -> Response:
    """Whether requests are accepted."""
    status = 503 if service.closed or service.model is None else 200
    return answered(request, status, {"status": "ok" if status == 200 else "closing",
                                      "waiting_images": sum(job.count for job in service.waiting),
                                      "drawing_batches": service.drawing})


@router.get("/metrics")
async def metrics(request: Request, account: Asks, service: Serves) -> Response:
    """Numbers for Prometheus."""
    return Response(generate_latest(service.metrics.registry), headers=PRIVATE, media_type=CONTENT_TYPE_LATEST)
