"""What became of a job, joined from manifest and ledger, and of one image.

In S3 under TO/_cutfleet/JOB/report/: summary.json (counts, rates, cost, quality, verdicts), and one CSV of succeeded
and of failed images for each part of the manifest, in the columns of S3 Batch Operations reports (no header): Bucket,
Key, VersionId, TaskStatus, ErrorCode, HTTPStatusCode, ResultMessage; remarks.jsonl: what there is to say of done images
(key, review, figures, rules), the first ten thousand; made-NNNNNN.jsonl.gz: key and ETag of what was made, or found, by
the one fingerprint that stands in summary.json, where it was one.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jobs.broker import task_of
from jobs.catalogue import RENDER
from jobs.errors import OutputError
from jobs.job import Failure, ImageState, Job, Tally
from jobs.ledger import Ledger
from jobs.message import MAX_KEY_BYTES, BadMessage, ImageTask
from jobs.recipe import Recipe
from jobs.s3.client import Location, S3Object, Store, image_names, record_location, source_digest
from jobs.settings import Settings
from producer.records.cost import bill
from producer.records.failures import failures_of, failures_on_disk, json_row
from producer.records.fenced_put import put_if_ours
from producer.records.manifest import MAX_PART_BYTES, PART_ROWS, pack, read_part
from producer.submission.skip_index import made_line

_SUCCEEDED = {ImageState.DONE: "done", ImageState.REVIEW: "done, to be reviewed", ImageState.SKIPPED: "skipped"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageStatus:
    """`state`: open, waiting, leased, retry, done, failed or unknown. `job` None: no job covers the image."""

    source: str
    state: str
    job: str | None = None
    cutout: str | None = None
    mask: str | None = None
    code: str | None = None
    message: str | None = None

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def write_report(
    job: Job, settings: Settings, *, ledger: Ledger, store: Store, check: Callable[[], None] = lambda: None
) -> None:
    """Safe to repeat; one part of the manifest in memory at a time. Raises `SettingsError`, with nothing written, when
    a later version wrote the recipe. `check`, before each file: raises when it is no longer ours to write."""
    recipe = Recipe.from_json(job.recipe)
    report = _Report(job, store, check)
    tally = ledger.tally(job.id)
    tells_made = job.model != RENDER and len(tally.made) == 1
    with failures_on_disk(job, ledger=ledger, store=store) as failures_between:
        for number in range(job.parts):
            tasks = read_part(store, job, number)
            first = number * PART_ROWS
            failures = failures_between(first, len(tasks))
            pairs = list(zip(tasks, ledger.states(job.id, first, len(tasks)), strict=True))
            succeeded = [(task.key, "succeeded", "", _SUCCEEDED[state]) for task, state in pairs if state in _SUCCEEDED]
            failed = [
                _failed_row(task.key, failures.get(task.index), state)
                for task, state in pairs
                if state not in _SUCCEEDED
            ]
            report.put_csv(f"succeeded-{number:06d}.csv", succeeded)
            report.put_csv(f"failed-{number:06d}.csv", failed)
            report.put_dead(f"dead-{number:06d}.jsonl", failures)
            if tells_made:
                report.put_made(f"made-{number:06d}.jsonl.gz", pairs, ledger.unsure(job.id, first, len(tasks)))
    remarks = ledger.remarks(job.id).values()
    if remarks:
        lines = "".join(f"{remark.to_json()}\n" for remark in remarks)
        report.put("remarks.jsonl", lines.encode(), content_type="application/jsonl")
    body = json.dumps(_summary(job, recipe, settings, tally), indent=1, ensure_ascii=False).encode()
    report.put("summary.json", body, content_type="application/json")


def _summary(job: Job, recipe: Recipe, settings: Settings, tally: Tally) -> dict[str, Any]:
    """Counts, rates, cost, and in `tally` what there is to say of all images together: figures of their masks,
    reasons for review, verdicts of each rendition's rules. One that was made again counts there each time."""
    closed = time.time()
    seconds = max(1e-3, closed - job.created)
    cost = bill(recipe, settings, done=job.done, skipped=job.skipped, worker_s=tally.worker_s)
    rates = {
        "seconds": round(seconds, 1),
        "images_per_s": round(job.final / seconds, 3),
        "images_per_worker_s": round(job.done / tally.worker_s, 3) if tally.worker_s else None,
    }
    more = {"rates": rates, "cost": cost.summary(), "tally": dataclasses.asdict(tally)}
    return job.summary() | {"state": "closed", "closed": closed} | more


def read_report(job: Job, tasks: Sequence[ImageTask], *, store: Store) -> tuple[list[ImageState], dict[int, Failure]]:
    """What the report says of the images of one part: their states, open where it is not clear which of several images
    of one key is meant; and failures by index."""
    number = tasks[0].index // PART_ROWS
    words = {word: state for state, word in _SUCCEEDED.items()}
    known: dict[str, set[ImageState]] = collections.defaultdict(set)
    for row in _read_csv(store, job, f"report/succeeded-{number:06d}.csv"):
        known[row[1]].add(words.get(row[6], ImageState.DONE))
    for row in _read_csv(store, job, f"report/failed-{number:06d}.csv"):
        known[row[1]].add(ImageState.CANCELLED if row[4] == "cancelled" else ImageState.FAILED)
    failures = {}
    for line in _read(store, job, f"report/dead-{number:06d}.jsonl").split("\n")[:-1]:
        row = json.loads(line)
        failures[int(row["index"])] = Failure.of(row)
    states = [next(iter(found)) if len(found := known[task.key]) == 1 else ImageState.OPEN for task in tasks]
    return [ImageState.FAILED if t.index in failures else s for t, s in zip(tasks, states, strict=True)], failures


def image_status(source: Location, *, ledger: Ledger, store: Store) -> ImageStatus:
    """The jobs whose source covers the key, newest first: in flight from the ledger, done from the output, failed from
    the dead letters. A destination costs one request, whatever the size of its jobs, unless they are open or have
    failures."""
    in_flight = _in_flight(source, ledger)
    head = functools.cache(lambda place: store.head(place, role="output"))
    for job in ledger.all_jobs():
        prefix = Location.parse(job.source)
        if job.review_of:
            continue
        if prefix.bucket == source.bucket and source.key.startswith(prefix.key):
            status = _status_in(job, source, in_flight.get(job.id), ledger, store, head)
            if status is not None:
                return status
    return ImageStatus(source=str(source), state="unknown")


def _in_flight(source: Location, ledger: Ledger) -> dict[str, str]:
    """By job, the image in its window that has this key."""
    return {image.rpartition(":")[0]: image for image, message in ledger.entries() if _key_of(message) == source.key}


def _key_of(message: str) -> str:
    """Empty where it can't be read: its image will fail by that."""
    try:
        return task_of(message).key
    except BadMessage:
        return ""


def _status_in(
    job: Job,
    source: Location,
    image: str | None,
    ledger: Ledger,
    store: Store,
    head: Callable[[Location], S3Object | None],
) -> ImageStatus | None:
    names = image_names(job.source, job.destination, source.key)

    def status(state: str, **more: str) -> ImageStatus:
        return ImageStatus(source=str(source), state=state, job=job.id, **more)

    if image is not None:
        return status(ledger.place(image) or "open")
    output = head(names.cutout) if len(names.cutout.key.encode()) <= MAX_KEY_BYTES else None
    made_by = ""
    if output is not None and output.metadata.get("cf-source") == source_digest(source):
        made_by = output.metadata.get("cf-job", "")
    if job.failed and made_by != job.id:
        for _, failure in failures_of(job, ledger=ledger, store=store):
            if failure.key == source.key:
                return status("failed", code=failure.code, message=failure.message)
    if made_by:
        return status("done", cutout=str(names.cutout), mask=str(names.mask))
    return status("open") if job.closed is None and _is_listed(job, source.key, ledger, store) else None


def _is_listed(job: Job, key: str, ledger: Ledger, store: Store) -> bool:
    parts = [part.number for part in ledger.parts(job.id) if part.first <= key <= part.last]
    return any(task.key == key for number in parts for task in read_part(store, job, number))


def _failed_row(key: str, failure: Failure | None, state: ImageState) -> tuple[str, str, str, str]:
    if failure is None:
        return key, "failed", state.name.lower(), ""
    return key, "failed", failure.code, failure.message


@dataclasses.dataclass(frozen=True)
class _Report:
    """Its files, each written only while it is ours to write."""

    job: Job
    store: Store
    check: Callable[[], None]

    def put(self, name: str, body: bytes, *, content_type: str) -> None:
        def is_ours() -> bool:
            self.check()
            return True

        put_if_ours(
            self.store,
            self._place(name),
            body,
            content_type=content_type,
            conditional=self.job.conditional,
            is_ours=is_ours,
        )

    def put_csv(self, name: str, rows: Iterable[tuple[str, str, str, str]]) -> None:
        bucket = Location.parse(self.job.source).bucket
        text = io.StringIO()
        writer = csv.writer(text)
        for key, status, code, message in rows:
            writer.writerow([bucket, key, "", status, code, "", message])
        self.put(name, text.getvalue().encode(), content_type="text/csv")

    def put_dead(self, name: str, failures: Mapping[int, Failure]) -> None:
        """Empty, where the job was closed before with failures that are done by now."""
        if failures or self.store.head(self._place(name), role="output") is not None:
            body = "".join(f"{json_row(index, failure)}\n" for index, failure in failures.items())
            self.put(name, body.encode(), content_type="application/jsonl")

    def put_made(self, name: str, pairs: Sequence[tuple[ImageTask, ImageState]], unsure: Sequence[bool]) -> None:
        """What the next submission need not look at again (`producer/submission/skip_index.py`)."""
        lines = [
            made_line(task.key, task.etag)
            for (task, state), is_unsure in zip(pairs, unsure, strict=True)
            if state in _SUCCEEDED and task.etag and not is_unsure
        ]
        self.put(name, pack(lines), content_type="application/gzip")

    def _place(self, name: str) -> Location:
        return _location(self.job, f"report/{name}")


def _read_csv(store: Store, job: Job, name: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(_read(store, job, name), newline=""))


def _read(store: Store, job: Job, name: str) -> str:
    """Empty when there is none."""
    try:
        return store.get(_location(job, name), role="output", max_bytes=MAX_PART_BYTES)[0].decode()
    except OutputError as exc:
        if exc.code != "output_missing":
            raise
        return ""


def _location(job: Job, name: str) -> Location:
    return record_location(job.destination, job.id, name)
