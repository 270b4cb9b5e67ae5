"""The Celery app, with the reason of every delivery setting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.ledger.connection import broker_urls
from jobs.message import worker_queues

if TYPE_CHECKING:
    from celery import Celery

VISIBILITY_S = 120
"""kombu delivers a message again that is unacknowledged this long; a worker renews its messages every quarter of it."""

_MESSAGES = {
    "task_serializer": "json",
    "accept_content": ["json"],  # never pickle: write access to Redis must not run code here
    "result_backend": None,  # the ledger keeps an image's result in four bits instead of 300 bytes
    "task_ignore_result": True,
    "task_create_missing_queues": False,  # a misspelt queue is an error, not a new list without consumers
}
_ACKNOWLEDGEMENT = {
    "task_acks_late": True,  # a worker that dies gives the image back; publishing twice writes the same bytes
    "task_acks_on_failure": True,  # the ledger holds a failure before the task raises it
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,  # as many messages as free slots: a waiting image belongs on the queue
    "worker_disable_prefetch": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,  # threads can't be cancelled; the lease decides
    "worker_soft_shutdown_timeout": 0,  # a soft shutdown sleeps in the signal handler: no acknowledgement leaves then
    "worker_enable_remote_control": True,  # Flower inspects workers
}
_CONNECTION = {
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_channel_error_retry": True,  # "OOM command not allowed" must not end a worker
    "broker_pool_acquire_timeout": 30,
}
_TRANSPORT = {
    "visibility_timeout": VISIBILITY_S,
    "unacked_restore_interval": 10,
    "unacked_restore_throttle": 1,
    "unacked_mutex_expire": 15,  # not 300: a worker that dies while it restores must not block others for so long
    "queue_order_strategy": "priority",  # queues are emptied in the order given: live first
    "priority_steps": [0],  # one Redis list for each queue
    "socket_timeout": 30,  # without it, a publish on a dead connection waits for ever
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
}
_EVENTS_AND_LOGS = {
    "worker_send_task_events": True,  # for Flower
    "task_send_sent_event": False,
    "worker_hijack_root_logger": False,
    "worker_redirect_stdouts": False,
}


def make_app(redis_url: str) -> Celery:
    """Return the Celery app of workers, Flower and inspection. Producers publish through the ledger and need none."""
    from celery import Celery  # here, so that a producer starts without it

    broker, sentinel_options = broker_urls(redis_url)
    app = Celery("cutfleet", broker=broker, set_as_current=False)
    app.conf.update(
        _MESSAGES
        | _ACKNOWLEDGEMENT
        | _CONNECTION
        | _EVENTS_AND_LOGS
        | {"broker_transport_options": _TRANSPORT | sentinel_options}
    )
    return app


def consume(app: Celery, model: str, *, renders: bool = False) -> None:
    """Make the app's worker consume the queues of `model`, and with `renders` those of jobs without a model."""
    from kombu.entity import Queue

    names = worker_queues(model, renders=renders)
    app.conf.task_queues = [Queue(name) for name in names]  # type: ignore[no-untyped-call]  # kombu has few types
    app.conf.task_default_queue = names[0]
