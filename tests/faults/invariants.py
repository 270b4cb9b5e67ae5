"""Checks from outside that a job is exact: reads S3 and Redis with plain clients, not through our own code.

Every image is final; done + failed + skipped + cancelled = total; each done image has one cutout and one mask, which
belong together, decode, have the image's size, and differ by at most one level from a run without faults; nothing else
is under the destination, except `_cutfleet/`; no message, claim or lease is left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import redis

from jobs.results import Failure
from tests.faults.fleet import Fleet, Reference
from tests.faults.stand_in_settings import MODEL
from tests.support.places import Places, plain_client
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    import numpy as np
    from mypy_boto3_s3 import S3Client
    from numpy.typing import NDArray

SETTLE_S = 25.0
WINDOW = ("cf:waiting", "cf:leased", "cf:retry", "cf:entry", "cf:owner", "cf:claim", "cf:tries", "cf:vanished")
BROKER = ("unacked", "unacked_index", f"live.{MODEL}", f"backfill.{MODEL}", f"suspect.{MODEL}")
STATES = ("open", "done", "failed", "skipped", "cancelled", "done")
"""By the value of `ImageState`; the last one is done and flagged for review."""
COUNTS = ("total", "done", "failed", "skipped", "cancelled")


@dataclasses.dataclass(frozen=True)
class JobOutcome:
    """`counts`: of `COUNTS`, as the job's hash has them. `states`: name by index, as the job's bits have them."""

    counts: dict[str, int]
    states: dict[int, str]


def assert_exact(
    fleet: Fleet,
    job: str,
    places: Places,
    *,
    names: Sequence[str],
    reference: Reference,
    within_s: float = 60,
    only_job: bool = True,
    port: int = 0,
) -> JobOutcome:
    """Wait until the job is closed, then assert what the module's head lists. `names`: the images below the source, by
    index. `only_job`: no other job is open, so that nothing at all may be left in the window. `port`: of the Redis
    server, if not the fleet's."""
    client = redis.Redis(port=port or fleet.stack.redis_port, decode_responses=True)
    try:
        wait_until(
            lambda: client.hexists(f"cf:job:{job}", "closed"),
            within_s=within_s,
            what=f"the job is closed: {client.hgetall(f'cf:job:{job}')}\n{fleet.workers.log_tail()}",
        )
        outcome = _read_outcome(client, job)
        if only_job:
            _assert_nothing_left(client)
    finally:
        client.close()
    final = {name: outcome.counts[name] for name in COUNTS[1:]}
    assert outcome.counts["total"] == sum(final.values()) == len(names), outcome.counts
    assert Counter(outcome.states.values()) == {name: count for name, count in final.items() if count}, outcome
    done = {names[index] for index, state in outcome.states.items() if state in ("done", "skipped")}
    _assert_outputs(fleet, places, done, reference, failures=dict(fleet.ledger.images.failures(job)))
    return outcome


def read_masks(fleet: Fleet, places: Places, names: Sequence[str]) -> Reference:
    """Return the masks in S3, to compare later runs with."""
    with plain_client(fleet.store) as s3:
        bucket = places.destination.bucket
        return {name: _pixels(s3.get_object(Bucket=bucket, Key=places.mask(name).key)) for name in names}


def _read_outcome(client: redis.Redis, job: str) -> JobOutcome:
    fields: dict[str, str] = client.hgetall(f"cf:job:{job}")  # type: ignore[assignment]  # the types cover asyncio too
    total = int(fields["total"])
    bits: Any = client.bitfield(f"cf:job:{job}:bits")
    for index in range(total):
        bits.get("u4", f"#{index}")
    states = {index: STATES[value] for index, value in enumerate(bits.execute())} if total else {}
    return JobOutcome({name: int(fields.get(name, 0)) for name in COUNTS}, states)


def _assert_nothing_left(client: redis.Redis) -> None:
    wait_until(
        lambda: not client.exists(*WINDOW, *BROKER),
        within_s=SETTLE_S,
        what=f"nothing is left in Redis: {[key for key in (*WINDOW, *BROKER) if client.exists(key)]}",
    )


def _assert_outputs(
    fleet: Fleet, places: Places, done: Set[str], reference: Reference, *, failures: Mapping[int, Failure]
) -> None:
    with plain_client(fleet.store) as s3:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=places.destination.bucket)
        keys = {row["Key"] for page in pages for row in page.get("Contents", []) if not row["Key"].endswith("/")}
        wanted = {location.key for name in done for location in (places.cutout(name), places.mask(name))}
        assert {key for key in keys if not key.startswith("_cutfleet/")} == wanted, failures
        for name in done:
            _assert_pair(s3, places, name, reference)


def _assert_pair(s3: S3Client, places: Places, name: str, reference: Reference) -> None:
    import numpy as np

    bucket = places.destination.bucket
    cutout = s3.get_object(Bucket=bucket, Key=places.cutout(name).key)
    mask = s3.get_object(Bucket=bucket, Key=places.mask(name).key)
    metadata = cutout["Metadata"]
    assert metadata["cf-mask-etag"] == mask["ETag"].strip('"'), f"{name}: mask and cutout do not belong together"
    assert metadata["cf-source"] == hashlib.sha256(str(places.key(name)).encode()).hexdigest()
    pixels, alpha = _pixels(cutout), _pixels(mask)
    assert pixels.shape[:2] == alpha.shape, name
    assert np.array_equal(pixels[..., 3], alpha), name
    if name in reference:
        assert alpha.shape == reference[name].shape, name
        assert np.abs(alpha.astype(int) - reference[name]).max() <= 1, f"{name} differs from a run without faults"


def _pixels(answer: Any) -> NDArray[np.uint8]:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(answer["Body"].read())))
