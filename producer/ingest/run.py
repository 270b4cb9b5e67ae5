"""Runs a watch: SQS, webhook and sweeps side by side."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading

from jobs.errors import SettingsError
from jobs.sqs import SqsQueue
from producer.ingest.watcher import Watcher, retry_until_stopped


def run_watch(
    watcher: Watcher, stop: threading.Event, *, queue: str | None, listen: str | None, token: str, sweep_every_s: float
) -> None:
    """Take arrivals until `stop` is set. `queue`: URL of an SQS queue. `listen`: HOST:PORT of the webhook. `token`: see
    `receive_webhooks`. Raises what ends one of them: `SettingsError`, or a bug."""
    with contextlib.ExitStack() as stack:
        if listen is not None:
            from producer.ingest.receiver import receive_webhooks  # here, since it needs an extra

            host, port = _parse_address(listen, token)
            stack.enter_context(receive_webhooks(watcher, host, port, token=token))
        work = [lambda: _sweep(watcher, sweep_every_s, stop)]
        if queue is not None:
            sqs_queue = stack.enter_context(SqsQueue(queue))
            work.append(lambda: _receive(watcher, sqs_queue, stop))
        with concurrent.futures.ThreadPoolExecutor(len(work), "watch") as pool:
            running = [pool.submit(part) for part in work]
            concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            stop.set()  # an error in one ends the others
            for part in running:
                part.result()


def _parse_address(listen: str, token: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not port.isdigit():
        raise SettingsError(f"--listen must be HOST:PORT (is {listen!r}).")
    if not token:
        raise SettingsError("--listen needs CUTFLEET_WATCH_TOKEN: the bearer token required from webhook senders.")
    return host.strip("[]") or "127.0.0.1", int(port)


def _receive(watcher: Watcher, queue: SqsQueue, stop: threading.Event) -> None:
    while not stop.is_set():
        retry_until_stopped(lambda: watcher.take_messages(queue), stop)


def _sweep(watcher: Watcher, every_s: float, stop: threading.Event) -> None:
    while not stop.is_set():
        retry_until_stopped(lambda: watcher.sweep(stop), stop)
        stop.wait(every_s)
