"""The Celery app, every delivery setting we rely on with its reason, and messages as Celery and kombu write them.

Messages are rendered here and pushed by the ledger's scripts, so that an image and its message appear in one step; a
test shows that Celery reads them as its own. Queues are per model: `live.M`, `suspect.M`, `backfill.M`, in this order.
Workers on a CPU also take those of `render`, which need no model, ahead of their own backfills.
"""

from __future__ import annotations

import base64
import json
import socket
from typing import TYPE_CHECKING

from jobs.catalogue import RENDER
from jobs.ledger.connection import broker_urls
from jobs.message import ImageTask

if TYPE_CHECKING:
    from celery import Celery

TASK_NAME = "cutfleet.image"
VISIBILITY_S = 120
"""A message held longer than this without renewal goes back; workers renew theirs every quarter of it."""


def lane_queue(lane: str, model: str) -> str:
    """`lane`: live, backfill or suspect. Celery separates queues by commas, so a model's name can't hold one."""
    return f"{lane}.{model}"


def worker_queues(model: str, *, renders: bool = False) -> list[str]:
    """In the order of consumption: what is live is always taken first, and a suspect does not wait for the end of a
    backfill."""
    models = (RENDER, model) if renders else (model,)
    return [lane_queue(lane, name) for lane in ("live", "suspect", "backfill") for name in models]


def make_app(redis_url: str) -> Celery:
    """The Celery app of workers, Flower and inspection; producers publish through the ledger and need none."""
    from celery import Celery  # here, so that a producer, which only renders, starts without it

    broker, sentinel_options = broker_urls(redis_url)
    app = Celery("cutfleet", broker=broker, set_as_current=False)
    app.conf.update(
        # What a message is.
        task_serializer="json",
        accept_content=["json"],  # never pickle: who can write to Redis must not run code here
        result_backend=None,  # the ledger knows what became of an image, in four bits instead of 300 bytes
        task_ignore_result=True,
        task_create_missing_queues=False,  # a misspelt queue is an error, not a new list that nobody reads
        # When it counts as done.
        task_acks_late=True,  # a worker that dies gives the image back; publishing twice writes the same bytes
        task_acks_on_failure=True,  # a failure is in the ledger before it is raised; the message has no more to say
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,  # as many messages as free slots: a waiting image belongs on the queue
        worker_disable_prefetch=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # threads can't be cancelled; the lease decides
        worker_soft_shutdown_timeout=0,  # a soft shutdown sleeps in the signal handler: no ack leaves meanwhile
        worker_enable_remote_control=True,  # Flower asks workers what they are
        # How the broker is used.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # "OOM command not allowed" must not end a worker
        broker_pool_acquire_timeout=30,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_S,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 15,  # not 300: one that dies while it gives back must not keep others from it
            "queue_order_strategy": "priority",  # queues are emptied in the order given: live first
            "priority_steps": [0],  # one Redis list a queue
            "socket_timeout": 30,  # without it, a publish on a dead connection waits for ever
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            **sentinel_options,
        },
        # What Flower sees.
        worker_send_task_events=True,
        task_send_sent_event=False,
        # Logs are ours.
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def consume(app: Celery, model: str, *, renders: bool = False) -> None:
    """Makes the app's worker consume the queues of `model`, those of `render` if it `renders`, and no other."""
    from kombu.entity import Queue

    names = worker_queues(model, renders=renders)
    app.conf.task_queues = [Queue(name) for name in names]  # type: ignore[no-untyped-call]  # kombu has few types
    app.conf.task_default_queue = names[0]


def render(task: ImageTask, *, source_uri: str) -> str:
    """The message as kombu's Redis transport stores it. %TAG% and %QUEUE% are filled in by the ledger, each its first
    occurrence: `properties` stands before anything that holds a key."""
    body = json.dumps([[], {"task": task.to_fields()}, _EMBED])
    args = json.dumps(f"({source_uri!r}, job={task.job!r}, lane={task.lane!r})")
    return _TEMPLATE % {"id": task.id, "args": args, "body": base64.b64encode(body.encode()).decode()}


def task_of(message: str) -> ImageTask:
    """What `render` wrote. Raises `BadMessage`."""
    body = json.loads(base64.b64decode(json.loads(message)["body"]))
    return ImageTask.from_fields(body[1]["task"])


_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_FILLED = {"@ID@": "%(id)s", '"@ARGS@"': "%(args)s", "@BODY@": "%(body)s"}


def _make_template() -> str:
    """A message with places for what differs: rendering one whole takes twice as long. Ids need no escape."""
    headers: dict[str, object] = {
        "lang": "py",
        "task": TASK_NAME,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "parent_id": None,
        "kwargsrepr": "{}",
        "origin": f"cutfleet@{socket.gethostname()}",
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        "id": "@ID@",
        "root_id": "@ID@",
        "argsrepr": "@ARGS@",
    }
    properties = {
        "delivery_tag": "%TAG%",
        "delivery_info": {"exchange": "", "routing_key": "%QUEUE%"},
        "correlation_id": "@ID@",
        "reply_to": "",
        "delivery_mode": 2,
        "priority": 0,
        "body_encoding": "base64",
    }
    message = {
        "properties": properties,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "body": "@BODY@",
    }
    text = json.dumps(message).replace("%", "%%")
    for place, filled in _FILLED.items():
        text = text.replace(place, filled)
    return text


_TEMPLATE = _make_template()
