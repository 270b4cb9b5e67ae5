"""A receiver of our webhooks, on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import threading
from collections.abc import Iterator, Mapping
from typing import Any

WEBHOOK_SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="  # noqa: S105


@dataclasses.dataclass
class Receiver:
    """Answers with each of `statuses` in turn, then with 200. `received`: headers, with lower-case names, and body of
    each request."""

    url: str = ""
    statuses: list[int] = dataclasses.field(default_factory=list)
    received: list[tuple[Mapping[str, str], str]] = dataclasses.field(default_factory=list)

    def events(self) -> list[dict[str, Any]]:
        """Return the events received. Raises unless the reference library for receivers accepts each signature."""
        from standardwebhooks import Webhook

        return [Webhook(WEBHOOK_SECRET).verify(body, dict(headers)) for headers, body in self.received]


@contextlib.contextmanager
def receive_webhooks() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            receiver.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/hook?token=hidden"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join()
