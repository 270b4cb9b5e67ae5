"""Does the work of workers and dispatchers through the ledger, in the test's own process."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from jobs.envelope import parse_message
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.window import Claim, ClaimOutcome, Recorded
from jobs.results import Failure
from producer.dispatcher.dispatcher import Dispatcher
from tests.support.waiting import wait_until

LEASE_S = 60.0
WINDOW_KEYS = ("waiting", "leased", "retry", "entry", "owner", "claim", "tries", "vanished", "blamed", "published")


def claim_image(image: str, ledger: Ledger) -> Claim:
    return ledger.window.claim(image, token=uuid.uuid4().hex, output=f"s3://outputs/{image}", lease_s=LEASE_S)


def finish_image(
    job: Job, index: int, ledger: Ledger, state: ImageState = ImageState.DONE, *, key: str = "", code: str = "damaged"
) -> None:
    """Claim and finish an image in the window. `key`, `code`: of its failure."""
    claim = claim_image(f"{job.id}:{index}", ledger)
    failure = Failure(key, code, "the reason", 1, 12.25, "w") if state is ImageState.FAILED else None
    assert ledger.window.finish(claim, state, failure) is Recorded.OK


def finish_all(job: Job, ledger: Ledger, state: ImageState = ImageState.DONE) -> None:
    """Finish every image of the job; all must be in the window."""
    for task in [parse_message(message) for _, message in ledger.window.entries()]:
        if task.job == job.id:
            finish_image(job, task.index, ledger, state, key=task.key)


def work_off(ledger: Ledger, state_of: Callable[[str], ImageState], *, limit: int = 1000) -> int:
    """Finish what can be claimed in the window, each image with the state for its key; return how many images."""
    finished = 0
    for image, message in list(ledger.window.entries())[:limit]:
        key = parse_message(message).key
        claim = claim_image(image, ledger)
        if claim.outcome is ClaimOutcome.GO:
            state = state_of(key)
            failure = Failure(key, "damaged", "the reason", 1, 12.25, "w") if state is ImageState.FAILED else None
            assert ledger.window.finish(claim, state, failure) is Recorded.OK
            finished += 1
    return finished


def lead(ledger: Ledger, name: str = "test", *, instead_of: str = "") -> int:
    """Become the active dispatcher; return the fencing token. `instead_of`: gives up its lock first."""
    ledger.dispatch.resign(instead_of)
    epoch = ledger.dispatch.lead(name, ttl_s=LEASE_S)
    assert epoch is not None
    return epoch


def step_until(dispatcher: Dispatcher, is_so: Callable[[], object], *, what: str) -> None:
    """Take turns of the dispatcher until the condition holds."""

    def step() -> object:
        dispatcher.step()
        return is_so()

    wait_until(step, what=what)


def is_closed(job: Job, ledger: Ledger) -> bool:
    return ledger.jobs.get(job.id).closed is not None


def close_job(dispatcher: Dispatcher, job: Job, ledger: Ledger) -> Job:
    """Take turns of the dispatcher until the job is closed; return the job."""
    step_until(dispatcher, lambda: is_closed(job, ledger), what="the job is closed")
    return ledger.jobs.get(job.id)


def assert_window_empty(ledger: Ledger) -> None:
    """Assert that no image, claim or count of attempts is left in Redis."""
    left = [key for key in (f"cf:{name}" for name in WINDOW_KEYS) if ledger.connection.call("exists", key)]
    assert left == []
