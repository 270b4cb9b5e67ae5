"""The HTTP API: submit images, follow and cancel requests, fetch results. Each API key is limited to its own prefixes.

202 is sent only once the ledger has the request. `producer/api/errors.py` lists the errors; `/docs` and `/openapi.json`
describe every call.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated

from jobs.errors import JobClosed, SettingsError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import load_recipe, recipe_names
from jobs.s3.client import Store
from jobs.s3.location import Location, parse_destination
from jobs.settings import Settings
from producer.records.image_status import ImageStatus, find_image_status
from producer.submission.request import Request as Submission
from producer.submission.validation import check_length
from producer.webhooks.delivery import check_webhook

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

    from producer.api import errors, service
    from producer.api.auth import ApiKey, ApiKeys, Unauthorized
    from producer.api.background_listing import BackgroundLister
    from producer.api.models import Health, ImagesRequest, RequestState, Results, S3Uri, Status
except ImportError as exc:
    raise SettingsError("To serve the API: pip install 'cutfleet[api]'.") from exc

log = logging.getLogger(__name__)

PAGE_IMAGES = 100

JobId = Annotated[str, Path(pattern=r"^[0-9a-z-]{1,64}$")]


@dataclasses.dataclass(frozen=True)
class Services:
    """What all calls share; safe for threads."""

    settings: Settings
    ledger: Ledger
    store: Store
    api_keys: ApiKeys

    def job(self, job_id: str, api_key: ApiKey) -> Job:
        """Raises `JobError` for an unknown job, `Forbidden` for one outside the key's prefixes."""
        job = self.ledger.jobs.get(job_id)
        api_key.check_source(job.source)
        api_key.check_destination(job.destination)
        return job


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
_BEARER = HTTPBearer(auto_error=False, description="`Authorization: Bearer KEY`")


def _api_key(
    services: ServicesDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> ApiKey:
    api_key = services.api_keys.find(credentials.credentials) if credentials else None
    if api_key is None:
        raise Unauthorized("Send an API key: Authorization: Bearer KEY.")
    service.count_call(api_key, services.ledger)
    return api_key


ApiKeyDep = Annotated[ApiKey, Depends(_api_key)]

api = FastAPI(
    title="Cutfleet", description="Makes cutouts and masks of images in S3.", version="1", redirect_slashes=False
)
errors.add_to(api)


@api.post(
    "/v1/requests",
    status_code=202,
    operation_id="submit",
    responses=errors.COMMON | errors.responses(409, 413) | errors.LINKS,
)
def submit(
    body: ImagesRequest,
    api_key: ApiKeyDep,
    services: ServicesDep,
    response: Response,
    idempotency_key: Annotated[str, Header(max_length=255, pattern=r"^[\x21-\x7e]*$")] = "",
) -> Status:
    """Submit images. The same Idempotency-Key and body, within a day, return the same request."""
    submission = _submission(body, api_key, services.settings)
    job_id = service.reserve_job_id(api_key, idempotency_key, body.model_dump(), services.ledger)
    job = service.submit(
        submission, job_id, store=services.store, ledger=services.ledger, lease_s=services.settings.lease_s
    )
    log.info("submitted", extra={"action": "api", "job": job.id, "images": job.total, "key": api_key.name})
    status = _status(job)
    response.headers["Location"] = status.status_url
    return status


@api.get("/v1/requests/{request_id}/status", operation_id="status", responses=errors.COMMON | errors.responses(404))
def status(request_id: JobId, api_key: ApiKeyDep, services: ServicesDep) -> Status:
    """Return the status of a request."""
    return _status(services.job(request_id, api_key))


@api.get(
    "/v1/requests/{request_id}",
    operation_id="results",
    responses=errors.COMMON | errors.responses(404),
    response_model_exclude_none=True,
)
def results(
    request_id: JobId,
    api_key: ApiKeyDep,
    services: ServicesDep,
    first: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=PAGE_IMAGES)] = PAGE_IMAGES,
) -> Results:
    """Return the images of a request: state, links to the outputs, or the error."""
    job = services.job(request_id, api_key)
    images = service.read_results(job, first=first, limit=limit, store=services.store, ledger=services.ledger)
    end = first + len(images)
    has_more = images and (end < job.total or not job.listed)
    return Results(request_id=job.id, status=_state(job), images=images, next=end if has_more else None)


@api.put(
    "/v1/requests/{request_id}/cancel",
    status_code=202,
    operation_id="cancel",
    responses=errors.COMMON | errors.responses(404, 409),
)
def cancel(request_id: JobId, api_key: ApiKeyDep, services: ServicesDep) -> Status:
    """Cancel a request: images in work finish, all other open ones become cancelled; outputs stay."""
    job = services.job(request_id, api_key)
    if not services.ledger.jobs.cancel(job.id):
        raise JobClosed(f"Request {job.id} is completed: there is nothing to cancel.")
    return _status(services.ledger.jobs.get(job.id))


@api.get("/v1/images", responses=errors.COMMON, response_model_exclude_none=True)
def image(source: Annotated[S3Uri, Query()], api_key: ApiKeyDep, services: ServicesDep) -> ImageStatus:
    """Return the status of one source image, in any job; `unknown` when no job covers it."""
    location = Location.parse(source)
    api_key.check_source(location)
    check_length(location)
    found = find_image_status(location, ledger=services.ledger, store=services.store)
    if found.job is not None:
        api_key.check_destination(services.ledger.jobs.get(found.job).destination)
    return found


@api.get("/healthz")
def health() -> Health:
    """The process runs."""
    return Health(status="ok")


@api.get("/readyz", responses=errors.responses(503))
def ready(services: ServicesDep) -> Health:
    """Redis and S3 answer."""
    services.ledger.ping()
    services.store.ping()
    return Health(status="ok")


def _submission(body: ImagesRequest, api_key: ApiKey, settings: Settings) -> Submission:
    source, destination = Location.parse(body.source), parse_destination(body.destination)
    api_key.check_source(source)
    api_key.check_destination(destination)
    for key in body.keys or ():
        api_key.check_source(source.at(key))
    if body.recipe not in recipe_names():  # not a path: a caller must not read files of this machine
        names = ", ".join(recipe_names())
        raise SettingsError(f"There is no recipe of that name; known: {names}.", code="recipe_unknown")
    if body.webhook_url:
        check_webhook(body.webhook_url, settings)
    return Submission(
        source=source,
        destination=destination,
        recipe=load_recipe(body.recipe, model=settings.model),
        lane=body.lane,
        name=f"api {api_key.name}",
        keys=None if body.keys is None else tuple(body.keys),
        webhook=body.webhook_url,
    )


def _state(job: Job) -> RequestState:
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
    """Serve until SIGTERM, then finish the calls in progress. Raises `SettingsError` for an invalid address or file of
    API keys."""
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65_535:
        raise SettingsError(f"--listen must be HOST:PORT (is {listen!r}).")
    api.state.services = Services(settings, ledger, store, ApiKeys(settings.api_keys))
    with BackgroundLister(ledger, store):
        uvicorn.run(
            api, host=host or "127.0.0.1", port=int(port), log_config=None, access_log=False, server_header=False
        )
