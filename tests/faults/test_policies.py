"""Each role with the rights of its policy in infra/aws, as a store knows them that enforces rights: all works, and each
is refused what is not its. IAM's own conditions and roles are AWS's alone; here stand identities and their actions."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs.errors import CutfleetError
from jobs.s3.client import Location, Store
from producer.demo.local_stack import SECRET_KEY
from tests.faults.fleet import ROOT, Fleet, Reference
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

ROLES = ("producer", "dispatcher", "worker")
VERBS = {"s3:ListBucket": "List", "s3:GetObject": "Read", "s3:PutObject": "Write"}
SOME = 6


def actions(role: str, places: Places) -> list[str]:
    """The policy's rights in the store's own words."""
    buckets = {"SOURCE": Location.parse(places.source).bucket, "DESTINATION": Location.parse(places.to).bucket}
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
    """The store knows each, under its name."""
    file = fleet.stack.folder / "s3" / "identities.json"
    known = [one for one in json.loads(file.read_text())["identities"] if one["name"] not in ROLES]
    added = [
        {"name": role, "credentials": [{"accessKey": role, "secretKey": SECRET_KEY}], "actions": actions(role, places)}
        for role in ROLES
    ]
    file.write_text(json.dumps({"identities": [*known, *added]}))
    assert fleet.stack.s3 is not None
    fleet.stack.s3.signal(signal.SIGHUP)
    with as_role(fleet, "producer") as store:
        wait_until(lambda: outcome(lambda: list(store.list_source(Location.parse(places.source)))) == "done")


@contextmanager
def as_role(fleet: Fleet, role: str) -> Iterator[Store]:
    endpoint = fleet.stack.environment["CUTFLEET_S3_ENDPOINT"]
    with Store(endpoint, connections=1, credentials=(role, SECRET_KEY, "us-east-1")) as store:
        yield store


def outcome(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except CutfleetError as exc:
        return exc.code
    return "done"


@pytest.mark.usefixtures("roles")
def test_every_role_does_its_work_with_its_own_rights(fleet: Fleet, places: Places, reference: Reference) -> None:
    names = put_images(fleet.store, places, SOME)
    env = {"AWS_ACCESS_KEY_ID": "producer"}
    fleet.workers.start(s3_user="worker")
    fleet.dispatchers.start(s3_user="dispatcher")

    ran = fleet.run("submit", places.source, "--to", places.to, "--model", "stand-in", env=env)
    assert ran.returncode == 0, ran.stderr
    truth = prove(fleet, ran.stdout.strip(), places, names=names, reference=reference)
    looked = fleet.run("doctor", "--source", places.source, "--to", places.to, "--json", env=env)

    assert truth.counts["done"] == SOME
    found = [row["code"] for row in json.loads(looked.stdout)["findings"] if row["area"] == "s3"]
    assert (len(found), set(found) <= {"", "s3_slow"}) == (5, True), found
    assert set(fleet.workers.dismiss() + fleet.dispatchers.dismiss()) == {0}


@pytest.mark.usefixtures("roles")
def test_each_role_is_refused_what_is_not_its(fleet: Fleet, places: Places) -> None:
    put_images(fleet.store, places, 1)
    record = Location(Location.parse(places.to).bucket, "_cutfleet/job/job.json")
    image, cutout = places.key("p00000.jpg"), places.cutout("p00000.jpg")

    def write(store: Store, place: Location) -> str:
        return outcome(lambda: store.put(place, b"{}", content_type="application/json"))

    seen = {}
    for role in ROLES:
        with as_role(fleet, role) as store:
            seen[role] = {
                "reads a source": outcome(lambda store=store: store.get(image, role="source", max_bytes=10**6)),
                "writes a source": write(store, image),
                "writes a record": write(store, record),
                "writes a cutout": write(store, cutout),
            }

    done, no_source, no_output = "done", "source_denied", "output_denied"
    assert seen == {
        "producer": dict(zip(seen["producer"], (done, no_output, done, no_output), strict=True)),
        "dispatcher": dict(zip(seen["producer"], (no_source, no_output, done, no_output), strict=True)),
        "worker": dict(zip(seen["producer"], (done, no_output, done, done), strict=True)),
    }
