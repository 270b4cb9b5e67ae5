"""Each role with the rights of its policy in `infra/aws`: everything works, and each role is refused what its policy
does not allow. SeaweedFS enforces identities and actions; IAM's conditions and roles exist only at AWS."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from jobs.errors import CutfleetError
from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.demo.local_stack import SECRET_KEY
from tests.faults.fleet import Fleet, Reference
from tests.faults.invariants import assert_exact
from tests.support.environment import ROOT
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

ROLES = ("producer", "dispatcher", "worker")
VERBS = {"s3:ListBucket": "List", "s3:GetObject": "Read", "s3:PutObject": "Write"}
SOME = 6


def actions(role: str, places: Places) -> list[str]:
    """Return the actions of the policy in SeaweedFS's form."""
    buckets = {"SOURCE": places.source_location.bucket, "DESTINATION": places.destination.bucket}
    found = []
    for statement in json.loads((ROOT / f"infra/aws/{role}.json").read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        for resource in statement["Resource"]:
            bucket, _, keys = resource.removeprefix("arn:aws:s3:::").partition("/")
            where = f"{buckets[bucket]}/{keys}" if keys not in ("", "*") else buckets[bucket]
            found += [f"{VERBS[action]}:{where}" for action in statement["Action"]]
    return found


@pytest.fixture
def roles(fleet: Fleet, places: Places) -> None:
    """Add an identity for each role to the store; its access key is the role's name."""
    file = fleet.stack.folder / "s3" / "identities.json"
    others = [one for one in json.loads(file.read_text())["identities"] if one["name"] not in ROLES]
    added = [
        {"name": role, "credentials": [{"accessKey": role, "secretKey": SECRET_KEY}], "actions": actions(role, places)}
        for role in ROLES
    ]
    file.write_text(json.dumps({"identities": [*others, *added]}))
    assert fleet.stack.s3 is not None
    fleet.stack.s3.signal(signal.SIGHUP)
    with as_role(fleet, "producer") as store:
        wait_until(
            lambda: code_of(lambda: list(store.list_source(places.source_location))) == "done",
            what="the store knows the roles",
        )


@contextmanager
def as_role(fleet: Fleet, role: str) -> Iterator[Store]:
    endpoint = fleet.stack.environment["CUTFLEET_S3_ENDPOINT"]
    with Store(endpoint, connections=1, credentials=(role, SECRET_KEY, "us-east-1")) as store:
        yield store


def code_of(call: Callable[[], object]) -> str:
    """Return the error code of the call, or "done"."""
    try:
        call()
    except CutfleetError as exc:
        return exc.code
    return "done"


@pytest.mark.usefixtures("roles")
def test_every_role_works_with_the_rights_of_its_policy(fleet: Fleet, places: Places, reference: Reference) -> None:
    names = put_images(fleet.store, places, SOME)
    env = {"AWS_ACCESS_KEY_ID": "producer"}
    fleet.workers.start(s3_user="worker")
    fleet.dispatchers.start(s3_user="dispatcher")

    ran = fleet.run("submit", places.source, "--to", places.to, "--model", "stand-in", env=env)
    assert ran.returncode == 0, ran.stderr
    result = assert_exact(fleet, ran.stdout.strip(), places, names=names, reference=reference)
    checked = fleet.run("doctor", "--source", places.source, "--to", places.to, "--json", env=env)

    assert result.counts["done"] == SOME
    found = [row["code"] for row in json.loads(checked.stdout)["findings"] if row["area"] == "s3"]
    assert (len(found), set(found) <= {"", "s3_slow"}) == (5, True), found
    assert set(fleet.workers.terminate() + fleet.dispatchers.terminate()) == {0}


@pytest.mark.usefixtures("roles")
def test_each_role_is_refused_what_its_policy_does_not_allow(fleet: Fleet, places: Places) -> None:
    put_images(fleet.store, places, 1)
    record = places.destination.below("_cutfleet/job/job.json")
    image, cutout = places.key("p00000.jpg"), places.cutout("p00000.jpg")

    def write(store: Store, location: Location) -> str:
        return code_of(lambda: store.put(location, b"{}", content_type="application/json"))

    results = {}
    for role in ROLES:
        with as_role(fleet, role) as store:
            results[role] = {
                "reads a source": code_of(functools.partial(store.get, image, role="source", max_bytes=10**6)),
                "writes a source": write(store, image),
                "writes a record": write(store, record),
                "writes a cutout": write(store, cutout),
            }

    done, no_source, no_output = "done", "source_denied", "output_denied"
    assert results == {
        "producer": dict(zip(results["producer"], (done, no_output, done, no_output), strict=True)),
        "dispatcher": dict(zip(results["producer"], (no_source, no_output, done, no_output), strict=True)),
        "worker": dict(zip(results["producer"], (done, no_output, done, done), strict=True)),
    }
