"""Check text from the command line:

    python -m safety check "a red star" [--file PROMPTS.txt] [--json] [--mode flag] [--log FILE --key FILE]
    python -m safety check --image EMBEDDINGS.safetensors --concepts CONCEPTS.yaml
    python -m safety explain "a red star"        how it is read and what fires: for researchers, it shows words
    python -m safety key FILE                    a new key for the audit log
    python -m safety verify LOG --key FILE       does the chain of the log hold?

The exit code is that of the most severe action: 0 allow, 3 flag, 4 blur, 5 block; 1 for an error.
EMBEDDINGS holds `images` (B, V, D), the embeddings of pictures and of their crops, and one (N, D) for the phrasings of
each concept under its name; `pipeline.py` passes functions in their place.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from safety.audit import AuditLog, new_key, read_key
from safety.gate import PromptGate
from safety.image import VIEWS, ImageModerator, read_concepts
from safety.policy import ACTIONS, MODES, Decision
from safety.prompt import DEFAULT

EXIT = dict(zip(ACTIONS, (0, 3, 4, 5)))


def options_of(arguments: list[str]) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 for one it does not know."""
    parser = argparse.ArgumentParser(prog="python -m safety", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="decide on texts or pictures")
    explain = commands.add_parser("explain", help="show how a text is read")
    for command in (check, explain):
        command.add_argument("texts", nargs="*", metavar="TEXT")
        command.add_argument("--file", type=Path, help="one text a line")
        command.add_argument("--weights", type=Path, default=DEFAULT, help="another file of moderation")
        command.add_argument("--json", action="store_true", help="JSON lines")
    check.add_argument("--negative", action="store_true", help="the texts are negative prompts: listed terms only")
    check.add_argument("--mode", choices=MODES, default="block")
    check.add_argument("--image", type=Path, help="embeddings of pictures")
    check.add_argument("--concepts", type=Path, help="YAML file of concepts")
    check.add_argument("--log", type=Path, help="audit log to append to")
    check.add_argument("--key", type=Path, help="its key")
    key = commands.add_parser("key", help="make a key for the audit log")
    key.add_argument("path", type=Path)
    verify = commands.add_parser("verify", help="check the chain of an audit log")
    verify.add_argument("log", type=Path)
    verify.add_argument("--key", type=Path, required=True)
    return parser.parse_args(arguments)


def texts_of(options: argparse.Namespace) -> list[str]:
    """The texts given and those of the file; raises ValueError when there are none."""
    texts = list(options.texts)
    if options.file is not None:
        texts += options.file.read_text(encoding="utf-8", errors="replace").splitlines()
    if not texts:
        raise ValueError("no text; valid: TEXT, or --file with one text a line")
    return texts


def shown(decision: Decision, as_json: bool) -> str:
    """One line without a word of the text."""
    if as_json:
        return json.dumps({"action": decision.action, "category": decision.category, "score": round(decision.score, 4),
                           "threshold": round(decision.threshold, 4), "reason": decision.reason,
                           "message": decision.message, "policy": decision.policy_version,
                           "model": decision.model_hash,
                           "scores": {name: round(score, 4) for name, score in decision.scores.items()}})
    category = decision.category or "-"
    return (f"{decision.action:5}  {category:12}  score {decision.score:.3f}  threshold {decision.threshold:.3f}  "
            f"{decision.reason}" + (f"\n       {decision.message}" if decision.action != "allow" else ""))


def image_decisions(options: argparse.Namespace) -> list[Decision]:
    """Decisions on pictures whose embeddings are in a file."""
    if options.concepts is None:
        raise ValueError("--image needs --concepts FILE.yaml")
    concepts = read_concepts(options.concepts)
    try:
        tensors = load_file(options.image)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{options.image} is damaged or not a safetensors file: {error}") from None
    images = tensors.get("images")
    if images is None or images.ndim != 3 or images.shape[1] != VIEWS:
        raise ValueError(f"{options.image}: valid: a tensor 'images' (B, {VIEWS}, D)")
    texts = {}
    for concept in concepts:
        for part, phrasings in enumerate((concept.phrasings, *concept.allowed)):
            name = concept.name if part == 0 else f"{concept.name}/allowed/{part - 1}"
            if name not in tensors or tensors[name].shape != (len(phrasings), images.shape[2]):
                raise ValueError(f"{options.image}: valid: a tensor '{name}' ({len(phrasings)}, {images.shape[2]})")
            texts[tuple(phrasings)] = tensors[name]
    moderator = ImageModerator(concepts, lambda pictures: images.flatten(0, 1), lambda given: texts[tuple(given)],
                               options.mode)
    return moderator.check(torch.rand(len(images), 3, 8, 8))  # the embeddings stand for the pictures


def check(options: argparse.Namespace) -> int:
    """Print a decision for each text; the exit code of the most severe."""
    if options.image is not None:
        decisions = image_decisions(options)
    else:
        if (options.log is None) != (options.key is None):
            raise ValueError("--log and --key are given together")
        audit = AuditLog(options.log, read_key(options.key)) if options.log else None
        gate = PromptGate.load(options.weights, mode=options.mode, audit=audit)
        decisions = [gate.check(text, options.negative) for text in texts_of(options)]
    for decision in decisions:
        print(shown(decision, options.json))
    return max(EXIT[decision.action] for decision in decisions)


def explain(options: argparse.Namespace) -> int:
    """Print the readings of each text, the spans that fired and the scores."""
    gate = PromptGate.load(options.weights)
    for text in texts_of(options):
        found = gate.explain(text)
        spans = [{"category": match.category, "level": match.level, "reading": match.kind, "span": match.span}
                 for match in found.matches]
        readings = sorted({(reading.kind, reading.text) for reading in found.normalized.readings})
        if options.json:
            print(json.dumps({"plain": found.normalized.plain, "notes": found.normalized.notes, "minor": found.minor,
                              "readings": readings, "matches": spans, "heads": [dict(head) for head in found.heads]}))
            continue
        print(f"read as: {found.normalized.plain}\nnotes: {', '.join(found.normalized.notes) or '-'}")
        for kind, reading in readings:
            print(f"  {kind:18} {reading}")
        for span in spans:
            print(f"  fired: {span}")
        for head in found.heads:
            print("  " + ", ".join(f"{name} {score:.3f}" for name, score in head.items()))
    return 0


def main(arguments: list[str]) -> int:
    """Run one command; its exit code."""
    options = options_of(arguments)
    if options.command == "key":
        new_key(options.path)
        print(f"wrote {options.path}; keep it apart from the log")
        return 0
    if options.command == "verify":
        print(f"{AuditLog(options.log, read_key(options.key)).verify()} lines, the chain holds")
        return 0
    return check(options) if options.command == "check" else explain(options)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
