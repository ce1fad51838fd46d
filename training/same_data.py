"""A run goes on with the data that it began with: the fingerprint of the data in its manifest."""
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data.catalog import DataConfig, data_identity
from data.fingerprint import Fingerprint
from files.config import ConfigError
from files.run_folder import RunFolder


def recorded_fingerprint(run: RunFolder) -> Fingerprint | None:
    """The fingerprint of the data that a run was trained on last, None for a run that has none in its manifest."""
    known = run.read_manifest().get("data_fingerprint")
    return Fingerprint(str(known.get("files")), str(known.get("content"))) if isinstance(known, dict) else None


def difference(then: Fingerprint, now: Fingerprint) -> str:
    """Both hashes of both, in words; "" if they are of the same data."""
    if now.matches(then):
        return ""
    return (f"content {then.content[:12]} then, {now.content[:12]} now; names, sizes and times of the files "
            f"{then.files[:12] or '-'} then, {now.files[:12] or '-'} now")


def data_change(config: DataConfig, run: RunFolder) -> str:
    """How the data of ``config`` differs from what a run was trained on, in words; "" if it does not, or if the run has
    no fingerprint."""
    then = recorded_fingerprint(run)
    return difference(then, data_identity(config)[1]) if then else ""


def data_record(config: DataConfig, run: RunFolder, unfinished: Sequence[str], changed_data: bool) -> dict[str, Any]:
    """What the manifest of a run says about its data, now that the stages ``unfinished`` are to read it.

    Raises ConfigError if the data is not what the run was trained on so far, unless ``changed_data``, the permission to
    go on with other data: then the change is added to the list "data_changes".
    """
    key, now = data_identity(config)
    record: dict[str, Any] = {"data": key, "data_sha256": hashlib.sha256(json.dumps(key).encode()).hexdigest(),
                              "data_fingerprint": asdict(now)}
    manifest, then = run.read_manifest(), recorded_fingerprint(run)
    if then is None and "data" in manifest:  # a run of an earlier version of this code
        if unfinished and run.main:
            before = str(manifest["data"].get("content", ""))
            other = f" (its content was {before[:12]}, today {key['content'][:12]})" if before and before != key.get(
                "content") else ""
            print(f"data: {run.manifest} has no fingerprint of the data yet; it is recorded from now on{other}")
        return record if unfinished else {}
    if then is None:
        return record
    differs = difference(then, now)
    if not differs:
        return record
    if not unfinished:
        if run.main:
            print(f"data: not what this run was trained on ({differs}); nothing is left to train on it")
        return {}
    if not changed_data:
        raise ConfigError(f"{run.path}: the data is not what this run began with ({differs}); valid: the data as it "
                          "was, another folder with run=DIR, or --changed-data, which goes on with the data as it is "
                          "and notes that in manifest.json")
    change = {"from": asdict(then), "to": asdict(now), "stage": unfinished[0], "at": datetime.datetime.now(
        datetime.timezone.utc).isoformat(timespec="seconds")}
    if run.main:
        print(f"data: not what this run began with ({differs}); it goes on in the stage {unfinished[0]}, as "
              "--changed-data says, and manifest.json notes it")
    return {**record, "data_changes": [*manifest.get("data_changes", ()), change]}
