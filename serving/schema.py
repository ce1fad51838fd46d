"""What clients send and get: OpenAI's shape of an image request with the settings of this system beside it."""
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sampling.limits import HEAVIEST_PALETTE, LAST_SEED
from serving.orders import Order

MOST_LETTERS = 4000  # of a prompt; the gate has a limit of its own
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def check_size(text: str) -> str:
    """A size as OpenAI writes it. Raises ValueError."""
    if text != "auto" and not SIZE.fullmatch(text):
        raise ValueError("valid: WIDTHxHEIGHT in pixels, or auto")
    return text


def as_list(value: Any) -> Any:
    """One name as a list of one."""
    return [value] if isinstance(value, str) else value


class ImageRequest(BaseModel):
    """The body of POST /v1/images/generations and of POST /v1/jobs. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_LETTERS)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=1000)] = 1
    size: Annotated[str, AfterValidator(check_size)] = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    user: Annotated[str, Field(max_length=256)] | None = None  # accepted because clients send it; it is not read
    seed: Annotated[int, Field(ge=0, le=LAST_SEED)] | None = None
    negative_prompt: Annotated[str, Field(max_length=MOST_LETTERS)] = ""
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    sampler: Annotated[str, Field(max_length=64)] | None = None
    style: Annotated[list[Annotated[str, Field(max_length=64)]], BeforeValidator(as_list), Field(max_length=8)] = []
    palette: Annotated[str, Field(max_length=1000)] = ""
    palette_weight: Annotated[float, Field(ge=0, le=HEAVIEST_PALETTE)] | None = None
    palette_only: bool = False
    exact: bool = False
    metadata: bool = True
    previews: Annotated[int, Field(ge=0, le=20)] = 0

    def order(self) -> Order:
        """The order that the body stands for; without a seed it gets one."""
        size = SIZE.fullmatch(self.size)
        return Order(prompt=self.prompt, negative=self.negative_prompt, count=self.n,
                     seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
                     steps=self.num_inference_steps, guidance=self.guidance_scale, sampler=self.sampler,
                     styles=tuple(self.style), palette=self.palette, palette_weight=self.palette_weight,
                     palette_only=self.palette_only, size=(int(size[2]), int(size[1])) if size else None,
                     exact=self.exact, metadata=self.metadata, previews=self.previews)


def error_body(message: str, kind: str, code: str, param: str | None = None, **more: Any) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}


def faults_text(faults: list[dict[str, Any]]) -> tuple[str, str | None]:
    """(what is wrong with a body and what is valid, the first key that is wrong), without what was sent."""
    lines, first = [], None
    for fault in faults[:5]:
        where = [str(part) for part in fault["loc"] if part not in ("body", "path", "query")]
        name = ".".join(where)[:64]
        if fault["type"] == "extra_forbidden":
            name, valid = "unknown key", f"valid: {', '.join(ImageRequest.model_fields)}"
        elif fault["type"] in ("json_invalid", "model_attributes_type", "model_type") or not where:
            name, valid = "body", "valid: a JSON object such as {\"prompt\": \"a red apple\"}"
        else:
            valid = fault["msg"].removeprefix("Value error, ")
        first = first or (name if name in ImageRequest.model_fields else None)
        lines.append(f"{name}: {valid}")
    return "; ".join(dict.fromkeys(lines)), first
