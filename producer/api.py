"""The HTTP API: pictures are asked for, followed, cancelled and fetched, each caller within its own prefixes.

202 only once the ledger has the request; 503 with `Retry-After` while Redis or S3 is away; errors as
`{"status", "code", "detail"}` with our stable codes. `/docs` and `/openapi.json` describe it.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from jobs.errors import CutfleetError, ImageError, JobError, ServiceUnavailable, SettingsError, TransientError
from jobs.job import Job
from jobs.ledger import MAX_LIVE, Ledger
from jobs.message import MAX_KEY_BYTES
from jobs.recipe import load_recipe, recipe_names
from jobs.settings import Settings
from jobs.store import Location, Store
from producer import requests
from producer.access import Caller, Callers, Forbidden
from producer.report import picture_status
from producer.submit import Request as Submission
from producer.webhooks import check_webhook

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as exc:
    raise SettingsError("To serve the API: pip install 'cutfleet[api]'.") from exc

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2_000_000
"""`MAX_LIVE` keys of 1,024 bytes each, quoted, and some more."""
RETRY_AFTER_S = 5
PAGE = 100

S3Uri = Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9.-]{3,63}/[^\x00-\x1f]*$", max_length=1100)]
Key = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$", max_length=MAX_KEY_BYTES)]
JobId = Annotated[str, Path(pattern=r"^[0-9a-z-]{1,64}$")]


class Problem(BaseModel):
    """`code` never changes once released."""

    status: int
    code: str
    detail: str


class Pictures(BaseModel):
    """Everything under `source`, or the keys named (complete, as S3 lists them)."""

    model_config = ConfigDict(extra="forbid")

    source: S3Uri
    destination: S3Uri
    keys: list[Key] | None = Field(None, min_length=1, max_length=MAX_LIVE)
    recipe: str = Field("default", max_length=64, description="A built-in recipe: `cutfleet recipes`.")
    webhook_url: str = Field("", max_length=2000, description="Told, signed, when the request is completed.")


class Status(BaseModel):
    """COMPLETED: every picture is final, and each has its own state in the results. Failures are no error here."""

    request_id: str
    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"]
    status_url: str
    response_url: str
    cancel_url: str
    total: int
    done: int
    failed: int
    skipped: int
    cancelled: int


class Result(BaseModel):
    """`cutout_url`, `mask_url`: links that anybody may fetch for an hour."""

    index: int
    source: str
    state: Literal["open", "done", "failed", "skipped", "cancelled", "review"]
    cutout_url: str | None = None
    mask_url: str | None = None
    code: str | None = None
    message: str | None = None


class Results(BaseModel):
    """`next`: the `first` of the next page; none behind the last."""

    request_id: str
    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"]
    pictures: list[Result]
    next: int | None = None


class Picture(BaseModel):
    source: str
    state: str
    job: str | None = None
    cutout: str | None = None
    mask: str | None = None
    code: str | None = None
    message: str | None = None


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


class Unauthorized(CutfleetError):
    code = "unauthorized"


def _services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


Using = Annotated[Services, Depends(_services)]
_BEARER = HTTPBearer(auto_error=False, description="`Authorization: Bearer KEY`")


def _caller(services: Using, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> Caller:
    caller = services.callers.find(shown.credentials) if shown else None
    if caller is None:
        raise Unauthorized("Send an API key: Authorization: Bearer KEY.")
    requests.spend(caller, services.ledger)
    return caller


By = Annotated[Caller, Depends(_caller)]
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "The request can't be read.",
        401: "No key, or none of ours.",
        403: "The key has no right to it.",
        422: "It makes no sense; the code says what.",
        429: "Too many requests of this key; `Retry-After` says when to come again.",
        503: "Redis or S3 is away; `Retry-After` says when to come again.",
    }.items()
}
_GONE: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such request."}}
_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": Problem, "description": "It does not go with what was asked before."}
}
_LARGE: dict[int | str, dict[str, Any]] = {413: {"model": Problem, "description": f"More than {MAX_BODY_BYTES} bytes."}}

api = FastAPI(
    title="Cutfleet",
    description="Pictures in S3 become cutouts and masks.",
    version="1",
    redirect_slashes=False,
)


@api.post("/v1/requests", status_code=202, responses=_PROBLEMS | _CONFLICT | _LARGE)
def submit(
    body: Pictures,
    by: By,
    using: Using,
    response: Response,
    idempotency_key: Annotated[str, Header(max_length=255, pattern=r"^[\x21-\x7e]*$")] = "",
) -> Status:
    """Has pictures cut out. With the same Idempotency-Key and body, within a day, the same request."""
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
        lane="live",
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


@api.get("/v1/requests/{request_id}/status", responses=_PROBLEMS | _GONE)
def status(request_id: JobId, by: By, using: Using) -> Status:
    """What became of a request so far."""
    return _status(using.job(request_id, by))


@api.get("/v1/requests/{request_id}", responses=_PROBLEMS | _GONE, response_model_exclude_none=True)
def results(
    request_id: JobId,
    by: By,
    using: Using,
    first: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
) -> Results:
    """Each picture of a request, and where its results are."""
    job = using.job(request_id, by)
    rows = requests.results(job, first=first, limit=limit, store=using.store, ledger=using.ledger)
    end = first + len(rows)
    return Results(
        request_id=job.id,
        status=_state(job),
        pictures=[Result(**row) for row in rows],
        next=end if rows and end < job.total else None,
    )


@api.put("/v1/requests/{request_id}/cancel", status_code=202, responses=_PROBLEMS | _GONE | _CONFLICT)
def cancel(request_id: JobId, by: By, using: Using) -> Status:
    """Pictures in work end, the others become cancelled; what is done stays."""
    job = using.job(request_id, by)
    requests.cancel(job, using.ledger)
    return _status(using.ledger.job(job.id))


@api.get("/v1/pictures", responses=_PROBLEMS, response_model_exclude_none=True)
def picture(source: Annotated[S3Uri, Query()], by: By, using: Using) -> Picture:
    """What became of one source picture, by whichever job; `unknown` when none has it."""
    by.check(source=source)
    found = picture_status(Location.parse(source), ledger=using.ledger, store=using.store)
    if found.job is not None:
        by.check(destination=using.ledger.job(found.job).destination)
    return Picture(**found.summary())


@api.get("/healthz")
def health() -> Health:
    """The process is alive."""
    return Health(status="ok")


@api.get("/readyz", responses={503: _PROBLEMS[503]})
def ready(using: Using) -> Health:
    """Redis and S3 answer."""
    using.ledger.ping()
    using.store.ping()
    return Health(status="ok")


@api.exception_handler(CutfleetError)
def _ours(_: Request, exc: CutfleetError) -> Response:
    if isinstance(exc, requests.TooMany):
        return _problem(429, exc.code, str(exc), {"Retry-After": str(exc.wait_s)})
    if isinstance(exc, (ServiceUnavailable, TransientError)):
        log.error("sent back: %s", exc, extra={"action": "api", "code": exc.code})
        return _problem(503, exc.code, "Redis or S3 is away: come again.", {"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(exc, Unauthorized):
        return _problem(401, exc.code, str(exc), {"WWW-Authenticate": "Bearer"})
    if isinstance(exc, Forbidden):
        return _problem(403, exc.code, str(exc))
    if isinstance(exc, requests.Conflict) or exc.code == "job_closed":
        return _problem(409, exc.code, str(exc))
    if isinstance(exc, JobError):
        return _problem(404, exc.code, "There is no such request.")
    if isinstance(exc, (SettingsError, ImageError)):
        return _problem(422, exc.code, str(exc))
    raise exc  # a bug


@api.exception_handler(RequestValidationError)
def _invalid(_: Request, exc: RequestValidationError) -> Response:
    wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
    return _problem(422, "invalid", wrong)


@api.exception_handler(HTTPException)
def _plain(_: Request, exc: HTTPException) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "unreadable")
    return _problem(exc.status_code, code, str(exc.detail), dict(exc.headers or {}))


def _problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"status": status, "code": code, "detail": detail}, status, headers)


def _state(job: Job) -> Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"]:
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
        total=job.total,
        done=job.done,
        failed=job.failed,
        skipped=job.skipped,
        cancelled=job.cancelled_images,
    )


class _Bounded:
    """Reads a body, up to the limit, before anybody works on it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                answer = _problem(413, "body_too_large", f"A request has at most {MAX_BODY_BYTES:,} bytes.")
                await answer(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, again, send)


api.add_middleware(_Bounded)


def serve(listen: str, settings: Settings, ledger: Ledger, store: Store) -> None:
    """Until it is told to stop (SIGTERM); requests under way are answered."""
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65_535:
        raise SettingsError("Say where to listen: HOST:PORT.")
    api.state.services = Services(settings, ledger, store)
    uvicorn.run(api, host=host or "127.0.0.1", port=int(port), log_config=None, access_log=False, server_header=False)
