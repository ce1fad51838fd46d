"""What Prometheus may know: numbers, outcomes and categories, never who asked or for what."""
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class Metrics:
    """The counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("answers", "Answers by route and status", ["route", "status"], registry=self.registry)
        self.jobs = Counter("jobs", "Jobs by what became of them", ["outcome"], registry=self.registry)
        self.images = Counter("images", "Images by what moderation did", ["action"], registry=self.registry)
        self.refused = Counter("refused", "Refused images by category", ["category"], registry=self.registry)
        self.turned_away = Counter("turned_away", "Requests that were not accepted", ["reason"],
                                   registry=self.registry)
        self.repeated = Counter("repeated_batches", "Batches drawn again after a replica was lost",
                                registry=self.registry)
        self.waiting = Gauge("waiting_images", "Images that wait to be drawn", registry=self.registry)
        self.drawing = Gauge("drawing_batches", "Batches that are drawn", registry=self.registry)
        self.stored = Gauge("stored_bytes", "Images that wait to be fetched", registry=self.registry)
        self.wait = Histogram("wait_seconds", "From acceptance to drawing", buckets=SECONDS, registry=self.registry)
        self.draw = Histogram("draw_seconds", "Drawing of a batch", buckets=SECONDS, registry=self.registry)
        self.batch = Histogram("batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32, 64),
                               registry=self.registry)
