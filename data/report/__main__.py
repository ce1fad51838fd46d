"""Writes a page about a data set: python -m data.report SOURCE [--out FILE] [--tokenizer FILE]."""
import argparse
from collections.abc import Sequence
from pathlib import Path

from data.command import data_config_of
from data.report.report import data_report
from files.whole import free_path, whole_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m data.report`."""
    parser = argparse.ArgumentParser(prog="python -m data.report", description="Writes a page about a data set.")
    parser.add_argument("source", help="a folder of images or of shards, or a config (.yaml) with a data section")
    parser.add_argument("--out", default="data_report.html", help="file to write; where there is "
                        "one, its name gets a number (default: data_report.html)")
    parser.add_argument("--tokenizer", help="a tokenizer.json, to count tokens")
    parser.add_argument("--limit", type=int, default=20_000, help="items looked at in each split (default: 20000)")
    parser.add_argument("--distance", type=int, default=3, help="bits in which near-duplicates differ (default: 3)")
    options = parser.parse_args(arguments)
    try:
        if options.limit < 1 or not 0 <= options.distance <= 16:
            raise ValueError(f"--limit {options.limit} --distance {options.distance}; valid: from 1, and 0 to 16 bits")
        tokenizer = Path(options.tokenizer) if options.tokenizer else None
        if tokenizer is not None and not tokenizer.is_file():
            raise ValueError(f"--tokenizer: no file {tokenizer}")
        text = data_report(data_config_of(options.source), options.source, tokenizer, options.limit, options.distance)
        page = text.encode("utf-8", "backslashreplace")  # names of files need not be Unicode
        out = free_path(options.out)
        with whole_file(out, new=True) as temporary:
            temporary.write_bytes(page)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{out}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
