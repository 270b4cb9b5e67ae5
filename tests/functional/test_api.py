"""The HTTP API, as its callers meet it: a real process, real Valkey, real S3."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import Places, decode, free_port, program, put_pictures, wait_until

from jobs.ledger import Ledger
from jobs.store import Store
from producer import requests
from producer.access import Caller
from producer.api import Pictures
from producer.local import LocalStack, Process, inherited_environment

KEY = "only-for-this-test"
STRANGER = "of-somebody-else"


class Api:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def call(
        self, method: str, path: str, body: object = None, *, key: str = KEY, once: str = ""
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, body and headers."""
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


def serving(stack: LocalStack, places: Places, folder: Path, *, per_minute: int = 100_000) -> tuple[Api, Process]:
    lines = []
    for name, key, source in (("shop", KEY, places.source), ("stranger", STRANGER, "s3://elsewhere/")):
        digest = hashlib.sha256(key.encode()).hexdigest()
        to = places.to if name == "shop" else "s3://elsewhere-too/"
        lines += [f"[{name}]", f'sha256 = "{digest}"', f'sources = ["{source}"]', f'destinations = ["{to}"]']
        lines += [f"per_minute = {per_minute}"]
    (folder / "keys.toml").write_text("\n".join(lines))
    port = free_port()
    env = inherited_environment() | stack.environment | {"CUTFLEET_API_KEYS": str(folder / "keys.toml")}
    command = [sys.executable, "-m", "producer", "serve", "--listen", f"127.0.0.1:{port}"]
    process = Process(command, log=folder / "api.log", env=env)
    api = Api(port)

    def is_up() -> bool:
        assert process.poll() is None, process.last_words()
        try:
            return api.call("GET", "/readyz")[0] == 200
        except OSError:
            return False

    wait_until(is_up, what="the API is ready")
    return api, process


@pytest.fixture
def api(stack: LocalStack, places: Places, tmp_path: Path) -> Iterator[Api]:
    found, process = serving(stack, places, tmp_path)
    yield found
    process.stop()


def asked(places: Places, **more: object) -> dict[str, object]:
    return {"source": places.source, "destination": places.to, **more}


def test_pictures_are_asked_for_followed_and_fetched(
    fleet: LocalStack, api: Api, store: Store, places: Places, tmp_path: Path
) -> None:
    put_pictures(store, places, 2)
    store.put(places.key("x.jpg"), b"no picture", content_type="image/jpeg")

    status, made, _ = api.call("POST", "/v1/requests", asked(places))
    wait_until(lambda: api.call("GET", made["status_url"])[1]["status"] == "COMPLETED", what="it is completed")
    found = api.call("GET", made["response_url"])[1]
    one = api.call("GET", f"/v1/pictures?source={places.source}p00000.jpg")[1]

    assert (status, made["total"]) == (202, 3)
    assert [row["state"] for row in found["pictures"]] == ["done", "done", "failed"]
    assert found["pictures"][2]["code"] == "not_an_image"
    assert one["state"] == "done"
    link = found["pictures"][0]["cutout_url"]
    with urllib.request.urlopen(link) as answer:  # noqa: S310
        assert decode(answer.read()).mode == "RGBA"
    log = (tmp_path / "api.log").read_text()
    assert made["request_id"] in log
    assert "Signature" not in log
    assert KEY not in log


def test_the_same_key_and_body_make_one_request(stack: LocalStack, api: Api, ledger: Ledger, places: Places) -> None:
    body = asked(places, keys=["a.jpg"])

    first, again, other = (
        api.call("POST", "/v1/requests", sent, once="one") for sent in (body, body, body | {"keys": ["b.jpg"]})
    )
    without = api.call("POST", "/v1/requests", body)

    assert (first[0], again[0], other[0], other[1]["code"]) == (202, 202, 409, "idempotency_key_reused")
    assert first[1]["request_id"] == again[1]["request_id"] != without[1]["request_id"]
    assert ledger.job(first[1]["request_id"]).total == 1


def test_a_request_reserved_by_a_killed_process_is_made_by_the_next(
    stack: LocalStack, api: Api, ledger: Ledger, places: Places
) -> None:
    body = asked(places, keys=["a.jpg"])
    caller = Caller("shop", (), (), 1)
    made = requests.reserve(caller, "killed", Pictures(**body).model_dump(), ledger)  # type: ignore[arg-type]  # as text

    again = api.call("POST", "/v1/requests", body, once="killed")[1]["request_id"]

    assert again == made
    assert ledger.job(made).total == 1


def test_a_key_without_a_right_gets_403_and_nothing_else(
    stack: LocalStack, api: Api, ledger: Ledger, places: Places
) -> None:
    made = api.call("POST", "/v1/requests", asked(places, keys=["a.jpg"]))[1]
    before = ledger.job(made["request_id"])
    nothing = {"status": 403, "code": "forbidden", "detail": "This key has no right to that."}

    answers = [
        api.call("GET", made["status_url"], key=STRANGER),
        api.call("GET", made["response_url"], key=STRANGER),
        api.call("PUT", made["cancel_url"], key=STRANGER),
        api.call("GET", f"/v1/pictures?source={places.source}a.jpg", key=STRANGER),
        api.call("POST", "/v1/requests", asked(places, keys=["a.jpg"]), key=STRANGER),
        api.call("POST", "/v1/requests", asked(places) | {"destination": "s3://elsewhere-too/"}),
        api.call("POST", "/v1/requests", asked(places) | {"source": f"{places.source[:-1]}-2/"}),
        api.call("POST", "/v1/requests", asked(places, keys=["../elsewhere/a.jpg"])),
    ]

    assert [(status, body) for status, body, _ in answers] == [(403, nothing)] * len(answers)
    assert ledger.job(made["request_id"]).cancelled is before.cancelled is False
    assert api.call("GET", made["status_url"], key="nobody's")[0] == 401


def test_bad_requests_are_refused_with_a_code(stack: LocalStack, api: Api, places: Places) -> None:
    answers = {
        "source_empty": api.call("POST", "/v1/requests", asked(places)),
        "recipe_unknown": api.call("POST", "/v1/requests", asked(places, keys=["a"], recipe="/etc/x.toml")),
        "invalid": api.call("POST", "/v1/requests", b'{"source": "\\ud800"'),
        "body_too_large": api.call("POST", "/v1/requests", b" " * 2_000_001),
        "job_unknown": api.call("GET", "/v1/requests/none/status"),
        "not_found": api.call("GET", "/nowhere"),
    }

    assert {code: (answer[0], answer[1]["code"]) for code, answer in answers.items()} == {
        "source_empty": (422, "source_empty"),
        "recipe_unknown": (422, "recipe_unknown"),
        "invalid": (422, "invalid"),
        "body_too_large": (413, "body_too_large"),
        "job_unknown": (404, "job_unknown"),
        "not_found": (404, "not_found"),
    }


def test_a_request_is_cancelled_once(tmp_path: Path) -> None:
    places = Places("s3://shop/", "s3://shop-cutouts/")
    with LocalStack(tmp_path / "stack") as stack, stack.store() as store:
        for bucket in ("shop", "shop-cutouts"):
            store.create_bucket(bucket)
        stack.start_dispatcher()
        api, process = serving(stack, places, tmp_path)
        made = api.call("POST", "/v1/requests", asked(places, keys=["a.jpg", "b.jpg"]))[1]

        cancelled = api.call("PUT", made["cancel_url"])
        wait_until(lambda: api.call("PUT", made["cancel_url"])[0] == 409, what="it is closed")
        found = api.call("GET", made["response_url"])[1]
        assert stack.valkey is not None
        stack.valkey.kill()
        away = [api.call("GET", made["status_url"]), api.call("GET", "/readyz"), api.call("GET", "/healthz")]
        process.stop()

    assert cancelled[0] == 202
    assert (found["status"], {row["state"] for row in found["pictures"]}) == ("CANCELLED", {"cancelled"})
    assert [answer[0] for answer in away] == [503, 503, 200]
    assert all(int(answer[2]["retry-after"]) > 0 for answer in away[:2])


def test_a_key_that_asks_too_often_is_told_when_to_come_again(
    stack: LocalStack, places: Places, tmp_path: Path
) -> None:
    api, process = serving(stack, places, tmp_path, per_minute=2)

    def ask() -> tuple[int, dict[str, Any], dict[str, str]]:
        return api.call("GET", "/v1/requests/none/status")

    try:
        wait_until(lambda: ask()[0] == 429, what="it is too often")  # the minute may change once in between
        status, body, headers = ask()
        assert (status, body["code"], 0 < int(headers["retry-after"]) <= 60) == (429, "rate_limited", True)
    finally:
        process.stop()


def test_the_openapi_page_tells_no_lie(stack: LocalStack, api: Api, places: Places) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

    ran = subprocess.run(
        [
            *[program("schemathesis"), "run", f"{api.url}/openapi.json", "--max-examples", "25", "--seed", "1"],
            *["--checks", checks, "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"],
            *["--header", f"Authorization: Bearer {KEY}"],
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=stack.folder,
    )

    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
