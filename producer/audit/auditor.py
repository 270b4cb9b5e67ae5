"""Audits a job: compares its manifest, its outputs in S3 and the ledger, to prove that no image is lost, doubled or
silently wrong.

The destination is listed once. Cutout and mask of each done image must be there. Only with `deep`, or where the listing
shows a mask written after its cutout, one HEAD each checks that the cutout names its source and the mask's ETag. Pixels
are not decoded.

  code             disagreement                                                    repair
  job_lost         a job that was not closed is not in Redis                       rebuilds it from S3
  rows_missing     the ledger has fewer images than the manifest                   adds them
  not_recorded     outputs of this job that the ledger does not record             records them
  output_missing   a done image without cutout or mask                             makes it again
  output_wrong     a cutout or mask that is empty or was replaced                  makes it again
  books_wrong      counts that contradict the states; leftover messages or claims  corrects or removes them
  manifest_lost    a part of the manifest is not in S3                             none
  listing_unknown  images that a listing or a watch found last may be missing      none
  extra_object     an object that no image of a job explains                       none: it may be someone's
  cancelled_left   output that a killed worker left of a cancelled image           none: delete it, or submit again

Images in the window are left to their workers. Safe to repeat, and to run beside workers and dispatchers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from jobs.errors import JobError
from jobs.job import ImageState, JobKind
from jobs.ledger import Ledger
from jobs.s3.client import Store
from jobs.s3.location import Location, is_s3_uri
from producer.audit.outputs import Disagreement, OutputAudit, output_keys
from producer.audit.rebuild import AuditedJob, add_rows, rebuild, resume
from producer.records.destination_index import DestinationIndex, index_destination

HEADS = 16
"""HEAD requests at a time."""


def audit(
    target: str, *, repair: bool, deep: bool, ledger: Ledger, store: Store, seen: Callable[[int], None]
) -> Iterator[Disagreement]:
    """`target`: a job's id, or its folder s3://BUCKET/TO/_cutfleet/JOB/. Calls `seen` with the number of images checked
    so far. Raises `JobError` when there is no such job."""
    audited = AuditedJob(_find_folder(target, ledger), ledger=ledger, store=store)
    yield from _check_records(audited, repair=repair)
    if audited.job.kind is not JobKind.PREVIEW:
        yield from _check_objects(audited, repair=repair, deep=deep, seen=seen)
    elif repair:
        resume(audited)


def _find_folder(target: str, ledger: Ledger) -> Location:
    if is_s3_uri(target):
        return Location.parse(target)
    job = ledger.jobs.find(target)
    if job is None:
        raise JobError(
            f"There is no job {target!r} on {ledger.name}. If Redis was lost, name the job's folder in S3: "
            f"cutfleet audit s3://BUCKET/TO/_cutfleet/{target}/ --repair"
        )
    return job.record_path("")


def _check_records(audited: AuditedJob, *, repair: bool) -> Iterator[Disagreement]:
    for number in audited.lost_parts():
        yield Disagreement("manifest_lost", f"Part {number} of the manifest is not in S3.")
    if audited.is_lost:
        yield from _check_lost(audited, repair=repair)
    elif missing := _describe_missing_rows(audited):
        if repair:
            add_rows(audited)
        yield Disagreement("rows_missing", missing, repaired="added" if repair else "")
    if audited.in_ledger:
        yield from _check_counts(audited, repair=repair)


def _check_lost(audited: AuditedJob, *, repair: bool) -> Iterator[Disagreement]:
    if repair:
        rebuild(audited)
    yield Disagreement("job_lost", "The job, or a part of it, is not in Redis.", repaired="rebuilt" if repair else "")
    job = audited.job
    if audited.record.total is not None or job.list_in_background:
        return
    if job.watch:
        advice = "Images that arrived last were in Redis only: start the watch with --existing to find them."
    else:
        advice = f"It was still being listed: run `cutfleet submit {job.source} --resume {job.id}`."
    yield Disagreement("listing_unknown", advice)


def _describe_missing_rows(audited: AuditedJob) -> str:
    """Return an empty text when the ledger has all rows."""
    job, total = audited.job, audited.record.total
    if total is None or (job.total >= total and job.listed):
        return ""
    if job.listed or job.total < total:
        return f"The ledger has {job.total} images, the manifest {total}."
    return "The manifest is complete, but the ledger does not know that."


def _check_counts(audited: AuditedJob, *, repair: bool) -> Iterator[Disagreement]:
    found = audited.ledger.jobs.check(audited.job.id, repair=repair)
    for name, (stored, recounted) in found.counts.items():
        text = f"{name}: {stored}, should be {recounted}"
        yield Disagreement("books_wrong", text, repaired="corrected" if repair else "")
    for image in found.leftovers:
        text = f"{image} is final, but has a message or a claim"
        yield Disagreement("books_wrong", text, repaired="removed" if repair else "")


def _check_objects(
    audited: AuditedJob, *, repair: bool, deep: bool, seen: Callable[[int], None]
) -> Iterator[Disagreement]:
    began = time.time()
    states = audited.all_states()
    with index_destination(audited.job.destination, audited.store) as index, ThreadPoolExecutor(HEADS) as pool:
        outputs = OutputAudit(audited, index, pool, repair=repair, deep=deep)
        for tasks in audited.tasks():
            first, end = tasks[0].index, tasks[-1].index + 1
            before = [ImageState(state) for state in states[first:end].ljust(len(tasks), b"\0")]
            yield from outputs.check(tasks, before, audited.states(tasks))
            seen(end)
        if repair:
            resume(audited)
        yield from _find_extra_objects(audited, index, before=began)


def _find_extra_objects(audited: AuditedJob, index: DestinationIndex, *, before: float) -> Iterator[Disagreement]:
    """Reads manifests of other jobs only while an object is unexplained. `before`: Unix time; newer objects are
    ignored."""
    own_folder = audited.job.record_path("")
    for folder in sorted(index.folders, key=str, reverse=True):
        if folder == own_folder:
            continue
        if next(index.unexplained(before=before), None) is None:
            return
        other = AuditedJob(folder, ledger=audited.ledger, store=audited.store)
        for tasks in other.tasks():
            index.find(output_keys(other.job, tasks))
    for key in index.unexplained(before=before):
        yield Disagreement("extra_object", "no job made it", str(own_folder.at(key)))
