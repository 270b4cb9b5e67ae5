"""The model card's script over S3: a loop, one image after another."""

from __future__ import annotations

import os

from tests.bench.compare.places import client, fetch, places, publish, timed
from tests.bench.compare.recipe import cut_out, load_model


def main() -> None:
    where, s3 = places(), client()
    model = load_model(threads=len(os.sched_getaffinity(0)))
    with timed():
        for key in where.keys:
            publish(s3, where.target, key, *cut_out(fetch(s3, where.source, key), model))


if __name__ == "__main__":
    main()
