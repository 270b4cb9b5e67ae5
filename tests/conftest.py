"""Real servers for tests: Valkey and SeaweedFS from their wheels, our own dispatcher and worker as processes.

A server that can't start fails the tests that need it; nothing is skipped for its lack.
"""

from __future__ import annotations

import http.server
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from moto.server import ThreadedMotoServer

from jobs.ledger import Ledger
from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack, inherited_environment
from tests.support.environment import DATA, ROOT, Run, alone_url
from tests.support.factories import Places, Receiver, program

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Optional photographs and files; tests that use them have a story without them too."""
    return DATA


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """One Valkey and one S3 server for the whole run. A test that harms servers starts a stack of its own."""
    with LocalStack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="session")
def fleet(stack: LocalStack) -> LocalStack:
    """The stack with a dispatcher and one u2netp worker."""
    stack.start_dispatcher()
    stack.start_worker(device="cpu")
    return stack


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window, from `tests/support/get-chromium.sh`. Of one module: while it is open, playwright's loop runs
    in this thread, and no other can. Without its sandbox, which root may not have: it opens our own pages only."""
    from playwright.sync_api import sync_playwright  # here: few runs need it

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=program("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def aws() -> Iterator[Store]:
    """A server of AWS's behaviour, for what the embedded one does otherwise or not at all."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with Store(f"http://{host}:{port}", connections=20, credentials=("a", "b", "us-east-1")) as store:
        yield store
    server.stop()


@pytest.fixture
def ledger(stack: LocalStack) -> Iterator[Ledger]:
    with stack.ledger() as ledger:
        yield ledger


@pytest.fixture
def store(stack: LocalStack) -> Iterator[Store]:
    with stack.store() as store:
        yield store


@pytest.fixture
def alone(stack: LocalStack) -> Iterator[Ledger]:
    """A ledger that no dispatcher of the other tests works on, empty."""
    with Ledger(alone_url(stack), name="alone") as ledger:
        ledger._call("flushdb")
        yield ledger


@pytest.fixture
def places(store: Store) -> Places:
    """A source and a destination bucket of this test's own."""
    number = next(_numbers)
    places = Places(f"s3://source-{os.getpid()}-{number}/", f"s3://results-{os.getpid()}-{number}/")
    for uri in (places.source, places.to):
        store.create_bucket(Location.parse(uri).bucket)
    return places


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver("", [], [])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            found.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(found.statuses.pop(0) if found.statuses else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}/hook?token=hidden"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def cutfleet(stack: LocalStack) -> Run:
    """Runs the command as a person would: `cutfleet("status", job)`."""

    def run(
        *args: str, stdin: str = "", env: dict[str, str] | None = None, timeout_s: float = 100
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "producer", *args],
            input=stdin,
            env=inherited_environment() | stack.environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
            check=False,
        )

    return run
