"""A job, its state, and the states of its images. A job knows its recipe and the names of its images' objects."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jobs.message import Lane, queue_name
from jobs.recipe import Recipe
from jobs.s3.location import Location, parse_destination
from jobs.s3.names import ImagePaths, image_paths, preview_path, record_path, rendition_paths


class ImageState(enum.IntEnum):
    """Stored in four bits for each image."""

    OPEN = 0  # listed: not fed yet, queued, leased or waiting for a retry. Any other state may follow.
    DONE = 1  # mask and cutout are in S3. Final.
    FAILED = 2  # no retry can help, or all attempts are used up; a `Failure` has the reason. Final until replayed.
    SKIPPED = 3  # S3 already holds the outputs of this recipe for this source. Final.
    CANCELLED = 4  # the job was cancelled before a worker claimed the image. Final.
    REVIEW = 5  # done, and flagged for review. Counts as done and as review. Final.

    @property
    def has_outputs(self) -> bool:
        """Whether cutout and mask are in S3."""
        return self in STATES_WITH_OUTPUTS


STATES_WITH_OUTPUTS = (ImageState.DONE, ImageState.SKIPPED, ImageState.REVIEW)


class JobState(enum.StrEnum):
    """Derived from a job's flags."""

    LISTING = "listing"  # more images may come: it is being listed, or a watch feeds it. Then running.
    RUNNING = "running"  # listed to the end. Then closed.
    PAUSED = "paused"  # nothing is fed until a person unpauses it. Then listing or running.
    CANCELLING = "cancelling"  # nothing is claimed; images in work finish. Then closed.
    CLOSED = "closed"  # every image is final.


class JobKind(enum.StrEnum):
    """What a worker does with each image of the job."""

    CUT = "cut"  # make mask, cutout and renditions from the source, with the model
    RENDER = "render"  # make renditions again from the stored cutout, without a model
    PREVIEW = "preview"  # make the preview of an image of another job, for `cutfleet review`


@dataclasses.dataclass(frozen=True)
class ManifestPart:
    """One part of the manifest. `first`, `last`: least and greatest key; `count`: number of images."""

    number: int
    first: str
    last: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the ledger has it. Times are Unix times.

    `recipe_json`: parsed by `recipe`. `model`: the model that its images need, or `RENDER_POOL`. `conditional`: the
    store supports conditional writes. `weight`: share of a queue against other jobs. `rate`: most images fed per
    second. `sample`: number of images fed before it is paused. `watch`: id of the watch that feeds it. `selection`:
    which images of its source were asked for, to compare on resume. `list_in_background`: `cutfleet serve` lists it.
    `review_of`: of a preview job, the job under review.

    Counts: `total` images listed; `cursor` up to where they are fed; `parts` of the manifest; `unrecorded` images of a
    live job that are in no part yet; `undelivered` webhook events; `reopened` images to be fed once more; `window`
    images fed and not final; `cancel_cursor` up to where a cancelled job is final; `spills` parts of failures in S3;
    `acknowledged_*`: counts when a person last unpaused it.
    """

    id: str
    name: str
    source: Location
    destination: Location
    recipe_json: str
    model: str
    lane: Lane
    conditional: bool
    created: float
    kind: JobKind = JobKind.CUT
    weight: int = 1
    rate: float | None = None
    sample: int | None = None
    watch: str = ""
    selection: str = ""
    list_in_background: bool = False
    webhook: str = ""
    webhook_images: bool = False
    review_of: str = ""
    closed: float | None = None
    listed: bool = False
    paused: str | None = None
    cancelled: bool = False
    total: int = 0
    cursor: int = 0
    parts: int = 0
    unrecorded: int = 0
    undelivered: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    cancelled_images: int = 0
    review: int = 0
    reopened: int = 0
    window: int = 0
    cancel_cursor: int = 0
    spills: int = 0
    acknowledged_final: int = 0
    acknowledged_failed: int = 0

    @property
    def final(self) -> int:
        return self.done + self.failed + self.skipped + self.cancelled_images

    @property
    def open(self) -> int:
        return self.total - self.final

    @property
    def recorded(self) -> int:
        """Number of images that are in parts of the manifest."""
        return self.total - self.unrecorded

    @property
    def state(self) -> JobState:
        if self.closed is not None:
            return JobState.CLOSED
        if self.cancelled:
            return JobState.CANCELLING
        if self.paused is not None:
            return JobState.PAUSED
        return JobState.RUNNING if self.listed else JobState.LISTING

    @property
    def queue(self) -> str:
        return queue_name(self.lane, self.model)

    @functools.cached_property
    def recipe(self) -> Recipe:
        """Raises `SettingsError` when a later version wrote the recipe."""
        return Recipe.from_json(self.recipe_json)

    def fingerprint(self, *, model_revision: str, input_size: tuple[int, int]) -> str:
        """Return the fingerprint of the recipe with this model; see `Recipe.fingerprint`. Cached."""
        return self._fingerprint(model_revision, input_size)

    @functools.cached_property
    def _fingerprint(self) -> Callable[[str, tuple[int, int]], str]:
        return functools.cache(lambda revision, size: self.recipe.fingerprint(model_revision=revision, input_size=size))

    def paths(self, key: str) -> ImagePaths:
        """Return the names of the source, cutout and mask of one image."""
        return image_paths(self.source, self.destination, key)

    def rendition_paths(self, key: str) -> dict[str, Location]:
        """Return the renditions of one image by name. Raises `OutputError`; see `jobs.s3.names.rendition_paths`."""
        return rendition_paths(self.recipe, self.source, self.destination, key)

    def record_path(self, name: str) -> Location:
        """Return the name of the job's own file `name`."""
        return record_path(self.destination, self.id, name)

    def preview_path(self, key: str) -> Location:
        """Return the name of an image's preview: in the folder of the job under review."""
        return preview_path(self.destination, self.review_of or self.id, self.source.at(key))

    def to_fields(self) -> dict[str, str]:
        """Return the fields that describe the request; the ledger counts the rest."""
        always = ("name", "source", "destination", "model", "lane", "kind", "watch")
        fields = {name: str(getattr(self, name)) for name in always}
        fields |= {"recipe": self.recipe_json, "conditional": str(int(self.conditional))}
        optional = {name: getattr(self, name) for name in ("weight", "rate", "sample", *_TEXTS)}
        fields |= {name: str(value) for name, value in optional.items() if value not in (None, "")}
        return fields | {name: "1" for name in ("webhook_images", "list_in_background") if getattr(self, name)}

    @classmethod
    def from_fields(cls, job_id: str, fields: Mapping[str, str]) -> Job:
        """`fields`: what `to_fields` returned, and what the ledger added."""
        values: dict[str, Any] = {name: fields.get(name, "") for name in _TEXTS}
        values |= {name: name in fields for name in _FLAGS}
        values |= {name: int(fields.get(name, 0)) for name in _COUNTS}
        return cls(
            id=job_id,
            name=fields["name"],
            source=Location.parse(fields["source"]),
            destination=parse_destination(fields["destination"]),
            recipe_json=fields["recipe"],
            model=fields["model"],
            lane="live" if fields["lane"] == "live" else "backfill",
            kind=JobKind(fields.get("kind", JobKind.CUT)),
            conditional=fields["conditional"] == "1",
            created=float(fields["created"]),
            weight=int(fields.get("weight", 1)),
            rate=float(fields["rate"]) if "rate" in fields else None,
            sample=int(fields["sample"]) if "sample" in fields else None,
            closed=float(fields["closed"]) if "closed" in fields else None,
            paused=fields.get("paused"),
            cancelled="cancelled_at" in fields,
            cancelled_images=int(fields.get("cancelled", 0)),
            **values,
        )

    def summary(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        fields: dict[str, Any] = {"review_of": self.review_of} if self.review_of else {}
        fields |= {"job": self.id, "name": self.name, "state": str(self.state)}
        fields |= {name: getattr(self, name) for name in ("total", "open", "done", "failed", "skipped")}
        fields |= {"cancelled": self.cancelled_images, "review": self.review, "undelivered": self.undelivered}
        fields |= {"source": str(self.source), "destination": str(self.destination)}
        names = ("model", "lane", "weight", "rate", "created", "closed")
        return fields | {name: getattr(self, name) for name in names}


_TEXTS = ("watch", "selection", "webhook", "review_of")
_FLAGS = ("listed", "webhook_images", "list_in_background")
_COUNTS = (
    *("total", "cursor", "parts", "unrecorded", "undelivered", "done", "failed", "skipped", "review", "reopened"),
    *("window", "cancel_cursor", "spills", "acknowledged_final", "acknowledged_failed"),
)
