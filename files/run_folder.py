"""The run folder: everything that ``sample.py``, ``evaluate.py`` and a resumed training need.

    config.yaml manifest.json tokenizer.json *.safetensors metrics.jsonl samples/ report/ state/STAGE/ cache/
"""
import contextlib
import datetime
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from files.config import ConfigError, read_yaml
from files.whole import sha256_of, whole_file, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """Paths and records of one run. Use ``create`` to train and ``open`` to sample or evaluate."""

    def __init__(self, path: str | Path, main: bool = True):
        """``main`` is False for all but the first process of a run; such processes write no records."""
        self.path, self.main = Path(path), main
        self.metrics = self.path / "metrics.jsonl"
        self.manifest = self.path / "manifest.json"

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any],
               complete: Callable[[dict[str, Any]], dict[str, Any]] = dict, main: bool = True,
               order: Sequence[str] = (), alone: Sequence[str] = ()) -> "RunFolder":
        """A new folder for ``config``, or an existing one with the same configuration; else raises ConfigError.

        ``order`` lists the names of all stages in the order in which they run. ``complete`` adds defaults to a
        configuration that was read back, so that old runs remain valid when a key is added. Three differences are
        accepted: the list ``stages``, which names the stages to train now (config.yaml lists all that were ever
        trained), the settings of a stage that the folder did not have before, and those of a stage in ``alone`` that
        neither had: nothing but that stage reads them, and their defaults may have changed since.
        """
        run = cls(path, main)
        before = run.path / "config.yaml"
        if before.exists():
            known, both = _with_stages(complete(read_yaml(before)), config, order, alone)
            changed = differences(known, both)
            if changed:
                raise ConfigError(f"{run.path} was begun with another configuration ({'; '.join(changed[:5])}); "
                                  "name another folder with run=DIR, or remove this one")
            if main and both["stages"] != read_yaml(before).get("stages", both["stages"]):  # a stage more
                write_text(before, yaml.safe_dump(both, sort_keys=False))
        elif main:
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(before, yaml.safe_dump(config, sort_keys=False))
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run folder; raises ConfigError if there is none at ``path``."""
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            parent = run.path.parent
            known = sorted(str(p.parent) for p in parent.glob("*/config.yaml")) if parent.is_dir() else []
            raise ConfigError(f"no run folder {run.path}; " + (f"found: {', '.join(known)}" if known else
                              "train one first: python train.py configs/shapes.yaml"))
        return run

    def state(self, stage: str) -> Path:
        """The folder of the checkpoints of an unfinished stage."""
        return self.path / "state" / stage

    def snapshots(self, stage: str) -> Path:
        """The folder of the weight averages of a stage, of several widths."""
        return self.path / "snapshots" / stage

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Within this context, no other program trains into the folder. The kernel releases the lock when the process
        ends, however it ends. Raises ConfigError if another program holds it."""
        if fcntl is None or not self.main:
            yield
            return
        with open(self.path / ".lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ConfigError(f"{self.path} is being trained by another program ({file.read().strip()}); wait for "
                                  "it, stop it, or name another folder with run=DIR") from None
            except OSError as error:  # some network file systems have no locks
                print(f"warning: {self.path} cannot be locked ({error.strerror}); see that only one program trains it")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def weights(self, name: str) -> Path:
        """The path of ``NAME.safetensors`` of the run."""
        return self.path / f"{name}.safetensors"

    def has(self, *names: str) -> bool:
        """Whether all of these files exist in the folder."""
        return all((self.path / name).is_file() for name in names)

    def require(self, *names: str) -> None:
        """Raise ConfigError naming the first of these files that does not exist."""
        for name in names:
            if not self.has(name):
                raise ConfigError(f"{self.path}: training is not finished, there is no {name} yet; continue it with: "
                                  f"python train.py {self.path / 'config.yaml'} run={self.path}")

    def record(self, **values: Any) -> None:
        """Merge ``values`` into manifest.json, beside the revision, versions, device and command."""
        if self.main:
            known = {**environment(), **self.read_manifest(), **values}
            write_text(self.manifest, json.dumps(known, indent=2, ensure_ascii=False) + "\n")

    def take_over(self, other: "RunFolder", *names: str) -> None:
        """Copy those of the files that this folder lacks and ``other`` has, and record them."""
        taken = [name for name in names if not self.has(name) and other.has(name)]
        for name in taken if self.main else ():
            with whole_file(self.path / name) as temporary:
                shutil.copyfile(other.path / name, temporary)
        if taken:
            self.record_start(other, *taken)

    def record_start(self, other: "RunFolder", *names: str) -> None:
        """Record in the manifest that this run begins with these files of another one, with their hashes."""
        known = self.read_manifest().get("start_from", {}).get("files", {})
        self.record(start_from={"run": str(other.path),
                                "files": {**known, **{name: sha256_of(other.path / name) for name in names}}})

    def about(self) -> dict[str, Any]:
        """The manifest and the configuration, which a checkpoint stores to describe its origin."""
        config = self.path / "config.yaml"
        return {"manifest": {**self.read_manifest(), **environment()},
                "config": read_yaml(config) if config.exists() else None}

    def read_manifest(self) -> dict[str, Any]:
        """The content of manifest.json, nothing if there is none."""
        return json.loads(self.manifest.read_text(encoding="utf-8")) if self.manifest.exists() else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; an incomplete last line, as a crash leaves it, is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


@functools.lru_cache(maxsize=None)
def environment() -> dict[str, Any]:
    """What results depend on besides the configuration: code revision, library versions, device, command, time."""
    try:
        here = Path(__file__).parent
        revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True,
                                  timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    packages = ("torch", "torchvision", "numpy", "tokenizers", "scipy", "safetensors")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    return {
        "revision": revision,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "device": device, "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "begun": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _with_stages(known: dict[str, Any], config: dict[str, Any], order: Sequence[str],
                 alone: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both configurations with the stages of both; ``known`` takes over the settings of stages that it did not have,
    if the stage is new or ``alone`` in reading them."""
    ours, new = known.get("stages", ()), config.get("stages", ())
    stages = [stage for stage in order or dict.fromkeys((*ours, *new)) if stage in (*ours, *new)]
    late = {stage: config[stage] for stage in (*new, *alone) if stage not in ours and stage in config}
    return {**known, **late, "stages": stages}, {**config, "stages": stages}


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One line for each key whose values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys
                for line in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if before == now else [f"{path}: {before!r} then, {now!r} now"]
