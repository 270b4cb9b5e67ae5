"""Bodies of the HTTP API's requests and responses. Field names never change once released."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from jobs.ledger.jobs import MAX_LIVE
from jobs.message import Lane
from jobs.s3.location import MAX_KEY_BYTES

S3Uri = Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9.-]{3,63}/[^\x00-\x1f]*$", max_length=1100)]
Key = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=MAX_KEY_BYTES)]
RequestState = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"]


class ImagesRequest(BaseModel):
    """All images under `source`, or only `keys` (complete keys, as S3 lists them)."""

    model_config = ConfigDict(extra="forbid")

    source: S3Uri
    destination: S3Uri
    keys: list[Key] | None = Field(None, min_length=1, max_length=MAX_LIVE)
    lane: Lane = Field("live", description=f"A request of more than {MAX_LIVE:,} images is always a backfill.")
    recipe: str = Field("default", max_length=64, description="A built-in recipe: see `cutfleet recipes`.")
    webhook_url: str = Field("", max_length=2000, description="Receives a signed POST when the request is completed.")


class Status(BaseModel):
    """COMPLETED: every image is final; the results have the state of each, and failed images do not change this status.
    `total` grows while a large prefix is listed. `waits`: why the request is paused, until the operator unpauses it.
    """

    request_id: str
    status: RequestState
    status_url: str
    response_url: str
    cancel_url: str
    waits: str | None
    total: int
    done: int
    failed: int
    skipped: int
    cancelled: int


class Result(BaseModel):
    """One image. `cutout_url`, `mask_url`, `renditions` (by name): links that need no key and last an hour."""

    index: int
    source: str
    state: Literal["open", "done", "failed", "skipped", "cancelled", "review"]
    cutout_url: str | None = None
    mask_url: str | None = None
    renditions: dict[str, str] | None = None
    code: str | None = None
    message: str | None = None


class Results(BaseModel):
    """`next`: the `first` of the next page; absent after the last."""

    request_id: str
    status: RequestState
    images: list[Result]
    next: int | None = None


class Health(BaseModel):
    status: Literal["ok"]


class Problem(BaseModel):
    """`code` never changes once released."""

    status: int
    code: str
    detail: str
