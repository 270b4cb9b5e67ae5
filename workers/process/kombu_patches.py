"""Patches of kombu's Redis transport and of Celery's consumer.

`Channel` survives a connection that breaks while a message is unacknowledged and a BRPOP is pending. Celery 5.7.0's
worker exits then: its consumer collects the connection (which clears `transport.client`) before it closes the channel,
and closing needs the client's parameters to restore unacknowledged messages. A test fails once upstream no longer needs
the patch.

`Channel` also keeps one client. kombu creates one for each message, acknowledgement and event, which takes longer than
the client's work.

`Transport` and `Liveness` touch the liveness file.

`VisibilityLease` renews this worker's messages in kombu's `unacked_index`. kombu never does, so it would deliver a
message again that is unacknowledged for longer than the visibility timeout. Ages follow the server's clock: kombu uses
the machine's, and a worker whose clock is ahead would restore the messages of all others.

`BufferedEvents` sends events for Flower a few times per second, not after each step of each image.
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
from jobs.liveness import TOUCH_EVERY_S, LivenessFile

log = logging.getLogger(__name__)

EVENTS_S = 0.5
"""Interval between sends; Flower's pages refresh less often."""
MAX_BUFFERED_EVENTS = 10_000
"""Far more than occur within `EVENTS_S`: a full buffer would be sent outside the event loop."""


class Channel(kombu_redis.Channel):
    """Remembers the client that it was opened for, and uses it once `connection.client` is cleared."""

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
    """Gets the addresses of the Sentinels from `connection.client` too."""

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
    """The server's time: this machine's clock, corrected by the last comparison."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def time(self) -> float:
        return time.time() - self._ahead_s

    def compare(self, client: Any) -> None:
        sent = time.time()
        seconds, micros = client.time()
        self._ahead_s = (sent + time.time()) / 2 - (seconds + micros / 1e6)


class Transport(kombu_redis.Transport):
    Channel = Channel
    liveness = LivenessFile("")
    clock = ServerClock()

    def establish_connection(self) -> Any:
        self.liveness.touch()  # while Redis is away, reconnecting is the only progress
        return super().establish_connection()


class SentinelTransport(Transport, kombu_redis.SentinelTransport):
    Channel = SentinelChannel


class _Periodic(bootsteps.StartStopStep):
    """Calls `run` every `every_s` in the consumer's event loop, the only thread that may use the channel."""

    requires: tuple[str, ...] = ("celery.worker.consumer.tasks:Tasks",)
    every_s: float

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timer: Any = None
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        self._timer = consumer.timer.call_repeatedly(self.every_s, self.run, (consumer,))

    def stop(self, consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def run(self, consumer: Any) -> None:
        raise NotImplementedError


class VisibilityLease(_Periodic):
    every_s = VISIBILITY_S / 4

    def start(self, consumer: Any) -> None:
        super().start(consumer)
        self.run(consumer)

    def run(self, consumer: Any) -> None:
        channel = consumer.task_consumer.channel
        try:
            with channel.conn_or_acquire() as client:
                Transport.clock.compare(client)
                tags = list(channel.qos._delivered.keys() - channel.qos._dirty)
                if tags:
                    client.zadd(channel.unacked_index_key, {tag: Transport.clock.time() for tag in tags}, xx=True)
        except RedisError as exc:
            log.warning("visibility not renewed, retried in the next interval: %s", exc, extra={"action": "renew"})


class Liveness(_Periodic):
    """A stuck event loop does not touch the file."""

    every_s = TOUCH_EVERY_S

    def run(self, consumer: Any) -> None:
        Transport.liveness.touch()


class BufferedEvents(_Periodic):
    """Without it, each event is a PUBLISH of its own: three per image."""

    requires = ("celery.worker.consumer.tasks:Tasks", "celery.worker.consumer.events:Events")
    every_s = EVENTS_S

    def start(self, consumer: Any) -> None:
        consumer.event_dispatcher.buffer_limit = MAX_BUFFERED_EVENTS
        consumer.event_dispatcher.on_send_buffered = None
        super().start(consumer)

    def stop(self, consumer: Any) -> None:
        super().stop(consumer)
        if consumer.event_dispatcher is not None:
            consumer.event_dispatcher.on_send_buffered = consumer.on_send_event_buffered

    def run(self, consumer: Any) -> None:
        consumer._flush_events()


def install_patches(app: Celery, liveness: LivenessFile) -> None:
    """Make the app's worker use the transport and the periodic steps of this module."""
    Transport.liveness = liveness
    Transport.clock = ServerClock()
    kombu_redis.time = Transport.clock.time  # type: ignore[attr-defined]  # kombu's name for `time.time`
    TRANSPORT_ALIASES["redis"] = TRANSPORT_ALIASES["rediss"] = "workers.process.kombu_patches:Transport"
    TRANSPORT_ALIASES["sentinel"] = "workers.process.kombu_patches:SentinelTransport"
    app.steps["consumer"].update({VisibilityLease, Liveness, BufferedEvents})
