"""Submits jobs in this process; a test names only the fields that matter to it."""

from __future__ import annotations

from typing import Any

from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.support.places import Places


def submit_keys(places: Places, ledger: Ledger, store: Store, *, count: int = 500, **fields: Any) -> Job:
    """Submit a backfill of `count` keys, without objects. `fields`: of `Request`, in place of these."""
    given: dict[str, Any] = {
        "source": places.source_location,
        "destination": places.destination,
        "recipe": Recipe(),
        "lane": "backfill",
        "name": "",
        "keys": tuple(f"k{index:05d}.jpg" for index in range(count)),
    }
    return submit(Request(**given | fields), store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
