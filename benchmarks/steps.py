"""One training run of the program in the current directory, which takes a step whenever it is told to.

    python STEPS_FILE STAGE CONFIG OVERRIDE...        (in a checkout of any revision)

It is the real command with the real loop: only the function that hands the loop its data waits, before each step, for
a line on the standard input, and answers with the seconds of the step before. Other stages are run without waiting.
"""
import dataclasses
import importlib
import json
import os
import sys
import time


def main(stage: str, arguments: list[str]) -> None:
    """Run train.py with its loop under control; its last line of output holds the metrics of the stage."""
    sys.path.insert(0, os.getcwd())
    said, sys.stdout = os.fdopen(os.dup(1), "w", buffering=1), sys.stderr
    os.dup2(2, 1)  # what the program prints is not part of the conversation
    loop = importlib.import_module("training.loop")
    fit = loop.fit

    def held(task, model, config, run, *rest, **more):
        if task.name != stage:
            return fit(task, model, config, run, *rest, **more)
        read, began = task.data_at, 0.0

        def data_at(position):
            nonlocal began
            data = read(position)  # before the wait: it is the same on both sides, and not what is measured
            said.write(json.dumps({"seconds": time.perf_counter() - began if began else None}) + "\n")
            if not sys.stdin.readline():
                os._exit(0)  # whoever asked has gone
            began = time.perf_counter()
            return data

        result = fit(dataclasses.replace(task, data_at=data_at), model, config, run, *rest, **more)
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        said.write(json.dumps({"metrics": [line for line in lines if line.get("stage") == stage]}) + "\n")
        sys.stdin.readline()
        os._exit(0)
        return result

    loop.fit = held  # before the stages are imported, which take it from there
    importlib.import_module("train").main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
