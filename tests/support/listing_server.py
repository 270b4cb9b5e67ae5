"""A source of many keys that nobody had to store: a server that speaks S3's listing, and that only."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from jobs.job import Job
from jobs.s3.client import Store
from producer.records.manifest import PART_ROWS, read_part
from tests.support.factories import wait_until

SOURCE = "s3://shop/photos/"
FOLDERS = 16
LAST = f"photos/{FOLDERS - 1}/"
PARTS = 3
KEYS = sorted(
    [f"photos/{n % FOLDERS:02d}/{n // 97 % 7}/{n:06d}.jpg" for n in range(PARTS * PART_ROWS - 500)]
    + [f"photos/{n}.jpg" for n in range(400)]
)


class Listed(ThreadingHTTPServer):
    """Answers each page after `delay_s`, and those of the prefix `holds` when it holds it no more: no listing ends
    before. Counts pages, and how many were asked for at a time."""

    daemon_threads = True
    delay_s = 0.0
    holds = ""
    asked = at_once = most_at_once = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Who asked was killed."""

    def page(self, asked: dict[str, str]) -> str:
        prefix, delimiter, token = (asked.get(name, "") for name in ("prefix", "delimiter", "continuation-token"))
        first = bisect.bisect_right(KEYS, token) if token else bisect.bisect_left(KEYS, prefix)
        objects, folders = [], []
        while first < len(KEYS) and len(objects) + len(folders) < 1000 and KEYS[first].startswith(prefix):
            key = KEYS[first]
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            if end < 0:
                objects.append(key)
                first += 1
            else:
                folders.append(key[: end + 1])
                first = bisect.bisect_left(KEYS, key[:end] + chr(ord(delimiter) + 1))
        more = first < len(KEYS) and KEYS[first].startswith(prefix)
        contents = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{key[-10:-4]}&quot;</ETag><Size>1</Size></Contents>"
            for key in objects
        )
        common = "".join(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in folders)
        token = f"<NextContinuationToken>{KEYS[first - 1]}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>in</Name><Prefix>{prefix}</Prefix><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{token}{contents}{common}</ListBucketResult>"
        )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Listed

    def do_GET(self) -> None:
        found = self.server
        with found.lock:
            found.asked += 1
            found.at_once += 1
            found.most_at_once = max(found.most_at_once, found.at_once)
        time.sleep(found.delay_s)
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        wait_until(lambda: query.get("prefix") != found.holds, within_s=250, what=f"{found.holds} is let go")
        body = found.page(query).encode()
        with found.lock:
            found.at_once -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving_keys() -> Iterator[Listed]:
    with Listed() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def assert_exact(job: Job, store: Store) -> None:
    """The manifest has each key once; which comes first is chance."""
    keys = [task.key for number in range(job.parts) for task in read_part(store, job, number)]
    assert len(keys) == len(KEYS)
    assert sorted(keys) == KEYS
    assert job.total == len(KEYS)
