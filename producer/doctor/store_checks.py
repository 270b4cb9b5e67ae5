"""Checks of S3: lists and reads the source, writes to the destination, tests conditional writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jobs.errors import CutfleetError
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location
from jobs.s3.names import record_path
from producer.doctor.findings import Finding, catch, from_error, ok, timed_ms, warning
from producer.submission.validation import check_no_overlap

SLOW_MS = 1000.0


def check_store(store: Store, source: Location | None, destination: Location | None) -> Iterator[Finding]:
    """`source`, `destination`: None if there is none to try."""
    for option, location in (("--source", source), ("--to", destination)):
        if location is None:
            yield warning(
                "s3",
                "not_tried",
                f"No job is open, so no prefix was tried for {option}.",
                f"Add {option} s3://BUCKET/PREFIX.",
            )
    if source is not None and destination is not None:
        yield from catch("s3", lambda: check_no_overlap(source, destination, recipe=Recipe(), store=store))
    if source is not None:
        yield from _check_source(store, source)
    if destination is not None:
        yield from _check_destination(store, destination)


def _check_source(store: Store, source: Location) -> Iterator[Finding]:
    first: list[S3Object | None] = []
    yield from _try(f"Lists {source}", lambda: first.append(next(store.list_source(source), None)))
    match first:
        case [None]:
            yield warning(
                "s3",
                "source_empty",
                f"There are no images under {source}, so none was read.",
                "Correct the prefix: S3 compares it with the beginning of each key.",
            )
        case [S3Object(key=key)]:
            image = source.at(key)
            yield from _try(f"Reads {image}", lambda: store.head(image, role="source"))


def _check_destination(store: Store, destination: Location) -> Iterator[Finding]:
    probe = record_path(destination, "doctor", "probe.json")
    missing = destination.below("cutouts/_cutfleet-doctor-missing.png")
    supported: list[bool] = []
    yield from _try(f"Finds that {missing} does not exist", lambda: store.head(missing, role="output"))
    yield from _try(f"Writes {probe}", lambda: supported.append(store.supports_conditional_writes(probe, b"{}")))
    if supported == [False]:
        yield warning(
            "s3",
            "conditions_ignored",
            "The store ignores If-None-Match or If-Match: a worker that lost its lease can overwrite newer outputs.",
            "Use a store that supports conditional writes, or give every job a destination of its own.",
        )
    if supported:
        yield from _try(f"Reads {probe}", lambda: store.head(probe, role="output"))


def _try(action: str, call: Callable[[], object]) -> Iterator[Finding]:
    try:
        took_ms = timed_ms(call)
    except CutfleetError as exc:
        yield from_error("s3", exc)
        return
    if took_ms > SLOW_MS:
        yield warning(
            "s3",
            "s3_slow",
            f"{action}, which took {took_ms / 1000:.1f} s.",
            "Use buckets in the workers' region; check the network between them.",
        )
    else:
        yield ok("s3", f"{action}, in {took_ms:.0f} ms.")
