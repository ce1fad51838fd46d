"""Sample images: python sample.py "a small red star" "two blue circles" --run runs/shapes
From published weights: python sample.py "a photo of a horse" --pretrained PATH --steps 30 --size 512
Many prompts: torchrun --nproc-per-node 2 -- sample.py --prompts FILE --out DIR --bulk

Writes one PNG an image, with the settings it was made from inside, a labelled grid, and results.jsonl with a line for
each image that was requested, refused ones too. What the flags mean is in docs/sampling.md, docs/prompts.md,
docs/editing.md and docs/moderation.md; the parts are in sampling/.
"""
import os
import sys
from pathlib import Path

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    from sampling.flags import parser
    parser().parse_args()  # before PyTorch is imported, which takes longer than reading what is printed

from tqdm import tqdm

from model.allocator import keep_freed_memory
from pipeline.moderation import OFF
from pipeline.personal import cards_of_run, judge_cards
from sampling.bulk import draw_bulk
from sampling.bulk_folder import PLAN
from sampling.command import Command, parse
from sampling.engine import Job, check_settings, draw_samples, gate_of, step_count
from sampling.gate import blur_where_decided
from sampling.loading import load_moderation, load_system, read_sources
from sampling.metadata import shared_settings
from sampling.notes import notes_on_prompts
from sampling.plan import read_prompts, requests_of_plan
from sampling.results import RESULTS, SampleFolder
from sampling.sheets import LARGEST_GRID, Sheet, save_overview
from sampling.styling import choose_styles, every_style, list_of_styles, style_request, styled_plan
from sampling.verify import verify

REFUSED = 5  # exit code, as that of `python moderate.py check`


def output_folder(command: Command) -> Path:
    """The folder of the images, made where it is missing. Raises OSError when nothing can be written to it."""
    out = Path(command.out) if command.out else command.system.default_output
    if (out / PLAN).exists():
        raise ValueError(f"{out} is the folder of a bulk call; valid: --out with another folder")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to")
    return out


def sample(command: Command) -> int:
    """Draw what is requested, as files; 5 when all of it was refused, else 0."""
    every = every_style(command.style_file) if command.list_styles else {
        "": choose_styles(command.styles, command.style_file)}
    plans = {name: styled_plan(command.plan, styles) for name, styles in every.items()}
    prompts = read_prompts(command.plan)
    sources = read_sources(command.sources, command.system)
    system = load_system(command.system)
    drawn = [(name, style_request(request, every[name])) for name, plan in plans.items()
             for request in requests_of_plan(plan, prompts, system.config.sampling)]
    job = Job(system, [request for _, request in drawn], sources)
    moderation = load_moderation(command.moderation, command.system)
    check_settings(job, command.draw)
    judge_cards(moderation, {**cards_of_run(command.system.path), **system.cards})
    for line in notes_on_prompts(job):
        print(line, file=sys.stderr)
    out = output_folder(command)
    shared = shared_settings(system, command.system, command.sources, command.draw.exact)
    kept = len(job.requests) if command.plan.axes else LARGEST_GRID
    with SampleFolder(out, job, shared if command.metadata else None, moderation.checks, kept) as folder:
        if moderation.mode == "off":
            print(f"warning: {OFF}", file=sys.stderr)
        gate = gate_of(job, moderation)
        with tqdm(total=step_count(job, gate, command.draw), desc=f"{len(job.requests)} images", unit="step") as bar:
            for made in draw_samples(job, gate, command.draw, after_step=bar.update):
                folder.add(made)
    images, refused = folder.overview(), len(folder.refused)
    if images is None:
        print(f"nothing was drawn: all of {refused} refused; see {folder.results.path}", file=sys.stderr)
        return REFUSED
    original = None if sources.image is None else blur_where_decided(sources.image, gate.of_source)
    names = [f"{name} · {request.seed}" for name, request in drawn] if command.list_styles else ()
    sheet = Sheet(command.system.name, out, folder.results.first, command.plan.axes, folder.refused, original, names)
    overview = save_overview(images, job.requests, sheet)
    hint = f" ({refused} refused, see {folder.results.path.name})" if refused else ""
    print(f"{len(job.requests) - refused} images and {overview.name} in {out}{hint}")
    return 0


def sample_bulk(command: Command) -> int:
    """Draw a file of prompts of any length; 5 when all of it was refused, else 0."""
    done, count = draw_bulk(command)
    if done.requests == count:
        print(f"{count - done.refused} images in {command.out} ({done.refused} refused, see {RESULTS})")
    elif "RANK" not in os.environ:
        print(f"{done.requests} of {count} requests are done; other processes draw the others")
    return REFUSED if done.refused == count else 0


def verify_files(command: Command) -> int:
    """Draw images again from their own settings and compare them; 1 when one is not equal, else 0."""
    failed = 0
    for path in command.verify:
        try:
            equal, line = verify(path, command.system, command.sources)
        except (ValueError, OSError) as error:
            equal, line = False, f"error: {error}"
        print(line, file=sys.stdout if equal else sys.stderr)
        failed += not equal
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    """Sample, or verify; 1 when a verified image is not equal, 5 when everything was refused."""
    command = parse(arguments)
    keep_freed_memory()
    if command.list_styles and not (command.plan.prompts or command.plan.file):
        print(list_of_styles(command.style_file))
        return 0
    run = verify_files if command.verify else sample_bulk if command.bulk else sample
    return run(command)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard; the images written so far are whole") from None
