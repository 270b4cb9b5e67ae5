"""Writes and reads the report of a job, joined from manifest and ledger, in S3 under TO/_cutfleet/JOB/report/:

summary.json              counts, rates, cost, quality figures, verdicts
succeeded-NNNNNN.csv      for each part of the manifest, with the columns of S3 Batch Operations reports and no header:
failed-NNNNNN.csv         Bucket, Key, VersionId, TaskStatus, ErrorCode, HTTPStatusCode, ResultMessage
dead-NNNNNN.jsonl         failures with all their fields
remarks.jsonl             notes of done images (key, review, figures, rules): the first ten thousand
made-NNNNNN.jsonl.gz      key and ETag of the images that the fingerprint in summary.json made, if there is only one
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jobs.job import ImageState, Job, JobKind
from jobs.ledger import Ledger
from jobs.message import ImageTask
from jobs.recipe import Recipe
from jobs.results import Failure, JobStats
from jobs.s3.client import Store
from jobs.s3.location import Location
from jobs.settings import Settings
from producer.records.cost import estimate_cost
from producer.records.failures import failures_on_disk, json_row
from producer.records.fenced_put import put_if_ours
from producer.records.job_record import read_optional
from producer.records.manifest import PART_ROWS, pack, read_part, unpack

_SUCCEEDED = {ImageState.DONE: "done", ImageState.REVIEW: "done, to be reviewed", ImageState.SKIPPED: "skipped"}
_BY_MESSAGE = {message: state for state, message in _SUCCEEDED.items()}


def write_report(
    job: Job, settings: Settings, *, ledger: Ledger, store: Store, check: Callable[[], None] = lambda: None
) -> None:
    """Write the report; safe to repeat. One part of the manifest is in memory at a time. `check` runs before each file
    and raises when the report is not ours to write any more. Raises `SettingsError`, with nothing written, when a later
    version wrote the recipe."""
    recipe = job.recipe
    files = _ReportFiles(job, store, check)
    stats = ledger.jobs.stats(job.id)
    writes_made = job.kind is JobKind.CUT and len(stats.made) == 1
    with failures_on_disk(job, ledger=ledger, store=store) as read_failures:
        for number in range(job.parts):
            tasks = read_part(store, job, number)
            first = number * PART_ROWS
            failures = read_failures(first, len(tasks))
            pairs = list(zip(tasks, ledger.images.states(job.id, first, len(tasks)), strict=True))
            files.put_part(number, pairs, failures)
            if writes_made:
                uncertain = ledger.images.uncertain_versions(job.id, first, len(tasks))
                files.put_made(f"made-{number:06d}.jsonl.gz", pairs, uncertain)
    notes = ledger.images.notes(job.id).values()
    if notes:
        lines = "".join(f"{note.to_json()}\n" for note in notes)
        files.put("remarks.jsonl", lines.encode(), content_type="application/jsonl")
    body = json.dumps(_summary(job, recipe, settings, stats), indent=1, ensure_ascii=False).encode()
    files.put("summary.json", body, content_type="application/json")


def read_report(job: Job, tasks: Sequence[ImageTask], *, store: Store) -> tuple[list[ImageState], dict[int, Failure]]:
    """Return the states of one part's images, and failures by index. A state is open where several images have the same
    key and the report does not tell them apart."""
    number = tasks[0].index // PART_ROWS
    by_key: dict[str, set[ImageState]] = collections.defaultdict(set)
    for row in _read_csv(store, job, f"report/succeeded-{number:06d}.csv"):
        by_key[row[1]].add(_BY_MESSAGE.get(row[6], ImageState.DONE))
    for row in _read_csv(store, job, f"report/failed-{number:06d}.csv"):
        by_key[row[1]].add(ImageState.CANCELLED if row[4] == "cancelled" else ImageState.FAILED)
    failures = {}
    for line in _read(store, job, f"report/dead-{number:06d}.jsonl").split("\n")[:-1]:
        fields = json.loads(line)
        failures[int(fields["index"])] = Failure.from_fields(fields)
    states = [next(iter(candidates)) if len(candidates := by_key[task.key]) == 1 else ImageState.OPEN for task in tasks]
    return [ImageState.FAILED if t.index in failures else s for t, s in zip(tasks, states, strict=True)], failures


def read_record_fields(location: Location, store: Store) -> dict[str, Any] | None:
    """Return the fields of a job's summary.json or job.json; None when there is no such object. Raises `ValueError` for
    text that is not JSON."""
    body, etag = read_optional(store, location)
    if not etag:
        return None
    fields: dict[str, Any] = json.loads(body)
    return fields


def read_made(location: Location, store: Store) -> list[tuple[str, str]]:
    """Return key and ETag of each row of a made-NNNNNN.jsonl.gz."""
    body, _ = read_optional(store, location)
    rows = [json.loads(line) for line in unpack(body)]
    return [(str(row["key"]), str(row["etag"])) for row in rows]


def _summary(job: Job, recipe: Recipe, settings: Settings, stats: JobStats) -> dict[str, Any]:
    """Counts, rates, cost and stats. An image that was made again counts in the stats each time."""
    closed = time.time()
    seconds = max(1e-3, closed - job.created)
    cost = estimate_cost(recipe, settings, done=job.done, skipped=job.skipped, worker_s=stats.worker_s)
    rates = {
        "seconds": round(seconds, 1),
        "images_per_s": round(job.final / seconds, 3),
        "images_per_worker_s": round(job.done / stats.worker_s, 3) if stats.worker_s else None,
    }
    more = {"rates": rates, "cost": cost.summary(), "tally": dataclasses.asdict(stats)}
    return job.summary() | {"state": "closed", "closed": closed} | more


def _failed_row(key: str, failure: Failure | None, state: ImageState) -> tuple[str, str, str, str]:
    if failure is None:
        return key, "failed", state.name.lower(), ""
    return key, "failed", failure.code, failure.message


@dataclasses.dataclass(frozen=True)
class _ReportFiles:
    """Writes the files of one report, each only while it is ours to write."""

    job: Job
    store: Store
    check: Callable[[], None]

    def put(self, name: str, body: bytes, *, content_type: str) -> None:
        def is_ours() -> bool:
            self.check()
            return True

        put_if_ours(
            self.store,
            self._location(name),
            body,
            content_type=content_type,
            conditional=self.job.conditional,
            is_ours=is_ours,
        )

    def put_part(
        self, number: int, pairs: Sequence[tuple[ImageTask, ImageState]], failures: Mapping[int, Failure]
    ) -> None:
        succeeded = [(task.key, "succeeded", "", _SUCCEEDED[state]) for task, state in pairs if state in _SUCCEEDED]
        others = [(task, state) for task, state in pairs if state not in _SUCCEEDED]
        failed = [_failed_row(task.key, failures.get(task.index), state) for task, state in others]
        self._put_csv(f"succeeded-{number:06d}.csv", succeeded)
        self._put_csv(f"failed-{number:06d}.csv", failed)
        self._put_failures(f"dead-{number:06d}.jsonl", failures)

    def put_made(self, name: str, pairs: Sequence[tuple[ImageTask, ImageState]], uncertain: Sequence[bool]) -> None:
        """Write the images that the next submission may skip (`producer/submission/skip_index.py`)."""
        lines = [
            json.dumps({"key": task.key, "etag": task.etag}, ensure_ascii=False)
            for (task, state), is_uncertain in zip(pairs, uncertain, strict=True)
            if state.has_outputs and task.etag and not is_uncertain
        ]
        self.put(name, pack(lines), content_type="application/gzip")

    def _put_csv(self, name: str, rows: Iterable[tuple[str, str, str, str]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        for key, status, code, message in rows:
            writer.writerow([self.job.source.bucket, key, "", status, code, "", message])
        self.put(name, text.getvalue().encode(), content_type="text/csv")

    def _put_failures(self, name: str, failures: Mapping[int, Failure]) -> None:
        """Write an empty file where an earlier report has failures that are done by now."""
        if failures or self.store.head(self._location(name), role="output") is not None:
            body = "".join(f"{json_row(index, failure)}\n" for index, failure in failures.items())
            self.put(name, body.encode(), content_type="application/jsonl")

    def _location(self, name: str) -> Location:
        return self.job.record_path(f"report/{name}")


def _read_csv(store: Store, job: Job, name: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(_read(store, job, name), newline=""))


def _read(store: Store, job: Job, name: str) -> str:
    """Return the text of a record; empty when there is none."""
    return read_optional(store, job.record_path(name))[0].decode()
