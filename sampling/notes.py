"""What a call of `sample.py` says about its prompts before it draws: what is cut, and which signs have no effect."""
from collections.abc import Iterable, Iterator, Sequence

from pipeline.prompt_schedule import WEIGHTS_ONLY, prompts_of, signs_of_others, unread_options
from pipeline.prompts import chunks_of
from pipeline.system import TextToImage
from sampling.draw import times_of
from sampling.engine import Job
from sampling.request import Request

NAMED = 10  # signs that a line names


def notes_on_prompts(job: Job) -> list[str]:
    """Lines about the prompts of a job, each once: prompts longer than one context, and what of them is not read;
    changes that do not happen within the steps; and in one line the signs that are read as text."""
    lines: dict[str, None] = {}
    others: dict[str, None] = {}
    for request, text in distinct_texts(job.requests):
        lines.update(dict.fromkeys(notes_on_length(job.system, request, text)))
        if request.literal or request.notation == WEIGHTS_ONLY:
            continue
        others.update(dict.fromkeys(signs_of_others(text)))
        taken = len(times_of(job.system, request, job.sources))
        lines.update((f"note: {sign} changes nothing in {taken} steps, or is not read to its end", None)
                     for sign in unread_options(text, request.config.steps, taken))
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        named = ", ".join(list(others)[:NAMED])
        lines[f"note: read as text, not as signs: {named}{more}; docs/prompts.md has the signs"] = None
    return list(lines)


def distinct_texts(requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
    """Every prompt of the requests with a request that reads it, each once for each way in which it is read."""
    known = set()
    for request in requests:
        for text in request.texts:
            key = text, request.config.steps, request.chunks, request.strength
            if key not in known:
                known.add(key)
                yield request, text


def notes_on_length(system: TextToImage, request: Request, text: str) -> Iterable[str]:
    """What is lost of a prompt that does not fit into all of its contexts, or that it fills more than one."""
    room = system.tokenizer.length - 2
    for prompt in prompts_of(request.read(text)):
        chunks = chunks_of(prompt, system.tokenizer)
        read = int(chunks.mask.sum()) - 2 * len(chunks.ids)
        if chunks.overflow:
            yield f"warning: the prompt is cut after {read} tokens; not read: \"{chunks.overflow}\""
        elif len(chunks.ids) > 1:
            yield f"note: a prompt of {read} tokens is read in {len(chunks.ids)} chunks of up to {room}"
