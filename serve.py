"""Serve images: python serve.py --page (one process, for one person), or python serve.py --replicas 2 (Ray Serve)

An HTTP interface in OpenAI's shape, with a queue, batches, moderation and keys, and a page to draw on. On loopback
unless --host says otherwise, and then only with keys. docs/serving.md has the rest; the parts are in serving/.
"""
import argparse
import ipaddress
import sys
from importlib.util import find_spec

from safety.policy import MODES

NEEDED = {"fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve", "cachetools": "serve",
          "limits": "serve"}


def parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is served").add_argument
    add("--run", default="", metavar="DIR", help="run folder (the demo's where it is, else the weights that come with "
        "the repository)")
    add("--page", action="store_true", help="also the page, at /")
    add("--replicas", type=int, metavar="N", help="N processes that draw, under Ray Serve (one, in this process)")
    add = parser.add_argument_group("who reaches it").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; any but loopback needs --keys (%(default)s)")
    add("--port", type=int, default=8000, help="(%(default)s)")
    add("--keys", default="", metavar="FILE", help="keys that are accepted, as YAML")
    add("--new-key", metavar="NAME", help="add a key to the file --keys, print it once, and stop")
    add = parser.add_argument_group("drawing").add_argument
    add("--batch", type=int, default=16, help="images computed at a time (%(default)s)")
    add("--threads", type=int, default=0, help="of the processor, for each replica (with --replicas 1, else PyTorch's "
        "own number)")
    add("--speed", choices=("exact", "fast"), default="exact", help="fast: in bf16 where the machine has it")
    add("--queue", type=int, default=256, metavar="IMAGES", help="images that may wait (%(default)s)")
    add("--timeout", type=float, default=120, metavar="S", help="seconds until a request is given up (%(default)g)")
    add("--keep", type=float, default=600, metavar="S", help="seconds that images wait to be fetched (%(default)g)")
    add = parser.add_argument_group("moderation").add_argument
    add("--moderation", choices=MODES, default="block", help="the most that is done about a harmful prompt or image "
        "(%(default)s)")
    add("--concepts", default="", metavar="FILE", help="what images must not show, as YAML")
    add("--clip", default="", metavar="DIR", help="run folder of the CLIP that judges images by --concepts")
    add("--audit", nargs=2, default=(), metavar=("LOG", "KEY"), help="append decisions, but no words, to a log")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if options.new_key and not options.keys:
        raise ValueError("--new-key without --keys; valid: both")
    if not options.keys and not is_loopback(options.host):
        raise ValueError(f"--host {options.host} without --keys; valid: a loopback address such as 127.0.0.1, or "
                         "--keys FILE (python serve.py --new-key NAME --keys FILE makes one)")
    if options.replicas is not None and not 1 <= options.replicas <= 1000:
        raise ValueError(f"--replicas {options.replicas}; valid: 1 to 1000")
    if not 1 <= options.port <= 65_535:
        raise ValueError(f"--port {options.port}; valid: 1 to 65535")
    needed = dict(NEEDED)
    if options.replicas:
        needed["ray"] = "serve"
    if options.page:
        needed["gradio"] = "page"
    if missing := {extra: name for name, extra in needed.items() if find_spec(name) is None}:
        extras = ",".join(sorted(missing))
        raise ValueError(f"the library {min(missing.values())} is not installed; valid: pip install -e \".[{extras}]\"")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: list[str]) -> None:
    """Serve until the keyboard or a signal stops it."""
    options = parser().parse_args(arguments)
    check(options)
    from serving.start import start  # takes seconds, and needs libraries of an extra
    start(options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by the keyboard") from None
