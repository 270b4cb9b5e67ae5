"""Metrics of worker and dispatcher, and the doctor, on a stack of its own."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from typing import Self

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.message import Lane
from jobs.recipe import Recipe
from producer.demo.local_stack import LocalStack, Process, free_port
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.support.environment import Run
from tests.support.images import sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until

Series = dict[tuple[str, ...], float]


def scrape(port: int) -> Series:
    """Return the samples: name and label values, in the order of label names, to value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class MonitoredStack(LocalStack):
    """A stack whose dispatcher and worker serve metrics."""

    worker: Process

    def __enter__(self) -> Self:
        super().__enter__()
        self.dispatcher_port, self.worker_port = free_port(), free_port()
        self.places = Places("s3://monitored/photos/", "s3://monitored-results/")
        try:
            with self.store() as store:
                for location in (self.places.source_location, self.places.destination):
                    store.create_bucket(location.bucket)
            self.start_dispatcher(metrics_port=str(self.dispatcher_port))
            self.worker = self.start_worker(device="cpu", metrics_port=str(self.worker_port))
        except BaseException:
            self.stop()
            raise
        return self

    def run(self, bodies: dict[str, bytes], *, lane: Lane = "backfill") -> str:
        """Submit, and wait until the job is closed; return its id."""
        job = self.submit(bodies, lane=lane)
        self.wait_for(job)
        return job

    def wait_for(self, job: str) -> None:
        with self.ledger() as ledger:
            wait_until(lambda: ledger.jobs.get(job).closed is not None, what="the job is closed")

    def submit(self, bodies: dict[str, bytes], *, lane: Lane = "backfill") -> str:
        """Upload and submit; return the job's id."""
        with self.store() as store, self.ledger() as ledger:
            for name, body in bodies.items():
                store.put(self.places.key(name), body, content_type="image/jpeg")
            request = Request(
                source=self.places.source_location,
                destination=self.places.destination,
                recipe=Recipe(model="u2netp"),
                lane=lane,
                name="monitored",
                keys=tuple(self.places.key(name).key for name in bodies),
            )
            return submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None).id


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredStack]:
    with MonitoredStack(tmp_path_factory.mktemp("monitored")) as stack:
        yield stack


def test_a_worker_counts_images_and_measures_their_stages(monitored: MonitoredStack) -> None:
    before = scrape(monitored.worker_port)

    monitored.run({"a.jpg": sample_image(seed=1), "b.jpg": sample_image(seed=2), "c.jpg": b"no image"})
    monitored.run({"d.jpg": sample_image(seed=3)}, lane="live")
    live = ("cutfleet_images_total", "live", "done")  # counted just after the ledger has it
    wait_until(
        lambda: scrape(monitored.worker_port).get(live, 0) > before.get(live, 0), what="the last image is counted"
    )

    after = scrape(monitored.worker_port)
    increase = {name: value - before.get(name, 0) for name, value in after.items()}
    assert increase["cutfleet_images_total", "backfill", "done"] == 2
    assert increase["cutfleet_images_total", "backfill", "failed"] == 1
    assert increase[live] == 1
    assert increase["cutfleet_image_errors_total", "not_an_image", "failed"] == 1
    counts = {
        stage: increase["cutfleet_stage_seconds_count", stage] for stage in ("fetch", "decode", "device", "publish")
    }
    assert counts == {"fetch": 4, "decode": 3, "device": 3, "publish": 3}
    assert increase["cutfleet_stage_seconds_sum", "device"] > 0
    assert increase["cutfleet_queue_wait_seconds_count", "backfill"] == 3
    assert 0 < increase["cutfleet_queue_wait_seconds_sum", "live"] < 10
    assert increase["cutfleet_batch_images_sum",] == 3
    assert increase["cutfleet_device_busy_seconds_total",] > 0
    assert increase["cutfleet_s3_requests_total",] > 8
    assert not [
        name for name in increase if name[0].endswith(("s3_errors_total", "redis_errors_total")) and increase[name]
    ]
    assert after["cutfleet_model_info", "cpu", "float32", "u2netp", model_revision(monitored)] == 1
    assert after["process_resident_memory_bytes",] > 100e6


def model_revision(monitored: MonitoredStack) -> str:
    with monitored.ledger() as ledger:
        return next(iter(ledger.fleet.workers().values()))["revision"]


def test_no_label_contains_a_key_or_a_job(monitored: MonitoredStack) -> None:
    job = monitored.run({"secret-shoe.jpg": sample_image(seed=9), "broken-shoe.jpg": b"no image"})

    words = {
        word for port in (monitored.worker_port, monitored.dispatcher_port) for name in scrape(port) for word in name
    }
    assert not [word for word in words if job in word or "shoe" in word]


def test_the_dispatcher_shows_open_images_and_the_age_of_the_oldest(monitored: MonitoredStack) -> None:
    def value(*name: str) -> float:
        return scrape(monitored.dispatcher_port).get(name, 0)

    monitored.worker.signal(signal.SIGSTOP)
    try:
        job = monitored.submit({f"w{number}.jpg": sample_image(seed=number) for number in range(12)}, lane="live")
        wait_until(lambda: value("cutfleet_images_open", "live", "u2netp") == 12, what="the open images are shown")
        wait_until(
            lambda: value("cutfleet_queue_oldest_seconds", "live", "u2netp") > 2, what="the age of the oldest is shown"
        )

        assert value("cutfleet_dispatcher_active") == 1
        assert 0 < value("cutfleet_queue_images", "live", "u2netp") <= 12
        assert value("cutfleet_images", "ready") + value("cutfleet_images", "leased") == 12
        assert value("cutfleet_jobs", "running") == 1
        assert value("cutfleet_redis_memory_limit_bytes") > value("cutfleet_redis_memory_used_bytes") > 1e5
    finally:
        monitored.worker.signal(signal.SIGCONT)

    monitored.wait_for(job)
    wait_until(lambda: value("cutfleet_images_open", "live", "u2netp") == 0, what="no image is open")
    assert value("cutfleet_queue_oldest_seconds", "live", "u2netp") == 0
    assert value("cutfleet_workers", "u2netp") == 1


def test_the_doctor_finds_a_healthy_fleet_well(monitored: MonitoredStack, cutfleet: Run) -> None:
    monitored.run({"healthy.jpg": sample_image(seed=4)})
    places = ("--source", monitored.places.source, "--to", monitored.places.to)

    ran = cutfleet("doctor", *places, env=monitored.environment)
    as_json = cutfleet("doctor", *places, "--json", env=monitored.environment)

    assert ran.returncode == 0, ran.stdout
    assert "u2netp on cpu in float32" in ran.stdout
    assert "A dispatcher is active" in ran.stdout
    summary = json.loads(as_json.stdout)
    assert summary["well"] is True
    assert {row["area"] for row in summary["findings"]} == {"settings", "disk", "redis", "s3", "workers", "queues"}
    assert {row["code"] for row in summary["findings"]} <= {"", "s3_slow", "redis_slow", "clock_differs"}, (
        "warnings of a slow machine are allowed"
    )
