"""Builds the emoji data set: python -m data.emoji --out DIR --size 64."""
import argparse
from collections.abc import Sequence

from data.emoji.build import build


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m data.emoji`."""
    parser = argparse.ArgumentParser(prog="python -m data.emoji", description="Builds the emoji data set.")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default: 64)")
    parser.add_argument("--packages", help="folder that holds the .tgz packages (default: fetched with npm)")
    parser.add_argument("--workers", type=int, help="processes that render (default: one a core)")
    options = parser.parse_args(arguments)
    try:
        manifest = build(options.out, options.size, options.packages, workers=options.workers)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues from here") from None
    print(f"{options.out}: {manifest['count']} images of {manifest['size']} px; see its ATTRIBUTION.md")


if __name__ == "__main__":
    main()
