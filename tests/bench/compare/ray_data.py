"""Ray Data with our functions, as its documentation recommends for batch inference: fetch and decode in tasks, the
model in an actor on batches, encode and publish in tasks.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.recipe import Recipe
from tests.bench.compare.arguments import Task, client, fetch, parse_arguments, publish, timed
from workers.imaging.decode import DecodedImage, Limits, decode_image
from workers.imaging.pipeline import encode_outputs, shrink_for_model
from workers.imaging.resize import enlarge
from workers.models.batcher import Batcher
from workers.models.device import limit_threads
from workers.models.registry import load

Row = dict[str, Any]
SIZE = (320, 320)


@functools.cache
def store() -> Any:
    limit_threads(1)
    return client()


def prepare(row: Row, task: Task) -> Row:
    image = decode_image(fetch(store(), task.source, row["key"]), limits=Limits(), animation="first")
    return {"key": row["key"], "rgb": image.rgb, "small": shrink_for_model(image, SIZE)}


class Model:
    def __init__(self) -> None:
        limit_threads(1)
        self.batcher = Batcher(load("u2netp", device="cpu", dtype="float32"), batch_limit=1)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
        return {**batch, "mask": np.stack([self.batcher.predict(small) for small in batch["small"]])}


def finish(row: Row, task: Task) -> Row:
    rgb = row["rgb"]
    outputs = encode_outputs(DecodedImage(rgb), enlarge(row["mask"], rgb.shape[:2]), Recipe(edges="off"), text={})
    publish(store(), task.target, row["key"], outputs.cutout, outputs.mask)
    return {"key": row["key"]}


def main() -> None:
    import ray

    task, cores = parse_arguments(), len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    run(Task(task.source, task.target, 1))
    with timed():
        run(task)
    ray.shutdown()


def run(task: Task) -> None:
    """Cut out the images. A first run with one image starts the processes and loads the model."""
    import ray

    rows = ray.data.from_items([{"key": key} for key in task.keys], override_num_blocks=task.count)
    prepared = rows.map(prepare, fn_args=(task,))
    predicted = prepared.map_batches(Model, batch_size=4, concurrency=1, num_cpus=0.5)
    done = predicted.map(finish, fn_args=(task,)).take_all()
    assert len(done) == task.count


if __name__ == "__main__":
    from tests.bench.compare import ray_data  # Ray's processes find functions by module name

    ray_data.main()
