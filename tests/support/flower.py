"""A `python -m producer.flower` process, and its pages in a browser."""

from __future__ import annotations

import base64
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from producer.demo.local_stack import LocalStack, Process, free_port, inherited_environment

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Response

LOGIN = "night-shift:open-sesame"


class Flower:
    """A Flower process of a stack, and its HTTP API. `options`: of Flower. `more`: environment variables."""

    def __init__(self, stack: LocalStack, *options: str, more: Mapping[str, str] | None = None) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "producer.flower", f"--port={port}", "--address=127.0.0.1", *options]
        env = inherited_environment() | stack.environment | {"FLOWER_BASIC_AUTH": LOGIN} | dict(more or {})
        self.process = Process(command, log=stack.folder / "logs" / "flower.log", env=env)

    def ask(
        self, path: str, *, login: str | None = LOGIN, method: str = "GET", timeout_s: float = 20
    ) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, method=method)  # noqa: S310  (our own server)
        if login is not None:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()

    def is_up(self) -> bool:
        try:
            return self.ask("/healthcheck") == (200, "OK")
        except OSError:
            return False

    def workers(self) -> dict[str, Any]:
        return dict(json.loads(self.ask("/api/workers?refresh=1")[1]))

    def tasks(self, search: str) -> list[dict[str, Any]]:
        answer = self.ask("/api/tasks?" + urllib.parse.urlencode({"search": search}))[1]
        return list(json.loads(answer).values())


class Pages:
    """Flower's pages, after login."""

    def __init__(self, flower: Flower, page: Page) -> None:
        self._flower = flower
        self.page = page

    def search(self, text: str) -> list[dict[str, str]]:
        """Type into the search field of the tasks page; return the rows that it shows, by column."""
        self.page.goto(f"{self._flower.url}/tasks")
        self.page.wait_for_selector("#tasks-table tbody tr")

        def is_answer(answer: Response) -> bool:
            return urllib.parse.parse_qs(answer.request.post_data or "").get("search[value]") == [text]

        with self.page.expect_response(is_answer):
            self.page.get_by_role("searchbox").fill(text)
        self.page.wait_for_selector("#tasks-table_processing", state="hidden")
        return self._rows("#tasks-table")

    def workers(self) -> list[dict[str, str]]:
        self.page.goto(f"{self._flower.url}/workers")
        self.page.wait_for_selector("#workers-table tbody a")
        return self._rows("#workers-table")

    def worker(self, name: str) -> str:
        """Return the HTML of a worker's page."""
        self.page.goto(f"{self._flower.url}/worker/{name}")
        return self.page.content()

    def _rows(self, table: str) -> list[dict[str, str]]:
        heads = self.page.locator(f"{table} thead th")
        titles = [head.get_attribute("data-column") or (head.text_content() or "").strip() for head in heads.all()]
        rows = self.page.locator(f"{table} tbody tr").all()
        cells = [[" ".join(text.split()) for text in row.locator("td").all_text_contents()] for row in rows]
        return [dict(zip(titles, texts, strict=True)) for texts in cells if len(texts) == len(titles)]


@contextmanager
def open_pages(flower: Flower, browser: Browser) -> Iterator[Pages]:
    user, _, password = LOGIN.partition(":")
    context = browser.new_context(
        http_credentials={"username": user, "password": password}, viewport={"width": 1280, "height": 720}
    )
    yield Pages(flower, context.new_page())
    context.close()
