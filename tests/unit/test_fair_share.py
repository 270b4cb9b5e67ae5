"""How the room of a queue is divided: by weights, and by rates."""

from __future__ import annotations

from jobs.job import Job
from jobs.s3.location import Location
from producer.dispatcher.fair_share import FairShare, RateLimit


def test_room_is_divided_by_weight_even_one_image_at_a_time() -> None:
    share = FairShare()
    fed = {"a": 0, "b": 0, "c": 0}

    for _ in range(100):
        for job, count in share.divide(1, dict.fromkeys(fed, 1000), {"a": 3, "b": 1, "c": 1}).items():
            fed[job] += count

    assert fed == {"a": 60, "b": 20, "c": 20}


def test_a_job_that_is_new_or_was_idle_gets_no_more_than_its_share() -> None:
    share = FairShare()
    share.divide(1000, {"old": 5000}, {"old": 1})

    assert share.divide(10, {"old": 100, "new": 100}, {"old": 1, "new": 1}) == {"old": 5, "new": 5}
    share.divide(1000, {"old": 5000}, {"old": 1})
    assert share.divide(10, {"old": 100, "new": 100}, {"old": 1, "new": 1}) == {"old": 5, "new": 5}


def test_room_that_one_job_can_not_use_goes_to_the_others() -> None:
    shares = FairShare().divide(100, {"small": 3, "large": 500}, {"small": 9, "large": 1})

    assert shares == {"small": 3, "large": 97}


def test_a_dispatcher_that_takes_over_does_not_start_with_a_burst() -> None:
    job = Job(
        id="j",
        name="",
        source=Location("in", ""),
        destination=Location("out", ""),
        recipe_json="{}",
        model="m",
        lane="backfill",
        conditional=True,
        created=0,
        rate=50,
        total=10**6,
    )

    assert RateLimit().allowed(job, now=1e9) == 0
