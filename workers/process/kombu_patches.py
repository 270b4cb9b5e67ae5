"""What stands between kombu's Redis transport and us.

`Transport` survives a connection that breaks while a message is in flight and a BRPOP is pending: Celery 5.7.0's worker
exits then, since its consumer collects the connection (which clears `transport.client`) before it closes the channel,
and closing needs the client's parameters to restore what is unacknowledged. A test fails when upstream no longer
needs it.

It also keeps one client for a channel: kombu makes one for every message, acknowledgement and event, which takes longer
than what the client then does.

`Liveness` and the transport touch the file that probes look at.

`VisibilityLease` renews this worker's messages in kombu's `unacked_index`: without it a message held for longer than
the visibility timeout is delivered again (kombu never renews). Their ages are told by the server's clock: kombu takes
the machine's, and a worker whose clock is ahead would give back what all others hold.

`GatheredEvents` sends what Flower is to see a few times a second, not after every step of every image.
"""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

from celery import Celery, bootsteps
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError

from jobs.broker import VISIBILITY_S
from jobs.liveness import ALIVE_S, AliveFile

log = logging.getLogger(__name__)

EVENTS_S = 0.5
"""Flower's own pages are refreshed less often."""
MOST_EVENTS = 10_000
"""Kept for the next turn: far more than half a second makes, so that the loop alone ever sends."""


class Channel(kombu_redis.Channel):
    """Remembers the client it was opened for, and uses it where `connection.client` is gone."""

    def __init__(self, connection: Any, **options: Any) -> None:
        self._opened_for = connection.client
        self._kept: tuple[Any, Any] = (None, None)
        super().__init__(connection, **options)

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous)
        pool, client = self._kept
        if client is None or pool is not self.pool:
            client = super()._create_client()
            self._kept = (self.pool, client)
        return client

    def _connparams(self, asynchronous: bool = False) -> Any:
        connection = self.connection
        if connection is not None and getattr(connection, "client", None) is not None:
            return super()._connparams(asynchronous)
        self.connection = SimpleNamespace(client=self._opened_for, default_port=kombu_redis.DEFAULT_PORT, cycle=None)
        try:
            return super()._connparams(asynchronous)
        finally:
            self.connection = connection


class SentinelChannel(Channel, kombu_redis.SentinelChannel):
    """Whose servers are asked for at the Sentinels, which it knows from `connection.client` too."""

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> Any:
        connection = self.connection
        if connection is not None and getattr(connection, "client", None) is not None:
            return super()._sentinel_managed_pool(asynchronous)
        port = kombu_redis.SentinelTransport.default_port
        self.connection = SimpleNamespace(client=self._opened_for, default_port=port, cycle=None)
        try:
            return super()._sentinel_managed_pool(asynchronous)
        finally:
            self.connection = connection


class ServerClock:
    """The server's time, by how far this machine's clock was off when last compared."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def time(self) -> float:
        return time.time() - self._ahead_s

    def compare(self, client: Any) -> None:
        asked = time.time()
        seconds, micros = client.time()
        self._ahead_s = (asked + time.time()) / 2 - (seconds + micros / 1e6)


class Transport(kombu_redis.Transport):
    Channel = Channel
    alive = AliveFile("")
    clock = ServerClock()

    def establish_connection(self) -> Any:
        self.alive.touch()  # while Redis is away, trying again is all the progress there can be
        return super().establish_connection()


class SentinelTransport(Transport, kombu_redis.SentinelTransport):
    Channel = SentinelChannel


class _Repeated(bootsteps.StartStopStep):
    """Does `turn` every `every_s` in the consumer's event loop, where the channel may be used."""

    requires: tuple[str, ...] = ("celery.worker.consumer.tasks:Tasks",)
    every_s: float

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timer: Any = None
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        self._timer = consumer.timer.call_repeatedly(self.every_s, self.turn, (consumer,))

    def stop(self, consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def turn(self, consumer: Any) -> None:
        raise NotImplementedError


class VisibilityLease(_Repeated):
    every_s = VISIBILITY_S / 4

    def start(self, consumer: Any) -> None:
        super().start(consumer)
        self.turn(consumer)

    def turn(self, consumer: Any) -> None:
        channel = consumer.task_consumer.channel
        try:
            with channel.conn_or_acquire() as client:
                Transport.clock.compare(client)
                tags = list(channel.qos._delivered.keys() - channel.qos._dirty)
                if tags:
                    client.zadd(channel.unacked_index_key, {tag: Transport.clock.time() for tag in tags}, xx=True)
        except RedisError as exc:
            log.warning("visibility not renewed, next turn tries again: %s", exc, extra={"action": "renew"})


class Liveness(_Repeated):
    """A loop that is stuck touches nothing."""

    every_s = ALIVE_S

    def turn(self, consumer: Any) -> None:
        Transport.alive.touch()


class GatheredEvents(_Repeated):
    """Without it every event is a PUBLISH of its own: three an image."""

    requires = ("celery.worker.consumer.tasks:Tasks", "celery.worker.consumer.events:Events")
    every_s = EVENTS_S

    def start(self, consumer: Any) -> None:
        consumer.event_dispatcher.buffer_limit = MOST_EVENTS
        consumer.event_dispatcher.on_send_buffered = None
        super().start(consumer)

    def stop(self, consumer: Any) -> None:
        super().stop(consumer)
        if consumer.event_dispatcher is not None:
            consumer.event_dispatcher.on_send_buffered = consumer.on_send_event_buffered

    def turn(self, consumer: Any) -> None:
        consumer._flush_events()


def harden(app: Celery, alive: AliveFile) -> None:
    """Gives the app's worker the transport, the lease, the sign of life and fewer messages."""
    Transport.alive = alive
    Transport.clock = ServerClock()
    kombu_redis.time = Transport.clock.time  # type: ignore[attr-defined]  # its own name of time.time
    TRANSPORT_ALIASES["redis"] = TRANSPORT_ALIASES["rediss"] = "workers.process.kombu_patches:Transport"
    TRANSPORT_ALIASES["sentinel"] = "workers.process.kombu_patches:SentinelTransport"
    app.steps["consumer"].update({VisibilityLease, Liveness, GatheredEvents})
