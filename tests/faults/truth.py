"""The pass condition of every fault, checked from outside: S3 and Redis are read with plain clients, not through us.

Every image final; done + failed + skipped + cancelled = total; one cutout and one mask for each done image, that
belong together, decode, have the image's size and the level of a run without faults; nothing else under the
destination but `_cutfleet/`; no message, claim or lease left over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections import Counter

import numpy as np
import redis
from PIL import Image

from jobs.job import Failure
from jobs.s3.client import Location
from tests.faults.fleet import Fleet, Reference
from tests.faults.terms import MODEL
from tests.support.factories import Places, wait_until

SETTLE_S = 25.0
WINDOW = ("cf:waiting", "cf:leased", "cf:retry", "cf:entry", "cf:owner", "cf:claim", "cf:tries", "cf:vanished")
BROKER = ("unacked", "unacked_index", f"live.{MODEL}", f"backfill.{MODEL}", f"suspect.{MODEL}")
STATES = ("open", "done", "failed", "skipped", "cancelled", "done")  # the last: done, and flagged for review


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a job came to. `states`: index -> name."""

    counts: dict[str, int]
    states: dict[int, str]


def prove(
    fleet: Fleet,
    job: str,
    places: Places,
    *,
    names: list[str],
    reference: Reference,
    within_s: float = 60,
    alone: bool = True,
    port: int = 0,
) -> Truth:
    """`names`: the images below the source, in order of their indexes. Asserts all of the above. `alone`: no other
    job is open, so that nothing at all may be left over. `port`: of another Redis than the fleet's."""
    client = redis.Redis(port=port or fleet.stack.redis_port, decode_responses=True)
    try:
        wait_until(
            lambda: client.hexists(f"cf:job:{job}", "closed"),
            within_s=within_s,
            what=f"the job is closed: {client.hgetall(f'cf:job:{job}')}\n{fleet.workers.words()}",
        )
        truth = _truth(client, job)
        if alone:
            _prove_nothing_left(client)
    finally:
        client.close()
    final = {name: truth.counts[name] for name in ("done", "failed", "skipped", "cancelled")}
    assert truth.counts["total"] == sum(final.values()) == len(names), truth.counts
    assert Counter(truth.states.values()) == {name: n for name, n in final.items() if n}, truth
    done = {names[index] for index, state in truth.states.items() if state in ("done", "skipped")}
    _prove_outputs(fleet, places, done, reference, failures=dict(fleet.ledger.failures(job)))
    return truth


def _truth(client: redis.Redis, job: str) -> Truth:
    fields: dict[str, str] = client.hgetall(f"cf:job:{job}")  # type: ignore[assignment]  # the types cover asyncio too
    total = int(fields["total"])
    bits = client.bitfield(f"cf:job:{job}:bits")
    for index in range(total):
        bits.get("u4", f"#{index}")
    states = {index: STATES[value] for index, value in enumerate(bits.execute())} if total else {}
    return Truth(
        {name: int(fields.get(name, 0)) for name in ("total", "done", "failed", "skipped", "cancelled")}, states
    )


def _prove_nothing_left(client: redis.Redis) -> None:
    wait_until(
        lambda: not client.exists(*WINDOW, *BROKER),
        within_s=SETTLE_S,
        what=f"nothing is left over: {[key for key in (*WINDOW, *BROKER) if client.exists(key)]}",
    )


def _prove_outputs(
    fleet: Fleet, places: Places, done: set[str], reference: Reference, *, failures: dict[int, Failure]
) -> None:
    s3, to = fleet.store._s3, Location.parse(places.to)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=to.bucket)
    keys = {row["Key"] for page in pages for row in page.get("Contents", []) if not row["Key"].endswith("/")}
    wanted = {place.key for name in done for place in (places.cutout(name), places.mask(name))}
    assert {key for key in keys if not key.startswith("_cutfleet/")} == wanted, failures
    for name in done:
        source = places.key(name)
        cutout = s3.get_object(Bucket=to.bucket, Key=places.cutout(name).key)
        mask = s3.get_object(Bucket=to.bucket, Key=places.mask(name).key)
        metadata = cutout["Metadata"]
        assert metadata["cf-mask-etag"] == mask["ETag"].strip('"'), f"{name}: mask and cutout do not belong together"
        assert metadata["cf-source"] == hashlib.sha256(str(source).encode()).hexdigest()
        pixels, alpha = (np.asarray(Image.open(io.BytesIO(found["Body"].read()))) for found in (cutout, mask))
        assert pixels.shape[:2] == alpha.shape, name
        assert np.array_equal(pixels[..., 3], alpha), name
        if name in reference:
            assert alpha.shape == reference[name].shape, name
            assert np.abs(alpha.astype(int) - reference[name]).max() <= 1, f"{name} differs from a run without faults"


def masks(fleet: Fleet, places: Places, names: list[str]) -> Reference:
    """The masks that a run has left, for comparing later runs with it."""
    bucket = Location.parse(places.to).bucket
    s3 = fleet.store._s3
    bodies = {name: s3.get_object(Bucket=bucket, Key=places.mask(name).key)["Body"].read() for name in names}
    return {name: np.asarray(Image.open(io.BytesIO(body))) for name, body in bodies.items()}
