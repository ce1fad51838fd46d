"""What a service is started with: the engine's settings, the queue's, and the limits of a key. YAML or plain data."""
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.system import Speed
from safety.policy import Mode
from sampling.loading import ModerationChoice, SystemChoice


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError for a value outside low .. high."""
    if not low <= value <= high:
        raise ValueError(f"{name}: value {value:g}; valid: {low:g} to {high:g}")


@dataclass(frozen=True)
class Limits:
    """What one key may ask for.

    requests: a minute. images: of one request. pixels, steps: of one image. queued: images that wait or are drawn.
    """

    requests: int = 120
    images: int = 16
    pixels: int = 1024 * 1024
    steps: int = 150
    queued: int = 64

    def __post_init__(self) -> None:
        for name in ("requests", "images", "pixels", "steps", "queued"):
            check_range(name, getattr(self, name), 1, 1e9)


@dataclass(frozen=True)
class EngineSettings:
    """How one replica draws.

    run: a run folder; empty for the demo's or the weights that come with the repository. batch: images at a time.
    threads: of the processor, 0 for those that PyTorch takes. speed: "fast" computes in bf16. moderation, concepts,
    clip, audit: as of sample.py; audit is [LOG, KEY] or empty.
    """

    run: str = ""
    batch: int = 16
    threads: int = 0
    speed: Speed = "exact"
    moderation: Mode = "block"
    concepts: str = ""
    clip: str = ""
    audit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range("batch", self.batch, 1, 4096)
        check_range("threads", self.threads, 0, 1024)
        if len(self.audit) not in (0, 2):
            raise ValueError(f"audit: {len(self.audit)} files; valid: a log and its key, or nothing")

    @property
    def system(self) -> SystemChoice:
        """The system that draws, by its absolute path: replicas start in another folder."""
        found = SystemChoice(run=self.run or None)
        return SystemChoice(run=str(Path(found.path).resolve()), speed=self.speed)

    @property
    def judge(self) -> ModerationChoice:
        """The moderation that judges."""
        audit = (self.audit[0], self.audit[1]) if self.audit else None
        return ModerationChoice(self.moderation, self.concepts or None, self.clip or None, audit)


@dataclass(frozen=True)
class ServiceSettings:
    """How requests wait and how results are kept.

    lanes: batches that are drawn at a time, the number of replicas. batch: images of a batch. queue: images that may
    wait. timeout: seconds until a request is answered or given up. keep: seconds that a result waits to be fetched.
    store: MiB of images that wait to be fetched. body: MiB of a request. keys: a file of keys; without it everyone who
    reaches the service may use it. page: the page is served, too.
    """

    lanes: int = 1
    batch: int = 16
    queue: int = 256
    timeout: float = 120.0
    keep: float = 600.0
    store: int = 256
    body: int = 16
    keys: str = ""
    page: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, low, high in (("lanes", 1, 10_000), ("batch", 1, 4096), ("queue", 1, 1_000_000),
                                ("timeout", 0.1, 86_400), ("keep", 1, 86_400), ("store", 1, 1_000_000),
                                ("body", 1, 1024)):
            check_range(name, getattr(self, name), low, high)
