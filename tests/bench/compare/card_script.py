"""The model card's script in a loop over S3, one image after another."""

from __future__ import annotations

import os

from tests.bench.compare.arguments import client, fetch, parse_arguments, publish, timed
from tests.bench.compare.recipe import cut_out, load_model


def main() -> None:
    task, s3 = parse_arguments(), client()
    model = load_model(threads=len(os.sched_getaffinity(0)))
    with timed():
        for key in task.keys:
            publish(s3, task.target, key, *cut_out(fetch(s3, task.source, key), model))


if __name__ == "__main__":
    main()
