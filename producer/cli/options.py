"""Options that several commands share; a group of them is one value."""

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
from jobs.message import LANES, RENDER_POOL
from jobs.s3.location import Location, parse_destination

if TYPE_CHECKING:
    from jobs.recipe import Recipe
    from jobs.settings import Settings
    from producer.submission.request import ListingFilter

_MB = click.FloatRange(min=0)
_BAD_LINES = click.Choice(["stop", "skip"])
_DATE = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])
_Decorator = Callable[[Callable[..., None]], Callable[..., None]]

PREFIX = "s3://BUCKET/PREFIX"
destination_option = functools.partial(click.option, "--to", "destination", metavar=PREFIX, type=parse_destination)
lane_option = click.option(
    "--lane", type=click.Choice(LANES), default="backfill", show_default=True, help="Workers take live images first."
)
webhook_option = click.option(
    "--webhook", metavar="URL", default="", help="POST a signed event to URL when the job closes."
)
webhook_images_option = click.option("--webhook-images", is_flag=True, help="POST an event for each final image, too.")


def option_group(name: str, build: type[Any], *options: Callable[..., Any]) -> _Decorator:
    """Return a decorator that adds `options` to a command and passes them as one value, the argument `name`. `build`: a
    dataclass with a field for each option."""
    fields = [field.name for field in dataclasses.fields(build)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def grouped(**arguments: Any) -> None:
            value = build(**{field: arguments.pop(field) for field in fields})
            command(**{name: value}, **arguments)

        for option in reversed(options):
            option(grouped)
        return grouped

    return decorate


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Which images a command reads."""

    source: Location
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
    def stdin_as_file(self) -> Iterator[SourceOptions]:
        """Copy what these options read from stdin to a temporary file, and name that as the manifest: it may be read
        twice and be larger than memory."""
        reads_keys = "-" in self.keys and self.manifest is None
        if self.manifest != "-" and not reads_keys:
            yield self
            return
        with tempfile.NamedTemporaryFile(prefix="cutfleet-") as file:
            if reads_keys:
                file.writelines(json.dumps({"key": key}).encode() + b"\n" for key in _read_keys(self.keys) if key)
            else:
                shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            yield dataclasses.replace(self, keys=() if reads_keys else self.keys, manifest=file.name)

    def listing_filter(self) -> ListingFilter:
        """Raises `SettingsError` for a filter without a listing, and for keys together with a manifest."""
        from producer.submission.request import EVERYTHING, ListingFilter

        if self.keys and self.manifest is not None:
            raise SettingsError("Give either keys or a manifest (--from), not both.")
        listing_filter = ListingFilter(
            include=self.include,
            exclude=self.exclude,
            min_bytes=round(1e6 * (self.min_mb or 0)),
            max_bytes=None if self.max_mb is None else round(1e6 * self.max_mb),
            since=self.since.replace(tzinfo=UTC).timestamp() if self.since else None,
            until=self.until.replace(tzinfo=UTC).timestamp() if self.until else None,
        )
        if listing_filter != EVERYTHING and (self.keys or self.manifest is not None):
            raise SettingsError(
                "--include, --exclude, --min-mb, --max-mb, --since and --until filter a listing. They can't be "
                "combined with keys or a manifest: remove the lines there."
            )
        return listing_filter


source_options = option_group(
    "source",
    SourceOptions,
    click.argument("source", metavar=PREFIX, type=Location.parse),
    click.argument("keys", metavar="[KEY ...|-]", nargs=-1),
    click.option(
        "--from", "manifest", metavar="FILE|s3://...|-", help="Read keys from CSV, JSONL, Parquet or an S3 Inventory."
    ),
    click.option(
        "--bad-lines",
        type=_BAD_LINES,
        default="stop",
        show_default=True,
        help="What to do at a malformed line of the manifest.",
    ),
    click.option("--include", metavar="PATTERN", multiple=True, help="List only keys that match, such as `*.jpg`."),
    click.option("--exclude", metavar="PATTERN", multiple=True, help="List no keys that match."),
    click.option("--min-mb", type=_MB, metavar="MB", help="List no smaller objects."),
    click.option("--max-mb", type=_MB, metavar="MB", help="List no larger objects."),
    click.option("--since", type=_DATE, metavar="DATE", help="List only objects last written at DATE (UTC) or later."),
    click.option("--until", type=_DATE, metavar="DATE", help="List only objects last written before DATE (UTC)."),
)


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """What a job makes of each image."""

    recipe: str
    model: str | None
    keep_metadata: bool

    def load(self, settings: Settings) -> Recipe:
        from jobs.recipe import load_recipe

        if self.model == RENDER_POOL:
            raise SettingsError("To make renditions from stored cutouts: cutfleet render JOB --recipe NAME.")
        recipe = load_recipe(self.recipe, model=settings.model)
        keep_credit = self.keep_metadata or recipe.keep_credit
        return dataclasses.replace(recipe, model=self.model or recipe.model, keep_credit=keep_credit)


recipe_options = option_group(
    "recipe",
    RecipeOptions,
    click.option(
        "--recipe", metavar="NAME|FILE", default="default", help="Which outputs to make: see `cutfleet recipes`."
    ),
    click.option(
        "--model", metavar="NAME", help="Model that makes the masks.  [default: the recipe's, or CUTFLEET_MODEL]"
    ),
    click.option(
        "--keep-metadata", is_flag=True, help="Copy artist and copyright from the source; no other metadata is copied."
    ),
)


def _read_keys(keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        if key == "-":
            yield from (line.decode(errors="surrogateescape").strip("\r\n") for line in sys.stdin.buffer)
        else:
            yield key
