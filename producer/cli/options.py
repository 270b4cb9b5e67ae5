"""Options that belong together, as one value each: which images, what is made of them, how fast, who is told."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from jobs.errors import SettingsError

if TYPE_CHECKING:
    from jobs.message import Lane
    from jobs.recipe import Recipe
    from jobs.settings import Settings
    from producer.submission.sources import Only, Report

_MB = click.FloatRange(min=0)
_DATE = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])


def gathers(name: str, build: Callable[..., Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command several options as one value, its argument `name`: a dataclass with a field for each."""
    fields = [field.name for field in dataclasses.fields(build)]  # type: ignore[arg-type]  # mypy can't say so of a class

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def gathered(**told: Any) -> None:
            value = build(**{field: told.pop(field) for field in fields})
            command(**{name: value}, **told)

        for option in reversed(options):
            option(gathered)
        return gathered

    return decorate


@dataclasses.dataclass(frozen=True)
class Sought:
    """Which images are asked for, in the options' own terms."""

    source: str
    keys: tuple[str, ...]
    manifest: str | None
    bad_lines: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    min_mb: float | None
    max_mb: float | None
    since: datetime | None
    until: datetime | None

    @contextmanager
    def here(self) -> Iterator[Sought]:
        """Itself, with what comes on stdin in a file: it may be read twice, and be more than memory holds."""
        names_keys = "-" in self.keys and self.manifest is None
        if self.manifest != "-" and not names_keys:
            yield self
            return
        with tempfile.NamedTemporaryFile(prefix="cutfleet-") as file:
            if names_keys:
                file.writelines(json.dumps({"key": key}).encode() + b"\n" for key in _read_keys(self.keys) if key)
            else:
                shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            yield dataclasses.replace(self, keys=() if names_keys else self.keys, manifest=file.name)

    def only(self) -> Only:
        """Raises `SettingsError` where there is no listing to limit."""
        from producer.submission.sources import EVERYTHING, Only

        if self.keys and self.manifest is not None:
            raise SettingsError("Name keys or give a manifest (--from), not both.")
        only = Only(
            include=self.include,
            exclude=self.exclude,
            min_bytes=round(1e6 * (self.min_mb or 0)),
            max_bytes=None if self.max_mb is None else round(1e6 * self.max_mb),
            since=self.since.replace(tzinfo=UTC).timestamp() if self.since else None,
            until=self.until.replace(tzinfo=UTC).timestamp() if self.until else None,
        )
        if only != EVERYTHING and (self.keys or self.manifest is not None):
            raise SettingsError("Patterns and limits are for a listing: leave lines out of the manifest itself.")
        return only

    def named(self) -> tuple[str, ...] | None:
        """The keys; None where none was named, or those on stdin are in a file."""
        return self.keys or None

    def bad_line(self) -> Report:
        from producer.submission.sources import refuse_line

        return refuse_line if self.bad_lines == "stop" else _tell_bad_line


SOUGHT = (
    click.argument("source", metavar="s3://BUCKET/PREFIX"),
    click.argument("keys", metavar="[KEY ...|-]", nargs=-1),
    click.option(
        "--from", "manifest", metavar="FILE|s3://...|-", help="Keys from CSV, JSONL, Parquet or an S3 Inventory."
    ),
    click.option(
        "--bad-lines", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Of a manifest."
    ),
    click.option("--include", metavar="PATTERN", multiple=True, help="Of a listing: only keys like this, as `*.jpg`."),
    click.option("--exclude", metavar="PATTERN", multiple=True, help="Of a listing: no keys like this."),
    click.option("--min-mb", type=_MB, metavar="MB", help="Of a listing: no smaller objects."),
    click.option("--max-mb", type=_MB, metavar="MB", help="Of a listing: no larger objects."),
    click.option("--since", type=_DATE, metavar="DATE", help="Of a listing: last written then or later (UTC)."),
    click.option("--until", type=_DATE, metavar="DATE", help="Of a listing: last written before (UTC)."),
)


@dataclasses.dataclass(frozen=True)
class Made:
    """What is made of them."""

    recipe: str
    model: str | None
    keep_metadata: bool

    def of(self, settings: Settings) -> Recipe:
        from jobs.catalogue import RENDER
        from jobs.recipe import load_recipe

        if self.model == RENDER:
            raise SettingsError("To make renditions from stored cutouts: cutfleet render JOB --recipe NAME.")
        recipe = load_recipe(self.recipe, model=settings.model)
        keep_credit = self.keep_metadata or recipe.keep_credit
        return dataclasses.replace(recipe, model=self.model or recipe.model, keep_credit=keep_credit)


MADE = (
    click.option("--recipe", metavar="NAME|FILE", default="default", help="Which images to make: see `recipes`."),
    click.option(
        "--model", metavar="NAME", help="Which model cuts them out.  [default: the recipe's, or CUTFLEET_MODEL]"
    ),
    click.option(
        "--keep-metadata", is_flag=True, help="Copy artist and copyright from the source; nothing else is kept."
    ),
)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How, and how fast, a job is fed."""

    lane: Lane
    weight: int
    rate: float | None
    sample: int | None


PACE = (
    click.option(
        "--lane",
        type=click.Choice(["live", "backfill"]),
        default="backfill",
        show_default=True,
        help="Live is always taken first.",
    ),
    click.option(
        "--weight", type=click.IntRange(1, 1000), default=1, show_default=True, help="Its share against other jobs'."
    ),
    click.option(
        "--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Feed at most N images a second."
    ),
    click.option(
        "--sample", type=click.IntRange(min=1), metavar="N", help="Pause after the first N; `unpause` goes on."
    ),
)


@dataclasses.dataclass(frozen=True)
class Told:
    """Who is told of the end."""

    webhook: str
    webhook_images: bool


TOLD = (
    click.option("--webhook", metavar="URL", default="", help="Told, signed, when the job is closed."),
    click.option("--webhook-images", is_flag=True, help="Told of every image, too."),
)


def _tell_bad_line(number: int, reason: str) -> None:
    click.echo(f"line {number} of the manifest left out: {reason}", err=True)


def _read_keys(keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        if key == "-":
            yield from (line.decode(errors="surrogateescape").strip("\r\n") for line in sys.stdin.buffer)
        else:
            yield key
