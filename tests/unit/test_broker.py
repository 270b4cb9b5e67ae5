"""Messages that we render are Celery's own in every respect."""

from __future__ import annotations

import base64
import json

import redis
from kombu.entity import Queue

from jobs.broker import TASK_NAME, consume, lane_queue, make_app, render, task_of, worker_queues
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.message import ImageTask
from producer.demo.local_stack import LocalStack

TASK = ImageTask("20260101-000000-abcdef", 7, "photos/é %TAG% %QUEUE% '.jpg", "0cc1", 1234, "live")


def make_job(**changes: object) -> Job:
    fields: dict[str, object] = {
        "id": TASK.job,
        "name": "a test",
        "source": "s3://in/photos/",
        "destination": "s3://out/",
        "recipe": "{}",
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
        queue=Queue("shape-of-celery"),
        task_id=TASK.id,
        ignore_result=True,
    )
    client = redis.Redis(port=stack.redis_port)

    theirs = json.loads(client.lpop("shape-of-celery"))  # type: ignore[arg-type]  # the answer types cover asyncio too
    ours = json.loads(render(TASK, source_uri="s3://in/x"))

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
    queue = lane_queue("live", "reads-ours")
    job = make_job(id="20260101-000001-abcdef", model="reads-ours")
    task = ImageTask(job.id, 0, TASK.key, "", -1, "live")
    ledger.submit_live(job, [(queue, render(task, source_uri="s3://in/%TAG%"), "{}")], lease_s=60)

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


def test_a_key_survives_whatever_it_holds() -> None:
    assert task_of(render(TASK, source_uri="s3://in/x")) == TASK


def test_live_is_consumed_before_backfill_and_each_model_has_its_own_queues() -> None:
    assert worker_queues("u2netp") == ["live.u2netp", "suspect.u2netp", "backfill.u2netp"]
    assert worker_queues("m", renders=True)[:4] == ["live.render", "live.m", "suspect.render", "suspect.m"]
