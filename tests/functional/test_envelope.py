"""Celery reads the messages that we render as its own."""

from __future__ import annotations

import base64
import json

import redis
from kombu.entity import Queue

from jobs.broker import consume, make_app
from jobs.envelope import TASK_NAME, message_row, parse_message, render_message
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.message import ImageTask, queue_name
from jobs.recipe import Recipe
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack

TASK = ImageTask("20260101-000000-abcdef", 7, "photos/é %TAG% %QUEUE% '.jpg", "0cc1", 1234, "live")


def make_job(**changes: object) -> Job:
    fields: dict[str, object] = {
        "id": TASK.job,
        "name": "a test",
        "source": Location("in", "photos/"),
        "destination": Location("out", ""),
        "recipe_json": Recipe().to_json(),
        "model": "u2netp",
        "lane": "live",
        "conditional": True,
        "created": 0.0,
    }
    return Job(**(fields | changes))  # type: ignore[arg-type]  # a test's shorthand


def test_a_rendered_message_has_the_shape_that_celery_writes(stack: LocalStack) -> None:
    app = make_app(stack.environment["CUTFLEET_REDIS_URL"])
    app.send_task(
        TASK_NAME,
        kwargs={"task": TASK.to_fields()},
        queue=Queue("shape-of-celery"),  # type: ignore[no-untyped-call]  # kombu has few types
        task_id=TASK.id,
        ignore_result=True,
    )
    client = redis.Redis(port=stack.redis_port)

    theirs = json.loads(client.lpop("shape-of-celery"))  # type: ignore[arg-type]  # the answer types cover asyncio too
    ours = json.loads(render_message(TASK, source=Location("in", "x")))

    assert set(ours) == set(theirs)
    assert set(ours["headers"]) == set(theirs["headers"])
    assert set(ours["properties"]) == set(theirs["properties"]) - {"argsrepr", "kwargsrepr"}
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(theirs["body"]))
    changing = {"argsrepr", "kwargsrepr", "origin"}
    assert {k: v for k, v in ours["headers"].items() if k not in changing} == {
        k: v for k, v in theirs["headers"].items() if k not in changing
    }
    app.close()


def test_celery_reads_a_message_that_the_ledger_pushed(stack: LocalStack, ledger: Ledger) -> None:
    queue = queue_name("live", "reads-ours")
    job = make_job(id="20260101-000001-abcdef", model="reads-ours")
    task = ImageTask(job.id, 0, TASK.key, "", -1, "live")
    ledger.jobs.create_live(job, [(queue, render_message(task, source=Location("in", "%TAG%")), "{}")], lease_s=60)

    app = make_app(stack.environment["CUTFLEET_REDIS_URL"])
    consume(app, "reads-ours")
    with app.connection_for_read() as connection, connection.SimpleQueue(queue) as waiting:
        message = waiting.get(timeout=60)
        _, kwargs, _ = message.decode()
        message.ack()

    assert ImageTask.from_fields(kwargs["task"]) == task
    assert message.headers["id"] == task.id
    assert message.delivery_info["routing_key"] == queue
    assert message.delivery_tag.startswith(f"{task.id}:")
    app.close()


def test_a_key_with_any_characters_survives() -> None:
    assert parse_message(render_message(TASK, source=Location("in", "x"))) == TASK


def test_a_row_names_the_queue_of_its_job() -> None:
    queue, message = message_row(TASK, make_job(lane="backfill"))

    assert queue == "backfill.u2netp"
    assert parse_message(message) == TASK
