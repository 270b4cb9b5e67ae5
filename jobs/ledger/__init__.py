"""The ledger: the state of each job and image, in Redis. Each change is one atomic script of `ledger.lua`, whose head
lists every key.

An image is open until it is final; final changes back only by an explicit replay. Counts change only with a state. Of a
done image Redis keeps four bits: what was published is in S3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from jobs.errors import CutfleetError
from jobs.ledger.connection import Connection
from jobs.ledger.dispatch import Dispatch
from jobs.ledger.fleet import Fleet
from jobs.ledger.images import Images
from jobs.ledger.jobs import Jobs
from jobs.ledger.outbox import Outbox
from jobs.ledger.quotas import Quotas
from jobs.ledger.watches import Watches
from jobs.ledger.window import Window


class Ledger:
    """One connection pool; safe for threads. Every method raises `RedisUnavailable` when Redis fails."""

    def __init__(self, url: str, *, name: str) -> None:
        """`name`: the server in messages (the URL without its password)."""
        self.name = name
        self.connection = Connection(url, name=name)
        self.jobs = Jobs(self.connection)
        self.images = Images(self.connection)
        self.window = Window(self.connection)
        self.dispatch = Dispatch(self.connection)
        self.outbox = Outbox(self.connection)
        self.watches = Watches(self.connection)
        self.quotas = Quotas(self.connection)
        self.fleet = Fleet(self.connection)

    @property
    def on_answer(self) -> Callable[[CutfleetError | None], None]:
        """Called after each request, with the error or None."""
        return self.connection.on_answer

    @on_answer.setter
    def on_answer(self, callback: Callable[[CutfleetError | None], None]) -> None:
        self.connection.on_answer = callback

    def ping(self) -> None:
        self.connection.call("ping")

    def server_info(self) -> dict[str, Any]:
        """Return the server's INFO, all sections in one."""
        return dict(self.connection.call("info"))

    def server_time_s(self) -> float:
        """Return the server's clock as Unix time; all deadlines in the ledger follow it."""
        seconds, micros = self.connection.call("time")
        return float(seconds) + float(micros) / 1e6

    def uptime_s(self) -> int:
        """Return how long the server has been up: leases could not be renewed while it was down."""
        return int(self.server_info()["uptime_in_seconds"])

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
