"""Renders and reads Celery messages as kombu's Redis transport stores them. The ledger's scripts push them, so that an
image and its message appear in one step; a test shows that Celery reads them as its own."""

from __future__ import annotations

import base64
import json
import socket

from jobs.job import Job
from jobs.message import ImageTask
from jobs.s3.location import Location

TASK_NAME = "cutfleet.image"


def render_message(task: ImageTask, *, source: Location) -> str:
    """Return the message of one image. The ledger fills in %TAG% and %QUEUE%, each at its first occurrence:
    `properties` precedes everything that holds a key. `source`: of the image, shown in Flower."""
    body = json.dumps([[], {"task": task.to_fields()}, _EMBED])
    args = json.dumps(f"({str(source)!r}, job={task.job!r}, lane={task.lane!r})")
    return _TEMPLATE % {"id": task.id, "args": args, "body": base64.b64encode(body.encode()).decode()}


def message_row(task: ImageTask, job: Job) -> tuple[str, str]:
    """Return queue and message of one image of `job`."""
    return job.queue, render_message(task, source=job.source.at(task.key))


def parse_message(message: str) -> ImageTask:
    """Return the task of a message that `render_message` made. Raises `BadMessage`."""
    body = json.loads(base64.b64decode(json.loads(message)["body"]))
    return ImageTask.from_fields(body[1]["task"])


_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_FILLED = {"@ID@": "%(id)s", '"@ARGS@"': "%(args)s", "@BODY@": "%(body)s"}


def _make_template() -> str:
    """A message with placeholders: rendering a whole message takes twice as long. Ids need no escape."""
    headers: dict[str, object] = {
        **dict.fromkeys(("shadow", "eta", "expires", "group", "group_index", "parent_id")),
        "lang": "py",
        "task": TASK_NAME,
        "retries": 0,
        "timelimit": [None, None],
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
    content = {"content-encoding": "utf-8", "content-type": "application/json"}
    message = {"properties": properties, **content, "headers": headers, "body": "@BODY@"}
    text = json.dumps(message).replace("%", "%%")
    for placeholder, filled in _FILLED.items():
        text = text.replace(placeholder, filled)
    return text


_TEMPLATE = _make_template()
