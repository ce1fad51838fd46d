"""Check texts and images from the command line:

    python moderate.py check "a red star" [--file PROMPTS.txt] [--json] [--mode flag] [--log FILE --key FILE]
    python moderate.py check "a red star" --run RUN      as sampling from that run folder checks it
    python moderate.py check --image IMAGE.png ... --run RUN [--concepts FILE.yaml] [--clip DIR]
    python moderate.py calibrate --run RUN --concepts FILE.yaml [--rate 0.01] [--out FILE.yaml]
    python moderate.py explain "a red star"        its readings and matches, for researchers: it shows words
    python moderate.py key FILE                    a new key for the audit log
    python moderate.py verify LOG --key FILE       verify the chain of the log

The exit code is that of the most severe action: 0 allow, 3 flag, 4 blur, 5 block; 1 for an error.
Images are judged by the CLIP of a run folder (its stage clip). This command connects it to safety/, whose modules take
embeddings as functions.
"""
import argparse
import json
import sys
from pathlib import Path

from files.text import read_lines
from files.whole import set_aside
from safety.audit import AuditLog, new_key, read_key
from safety.gate import PromptGate
from safety.image import write_concepts
from safety.policy import ACTIONS, MODES, Decision
from safety.prompt import DEFAULT

EXIT = dict(zip(ACTIONS, (0, 3, 4, 5)))


def options_of(arguments: list[str]) -> argparse.Namespace:
    """The parsed command line; argparse exits with 2 if it is invalid."""
    parser = argparse.ArgumentParser(prog="python moderate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="decide on texts or images")
    explain = commands.add_parser("explain", help="show how a text is read")
    for command in (check, explain):
        command.add_argument("texts", nargs="*", metavar="TEXT")
        command.add_argument("--file", type=Path, help="one text a line")
        command.add_argument("--weights", type=Path, help="another file of moderation")
        command.add_argument("--json", action="store_true", help="JSON lines")
    check.add_argument("--negative", action="store_true", help="the texts are negative prompts: listed terms only")
    check.add_argument("--mode", choices=MODES, default="block")
    check.add_argument("--image", type=Path, nargs="+", help="images")
    calibrate = commands.add_parser("calibrate", help="thresholds of concepts for the CLIP of a run")
    calibrate.add_argument("--rate", type=float, default=0.01, help="share of harmless images that may pass (0.01)")
    calibrate.add_argument("--out", type=Path, help="file to write (concepts.yaml in the run folder); what is there "
                           "is renamed")
    explain.add_argument("--run", type=Path, help="run folder: its own weights and head, where it has them")
    for command in (check, calibrate):
        command.add_argument("--run", type=Path, required=command is calibrate, help="run folder")
        command.add_argument("--clip", type=Path, help="run folder of another CLIP than the run's own")
        command.add_argument("--concepts", type=Path, required=command is calibrate, help="YAML file of concepts")
    check.add_argument("--log", type=Path, help="audit log to append to")
    check.add_argument("--key", type=Path, help="its key")
    key = commands.add_parser("key", help="make a key for the audit log")
    key.add_argument("path", type=Path)
    verify = commands.add_parser("verify", help="check the chain of an audit log")
    verify.add_argument("log", type=Path)
    verify.add_argument("--key", type=Path, required=True)
    return parser.parse_args(arguments)


def texts_of(options: argparse.Namespace) -> list[str]:
    """The texts of the command line and of the file; raises ValueError if there are none."""
    texts = list(options.texts)
    if options.file is not None:
        texts += read_lines(options.file)
    if not texts:
        raise ValueError("no text; valid: TEXT, or --file with one text a line")
    return texts


def decision_line(decision: Decision, as_json: bool) -> str:
    """A decision in words or as JSON, without any word of the text."""
    if as_json:
        return json.dumps({"action": decision.action, "category": decision.category, "score": round(decision.score, 4),
                           "threshold": round(decision.threshold, 4), "reason": decision.reason,
                           "message": decision.message, "policy": decision.policy_version,
                           "model": decision.model_hash,
                           "scores": {name: round(score, 4) for name, score in decision.scores.items()}})
    category = decision.category or "-"
    return (f"{decision.action:5}  {category:12}  score {decision.score:.3f}  threshold {decision.threshold:.3f}  "
            f"{decision.reason}" + (f"\n       {decision.message}" if decision.action != "allow" else ""))


def image_decisions(options: argparse.Namespace, audit: AuditLog | None) -> list[Decision]:
    """The decisions on image files, each scaled to the size that the CLIP takes. All but "allow" are logged. Raises
    ValueError or OSError for a file that is missing or damaged."""
    from files.images import MAX_PIXELS, read_image, to_unit
    from pipeline.config import read_data_config
    from pipeline.moderation import CONCEPTS, image_moderator  # needs torch, which texts do not

    if options.run is None:
        raise ValueError("--image needs --run DIR, a run folder with the stage clip and its concepts")
    concepts = options.concepts or options.run / CONCEPTS
    moderator = image_moderator(concepts, options.clip or options.run, options.mode)
    config = options.run / "config.yaml"
    largest = read_data_config(config).max_pixels if config.is_file() else MAX_PIXELS
    found = [moderator.check(to_unit(read_image(path, largest)[None]))[0] for path in options.image]
    for path, decision in zip(options.image, found):
        if audit is not None and decision.action != "allow":
            audit.write(path.name, "image", decision)
    return found


def calibrate(options: argparse.Namespace) -> int:
    """Write the concepts with thresholds for the CLIP of a run; returns the exit code."""
    from pipeline.moderation import CONCEPTS, calibrate_concepts

    found = calibrate_concepts(options.concepts, options.run, options.rate, clip=options.clip)
    out = options.out or options.run / CONCEPTS
    if (kept := set_aside(out)) is not None:
        print(f"kept what was in {out.name} as {kept}")
    write_concepts(out, found)
    print(f"wrote {out}: {len(found)} concepts, at most {100 * options.rate:g} % of harmless images pass a threshold")
    return 0


def check(options: argparse.Namespace) -> int:
    """Print a decision for each text or image; returns the exit code of the most severe one."""
    if (options.log is None) != (options.key is None):
        raise ValueError("--log and --key are given together")
    audit = AuditLog(options.log, read_key(options.key)) if options.log else None
    if options.image:
        if options.texts or options.file:
            raise ValueError("--image with texts; valid: one of them")
        if options.negative:
            raise ValueError("--negative with --image; valid: with texts")
        decisions = image_decisions(options, audit)
    else:
        gate = gate_of(options, mode=options.mode, audit=audit)
        decisions = [gate.check(text, options.negative) for text in texts_of(options)]
    for decision in decisions:
        print(decision_line(decision, options.json))
    return max(EXIT[decision.action] for decision in decisions)


def gate_of(options: argparse.Namespace, **settings) -> PromptGate:
    """The gate of a run folder, with the head on its text encoder; without a run folder, the shipped gate."""
    if options.run is None:
        return PromptGate.load(options.weights or DEFAULT, **settings)
    from files.run_folder import RunFolder
    from pipeline.moderation import moderation_weights, read_encoder_head

    run = RunFolder.open(options.run).path
    return PromptGate.load(options.weights or moderation_weights(run), encoder=read_encoder_head(run), **settings)


def explain(options: argparse.Namespace) -> int:
    """Print the readings, the matches and the scores of each text; returns the exit code."""
    gate = gate_of(options)
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
    """Run one command; returns the exit code."""
    options = options_of(arguments)
    if options.command == "key":
        new_key(options.path)
        print(f"wrote {options.path}; keep it apart from the log")
        return 0
    if options.command == "verify":
        print(f"{AuditLog(options.log, read_key(options.key)).verify()} lines, the chain holds")
        return 0
    return {"check": check, "explain": explain, "calibrate": calibrate}[options.command](options)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
