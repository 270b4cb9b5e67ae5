"""An S3 server that only lists: a source of many keys without stored objects."""

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
from tests.support.waiting import wait_until

SOURCE = "s3://shop/photos/"
FOLDERS = 16
LAST = f"photos/{FOLDERS - 1}/"
PARTS = 3
KEYS = sorted(
    [f"photos/{n % FOLDERS:02d}/{n // 97 % 7}/{n:06d}.jpg" for n in range(PARTS * PART_ROWS - 500)]
    + [f"photos/{n}.jpg" for n in range(400)]
)


class ListingServer(ThreadingHTTPServer):
    """Answers each page after `delay_s`. While `blocked_prefix` is set, it does not answer requests for this prefix, so
    that no listing ends. `requests`: number of pages; `peak`: most of them at the same time."""

    daemon_threads = True
    delay_s = 0.0
    blocked_prefix = ""
    requests = in_work = peak = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Ignore a client that was killed."""

    def page(self, query: dict[str, str]) -> str:
        """Return one page of ListObjectsV2 as XML."""
        prefix, delimiter, token = (query.get(name, "") for name in ("prefix", "delimiter", "continuation-token"))
        first = bisect.bisect_right(KEYS, token) if token else bisect.bisect_left(KEYS, prefix)
        objects: list[str] = []
        folders: list[str] = []
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
    server: ListingServer

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests += 1
            server.in_work += 1
            server.peak = max(server.peak, server.in_work)
        time.sleep(server.delay_s)
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        wait_until(lambda: query.get("prefix") != server.blocked_prefix, within_s=250, what="the prefix is unblocked")
        body = server.page(query).encode()
        with server.lock:
            server.in_work -= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serve_keys() -> Iterator[ListingServer]:
    with ListingServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def assert_manifest_is_exact(job: Job, store: Store) -> None:
    """Assert that the job's manifest has each of `KEYS` once, in any order."""
    keys = [task.key for number in range(job.parts) for task in read_part(store, job, number)]
    assert len(keys) == len(KEYS)
    assert sorted(keys) == KEYS
    assert job.total == len(KEYS)
