"""The one task: claim an image, fetch it, cut it out, publish, record. What an error means is decided here and
nowhere else.

Killed at any line, the image's lease ends and another worker does it again: publishing is conditional, recording counts
once, and an image whose results are there already is only recorded. One that two workers went down with is a suspect:
it comes on a queue of its own and is worked on alone (`workers/process/isolation.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from celery import Celery
from celery.exceptions import Reject

from jobs.broker import TASK_NAME
from jobs.catalogue import RENDER
from jobs.errors import (
    CutfleetError,
    DeviceLost,
    ImageError,
    ImageFailed,
    JobError,
    ServiceUnavailable,
    SettingsError,
    TransientError,
)
from jobs.job import Effort, Failure, ImageState, Job
from jobs.ledger import Claim, Ledger
from jobs.message import MAX_KEY_BYTES, BadMessage, ImageTask, LaterMessage, fits
from jobs.recipe import Recipe
from jobs.s3.client import (
    Location,
    Names,
    Store,
    image_names,
    preview_location,
    record_location,
    rendition_names,
    source_digest,
)
from jobs.settings import Settings
from workers.imaging.decode import Limits
from workers.imaging.pipeline import cut_out
from workers.models import LoadedModel
from workers.models.batcher import Predictor
from workers.process.crash_attribution import Accused, Fatal
from workers.process.image_context import Seat
from workers.process.isolation import DECODE_S, ChildDecoder, Room
from workers.process.leases import Draining, Leases
from workers.process.memory import MemoryBudget
from workers.process.metrics import WorkerMetrics
from workers.process.watchdog import Watchdog
from workers.tasks.preview import make_preview
from workers.tasks.publish import NOTHING, Outcome, Provenance, Target, find_existing, is_complete, outcome_of, publish
from workers.tasks.rerender import render_again

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_RETRY_PAUSE_S = 900.0
MAX_HOLD_PAUSE_S = 15.0
MAX_HOLD_S = 300.0
"""Then the image is given back: it may be this machine alone that can't reach S3 (network, clock, credentials)."""
PROBES = 3
INSIST_PAUSE_S = 0.5


class HeldTooLong(Exception):
    """S3 stayed away: another worker may have the image, no try used up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What every task of this process works with. `draining` is set once the worker is told to go."""

    settings: Settings
    node: str
    ledger: Ledger
    store: Store
    model: LoadedModel
    predictor: Predictor
    leases: Leases
    metrics: WorkerMetrics
    draining: threading.Event
    room: Room
    memory: MemoryBudget
    watchdog: Watchdog

    @functools.cached_property
    def limits(self) -> Limits:
        return Limits(
            max_pixels=int(self.settings.max_pixels_mp * 1e6), max_bytes=int(self.settings.max_bytes_mb * 1e6)
        )

    @functools.cached_property
    def child(self) -> ChildDecoder:
        return ChildDecoder(leaving=self.draining, deadline_s=DECODE_S)

    @functools.cached_property
    def find_job(self) -> Callable[[str], Job]:
        """What never changes of a job: source, destination, recipe, whether the store honours conditions. Raises
        `JobError` when there is none, `SettingsError` when a later version wrote its recipe."""

        def find(name: str) -> Job:
            job = self.ledger.job(name)
            Recipe.from_json(job.recipe)
            return job

        return functools.lru_cache(maxsize=256)(find)


def register(app: Celery, bench: Bench) -> None:
    """Makes `bench` do what arrives under the task's name."""

    @app.task(name=TASK_NAME, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]  # Celery has no types
    def image(self: Any, task: Mapping[str, Any]) -> str:
        queue = str(self.request.delivery_info["routing_key"])
        try:
            found = ImageTask.from_fields(task)
        except LaterMessage as exc:
            return _leave(exc, bench, lane=queue.partition(".")[0])
        except BadMessage as exc:
            return _refuse(task, exc, bench, lane=queue.partition(".")[0])
        return do_image(found, bench, alone=queue.startswith("suspect."))


def _leave(why: CutfleetError, bench: Bench, *, lane: str) -> str:
    """What a later version wrote is for its workers: this message is dropped, and the dispatcher publishes the image
    again when a lease has passed, until one of them takes it. No try is used up."""
    log.warning("left for a newer worker: %s", why, extra={"action": "image"})
    bench.metrics.ended(lane, "later", None)
    return "later"


def _refuse(fields: Mapping[str, Any], why: BadMessage, bench: Bench, *, lane: str) -> str:
    """No worker will ever read it, so the image that it names fails: published again, it would be refused for ever.
    Nothing is written: the claim is on no output's name."""
    log.error("refused: %s", why, extra={"action": "image", "code": why.code})
    if not fits("job", fields.get("job")) or not fits("index", fields.get("index")):
        return "gone"
    image = f"{fields['job']}:{fields['index']}"
    claim = bench.ledger.claim(image, token=uuid.uuid4().hex, output=image, lease_s=bench.leases.lease_s, alone=True)
    if claim.verdict != "go":
        return claim.verdict
    key = str(fields.get("key"))[:MAX_KEY_BYTES].encode(errors="replace").decode()
    failure = Failure(key, why.code, str(why), claim.tries + 1, time.time(), bench.node)
    outcome = _insist(lambda: bench.ledger.finish(claim, ImageState.FAILED, failure), bench)
    if outcome != "ok":
        return outcome
    bench.metrics.ended(lane, "failed", why.code)
    raise ImageFailed(why.code)


def do_image(task: ImageTask, bench: Bench, *, alone: bool) -> str:
    """`alone`: it comes as a suspect, so that nothing is to run beside it. Returns the outcome for Flower. Raises
    `ImageFailed` after a failure is recorded, `Reject` when this worker can't take it now."""
    if bench.draining.is_set():
        raise Reject("draining", requeue=True)
    with bench.room.alone() if alone else bench.room.shared() as entered:
        if not entered:
            raise Reject("draining, or busy with a suspect", requeue=True)
        return _do_image(task, bench, alone=alone)


def _do_image(task: ImageTask, bench: Bench, *, alone: bool) -> str:
    started = time.monotonic()
    try:
        job = bench.find_job(task.job)
    except JobError:
        return "gone"
    except SettingsError as exc:
        return _leave(exc, bench, lane=task.lane)
    names = image_names(job.source, job.destination, task.key)
    token, lease_s = uuid.uuid4().hex, bench.leases.lease_s
    claim = bench.ledger.claim(task.id, token=token, output=str(names.cutout), lease_s=lease_s, alone=alone)
    bench.metrics.claimed(claim, task.lane)
    if claim.verdict != "go":
        return claim.verdict
    with bench.leases.hold(claim):
        outcome, error = _settle(task, job, names, claim, bench, alone=alone)
    bench.metrics.ended(task.lane, outcome, error.code if error else None)
    facts = {"action": "image", "job": task.job, "image": task.index, "key": task.key, "attempt": claim.tries + 1}
    seconds = round(time.monotonic() - started, 3)
    if error is None:
        log.info(outcome, extra=facts | {"seconds": seconds})
        return outcome
    log.warning("%s: %s", outcome, error, extra=facts | {"seconds": seconds, "code": error.code})
    if outcome == "failed":
        raise ImageFailed(error.code)
    return outcome


def _settle(
    task: ImageTask, job: Job, names: Names, claim: Claim, bench: Bench, *, alone: bool
) -> tuple[str, CutfleetError | None]:
    """Does the image and records what became of it."""
    clock = _Share(bench.leases)
    accused = Accused(claim=claim, key=task.key, worker=bench.node, lease_s=bench.leases.lease_s, alone=alone)

    def blame(error: Fatal) -> tuple[str, CutfleetError | None]:
        return _insist(lambda: accused.blame(error, bench.ledger), bench), accused.told(error)

    seat = Seat(
        accused=accused,
        live=task.lane == "live",
        blame=blame,
        mark=lambda begins: _insist(lambda: bench.ledger.compute_alone(claim, begins=begins), bench),
        memory=bench.memory,
        watchdog=bench.watchdog,
        predictor=bench.predictor,
        child=bench.child,
        limits=bench.limits,
    )
    try:
        _check_places(task, job, names, bench.store)
        do = _preview if job.review_of else _render_and_publish if job.model == RENDER else _cut_and_publish
        state, remark = _hold_while_store_is_away(lambda: do(task, job, names, seat, bench), job, bench)
    except (Draining, HeldTooLong):
        return _give_back(claim, bench), None
    except Fatal as exc:
        return blame(exc)
    except MemoryError:
        return blame(Fatal("The worker's memory ran out while it was computed.", code="memory_exhausted"))
    except DeviceLost as exc:  # the process ends (`workers/process/watchdog.py`); this says with which image
        return blame(Fatal(str(exc), code="crashed_device")) if exc.on_device else (_give_back(claim, bench), exc)
    except ImageError as exc:
        return _fail(task, claim, exc, bench)
    except TransientError as exc:
        return _try_later(task, claim, exc, bench)
    except Exception as exc:
        log.exception("a bug, or a fault nobody thought of", extra={"action": "image", "image": task.id})
        return _try_later(task, claim, TransientError(f"{type(exc).__name__}: {exc}", code="internal"), bench)
    effort = Effort(_made_by(job, bench), 0.0 if state is ImageState.SKIPPED else clock.read_s())
    recorded = _insist(lambda: bench.ledger.finish(claim, state, remark=remark, effort=effort), bench)
    return (state.name.lower() if recorded == "ok" else recorded), None


def _check_places(task: ImageTask, job: Job, names: Names, store: Store) -> None:
    """Neither message nor ledger is to be trusted: who may write to Redis may not have anything read or written. Raises
    `BadMessage`, `SourceError` or `OutputError`."""
    if not str(names.source).startswith(str(Location.parse(job.source))):
        raise BadMessage(f"The message names {task.key!r}, which is not under its job's source {job.source}.")
    store.check(names.source, "source")
    for place in (names.cutout, names.mask):
        store.check(place, "output")


def _target(task: ImageTask, job: Job, names: Names, store: Store) -> Target:
    recipe = Recipe.from_json(job.recipe)
    places = rendition_names(recipe, job.source, job.destination, task.key)
    for place in places.values():
        store.check(place, "output")
    return Target(names=names, renditions=places, recipe=recipe, conditional=job.conditional)


def _cut_and_publish(task: ImageTask, job: Job, names: Names, seat: Seat, bench: Bench) -> Outcome:
    """The story: what is there, fetch, cut out, publish."""
    target = _target(task, job, names, bench.store)
    recipe = target.recipe
    existing = NOTHING if _is_new(task, job, seat.accused.claim) else find_existing(target, bench.store)
    if existing.cutout is not None:
        provenance = _provenance(task, recipe, names, bench, etag=task.etag or _etag_now(names, bench.store))
        if is_complete(existing, provenance, target, bench.store):
            return existing.outcome(job.id, task.key)
    with bench.metrics.stage("fetch"):
        data, etag = bench.store.get(
            names.source, role="source", etag=task.etag, max_bytes=int(bench.settings.max_bytes_mb * 1e6)
        )
    if bench.draining.is_set():
        raise Draining
    provenance = _provenance(task, recipe, names, bench, etag=etag)
    with seat.room(data):
        with seat.computing():
            text, limits = provenance.to_text(), bench.limits
            outputs = cut_out(data, recipe, seat, limits=limits, live=seat.live, text=text, decode=seat.decode)
        bench.metrics.stages(outputs.seconds)
        with bench.metrics.stage("publish"):
            publish(
                outputs,
                target,
                provenance,
                store=bench.store,
                existing=existing,
                is_ours=lambda: bench.leases.is_ours(seat.accused.claim),
            )
        return outcome_of(outputs.remark(task.key))


def _render_and_publish(task: ImageTask, job: Job, names: Names, seat: Seat, bench: Bench) -> Outcome:
    target = _target(task, job, names, bench.store)
    return render_again(
        task,
        target,
        seat,
        store=bench.store,
        limits=bench.limits,
        is_ours=lambda: bench.leases.is_ours(seat.accused.claim),
    )


def _preview(task: ImageTask, job: Job, names: Names, seat: Seat, bench: Bench) -> Outcome:
    """Whatever can't be shown is said in the preview: an image that failed is one to look at, too."""
    shown = make_preview(task, job, names, seat, store=bench.store, limits=bench.limits)
    place = preview_location(job.destination, job.review_of, names.source)
    bench.store.put(place, shown.to_json().encode(), content_type="application/json")
    return ImageState.DONE, None


def _provenance(task: ImageTask, recipe: Recipe, names: Names, bench: Bench, *, etag: str) -> Provenance:
    model = bench.model
    return Provenance(
        source=source_digest(names.source),
        source_etag=etag,
        fingerprint=recipe.fingerprint(model_revision=model.revision, input_size=model.input_size),
        model=model.name,
        revision=model.revision,
        licence=model.terms,
        job=task.job,
    )


def _is_new(task: ImageTask, job: Job, claim: Claim) -> bool:
    """The listing saw no cutout, and nobody has tried since. What is there after all, a conditional write finds out:
    the image is tried again, and looked for then."""
    return task.hint == "new" and job.conditional and not claim.tries and not claim.vanished


class _Share:
    """The time of one image, shared with those that the worker holds beside it: of all images together, as long as the
    worker has any."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._began, self._held = time.monotonic(), leases.in_flight()

    def read_s(self) -> float:
        beside = (self._held + self._leases.in_flight()) / 2
        return (time.monotonic() - self._began) / max(1.0, beside)


def _made_by(job: Job, bench: Bench) -> str:
    """Empty of renditions made again: their cutouts may come from several models."""
    if job.model == RENDER:
        return ""
    recipe = Recipe.from_json(job.recipe)
    return recipe.fingerprint(model_revision=bench.model.revision, input_size=bench.model.input_size)


def _etag_now(names: Names, store: Store) -> str:
    found = store.head(names.source, role="source")
    return found.etag if found else ""


def _give_back(claim: Claim, bench: Bench) -> str:
    given_back = _insist(lambda: bench.ledger.release(claim, lease_s=bench.leases.lease_s), bench)
    return "released" if given_back == "ok" else given_back


def _fail(task: ImageTask, claim: Claim, error: CutfleetError, bench: Bench) -> tuple[str, CutfleetError | None]:
    failure = Failure(task.key, error.code, str(error), claim.tries + 1, time.time(), bench.node)
    recorded = _insist(lambda: bench.ledger.finish(claim, ImageState.FAILED, failure), bench)
    return ("failed", error) if recorded == "ok" else (recorded, None)


def _try_later(task: ImageTask, claim: Claim, error: TransientError, bench: Bench) -> tuple[str, CutfleetError | None]:
    """Full jitter: a random share of a pause that doubles with each try, so that many do not come back at once."""
    if claim.tries + 1 >= bench.settings.max_tries:
        return _fail(task, claim, error, bench)
    longest = min(MAX_RETRY_PAUSE_S, bench.settings.retry_base_s * 2**claim.tries)
    pause_s = random.uniform(0, longest)  # noqa: S311  (spreads load, keeps no secret)
    _insist(lambda: bench.ledger.defer(claim, pause_s=pause_s), bench)
    return "deferred", error


def _hold_while_store_is_away(work: Callable[[], T], job: Job, bench: Bench) -> T:
    """When S3 as a whole fails, no image is to blame: keep the lease, wait, and use up no try."""
    pause_s, give_up = 1.0, time.monotonic() + MAX_HOLD_S
    while True:
        try:
            return work()
        except (ServiceUnavailable, TransientError) as exc:
            if not _is_away(exc, job, bench.store):
                raise TransientError(str(exc), code=exc.code) from exc
            log.error("holding: %s", exc, extra={"action": "hold", "code": exc.code})
            if bench.draining.wait(pause_s):
                raise Draining from exc
            if time.monotonic() > give_up:
                raise HeldTooLong from exc
            pause_s = min(2 * pause_s, MAX_HOLD_PAUSE_S)


def _is_away(error: CutfleetError, job: Job, store: Store) -> bool:
    """Whether it is a service that fails, and not one of its objects: source and destination are asked for something
    else, several times, since a store that is overloaded answers now and then."""
    if not error.code.startswith("store_"):
        return isinstance(error, ServiceUnavailable)
    source, results = Location.parse(job.source), record_location(job.destination, job.id, "")
    return not all(
        store.answers(source, role="source") and store.answers(results, role="output") for _ in range(PROBES)
    )


def _insist(record: Callable[[], str], bench: Bench) -> str:
    """Redis may be away for a moment. After a lease nobody waits for our word: the image is done again, cheaply."""
    deadline = time.monotonic() + bench.leases.lease_s
    while True:
        try:
            return record()
        except ServiceUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(INSIST_PAUSE_S)
