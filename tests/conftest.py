"""Real servers for tests: Valkey and SeaweedFS from their wheels, our own dispatcher and worker as processes.

A server that can't start fails the tests that need it; no test is skipped.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jobs.ledger import Ledger
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack, inherited_environment
from tests.support.environment import DATA, ROOT, Run, find_program, own_redis_url
from tests.support.places import Places, create_places
from tests.support.webhook_receiver import Receiver, receive_webhooks

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with optional photographs and files; tests that use them also work without."""
    return DATA


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """One Valkey and one S3 server for the whole run. A test that stops or changes servers starts its own stack."""
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
    """Headless Chromium from `tests/support/get-chromium.sh`. Module scope: while it is open, playwright's event loop
    runs in this thread, and no other loop can. No sandbox, which root cannot use: it opens only our own pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_program("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def aws() -> Iterator[Store]:
    """A store on moto, which behaves like AWS where SeaweedFS does not."""
    from moto.server import ThreadedMotoServer

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
def own_ledger(stack: LocalStack) -> Iterator[Ledger]:
    """An empty ledger in a Redis database of its own, where no dispatcher works."""
    with Ledger(own_redis_url(stack), name="own") as ledger:
        ledger.connection.call("flushdb")
        yield ledger


@pytest.fixture
def places(store: Store) -> Places:
    """A source and a destination bucket for one test."""
    return create_places(store, f"{os.getpid()}-{next(_numbers)}")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receive_webhooks() as receiver:
        yield receiver


@pytest.fixture
def cutfleet(stack: LocalStack) -> Run:
    """Run the `cutfleet` command in a process: `cutfleet("status", job)`."""

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
