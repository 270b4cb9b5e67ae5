"""A worker's memory: it stays under its limit, and one that does not is replaced."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.terms import LEAK, LEAK_BYTES
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image

ROOM_MB = 600
"""Above what a worker takes by itself: too little for twelve images of 12 megapixels at once."""
FAST = {"compress_level": 1}


def memory_mb(pid: int, what: str = "VmRSS") -> float:
    """Resident; `VmHWM`: the most that ever was."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


def own_mb(fleet: Fleet) -> float:
    """What a worker takes before its first image."""
    worker = fleet.workers.start()
    taken = memory_mb(worker)
    fleet.workers.kill(worker)
    return taken


def large_images() -> Iterator[tuple[str, bytes]]:
    """Names and bodies; the formats take from 8 to 16 bytes a pixel."""
    image = Image.linear_gradient("L").resize((4000, 3000)).convert("RGB")
    transparent = image.copy()
    transparent.putalpha(128)
    forms = [(image, "jpg", "JPEG", {}), (image, "webp", "WEBP", {"method": 0}), (transparent, "png", "PNG", FAST)]
    bodies = []
    for drawn, ending, form, options in forms:
        body = io.BytesIO()
        drawn.save(body, form, **options)
        bodies.append((ending, body.getvalue()))
    for number in range(13):
        ending, data = bodies[number % len(bodies)]
        yield f"p{number:05d}.{ending}", data


def test_a_flood_of_large_images_stays_under_the_limit(fleet: Fleet, places: Places, submit: Submit) -> None:
    images = dict(large_images())
    for name, body in images.items():
        fleet.store.put(places.key(name), body, content_type="image/*")
    limit_mb = own_mb(fleet) + ROOM_MB
    worker = fleet.workers.start(slots="12", memory_mb=str(round(limit_mb)), lease_s="8")

    with fleet.dispatcher(lease_s="8"):
        truth = prove(fleet, submit(), places, names=list(images), reference={}, within_s=180)
        most_mb = memory_mb(worker, "VmHWM")

    assert truth.counts["done"] == len(images)
    assert most_mb < limit_mb
    assert fleet.workers.dismiss() == [0]
    assert fleet.workers.ends()[worker] == 0, "it was not replaced"


def test_a_worker_above_its_limit_drains_and_is_replaced_and_nothing_is_lost_or_done_twice(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 16)
    for number, name in enumerate(names):
        fleet.store.put(places.key(name), sample_image(seed=number) + LEAK, content_type="image/jpeg")
    limit_mb = own_mb(fleet) + 4 * LEAK_BYTES / 1e6
    known = fleet.workers.ends()
    fleet.workers.start(supervised=True, slots="2", memory_mb=str(round(limit_mb)), test_device_ms="200")

    with fleet.dispatcher():
        truth = prove(fleet, submit(), places, names=names, reference=reference, within_s=120)

    ended = [code for pid, code in fleet.workers.ends().items() if pid not in known]
    assert len(ended) >= 2
    assert set(ended) == {0}
    assert "recycling" in fleet.workers.text()
    assert truth.counts["done"] == len(names)
    assert set(fleet.workers.published(places).values()) == {1}
