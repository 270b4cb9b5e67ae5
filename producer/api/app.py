"""The HTTP API: images are asked for, followed, cancelled and fetched, each caller within its own prefixes.

202 only once the ledger has the request. Errors are as `producer/api/errors.py` says; `/docs` and `/openapi.json` describe
every call.
"""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from jobs.errors import SettingsError
from jobs.job import Job
from jobs.ledger import MAX_LIVE, Ledger
from jobs.message import MAX_KEY_BYTES, Lane
from jobs.recipe import load_recipe, recipe_names
from jobs.s3.client import Location, Store
from jobs.settings import Settings
from producer.api import service as requests
from producer.api.auth import Caller, Callers
from producer.api.background_listing import Lister
from producer.records.report import ImageStatus, image_status
from producer.submission.submit import Request as Submission
from producer.submission.submit import check_length
from producer.webhooks.delivery import check_webhook

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints

    from producer.api import errors as answers
except ImportError as exc:
    raise SettingsError("To serve the API: pip install 'cutfleet[api]'.") from exc

log = logging.getLogger(__name__)

PAGE = 100

S3Uri = Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9.-]{3,63}/[^\x00-\x1f]*$", max_length=1100)]
Key = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=MAX_KEY_BYTES)]
JobId = Annotated[str, Path(pattern=r"^[0-9a-z-]{1,64}$")]
State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"]


class ImagesRequest(BaseModel):
    """Everything under `source`, or the keys named (complete, as S3 lists them)."""

    model_config = ConfigDict(extra="forbid")

    source: S3Uri
    destination: S3Uri
    keys: list[Key] | None = Field(None, min_length=1, max_length=MAX_LIVE)
    lane: Lane = Field("live", description=f"More than {MAX_LIVE:,} images are a backfill in any case.")
    recipe: str = Field("default", max_length=64, description="A built-in recipe: `cutfleet recipes`.")
    webhook_url: str = Field("", max_length=2000, description="Told, signed, when the request is completed.")


class Status(BaseModel):
    """COMPLETED: every image is final, and each has its own state in the results. Failures are no error here.
    `total` grows while a large prefix is listed. `waits`: why nothing goes on, until the operator sees to it.
    """

    request_id: str
    status: State
    status_url: str
    response_url: str
    cancel_url: str
    waits: str | None
    total: int
    done: int
    failed: int
    skipped: int
    cancelled: int


class Results(BaseModel):
    """`next`: the `first` of the next page; none behind the last."""

    request_id: str
    status: State
    images: list[requests.Result]
    next: int | None = None


class Health(BaseModel):
    status: Literal["ok"]


class Services:
    """What a request needs; one for the process, shared by its threads."""

    def __init__(self, settings: Settings, ledger: Ledger, store: Store) -> None:
        """Raises `SettingsError` for a bad file of keys."""
        self.settings = settings
        self.ledger = ledger
        self.store = store
        self.callers = Callers(settings.api_keys)

    def job(self, job_id: str, caller: Caller) -> Job:
        """Raises `JobError` when there is none, `Forbidden` when it is not the caller's."""
        job = self.ledger.job(job_id)
        caller.check(source=job.source, destination=job.destination)
        return job


def _services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


Using = Annotated[Services, Depends(_services)]
_BEARER = HTTPBearer(auto_error=False, description="`Authorization: Bearer KEY`")


def _caller(services: Using, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> Caller:
    caller = services.callers.find(shown.credentials) if shown else None
    if caller is None:
        raise answers.Unauthorized("Send an API key: Authorization: Bearer KEY.")
    requests.spend(caller, services.ledger)
    return caller


By = Annotated[Caller, Depends(_caller)]

api = FastAPI(
    title="Cutfleet",
    description="ImagesRequest in S3 become cutouts and masks.",
    version="1",
    redirect_slashes=False,
)
answers.add_to(api)


@api.post(
    "/v1/requests",
    status_code=202,
    operation_id="submit",
    responses=answers.PROBLEMS | answers.CONFLICT | answers.LARGE | answers.LINKS,
)
def submit(
    body: ImagesRequest,
    by: By,
    using: Using,
    response: Response,
    idempotency_key: Annotated[str, Header(max_length=255, pattern=r"^[\x21-\x7e]*$")] = "",
) -> Status:
    """Has images cut out. With the same Idempotency-Key and body, within a day, the same request."""
    by.check(source=body.source, destination=body.destination)
    for key in body.keys or ():
        by.check(source=str(Location(Location.parse(body.source).bucket, key)))
    if body.recipe not in recipe_names():
        raise SettingsError(f"There is no recipe of that name: {', '.join(recipe_names())}.", code="recipe_unknown")
    if body.webhook_url:
        check_webhook(body.webhook_url, using.settings)
    submission = Submission(
        source=body.source,
        destination=body.destination,
        recipe=load_recipe(body.recipe, model=using.settings.model),
        lane=body.lane,
        name=f"api {by.name}",
        keys=None if body.keys is None else tuple(body.keys),
        webhook=body.webhook_url,
    )
    job_id = requests.reserve(by, idempotency_key, body.model_dump(), using.ledger)
    job = requests.submit(submission, job_id, store=using.store, ledger=using.ledger, lease_s=using.settings.lease_s)
    log.info("submitted", extra={"action": "api", "job": job.id, "images": job.total, "key": by.name})
    status = _status(job)
    response.headers["Location"] = status.status_url
    return status


@api.get("/v1/requests/{request_id}/status", operation_id="status", responses=answers.PROBLEMS | answers.GONE)
def status(request_id: JobId, by: By, using: Using) -> Status:
    """What became of a request so far."""
    return _status(using.job(request_id, by))


@api.get(
    "/v1/requests/{request_id}",
    operation_id="results",
    responses=answers.PROBLEMS | answers.GONE,
    response_model_exclude_none=True,
)
def results(
    request_id: JobId,
    by: By,
    using: Using,
    first: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
) -> Results:
    """Each image of a request, and where its results are."""
    job = using.job(request_id, by)
    rows = requests.results(job, first=first, limit=limit, store=using.store, ledger=using.ledger)
    end = first + len(rows)
    more = rows and (end < job.total or not job.listed)
    return Results(request_id=job.id, status=_state(job), images=rows, next=end if more else None)


@api.put(
    "/v1/requests/{request_id}/cancel",
    status_code=202,
    operation_id="cancel",
    responses=answers.PROBLEMS | answers.GONE | answers.CONFLICT,
)
def cancel(request_id: JobId, by: By, using: Using) -> Status:
    """ImagesRequest in work end, the others become cancelled; what is done stays."""
    job = using.job(request_id, by)
    requests.cancel(job, using.ledger)
    return _status(using.ledger.job(job.id))


@api.get("/v1/images", responses=answers.PROBLEMS, response_model_exclude_none=True)
def image(source: Annotated[S3Uri, Query()], by: By, using: Using) -> ImageStatus:
    """What became of one source image, by whichever job; `unknown` when none has it."""
    by.check(source=source)
    check_length(Location.parse(source))
    found = image_status(Location.parse(source), ledger=using.ledger, store=using.store)
    if found.job is not None:
        by.check(destination=using.ledger.job(found.job).destination)
    return found


@api.get("/healthz")
def health() -> Health:
    """The process is alive."""
    return Health(status="ok")


@api.get("/readyz", responses={503: answers.PROBLEMS[503]})
def ready(using: Using) -> Health:
    """Redis and S3 answer."""
    using.ledger.ping()
    using.store.ping()
    return Health(status="ok")


def _state(job: Job) -> State:
    if job.listed and not job.open:
        return "CANCELLED" if job.cancelled else "COMPLETED"
    return "IN_PROGRESS" if job.final else "IN_QUEUE"


def _status(job: Job) -> Status:
    url = f"/v1/requests/{job.id}"
    return Status(
        request_id=job.id,
        status=_state(job),
        status_url=f"{url}/status",
        response_url=url,
        cancel_url=f"{url}/cancel",
        waits=job.paused,
        total=job.total,
        done=job.done,
        failed=job.failed,
        skipped=job.skipped,
        cancelled=job.cancelled_images,
    )


def serve(listen: str, settings: Settings, ledger: Ledger, store: Store) -> None:
    """Until it is told to stop (SIGTERM); requests under way are answered."""
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65_535:
        raise SettingsError("Say where to listen: HOST:PORT.")
    api.state.services = Services(settings, ledger, store)
    with Lister(ledger, store):
        uvicorn.run(
            api, host=host or "127.0.0.1", port=int(port), log_config=None, access_log=False, server_header=False
        )
