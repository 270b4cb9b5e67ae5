"""The memory of a worker stays under its limit; a worker above the limit drains and is replaced."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.stand_in_settings import LEAK, LEAK_BYTES
from tests.support.images import put_images, sample_image
from tests.support.places import Places

BUDGET_MB = 600
"""Above the worker's own memory: too little for twelve images of 12 megapixels at once."""
FAST_PNG = {"compress_level": 1}


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """Return the resident memory, or its peak with `VmHWM`."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def measure_own_mb(fleet: Fleet) -> float:
    """Return the memory of a worker before its first image."""
    worker = fleet.workers.start()
    own_mb = memory_mb(worker)
    fleet.workers.kill(worker)
    return own_mb


def large_images() -> Iterator[tuple[str, bytes]]:
    """Yield names and bodies. The formats take from 8 to 16 bytes per pixel."""
    image = Image.linear_gradient("L").resize((4000, 3000)).convert("RGB")
    transparent = image.copy()
    transparent.putalpha(128)
    forms = [(image, "jpg", "JPEG", {}), (image, "webp", "WEBP", {"method": 0}), (transparent, "png", "PNG", FAST_PNG)]
    bodies = []
    for picture, extension, form, options in forms:
        body = io.BytesIO()
        picture.save(body, form, **options)
        bodies.append((extension, body.getvalue()))
    for number in range(13):
        extension, data = bodies[number % len(bodies)]
        yield f"p{number:05d}.{extension}", data


def test_many_large_images_stay_under_the_limit(fleet: Fleet, places: Places, submit: Submit) -> None:
    images = dict(large_images())
    for name, body in images.items():
        fleet.store.put(places.key(name), body, content_type="image/*")
    limit_mb = measure_own_mb(fleet) + BUDGET_MB
    worker = fleet.workers.start(slots="12", memory_mb=str(round(limit_mb)), lease_s="8")

    with fleet.dispatcher(lease_s="8"):
        outcome = assert_exact(fleet, submit(), places, names=list(images), reference={}, within_s=180)
        peak_mb = memory_mb(worker, "VmHWM")

    assert outcome.counts["done"] == len(images)
    assert peak_mb < limit_mb
    assert fleet.workers.terminate() == [0]
    assert fleet.workers.exit_codes()[worker] == 0, "the worker was not replaced"


def test_a_worker_above_its_limit_drains_and_no_image_is_lost_or_published_twice(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 16)
    for number, name in enumerate(names):
        fleet.store.put(places.key(name), sample_image(seed=number) + LEAK, content_type="image/jpeg")
    limit_mb = measure_own_mb(fleet) + 4 * LEAK_BYTES / 1e6
    earlier = fleet.workers.exit_codes()
    fleet.workers.start_supervised(slots="2", memory_mb=str(round(limit_mb)), test_device_ms="200")

    with fleet.dispatcher():
        outcome = assert_exact(fleet, submit(), places, names=names, reference=reference, within_s=120)

    exit_codes = [code for pid, code in fleet.workers.exit_codes().items() if pid not in earlier]
    assert len(exit_codes) >= 2
    assert set(exit_codes) == {0}
    assert "recycling" in fleet.workers.log_text()
    assert outcome.counts["done"] == len(names)
    assert set(fleet.workers.publish_counts(places).values()) == {1}
