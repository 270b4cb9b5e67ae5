"""What an operator sees: what each process tells Prometheus, on a stack of its own under load."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.recipe import Recipe
from jobs.s3.client import Location
from producer.demo.local_stack import LocalStack, Process, free_port
from producer.submission import submit as submission
from tests.support.environment import Run
from tests.support.factories import Places, sample_image, wait_until

Series = dict[tuple[str, ...], float]


def scrape(port: int) -> Series:
    """Name and label values, in the order of the labels' names -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Watched(LocalStack):
    """A stack whose dispatcher and worker show their metrics."""

    worker: Process

    def __enter__(self) -> Watched:
        super().__enter__()
        self.dispatcher_port, self.worker_port = free_port(), free_port()
        self.places = Places("s3://watched/photos/", "s3://watched-results/")
        try:
            with self.store() as store:
                for uri in (self.places.source, self.places.to):
                    store.create_bucket(Location.parse(uri).bucket)
            self.start_dispatcher(metrics_port=str(self.dispatcher_port))
            self.worker = self.start_worker(device="cpu", metrics_port=str(self.worker_port))
        except BaseException:
            self.stop()
            raise
        return self

    def run(self, bodies: dict[str, bytes], *, lane: str = "backfill") -> str:
        """Returns the job when it is closed."""
        job = self.submit(bodies, lane=lane)
        self.wait_for(job)
        return job

    def wait_for(self, job: str) -> None:
        with self.ledger() as ledger:
            wait_until(lambda: ledger.job(job).closed is not None, what="the job is closed")

    def submit(self, bodies: dict[str, bytes], *, lane: str = "backfill") -> str:
        """Uploads and submits; returns the job."""
        with self.store() as store, self.ledger() as ledger:
            for name, body in bodies.items():
                store.put(self.places.key(name), body, content_type="image/jpeg")
            request = submission.Request(
                source=self.places.source,
                destination=self.places.to,
                recipe=Recipe(model="u2netp"),
                lane="live" if lane == "live" else "backfill",
                name="watched",
                keys=tuple(self.places.key(name).key for name in bodies),
            )
            return submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None).id


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with Watched(tmp_path_factory.mktemp("watched")) as stack:
        yield stack


def test_a_worker_counts_each_image_and_times_its_stages(watched: Watched) -> None:
    before = scrape(watched.worker_port)

    watched.run({"a.jpg": sample_image(seed=1), "b.jpg": sample_image(seed=2), "c.jpg": b"no image"})
    watched.run({"d.jpg": sample_image(seed=3)}, lane="live")
    live = ("cutfleet_images_total", "live", "done")  # counted when the ledger knows it: a moment later
    wait_until(lambda: scrape(watched.worker_port).get(live, 0) > before.get(live, 0), what="the last is counted")

    after = scrape(watched.worker_port)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["cutfleet_images_total", "backfill", "done"] == 2
    assert grown["cutfleet_images_total", "backfill", "failed"] == 1
    assert grown[live] == 1
    assert grown["cutfleet_image_errors_total", "not_an_image", "failed"] == 1
    counts = {stage: grown["cutfleet_stage_seconds_count", stage] for stage in ("fetch", "decode", "device", "publish")}
    assert counts == {"fetch": 4, "decode": 3, "device": 3, "publish": 3}
    assert grown["cutfleet_stage_seconds_sum", "device"] > 0
    assert grown["cutfleet_queue_wait_seconds_count", "backfill"] == 3
    assert 0 < grown["cutfleet_queue_wait_seconds_sum", "live"] < 10
    assert grown["cutfleet_batch_images_sum",] == 3
    assert grown["cutfleet_device_busy_seconds_total",] > 0
    assert grown["cutfleet_s3_requests_total",] > 8
    assert not [name for name in grown if name[0].endswith(("s3_errors_total", "redis_errors_total")) and grown[name]]
    assert after["cutfleet_model_info", "cpu", "float32", "u2netp", model_revision(watched)] == 1
    assert after["process_resident_memory_bytes",] > 100e6


def model_revision(watched: Watched) -> str:
    with watched.ledger() as ledger:
        return next(iter(ledger.workers().values()))["revision"]


def test_no_label_names_an_image_or_a_job(watched: Watched) -> None:
    job = watched.run({"secret-shoe.jpg": sample_image(seed=9), "broken-shoe.jpg": b"no image"})

    words = {word for port in (watched.worker_port, watched.dispatcher_port) for name in scrape(port) for word in name}
    assert not [word for word in words if job in word or "shoe" in word]


def test_the_dispatcher_shows_what_there_is_to_do_and_how_long_it_waits(watched: Watched) -> None:
    def shown(*name: str) -> float:
        return scrape(watched.dispatcher_port).get(name, 0)

    watched.worker.signal(signal.SIGSTOP)
    try:
        job = watched.submit({f"w{number}.jpg": sample_image(seed=number) for number in range(12)}, lane="live")
        wait_until(lambda: shown("cutfleet_images_open", "live", "u2netp") == 12, what="open images are shown")
        wait_until(lambda: shown("cutfleet_queue_oldest_seconds", "live", "u2netp") > 2, what="the oldest is shown")

        assert shown("cutfleet_dispatcher_active") == 1
        assert 0 < shown("cutfleet_queue_images", "live", "u2netp") <= 12
        assert shown("cutfleet_images", "ready") + shown("cutfleet_images", "leased") == 12
        assert shown("cutfleet_jobs", "running") == 1
        assert shown("cutfleet_redis_memory_limit_bytes") > shown("cutfleet_redis_memory_used_bytes") > 1e5
    finally:
        watched.worker.signal(signal.SIGCONT)

    watched.wait_for(job)
    wait_until(lambda: shown("cutfleet_images_open", "live", "u2netp") == 0, what="nothing is open any more")
    assert shown("cutfleet_queue_oldest_seconds", "live", "u2netp") == 0
    assert shown("cutfleet_workers", "u2netp") == 1


def test_a_fleet_that_is_well_gets_a_clean_bill_from_the_doctor(watched: Watched, cutfleet: Run) -> None:
    watched.run({"healthy.jpg": sample_image(seed=4)})
    places = ("--source", watched.places.source, "--to", watched.places.to)

    ran = cutfleet("doctor", *places, env=watched.environment)
    told = cutfleet("doctor", *places, "--json", env=watched.environment)

    assert ran.returncode == 0, ran.stdout
    assert "u2netp on cpu in float32" in ran.stdout
    assert "A dispatcher is active" in ran.stdout
    summary = json.loads(told.stdout)
    assert summary["well"] is True
    assert {row["area"] for row in summary["findings"]} == {"settings", "disk", "redis", "s3", "workers", "queues"}
    assert {row["code"] for row in summary["findings"]} <= {"", "s3_slow", "redis_slow", "clock_differs"}, (
        "it may be a slow machine"
    )
