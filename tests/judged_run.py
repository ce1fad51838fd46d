"""A tiny run whose own moderation refuses the made-up word zorbic, for the tests of the service."""
import shutil
from pathlib import Path

from made_up_moderation import written

HARMFUL = "a zorbic star"


def judged_run(tiny_run: Path, folder: Path) -> Path:
    """A copy of the tiny run in ``folder``."""
    run = Path(shutil.copytree(tiny_run, folder / "tiny"))
    written(run / "moderation.safetensors")
    return run
