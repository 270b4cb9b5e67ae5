"""The HTTP API from outside: a `cutfleet serve` process with Valkey and SeaweedFS."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from jobs.ledger import Ledger
from jobs.s3.client import Store
from producer.api import service
from producer.api.auth import ApiKey
from producer.api.models import ImagesRequest
from producer.demo.local_stack import LocalStack, Process, free_port, inherited_environment
from tests.support import listing_server
from tests.support.environment import find_program
from tests.support.images import decode_image, put_images
from tests.support.places import Places
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import WEBHOOK_SECRET, Receiver

KEY = "only-for-this-test"
STRANGER = "key-for-other-prefixes"


class Api:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def call(
        self, method: str, path: str, body: object = None, *, key: str = KEY, once: str = ""
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Return status, body and headers. `once`: the Idempotency-Key."""
        headers = {"Authorization": f"Bearer {key}"} | ({"Idempotency-Key": once} if once else {})
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers |= {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310
        try:
            answer = urllib.request.urlopen(request)  # noqa: S310
        except urllib.error.HTTPError as exc:
            answer = exc
        with answer:
            return answer.status, json.loads(answer.read()), {n.lower(): v for n, v in answer.headers.items()}


def start_api(
    stack: LocalStack, places: Places, folder: Path, settings: Mapping[str, str] = {}, *, per_minute: int = 100_000
) -> tuple[Api, Process]:
    """Return when the API is ready. `settings`: `CUTFLEET_*` names without the prefix, in lower case."""
    lines = []
    for name, key, source in (("shop", KEY, places.source), ("stranger", STRANGER, "s3://elsewhere/")):
        digest = hashlib.sha256(key.encode()).hexdigest()
        to = places.to if name == "shop" else "s3://elsewhere-too/"
        lines += [f"[{name}]", f'sha256 = "{digest}"', f'sources = ["{source}"]', f'destinations = ["{to}"]']
        lines += [f"per_minute = {per_minute}"]
    (folder / "keys.toml").write_text("\n".join(lines))
    port = free_port()
    own = {"api_keys": str(folder / "keys.toml"), **settings}
    env = inherited_environment() | stack.environment
    env |= {f"CUTFLEET_{name.upper()}": value for name, value in own.items()}
    command = [sys.executable, "-m", "producer", "serve", "--listen", f"127.0.0.1:{port}"]
    process = Process(command, log=folder / "api.log", env=env)
    api = Api(port)

    def is_up() -> bool:
        assert process.poll() is None, process.log_tail()
        try:
            return api.call("GET", "/readyz")[0] == 200
        except OSError:
            return False

    wait_until(is_up, what="the API is ready")
    return api, process


@pytest.fixture
def api(stack: LocalStack, places: Places, tmp_path: Path) -> Iterator[Api]:
    found, process = start_api(stack, places, tmp_path)
    yield found
    process.stop()


def request_body(places: Places, **fields: object) -> dict[str, object]:
    return {"source": places.source, "destination": places.to, **fields}


def test_images_are_submitted_followed_and_fetched(
    fleet: LocalStack, api: Api, store: Store, places: Places, tmp_path: Path
) -> None:
    put_images(store, places, 2)
    store.put(places.key("x.jpg"), b"no image", content_type="image/jpeg")

    status, accepted, _ = api.call("POST", "/v1/requests", request_body(places))
    wait_until(lambda: api.call("GET", accepted["status_url"])[1]["status"] == "COMPLETED", what="it is completed")
    results = api.call("GET", accepted["response_url"])[1]
    one = api.call("GET", f"/v1/images?source={places.source}p00000.jpg")[1]

    assert (status, accepted["total"]) == (202, 3)
    assert [row["state"] for row in results["images"]] == ["done", "done", "failed"]
    assert results["images"][2]["code"] == "not_an_image"
    assert one["state"] == "done"
    link = results["images"][0]["cutout_url"]
    with urllib.request.urlopen(link) as answer:  # noqa: S310
        assert decode_image(answer.read()).mode == "RGBA"
    log = (tmp_path / "api.log").read_text()
    assert accepted["request_id"] in log
    assert "Signature" not in log
    assert KEY not in log


def test_the_same_idempotency_key_and_body_create_one_request(
    stack: LocalStack, api: Api, ledger: Ledger, places: Places
) -> None:
    body = request_body(places, keys=["a.jpg"])

    first, again, other = (
        api.call("POST", "/v1/requests", sent, once="one") for sent in (body, body, body | {"keys": ["b.jpg"]})
    )
    without = api.call("POST", "/v1/requests", body)

    assert (first[0], again[0], other[0], other[1]["code"]) == (202, 202, 409, "idempotency_key_reused")
    assert first[1]["request_id"] == again[1]["request_id"] != without[1]["request_id"]
    assert ledger.jobs.get(first[1]["request_id"]).total == 1


def test_the_next_process_creates_a_request_that_a_killed_one_reserved(
    stack: LocalStack, api: Api, ledger: Ledger, places: Places
) -> None:
    body = request_body(places, keys=["a.jpg"])
    body_fields = ImagesRequest.model_validate(body).model_dump()
    reserved = service.reserve_job_id(ApiKey("shop", (), (), 1), "killed", body_fields, ledger)

    created = api.call("POST", "/v1/requests", body, once="killed")[1]["request_id"]

    assert created == reserved
    assert ledger.jobs.get(created).total == 1


def test_a_key_gets_403_without_detail_outside_its_prefixes(
    stack: LocalStack, api: Api, ledger: Ledger, places: Places
) -> None:
    made = api.call("POST", "/v1/requests", request_body(places, keys=["a.jpg"]))[1]
    before = ledger.jobs.get(made["request_id"])
    forbidden = {"status": 403, "code": "forbidden", "detail": "This key is not permitted for this prefix."}

    answers = [
        api.call("GET", made["status_url"], key=STRANGER),
        api.call("GET", made["response_url"], key=STRANGER),
        api.call("PUT", made["cancel_url"], key=STRANGER),
        api.call("GET", f"/v1/images?source={places.source}a.jpg", key=STRANGER),
        api.call("POST", "/v1/requests", request_body(places, keys=["a.jpg"]), key=STRANGER),
        api.call("POST", "/v1/requests", request_body(places) | {"destination": "s3://elsewhere-too/"}),
        api.call("POST", "/v1/requests", request_body(places) | {"source": f"{places.source[:-1]}-2/"}),
        api.call("POST", "/v1/requests", request_body(places, keys=["../elsewhere/a.jpg"])),
    ]

    assert [(status, body) for status, body, _ in answers] == [(403, forbidden)] * len(answers)
    assert ledger.jobs.get(made["request_id"]).cancelled is before.cancelled is False
    assert [api.call("GET", made["status_url"], key=key)[0] for key in ("unknown", "é")] == [401, 401]


def test_invalid_requests_are_refused_with_a_code(stack: LocalStack, api: Api, places: Places) -> None:
    answers = {
        "source_empty": api.call("POST", "/v1/requests", request_body(places)),
        "recipe_unknown": api.call("POST", "/v1/requests", request_body(places, keys=["a"], recipe="/etc/x.toml")),
        "invalid": api.call("POST", "/v1/requests", b'{"source": "\\ud800"'),
        "unreadable": api.call("POST", "/v1/requests", b"[" * 100_000),
        "destination": api.call("POST", "/v1/requests", request_body(places) | {"destination": places.to + "é" * 450}),
        "source": api.call("GET", f"/v1/images?source={places.source}{quote('é' * 520)}"),
        "body_too_large": api.call("POST", "/v1/requests", b" " * 2_000_001),
        "job_unknown": api.call("GET", "/v1/requests/none/status"),
        "not_found": api.call("GET", "/nowhere"),
    }

    assert {code: (answer[0], answer[1]["code"]) for code, answer in answers.items()} == {
        "source_empty": (422, "source_empty"),
        "recipe_unknown": (422, "recipe_unknown"),
        "invalid": (422, "invalid"),
        "unreadable": (400, "unreadable"),
        "destination": (422, "name_too_long"),
        "source": (422, "name_too_long"),
        "body_too_large": (413, "body_too_large"),
        "job_unknown": (404, "job_unknown"),
        "not_found": (404, "not_found"),
    }


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalStack, Api, Places]]:
    """A stack for this file, whose servers may be killed. It has a dispatcher and no worker: images stay open."""
    folder = tmp_path_factory.mktemp("own")
    places = Places("s3://shop/", "s3://shop-cutouts/")
    webhooks = {"webhook_secret": WEBHOOK_SECRET, "webhook_private": "true"}
    with LocalStack(folder / "stack") as stack, stack.store() as store:
        for bucket in ("shop", "shop-cutouts"):
            store.create_bucket(bucket)
        stack.start_dispatcher(**webhooks)
        api, process = start_api(stack, places, folder, webhooks)
        yield stack, api, places
        process.stop()


def test_a_request_is_cancelled_once_and_its_webhook_is_delivered(
    own_stack: tuple[LocalStack, Api, Places], receiver: Receiver
) -> None:
    _, api, places = own_stack
    made = api.call("POST", "/v1/requests", request_body(places, keys=["a.jpg", "b.jpg"], webhook_url=receiver.url))[1]

    cancelled = api.call("PUT", made["cancel_url"])
    wait_until(lambda: api.call("PUT", made["cancel_url"])[0] == 409, what="it is closed")
    found = api.call("GET", made["response_url"])[1]
    wait_until(lambda: len(receiver.received) > 0, what="the webhook is delivered")

    assert cancelled[0] == 202
    assert (found["status"], {row["state"] for row in found["images"]}) == ("CANCELLED", {"cancelled"})
    (event,) = receiver.events()
    assert (event["type"], event["data"]["job"]) == ("job.closed", made["request_id"])
    assert event["data"]["cancelled"] == 2


def test_results_are_manifest_damaged_when_redis_lost_the_rows(own_stack: tuple[LocalStack, Api, Places]) -> None:
    stack, api, places = own_stack
    made = api.call("POST", "/v1/requests", request_body(places, keys=["e.jpg", "f.jpg"]))[1]
    with stack.ledger() as ledger:
        ledger.connection.call("delete", f"cf:job:{made['request_id']}:rows")

    status, problem, _ = api.call("GET", made["response_url"])

    assert (status, problem["code"]) == (422, "manifest_damaged")


def test_a_webhook_that_can_not_be_signed_is_refused(
    stack: LocalStack, api: Api, ledger: Ledger, places: Places
) -> None:
    body = request_body(places, keys=["a.jpg"], webhook_url="https://127.0.0.1/hook")

    status, problem, _ = api.call("POST", "/v1/requests", body, once="hook")

    assert (status, "CUTFLEET_WEBHOOK_SECRET" in problem["detail"]) == (422, True)
    assert not [job for job in ledger.jobs.newest() if job.source == places.source_location]


def test_calls_get_503_with_retry_after_while_s3_or_redis_is_unavailable(
    own_stack: tuple[LocalStack, Api, Places],
) -> None:
    stack, api, places = own_stack
    made = api.call("POST", "/v1/requests", request_body(places, keys=["c.jpg"]))[1]
    assert stack.s3 is not None
    assert stack.valkey is not None

    stack.s3.kill()
    with ThreadPoolExecutor(3) as pool:
        calls = [
            ("POST", "/v1/requests", request_body(places)),
            ("POST", "/v1/requests", request_body(places, keys=["d.jpg"])),
        ]
        without_s3 = list(pool.map(lambda call: api.call(*call), [*calls, ("GET", "/readyz", None)]))
    still = [api.call("GET", made["status_url"]), api.call("GET", made["response_url"]), api.call("GET", "/healthz")]
    stack.start_s3()
    stack.valkey.kill()
    without_redis = [api.call("GET", made["status_url"]), api.call("GET", "/readyz")]
    alive = api.call("GET", "/healthz")
    stack.start_valkey()
    again = api.call("GET", made["status_url"])

    assert [answer[0] for answer in without_s3 + without_redis] == [503] * 5
    assert all(int(answer[2]["retry-after"]) > 0 for answer in without_s3 + without_redis)
    assert [answer[0] for answer in (*still, alive, again)] == [200] * 5
    assert again[1]["total"] == 1, "refused requests leave no trace"


def test_a_large_prefix_is_listed_after_the_process_that_accepted_it_is_killed(
    stack: LocalStack, store: Store, ledger: Ledger, places: Places, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: store.put(places.key(f"{n:04d}.jpg"), b"x", content_type="image/jpeg"), range(1001)))
    api, process = start_api(stack, places, tmp_path, {"model": "birefnet"})  # a model that no worker serves

    status, made, _ = api.call("POST", "/v1/requests", request_body(places), once="all")
    process.kill()
    api, process = start_api(stack, places, tmp_path, {"model": "birefnet"})
    wait_until(lambda: ledger.jobs.get(made["request_id"]).listed, what="it is listed")
    again = api.call("POST", "/v1/requests", request_body(places), once="all")[1]
    last = api.call("GET", f"{made['response_url']}?first=1000")[1]
    process.stop()

    job = ledger.jobs.get(made["request_id"])
    assert (status, job.lane, job.total, job.parts) == (202, "backfill", 1001, 1)
    assert (again["request_id"], again["status"], again["total"]) == (job.id, "IN_QUEUE", 1001)
    assert ([row["source"] for row in last["images"]], "next" in last) == ([str(places.key("1000.jpg"))], False)
    ledger.jobs.cancel(job.id)


def test_the_next_process_continues_the_listing_of_a_killed_one(
    stack: LocalStack, store: Store, ledger: Ledger, places: Places, tmp_path: Path
) -> None:
    requested = Places(listing_server.SOURCE, places.to)
    with listing_server.serve_keys() as source:
        settings = {"source_endpoint": source.url, "model": "birefnet"}  # a model that no worker serves
        api, process = start_api(stack, requested, tmp_path, settings)
        source.delay_s = 0.5
        status, answer, _ = api.call("POST", "/v1/requests", request_body(requested), once=places.to)
        assert status == 202, answer
        made, source.blocked_prefix, began = answer["request_id"], listing_server.LAST, source.requests
        for pages in (0, 20):
            wait_until(lambda: ledger.jobs.get(made).parts > 0, what="the first part is recorded")
            wait_until(
                lambda n=began + pages: source.requests >= n,  # type: ignore[misc]  # a default argument
                what="the listing continues",
            )
            process.kill()
            assert not ledger.jobs.get(made).listed
            ledger.connection.call("delete", f"cf:api:lists:{made}")  # as its lease does after half a minute
            began = source.requests
            api, process = start_api(stack, requested, tmp_path, settings)
        source.delay_s, source.blocked_prefix = 0, ""
        wait_until(lambda: ledger.jobs.get(made).listed, what="it is listed")
        again = api.call("POST", "/v1/requests", request_body(requested), once=places.to)[1]
        process.stop()

    assert again["request_id"] == made
    listing_server.assert_manifest_is_exact(ledger.jobs.get(made), store)
    ledger.jobs.cancel(made)


def test_a_request_can_choose_the_backfill_lane(stack: LocalStack, api: Api, ledger: Ledger, places: Places) -> None:
    made = api.call("POST", "/v1/requests", request_body(places, keys=["a.jpg"], lane="backfill"))[1]

    assert ledger.jobs.get(made["request_id"]).lane == "backfill"


def test_renditions_have_links_if_the_image_has_any(fleet: LocalStack, api: Api, store: Store, places: Places) -> None:
    put_images(store, places, 1)
    blank = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(blank, "PNG")
    store.put(places.key("z blank.png"), blank.getvalue(), content_type="image/png")

    made = api.call("POST", "/v1/requests", request_body(places, recipe="amazon-main"))[1]
    wait_until(lambda: api.call("GET", made["status_url"])[1]["status"] == "COMPLETED", what="it is completed")
    disc, empty = api.call("GET", made["response_url"])[1]["images"]

    (link,) = disc["renditions"].values()
    with urllib.request.urlopen(link) as answer:  # noqa: S310
        assert decode_image(answer.read()).format == "JPEG"
    with urllib.request.urlopen(disc["mask_url"]) as answer:  # noqa: S310
        assert decode_image(answer.read()).mode == "L"
    for link in empty["renditions"].values():
        with urllib.request.urlopen(link) as answer:  # noqa: S310
            assert answer.status == 200


def test_a_key_over_its_rate_gets_429_with_retry_after(stack: LocalStack, places: Places, tmp_path: Path) -> None:
    api, process = start_api(stack, places, tmp_path, per_minute=2)

    answers: list[tuple[int, dict[str, Any], dict[str, str]]] = []

    def is_limited() -> bool:
        answers.append(api.call("GET", "/v1/requests/none/status"))
        return answers[-1][0] == 429

    try:
        wait_until(is_limited, what="a call is refused")  # the minute may change in between
        _, body, headers = answers[-1]
        assert (body["code"], 0 < int(headers["retry-after"]) <= 60) == ("rate_limited", True)
    finally:
        process.stop()


def test_responses_match_the_openapi_document(
    stack: LocalStack, api: Api, store: Store, places: Places, tmp_path: Path
) -> None:
    made = api.call("POST", "/v1/requests", request_body(places, keys=["a.jpg"]))[1]
    (tmp_path / "existing.toml").write_text(  # so that responses about existing requests are checked too
        f"""
        [[operations]]
        include-path-regex = "/v1/requests/.request_id.(/status)?$"
        parameters = {{ "path.request_id" = "{made["request_id"]}" }}
        [[operations]]
        include-path = "/v1/images"
        parameters = {{ "query.source" = "{places.source}a.jpg" }}
        """
    )

    ran = subprocess.run(
        [
            *[
                find_program("schemathesis"),
                "--config-file",
                str(tmp_path / "existing.toml"),
                "run",
                f"{api.url}/openapi.json",
            ],
            *["--checks", "all", "--phases", "coverage,fuzzing", "--max-examples", "25", "--seed", "1"],
            *["--request-timeout", "60"],
            *["--suppress-health-check", "all", "--header", f"Authorization: Bearer {KEY}"],
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


def test_the_links_of_the_openapi_document_lead_through_a_request(
    own_stack: tuple[LocalStack, Api, Places], tmp_path: Path
) -> None:
    """Requests are submitted, followed, cancelled and cancelled again, in any order."""
    stack, api, places = own_stack
    mine = {"source": places.source, "destination": places.to, "recipe": "default", "keys": ["a.jpg", "b.jpg"]}
    (tmp_path / "hooks.py").write_text(
        f"""
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict) or len(str(body)) % 3 == 0:
        return body
    return {{name: value for name, value in body.items() if name != "webhook_url"}} | {mine!r}
"""
    )

    ran = subprocess.run(
        [
            *[
                find_program("schemathesis"),
                "run",
                f"{api.url}/openapi.json",
                "--checks",
                "all",
                "--phases",
                "stateful",
            ],
            *["--request-timeout", "60"],
            *["--max-examples", "8", "--seed", "1", "--suppress-health-check", "all"],
            *["--header", f"Authorization: Bearer {KEY}"],
        ],
        env=os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    with stack.ledger() as ledger:
        made = [job for job in ledger.jobs.newest(limit=1000) if job.name == "api shop"]
    assert {job.cancelled for job in made} == {True, False}, "some were cancelled, some were not"
