"""Checks of a request before anything is written."""

from __future__ import annotations

import re

from jobs.catalogue import PRESETS
from jobs.errors import SettingsError
from jobs.job import JobKind
from jobs.ledger import Ledger
from jobs.recipe import OWN_FOLDERS, Recipe
from jobs.s3.client import Store
from jobs.s3.location import MAX_KEY_BYTES, Location
from jobs.s3.names import RECORDS
from producer.submission.request import Request

NAMED_BY_HASH = re.compile(r"[A-Za-z0-9_.-]+@[0-9a-f]{12}")
"""Name of a model that is not a preset; `cutfleet workers` shows it."""
_RECORD_BYTES = len(f"{RECORDS}/{'j' * 64}/review/{'d' * 64}.json")
"""Longest name of a job's own files below its destination: a preview's."""


def check_request(request: Request, ledger: Ledger, store: Store) -> None:
    """Raises `SettingsError` for a destination under its source, a prefix that is too long or an unknown model, and
    `SourceError` or `OutputError` for a location outside the allowlist."""
    check_no_overlap(request.source, request.destination, recipe=request.recipe, store=store)
    check_lengths(request.source, request.destination)
    check_allowed(request.source, request.destination, store)
    if request.kind is JobKind.CUT:
        check_model(request.recipe.model, ledger)


def check_no_overlap(source: Location, destination: Location, *, recipe: Recipe, store: Store) -> None:
    """Raises `SettingsError` `destination_under_source` when a job by this recipe would read its own outputs. With a
    separate account for sources, a bucket of the same name may be another one: only a destination under it is refused.
    """
    written = [destination.key] if destination.key.startswith(source.key) else []
    if store.has_one_account:
        folders = (*OWN_FOLDERS, *map(recipe.rendition_folder, recipe.renditions))
        written += [destination.key + folder for folder in folders if _overlaps(source, destination, folder)]
    if source.bucket == destination.bucket and written:
        raise SettingsError(
            f"Outputs would be written to {destination.at(written[0])}, under their own source {source}: the next run "
            "would cut them out again. Choose a destination elsewhere, or another source prefix.",
            code="destination_under_source",
        )


def check_lengths(source: Location, destination: Location) -> None:
    """Raises `SettingsError` `name_too_long` for a prefix that no object can have, or that leaves no room for a job's
    records."""
    check_length(source)
    check_length(destination, below_bytes=_RECORD_BYTES)


def check_length(location: Location, *, below_bytes: int = 0) -> None:
    """Raises `SettingsError` `name_too_long`. `below_bytes`: needed for names below it."""
    limit = MAX_KEY_BYTES - below_bytes
    if location.key_bytes > limit:
        room = f", minus {below_bytes} for the records of a job" if below_bytes else ""
        raise SettingsError(
            f"The key that begins with {str(location)[:80]!r} has {location.key_bytes:,} bytes; the limit is {limit:,} "
            f"(S3's {MAX_KEY_BYTES:,}{room}). Choose a shorter one.",
            code="name_too_long",
        )


def check_allowed(source: Location, destination: Location, store: Store) -> None:
    """Raises `SourceError` or `OutputError` for a prefix outside the allowlist."""
    store.check_allowed(source, "source")
    store.check_allowed(destination, "output")


def check_model(model: str, ledger: Ledger) -> None:
    """Raises `SettingsError` `model_unknown`. A preset or `NAME@HASH` may be served later, by a fleet that is scaled to
    zero; any other name must be served now."""
    served = {beat["model"] for beat in ledger.fleet.workers().values()}
    if model not in PRESETS and model not in served and not NAMED_BY_HASH.fullmatch(model):
        known = ", ".join([*PRESETS, *sorted(served - set(PRESETS))])
        raise SettingsError(f"No model is called {model!r}. Known: {known}.", code="model_unknown")


def _overlaps(source: Location, destination: Location, folder: str) -> bool:
    """Whether outputs in `folder` may be under `source`. A rendition without a folder may have any name below the
    destination; it has its source's name where that is relative to the destination too."""
    written = destination.key + folder
    if written.startswith(source.key):
        return True
    return source.folder.startswith(written) if folder else source.folder == destination.key
